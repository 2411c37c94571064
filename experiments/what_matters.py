"""Is it a teacher's accuracy that helps, or its spatial structure? Many teachers, the same short runs with each.

    python -m experiments.what_matters --data cifar10_train.zip
    python -m experiments.what_matters --data cifar10_train.zip --teachers hog efficientnet_lite0@2+0.3 --seeds 0
    python -m experiments.what_matters --budget paper --processes 8 --data data/imagenet/train --inception FILE \\
        --reference VIRTUAL_imagenet256_labeled.npz --teachers dinov2_vitb14 mae_vitl16 -- \\
        --latents data/imagenet/latents-256

A teacher is written NAME, any of inputs/teachers.py or `pixels`, the patches themselves; NAME=STEPS is a network of
timm that learns to classify --data here, in so many steps, 0 for random weights; +A behind it is --cls-weight A.

For each teacher its tokens are written once to OUT/tokens. On the same images they give the accuracy of a linear probe
and LDS, CDS and RMSC (spatial_structure.py); then REPA and iREPA are trained from them, from the same weights, batches
and noise for all teachers, and the Frechet distance of their samples is taken as in convergence.py. OUT holds
results.json, table.md and what_matters.png. Who was stopped goes on; teachers and seeds can be added, and what is in
results.json is not made again.
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch.nn as nn
from tqdm import tqdm

from experiments import convergence
from experiments.convergence import leg, measure, open_comparison
from experiments.learned import learn_teacher, learns, parts_of
from experiments.linear_probe import check_labels, draw_patches, probe
from experiments.spatial_structure import mean_and_error
from experiments.spatial_structure import measure as structure_of
from experiments.token_sources import pixels
from experiments.what_matters_report import ARMS, known, report
from inputs.teachers import find_encoder, load_encoder
from inputs.tokens import Tokens, folder_of, write_tokens
from plumbing.files import lock, mistakes
from plumbing.flags import make_parser
from plumbing.processes import Ranks, pick_device
from plumbing.records import rows_of

PROGRAM = "experiments.what_matters"
TEACHERS = (
    "hog sift pixels timm:vit_tiny_patch16_224=0 timm:test_vit2=400 timm:test_vit2=3000 efficientnet_lite0@1"
    " efficientnet_lite0@2 efficientnet_lite0@3 efficientnet_lite0@4 efficientnet_lite2@1 efficientnet_lite2@3"
    " efficientnet_lite0@3+0.1 efficientnet_lite0@3+0.3 efficientnet_lite0@3+0.5"
).split()


# ---- Teachers ----


class Teacher(NamedTuple):
    title: str
    name: str
    steps: int | None  # of learning it here
    cls_weight: float


def parse(title):
    """NAME[=STEPS][+A] -> Teacher. ValueError where it is none."""
    name, plus, weight = title.partition("+")
    name, learned, steps = name.partition("=")
    try:
        teacher = Teacher(title, name, int(steps) if learned else None, float(weight) if plus else 0.0)
    except ValueError as e:
        raise ValueError(f"--teachers {title}: write NAME, NAME=STEPS, NAME+A or NAME=STEPS+A") from e
    if learned and (not learns(name) or 0 < teacher.steps < 10 or teacher.steps < 0):
        raise ValueError(f"--teachers {title}: only a ViT, timm:<id>, learns, in 10 steps at least; 0: random weights")
    if name == "pixels":
        if weight:
            raise ValueError(f"--teachers {title}: pixels have no class token")
    else:
        find_encoder(name, None if not learned else "random", teacher.cls_weight)
    return teacher


class Pixels(nn.Module):
    """The patches themselves as tokens."""

    cls_weight = 0.0

    def __init__(self, grid, size):
        super().__init__()
        self.grid, self.dim = grid, 3 * (size // grid) ** 2

    def forward(self, images):
        return pixels(images, self.grid)  # (B, T, D)


def cache_of(teacher, args, data, device):
    """-> (the folder of the teacher's tokens of all images, its Tokens), written where they are not there."""
    folder = folder_of(Path(args.out) / "tokens", teacher.title)
    if teacher.name == "pixels":
        made = Pixels(args.grid, data.size).to(device)
    else:
        weights = None if teacher.steps is None else "random"
        if teacher.steps:
            weights = folder_of(folder.parent, f"{teacher.name}={teacher.steps}.pt")
            learn_teacher(teacher.name, weights, data, teacher.steps, args.grid, device)
        made = load_encoder(teacher.name, args.grid, weights, device, teacher.cls_weight)
    write_tokens(data, made, teacher.name, folder, device, Ranks(), teacher.steps == 0)
    return folder, Tokens(folder, teacher.name, args.grid, teacher.cls_weight)


def look(tokens, data, places, device):
    """{metric: [mean, standard error]} of the tokens of the images at `places`."""
    patches = draw_patches(len(places), tokens.grid**2)
    values, kept, _ = structure_of("structure", lambda i: tokens[i].to(device), places, None, patches, device)
    values.update(probe(*kept, data.labels[places]))
    return {name: [*mean_and_error(v).values()] for name, v in values.items()}


# ---- Runs ----


def runs_of(args):
    """[(teacher or None, arm, seed)], a seed after the other, SiT without a teacher first."""
    aligned = [(teacher, arm) for teacher in args.teachers for arm in ARMS]
    return [(teacher, arm, seed) for seed in args.seeds for teacher, arm in [(None, "sit"), *aligned]]


def flags_of(teacher):
    return ["--encoder", teacher.name, "--cls-weight", str(teacher.cls_weight)]


def distance_of(args, teacher, arm, seed, folder_of_tokens, distances):
    """Train a run to its last step and measure it, or read what was measured -> {distance: value}."""
    folder = folder_of(Path(args.out) / "runs", f"{teacher.title if teacher else 'none'}-{arm}-seed{seed}")
    folder.parent.mkdir(exist_ok=True)
    if not (found := rows_of(folder / "distance.jsonl")):
        flags, place = list(args.flags), list(args.place)
        if teacher is not None:
            flags += flags_of(teacher)
            place += ["--tokens", str(folder_of_tokens)]
        asked = SimpleNamespace(**{**vars(args), "flags": flags, "place": place})
        leg(asked, folder, arm, seed, args.steps)
        measure(asked, folder, args.steps, distances)
        found = rows_of(folder / "distance.jsonl")
        for file in [*folder.glob("*.pt"), *folder.glob("samples-*")]:  # of 60 runs they would take gigabytes
            file.unlink()
    return {key: value for key, value in found[-1].items() if key != "step"}


# ---- Command line ----


def build_parser():
    parser = make_parser(PROGRAM, __doc__, "[flags] [-- flags of train.py]")
    add = parser.add_argument
    add("--data", metavar="PATH", required=True, help="class folders, or a .zip of them")
    add("--teachers", nargs="+", default=TEACHERS, metavar="NAME[=STEPS][+A]")
    add("--out", default="runs/what-matters", metavar="DIR")
    add("--looked-at", type=int, default=2000, metavar="N", help="images whose tokens are measured and classified")
    convergence.add_common(add, "short")
    return parser


def prepare(argv):
    """argv -> (args with what the budget says, train.py's Run). ValueError where flags do not fit."""
    args, extra = convergence.parse(build_parser(), argv)
    args.teachers = [parse(title) for title in dict.fromkeys(args.teachers)]
    flags = ["--steps", "100000"] if args.budget == "paper" else []  # as in the paper's figure
    arms = [["--method", "sit"], *([*flags_of(teacher), "--tokens", "none yet"] for teacher in args.teachers)]
    run, config = convergence.settle(args, extra, own=["cls-weight"], flags=flags, arms=arms)
    args.steps, args.grid = run.steps, config.input_size // config.patch_size
    if args.looked_at < 50 or args.grid < 5:
        raise ValueError("--looked-at is at least 50, and the structure of tokens needs a grid of 5 x 5")
    return args, run


def looked_at(args, data):
    """The places of images that neither a learned teacher nor the held-out loss has seen. ValueError for too few."""
    unseen = parts_of(data)[1]
    places = np.sort(unseen[: args.looked_at])  # as many as there are
    check_labels(data.labels[places], data.classes)
    return places


def main(argv=None):
    with mistakes(PROGRAM):
        args, run = prepare(sys.argv[1:] if argv is None else argv)
        data, distances, facts = open_comparison(args, run, lambda data, _: dict(looked_at=len(looked_at(args, data))))
        device, out, places = pick_device(args.device), Path(args.out), looked_at(args, data)
        teachers, folders = known(out)[0], {None: None}
        for teacher in tqdm(args.teachers, "teachers"):
            with lock(out, wait=True):  # another process may be at other seeds
                folders[teacher], tokens = cache_of(teacher, args, data, device)
            if teacher.title not in teachers:
                teachers[teacher.title] = look(tokens, data, places, device)
    with tqdm(runs_of(args), "runs", unit="run") as bar:
        for teacher, arm, seed in bar:
            title = teacher.title if teacher else None
            bar.set_description(f"{title}, {arm}, seed {seed}")
            if (title, arm, seed) not in known(out)[1]:
                found = distance_of(args, teacher, arm, seed, folders[teacher], distances)
                report(args, teachers, [dict(teacher=title, arm=arm, seed=seed, distance=found)], facts)
    print(f"{report(args, teachers, [], facts)}\n{out}: results.json, table.md, what_matters.png")


if __name__ == "__main__":
    as_program(main)
