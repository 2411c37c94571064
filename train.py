"""Train a SiT with iREPA, REPA or neither, on CPU, one GPU or many.

    python train.py --demo                                        five minutes on a laptop, no download
    python train.py --data photos.zip --image-size 32 --model SiT-S/4 --steps 20000 --out runs/photos
    python train.py --resume --out runs/photos                    goes on from runs/photos/last.pt, with its settings
    torchrun --nproc_per_node=8 train.py --cache-latents --data data/imagenet/train --out data/imagenet/latents-256
    torchrun --nproc_per_node=8 train.py --encoder dinov2_vitb14 --latents data/imagenet/latents-256
                                                                  the paper's setting

OUT holds config.json (every setting, versions), log.jsonl (a line each --log-every steps), samples/ (grids from the
EMA), curves.png, last.pt and the --keep newest checkpoints by number. A flag wins over a preset (--method, --demo), a
preset over a default. Noise, times, label drops and data order are functions of (seed, step): a resumed run, or one on
another number of processes, sees the same batches. SIGTERM or SIGINT ends the step, saves and exits with 75 (a second
one ends at once); a user's mistake exits with 2.
"""

import argparse
import sys

STOPPED = 75  # exit code after a signal: saved, start it again (EX_TEMPFAIL)
PATIENCE = 5  # non-finite steps in a row that end a run

# --method: presets over the flags of the same names
METHODS = {
    "irepa": dict(align="irepa"),
    "repa": dict(align="repa"),
    "sit": dict(align="none"),
    # lr and warm-up are JiT's 5e-5 a batch of 256 and 5 epochs of ImageNet
    "jit": dict(align="irepa", model="JiT-B/16", vae="none", lr=5e-5, beta2=0.95, clip=None, warmup=25_000),
    "meanflow": dict(align="irepa", model="SiT-B/2", beta2=0.95),
    "repa_e": dict(align="irepa"),
}
# --align: likewise
ALIGN = {
    "irepa": dict(projector="conv", kernel_size=3, gamma=0.6, proj_coeff=1.0),
    "repa": dict(projector="mlp", gamma=None, proj_coeff=0.5),
    "none": dict(projector=None),
}
# what --align means otherwise in another method
ALIGN_OF = {("jit", "irepa"): dict(gamma=0.8, proj_coeff=0.5)}
# --demo: likewise; drawn shapes take the place of --data
DEMO = dict(
    image_size=32, model="SiT-S/4", hidden_size=192, depth=4, num_heads=3, encoder_depth=2, batch_size=32, steps=1800,
    lr=2e-3, warmup=100, lr_schedule="cosine", ema=0.998, ema_warmup=True, log_every=50, sample_every=600,
    ckpt_every=600, sample_cfg=3.0, out="runs/demo",
)  # fmt: skip
# what is otherwise in the demo of another method
DEMO_OF = {
    "jit": dict(model="JiT-S/4", steps=900, sample_every=300, ckpt_every=300, out="runs/jit-demo"),
    "meanflow": dict(omega=2.0, kappa=0.0, sample_cfg=1.0, out="runs/meanflow-demo"),
    "repa_e": dict(
        model="SiT-S/1", vae="tiny", lpips="none", vae_proj_coeff=0.5, gan_coeff=0.01, disc_width=16, hidden_size=128,
        num_heads=4, batch_size=16, steps=1200, sample_every=600, out="runs/repa-e-demo",
    ),
}  # fmt: skip


