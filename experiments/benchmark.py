"""How fast it is on the device at hand, in one run, and side by side with what else there is.

    python -m experiments.benchmark train --models SiT-S/2 SiT-B/2 --encoders dinov2_vitb14 efficientnet_lite0
                                                                                       a table of training steps
    python -m experiments.benchmark sample --models SiT-S/2 --batch-size 8             images/s of each sampler
    python -m experiments.benchmark data --data photos.zip --latents DIR               decoding, and reading a cache
    python -m experiments.benchmark official --release DIR --models SiT-B/2            against the official code
    python -m experiments.benchmark fid --batch-size 32                                fid.py against pytorch-fid

Rivals take turns, window by window, after a warm-up, and the median counts, so that a noisy machine disturbs all alike;
losses and images are read, so that nothing is skipped. Weights are random: speed does not depend on them.
`fid` needs pip install pytorch-fid 'scipy<1.18' in a scratch environment: its sqrtm call is gone from later scipy.
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import argparse
import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fid
from experiments.benchmark_official import official
from experiments.rivals import Step, apart, random_teacher, table, windows
from inputs.images import ImageSet
from inputs.latents import Cached
from inputs.shards import Shards
from irepa import Config, Sampling, SiT
from plumbing.files import mistakes, write_text
from plumbing.flags import make_parser
from plumbing.processes import compile_blocks, device_name, pick_device, settle_compile
from sample import generate


def peak_memory(make, device):
    """-> (make(), the MiB that it and its first call took at their peak, None on a CPU)."""
    if device.type != "cuda":
        return make(), None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    made = make()
    made()
    return made, round((torch.cuda.max_memory_allocated(device) - before) / 2**20)


def matmul_rate(device):
    """Measured bf16 FLOP/s of a square matrix product: what the utilisation is a share of."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / windows({"": lambda: a @ b}, 9, device)[""]


# ---- Training ----


def again(model, update):
    """The update with the gradients that the model has now, as often as it is called: an update takes them away."""
    gradients = [(p, p.grad) for p in model.parameters()]

    def call():
        for p, gradient in gradients:
            p.grad = gradient
        update()

    return call


def from_cache(folder, teacher, batch_size, device):
    """A cache of tokens for eight batches in `folder` -> a function that reads a shuffled batch, as train.py does."""
    count, order = 8 * batch_size, np.random.default_rng(0)
    shards = Shards(folder, "tokens", count, count, (256, teacher.dim), "")
    np.save(shards.path(0), order.standard_normal((count, 256, teacher.dim), np.float32).astype(np.float16))

    def read(images):
        return torch.from_numpy(shards[order.permutation(count)[:batch_size]]).to(device).float()

    return read


def train(args, device):
    rate = matmul_rate(device)
    print(f"measured bf16 matrix product: {rate / 1e12:.2f} TFLOP/s")
    rows = []
    for encoder in args.encoders:
        teacher = random_teacher(encoder, device)
        for name in args.models:
            for compiled in (False, True) if args.compile else (False,):
                with tempfile.TemporaryDirectory() as folder:
                    cached = from_cache(folder, teacher, args.batch_size, device)
                    at_hand = teacher(torch.zeros(args.batch_size, 3, 256, 256, dtype=torch.uint8, device=device))
                    kinds = {"none": None, "at hand": lambda images: at_hand, "cached": cached, "live": teacher}
                    rows += rivals_of(name, encoder, kinds, teacher.dim, compiled, rate, args, device)
                    print(f"{name} with {encoder}{', compiled' if compiled else ''} is measured", flush=True)
    table(
        f"training, batch {args.batch_size}, 256 tokens; none: SiT, without alignment; at hand: iREPA with tokens that"
        " cost nothing; MFU = 3 forward FLOP a step / seconds / the rate above",
        rows,
    )
    return rows


