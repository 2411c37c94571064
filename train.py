"""Train a diffusion transformer with iREPA, REPA or neither, on CPU, one GPU or many.

    python train.py --demo                                        five minutes on a laptop, no download
    python train.py --demo --data photos --out runs/photos        the same on your own images
    python train.py --resume --out runs/photos                    goes on from runs/photos/last.pt, with its settings
    torchrun --nproc_per_node=8 -m inputs.latents --data data/imagenet/train --out data/imagenet/latents-256
    torchrun --nproc_per_node=8 train.py --encoder dinov2_vitb14 --latents data/imagenet/latents-256 --no-ema-warmup
                                                                  the paper's setting

OUT holds config.json (every setting, versions), log.jsonl (a line each --log-every steps), samples/ (grids from the
EMA), curves.png, last.pt and the --keep newest checkpoints by number. A flag wins over a preset (--method, --demo), a
preset over a default. The order of the data depends on the seed, the step and the batch size; noise, times, label
drops and flips on these and on the kind of device: a resumed run, or one on more processes, sees the same batches.
After SIGTERM or SIGINT the step at hand is finished and saved, exit code 75; the same signal again ends the run at
once. A user's mistake exits with 2.
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import copy
import itertools
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from inputs.images import BrokenImage, split, workers_for
from inputs.teachers import load_encoder as load_encoder  # importable from here, too
from inputs.tokens import Target
from inputs.vae import decode, encode, to_latent
from irepa import draws, stream
from plumbing.checkpoints import hold_folder
from plumbing.files import mistakes
from plumbing.jobs import begin_log, finish, names_of, open_job, save
from plumbing.methods import Unkept
from plumbing.processes import compile_blocks, is_first, noted_signals, read_ahead, spared, start_ranks
from plumbing.records import Meter, append, plot, progress, save_grid, save_progress, to_uint8, warned
from plumbing.trackers import Untracked
from sample import generate

# ---- The order of the data ----


def batch_at(step, indices, run, orders):
    """The indices of the whole batch of `step`; orders is a dict that keeps the epochs at hand between calls."""
    epoch, place = np.divmod(np.arange(step * run.batch_size, (step + 1) * run.batch_size), len(indices))
    needed = np.unique(epoch).tolist()
    for e in orders.keys() - needed:
        del orders[e]
    for e in needed:
        if e not in orders:
            orders[e] = np.random.default_rng((run.seed, e)).permutation(indices)
    return np.concatenate([orders[e][place[epoch == e]] for e in needed])


def batches(indices, run, start, rank, world):
    """This rank's parts of each batch from step `start` on: shuffled epochs, one after the other, without a gap."""
    parts, orders = world * run.accumulate, {}
    size = run.batch_size // parts
    for step in range(start, run.steps):
        whole = batch_at(step, indices, run, orders)
        for i in range(rank, parts, world):
            yield whole[i * size : (i + 1) * size]


def feed(job, indices, start, ranks):
    """This process's parts of the batches, flipped and on the device: part i of n as ((i, n), Batch)."""
    run, parts = job.run, ranks.world * job.run.accumulate
    workers = workers_for(job.data) if run.workers is None else run.workers
    order = batches(indices, run, start, ranks.rank, ranks.world)
    loader = read_ahead(job.data, order, workers, pin_memory=job.device.type == "cuda")
    try:
        for count, batch in enumerate(loader):
            step, own = divmod(count, run.accumulate)
            part, batch = (ranks.rank + own * ranks.world, parts), to_device(job.device, batch)
            yield part, batch._replace(images=job.flipped(batch.images, start + step, part))
    finally:  # without one, close() of a generator keeps what it holds, here the workers, in Python 3.12.0 to 3.12.3
        del loader


