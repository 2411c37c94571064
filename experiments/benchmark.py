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

import argparse
import copy
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import fid
from inputs.images import ImageSet
from inputs.latents import Cached
from inputs.shards import Shards
from inputs.teachers import DRAWN, load_encoder
from irepa import Config, Sampling, SiT, irepa_loss, stream
from plumbing.files import mistakes, one_line, write_text
from plumbing.flags import make_parser
from plumbing.processes import compile_blocks, device_name, fast_bf16, mixed, pick_device
from sample import generate
from train import average, update


def windows(rivals, count, device="cpu"):
    """{name: callable} -> {name: median seconds of a call}, the callables taking turns."""
    seconds = {name: [] for name in rivals}
    for i in range(count + 1):  # the first is the warm-up
        for name, call in rivals.items():
            start = time.perf_counter()
            call()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def table(title, rows):
    """Print dicts of the same keys, one a line."""
    print(f"\n{title}")
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


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


class Step:
    """One training step of train.py on a batch in memory: call it; .teacher() and .update() are its parts.

    teacher: None, or images uint8 -> tokens, with the width `dim` of these.
    """

    def __init__(self, name, args, device, teacher, dim, compiled):
        torch.manual_seed(0)
        self.config = Config.named(name, **(dict(encoder_dim=dim) if teacher else dict(projector=None)))
        self.model = SiT(self.config).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)
        compile_blocks(self.model, compiled)
        rs, n = np.random.RandomState(0), args.batch_size
        self.images = torch.from_numpy(rs.randint(0, 256, (n, 3, 256, 256)).astype(np.uint8)).to(device)
        self.x = torch.from_numpy(rs.standard_normal((n, 4, 32, 32)).astype(np.float32)).to(device)
        self.y = torch.from_numpy(rs.randint(0, 1000, n)).to(device)
        self.encoder, self.device, self.n = teacher, device, 0
        self.autocast = lambda: mixed(device, fast_bf16(device))

    def teacher(self):
        return self.encoder(self.images) if self.encoder else None

    def update(self):
        update({"model": self.model}, {"model": self.opt}, statistics_before=[], clip=1.0, rate=1e-4)
        average(self.ema, self.model, 0.9999)

    def loss(self, target):
        generator = stream("step", 0, self.n, self.device)
        with self.autocast():
            return irepa_loss(self.model, self.x, self.y, target, self.config, generator)["loss"]

    def __call__(self):
        loss = self.loss(self.teacher())
        loss.backward()
        self.update()
        self.n += 1
        return loss.item()

    def flops(self):
        """Of a forward pass of an image."""
        with FlopCounterMode(display=False) as counted, self.autocast():  # the average is not compiled
            self.ema(self.x[:1], torch.zeros(1, device=self.device), self.y[:1])
        return counted.get_total_flops()


def again(model, update):
    """The update with the gradients that the model has now, as often as it is called: an update takes them away."""
    gradients = [(p, p.grad) for p in model.parameters()]

    def call():
        for p, gradient in gradients:
            p.grad = gradient
        update()

    return call


def random_teacher(name, device):
    return load_encoder(name, 16, None if name in DRAWN else "random", device)


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


# ---- The official release ----


class Theirs:
    """The official network in the loop that they train with, on the weights, the teacher and the batch of our Step."""

    def __init__(self, release, name, ours):
        sys.path.insert(0, str(Path(release) / "ldm"))  # their modules lie there, in no package
        try:
            from loss import SILoss
            from models.sit import SiT_models
            from samplers import euler_maruyama_sampler
            from utils import SpatialNormalization
        except ImportError as e:
            raise ValueError(f"--release {release} is no checkout of the official code ({e})") from e
        kinds = dict(projection_layer_type="conv", proj_kwargs_kernel_size=3, fused_attn=True, qk_norm=False)
        net = SiT_models[name](
            input_size=32, in_channels=4, num_classes=1000, use_cfg=True, z_dims=[ours.encoder.dim],
            encoder_depth=ours.config.encoder_depth, **kinds,
        )  # fmt: skip
        try:
            net.load_state_dict(ours.model.state_dict())
        except RuntimeError as e:  # its S sizes have a last layer of width 768, and cannot run
            raise ValueError(f"the release's {name} is another network: {one_line(e)[:300]}") from e
        self.net, self.ours = net.to(ours.device).train(), ours
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.criterion = SILoss(projection_loss_type="cosine", proj_coeff="1.0")
        self.normal, self.solve = SpatialNormalization("zscore"), euler_maruyama_sampler
        # they keep its weights in float32, for autocast to cast; its attention is ours, on a CPU plain products
        self.teacher = copy.deepcopy(ours.encoder).float()

    def losses(self, net, x, y, tokens):
        denoise, align, _ = self.criterion(net, x, dict(y=y), zs=[self.normal(tokens, zscore_alpha=0.6)])
        return denoise.mean(), align.mean()

    def stepper(self, compiled):
        """-> their training step, to be called. compiled: network and optimiser, as they train by default."""
        net, opt = self.net, torch.optim.AdamW(self.net.parameters(), lr=1e-4, weight_decay=0.0)

        def optimise():
            opt.step()
            opt.zero_grad(set_to_none=True)

        if compiled:
            torch._dynamo.config.cache_size_limit = 64
            net, optimise = torch.compile(net), torch.compile(optimise)
        return functools.partial(self.step, net, optimise)

    def step(self, net, optimise):
        ours = self.ours
        with torch.autocast(ours.device.type, torch.bfloat16, enabled=fast_bf16(ours.device)):
            denoise, align = self.losses(net, ours.x, ours.y, self.teacher(ours.images))
            loss = denoise + align
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        optimise()
        with torch.no_grad():
            for slow, fast in zip(self.ema.parameters(), self.net.parameters()):
                slow.mul_(0.9999).add_(fast, alpha=1e-4)
        return loss.item()

    @torch.no_grad()
    def samples(self, noise, steps):
        return self.solve(self.ema.eval(), noise, self.ours.y, num_steps=steps).sum().item()


