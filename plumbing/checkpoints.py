"""Checkpoints in and out: this project's, and the released REPA and iREPA ones; a variant reads its own kind's."""

import os
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch

from inputs.vae import SPEC, same_spec
from irepa import REPA, SIZES
from plumbing.files import lock, one_line, read_pt, write_whole
from plumbing.methods import method_named, method_names

EMA = ("ema", "model_ema1")  # what files call the moving average of the weights
STATS = "pretrained_models/sdvae-ft-mse-f8d4-latents-stats.pt"
PREFIXES = ("module.", "_orig_mod.", "net.")  # of DDP, torch.compile and wrappers


def read_checkpoint(path):
    """The dict in a .pt file, without executing anything in it. FileNotFoundError, or ValueError saying why not."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint file")
    data = read_pt(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, not a checkpoint")
    spec, names, step = data.get("latent"), data.get("classes"), data.get("step", data.get("steps", 0))
    if "settings" in data:  # ours: what lies beside the weights is used, too
        kinds = all(isinstance(data.get(k, {}), dict) for k in ("settings", "config"))
        if not kinds or not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{path} is damaged: its settings, config or classes are not what train.py writes")
        if spec is not None and not (isinstance(spec, dict) and {*SPEC} <= spec.keys()):
            raise ValueError(f"{path} is damaged: its latent entry is not a VAE's name, hash, channels, scale and bias")
    if not isinstance(step, int):
        raise ValueError(f"{path} is damaged: its step is {step!r}, not a number")
    return data


def load_checkpoint(path, /, ema=True, **overrides):
    """-> (model in eval mode on the CPU, Config). Reads our files, released REPA and iREPA ones, a variant's; strictly.

    A released file's config is inferred from its shapes; overrides set what shapes do not show (num_heads of an
    unusual width, path). A missing or surplus tensor is a ValueError that names it, except that the projector,
    which sampling does not use, may be absent, and is ignored, whatever it is, with projector=None.
    """
    return open_checkpoint(path, ema, **overrides)[:2]


def open_checkpoint(path, /, ema=True, **overrides):
    """-> (model, Config) as load_checkpoint, and the Method and the dict of the file."""
    data = read_checkpoint(path)
    try:
        weights = weights_of(data, ema)
        if overrides.get("projector", True) is None:
            weights = {k: v for k, v in weights.items() if not k.startswith("projectors.")}
    except ValueError as e:
        raise ValueError(f"{path} {e}") from e
    try:
        method, settings = recognised(data, weights)
        if not any(k.startswith("projectors.") for k in weights):
            settings = {**settings, "projector": None}
        settings = {**settings, **overrides}
        for field in set(settings) - {f.name for f in fields(method.Config)}:
            raise ValueError(f"unknown field {field!r} of Config")
        config = method.Config(**settings)
        if config.depth > len(weights):  # before time and memory go into blocks that the file cannot fill
            raise ValueError(f"its config has {config.depth} blocks, and the file {len(weights)} tensors")
        with torch.device("meta"):  # no initialisation: every tensor comes from the file
            model = method.model(config)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, RuntimeError, AttributeError) as e:
        raise ValueError(f"{path}: no config fits its tensors: {one_line(e)[:300]}") from e
    expected = model.state_dict()
    problems = [f"missing {k}" for k in expected if k not in weights]
    problems += [f"surplus {k}" for k in weights if k not in expected]
    problems += [
        f"{k} is {list(weights[k].shape)}, not {list(v.shape)}"
        for k, v in expected.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:5])} ({len(problems)} in all)")
    model.load_state_dict({k: v.float().clone() for k, v in weights.items()}, assign=True)
    return model.requires_grad_(False).eval(), config, method, data


# ---- Whatever a file calls it ----


def weights_of(data, ema=True):
    """The state dict in a checkpoint's dict, under our names. ValueError where there is none."""
    weights = next((data[k] for k in EMA if k in data), None) if ema else data.get("model")
    if weights is None and data and all(torch.is_tensor(v) for v in data.values()):
        weights = data  # a bare state dict
    if not isinstance(weights, dict) or not all(torch.is_tensor(v) for v in weights.values()):
        raise ValueError(f"has no {'ema' if ema else 'model'} weights; it holds: {', '.join(map(str, data))}")
    if not all(isinstance(k, str) for k in weights):
        raise ValueError("is damaged: its weights have names that are no strings")
    weights = {released_name(k): v for k, v in weights.items()}
    # REPA's oldest files number the blocks after the alignment anew, as decoder_blocks
    first = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + first}", k): v for k, v in weights.items()
    }


def released_name(key):
    """Without the prefixes of wrappers, and with REPA's projectors.0.{0,2,4} under iREPA's name."""
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    parts = key.split(".")
    if parts[0] == "projectors" and len(parts) == 4 and parts[2].isdigit():
        key = f"projectors.{parts[1]}.projection_layer.{parts[2]}.{parts[3]}"
    return key