def build_parser():
    def style(prog):
        return DefaultsHelp(prog, max_help_position=30, width=120)

    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags], which --help lists", description=__doc__, formatter_class=style, allow_abbrev=False
    )

    def optional(kind):
        def parse(text):
            return None if text == "none" else kind(text)

        parse.__name__ = f"{kind.__name__} or none"
        return parse

    add = parser.add_argument_group("method (presets: --method)").add_argument
    add(
        "--method",
        default="irepa",
        choices=METHODS,
        help="irepa: conv, spatial norm; repa: mlp; sit: none; or a file of variants",
    )
    add("--align", choices=ALIGN, help="the same for the other methods, by default irepa")
    add("--projector", type=optional(str), default="conv", help="conv, mlp, linear or none")
    add("--kernel-size", type=int, default=3, help="of the conv projector")
    add("--projector-dim", type=int, default=2048, help="hidden width of the mlp projector")
    add("--gamma", type=optional(float), default=0.6, help="of the spatial norm of the teacher's tokens, or none")
    add("--proj-coeff", type=float, default=1.0, help="weight of the alignment in the loss")
    add("--encoder-depth", type=int, help="align after this block; by size: 4 for S and B, 8 for L and XL")
    add("--omega", type=float, help="of meanflow: guidance baked in, of the effective scale omega / (1 - kappa)")
    add(
        "--kappa", type=float, help="of meanflow: the part of it that comes from the network's own conditional velocity"
    )
    add("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), help="of meanflow: guide for t in [LO, HI]")
    add = parser.add_argument_group("teacher").add_argument
    add("--encoder", default="hog", help="hog or sift (no weights), a name of --list-encoders, timm:<any ViT>")
    add("--encoder-weights", metavar="FILE", help="local weights instead of a download; 'random' is for tests only")
    add("--list-encoders", action="store_true", help="print the teachers by name, and leave")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="SiT-XL/2", help="SiT-{S,B,L,XL}/{1,2,4,8} or JiT-{S,B,L,H}/{4,8,16,32}")
    add("--hidden-size", type=int, help="instead of the model's own")
    add("--depth", type=int, help="instead of the model's own")
    add("--num-heads", type=int, help="instead of the model's own")
    add("--qk-norm", action="store_true", help="layer norm on queries and keys")
    add("--path", default="linear", choices=("linear", "cosine"), help="from data to noise")
    add("--class-dropout", type=float, default=0.1, help="share of labels dropped, for guidance")
    add = parser.add_argument_group("data").add_argument
    add("--demo", action="store_true", help="a preset: drawn shapes and a small model, minutes on two CPU cores")
    add("--data", default="data/imagenet/train", metavar="PATH", help="folder of class folders, or a .zip of one")
    add("--image-size", type=int, default=256, help="side in pixels; images are centre-cropped to it as in ADM")
    add("--skip-broken", action="store_true", help="leave out, and list, images that cannot be decoded")
    add("--workers", type=int, help="decoding processes a rank; by default none where images are kept in memory")
    add = parser.add_argument_group("latents").add_argument
    add(
        "--vae",
        help="sd-vae-ft-mse (from 128 px up), sd-vae-ft-ema, a folder or file of one, or none: pixels; tiny: of repa_e",
    )
    add("--vae-weights", choices=("random",), help="instead of the VAE's own, for tests only")
    add("--vae-precision", default="fp32", choices=("fp32", "bf16"), help="of the VAE's encoder and decoder")
    add("--latent-stats", metavar="FILE", help="scale and bias of each channel, as the release's .pt has them")
    add("--latents", metavar="DIR", help="cache of --data's latents; without it the VAE encodes in each step, slowly")
    add("--cache-latents", action="store_true", help="write that cache to --out, and leave; goes on where it stopped")
    add = parser.add_argument_group("the VAE's training, of --method repa_e").add_argument
    add("--lpips", metavar="FILE", help="torchvision's VGG16 weights for the perceptual loss, or none: without it")
    add("--vae-proj-coeff", type=float, default=1.5, help="weight of the alignment in the VAE's loss")
    add("--gan-coeff", type=float, default=0.1, help="weight of the discriminator in the VAE's loss")
    add("--disc-width", type=int, default=64, help="channels of the discriminator's first layer")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=400_000, help="optimiser steps")
    add("--batch-size", type=int, default=256, help="global: over all processes and accumulated parts")
    add("--accumulate", type=int, default=1, help="parts a process's share of the batch is split into")
    add("--lr", type=float, default=1e-4, help="AdamW, first beta 0.9, no weight decay")
    add("--beta2", type=float, default=0.999, help="second beta of AdamW")
    add("--warmup", type=int, default=0, help="steps of linear warm-up of the learning rate")
    add("--lr-schedule", default="constant", choices=("constant", "cosine"), help="after the warm-up")
    add("--clip", type=optional(float), default=1.0, help="gradient norm, or none")
    add("--ema", type=float, default=0.9999, help="decay of the moving average of the weights, a step")
    add("--ema-warmup", action="store_true", help="let the decay rise to --ema as (1 + step) / (10 + step)")
    add("--seed", type=int, default=0, help="of weights, data order, noise, times and label drops")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="bf16 autocast where it is fast")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder for this run, which must not exist; default: runs/METHOD-MODEL")
    add("--resume", action="store_true", help="continue from OUT/last.pt with its settings; flags given still win")
    add("--log-every", type=int, default=100, help="steps")
    add("--ckpt-every", type=int, default=10_000, help="steps")
    add("--keep", type=int, default=2, help="newest checkpoints kept by number, step-N.pt, beside last.pt")
    add("--sample-every", type=int, default=10_000, help="steps between grids of samples; 0 is never")
    add("--sample-cfg", type=float, default=1.0, help="guidance scale of the grids; 1 is none")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks; default: on GPUs")
    return parser


