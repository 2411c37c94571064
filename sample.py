"""Sample from a checkpoint, ours or a released one.

    python sample.py --ckpt runs/demo/last.pt --cfg 2                                 a labelled grid of images, PNG
    python sample.py --ckpt last.pt --num 50000 --npz samples.npz                     the set that fid.py scores
    torchrun --nproc_per_node=8 sample.py --ckpt last.pt --num-images 50000 --npz samples.npz

The defaults are the protocol of the reported numbers: EMA weights, SDE Euler-Maruyama with 250 steps, no guidance.
Noise and label of image i depend on (seed, i) alone, so that its pixels are the same for any batch size or number of
processes, to float rounding. A JSON beside the samples records every setting and the checkpoint's hash. A run that was
stopped goes on when it is started again: finished batches lie in NAME.parts until the last one is there (not so with
--out-dir: what is there stays as it is, and another folder starts from the first image).
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import difflib
import itertools
import json
import math
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from inputs.vae import Latents, decode
from irepa import Sampling, guided, randn, sample_ode, sample_sde, solve, stream
from plumbing.checkpoints import export_average, find_vae, load_checkpoint, open_checkpoint
from plumbing.files import free_at, hold_unfinished, mistakes, sha256_of, write_text, write_whole
from plumbing.flags import add_flags, early_parser, make_parser
from plumbing.methods import Method, method_named
from plumbing.processes import compile_blocks, device_name, is_first, pick_device, settle_compile, start_ranks
from plumbing.records import progress, save_grid, to_uint8, versions, write_npz

__all__ = ["guided", "load_checkpoint", "sample_ode", "sample_sde"]  # importable from here, too

PLACES = "ckpt device npz vae vae_weights latent_scale".split()  # may change between starts; hash and latent may not


@dataclass
class Asked:
    """The knobs of this file; the method's sampler adds its own."""

    ckpt: str  # checkpoint: train.py's last.pt, or a released .pt
    ema: bool | int = True  # the moving average of the weights; --ema 2: the second one; --no-ema: the live weights
    released: str | None = None  # whose file --ckpt is, where it does not show: sit (SiT's own) or dit
    num: int | None = None  # number of images; for a grid: 8 of each of the first 10 labels
    npz: str | None = None  # file for arr_0, uint8 [N, H, W, 3], and labels, int64 [N]
    out_dir: str | None = None  # new folder for numbered PNGs
    export: str | None = None  # instead: write the average alone, with its config, to this .safetensors file
    labels: str = "random"  # random, balanced (i modulo classes), or numbers or names to cycle through: 3,7 or cat,dog
    seed: int = 0  # names the sample set; image i depends on (seed, i)
    batch_size: int | None = None  # images at a time on each process; 256 on GPUs, else 64
    vae: str | None = ""  # of latent checkpoints, by default the one it was trained with, or sd-vae-ft-mse
    vae_weights: str | None = None  # 'random', for tests only
    latent_scale: str = ""  # of released checkpoints: vae, its own, or a file with scale and bias of each channel
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: str = "tf32"  # of products: fp32, tf32 (on GPUs, as released) or bf16
    compile: bool | None = None  # torch.compile the blocks; default: on GPUs, and on CPUs from 1,000 steps on


class Opened(NamedTuple):
    """A checkpoint, and how to sample it."""

    model: object
    method: Method
    how: object  # the method's Sampling
    file: dict  # what the checkpoint's file holds
    device: torch.device
    latent: Latents | None = None  # of a model of latents


# ---- Images by their numbers ----


def generate(model, labels, indices, seed=0, solve=solve, how=Sampling()):
    """Images `indices` (ints) of sample set `seed` with labels [n] -> float [n, C, H, W] on the model's device.

    solve is the method's sampler, how its settings. FloatingPointError if an image is not finite.
    """
    config, device = model.config, next(model.parameters()).device
    # one for each image, for its start and then for the SDE's noise; on the CPU: the same numbers on any device
    generators = [stream("image", seed, i) for i in indices]
    noise = randn((len(labels), config.in_channels, config.input_size, config.input_size), generators, device)
    x = solve(model, labels.to(device), noise, generators, how)
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"images {indices[0]} to {indices[-1]} are not finite: the checkpoint has diverged")
    return x