def recognised(data, weights):
    """-> (Method, fields of its Config): as one of our files says, or as a released one shows by its tensors."""
    settings, config, args = data.get("settings"), data.get("config"), data.get("args")
    if isinstance(settings, dict):
        if settings.get("method") not in method_names():
            raise ValueError(f"its method is {settings.get('method')!r}, which is none of ours")
        return method_named(settings["method"]), config
    method, found = method_named("irepa"), None
    for other in map(method_named, method_names()):
        found = other.released(weights, args)
        if found is not None:
            method = other
            break
    if isinstance(config, dict):
        return method, config
    return method, {**(infer_config(weights, args) if found is None else found), **projector_of(weights)}


def refuse_unscaled(path, data):
    """ValueError where a checkpoint's dict is of the iREPA release: the scale of its latents lies in another file.

    Its args show it, or the name of its projector, which is REPA's no more.
    """
    if "settings" in data:  # ours
        return
    args = data.get("args")
    args = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    names = [str(key) for part in (data, *data.values()) if isinstance(part, dict) for key in part]
    if {"zscore_alpha", "spnorm_method"} & args.keys() or any("projection_layer" in name for name in names):
        raise ValueError(
            f"{path} is of the iREPA release, whose latents are scaled per channel: fetch {STATS} from its"
            " iREPA-collections, as in README, and name the file with --latent-scale (or vae, if it was trained so)"
        )


def infer_config(weights, args=None):
    """The fields of irepa.Config that a released SiT shows by its shapes, and its args (a Namespace, or None)."""
    if "x_embedder.proj.weight" not in weights:
        raise ValueError("x_embedder.proj.weight is missing: these are not the weights of a SiT")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    by_width = {w: (heads, encoder_depth) for _, w, heads, encoder_depth in SIZES.values()}
    heads, encoder_depth = by_width.get(width, (1, 1))
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    return dict(
        input_size=round(weights["pos_embed"].shape[1] ** 0.5) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        num_classes=weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        path=getattr(args, "path_type", "linear"),
        encoder_depth=min(getattr(args, "encoder_depth", encoder_depth), depth),
    )


def projector_of(weights):
    """The fields of the projector in a released state dict."""
    layer = "projectors.0.projection_layer"
    if f"{layer}.4.weight" in weights:
        hidden, encoder_dim = weights[f"{layer}.0.weight"].shape[0], weights[f"{layer}.4.weight"].shape[0]
        return dict(REPA, projector_dim=hidden, encoder_dim=encoder_dim)
    if f"{layer}.weight" in weights:
        shape = weights[f"{layer}.weight"].shape
        kernel = shape[2] if len(shape) == 4 else 3
        return dict(projector="conv" if len(shape) == 4 else "linear", encoder_dim=shape[0], kernel_size=kernel)
    return dict(projector=None)


# ---- A run's own ----


def save_checkpoint(out, state, keep):
    """out/last.pt, and its numbered names, of which the newest `keep` stay."""
    write_whole(out / "last.pt", lambda f: torch.save(state, f))
    if keep:  # a second name of the same file costs nothing until last.pt is another
        numbered = out / f"step-{state['step']:07d}.pt"
        numbered.unlink(missing_ok=True)
        try:
            os.link(out / "last.pt", numbered)
        except OSError:  # a file system without hard links
            shutil.copyfile(out / "last.pt", numbered)
        for old in sorted(out.glob("step-*.pt"))[:-keep]:
            old.unlink()


def read_last(out):
    """The checkpoint in out/last.pt. ValueError, naming the newest good one in `out`, where it cannot be used."""

    def read(path):
        checkpoint = read_checkpoint(path)
        if not {*"model ema opt step settings config classes images seconds".split()} <= checkpoint.keys():
            raise ValueError(f"{path} is no checkpoint of train.py")
        return checkpoint

    try:
        return read(out / "last.pt")
    except (ValueError, FileNotFoundError) as e:
        for path in sorted(out.glob("step-*.pt"), reverse=True):
            try:
                read(path)
            except ValueError:
                continue
            good = f"the newest good one is {path}: copy it to {out / 'last.pt'}"
            raise ValueError(f"{one_line(e)}; {good}") from e
        raise ValueError(f"{one_line(e)}; there is no other good one in {out}") from e


def same_run(run, config, data, spec, checkpoint):
    """ValueError where a checkpoint belongs to another network, other data or other latents than what is asked."""
    settings = checkpoint["settings"]
    old = {**settings, **checkpoint["config"], "classes": checkpoint["classes"], "images": checkpoint["images"]}
    new = {**asdict(config), "classes": data.classes, "images": len(data)}
    new.update({key: getattr(run, key) for key in "method align encoder seed batch_size".split()})
    for key in new:
        if old.get(key, new[key]) != new[key]:
            raise ValueError(f"{run.out} was started with {key} {old[key]}, not {new[key]}; start another --out")
    if spec:
        same_spec(spec, checkpoint["latent"], f"{run.out}/last.pt")


def refuse_used(out):
    if out.exists() and not (out.is_dir() and {file.name for file in out.iterdir()} <= {".lock", "config.json.tmp"}):
        raise FileExistsError(f"{out} exists; --resume continues it, another --out leaves it as it is")


def hold_folder(out, resume):
    """Make OUT and hold it against a second run -> a context. FileExistsError or ValueError where it is taken."""
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out)
    if not resume:
        refuse_used(out)
    return held
