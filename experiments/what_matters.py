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
results.json, table.md and what_matters.png. Who was stopped goes on; teachers and seeds can be added.
"""

import functools
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.convergence import BUDGETS, leg, measure, meters
from experiments.convergence_report import by_seed, interval, with_interval
from experiments.learned import learn_teacher, parts_of
from experiments.linear_probe import draw_patches, probe
from experiments.spatial_correlations import LABELS, correlate
from experiments.spatial_structure import measure as structure_of
from inputs.images import ImageSet
from inputs.teachers import find_encoder, load_encoder
from inputs.tokens import Tokens, write_tokens
from plumbing import jobs
from plumbing.files import mistakes, write_text
from plumbing.flags import make_parser
from plumbing.processes import fast_bf16, pick_device, start_ranks
from plumbing.records import rows_of, versions
from plumbing.settings import network_config, resolve

PROGRAM = "experiments.what_matters"
TEACHERS = (
    "hog sift pixels timm:vit_tiny_patch16_224=0 timm:test_vit2=400 timm:test_vit2=3000 efficientnet_lite0@1"
    " efficientnet_lite0@2 efficientnet_lite0@3 efficientnet_lite0@4 efficientnet_lite2@1 efficientnet_lite2@3"
    " efficientnet_lite0@3+0.1 efficientnet_lite0@3+0.3 efficientnet_lite0@3+0.5"
).split()
SHORT = dict(
    flags="--image-size 32 --model SiT-S/4 --hidden-size 128 --depth 4 --num-heads 2 --encoder-depth 2"
    " --projector-dim 512 --batch-size 64 --steps 1000 --lr 2e-3 --warmup 100 --ema 0.99 --ema-warmup --log-every 100",
    images=2000, sampling="--labels balanced --sampler heun --steps 10 --batch-size 250", learn=7000,
)  # fmt: skip
ARMS = ["repa", "irepa"]


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
    if learned and (not name.startswith("timm:") or 0 < teacher.steps < 10 or teacher.steps < 0):
        raise ValueError(
            f"--teachers {title}: only timm:<id> learns here, in 10 steps at least, or 0 for random weights"
        )
    if name == "pixels":
        if weight:
            raise ValueError(f"--teachers {title}: pixels have no class token")
    else:
        find_encoder(name, None if not learned else "random", teacher.cls_weight)
    return teacher


class Pixels(nn.Module):
    """The patches themselves, in [-1, 1], those of more than 4 x 4 pixels averaged to as many."""

    dim, cls_weight = 48, 0.0

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def forward(self, images):
        x = F.interpolate(images.float() / 127.5 - 1, (4 * self.grid,) * 2, mode="area")
        return F.unfold(x, 4, stride=4).transpose(1, 2)  # (B, T, 48)


def cache_of(teacher, args, data, grid, device):
    """The teacher's Tokens of all images, which are written where they are not there."""
    folder = Path(args.out) / "tokens" / teacher.title.replace(":", "-").replace("/", "-")
    if not (folder / "complete").exists():
        if teacher.name == "pixels":
            made = Pixels(grid).to(device)
        else:
            weights = None
            if teacher.steps is not None:
                weights = "random"
            if teacher.steps:
                weights = Path(args.out) / f"{folder.name.split('+')[0]}.pt"
                learn_teacher(teacher.name, weights, data, teacher.steps, grid, device)
            made = load_encoder(teacher.name, grid, weights, device, teacher.cls_weight)
        write_tokens(data, made, teacher.name, folder, device, args.ranks, teacher.steps == 0)
        write_text(folder / "complete", "")
    return folder, Tokens(folder, teacher.name, grid, teacher.cls_weight)