def choose_labels(wanted, indices, num_classes, seed):
    """The label of each image: [n] int64, a function of (wanted, seed, index) and the number of classes."""
    if wanted == "random":
        streams = [stream("label", seed, i) for i in indices]
        return torch.tensor([int(torch.randint(num_classes, (), generator=generator)) for generator in streams])
    if wanted == "balanced":
        return torch.tensor([i % num_classes for i in indices])
    try:
        labels = [int(part) for part in wanted.split(",")]
    except ValueError:
        raise ValueError(f"--labels {wanted}: write random, balanced, or numbers such as 3,7") from None
    if not all(0 <= label <= num_classes for label in labels):
        raise ValueError(f"--labels {wanted}: classes are 0 to {num_classes - 1}, and {num_classes} for none")
    return torch.tensor([labels[i % len(labels)] for i in indices])


def by_number(wanted, classes):
    """--labels with numbers in the place of names of classes. ValueError for a name of none."""
    if wanted in ("random", "balanced"):
        return wanted
    numbers = {name: str(i) for i, name in enumerate(classes) if not name.strip().isdigit()}  # a number is no name
    parts = [wanted] if wanted in numbers else wanted.split(",")
    for part in parts:
        if part not in numbers and not part.strip().isdigit():
            near = ", ".join(difflib.get_close_matches(part, classes, 3) or classes[:3])
            hint = f"random, balanced, numbers such as 3,7, or names{' such as ' if near else ''}{near}"
            raise ValueError(f"--labels {wanted}: {part!r} is no class of this checkpoint; write {hint}")
    return ",".join(numbers.get(part, part) for part in parts)


# ---- What is asked for ----


def read_flags(argv):
    """-> (Asked, Opened), the VAE yet to be found; ValueError for what does not fit."""
    early = early_parser("sample.py", "ckpt")
    add_flags(early, Asked, leave_out=[f.name for f in fields(Asked) if f.name not in ("ema", "released")])
    chosen = early.parse_known_args(argv)[0]
    model, method, file = None, method_named("irepa"), {}
    if chosen.ckpt:
        which = dict(ema=getattr(chosen, "ema", True), released=getattr(chosen, "released", None))
        model, _, method, file = open_checkpoint(chosen.ckpt, **which, projector=None)
    parser = make_parser("sample.py", __doc__, "--ckpt FILE [flags], which --help lists")
    # torchrun takes a bare --num for an abbreviation of an option of its own: hence the longer name
    add_flags(parser, Asked, others=dict(num="num_images"))
    add_flags(parser, method.Sampling, title=f"sampler of --method {method.name}")
    given = vars(parser.parse_args(argv))
    asked = Asked(**{f.name: given.pop(f.name) for f in fields(Asked) if f.name in given})
    how = method.Sampling(**given)
    for name, value in dict(given, batch_size=asked.batch_size, num=asked.num).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} must be finite, and is {value}")
        if name in ("steps", "batch_size", "num") and value is not None and value < 1:
            raise ValueError("--steps, --batch-size and --num must be at least 1")
        if isinstance(value, (list, tuple)) and not value[0] <= value[1]:
            raise ValueError(f"--{name.replace('_', '-')} LO HI has LO <= HI, not {value[0]} {value[1]}")
    if model.config.num_classes == 1 and getattr(how, "cfg", 1) != 1:
        how = replace(how, cfg=1.0)
        if is_first():
            print(f"note: {asked.ckpt} knows one class, so that guidance has nothing to guide: sampled without --cfg")
    if not 0 <= asked.seed < 2**63:
        raise ValueError(f"--seed is 0 or more and below 2^63, not {asked.seed}")
    if asked.precision not in ("fp32", "tf32", "bf16"):
        raise ValueError(f"--precision is fp32, tf32 or bf16, not {asked.precision}")
    if not getattr(how, "cfg", 1) >= 0:
        raise ValueError(f"--cfg must not be negative, and is {how.cfg}: 1 is no guidance, 0 no label")
    if asked.npz and not asked.npz.endswith(".npz"):
        raise ValueError(f"--npz {asked.npz}: the name must end in .npz; --out-dir writes PNGs")
    if sum(bool(out) for out in (asked.npz, asked.out_dir, asked.export)) > 1:
        raise ValueError("--npz, --out-dir or --export: one of them")
    if (asked.npz or asked.out_dir) and not asked.num:
        raise ValueError("say how many images: --num 50000 for a reported FID")
    asked.labels = by_number(asked.labels, file.get("classes") or [])
    choose_labels(asked.labels, [0], model.config.num_classes, asked.seed)
    device = pick_device(asked.device)
    if asked.precision == "tf32" and device.type != "cuda":
        asked.precision = "fp32"  # what these compute in, and what the JSON says
    asked.batch_size = asked.batch_size or (256 if device.type == "cuda" else 64)
    return asked, Opened(model.to(device), method, how, file, device)


