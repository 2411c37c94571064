"""train.py --plan: what a run costs, counted on tensors without numbers. Nothing is decoded, downloaded or trained.

The step that is counted is the loop's: the Learner's gradients of one part of a batch, as many images as a process has
at a time. Memory is what autograd keeps of it, without what is there for a moment; compiled blocks keep less.
"""

import math
import os
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from inputs.formats import listing
from inputs.images import Batch
from inputs.prepared import Labels
from inputs.teachers import DRAWN, architecture, build, find_encoder, trim
from inputs.vae import SD_VAE, TINY_VAE, Latents
from plumbing.processes import Ranks, fast_bf16, mixed, recompute_blocks
from plumbing.settings import network_config

IMAGENET = 1_281_167, 1000  # images to train on, and classes


class Kept:
    """A tensor that autograd keeps, counted as long as it does, and once for all views of its memory."""

    def __init__(self, tensor, book):
        self.tensor, self.book, storage = tensor, book, tensor.untyped_storage()
        self.key, self.size = storage._cdata, storage.nbytes()
        book.times[self.key] = book.times.get(self.key, 0) + 1
        if book.times[self.key] == 1 and self.key not in book.own:
            book.now += self.size
            book.peak = max(book.peak, book.now)

    def __del__(self):
        self.book.times[self.key] -= 1
        if not self.book.times[self.key] and self.key not in self.book.own:
            self.book.now -= self.size