def look(tokens, data, count, device):
    """{metric: [mean, standard error]} of the tokens of `count` images that train.py's held-out loss does not use."""
    places = np.sort(np.random.default_rng(0).permutation(parts_of(data)[0])[:count])
    patches = draw_patches(len(places), tokens.grid**2)
    values, kept, _ = structure_of("structure", lambda i: tokens[i].to(device), places, None, patches, device)
    values.update(probe(*kept, data.labels[places]))
    return {name: [float(v.mean()), float(v.std(ddof=1) / len(v) ** 0.5)] for name, v in values.items()}


# ---- Runs ----


def runs_of(args):
    """[(teacher or None, arm, seed)], a seed after the other, SiT without a teacher first."""
    aligned = [(teacher, arm) for teacher in args.teachers for arm in ARMS]
    return [(teacher, arm, seed) for seed in args.seeds for teacher, arm in [(None, "sit"), *aligned]]


def distance_of(args, teacher, arm, seed, folder_of_tokens, distances):
    """Train a run to its last step and measure it, or read what was measured -> {distance: value}."""
    name = "none" if teacher is None else teacher.title.replace(":", "-").replace("/", "-")
    folder = Path(args.out) / "runs" / f"{name}-{arm}-seed{seed}"
    folder.parent.mkdir(exist_ok=True)
    if not (found := rows_of(folder / "distance.jsonl")):
        flags, place = list(args.flags), list(args.place)
        if teacher is not None:
            flags += ["--encoder", teacher.name, "--cls-weight", str(teacher.cls_weight)]
            place += ["--tokens", str(folder_of_tokens)]
        asked = SimpleNamespace(**{**vars(args), "flags": flags, "place": place})
        leg(asked, folder, arm, seed, args.steps)
        measure(asked, folder, args.steps, distances)
        found = rows_of(folder / "distance.jsonl")
        for file in [*folder.glob("*.pt"), *folder.glob("samples-*")]:  # of 60 runs they would take gigabytes
            file.unlink()
    return {key: value for key, value in found[-1].items() if key != "step"}


# ---- What came out ----


def table(result):
    """Markdown: a teacher a row, its accuracy and structure, the distances of both methods, and what iREPA gains."""
    name = next(iter(result["of_real"]))
    sit = [run["distance"][name] for run in result["runs"] if run["arm"] == "sit"]
    columns = [c for c in LABELS if any(c in found for found in result["teachers"].values())]
    out = f"{name} after {result['steps']} steps, means over seeds; SiT without a teacher: {spread(sit)}; real images:"
    out += f" {result['of_real'][name]:.2f}.\n\n"
    out += f"| teacher | {' | '.join(LABELS[c] for c in columns)} | REPA | iREPA | gain |\n"
    out += f"|{'---|' * (len(columns) + 4)}\n"
    for title, found in result["teachers"].items():
        curves = by_arm(result, title, name)
        cells = [title, *(f"{found[c][0]:.1f}" if "probe" in LABELS[c] else f"{found[c][0]:.3f}" for c in columns)]
        cells += [spread([*curves[arm].values()]) for arm in ARMS]
        both = [seed for seed in curves["repa"] if seed in curves["irepa"]]
        gain = {seed: curves["repa"][seed] - curves["irepa"][seed] for seed in both}
        around = interval(lambda seeds: statistics.mean(gain[s] for s in seeds), both)
        cells += [with_interval(statistics.mean(gain.values()), around, 2) if gain else "–"]
        out += f"| {' | '.join(cells)} |\n"
    return out


def spread(values):
    error = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}" if values else "–"


def by_arm(result, title, name):
    """{arm: {seed: distance}} of a teacher."""
    own = [run for run in result["runs"] if run["teacher"] == title]
    return {arm: by_seed(own, arm, lambda run: run["distance"][name]) for arm in ARMS}