def rivals_of(name, encoder, kinds, dim, compiled, rate, args, device):
    """A row of the table for each kind of teacher, measured in turns."""
    steps, peaks, rows = {}, {}, []
    for kind in ("none", "live"):
        steps[kind], peaks[kind] = peak_memory(lambda: Step(name, args, device, kinds[kind], dim, compiled), device)
    for kind in ("at hand", "cached"):  # the same network
        steps[kind] = copy.copy(steps["live"])
        steps[kind].encoder = kinds[kind]
    seconds = windows(steps, args.windows, device)
    for kind in kinds:
        step = steps[kind]
        step.loss(step.teacher()).backward()
        parts = dict(teacher=step.teacher, update=again(step.model, step.update))
        parts = windows(parts, args.windows, device)
        needed = 3 * step.flops() * args.batch_size
        rows.append({"model": name, "teacher": encoder, "tokens": kind, "compiled": compiled})
        rows[-1].update({"images/s": args.batch_size / seconds[kind], "ms/step": 1e3 * seconds[kind]})
        rows[-1].update({"times none": seconds[kind] / seconds["none"], "MFU": needed / seconds[kind] / rate})
        rows[-1].update({"in teacher": parts["teacher"] / seconds[kind], "in update": parts["update"] / seconds[kind]})
        rows[-1].update({"peak MiB": peaks.get(kind)})
    return rows


# ---- Sampling ----


def sample(args, device):
    rows = []
    for name in args.models:
        model = SiT(Config.named(name, projector=None)).to(device).eval().requires_grad_(False)
        compile_blocks(model, args.compile)
        labels = torch.arange(args.batch_size) % 1000
        for precision in ("tf32", "bf16"):
            torch.set_float32_matmul_precision("high")
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

            def draw(sampler, cfg, interval=(0.0, 1.0)):
                how = Sampling(sampler, args.steps, cfg, interval)
                with autocast:
                    return generate(model, labels, range(len(labels)), how=how).sum().item()

            rivals = {
                "sde": lambda: draw("sde", 1.0),
                "sde, cfg 1.8": lambda: draw("sde", 1.8),
                "sde, cfg 1.8 on [0, 0.7]": lambda: draw("sde", 1.8, (0.0, 0.7)),
                "euler": lambda: draw("euler", 1.0),
                "heun": lambda: draw("heun", 1.0),
            }
            for sampler, seconds in windows(rivals, args.windows, device).items():
                rows.append({"model": name, "precision": precision, "sampler": sampler, "compiled": args.compile})
                each = args.batch_size / seconds
                rows[-1].update({"images/s": each, f"at 250 of {args.steps} steps": each * args.steps / 250})
    table(f"sampling, batch {args.batch_size}, {args.steps} steps, without the VAE", rows)
    return rows


# ---- Data ----


def data(args, device):
    images = ImageSet(args.data, 256, progress=False)
    images.images, rows, order = None, [], np.random.RandomState(0).permutation(len(images))  # decode, as of ImageNet
    some = order[: min(64, len(order))]
    rivals = {"decode and crop a file": lambda: images[some]}
    if args.latents:
        cached = Cached(images, args.latents, images=False)
        rivals["read a cache"] = lambda: cached[some]
    for what, seconds in windows(rivals, args.windows).items():
        rows.append({"what": what, "images/s of one core": len(some) / seconds})
    table("data at 256 px, one process, files in the page cache", rows)
    return rows


# ---- The evaluator ----


@torch.no_grad()
def features_of(network, images):
    return network(images)[0].sum().item()  # read, so that nothing is skipped


def pytorch_fid_apart(connection, weights, images, device):
    """pytorch-fid's Inception, with the file `weights` in place of its download, on `images` whenever asked."""
    with mistakes("experiments.benchmark"):
        try:
            from pytorch_fid import inception
        except ImportError as e:
            raise ValueError("pytorch-fid is not installed; see the top of this file") from e
    inception.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights, weights_only=True)
    network, images = inception.InceptionV3([3]).eval().to(device), images.to(device)
    connection.send(None)
    while True:
        connection.recv()
        connection.send(features_of(network, images.float() / 255))