def plan_grid(asked, opened):
    """-> (Asked with the labels of a grid, a free name for its file, the names of its rows, one for each label)."""
    classes, names, how = opened.model.config.num_classes, opened.file.get("classes") or [], opened.how
    wanted = asked.labels if asked.labels not in ("random", "balanced") else ",".join(map(str, range(min(10, classes))))
    rows = list(dict.fromkeys(choose_labels(wanted, range(asked.num or 1000), classes, asked.seed).tolist()))
    columns = asked.num // len(rows) if asked.num else 8
    if asked.num and asked.num % len(rows):
        why = f"--num {asked.num} does not fill {len(rows)} rows of a grid, one for each label"
        raise ValueError(f"{why}: take a multiple of {len(rows)}, or fewer --labels")
    if columns * len(rows) > 10_000:
        raise ValueError(f"a grid has 10,000 images at most, not {asked.num:,}: --npz FILE or --out-dir DIR for more")
    labels = ",".join(str(row) for row in rows for _ in range(columns))
    cfg = f"-cfg{how.cfg:g}" if hasattr(how, "cfg") else ""
    kind = getattr(how, "sampler", opened.method.name)
    stem = f"{Path(asked.ckpt).with_suffix('')}-{kind}{how.steps}{cfg}-seed{asked.seed}"
    free = (Path(f"{stem}{n}.png") for n in itertools.chain([""], map("-{}".format, itertools.count(2))))
    target = next(path for path in free if not path.exists())
    shown = [str(names[row]) if row < len(names) else "none" if row == classes else str(row) for row in rows]
    return replace(asked, num=columns * len(rows), labels=labels), target, shown


def refuse_full(asked, opened):
    """ValueError where the pixels that are asked for are more than the disk has room for."""
    size = opened.model.config.input_size * (opened.latent.spec["factor"] if opened.latent else 1)
    out = asked.npz or asked.out_dir or asked.ckpt
    need, free = 3 * size**2 * (asked.num or 0) / 1e9, free_at(out) / 1e9
    if need > free:
        raise ValueError(f"{asked.num} images take {need:.0f} GB, and the disk of {out} has {free:.0f} GB left")


def json_beside(target):
    """The JSON that goes with samples.npz, grid.png or a folder of PNGs."""
    return Path(f"{target.with_suffix('') if target.suffix in ('.npz', '.png') else target}.json")


# ---- Sample ----


def is_whole(chunk, count):
    try:
        return len(np.load(chunk, mmap_mode="r", allow_pickle=False)) == count
    except Exception:  # not there, or cut short by a full or failing disk, where numpy raises anything: made again
        return False


def sample_batches(asked, opened, ranks, target, unfinished):
    """Draw this process's batches, as PNGs into `target` or as chunks into `unfinished` -> the files of all chunks."""
    model, method, how, _, device, latent = opened
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=asked.precision == "bf16")
    batches = [range(i, min(i + asked.batch_size, asked.num)) for i in range(0, asked.num, asked.batch_size)]
    chunks = [unfinished / f"{batch[0]:08d}.npy" for batch in batches]
    mine = list(zip(batches, chunks))[ranks.rank :: ranks.world]
    todo = [(batch, chunk) for batch, chunk in mine if not is_whole(chunk, len(batch))]
    with progress(sum(len(batch) for batch, _ in todo), 0, ranks.rank == 0, "img", "sampling") as bar:

        def count(*_):  # the first images may take minutes
            bar.set_postfix_str(f"{how.steps} steps a batch, evaluation {next(evaluations)} of it", refresh=False)
            bar.update(0)

        model.register_forward_pre_hook(count)
        for indices, chunk in todo:
            evaluations = itertools.count(1)
            labels = choose_labels(asked.labels, indices, model.config.num_classes, asked.seed)
            with autocast:
                x = generate(model, labels, indices, asked.seed, method.solve, how)
            if latent:
                x = decode(latent.vae, x, latent.spec)
            images = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
            if asked.out_dir:
                for i, image in zip(indices, images):
                    Image.fromarray(image).save(target / f"{i:06d}.png")
            else:
                write_whole(chunk, lambda f: np.save(f, images))
            bar.update(len(indices))
    return chunks