def fetch(incoming, count, signals):
    """-> (the `count` parts of the next step, none where a signal comes first; how many of their images stand in for
    broken ones; the error that bars the step, or None)."""
    try:
        parts = signals.until_stopped(list, itertools.islice(incoming, count)) or ()
        return parts, sum(batch.replaced for _, batch in parts), None
    except (BrokenImage, OSError) as broken:
        return (), 0, broken.with_traceback(None)  # which would hold the loader, and it its workers


def to_device(device, batch):
    """The Batch on the device, but for the numbers of its images."""
    moved = {k: v.to(device, non_blocking=True) for k, v in batch._asdict().items() if torch.is_tensor(v)}
    return batch._replace(**{**moved, "numbers": batch.numbers})


# ---- A step ----


class Learner:
    """One network that learns by one loss. A method may bring its own Learner; the loop calls all but `inputs`."""

    def __init__(self, job, ranks, indices):
        self.job, self.ranks = job, ranks
        model = job.method.model(job.config).to(job.device)
        self.networks, self.wrapped = {"model": model}, model  # each network gets an optimiser of its own
        if ranks.world > 1:
            ids = [job.device] if job.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def inputs(self, images, moments, generator, part=(0, 1)):
        """What the network sees, [B, C, H, W]: pixels in [-1, 1], or a sample of the VAE's posterior of the images."""
        if self.job.latent is None:
            return images.float() / 127.5 - 1
        moments = encode(self.job.latent.vae, images) if moments is None else moments
        noise = draws(moments, generator, part)(torch.randn, moments.shape[1] // 2, *moments.shape[2:])
        return to_latent(moments, noise, self.job.latent.spec)

    def held_out(self, images, moments, part):
        """-> a function that gives what the network sees of held-out images, always with the same noise."""
        x = self.inputs(images, moments, stream("held-out latents", 0), part)
        return lambda: x

    def gradients(self, step, parts):
        """Add up the gradients of this process's `parts` of a batch (see feed), which have the teacher's tokens by now
        -> the means of its terms, scalars."""
        job, world, own, terms = self.job, self.ranks.world, self.job.run.accumulate, {}
        for (i, n), batch in parts:
            generator = stream("step", job.run.seed, step, job.device)  # each part draws what the whole batch draws
            x = self.inputs(batch.images, batch.moments, generator, part=(i, n))
            last = i + world >= n  # of this process's own; the processes exchange gradients once
            with nullcontext() if last or world == 1 else self.wrapped.no_sync():
                with job.autocast():
                    given = x, batch.labels, batch.tokens, job.config, generator
                    losses = job.method.loss(self.wrapped, *given, part=(i, n))
                (losses["loss"] / own).backward()
            for name, value in losses.items():
                terms[name] = terms.get(name, 0) + value.detach() / own
        return terms

    def decoder(self, ema):
        """The Latents that make images of the average's samples, or None."""
        return self.job.latent

    def stored(self, optimisers):
        """What a checkpoint holds beside model, ema and opt: {entry: network or optimiser}."""
        return {}

    def facts(self):
        """Plain values that a checkpoint holds besides."""
        return dict(latent=self.job.latent.spec if self.job.latent else None)

    def pictures(self):
        """What is drawn beside the grid of samples: {file name: (images in [-1, 1], names of the rows)}."""
        return {}


def learning_rate(run, step):
    ramp = min(1.0, (step + 1) / run.warmup) if run.warmup else 1.0
    if run.lr_schedule == "cosine":
        ramp *= 0.5 + 0.5 * math.cos(math.pi * step / run.steps)
    return run.lr * ramp


def ema_decay(run, step, average="ema"):
    decay = getattr(run, average)
    return min(decay, (1 + step) / (10 + step)) if run.ema_warmup else decay


def statistics(networks):
    """What a step moves without an optimiser: running means and variances of batch norms."""
    return [b for net in networks for b in net.buffers() if b.is_floating_point()]


def update(networks, optimisers, statistics_before, clip, rate):
    """Clip and step each network -> its gradient's norm by name, and 1. where one was not finite: then none moves."""
    norms = {}
    for name, opt in optimisers.items():
        norm = torch.nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], math.inf if clip is None else clip)
        norms["grad_norm" if name == "model" else f"grad_norm_{name}"] = norm
    skipped = (~torch.isfinite(sum(norms.values()))).float()
    for opt in optimisers.values():
        opt.param_groups[0]["lr"] = rate
        opt.found_inf = skipped  # as a gradient scaler sets it: the fused optimiser skips itself, and nobody waits
        opt.step()
        opt.zero_grad()
    for now, before in zip(statistics(networks.values()), statistics_before):
        now.copy_(torch.where(skipped > 0, before, now))
    return norms, skipped


