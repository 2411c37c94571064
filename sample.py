"""Sample from a checkpoint, ours or a released REPA, iREPA or JiT one.

    python sample.py --ckpt runs/demo/last.pt --cfg 2                                 a labelled grid of images, PNG
    python sample.py --ckpt last.pt --num 50000 --npz samples.npz                     the set that fid.py scores
    torchrun --nproc_per_node=8 sample.py --ckpt last.pt --num-images 50000 --npz samples.npz

The defaults are the protocol of the reported numbers: EMA weights, SDE Euler-Maruyama with 250 steps, no guidance.
Noise and label of image i depend on (seed, i) alone, so that its pixels are the same for any batch size or number of
processes, to float rounding. A JSON beside the samples records every setting and the checkpoint's hash. A run that was
stopped goes on when it is started again: finished batches lie in NAME.parts until the last one is there (PNG folders
of --out-dir start anew).
"""

import argparse
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from inputs.images import line
from inputs.latents import SPEC, decode, load_vae, lock, read_pt, same_spec, write_whole
from irepa import SIZES, Config, SiT, irepa_loss, path_coefficients

VARIANTS = ("jit", "meanflow", "repa_e")  # the files of variants/

# ---------------------------------------------------------------------------------------------------------------
# Velocity -> samples


def guided(model, y, scale=1.0, interval=(0.0, 1.0)):
    """velocity(x, t) of `model` for labels y [B], with classifier-free guidance where interval[0] <= t <= interval[1].

    v = v_null + scale * (v_y - v_null). Scale 1 is exactly the conditional model, at one forward an evaluation.
    velocity.for_step(t) is the same with the choice at t kept for a whole step, as the released Heun sampler does.
    """
    null = torch.full_like(y, model.config.num_classes)
    dtype = next(model.parameters()).dtype

    def evaluate(x, t, guide):
        z, times = x.to(dtype), torch.as_tensor(t).to(x.device, dtype).expand(len(x))
        if not guide:
            return model(z, times, y)[0].to(x.dtype)
        v, v_null = model(z.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([y, null]))[0].to(x.dtype).chunk(2)
        return v_null + scale * (v - v_null)

    def guides(t):
        return scale != 1 and interval[0] <= float(t) <= interval[1]

    def velocity(x, t):
        return evaluate(x, t, guides(t))

    velocity.for_step = lambda start: lambda x, t: evaluate(x, t, guides(start))
    return velocity


def state(noise):
    return noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)  # MPS has no float64


@torch.no_grad()
def sample_ode(velocity, noise, steps, heun=False):
    """Integrate dx/dt = velocity(x, t) from t = 1 (noise, [B, ...]) to 0 in equal Euler or Heun steps.

    t is a 0-dim float64 tensor on the CPU. The state is float64; the result has the dtype of `noise`.
    """
    x, times = state(noise), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, t_next in zip(times[:-1], times[1:]):
        v = velocity.for_step(t) if hasattr(velocity, "for_step") else velocity
        slope = v(x, t)
        if heun and t_next > 0:  # the last step stays Euler, as in the released sampler
            slope = (slope + v(x + (t_next - t) * slope, t_next)) / 2
        x = x + (t_next - t) * slope
    return x.to(noise.dtype)