def count_step(run, method, config, Learner, size, gpu, recompute):
    """-> ({network: its parameters}, bytes that autograd keeps at most, FLOP) of a step of `size` images."""
    device = torch.device("cpu")
    bf16 = (gpu or fast_bf16(device)) if run.precision == "auto" else run.precision == "bf16"

    def autocast():  # on a GPU attention does not keep its scores, on a CPU it does
        return torch.autocast("cpu", torch.bfloat16, enabled=bf16) if gpu else mixed(device, bf16)

    side, channels = config.input_size, config.in_channels
    with FakeTensorMode(), patch.object(nn.Module, "to", lambda network, *_: network):  # there is nowhere to move to
        images = torch.zeros(size, 3, run.image_size, run.image_size, dtype=torch.uint8)
        moments = torch.zeros(size, 2 * channels, side, side)
        tokens = torch.zeros(size, (side // config.patch_size) ** 2, config.encoder_dim)
        batch = Batch(images, torch.zeros(size, dtype=torch.int64), moments, tokens)
        spec = dict(scale=[1.0] * channels, bias=[0.0] * channels)
        latent = Latents(build_vae(run) if method.stored_vae else None, spec) if run.vae else None
        job = SimpleNamespace(run=run, method=method, config=config, device=device, autocast=autocast, latent=latent)
        job.checkpoint = True  # or the data would be measured
        learner = Learner(job, Ranks(), [])
        networks = learner.networks.values()
        if recompute:
            recompute_blocks(learner.networks["model"], autocast)
        own = {t.untyped_storage()._cdata for net in networks for t in (*net.parameters(), *net.buffers())}
        book = SimpleNamespace(times={}, own=own, now=0, peak=0)
        keep, give = lambda tensor: Kept(tensor, book), lambda kept: kept.tensor
        with FlopCounterMode(display=False) as counted, saved_tensors_hooks(keep, give):
            learner.gradients(0, [((0, 1), batch)])
        sizes = {k: sum(p.numel() for p in net.parameters() if p.requires_grad) for k, net in learner.networks.items()}
    return sizes, book.peak, counted.get_total_flops()


def vae_of(run):
    """The shapes of the VAE; that of a folder or file is taken for one of Stable Diffusion's."""
    return TINY_VAE if run.vae == "tiny" else SD_VAE


def build_vae(run):
    from diffusers import AutoencoderKL  # late: four seconds that pixels need not wait for

    return AutoencoderKL(**vae_of(run))


def count_vae(run):
    """-> (parameters, FLOP of encoding an image) of the VAE."""
    with torch.device("meta"), FlopCounterMode(display=False) as counted, torch.no_grad():
        network = build_vae(run)
        network.encode(torch.zeros(1, 3, run.image_size, run.image_size))
    return sum(p.numel() for p in network.parameters()), counted.get_total_flops()


def count_teacher(name, grid, cls_weight):
    """-> (parameters, FLOP an image, width of its tokens) of a teacher; HOG and SIFT have no parameters."""
    if name in DRAWN:
        return 0, 0, DRAWN[name](grid).dim
    entry = find_encoder(name, "random", cls_weight)
    side = entry.side or grid * entry.patch
    with torch.device("meta"):
        own = "/" in entry.timm_id  # not in timm's list
        network = architecture(name.partition("@")[0]) if own else build(entry.timm_id, grid, side)
        if own and network.patch_embed.img_size != (side, side):
            network.set_input_size(img_size=(side, side))
        trim(network, entry)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            x = torch.zeros(1, 3, side, side)
            if entry.stage is None:
                network.eval().forward_features(x)
            else:
                network.eval().forward_intermediates(x, indices=[entry.stage], stop_early=True, intermediates_only=True)
    return sum(p.numel() for p in network.parameters()), counted.get_total_flops(), entry.dim


def count_images(run):
    """-> (how many images, of how many classes, and both in words) of --data, or of ImageNet."""
    if run.data is None:
        return (10_000, 10, "the 10,000 drawn ones") if run.demo else (*IMAGENET, f"ImageNet's {IMAGENET[0]:,}")
    data = Labels(run.data) if Labels.takes(run.data) else listing(run.data)
    return len(data.labels), len(data.classes), f"the {len(data.labels):,} in {run.data}"


# ---- The plan ----


def in_units(count, units=("", "k", "M", "G", "T", "P")):
    """1234567 -> 1.23M"""
    power = max(0, min(len(units) - 1, (len(str(int(count))) - 1) // 3))
    return f"{count / 1000**power:.3g}{units[power]}"


def plan(run, method, Learner):
    """What the run costs, as text. Learner: train.py's or the method's. ValueError where its flags do not fit."""
    if run.plan is not True and not 0 < run.plan < math.inf:
        raise ValueError(f"--plan takes images a second, not {run.plan:g}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    size = run.batch_size // world // run.accumulate
    gpu = run.device.startswith("cuda") or run.device == "auto" and torch.cuda.is_available()
    vae = vae_of(run)
    spec = dict(factor=2 ** (len(vae["block_out_channels"]) - 1), channels=vae["latent_channels"]) if run.vae else None
    shape = network_config(run, method, spec)
    grid = shape.input_size // shape.patch_size
    encoder = run.encoder if shape.projector else None
    parameters, of_teacher, width = count_teacher(encoder, grid, run.cls_weight) if encoder else (0, 0, 1)
    count, classes, of = count_images(run)
    config = network_config(run, method, spec, classes, width)
    sizes, plain, flop = count_step(run, method, config, Learner, size, gpu, False)
    _, kept, _ = count_step(run, method, config, Learner, size, gpu, True)
    kept += (plain - kept) // config.depth  # what one block keeps while it is gone through again
    total, model = sum(sizes.values()), sizes["model"]

    live = encoder and not run.tokens
    memory = {"weights": 4 * total, "averages": 4 * model * len(run.averages), "Adam": 8 * total}
    memory.update(gradients=4 * total, teacher=(2 if gpu else 4) * parameters if live else 0)
    encodes = run.vae and not run.latents and not method.stored_vae
    vae_parameters, of_vae = count_vae(run) if encodes else (0, 0)
    memory.update(VAE=4 * vae_parameters)
    chosen = kept if run.checkpoint_blocks else plain
    images = run.steps * run.batch_size
    caches = {"latents": 4 * config.in_channels * config.input_size**2} if run.vae and not method.stored_vae else {}
    caches.update({"tokens": 2 * grid**2 * width} if encoder else {})

    def gib(count):
        return f"{count / 2**30:.2f}"

    network, work = [f"{in_units(v)} {k}" for k, v in sizes.items()], [f"{in_units(flop / size)} of training"]
    if parameters:
        network.append(f"{in_units(parameters)} teacher ({encoder})")
        work.append(f"{in_units(of_teacher)} in the teacher{'' if live else ' (its tokens are in a cache)'}")
    if encodes:
        network.append(f"{in_units(vae_parameters)} VAE")
        work.append(f"{in_units(of_vae)} in the VAE (none with --latents)")
    seen = f"{config.in_channels} x {config.input_size} x {config.input_size}"
    long = "--plan N says how long it takes at N images a second"
    if run.plan is not True:
        hours = images / run.plan / 3600
        long = f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.2g} minutes"
        long += f" at {run.plan:,.6g} images a second"
    rows = [
        (run.method, f"{run.model} on {seen}, {grid**2} tokens, {classes:,} classes"),
        ("", f"{size} images at a time in each of {world} process{'es' * (world > 1)}, on {'GPUs' if gpu else 'CPUs'}"),
        ("parameters", ", ".join(network)),
        ("FLOP an image", ", ".join(work)),
        ("memory, GiB", ", ".join(f"{gib(v)} {k}" for k, v in memory.items() if v)),
        ("", f"{gib(plain)} activations, with --checkpoint-blocks {gib(kept)}"),
        ("", f"{gib(sum(memory.values()) + chosen)} in all for each process, where nothing is compiled"),
        ("disk", f"{in_units(12 * total + memory['averages'])}B a checkpoint, {max(1, run.keep)} are kept"),
        *(("", f"{in_units(v)}B of {k} an image, {in_units(v * count)}B for {of}") for k, v in caches.items()),
        ("time", f"{images:,} images: each of {of} is seen {images / count:.3g} times"),
        ("", long),
    ]
    return "\n".join(f"{name:14} {text}" for name, text in rows)