@torch.no_grad()  # or each step would hang its history on the average
def average(ema, model, decay):
    """Move the average's parameters and statistics towards the model's; counters are copied."""
    moving = [[*net.parameters(), *statistics([net])] for net in (ema, model)]
    torch._foreach_lerp_(*moving, 1 - decay)
    for old, new in zip(ema.buffers(), model.buffers()):
        if not old.is_floating_point():
            old.copy_(new)


# ---- A look from outside ----


@contextmanager
def without_projector(model):
    """Samples and the held-out loss need no alignment."""
    projectors, model.projectors = model.projectors, torch.nn.ModuleList()
    try:
        yield
    finally:
        model.projectors = projectors


@torch.no_grad()
def held_out_loss(unseen, learner):
    """Denoising loss over the held-out chunks with fixed noise and times, comparable between runs of one recipe.

    unseen: (part, function giving x, labels) of this process's chunks.
    """
    job, model = learner.job, learner.networks["model"].eval()
    total = torch.zeros(2, device=job.device)
    for part, x, labels in unseen:
        with job.autocast(), without_projector(model):
            losses = job.method.loss(model, x(), labels, None, job.config, generator=stream("held-out", 0), part=part)
        total += torch.stack([losses["denoise"], torch.ones_like(losses["denoise"])])
    model.train()
    if dist.is_initialized():
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def draw(ema, learner, folder, step, trackers):
    """A grid from the EMA: 8 images of each of the first 10 classes, always from the same noise, in few steps."""
    job, files = learner.job, {"samples": folder / f"step-{step:07d}.png"}
    names, how = job.data.classes[:10], job.method.Sampling()
    quick = dict(sampler="heun", steps=min(25, how.steps), cfg=job.run.sample_cfg)
    how = replace(how, **{k: v for k, v in quick.items() if hasattr(how, k)})
    labels = torch.arange(len(names)).repeat_interleave(8)
    with without_projector(ema):
        x = generate(ema, labels, range(len(labels)), 0, job.method.solve, how)
    latent = learner.decoder(ema)
    save_grid(to_uint8(decode(latent.vae, x, latent.spec) if latent else x), names, files["samples"])
    save_progress(folder, names, 8)
    for name, (images, rows) in learner.pictures().items():
        files[name] = folder / f"{name}-{step:07d}.png"
        save_grid(to_uint8(images), rows, files[name])
    for tracker, name in itertools.product(trackers, files):
        tracker.picture(step, name, files[name])


# ---- The loop ----


