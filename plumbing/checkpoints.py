"""Checkpoints in and out: this project's own, and those that plumbing/released.py knows."""

import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors.torch import save

from inputs.vae import SCALE, SPEC, Latents, load_vae, read_stats, same_spec
from plumbing.files import OURS, lock, one_line, read_pt, sha256_of, write_whole
from plumbing.processes import is_first
from plumbing.released import recognised, weights_of

STATS = "pretrained_models/sdvae-ft-mse-f8d4-latents-stats.pt"
PLACES = "data out latents tokens init encoder_weights wandb".split()  # of one machine alone
WORDS = dict(num_classes="a number of classes of", in_channels="channels", encoder_dim="a teacher of width")
WORDS.update(classes="classes", images="images", input_size="--image-size, by the VAE's factor,")  # no flags
WRONG = (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RuntimeError, AttributeError)  # shapes, names


def read_checkpoint(path):
    """The dict in a .pt or .safetensors file, without executing anything in it. FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        hint = f"; it is a folder: {path}/last.pt" if (Path(path) / "last.pt").is_file() else ""
        raise FileNotFoundError(f"{path}: there is no such checkpoint file{hint}")
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


def load_checkpoint(path, /, ema=True, released=None, **overrides):
    """-> (model in eval mode on the CPU, Config). Reads our files and those of others, strictly.

    ema: which weights, see weights_of; released: "sit" for a file of SiT's own that does not show it. A released file's
    config is inferred from its shapes; overrides set what shapes do not show (num_heads of an unusual width, path). A
    missing or surplus tensor is a ValueError that names it, except that the projector, which sampling does not use, may
    be absent, and is ignored, whatever it is, with projector=None.
    """
    return open_checkpoint(path, ema, released, **overrides)[:2]


def open_checkpoint(path, /, ema=True, released=None, **overrides):
    """-> (model, Config) as load_checkpoint, and the Method and the dict of the file."""
    data = read_checkpoint(path)
    method, settings, weights = understood(path, data, ema, released)
    try:
        if overrides.get("projector", True) is None:
            weights = {k: v for k, v in weights.items() if not k.startswith("projectors.")}
        if not any(k.startswith("projectors.") for k in weights):
            settings = {**settings, "projector": None}
        config = method.Config(**{**settings, **overrides})
        if config.depth > len(weights):  # before time and memory go into blocks that the file cannot fill
            raise ValueError(f"its config has {config.depth} blocks, and the file {len(weights)} tensors")
        with torch.device("meta"):  # no initialisation: every tensor comes from the file
            model = method.model(config)
    except WRONG as e:
        raise ValueError(f"{path}: no config fits its tensors: {one_line(e, 300)}") from e
    fits(path, weights, model.state_dict())
    model.load_state_dict({k: v.float().clone() for k, v in weights.items()}, assign=True)
    return model.requires_grad_(False).eval(), config, method, data


def initial_weights(path, released, method, config):
    """What a run of `method` starts from -> (tensors of its network, what starts anew, the file's model and dict).

    They are the file's average or, where it has none, its live weights. ValueError where they are not all of the
    network's, but for the label table and the projector, which start anew where their sizes differ.
    """
    model, theirs, _, data = open_checkpoint(path, None, released)
    with torch.device("meta"):
        expected = method.model(config).state_dict()
    weights, anew = model.state_dict(), []
    for part, name in (("y_embedder.", "the label table"), ("projectors.", "the projector")):
        old, new = ({k: v.shape for k, v in state.items() if k.startswith(part)} for state in (weights, expected))
        if old != new:
            weights, expected = ({k: v for k, v in s.items() if not k.startswith(part)} for s in (weights, expected))
            anew += [name] if new else []
    fits(path, weights, expected)
    for key in ("num_heads", "path") if "config" in data else ("path",) if "args" in data else ():
        if getattr(theirs, key, None) != getattr(config, key, None):
            raise ValueError(f"{path} has {key} {getattr(theirs, key)}, not {getattr(config, key)}: they must agree")
    return weights, anew, model, data


def understood(path, data, ema, released=None):
    """A file's dict -> (Method, fields of its Config, weights as the Method's network takes them)."""
    try:
        weights = weights_of(data, ema)
    except ValueError as e:
        raise ValueError(f"{path} {e}") from e
    try:
        method, settings, weights = recognised(data, weights, released)
        known = {f.name for f in fields(method.Config)}
        gone = {k: v for k, v in settings.items() if k not in known}
    except WRONG as e:
        raise ValueError(f"{path}: {one_line(e, 300)}") from e
    if gone and is_first():
        print(f"note: {path} was trained with {listed(gone)}, which this version does not know and goes without")
    return method, {k: v for k, v in settings.items() if k in known}, weights


def listed(settings):
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def fits(path, weights, expected):
    """ValueError, naming tensors, where a file's weights are not those of a state dict."""
    problems = [f"missing {k}" for k in expected if k not in weights]
    problems += [f"surplus {k}" for k in weights if k not in expected]
    problems += [
        f"{k} is {list(weights[k].shape)}, not {list(v.shape)}"
        for k, v in expected.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:5])} ({len(problems)} in all)")


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


# ---- Sampled from, or handed on ----


