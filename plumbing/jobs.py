"""What a run is made of, opened and checked before anything slow: settings, device, VAE, data, teacher, network."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from inputs.images import DATA, BrokenImage, ImageSet
from inputs.latents import manifest_of, open_vae
from inputs.prepared import Labels, open_latents
from inputs.shapes import Shapes
from inputs.shards import Recorded, labels_of
from inputs.teachers import find_encoder, load_encoder
from inputs.tokens import Taught, Tokens
from inputs.vae import FITS, SCALE, VAES, Latents, read_stats, same_spec
from irepa import draws, stream
from plumbing.checkpoints import initial_weights, refuse_used, same_run, same_settings, save_checkpoint
from plumbing.files import one_line, shown
from plumbing.methods import OWN, Method
from plumbing.plan import plan
from plumbing.processes import STOPPED, device_name, fast_bf16, is_first, mixed, pick_device, settle_compile
from plumbing.records import open_log, versions, warned
from plumbing.settings import Run, network_config, resolve
from plumbing.trackers import check_trackers, open_trackers


class Job(NamedTuple):
    run: Run  # the flags
    method: Method
    config: object  # the method's Config
    data: object  # images, or labels alone, with what caches have of each
    teacher: object  # of load_encoder, or None: there is none, or the data have its tokens
    latent: Latents | None  # None of a run on pixels
    device: torch.device
    checkpoint: dict | None  # to go on from
    initial: dict  # tensors of the network that a new run starts from; the others are drawn

    @property
    def bf16(self):
        return fast_bf16(self.device) if self.run.precision == "auto" else self.run.precision == "bf16"

    def autocast(self):
        return mixed(self.device, self.bf16)

    def flipped(self, images, step, part):
        """With --flip, each of these images of a step, [B, 3, H, W], mirrored by chance: what teacher and network see.

        part: as in draws(), so that the processes and parts of a batch see the flips of the whole.
        """
        if not self.run.flip:
            return images
        chance = draws(images, stream("flips", self.run.seed, step, self.device), part)(torch.rand)
        return torch.where((chance < 0.5).view(-1, 1, 1, 1), images.flip(3), images)


def open_job(argv, description, Learner):
    """Flags -> Job. ValueError or OSError in a sentence where something is wrong or does not fit.

    Learner: of methods that bring none. With --plan the answer is printed, and SystemExit raised.
    """
    run, method, checkpoint = resolve(argv, description)
    if run.plan is not False:
        raise SystemExit(print(plan(run, method, method.Learner or Learner)) if is_first() else None)
    if is_first() and not run.resume:
        refuse_used(Path(run.out))
    if run.vae is None or run.vae in VAES:
        network_config(run, method)  # what does not fit together is said before anything slow
    if method.Config.named(run.model, **run.network).projector and not run.tokens:
        find_encoder(run.encoder, run.encoder_weights, run.cls_weight)
    if checkpoint:
        same_settings(run, checkpoint)
    if run.data is None and not (run.demo or run.tokens or run.latents or Path(DATA).exists()):
        raise FileNotFoundError(f"{DATA} does not exist: name your images with --data, or try --demo, which needs none")
    check_trackers(run)
    device = pick_device(run.device)
    run.compile = settle_compile(run.compile, device, run.steps)
    latent = open_vae(run, device)
    spec = latent.spec if latent else None
    shape = network_config(run, method, spec)
    size, grid = run.image_size, shape.input_size // shape.patch_size
    tokens = Tokens(run.tokens, run.encoder, grid, run.cls_weight) if run.tokens and shape.projector else None
    data = images = open_images(run, tokens, bool(shape.projector))
    drawn, said = run.demo and not run.data, []
    if is_first() and not drawn:
        print(images)
    if run.latents:
        data = open_latents(run.latents, data, spec, size, images=shape.projector and not tokens)
        if data.spec:
            same_spec(spec, data.spec, run.latents, FITS)
        else:
            said.append(f"{run.latents} does not say of which VAE its latents are: --vae {run.vae} is taken")
    if latent and not method.stored_vae:  # such a method scales its latents itself
        said.append(scale_latents(run, spec, data, checkpoint))
    teacher = None
    if tokens:
        labels_of(tokens.path, tokens.manifest, images)
        data = Taught(data, tokens)
    elif shape.projector:
        teacher = load_encoder(run.encoder, grid, run.encoder_weights, device, run.cls_weight)
        teacher(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))  # which it may find too small
    config = network_config(run, method, spec, len(data.classes), (tokens or teacher).dim if shape.projector else 1)
    if len(data.classes) == 1 and run.sample_cfg != 1:
        run.sample_cfg = 1.0
        if is_first():
            print("note: there is one class, so that guidance has nothing to guide: the grids are without --sample-cfg")
    initial = {}
    if checkpoint:
        same_run(run, config, data, spec, checkpoint)
    elif run.init:
        initial, latent = start_from(run, method, config, data, latent, device)
    if hasattr(images, "decode_all"):  # last, as it takes minutes
        images.decode_all(is_first())
    if is_first():
        for sentence in said:
            print(sentence)
        for broken in [] if drawn else images.broken:
            print(f"another image stands in: {broken}")
        if run.tokens and not shape.projector:
            print(f"note: --method {run.method} has no teacher, so that --tokens is not read")
        if run.encoder_weights == "random" if teacher else tokens and tokens.random:
            print("warning: the teacher's weights are random; this is for tests only")
    return Job(run, method, config, data, teacher, latent, device, checkpoint, initial)


def open_images(run, tokens, aligned):
    """The images or labels of --data; where nobody opens an image and --data is left out, what a cache has of them."""
    if run.demo and not run.data:
        return Shapes(run.image_size, 10_000)
    needed = not run.latents or (aligned and not tokens)
    if run.data is None and not needed:
        if tokens:
            return tokens.images
        if (Path(run.latents) / "manifest.json").exists():
            return Recorded(run.latents, manifest_of(run.latents))
    if run.data is None and not Path(DATA).exists():
        whose = " and ".join(filter(None, (run.latents, run.tokens)))
        raise FileNotFoundError(f"{DATA} does not exist: name with --data the images or labels that go with {whose}")
    run.data = run.data or DATA
    if not Labels.takes(run.data):
        return ImageSet(run.data, run.image_size, run.skip_broken, needed=needed, later=True)
    if not run.latents:
        raise ValueError(f"{run.data} holds labels alone, which go with --latents")
    if needed:
        raise ValueError(
            f"{run.data} holds labels alone, and the teacher looks at images: --method sit has none, --tokens has its"
        )
    return Labels(run.data)


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
    """Write the settings, say what begins -> the path of the log, and the Trackers."""
    run, was = job.run, job.checkpoint
    record = dict(run.record(), **versions(), config=asdict(job.config), classes=job.data.classes)
    record.update(weights_sha256=getattr(job.data, "weights_sha256", None))  # of the teacher of a cache
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
    before = {k: v for k, v in was["settings"].items() if k not in ("out", "resume")} if was else {}
    changed = [f"{k} {before[k]} -> {v}" for k, v in run.record().items() if before.get(k, v) != v]
    if changed:
        print(f"changed for the steps to come: {', '.join(changed)}")
    if run.batch_size > training:
        print(f"note: a batch of {run.batch_size} has each of the {training} images more than once (--batch-size)")
    sizes = ", ".join(f"{v / 1e6:.1f}M {k.replace('_', ' of ')}" for k, v in record.items() if "parameters" in k)
    many = len(job.data.classes)
    classes = f"{training} images in {many} class{'es' if many > 1 else ''} to train on"
    held = f"{len(job.data) - training} held out"
    how = ", compiled, which the first steps wait for" if run.compile else ""
    if run.method not in OWN:
        print(f"variants/{run.method}.py gives {', '.join(job.method.own) or 'settings'}; all else is irepa.py's")
    print(f"{run.method} on {job.device}{how}: {sizes}, {classes}, {held}, step {start} of {run.steps}")
    return log, open_trackers(run, record, start)


def names_of(data, indices):
    return [shown(data.files[i]) if hasattr(data, "files") else f"image {i}" for i in indices]


def save(learner, stored, done, meter):
    """Write the checkpoint of step `done` -> whether the disk took it. stored: {entry: network or optimiser}."""
    job, run = learner.job, learner.job.run
    state = {name: entry.state_dict() for name, entry in stored.items()}
    state.update(learner.facts(), config=asdict(job.config), settings=run.record(), step=done, seconds=meter.seconds)
    state.update(classes=job.data.classes, images=len(job.data), processes=meter.world)
    state.update(weights_sha256=getattr(job.data, "weights_sha256", None))
    return warned(lambda: save_checkpoint(Path(run.out), state, run.keep))


def finish(job, done, stop, saved, broken):
    """Say how it ended and what comes next. SystemExit where it is not the end; BrokenImage where one ended it."""
    run, out, latent = job.run, job.run.out, job.latent
    if not saved:
        raise SystemExit(f"train.py: step {done} could not be saved; {out}/last.pt, if there, is of an earlier step")
    kept = f"step {done} is saved in {out}/last.pt" if done else "no step was made"
    if broken:
        raise BrokenImage(f"{one_line(broken)}; {kept}: --resume --out {out} goes on")
    if stop:
        if is_first():
            print(f"stopped: {kept}; --resume --out {out} goes on")
        raise SystemExit(STOPPED)
    if is_first():
        flags = " --seed 1" + (f" --cfg {run.sample_cfg:g}" if run.sample_cfg != 1 else "")
        if getattr(job.method.Sampling(), "sampler", "") == "sde":  # whose 250 steps are for reported numbers
            flags += " --sampler heun --steps 25"
        if latent and not job.method.stored_vae:
            flags += f" --vae {run.vae}" if latent.spec["vae"] == "local" else ""
            flags += f" --vae-weights {run.vae_weights}" if run.vae_weights else ""
        drawn = any((Path(out) / "samples").glob("step-*.png"))  # a signal leaves a grid out
        look = f"{out}/samples and {out}/curves.png show" if drawn else f"{out}/curves.png shows"
        print(f"{look} the run; next: python sample.py --ckpt {out}/last.pt{flags}")