class DefaultsHelp(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help + (" (%(default)s)" if action.default not in (None, False, argparse.SUPPRESS) else "")


if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    build_parser().parse_args()  # answers before the two seconds that the imports below take

import atexit  # noqa: E402
import copy  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from contextlib import contextmanager, nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from tqdm import tqdm  # noqa: E402

from inputs.images import BrokenImage, Folder, Shapes, line, workers_for  # noqa: E402
from inputs.latents import Cached, decode, encode, load_vae, lock, same_spec, to_latent, write_cache, write_whole  # noqa: E402
from inputs.teachers import fast_bf16, list_encoders, load_encoder  # noqa: E402
from sample import (  # noqa: E402
    generate,
    method_named,
    pick_device,
    read_checkpoint,
    sampler_settings,
    save_grid,
    seeded,
    start_ranks,
    to_uint8,
    versions,
)

# ---------------------------------------------------------------------------------------------------------------
# Configure


def resolve(parser, argv=None):
    """argv -> (args, checkpoint to resume from or None): defaults < presets < a resumed run's settings < flags."""
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, parser))))
    given = {k: v for k, v in given.items() if v is not parser}  # what the user wrote
    method = given.get("method", "irepa")
    demo = {**DEMO, **DEMO_OF.get(method, {})} if given.get("demo") else {}
    if demo and ("data" in given or given.get("cache_latents")):
        raise ValueError("--demo draws its own images: leave --data and --cache-latents out, or --demo")
    if demo and "model" in given:  # a size asked for by name is that size
        demo = {k: v for k, v in demo.items() if k not in ("hidden_size", "depth", "num_heads", "encoder_depth")}
    elif demo and given.get("depth", 1) > 0:
        demo = {**demo, "encoder_depth": min(demo["encoder_depth"], given.get("depth", demo["depth"]))}
    saved, checkpoint = {}, None
    model = given.get("model", METHODS[method].get("model", defaults["model"]))
    out = Path(given.get("out") or demo.get("out") or f"runs/{method}-{model.replace('/', '-')}")
    if given.get("resume"):
        if not out.is_dir():
            raise FileNotFoundError(f"--resume: {out} does not exist; name the run with --out, or leave --resume out")
        if (out / "last.pt").exists():
            checkpoint = read_last(out)
            saved = checkpoint["settings"]
        elif (out / "config.json").exists():  # stopped before its first checkpoint
            try:
                saved = dict(json.loads((out / "config.json").read_text()))
            except (ValueError, TypeError) as e:
                raise ValueError(
                    f"{out}/config.json is damaged ({line(e)}), and there is no checkpoint: delete {out}"
                ) from e
        else:
            raise FileNotFoundError(f"--resume: {out} holds no run of train.py (neither last.pt nor config.json)")
        saved = {k: v for k, v in saved.items() if k in defaults}
    elif int(os.environ.get("RANK", 0)) == 0 and not given.get("cache_latents"):
        refuse_used(out)
    method = given.get("method", saved.get("method", method))
    if method not in METHODS:
        raise ValueError(f"{out} was trained with --method {method!r}, which is none of {', '.join(METHODS)}")
    preset = METHODS[method]
    align = given.get("align") or preset["align"]
    if align != preset["align"] and method in ("irepa", "repa", "sit"):
        raise ValueError(f"--align {align} is for other methods; of SiT say --method irepa, repa or sit")
    preset = {**ALIGN[align], **ALIGN_OF.get((method, align), {}), **preset, "align": align}
    args = argparse.Namespace(**{**defaults, **preset, **demo, **saved, **given, "out": str(out)})
    if args.vae is None:
        args.vae = "none" if args.demo or args.image_size < 128 else "sd-vae-ft-mse"
    if args.vae == "none" and (args.latents or args.cache_latents or args.latent_stats):
        raise ValueError(
            "--latents, --cache-latents and --latent-stats go with a --vae, and with images from 128 px up"
        )
    if args.cache_latents and not given.get("out"):
        raise ValueError("--cache-latents writes to a folder of its own: name it with --out")
    if args.keep < 0:
        raise ValueError(f"--keep must not be negative, and is {args.keep}")
    for name in "lpips vae_proj_coeff gan_coeff disc_width".split():
        if method != "repa_e" and name in given:
            raise ValueError(f"--{name.replace('_', '-')} is for --method repa_e")
    if method != "repa_e" and args.vae == "tiny":
        raise ValueError("--vae tiny, which starts untrained, is for --method repa_e, which trains it")
    positive = "disc_width image_size steps batch_size accumulate log_every ckpt_every lr clip".split()
    for name in positive:
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:  # --clip none
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in "proj_coeff vae_proj_coeff gan_coeff gamma sample_cfg warmup workers sample_every seed".split():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and (value >= 0 or isinstance(value, float))):
            raise ValueError(f"--{name.replace('_', '-')} must be finite, and a count not negative; it is {value}")
    if args.seed >= 2**63:
        raise ValueError(f"--seed must be below 2^63, not {args.seed}")
    if checkpoint and checkpoint["step"] >= args.steps and not given.get("cache_latents"):
        raise ValueError(f"{out} is at step {checkpoint['step']} already, and --steps is {args.steps}: nothing to do")
    if not all(0 <= share < 1 for share in (args.class_dropout, args.ema, args.beta2)):
        raise ValueError("--class-dropout, --ema and --beta2 lie in [0, 1)")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (world * args.accumulate):
        raise ValueError(
            f"--batch-size {args.batch_size} does not divide by {world} processes x --accumulate {args.accumulate}"
        )
    return args, checkpoint


