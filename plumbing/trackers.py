"""What log.jsonl has, and the grids, also in TensorBoard and Weights & Biases, by their own packages."""

import uuid
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image

from plumbing.files import one_line, write_text


class Tracker(NamedTuple):
    row: Callable  # row(a row of the log)
    picture: Callable  # picture(step, name, file)
    close: Callable


class Untracked(ValueError):
    """A tracker that is asked for cannot begin."""


def check_trackers(run):
    """ValueError, before anything slow, where a package is absent."""
    for package in ("wandb", "tensorboard"):
        try:
            if getattr(run, package):
                __import__(package)
        except ImportError as e:
            raise ValueError(f"--{package} takes a package that is not here: pip install {package} ({e})") from e


def open_trackers(run, record, start):
    """-> the Trackers that the flags ask for, in the run's folder; a run that goes on goes on in them, too."""
    asked = [open_tensorboard] * run.tensorboard + [open_wandb] * bool(run.wandb)
    return [tracker(run, record, start) for tracker in asked]


def open_tensorboard(run, record, start):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(f"{run.out}/tensorboard", purge_step=start + 1)  # later ones come again

    def row(values):
        for name in values.keys() - {"step"}:
            writer.add_scalar(name, values[name], values["step"])
        writer.flush()

    def picture(step, name, file):
        writer.add_image(name, np.asarray(Image.open(file)), step, dataformats="HWC")

    return Tracker(row, picture, writer.close)


def open_wandb(run, record, start):
    import wandb

    file = Path(run.out, "wandb-id.txt")
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:12])
    try:
        where = dict(project=run.wandb, name=Path(run.out).name, id=file.read_text(), dir=run.out)
        tracked = wandb.init(**where, resume="allow", config=record)
    except Exception as e:  # of logging in, of the network and of its service
        more = "WANDB_MODE=offline keeps it here"
        raise Untracked(f"--wandb {run.wandb} cannot begin: {one_line(e, 300)}; {more}") from e
    tracked.define_metric("*", step_metric="step")  # after a crash some come again, which wandb's own count forbids

    def picture(step, name, file):
        tracked.log({name: wandb.Image(str(file)), "step": step})

    return Tracker(tracked.log, picture, tracked.finish)
