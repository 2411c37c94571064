"""What a run is made of, opened and checked before anything slow: settings, device, VAE, data, teacher, network."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from inputs.formats import Folder
from inputs.latents import VAES, Cached, Latents, open_vae, same_spec
from inputs.shapes import Shapes
from inputs.teachers import load_encoder
from plumbing.checkpoints import initial_weights, refuse_used, same_run
from plumbing.methods import Method
from plumbing.processes import device_name, fast_bf16, is_first, mixed, pick_device
from plumbing.records import open_log, versions
from plumbing.settings import Run, network_config, resolve


class Job(NamedTuple):
    run: Run  # the flags
    method: Method
    config: object  # the method's Config
    data: object  # the images: Folder, Cached or Shapes
    teacher: object  # of load_encoder, or None
    latent: Latents | None  # None of a run on pixels
    device: torch.device
    checkpoint: dict | None  # to go on from
    initial: dict  # tensors of the network that a new run starts from; the others are drawn

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
    data = Shapes(run.image_size, 10_000) if run.demo else Folder(run.data, run.image_size, run.skip_broken, is_first())
    if run.latents:
        data = Cached(data, run.latents, images=shape.projector is not None)
        same_spec(spec, data.spec, run.latents)
    teacher = None
    if shape.projector:
        teacher = load_encoder(run.encoder, shape.input_size // shape.patch_size, run.encoder_weights, device)
        side = run.image_size  # which the teacher may find too small
        teacher(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    config = network_config(run, method, spec, len(data.classes), teacher.dim if teacher else 1)
    if len(data.classes) == 1 and run.sample_cfg != 1:
        run.sample_cfg = 1.0
        if is_first():
            print("note: there is one class, so that guidance has nothing to guide: samples without --sample-cfg")
    initial = {}
    if checkpoint:
        same_run(run, config, data, spec, checkpoint)
    elif run.init:
        initial, latent = start_from(run, method, config, data, latent, device)
    if is_first():
        broken = getattr(data, "broken", [])
        for n, what in enumerate(broken, start=1):
            print(f"left out, {n} of {len(broken)}: {what}")
        if teacher and run.encoder_weights == "random":
            print("warning: the teacher's weights are random; this is for tests only")
    return Job(run, method, config, data, teacher, latent, device, checkpoint, initial)


def start_from(run, method, config, data, latent, device):
    """What --init gives -> (tensors of the network, the Latents: of a method that trains its VAE, the file's)."""
    initial, anew, model, file = initial_weights(run.init, run.released, method, config)
    said = f"starts from the weights of {run.init}, step {file.get('step', file.get('steps', 'unknown'))}"
    said += f"; anew: {', '.join(anew)}" if anew else ""
    if "the label table" not in anew and file.get("classes", data.classes) != data.classes:
        said += "; the label table is kept, though the classes are named otherwise"
    was = file.get("latent")
    if method.stored_vae:
        latent = latent._replace(vae=method.stored_vae(file, model, device, latent).vae)
    elif was and any(was[key] != latent.spec[key] for key in ("sha256", "scale", "bias")):
        said += "; its latents were of another VAE or scale"
    if is_first():
        print(said)
    return initial, latent


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