@torch.no_grad()
def sample_sde(velocity, noise, steps, generator, last_step=0.04, path="linear"):
    """Euler-Maruyama for the reverse SDE with the velocity's marginals and diffusion w(t) = 2t (SiT, section 2.3).

    t goes from 1 to `last_step` in steps-1 equal steps, then to 0 in one without noise. `generator` is one
    torch.Generator, or a list of one for each image: then an image does not depend on its batch.
    """
    x = state(noise)
    times = torch.cat([torch.linspace(1, last_step, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    for t, t_next in zip(times[:-1], times[1:]):
        v = velocity(x, t)
        alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
        ratio = alpha / d_alpha
        score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
        w, dt = 2 * t, t_next - t
        x = x + (v - w / 2 * score) * dt
        if t_next > 0:
            x = x + torch.sqrt(w * -dt) * randn(noise.shape, generator, noise.device)
    return x.to(noise.dtype)


def randn(shape, generator, device):
    """Normal draws; from a list of generators, one image from each."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator]).to(device)
    return torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)


def seeded(seed, index, device="cpu"):
    """The generator of (seed, index): for one seed, another stream for each index below 2^32."""
    # a CPU generator keeps 32 bits of its seed: a hash would let two of 50,000 images collide
    return torch.Generator(device).manual_seed((seed * 2654435761 + index) % 2**32)


def sampler(model, y, noise, generators, sampler: Literal["sde", "euler", "heun"] = "sde", steps=250, cfg=1.0,
            cfg_interval=(0.0, 1.0)):  # fmt: skip
    """noise [n, C, H, W], labels y [n], a generator for each image -> x like noise: SiT's samplers by name."""
    velocity = guided(model, y, cfg, cfg_interval)
    if sampler == "sde":
        return sample_sde(velocity, noise, steps, generators, path=model.config.path)
    return sample_ode(velocity, noise, steps, heun=sampler == "heun")


class Method(NamedTuple):
    """All that train.py and this file know of a method; each file of variants/ defines these four names."""

    Config: type  # a dataclass with input_size, in_channels, num_classes, encoder_dim, projector, and .named()
    model: type  # model(config), with .config, .blocks, .projectors: what the loss and the sampler take
    loss: object  # loss(model, x, y, target, config, generator, part) -> dict of loss, denoise, align
    sampler: object  # sampler(model, y, noise, generators, **settings) -> x; the settings' defaults are its own


def method_named(name):
    """The Method of a --method. irepa, repa and sit are settings of irepa.py, the others files of variants/."""
    if name in ("irepa", "repa", "sit"):
        return Method(Config, SiT, irepa_loss, sampler)
    module = importlib.import_module(f"variants.{name}")
    return Method(module.Config, module.model, module.loss, module.sampler)


def sampler_settings(method, name, **given):
    """The settings of a method's sampler: its own, but for those `given` that are not None. ValueError if unfit."""
    own = {k: p for k, p in inspect.signature(method.sampler).parameters.items() if p.default is not p.empty}
    for key, value in given.items():
        choices = get_args(own[key].annotation) if key in own else None
        if value is not None and (key not in own or choices and value not in choices):
            flag = f"--{key.replace('_', '-')}"
            raise ValueError(
                f"{name} samples with {flag} {' or '.join(choices)}" if choices else f"{name} has no {flag}"
            )
    return {k: p.default if given.get(k) is None else given[k] for k, p in own.items()}


def generate(model, labels, indices, seed=0, draw=sampler, **settings):
    """Images `indices` (ints) of sample set `seed` with labels [n] -> float [n, C, H, W] on the model's device.

    draw is the method's sampler, settings are its own. FloatingPointError if an image is not finite.
    """
    config, device = model.config, next(model.parameters()).device
    generators = [seeded(seed, i) for i in indices]  # on the CPU: the same numbers on any device
    noise = randn((len(labels), config.in_channels, config.input_size, config.input_size), generators, device)
    x = draw(model, labels.to(device), noise, generators, **settings)
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"images {indices[0]} to {indices[-1]} are not finite: the checkpoint has diverged")
    return x


def to_uint8(x):
    """[-1, 1] -> uint8, rounded: truncation, as in the released code, darkens by half a grey level."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, names, path):
    """Write uint8 [rows * columns, 3, H, W] as a PNG with names[row] before each row, enlarged to be seen."""
    images = images.permute(0, 2, 3, 1).cpu().numpy()
    rows, side = len(names), images.shape[1]
    columns, zoom = len(images) // rows, max(1, 96 // side)
    cell, font = side * zoom + 4, ImageFont.load_default(size=16)
    margin = int(max(font.getlength(name) for name in names)) + 16
    grid = Image.new("RGB", (margin + columns * cell, rows * cell), "white")
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
        grid.paste(tile, (margin + i % columns * cell, i // columns * cell + 2))
    for row, name in enumerate(names):
        draw.text((8, (row + 0.5) * cell), name, fill="black", font=font, anchor="lm")
    write_whole(path, lambda f: grid.save(f, "PNG"))


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints in


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
    """-> (model in eval mode on the CPU, Config). Reads our files and the released REPA, iREPA and JiT ones, strictly.

    A released file's config is inferred from its shapes; overrides set what shapes do not show (num_heads of an
    unusual width, path). A missing or surplus tensor is a ValueError that names it, except that the projector,
    which sampling does not use, may be absent, and is ignored, whatever it is, with projector=None.
    """
    data = read_checkpoint(path)
    weights = data.get("ema", data.get("model_ema1")) if ema else data.get("model")  # JiT has two averages
    if weights is None and data and all(torch.is_tensor(v) for v in data.values()):
        weights = data  # a bare state dict
    if not isinstance(weights, dict) or not all(torch.is_tensor(v) for v in weights.values()):
        raise ValueError(f"{path} has no {'ema' if ema else 'model'} weights; it holds: {', '.join(map(str, data))}")
    if not all(isinstance(k, str) for k in weights):
        raise ValueError(f"{path} is damaged: its weights have names that are no strings")
    weights = {released_name(k): v for k, v in weights.items()}
    # REPA's oldest files number the blocks after the alignment anew, as decoder_blocks
    first = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    weights = {
        re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) + first}", k): v for k, v in weights.items()
    }
    if overrides.get("projector", True) is None:
        weights = {k: v for k, v in weights.items() if not k.startswith("projectors.")}
    try:
        settings = data["config"] if isinstance(data.get("config"), dict) else infer_config(weights, data.get("args"))
        if not any(k.startswith("projectors.") for k in weights):
            settings = {**settings, "projector": None}
        settings = {**settings, **overrides}
        method = method_named(method_of(data))
        for field in set(settings) - {f.name for f in fields(method.Config)}:
            raise ValueError(f"unknown field {field!r} of Config")
        config = method.Config(**settings)
        if config.depth > len(weights):  # before time and memory go into blocks that the file cannot fill
            raise ValueError(f"its config has {config.depth} blocks, and the file {len(weights)} tensors")
        with torch.device("meta"):  # no initialisation: every tensor comes from the file
            model = method.model(config)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, RuntimeError, AttributeError) as e:
        raise ValueError(f"{path}: no config fits its tensors: {line(e)[:300]}") from e
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
    return model.requires_grad_(False).eval(), config


def method_of(data):
    """The --method that a checkpoint's dict was trained with; released files are irepa.py's, or JiT's by a name."""
    settings = data.get("settings")
    if isinstance(settings, dict):
        name = settings.get("method")
    else:
        names = (k for part in (data, *data.values()) if isinstance(part, dict) for k in part)
        name = "jit" if any(str(k).endswith("x_embedder.proj1.weight") for k in names) else "irepa"
    if name not in ("irepa", "repa", "sit", *VARIANTS):
        raise ValueError(f"its method is {name!r}, which is none of ours")
    return name


def released_name(key):
    """Without the prefixes of DDP, torch.compile and JiT, and with REPA's projectors.0.{0,2,4} under iREPA's name."""
    while key.startswith(("module.", "_orig_mod.", "net.")):
        key = key.split(".", 1)[1]
    parts = key.split(".")
    if parts[0] == "projectors" and len(parts) == 4 and parts[2].isdigit():
        key = f"projectors.{parts[1]}.projection_layer.{parts[2]}.{parts[3]}"
    return key


def infer_config(weights, args=None):
    """The Config fields that a released state dict shows by its shapes, and its args (a Namespace, or None) by name."""
    if "x_embedder.proj1.weight" in weights:
        return importlib.import_module("variants.jit").infer_config(weights, args)
    if "x_embedder.proj.weight" not in weights:
        raise ValueError("x_embedder.proj.weight is missing: these are not the weights of a SiT")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    by_width = {w: (heads, encoder_depth) for _, w, heads, encoder_depth in SIZES.values()}
    heads, encoder_depth = by_width.get(width, (1, 1))
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    settings = dict(
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
    return {**settings, **projector_of(weights)}


def projector_of(weights):
    """The fields of the projector in a released state dict."""
    layer = "projectors.0.projection_layer"
    if f"{layer}.4.weight" in weights:
        hidden, encoder_dim = weights[f"{layer}.0.weight"].shape[0], weights[f"{layer}.4.weight"].shape[0]
        return dict(projector="mlp", projector_dim=hidden, encoder_dim=encoder_dim, gamma=None, proj_coeff=0.5)
    if f"{layer}.weight" in weights:
        shape = weights[f"{layer}.weight"].shape
        kernel = shape[2] if len(shape) == 4 else 3
        return dict(projector="conv" if len(shape) == 4 else "linear", encoder_dim=shape[0], kernel_size=kernel)
    return dict(projector=None)


# ---------------------------------------------------------------------------------------------------------------
# Command line


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage="%(prog)s --ckpt FILE [flags], which --help lists",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint: train.py's last.pt, or a released .pt")
    add("--no-ema", action="store_true", help="use the live weights instead of their moving average")
    # torchrun takes a bare --num for an abbreviation of an option of its own: hence the longer name
    add("--num", "--num-images", type=int, help="number of images; for a grid: 8 of each of the first 10 labels")
    add("--npz", metavar="FILE", help="write arr_0, uint8 [N, H, W, 3], and labels, int64 [N]")
    add("--out-dir", metavar="DIR", help="write numbered PNGs into a new folder")
    add("--labels", default="random", help="random, balanced (i modulo classes), or a list to cycle through: 3,7")
    # by default what the method's own sampler says
    add("--sampler", choices=("sde", "euler", "heun"), help="of SiT: sde, which is that of reported numbers")
    add("--steps", type=int, help="steps from noise to image; of SiT: 250")
    add("--cfg", type=float, help="guidance scale; 1 is none")
    add("--cfg-interval", type=float, nargs=2, metavar=("LO", "HI"), help="guide for t in [LO, HI]; of JiT in its t")
    add("--seed", type=int, default=0, help="names the sample set; image i depends on (seed, i)")
    add("--batch-size", type=int, help="images at a time on each process; 256 on GPUs, else 64")
    add("--vae", help="of latent checkpoints, by default the one it was trained with, or sd-vae-ft-mse: as in train.py")
    add("--vae-weights", choices=("random",), help="for tests only")
    add(
        "--latent-stats", metavar="FILE", help="scale and bias of each channel, for released checkpoints that need them"
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", default="tf32", choices=("fp32", "tf32", "bf16"), help="of products; tf32 (on GPUs) as released")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks; default: on GPUs")
    return parser


def pick_device(name):
    """torch.device for --device: 'auto' is this process's GPU, else MPS, else the CPU. ValueError if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} cannot be used here: {line(e)}") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def start_ranks(device, minutes):
    """(rank, world size); joins the process group when torchrun started us: nccl on GPUs, else gloo.

    A process that waits for another longer than `minutes` gives up: torchrun sees one that dies, not one that hangs.
    """
    if "RANK" not in os.environ:
        return 0, 1
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    return dist.get_rank(), dist.get_world_size()


def choose_labels(spec, indices, num_classes, seed):
    """The label of each image: [n] int64, a function of (spec, seed, index) alone."""
    if spec == "random":
        return torch.tensor([int(torch.randint(num_classes, (), generator=seeded(~seed, i))) for i in indices])
    if spec == "balanced":
        return torch.tensor([i % num_classes for i in indices])
    try:
        wanted = [int(part) for part in spec.split(",")]
    except ValueError:
        raise ValueError(f"--labels {spec}: write random, balanced, or numbers such as 3,7") from None
    if not all(0 <= label <= num_classes for label in wanted):
        raise ValueError(f"--labels {spec}: classes are 0 to {num_classes - 1}, and {num_classes} for none")
    return torch.tensor([wanted[i % len(wanted)] for i in indices])


def versions():
    """What a result depends on besides its settings."""
    folder = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    inside = git.returncode == 0 and (folder / ".git").exists()
    return dict(
        git_commit=git.stdout.strip() if inside else None,
        torch=str(torch.__version__),
        numpy=np.__version__,
        python=sys.version.split()[0],
    )


def beside(target):
    """The JSON that goes with samples.npz, grid.png or a folder of PNGs."""
    return Path(f"{target.with_suffix('') if target.suffix in ('.npz', '.png') else target}.json")


def find_vae(args, data, model, device):
    """(VAE, spec) that turns the samples into images; None for a model of pixels. ValueError where they do not fit."""
    config, spec = model.config, data.get("latent")
    if method_of(data) == "repa_e":
        if args.vae or args.vae_weights or args.latent_stats:
            raise ValueError(f"{args.ckpt} holds its own VAE: leave --vae, --vae-weights and --latent-stats out")
        return importlib.import_module("variants.repa_e").stored_vae(data, model, device)
    if spec is None and config.in_channels == 3:
        if args.vae not in (None, "none") or args.latent_stats:
            raise ValueError(f"{args.ckpt} makes pixels: leave --vae and --latent-stats out")
        return None
    if args.vae == "none":
        raise ValueError(f"{args.ckpt} makes latents, which take a VAE: --vae none is for pixels")
    name = args.vae or (spec["vae"] if spec else "sd-vae-ft-mse")
    if name == "local":
        raise ValueError(
            f"{args.ckpt} was trained on a VAE of sha256 {spec['sha256'][:8]}: name its folder after --vae"
        )
    vae, found = load_vae(name, args.vae_weights, args.latent_stats, device)
    if spec and not args.latent_stats:
        found.update(scale=spec["scale"], bias=spec["bias"])
    if spec:
        same_spec(found, spec, args.ckpt)
    if found["channels"] != config.in_channels:
        raise ValueError(f"{args.ckpt} makes {config.in_channels} channels, --vae {name} takes {found['channels']}")
    return vae, found


def write_npz(path, chunks, shape, labels):
    """An npz of arr_0, uint8 of `shape`, from the .npy files `chunks`, one after the other, and of labels."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        with z.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=tuple(shape)))
            for chunk in chunks:
                f.write(np.load(chunk).tobytes())
        with z.open("labels.npy", "w") as f:
            np.lib.format.write_array(f, labels)


def begin(parts, record):
    """Make the folder of unfinished work, or find that it is of the same settings, and hold it. ValueError if not."""
    spelling = "ckpt device npz vae vae_weights latent_stats".split()  # what they name is in `latent` and the hash
    same = {k: v for k, v in record.items() if k not in spelling}
    same = json.loads(json.dumps(same))  # tuples become lists
    parts.mkdir(parents=True, exist_ok=True)
    held = lock(parts)
    if not {file.name for file in parts.iterdir()} - {"settings.json.tmp", ".lock"}:
        write_whole(parts / "settings.json", lambda f: f.write(json.dumps(same).encode()))
    try:
        found = json.loads((parts / "settings.json").read_text())
        found.keys()
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{parts} holds no settings that can be read ({line(e)}): delete it") from e
    for key in same:
        if same[key] != found.get(key):
            raise ValueError(
                f"{parts} holds unfinished samples with {key} {found.get(key)}, not {same[key]}: delete it, or use"
                " another name"
            )
    return held


def holds(chunk, count):
    """Whether a part file is there and whole."""
    try:
        return len(np.load(chunk, mmap_mode="r", allow_pickle=False)) == count
    except Exception:  # not there, or cut short by a full or failing disk, where numpy raises anything: made again
        return False


def write_samples(args, model, draw, settings, latent, target, rows, record, device):
    """The images of this process, batch by batch; the first process then makes one file of them, and the JSON."""
    rank, world = start_ranks(device, 24 * 60)  # the first to finish waits for the last
    config = model.to(device).config
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    if device.type == "cuda" if args.compile is None else args.compile:
        for block in model.blocks:
            block.compile()
    parts = Path(f"{target}.parts")
    if args.out_dir and rank == 0:
        target.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.barrier()  # the folder is there

    from tqdm import tqdm  # late: --help need not wait for it

    batches = [range(i, min(i + args.batch_size, args.num)) for i in range(0, args.num, args.batch_size)]
    chunks = [parts / f"{batch[0]:08d}.npy" for batch in batches]
    mine = list(zip(batches, chunks))[rank::world]
    todo = [(batch, chunk) for batch, chunk in mine if not holds(chunk, len(batch))]
    with tqdm(total=sum(len(batch) for batch, _ in todo), unit="img", desc="sampling", disable=rank > 0) as bar:
        for indices, chunk in todo:
            labels = choose_labels(args.labels, indices, config.num_classes, args.seed)
            with autocast:
                x = generate(model, labels, indices, args.seed, draw, **settings)
            if latent:
                x = decode(latent[0], x, latent[1])
                if not torch.isfinite(x).all():
                    raise FloatingPointError(f"the VAE's images {indices[0]} to {indices[-1]} are not finite")
            images = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
            if args.out_dir:
                for i, image in zip(indices, images):
                    Image.fromarray(image).save(target / f"{i:06d}.png")
            else:
                write_whole(chunk, lambda f: np.save(f, images))
            bar.update(len(indices))
    if world > 1:
        dist.barrier()
    if rank == 0:
        labels = choose_labels(args.labels, range(args.num), config.num_classes, args.seed)
        if args.npz:
            write_npz(parts / "whole.npz", chunks, (args.num, *np.load(chunks[0]).shape[1:]), labels.numpy())
        elif not args.out_dir:
            pixels = np.concatenate([np.load(chunk) for chunk in chunks])
            save_grid(torch.from_numpy(pixels).permute(0, 3, 1, 2), rows, parts / "whole.png")
        record["processes"] = world
        record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        record["labels_of_images"] = labels.tolist() if args.out_dir else None
        text = json.dumps({**record, **versions()}, indent=1) + "\n"
        write_whole(beside(target), lambda f: f.write(text.encode()))
        if not args.out_dir:  # last, so that what bears the name is complete
            os.replace(parts / ("whole.npz" if args.npz else "whole.png"), target)
            shutil.rmtree(parts)
        print(f"{args.num} images in {target}, every setting in {beside(target)}")
    if world > 1:
        dist.destroy_process_group()


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.npz and args.out_dir:
            raise ValueError("--npz or --out-dir, not both")
        if (args.npz or args.out_dir) and not args.num:
            raise ValueError("say how many images: --num 50000 for a reported FID")
        if min(n for n in (args.steps, args.batch_size, args.num, 1) if n is not None) < 1:
            raise ValueError("--steps, --batch-size and --num must be at least 1")
        low, high = args.cfg_interval or (0, 1)
        if not math.isfinite(args.cfg or 0) or not low <= high:
            raise ValueError(f"--cfg {args.cfg} is a finite scale, --cfg-interval LO HI has LO <= HI: {low} {high}")
        device = pick_device(args.device)
        if args.batch_size is None:
            args.batch_size = 256 if device.type == "cuda" else 64
        model, config = load_checkpoint(args.ckpt, ema=not args.no_ema, projector=None)
        data = read_checkpoint(args.ckpt)
        name = method_of(data)
        method, given = method_named(name), {k: getattr(args, k) for k in "sampler steps cfg cfg_interval".split()}
        settings = sampler_settings(method, name, **given)
        vars(args).update(settings)
        latent = find_vae(args, data, model, device)
        names, step = data.get("classes"), data.get("step", data.get("steps"))
        rows = None
        if args.npz or args.out_dir:
            target = Path(args.npz or args.out_dir)
        else:  # a grid, with a row for each label
            few = (
                ",".join(map(str, range(min(10, config.num_classes))))
                if args.labels in ("random", "balanced")
                else args.labels
            )
            rows = choose_labels(few, range(args.num or 1000), config.num_classes, args.seed).tolist()
            rows = list(dict.fromkeys(rows))
            columns = args.num // len(rows) if args.num else 8
            if args.num and args.num % len(rows):
                raise ValueError(f"--num {args.num} does not fill {len(rows)} rows of a grid, one for each label")
            args.num, args.labels = columns * len(rows), ",".join(str(row) for row in rows for _ in range(columns))
            rows = [str(names[row]) if names and row < len(names) else str(row) for row in rows]
            cfg = f"-cfg{args.cfg:g}" if args.cfg is not None else ""
            stem = f"{Path(args.ckpt).with_suffix('')}-{args.sampler or name}{args.steps}{cfg}-seed{args.seed}"
            free = (Path(f"{stem}{n}.png") for n in itertools.chain([""], map("-{}".format, itertools.count(2))))
            target = next(path for path in free if not path.exists())
        choose_labels(args.labels, [0], config.num_classes, args.seed)
        parts, rank = Path(f"{target}.parts"), int(os.environ.get("RANK", 0))
        # a run killed at its very end may have left the JSON, and comes for the rest
        for out in (target, *([] if parts.exists() else [beside(target)])):
            if out.exists():
                raise ValueError(f"{out} exists and is left as it is; choose another name")
        # one process looks: another may already have begun to write
        with open(args.ckpt, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        record = dict(vars(args), step=step, checkpoint_sha256=digest, config=asdict(config))
        record["latent"] = latent[1] if latent else None
        held = begin(parts, record) if rank == 0 and not args.out_dir else nullcontext()
    except (ValueError, OSError) as e:
        time.sleep(2 * (os.environ.get("LOCAL_RANK", "0") != "0"))  # let one process of a machine speak first
        parser.error(line(e))
    try:
        with held:
            write_samples(args, model, method.sampler, settings, latent, target, rows, record, device)
    except (FloatingPointError, OSError) as e:
        parser.error(line(e))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