def refuse_used(out):
    if out.exists() and not (out.is_dir() and {file.name for file in out.iterdir()} <= {".lock", "config.json.tmp"}):
        raise FileExistsError(f"{out} exists; --resume continues it, another --out leaves it as it is")


def read_last(out):
    """The checkpoint in out/last.pt. ValueError, naming the newest good one in `out`, where it cannot be used."""

    def read(path):
        checkpoint = read_checkpoint(path)
        if not {*"model ema opt step settings config classes images seconds".split()} <= checkpoint.keys():
            raise ValueError(f"{path} is no checkpoint of train.py")
        return checkpoint

    try:
        return read(out / "last.pt")
    except ValueError as e:
        for path in sorted(out.glob("step-*.pt"), reverse=True):
            try:
                read(path)
            except ValueError:
                continue
            raise ValueError(f"{line(e)}; the newest good one is {path}: copy it to {out / 'last.pt'}") from e
        raise ValueError(f"{line(e)}; there is no other good one in {out}") from e


def network(args, spec=None, num_classes=1000, encoder_dim=1):
    """The Config that the flags ask for. ValueError where they do not fit together."""
    method = method_named(args.method)
    Config = method.Config
    if args.sample_cfg != 1 and "cfg" not in sampler_settings(method, args.method):
        raise ValueError(f"--method {args.method} has no --sample-cfg: its guidance is trained in")
    factor, channels = (spec["factor"], spec["channels"]) if spec else (8, 4) if args.vae != "none" else (1, 3)
    if args.image_size % factor:
        raise ValueError(f"--image-size {args.image_size} is not a multiple of the VAE's factor {factor}")
    fields = dict(input_size=args.image_size // factor, in_channels=channels)
    fields.update(num_classes=num_classes, encoder_dim=encoder_dim)
    has = {field.name for field in dataclasses.fields(Config)}
    for name in "projector kernel_size projector_dim gamma proj_coeff qk_norm path class_dropout".split():
        if name in has:
            fields[name] = getattr(args, name)
        elif getattr(args, name) != build_parser().get_default(name):
            raise ValueError(f"--method {args.method} has no --{name.replace('_', '-')}")
    for name in "encoder_depth hidden_size depth num_heads omega kappa guidance_interval".split():
        if getattr(args, name) is not None and name not in has:
            raise ValueError(f"--method {args.method} has no --{name.replace('_', '-')}")
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    config = Config.named(args.model, **fields)
    tokens = (config.input_size // config.patch_size) ** 2
    if tokens > 4096:
        raise ValueError(
            f"{args.model} on {args.image_size}-px images has {tokens} tokens: leave --vae none out, or choose a larger"
            " patch or smaller images, such as --model SiT-S/4 --image-size 32"
        )
    return config


def same_run(args, config, data, spec, checkpoint):
    """ValueError where a checkpoint belongs to another network, other data or other latents than what is asked."""
    old, new = dict(checkpoint["config"]), dataclasses.asdict(config)
    for key in "method align encoder seed batch_size lpips vae_proj_coeff gan_coeff disc_width".split():
        old[key], new[key] = checkpoint["settings"].get(key, getattr(args, key)), getattr(args, key)
    old.update(classes=checkpoint["classes"], images=checkpoint["images"])
    new.update(classes=data.classes, images=len(data))
    for key in old:
        if old[key] != new.get(key):
            raise ValueError(f"{args.out} was started with {key} {old[key]}, not {new.get(key)}; start another --out")
    if spec:
        same_spec(spec, checkpoint["latent"], f"{args.out}/last.pt")


# ---------------------------------------------------------------------------------------------------------------
# Feed


def split(count, most=256):
    """(training indices, held-out indices in chunks of equal size): a twentieth, at most 256; the same for any seed."""
    order = np.random.default_rng(0).permutation(count)
    held = min(most, max(1, count // 20))
    size = min(32, held)
    chunks = order[: held // size * size].reshape(-1, size)
    return np.sort(order[chunks.size :]), chunks


def batch_at(step, indices, args, orders):
    """The indices of the whole batch of `step`; orders is a dict that keeps the epochs at hand between calls."""
    epoch, place = np.divmod(np.arange(step * args.batch_size, (step + 1) * args.batch_size), len(indices))
    needed = np.unique(epoch).tolist()
    for e in orders.keys() - needed:
        del orders[e]
    for e in needed:
        if e not in orders:
            orders[e] = np.random.default_rng((args.seed, e)).permutation(indices)
    return np.concatenate([orders[e][place[epoch == e]] for e in needed])


def batches(indices, args, start, rank, world):
    """This rank's parts of each batch from step `start` on: shuffled epochs, one after the other, without a gap."""
    parts, orders = world * args.accumulate, {}
    size = args.batch_size // parts
    for step in range(start, args.steps):
        whole = batch_at(step, indices, args, orders)
        for i in range(rank, parts, world):
            yield whole[i * size : (i + 1) * size]


def to_input(images, moments, latent, generator, part=(0, 1)):
    """What the network sees: pixels in [-1, 1] or, with latent = (VAE, spec), a sample of the images' posterior.

    moments come from a cache, or are None: then the VAE encodes. part is as in irepa_loss.
    """
    if latent is None:
        return images.float() / 127.5 - 1
    vae, spec = latent
    moments = encode(vae, images) if moments is None else moments
    (i, n), size = part, len(moments)
    shape = n * size, spec["channels"], *moments.shape[2:]
    noise = torch.randn(shape, generator=generator, device=generator.device)[i * size : (i + 1) * size]
    return to_latent(moments, noise.to(moments.device), spec)


def on(device, batch):
    """(images or None, labels, moments or None) of a batch, on the device."""
    images, labels, moments = (*batch, None)[:3]
    return (a if a is None else a.to(device, non_blocking=True) for a in (images, labels, moments))


# ---------------------------------------------------------------------------------------------------------------
# Log


@contextmanager
def without_projector(model):
    """Only the alignment needs it; samples and the held-out loss are quicker without."""
    projectors, model.projectors = model.projectors, torch.nn.ModuleList()
    try:
        yield
    finally:
        model.projectors = projectors


def uses_bf16(args, device):
    return fast_bf16(device) if args.precision == "auto" else args.precision == "bf16"


@contextmanager
def mixed(device, bf16):
    """Autocast to bf16, not to be nested. On a CPU attention is then plain matrix products, which round the scores to
    bf16: forward and backward of the fused kernel take twice as long on 256 tokens, three times on 64."""
    plain = bf16 and device.type == "cpu"
    kernel = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # not only of CUDA, in spite of its name
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), kernel:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain or before)
        try:
            yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@torch.no_grad()
def held_out_loss(model, loss, held, config, autocast, device):
    """Denoising loss over the held-out chunks with fixed noise and times: comparable between methods and runs."""
    model.eval()
    plain = dataclasses.replace(config, projector=None)
    total = torch.zeros(2, device=device)
    for i, n, x, y in held:
        with autocast(), without_projector(model):
            denoise = loss(model, x, y, None, plain, generator=seeded(0, 0), part=(i, n))["denoise"]
        total += torch.stack([denoise, torch.ones_like(denoise)])
    model.train()
    if dist.is_initialized():
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def plot(out):
    """out/log.jsonl -> out/curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    for axis, names in zip(axes, (("denoise", "held_out"), ("align",))):
        for name in names:
            axis.plot(steps, [row[name] for row in rows], label=name.replace("_", "-"))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set(ylabel="mean squared error of the velocity", yscale="log")
    axes[1].set(ylabel="minus the mean cosine to the teacher")
    write_whole(out / "curves.png", lambda f: figure.savefig(f, format="png", dpi=120))
    plt.close(figure)


def draw_samples(ema, data, args, latent, path):
    """A grid from the EMA: 8 images of each of the first 10 classes, always from the same noise."""
    names = data.classes[:10]
    labels = torch.arange(len(names)).repeat_interleave(8)
    method = method_named(args.method)
    settings = sampler_settings(method, args.method)
    quick = dict(sampler="heun", steps=min(25, settings["steps"]), cfg=args.sample_cfg)
    settings.update({k: v for k, v in quick.items() if k in settings})
    with without_projector(ema):
        x = generate(ema, labels, range(len(labels)), draw=method.sampler, **settings)
    if latent:
        x = decode(latent[0], x, latent[1])
    path.parent.mkdir(exist_ok=True)
    save_grid(to_uint8(x), names, path)


def warned(write):
    """write(), and whether it could: a full disk must not end a run that can still train."""
    try:
        write()
    except OSError as e:
        tqdm.write(f"warning: {line(e)}; training goes on", file=sys.stderr)
        return False
    return True


def refuse_streak(run, first, skips, indices, args, data):
    """-> non-finite steps in a row so far, `run` before and then `skips` (a bool each) from step `first` on.

    FloatingPointError, with the images of the first of them, at PATIENCE in a row.
    """
    for step, skip in enumerate(skips, start=first):
        run = run + 1 if skip else 0
        if run == PATIENCE:
            start = step - PATIENCE + 1
            batch = batch_at(start, indices, args, {})
            names = [data.files[i] if hasattr(data, "files") else f"image {i}" for i in batch[:8]]
            more = f" and {len(batch) - 8} more" if len(batch) > 8 else ""
            raise FloatingPointError(
                f"loss or gradient was not finite in {PATIENCE} steps in a row from step {start} on; none of them was"
                f" applied, and the checkpoints in {args.out} are clean. The first of them saw"
                f" {', '.join(names)}{more}"
            )
    return run


# ---------------------------------------------------------------------------------------------------------------
# Train


def main(argv=None):
    parser = build_parser()
    if parser.parse_args(argv).list_encoders:
        return print(list_encoders())
    try:
        args, checkpoint = resolve(parser, argv)
        if not (args.demo or Path(args.data).exists()):
            raise FileNotFoundError(
                f"--data {args.data} does not exist: name a folder of class folders, or a .zip of one"
            )
        if args.vae in ("none", "sd-vae-ft-mse", "sd-vae-ft-ema"):
            network(args)  # what does not fit together is said before anything slow
        device = pick_device(args.device)
        first = int(os.environ.get("RANK", 0)) == 0
        loop, latent = train, None
        if args.method == "repa_e":  # which has one of its own, for three optimisers
            sys.modules["train"] = sys.modules[__name__]  # it takes helpers from here, and no second copy of them
            loop = importlib.import_module("variants.repa_e").loop(args, device)
        if args.vae != "none":
            bf16 = args.vae_precision == "bf16"
            latent = load_vae(args.vae, args.vae_weights, args.latent_stats, device, bf16)
            if args.vae_weights and first:
                print("warning: the VAE's weights are random; this is for tests only")
        spec = latent[1] if latent else None
        plain = network(args, spec)
        if args.demo:
            data = Shapes(args.image_size, 10_000)
        else:
            data = Folder(args.data, args.image_size, args.skip_broken, first)
        if args.cache_latents:
            return cache(args, data, latent, device)
        if args.latents:
            data = Cached(data, args.latents, images=args.projector is not None)
            same_spec(spec, data.spec, args.latents)
        grid = plain.input_size // plain.patch_size
        teacher = load_encoder(args.encoder, grid, args.encoder_weights, device) if args.projector else None
        if teacher:  # which may have its own idea of a size that it can see
            teacher(torch.zeros(1, 3, args.image_size, args.image_size, dtype=torch.uint8, device=device))
        config = network(args, spec, len(data.classes), teacher.dim if teacher else 1)
        if checkpoint:
            same_run(args, config, data, spec, checkpoint)
        held = claim(Path(args.out), args.resume) if first else nullcontext()
    except (ValueError, OSError) as e:
        time.sleep(2 * (os.environ.get("LOCAL_RANK", "0") != "0"))  # let one process of a machine speak first
        parser.error(last_line(e) if isinstance(e, BrokenImage) else line(e))
    if first:
        for n, broken in enumerate(getattr(data, "broken", []), start=1):
            print(f"left out, {n} of {len(data.broken)}: {broken}")
        if args.encoder_weights == "random" and teacher:
            print("warning: the teacher's weights are random; this is for tests only")
    try:
        with held, catching_signals():
            loop(args, config, data, teacher, latent, device, checkpoint)
    except (BrokenImage, FloatingPointError) as e:
        parser.error(last_line(e))


caught = []  # SIGTERM or SIGINT since the run began


@contextmanager
def catching_signals():
    """The first SIGTERM or SIGINT goes to `caught`, for the loop to see; a second one ends the process at once."""

    def catch(number, _):
        caught.append(number)
        signal.signal(number, before[number])

    caught.clear()
    before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def claim(out, resume):
    """Make OUT and hold it against a second run. FileExistsError or ValueError where somebody else was first."""
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out)
    if not resume:
        refuse_used(out)
    return held


def last_line(error):
    """What a worker said, behind its traceback and the name of the class."""
    return str(error).strip().splitlines()[-1].removeprefix("inputs.images.BrokenImage: ")


def cache(args, data, latent, device):
    """--cache-latents: every process writes its shards."""
    rank, world = start_ranks(device, 24 * 60)  # the first to finish waits for the last
    for broken in data.broken if rank == 0 else []:
        print(f"left out: {broken}")
    start = time.time()
    if rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    with lock(args.out) if rank == 0 else nullcontext():
        written = write_cache(data, *latent, args.out, device, rank=rank, world=world)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        data = Cached(data, args.out)  # which checks every shard
        size = sum(file.stat().st_size for file in Path(args.out).iterdir())
        print(
            f"{args.out}: the latents of {len(data)} images, {size / 2**20:.1f} MiB, complete;"
            f" {written} shards written here in {time.time() - start:.0f} s"
        )


def deaf(worker):
    """Workers leave signals to the process that they serve: it still wants their batches."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """When a run ends early: multiprocessing would ask them by a signal that they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def append(log, row):
    with open(log, "a") as f:
        f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def update(model, ema, opt, clip, decay):
    """Clip, step and average -> gradient norm, and 1. where it was not finite and nothing was applied.

    The fused optimiser skips itself on the device, so that nobody has to wait for the number.
    """
    norm = torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], math.inf if clip is None else clip)
    opt.found_inf = (~torch.isfinite(norm)).float()
    opt.step()
    opt.zero_grad()
    with torch.no_grad():  # or each step would hang its history on the average
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    return norm, opt.found_inf


def open_log(out, record, resumed):
    """Write the run's settings, cut the log to the `resumed` step (None: a new run) -> the log's path."""
    name = "config.json" if resumed is None else f"config-from-step-{resumed}.json"
    write_whole(out / name, lambda f: f.write((json.dumps(record, indent=1) + "\n").encode()))
    log = out / "log.jsonl"
    rows = log.read_text().splitlines(keepends=True) if log.exists() else []
    # later ones come again, and a half-written one
    kept = [row for row in rows if row.endswith("}\n") and json.loads(row)["step"] <= (resumed or 0)]
    write_whole(log, lambda f: f.write("".join(kept).encode()))
    return log


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


def train(args, config, data, teacher, latent, device, checkpoint=None):
    rank, world = start_ranks(device, 30)
    atexit.register(kill_workers)
    out, parts = Path(args.out), world * args.accumulate
    bf16 = uses_bf16(args, device)
    autocast = functools.partial(mixed, device, bf16)

    torch.manual_seed(args.seed)
    method = method_named(args.method)
    model = method.model(config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, args.beta2), weight_decay=0.0, fused=True)
    start, seconds = 0, 0.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        opt.load_state_dict(checkpoint["opt"])
        start, seconds = checkpoint["step"], checkpoint["seconds"]
    if device.type == "cuda" if args.compile is None else args.compile:
        for block in model.blocks:  # one compilation serves all blocks
            block.compile()
    wrapped = model
    if world > 1:
        ids = [device] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    indices, chunks = split(len(data))
    held = []
    for i, chunk in enumerate(chunks):
        if i % world == rank:
            images, labels, moments = on(device, data[chunk])
            x = to_input(images, moments, latent, seeded(0, 1), part=(i, len(chunks)))
            held.append((i, len(chunks), x, labels))
    workers = workers_for(data) if args.workers is None else args.workers
    feed = iter(
        torch.utils.data.DataLoader(
            data, batch_size=None, sampler=batches(indices, args, start, rank, world), num_workers=workers,
            pin_memory=device.type == "cuda", worker_init_fn=deaf,
        )
    )  # fmt: skip

    if rank == 0:
        record = dict(vars(args), **versions(), config=dataclasses.asdict(config), classes=data.classes)
        record.update(hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        record.update(world_size=world, bf16=bf16, images=len(data), parameters=sum(p.numel() for p in params))
        log = open_log(out, record, start if checkpoint else None)
        was = checkpoint and (checkpoint.get("processes", 1), checkpoint["settings"]["accumulate"])
        if checkpoint and was != (world, args.accumulate):
            print(
                f"resumed on {world} processes x {args.accumulate} parts, saved on {was[0]} x {was[1]}: the same"
                " batches and noise, equal to float rounding"
            )
        print(
            f"{args.method} on {device}: {record['parameters'] / 1e6:.1f}M parameters, {len(indices)} images in"
            f" {len(data.classes)} classes, step {start} of {args.steps}"
        )

    def save(step):
        state = dict(model=model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step, seconds=seconds)
        state.update(config=dataclasses.asdict(config), settings=vars(args), classes=data.classes, images=len(data))
        state.update(latent=latent[1] if latent else None, processes=world)
        save_checkpoint(out, state, args.keep)

    cpu_group = dist.new_group(backend="gloo") if device.type == "cuda" and world > 1 else None
    sums, since, clock, run, saved = torch.zeros(4, device=device), start, time.time(), 0, True
    skips = torch.zeros(args.log_every, device=device)  # 1 for each step since the last log that was not applied
    bar = tqdm(
        total=args.steps, initial=start, disable=rank > 0, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30
    )
    for step in range(start, args.steps):
        stop = torch.tensor(len(caught))
        if world > 1:  # all stop after the same step; the answer comes while the step runs
            agreement = dist.all_reduce(stop, dist.ReduceOp.MAX, group=cpu_group, async_op=True)
        ramp = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
        if args.lr_schedule == "cosine":
            ramp *= 0.5 + 0.5 * np.cos(np.pi * step / args.steps)
        opt.param_groups[0]["lr"] = args.lr * float(ramp)
        terms = torch.zeros(3, device=device)
        for i in range(rank, parts, world):
            images, labels, moments = on(device, next(feed))
            target = teacher(images) if teacher else None
            generator = seeded(args.seed, step, device)
            x = to_input(images, moments, latent, generator, part=(i, parts))
            last = i + world >= parts
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                with autocast():
                    losses = method.loss(wrapped, x, labels, target, config, generator, part=(i, parts))
                (losses["loss"] / args.accumulate).backward()
            terms += torch.stack([losses[k].detach() for k in ("loss", "denoise", "align")]) / args.accumulate
        decay = min(args.ema, (1 + step) / (10 + step)) if args.ema_warmup else args.ema
        norm, skips[step - since] = update(model, ema, opt, args.clip, decay)
        sums += torch.where(skips[step - since] > 0, 0, torch.cat([terms, norm[None]]))
        bar.update()

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            if world > 1:
                dist.all_reduce(sums)
            flags = skips[: done - since].bool().tolist()
            run = refuse_streak(run, since, flags, indices, args, data)
            loss, denoise, align, grad_norm = (sums / max(1, done - since - sum(flags)) / world).tolist()
            elapsed = time.time() - clock
            seconds += elapsed
            row = dict(step=done, loss=loss, denoise=denoise, align=align)
            row.update(held_out=held_out_loss(model, method.loss, held, config, autocast, device), grad_norm=grad_norm)
            row.update(lr=opt.param_groups[0]["lr"], images_per_s=(done - since) * args.batch_size / elapsed)
            row.update(seconds=seconds, skipped=sum(flags))
            if rank == 0:
                warned(lambda: append(log, row))
            bar.set_postfix_str(
                f"loss {loss:.4f} denoise {denoise:.4f} align {align:.4f} held-out {row['held_out']:.4f}"
                f" {row['images_per_s']:.0f} img/s"
            )
            sums.zero_()
            skips.zero_()
            since, clock = done, time.time()
        if world > 1:
            agreement.wait()
        stop = bool(stop) and done < args.steps
        if stop:
            seconds += time.time() - clock
        pause = time.time()  # not training: keep it out of the images/s
        if rank == 0 and (done % args.ckpt_every == 0 or done == args.steps or stop):
            saved = warned(lambda: save(done))
        if stop:
            break
        drawn = args.sample_every and (done % args.sample_every == 0 or done == args.steps)
        if rank == 0 and drawn:
            warned(lambda: draw_samples(ema, data, args, latent, out / "samples" / f"step-{done:07d}.png"))
        if rank == 0 and (drawn or done == args.steps) and log.stat().st_size:
            warned(lambda: plot(out))
        clock += time.time() - pause
    bar.close()
    del feed  # and with it the workers
    if world > 1:
        dist.destroy_process_group()
    if not saved:
        raise SystemExit(
            f"train.py: step {done} could not be saved; {out}/last.pt, if it is there, is of an earlier step"
        )
    if stop:
        if rank == 0:
            print(f"stopped by a signal after step {done}, saved in {out}/last.pt; --resume --out {out} goes on")
        raise SystemExit(STOPPED)
    if rank == 0:
        cfg = f" --cfg {args.sample_cfg:g}" if args.sample_cfg != 1 else ""
        cfg += f" --vae {args.vae}" if latent and latent[1]["vae"] == "local" else ""
        cfg += f" --vae-weights {args.vae_weights}" if latent and args.vae_weights else ""
        shown = f"{out}/samples and {out}/curves.png show" if args.sample_every else f"{out}/curves.png shows"
        print(f"{shown} the run; next: python sample.py --ckpt {out}/last.pt{cfg}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first step, or a second time
        sys.exit(130)