def evaluator(args, device):
    result, rs = {}, np.random.RandomState(0)
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)

    torch.manual_seed(0)
    torch.save(fid.InceptionV3().state_dict(), root / "weights.pth")
    ours, _ = fid.load_inception(root / "weights.pth", device)
    fast, _ = fid.load_inception(root / "weights.pth", device, fast=True)
    images = torch.from_numpy(rs.randint(0, 256, (args.batch_size, 3, 256, 256)).astype(np.uint8))
    batch = images.to(device)
    with apart(pytorch_fid_apart, root / "weights.pth", images, device) as ask:
        rivals = {
            "pytorch-fid": lambda: ask(None),
            "fid.py": lambda: features_of(ours, batch),
            "fid.py --fast": lambda: features_of(fast, batch),
        }
        for name, seconds in windows(rivals, args.windows).items():
            result[f"network, {name}, images/s"] = args.batch_size / seconds

    from pytorch_fid.fid_score import calculate_frechet_distance

    sides = []
    for scale in (np.linspace(0.2, 1, 2048), np.linspace(1, 0.2, 2048)):
        features = rs.standard_normal((3000, 2048)) * scale
        sides += [features.mean(0), np.cov(features, rowvar=False)]
    values = calculate_frechet_distance(*sides), fid.frechet_distance(*sides)
    assert abs(values[0] / values[1] - 1) < 1e-6, values
    rivals = {
        "pytorch-fid": lambda: calculate_frechet_distance(*sides),
        "fid.py": lambda: fid.frechet_distance(*sides),
    }
    for name, seconds in windows(rivals, 3).items():
        result[f"Frechet distance, {name}, s"] = seconds

    pixels = rs.randint(0, 256, (args.images, 32, 32, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    np.savez(root / "images.npz", pixels)
    (root / "png").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / "png" / f"{i}.png")
    sets = {"npz": fid.open_set(root / "images.npz")[0], "PNGs": fid.open_set(root / "png")[0]}
    rivals = {name: lambda s=s: fid.extract(s, ours, device, args.batch_size) for name, s in sets.items()}
    for name, seconds in windows(rivals, 2).items():
        result[f"whole, fid.py from {name}, images/s"] = args.images / seconds
    table("the evaluator, 256-px images", [{"what": what, "": value} for what, value in result.items()])
    return result


def main(argv=None):
    parser = make_parser(
        "experiments.benchmark", __doc__, "{train,sample,data,official,fid} [flags], which --help lists"
    )
    add = parser.add_argument
    calls = dict(train=train, sample=sample, data=data, official=official, fid=evaluator)
    add("what", choices=calls)
    add("--models", nargs="+", default=["SiT-S/2", "SiT-B/2"], help="SiT-XL/2 and so on")
    add("--encoders", nargs="+", default=["dinov2_vitb14"], help="teachers, with random weights; official takes one")
    add("--batch-size", type=int, default=16)
    add("--steps", type=int, default=10, help="of sampling")
    add("--windows", type=int, default=5)
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    add("--data", metavar="PATH", help="for data: a folder of class folders, or a zip of one")
    add("--latents", metavar="DIR", help="for data: a cache of it")
    add("--release", metavar="DIR", help="for official: a checkout")
    add("--images", type=int, default=128, help="for fid: of fid.py as a whole")
    add("--device", default="auto")
    add("--json", metavar="OUT")
    args = parser.parse_args(argv)
    with mistakes("experiments.benchmark"):
        needs = dict(data="data", official="release").get(args.what)
        if needs and not getattr(args, needs):
            raise ValueError(f"{args.what} needs --{needs}")
        for name in ("batch_size", "steps", "windows", "images"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
        if args.what == "official" and len(args.encoders) > 1:
            raise ValueError(f"official takes one teacher, not {' '.join(args.encoders)}")
        if args.what not in ("data", "fid"):
            [Config.named(name) for name in args.models]  # all are known before the first is measured
        device = pick_device(args.device)
        args.compile = settle_compile(args.compile, device)
        result = dict(what=args.what, settings=vars(args), rows=calls[args.what](args, device))
        result.update(device=device_name(device), torch=str(torch.__version__), threads=torch.get_num_threads())
        print(f"\n{result['device']}, torch {result['torch']}, {result['threads']} threads")
        if args.json:
            write_text(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    as_program(main)
