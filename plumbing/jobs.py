"""What a run is made of, opened and checked before anything slow: settings, device, VAE, data, teacher, network."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from inputs.images import ImageSet
from inputs.latents import open_vae
from inputs.prepared import Labels, open_latents
from inputs.shapes import Shapes
from inputs.teachers import load_encoder
from inputs.vae import FITS, SCALE, VAES, Latents, read_stats, same_spec
from plumbing.checkpoints import refuse_used, same_run
from plumbing.methods import Method
from plumbing.processes import device_name, fast_bf16, is_first, mixed, pick_device
from plumbing.records import open_log, versions
from plumbing.settings import Run, network_config, resolve


class Job(NamedTuple):
    run: Run  # the flags
    method: Method
    config: object  # the method's Config
    data: object  # the images: ImageSet or Shapes, these with latents, or Labels with latents
    teacher: object  # of load_encoder, or None
    latent: Latents | None  # None of a run on pixels
    device: torch.device
    checkpoint: dict | None  # to go on from

    @property
    def bf16(self):
        return fast_bf16(self.device) if self.run.precision == "auto" else self.run.precision == "bf16"

    def autocast(self):
        return mixed(self.device, self.bf16)


def open_job(argv, description):
    """Flags -> Job. ValueError or OSError in a sentence where something is wrong or does not fit."""
    run, method, checkpoint = resolve(argv, description)
    if is_first() and not run.resume:
        refuse_used(Path(run.out))
    if not (run.demo or Path(run.data).exists()):
        raise FileNotFoundError(f"--data {run.data} does not exist: name a folder of class folders, or a .zip of one")
    if run.vae is None or run.vae in VAES:
        network_config(run, method)  # what does not fit together is said before anything slow
    device = pick_device(run.device)
    latent = open_vae(run, device)
    spec = latent.spec if latent else None
    shape = network_config(run, method, spec)
    size = run.image_size
    if run.demo:
        data = Shapes(size, 10_000)
    elif Labels.takes(run.data):
        if not run.latents:
            raise ValueError(f"{run.data} holds labels alone, which go with --latents")
        if shape.projector:
            raise ValueError(f"{run.data} holds labels alone, and the teacher looks at images: --method sit has none")
        data = Labels(run.data)
    else:
        data = ImageSet(run.data, size, run.skip_broken, is_first())
    said = []
    if run.latents:
        data = open_latents(run.latents, data, spec, size, images=shape.projector is not None)
        if data.spec:
            same_spec(spec, data.spec, run.latents, FITS)
        else:
            said.append(f"{run.latents} does not say of which VAE its latents are: --vae {run.vae} is taken")
    if latent and not method.stored_vae:  # such a method scales its latents itself
        said.append(scale_latents(run, spec, data, checkpoint))
    teacher = None
    if shape.projector:
        teacher = load_encoder(run.encoder, shape.input_size // shape.patch_size, run.encoder_weights, device)
        teacher(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))  # which it may find too small
    config = network_config(run, method, spec, len(data.classes), teacher.dim if teacher else 1)
    if checkpoint:
        same_run(run, config, data, spec, checkpoint)
    if is_first():
        for sentence in said:
            print(sentence)
        broken = getattr(data, "broken", [])
        for n, what in enumerate(broken, start=1):
            print(f"left out, {n} of {len(broken)}: {what}")
        if teacher and run.encoder_weights == "random":
            print("warning: the teacher's weights are random; this is for tests only")
    return Job(run, method, config, data, teacher, latent, device, checkpoint)


def scale_latents(run, spec, data, checkpoint):
    """Give the spec of the latents the scale and bias that --latent-scale asks for -> what that means, in a sentence.

    A run that goes on keeps those of its checkpoint. ValueError where they cannot be had.
    """
    asked, how = run.latent_scale, "as at the start"
    if checkpoint and checkpoint["latent"] and asked == checkpoint["settings"]["latent_scale"]:
        spec.update({key: checkpoint["latent"][key] for key in SCALE})
    elif asked == "set":
        mean, std, how = data.statistics()
        if not std.all():
            raise ValueError(f"{run.latents}: channel {std.argmin()} of the latents never changes; --latent-scale vae")
        spec.update(scale=(1 / std).tolist(), bias=mean.tolist())
    elif asked != "vae":
        spec.update(zip(SCALE, read_stats(asked, spec["channels"])))
    numbers = ", ".join(f"{key} {' '.join(f'{v:.5g}' for v in dict.fromkeys(spec[key]))}" for key in SCALE)
    if asked == "set":
        return (
            f"latents: mean 0 and variance 1 in each channel, {how}, as in the iREPA release ({numbers}); losses do not"
            " compare with those at the VAE's own scale, which SiT and REPA have (--latent-scale vae)"
        )
    if asked == "vae":
        way = "" if run.latents else ", which takes a cache: python -m inputs.latents, then --latents"
        return (
            f"latents: the VAE's own scale, as in SiT and REPA ({numbers}); losses do not compare with those of the"
            f" iREPA release, where each channel has mean 0 and variance 1 (--latent-scale set{way})"
        )
    return f"latents: as {asked} scales each channel ({numbers}); losses compare only where these numbers are the same"


def begin_log(job, networks, ranks, start, training):
    """Write the settings, say what begins -> the path of the log."""
    run, was = job.run, job.checkpoint
    record = dict(run.record(), **versions(), config=asdict(job.config), classes=job.data.classes)
    record.update(hardware=device_name(job.device), world_size=ranks.world, bf16=job.bf16, images=len(job.data))
    for name, net in networks.items():
        count = sum(p.numel() for p in net.parameters() if p.requires_grad)
        record["parameters" if name == "model" else f"parameters_{name}"] = count
    log = open_log(Path(run.out), record, start if was else None)
    if was and (was.get("processes", 1), was["settings"]["accumulate"]) != (ranks.world, run.accumulate):
        print(
            f"resumed on {ranks.world} processes x {run.accumulate} parts, saved on {was.get('processes', 1)} x"
            f" {was['settings']['accumulate']}: the same batches and noise, equal to float rounding"
        )
    sizes = ", ".join(f"{v / 1e6:.1f}M {k.replace('_', ' of ')}" for k, v in record.items() if "parameters" in k)
    classes = f"{training} images in {len(job.data.classes)} classes"
    print(f"{run.method} on {job.device}: {sizes}, {classes}, step {start} of {run.steps}")
    return log


def names_of(data, indices):
    return [data.files[i] if hasattr(data, "files") else f"image {i}" for i in indices]