def same_losses(name, ours, theirs):
    """The same weights, draws and target give the same losses, on the CPU in float32."""
    x, y = ours.x.cpu()[:4], ours.y.cpu()[:4]
    tokens = ours.encoder(ours.images[:4]).cpu()
    torch.manual_seed(1)
    wanted = theirs.losses(copy.deepcopy(theirs.net).cpu(), x, y, tokens)
    found = irepa_loss(copy.deepcopy(ours.model).cpu(), x, y, tokens, ours.config, torch.Generator().manual_seed(1))
    pairs = [(a.item(), found[term].item()) for a, term in zip(wanted, ("denoise", "align"))]
    print(f"{name}: losses, theirs and ours: {pairs}")
    assert all(abs(a - b) < 1e-4 * max(1, abs(a)) for a, b in pairs)


def eager(call):
    """The same without anything compiled."""

    def called():
        with torch.compiler.set_stance("force_eager"):
            return call()

    return called


def add_rows(rows, name, what, seconds, pairs, args):
    """A row for each pair of names (theirs, ours) that were measured, in `seconds`."""
    for theirs, ours in pairs:
        if ours in seconds:
            rates = [args.batch_size / seconds[rival] for rival in (theirs, ours)]
            rows.append({"model": name, "what": what, "theirs": theirs, "ours": ours})
            rows[-1].update({"theirs, images/s": rates[0], "ours, images/s": rates[1], "times": rates[1] / rates[0]})


def official(args, device):
    """Their network, loss, spatial norm and sampler in the loop that they train with, on our weights and teacher."""
    (encoder,) = args.encoders
    teacher, rows = random_teacher(encoder, device), []
    for name in args.models:
        ours = Step(name, args, device, teacher, teacher.dim, args.compile)
        with torch.no_grad():  # a new model's gates are 0: nothing to compare
            for p in ours.opt.param_groups[0]["params"]:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(device), alpha=0.02)
        theirs = Theirs(args.release, name, ours)
        same_losses(name, ours, theirs)
        rivals = {"theirs": theirs.stepper(False), "theirs, compiled": theirs.stepper(True), "ours": eager(ours)}
        if args.compile:
            rivals["ours, compiled"] = ours
        pairs = [("theirs", "ours"), ("theirs, compiled", "ours"), ("theirs, compiled", "ours, compiled")]
        add_rows(rows, name, "training step", windows(rivals, args.windows, device), pairs, args)

        noise = torch.randn(args.batch_size, 4, 32, 32, device=device)
        sampled = copy.deepcopy(ours.ema)
        sampled.projectors = torch.nn.ModuleList()  # sample.py loads none
        compile_blocks(sampled, args.compile)
        torch.set_float32_matmul_precision("high")  # as both do

        def our_samples(bf16):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                x = generate(sampled, ours.y.cpu(), range(len(ours.y)), how=Sampling(steps=args.steps))
            return x.sum().item()

        default, bf16 = (functools.partial(our_samples, bf16) for bf16 in (False, True))
        rivals = {"theirs": functools.partial(theirs.samples, noise, args.steps)}
        rivals.update({"ours": eager(default), "ours, bf16": eager(bf16)})
        if args.compile:
            rivals.update({"ours, compiled": default, "ours, compiled, bf16": bf16})
        pairs = [("theirs", what) for what in ("ours", "ours, bf16", "ours, compiled", "ours, compiled, bf16")]
        add_rows(rows, name, "sampling, SDE", windows(rivals, args.windows, device), pairs, args)
        torch.set_float32_matmul_precision("highest")
    table(f"the official release, batch {args.batch_size}, {encoder}, sampling in {args.steps} steps", rows)
    return rows


# ---- The evaluator ----


def pytorch_fid_network(weights, device):
    """pytorch-fid's Inception with `weights` in place of its download."""
    try:
        from pytorch_fid import inception
    except ImportError as e:
        raise ValueError("pytorch-fid is not installed; see the top of this file") from e
    inception.load_state_dict_from_url = lambda *args, **kwargs: weights
    return inception.InceptionV3([3]).eval().to(device)


def evaluator(args, device):
    result, rs = {}, np.random.RandomState(0)
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)

    torch.manual_seed(0)
    weights = fid.InceptionV3().state_dict()
    torch.save(weights, root / "weights.pth")
    ours, _ = fid.load_inception(root / "weights.pth", device)
    fast, _ = fid.load_inception(root / "weights.pth", device, fast=True)
    theirs = pytorch_fid_network(weights, device)
    batch = torch.from_numpy(rs.randint(0, 256, (args.batch_size, 3, 256, 256)).astype(np.uint8)).to(device)

    @torch.no_grad()
    def run(network, images):
        out = network(images)[0]
        return out.sum().item()  # read, so that nothing is skipped

    rivals = {
        "pytorch-fid": lambda: run(theirs, batch.float() / 255),
        "fid.py": lambda: run(ours, batch),
        "fid.py --fast": lambda: run(fast, batch),
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
        args.compile = device.type == "cuda" if args.compile is None else args.compile
        result = dict(what=args.what, settings=vars(args), rows=calls[args.what](args, device))
        result.update(device=device_name(device), torch=str(torch.__version__), threads=torch.get_num_threads())
        print(f"\n{result['device']}, torch {result['torch']}, {result['threads']} threads")
        if args.json:
            write_text(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