def correlations(result, name):
    """{arm: what correlate() finds over the teachers}, where there are four at least."""
    found = {}
    for arm in ARMS:
        rows = []
        for title, metrics in result["teachers"].items():
            if distances := by_arm(result, title, name)[arm]:
                means = {metric: value[0] for metric, value in metrics.items()}
                rows.append(dict(encoder=title, fid=statistics.mean(distances.values()), **means))
        if len(rows) >= 4 and len({row["fid"] for row in rows}) > 1:
            found[arm] = correlate(rows)
    return found


def correlation_table(found, name):
    out = f"Correlation with {name} over the teachers, and 95 % bootstrap intervals:\n\n"
    out += (
        "| | n | "
        + " | ".join(f"{arm}: Pearson r | Spearman r" for arm in found)
        + f" |\n|{'---|' * (2 + 2 * len(found))}\n"
    )
    for column in next(iter(found.values())):
        cells = [
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*f[column][r]) for f in found.values() for r in ("pearson", "spearman")
        ]
        out += f"| {LABELS[column]} | {len(next(iter(found.values()))[column]['x'])} | {' | '.join(cells)} |\n"
    return out


def draw(result, found, name, path):
    """A panel for each metric: distances against it, a number a teacher; and the gain of iREPA over REPA, by name."""
    titles = [*result["teachers"]]
    columns = [*next(iter(found.values()))]
    figure = Figure(figsize=(3.4 * len(columns) + 5, 4.6), layout="constrained")
    *axes, bars = figure.subplots(1, len(columns) + 1, gridspec_kw=dict(width_ratios=[3.4] * len(columns) + [5]))
    for axis, column in zip(axes, columns):
        lines = []
        for colour, arm in zip(("C0", "C3"), found):
            f = found[arm].get(column)
            x, y = np.array(f["x"]), np.array(f["fid"])
            axis.scatter(x, y, s=12, color=colour, label=arm)
            own = [t for t in titles if by_arm(result, t, name)[arm]]
            for t, a, b in zip(own, x, y):
                axis.annotate(
                    str(titles.index(t) + 1), (a, b), (2, 2), textcoords="offset points", fontsize=7, color=colour
                )
            ends = np.array([x.min(), x.max()])
            axis.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=colour, linewidth=1)
            lines.append(f"{arm}: r {f['pearson'][0]:+.2f}, rank r {f['spearman'][0]:+.2f}")
        axis.set(xlabel=LABELS[column], title="\n".join(lines))
        axis.title.set_fontsize(9)
        axis.ticklabel_format(useOffset=False)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{name} (lower is better)")
    axes[0].legend(fontsize=8)
    for i, title in enumerate(titles):
        curves = by_arm(result, title, name)
        gains = [curves["repa"][s] - curves["irepa"][s] for s in curves["repa"] if s in curves["irepa"]]
        if gains:
            bars.barh(i, statistics.mean(gains), color="C2", alpha=0.5)
            bars.plot(gains, [i] * len(gains), "k.", markersize=4)
    bars.set_yticks(range(len(titles)), [f"{i + 1} {t}" for i, t in enumerate(titles)], fontsize=8)
    bars.invert_yaxis()
    bars.axvline(0, color="black", linewidth=1)
    bars.set(xlabel=f"{name}: REPA minus iREPA, a dot a seed", title="what iREPA gains")
    bars.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)


def report(args, teachers, runs, facts):
    """results.json, table.md and the figure, of what is there so far -> the tables."""
    out = Path(args.out)
    result = dict(steps=args.steps, seeds=args.seeds, flags=args.flags, teachers=teachers, runs=runs, **facts)
    write_text(out / "results.json", json.dumps({**result, **versions()}, indent=1) + "\n")
    text = table(result)
    for name in facts["of_real"]:
        if found := correlations(result, name):
            text += "\n" + correlation_table(found, name)
            draw(result, found, name, out / f"what_matters{'' if name == [*facts['of_real']][0] else '-' + name}.png")
    write_text(out / "table.md", text)
    return text


# ---- Command line ----


