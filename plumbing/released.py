"""Other people's checkpoints: which network of a file is meant, and what its names and shapes are in our words."""

import argparse
import math
import re

import torch

from irepa import REPA, SIZES
from plumbing.methods import method_named, method_names

TABLE = "y_embedder.embedding_table.weight"  # each network that is known here has it, and nothing else
INSIDE = r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # what wrappers put inside of a name
SIT_PATHS = dict(Linear="linear", GVP="cosine")  # SiT's own names of paths, and ours

# ---- Which network of a file ----


def networks_in(data):
    """-> {place: state dict} of each network in a file's dict: "ema.", "model.module.", "state_dict.ema_model.", ...

    Where the label table lies, there lies its network, whatever the wrappers are called. What lies elsewhere, such as
    an optimiser or a VAE, is not the network's.
    """
    tensors, todo = {}, [("", data, 2)]
    while todo:
        place, entries, levels = todo.pop()
        for key, value in entries.items():
            name = re.sub(INSIDE, "", f"{place}{key}")
            if torch.is_tensor(value):
                tensors[name] = value
            elif isinstance(value, dict) and levels:
                todo.append((f"{name}.", value, levels - 1))
    places = sorted(name.removesuffix(TABLE) for name in tensors if name.endswith(TABLE))
    return {at: {k.removeprefix(at): v for k, v in tensors.items() if k.startswith(at)} for at in places}


def weights_of(data, ema=True):
    """The state dict of a network in a file's dict, under our names. ValueError where it is not there.

    ema: 1 or True, and 2, are the first and the second moving average of the weights, 0 or False the live ones, None
    the first average or, where there is none, the live ones. One network that is not said to be either is both.
    """
    found = networks_in(data)
    averages = [at for at in found if re.search(r"(^|[._])ema", at)]
    live = [at for at in found if at not in averages]
    if not found:
        held = ", ".join(map(str, data))[:200]
        raise ValueError(f"holds no network that is known here ({TABLE} is missing); it holds: {held}")
    if ema not in (None, 0, 1, 2):
        raise ValueError(f"has no ema weights number {ema}: --ema is 1 or 2")
    nameless = "model" not in data and not averages
    if ema is None or (ema == 1 and nameless):
        ema = len(averages) > 0
    if ema and len(averages) < ema:
        hint = "--ema 1 takes the one that there is" if averages else "--no-ema takes the live ones"
        raise ValueError(f"has no {'second ' if ema == 2 else ''}ema weights; {hint}")
    if not ema and len(live) != 1:
        hint = f"but {len(live)} networks: {', '.join(live)}" if live else "only averages: leave --no-ema out"
        raise ValueError(f"has no single set of live weights, {hint}")
    weights = {our_name(k): v for k, v in found[averages[ema - 1] if ema else live[0]].items()}
    # REPA's oldest files number the blocks after the alignment anew, as decoder_blocks
    first = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    return {
        re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + first}", k): v for k, v in weights.items()
    }


def our_name(key):
    """REPA's projectors.0.{0,2,4} under iREPA's name."""
    return re.sub(r"^projectors\.(\d+)\.(\d+)\.", r"projectors.\1.projection_layer.\2.", key)


# ---- What it is ----


def recognised(data, weights, released=None):
    """-> (Method, fields of its Config, weights): as one of our files says, or as a released one shows by its tensors.

    released: "sit" or "dit", whose file it is, where that does not show. The weights are returned as the Method's
    network takes them. ValueError where they are of nothing that can be sampled here.
    """
    settings, config = data.get("settings"), data.get("config")
    if isinstance(settings, dict) or isinstance(config, dict):
        if released:
            raise ValueError(f"it is train.py's own: leave --released {released} out")
    if isinstance(settings, dict):
        if settings.get("method") not in method_names():
            name = settings.get("method")
            raise ValueError(f"its method is {name!r}, which is not there: put variants/{name}.py in its place")
        return method_named(settings["method"]), config, weights
    args = data.get("args")
    args = argparse.Namespace(**args) if isinstance(args, dict) else args
    found = {name: method_named(name).released(weights, args) for name in method_names()}
    name = next((name for name in found if found[name] is not None), "irepa")
    if isinstance(config, dict):
        return method_named(name), config, weights
    if found[name] is None:
        shown = infer_config(weights, args)
        weights, shown["path"] = turned(weights, args, released)
    elif released:
        raise ValueError(f"its tensors are those of --method {name}: leave --released {released} out")
    else:
        shown = {**(infer_config(weights, args) if "x_embedder.proj.weight" in weights else {}), **found[name]}
    return method_named(name), {**shown, **projector_of(weights)}, weights


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
        num_classes=weights[TABLE].shape[0] - 1,
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


# ---- SiT's own ----


def turned(weights, args=None, released=None):
    """-> (weights, path): those of SiT's own code made ours, exactly; those of REPA and iREPA as they are.

    SiT's time runs from noise (0) to data (1), and its velocity is data minus noise: v(x, t) = -v_SiT(x, 1 - t), where
    the second half of its channels, a variance that nothing uses, is left out. Its files show it by the path of its
    args, and, as DiT's of the same names and shapes, by twice the channels in the last layer.
    """
    path, linear = getattr(args, "path_type", None), weights["final_layer.linear.weight"]
    _, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    doubled = len(linear) == 2 * channels * patch**2
    if path in ("linear", "cosine") and released:
        raise ValueError(f"its args are those of REPA's code: leave --released {released} out")
    if released == "dit":
        raise ValueError("DiT predicts the noise of DDPM's 1,000 steps, not a velocity: it cannot be sampled here")
    if released not in (None, "sit"):
        raise ValueError(f"--released is sit or dit, not {released}")
    if path is None and doubled and not released:
        raise ValueError(
            "its last layer has twice the channels, as SiT's own and DiT's have, which cannot be told apart:"
            " say --released sit if it is SiT's"
        )
    if not doubled and not released and path in (None, "linear", "cosine"):
        return weights, path or "linear"
    prediction = getattr(args, "prediction", "velocity")
    if path not in (None, *SIT_PATHS) or prediction != "velocity":
        raise ValueError(f"it predicts SiT's {prediction} on the path {path}: only velocity on Linear or GVP is read")
    ours = dict(weights)
    for kind in ("weight", "bias"):
        layer = weights[f"final_layer.linear.{kind}"].unflatten(0, (patch**2, -1))
        ours[f"final_layer.linear.{kind}"] = -layer[:, :channels].flatten(0, 1)
    # the embedding of 1 - t is a linear map of that of t: cos(w - wt) = cos w cos wt + sin w sin wt, and so on
    omega = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).double()  # the network's own
    cos, sin = omega.cos(), omega.sin()
    on_cos, on_sin = weights["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)
    layer = torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1)
    ours["t_embedder.mlp.0.weight"] = layer.float()
    return ours, SIT_PATHS.get(path, "linear")