def train(job, signals):
    run, out, samples = job.run, Path(job.run.out), Path(job.run.out) / "samples"
    ranks, first = start_ranks(job.device, minutes=30), is_first()
    torch.manual_seed(run.seed)
    indices, chunks = split(len(job.data))
    learner = (job.method.Learner or Learner)(job, ranks, indices)
    networks, model = learner.networks, learner.networks["model"]
    model.load_state_dict(job.initial, strict=False)  # the averages begin there, too
    job.initial.clear()
    averages = {name: copy.deepcopy(model).requires_grad_(False).eval() for name in run.averages}
    optimisers = {}
    for name, net in networks.items():
        params = [p for p in net.parameters() if p.requires_grad]
        optimisers[name] = torch.optim.AdamW(params, run.lr, (0.9, run.beta2), weight_decay=0.0, fused=True)
    stored = dict(model=model, **averages, opt=optimisers["model"], **learner.stored(optimisers))
    start, seconds = 0, 0.0
    if job.checkpoint:
        for name, entry in stored.items():
            entry.load_state_dict(job.checkpoint[name])
        start, seconds = job.checkpoint["step"], job.checkpoint["seconds"]
    compile_blocks(model, run.compile, job.autocast if run.checkpoint_blocks else None)

    unseen = []
    for i, chunk in list(enumerate(chunks))[ranks.rank :: ranks.world]:
        batch, part = to_device(job.device, job.data[chunk]), (i, len(chunks))
        unseen.append((part, learner.held_out(batch.images, batch.moments, part), batch.labels))
    log, trackers = begin_log(job, networks, ranks, start, len(indices)) if first else (None, [])
    done, stop, saved = start, False, True
    meter = Meter(start, seconds, ranks.world, lambda step: names_of(job.data, batch_at(step, indices, run, {})))
    target = Target(job.teacher, len(job.data), 0 if run.flip else run.token_memory * 2**30, ranks, job.device)
    incoming, bar = feed(job, indices, start, ranks), progress(run.steps, start, first)
    for step in range(start, run.steps):
        parts, replaced, broken = fetch(incoming, run.accumulate, signals)
        stop = ranks.any(signals or broken)  # all stop before the same step
        if stop:
            break
        rate, before = learning_rate(run, step), [b.clone() for b in statistics(networks.values())]
        with spared(run.compile):
            terms = learner.gradients(step, [(part, target(batch)) for part, batch in parts])
        norms, skipped = update(networks, optimisers, before, run.clip, rate)
        for name, ema in averages.items():
            average(ema, model, ema_decay(run, step, name))
        meter.add({**terms, **norms}, skipped, replaced)
        bar.update()

        done, last = step + 1, step + 1 == run.steps
        if done % run.log_every == 0 or last:
            row = dict(meter.row(run.batch_size, target.spent()), lr=rate)
            with meter.paused(), spared(run.compile):
                row["held_out"] = held_out_loss(unseen, learner)
                if first:
                    warned(lambda: append(log, row))
                for tracker in trackers:
                    tracker.row(row)
                shown = "loss {loss:.4f} denoise {denoise:.4f} align {align:.4f} held-out {held_out:.4f}"
                shown += " {images_per_s:.0f} img/s, teacher {teacher:.0%}"
                bar.set_postfix_str(shown.format(**row))
        if first:
            with meter.paused(bar):
                if done % run.ckpt_every == 0 or last:
                    saved = save(learner, stored, done, meter)
                drawn = run.sample_every and (done % run.sample_every == 0 or last)
                if drawn:
                    bar.set_description("drawing a grid of samples")
                    signals.until_stopped(warned, lambda: draw(averages["ema"], learner, samples, done, trackers))
                    bar.set_description()
                if (drawn or last) and log.stat().st_size:
                    warned(lambda: plot(out))
    bar.close()
    incoming.close()  # and with it the workers
    if first and stop and done > start and done % run.ckpt_every:
        with meter.paused():
            saved = save(learner, stored, done, meter)
    for tracker in trackers:
        tracker.close()
    ranks.part()
    finish(job, done, stop, saved, broken)


def main(argv=None):
    with mistakes("train.py"):
        job = open_job(argv, __doc__, Learner)
        folder_lock = hold_folder(Path(job.run.out), job.run.resume) if is_first() else nullcontext()
    kinds = BrokenImage, FloatingPointError, Unkept, Untracked
    with folder_lock, noted_signals() as signals, mistakes("train.py", *kinds):
        train(job, signals)


if __name__ == "__main__":
    as_program(main)