def write_samples(asked, opened, target, unfinished, rows, record):
    """The images of this process, batch by batch; the first process then makes one file of them, and the JSON."""
    ranks = start_ranks(opened.device, minutes=24 * 60)  # the first to finish waits for the last
    torch.set_float32_matmul_precision("high" if asked.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = asked.precision == "tf32"
    compile_blocks(opened.model, asked.compile)
    if asked.out_dir and is_first():
        target.mkdir(parents=True, exist_ok=True)
    ranks.meet()  # the folder is there
    chunks = sample_batches(asked, opened, ranks, target, unfinished)
    ranks.meet()
    if is_first():
        labels = choose_labels(asked.labels, range(asked.num), opened.model.config.num_classes, asked.seed)
        if asked.npz:
            whole = unfinished / "whole.npz"
            write_npz(whole, chunks, (asked.num, *np.load(chunks[0]).shape[1:]), labels.numpy())
        elif not asked.out_dir:
            whole, pixels = unfinished / "whole.png", np.concatenate([np.load(chunk) for chunk in chunks])
            save_grid(torch.from_numpy(pixels).permute(0, 3, 1, 2), rows, whole, [*dict.fromkeys(labels.tolist())])
        record.update(processes=ranks.world, device=device_name(opened.device))
        record["labels_of_images"] = labels.tolist() if asked.out_dir else None
        write_text(json_beside(target), json.dumps({**record, **versions()}, indent=1) + "\n")
        if not asked.out_dir:  # last, so that what bears the name is complete
            os.replace(whole, target)
            shutil.rmtree(unfinished)
        print(f"{asked.num} images in {target}, every setting in {json_beside(target)}")
    ranks.part()


def main(argv=None):
    with mistakes("sample.py"):
        asked, opened = read_flags(argv)
        if asked.export:
            export_average(asked.ckpt, opened.file, asked.ema, asked.released, asked.export)
            which = "average" if asked.ema else "live weights"
            print(f"{asked.export}: the {which} of {asked.ckpt}; --ckpt and --init take it")
            return
        steps = opened.how.steps * (asked.num or 80) // asked.batch_size
        asked.compile = settle_compile(asked.compile, opened.device, steps)
        opened = opened._replace(latent=find_vae(asked, opened))
        target, rows = Path(asked.npz or asked.out_dir or ""), None
        refuse_full(asked, opened)
        if not (asked.npz or asked.out_dir):
            asked, target, rows = plan_grid(asked, opened)
        unfinished = Path(f"{target}.parts")
        # a run killed at its very end may have left the JSON, and comes for the rest
        for out in (target, *([] if unfinished.exists() else [json_beside(target)])):
            if out.exists():
                raise ValueError(f"{out} exists and is left as it is; choose another name")
        record = {**asdict(asked), **asdict(opened.how), "config": asdict(opened.model.config)}
        record.update(step=opened.file.get("step", opened.file.get("steps")), checkpoint_sha256=sha256_of(asked.ckpt))
        record.update(latent=opened.latent and opened.latent.spec)
        looks = is_first() and not asked.out_dir  # one process: another may already have begun to write
        folder_lock = hold_unfinished(unfinished, record, leave_out=PLACES) if looks else nullcontext()
    with folder_lock, mistakes("sample.py", FloatingPointError, OSError):
        try:
            write_samples(asked, opened, target, unfinished, rows, record)
        except KeyboardInterrupt:
            if is_first():
                goes_on = "" if asked.out_dir else ", and the same command goes on from it"
                print(f"\nstopped: what is finished is kept in {target if asked.out_dir else unfinished}{goes_on}")
            raise


if __name__ == "__main__":
    as_program(main)