def find_vae(asked, opened):
    """The Latents that turn samples into images; None for a model of pixels. ValueError where they do not fit."""
    config, spec, ckpt = opened.model.config, opened.file.get("latent"), asked.ckpt
    if opened.method.stored_vae:
        if asked.vae is None or asked.latent_scale:
            raise ValueError(f"{ckpt} makes latents of statistics of its own: leave --vae none and --latent-scale out")
        named = asked.vae or asked.vae_weights
        given = load_vae(asked.vae, asked.vae_weights, opened.device) if named else None
        latent = opened.method.stored_vae(opened.file, opened.model, opened.device, given)
        if given and latent.vae is not given.vae:
            raise ValueError(f"{ckpt} holds its own VAE: leave --vae and --vae-weights out")
        return latent
    if spec is None and config.in_channels == 3:
        if asked.vae or asked.latent_scale:
            raise ValueError(f"{ckpt} makes pixels: leave --vae and --latent-scale out")
        return None
    if asked.vae is None:
        raise ValueError(f"{ckpt} makes latents, which take a VAE: --vae none is for pixels")
    name = asked.vae or (spec["vae"] if spec else "sd-vae-ft-mse")
    if name == "local":
        raise ValueError(f"{ckpt} was trained on a VAE of sha256 {spec['sha256'][:8]}: name its folder after --vae")
    if not (spec or asked.latent_scale):
        refuse_unscaled(ckpt, opened.file)
    vae, found = load_vae(name, asked.vae_weights, opened.device)
    if asked.latent_scale not in ("", "vae"):
        found.update(zip(SCALE, read_stats(asked.latent_scale, found["channels"])))
    elif spec and not asked.latent_scale:
        found.update({key: spec[key] for key in SCALE})
    elif not asked.latent_scale and opened.method.LATENT_SCALE:
        found["scale"] = [opened.method.LATENT_SCALE] * found["channels"]
    if spec:
        same_spec(found, spec, ckpt)
    if found["channels"] != config.in_channels:
        raise ValueError(f"{ckpt} makes {config.in_channels} channels, --vae {name} takes {found['channels']}")
    return Latents(vae, found)


def export_average(path, data, ema, released, target):
    """Write the average in a checkpoint's dict alone to `target`, .safetensors, with what sampling and --init ask of a
    file in its metadata, as JSON. path: the checkpoint's. FileExistsError or ValueError where it cannot be.
    """
    if not str(target).endswith(".safetensors"):
        raise ValueError(f"--export {target}: the name must end in .safetensors")
    if Path(target).exists():
        raise FileExistsError(f"{target} exists and is left as it is; choose another name")
    method, config, weights = understood(path, data, ema, released)
    tensors = {f"ema.{name}": tensor for name, tensor in weights.items()}
    if method.stored_vae:
        tensors.update({f"vae.{name}": tensor for name, tensor in data.get("vae", {}).items()})
    facts = {key: data[key] for key in ("latent", "vae_config", "step", "steps") if key in data}
    settings = {k: v for k, v in (data.get("settings") or {}).items() if k not in PLACES} | {"method": method.name}
    facts.update(config=config, settings=settings, classes=data.get("classes") or [], checkpoint_sha256=sha256_of(path))
    metadata = {OURS: json.dumps(facts), "format": "pt"}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # none may share its memory
    write_whole(target, lambda f: f.write(save(tensors, metadata)))


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
    old = {**checkpoint["config"], "classes": checkpoint["classes"], "images": checkpoint["images"]}
    refuse_change(run.out, old, {"classes": data.classes, "images": len(data), **asdict(config)})
    before, now = checkpoint.get("weights_sha256"), getattr(data, "weights_sha256", None)
    if before and now and before != now:
        raise ValueError(f"{run.tokens} is of other weights of the encoder than those that {run.out} was started with")
    if spec:
        same_spec(spec, checkpoint["latent"], f"{run.out}/last.pt")


def same_settings(run, checkpoint):
    """ValueError where a checkpoint belongs to a run whose steps would be others than what is asked."""
    names = "method align model encoder cls_weight seed batch_size".split()
    refuse_change(run.out, checkpoint["settings"], {name: getattr(run, name) for name in names})


def refuse_change(out, old, new):
    for key, now in new.items():
        was = old.get(key, now)
        if was != now:
            if isinstance(now, list):  # of classes: the first few that differ
                was, now = (
                    ", ".join([c for c in a if c not in b][:5]) or str(len(a)) for a, b in ((was, now), (now, was))
                )
            name = WORDS.get(key, f"--{key.replace('_', '-')}")
            raise ValueError(f"{out} was started with {name} {was}, not {now}; start another --out")


def refuse_used(out):
    if out.exists() and not (out.is_dir() and {file.name for file in out.iterdir()} <= {".lock", "config.json.tmp"}):
        hint = "" if any(out.glob("*.pt")) else " (it has no checkpoint, and would start anew)"
        raise FileExistsError(f"{out} exists; --resume continues it{hint}, another --out leaves it as it is")


def hold_folder(out, resume):
    """Make OUT and hold it against a second run -> a context. FileExistsError or ValueError where it is taken."""
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out)
    if not resume:
        refuse_used(out)
    return held