def build_parser():
    parser = make_parser(PROGRAM, __doc__, "[flags] [-- flags of train.py]")
    add = parser.add_argument
    add("--data", metavar="PATH", required=True, help="class folders, or a .zip of them")
    add("--teachers", nargs="+", default=TEACHERS, metavar="NAME[=STEPS][+A]")
    add("--budget", default="laptop", choices=BUDGETS, help="sizes of model and run")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--out", default="runs/what-matters", metavar="DIR")
    add("--images", type=int, help="samples for the distance")
    add("--looked-at", type=int, default=2000, metavar="N", help="images whose tokens are measured and classified")
    add("--inception", metavar="FILE", help="weights as fid.py takes them: the distance is then FID")
    add("--reference", metavar="FILE", help="npz with mu and sigma, as ADM's: instead of the training images'")
    add("--classifier", metavar="FILE", help="of convergence.py; default: OUT/classifier.pt, learned here")
    add("--also", metavar="ENCODER", help="a second distance, in the mean tokens of this teacher")
    add("--processes", type=int, default=1, help="GPUs: above one, training and sampling are under torchrun")
    add("--device", default="auto", help="as in train.py")
    return parser


def prepare(argv):
    """argv -> args with what the budget says. ValueError where flags do not fit."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args, extra = build_parser().parse_args(argv[:cut]), argv[cut + 1 :]
    budget = SHORT if args.budget == "laptop" else BUDGETS[args.budget]
    vars(args).update({k: v for k, v in budget.items() if k != "images" or args.images is None})
    args.teachers, args.seeds = [parse(t) for t in dict.fromkeys(args.teachers)], [*dict.fromkeys(args.seeds)]
    args.flags = [*args.flags.split(), *"--lr-schedule constant --sample-every 0".split()]
    if args.budget == "paper":
        args.flags += ["--steps", "100000"]  # the paper's figure
    args.flags += extra
    args.place, args.decoder = ["--data", args.data, "--device", args.device], ["--device", args.device]
    if args.budget != "paper" and fast_bf16(pick_device(args.device)):
        args.sampling += " --precision bf16"
    run, method, _ = resolve([*args.flags, *args.place, "--out", f"{args.out}/none"])
    config = network_config(run, method)
    args.steps, args.grid, args.size = run.steps, config.input_size // config.patch_size, run.image_size
    if args.looked_at < 50 or args.images < 2:
        raise ValueError("--looked-at is at least 50, --images at least 2")
    return args


def main(argv=None):
    with mistakes(PROGRAM):
        args = prepare(sys.argv[1:] if argv is None else argv)
        device, out = pick_device(args.device), Path(args.out)
        jobs.ImageSet = functools.lru_cache(1)(ImageSet)  # each run's too: decoding CIFAR-10 takes ten seconds
        data = jobs.ImageSet(args.data, args.size, False, True)
        args.ranks = start_ranks(device, 60)
        out.mkdir(parents=True, exist_ok=True)
        distances, facts = meters(args, data, device)
    teachers, folders, runs = {}, {None: None}, []
    for teacher in tqdm(args.teachers, "teachers"):
        folders[teacher], tokens = cache_of(teacher, args, data, args.grid, device)
        seen = folders[teacher] / "structure.json"
        if not seen.exists():
            write_text(seen, json.dumps(look(tokens, data, args.looked_at, device)))
        teachers[teacher.title] = json.loads(seen.read_text())
    with tqdm(runs_of(args), "runs", unit="run") as bar:
        for teacher, arm, seed in bar:
            title = teacher.title if teacher else None
            bar.set_description(f"{title}, {arm}, seed {seed}")
            found = distance_of(args, teacher, arm, seed, folders[teacher], distances)
            runs.append(dict(teacher=title, arm=arm, seed=seed, distance=found))
            text = report(args, teachers, runs, facts)
    print(f"{text}\n{out}: results.json, table.md, what_matters.png")


if __name__ == "__main__":
    main()
