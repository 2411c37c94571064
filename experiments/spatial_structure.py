"""Would this encoder make a good teacher? The spatial structure of its patch tokens, measured and drawn.

    python -m experiments.spatial_structure --data photos.zip --encoders hog sift pixels dinov2_vitb14
    python -m experiments.spatial_structure --data photos --encoders hog timm:<your network> --weights timm:<...>=FILE
    python -m experiments.spatial_structure --data photos --probe     and the accuracy of a linear probe beside it
    python -m experiments.spatial_structure --tokens DIR --encoders dinov2_vitb14     from python -m inputs.teachers
    python -m experiments.spatial_structure --features spatial-metrics-data/features/*.pt     as the release has them
    python -m experiments.spatial_structure --correlate        the published encoders: each metric against FID
    python -m experiments.spatial_structure --correlate fids.csv runs/*/table.csv      your own

All but the last two print a table (mean over the images, standard error) and a ranking, and write results.json and
table.csv to --out; with --data also similarity.png (the cosine of one patch with all others, before and after the
spatial norm) and pca.png (the tokens' first principal components as colours). An encoder is any of inputs/teachers.py,
or `pixels`: the patches themselves. The weights `random` make an untrained one. All give 16 x 16 tokens of the same
crops, as for the published figures. SRSS has to know the object: --masks holds a PNG for each image, of the same name,
black on the background, and as large as the image or already cropped.

Of --features and --tokens together with --data, or with each other, image i is the i-th by name. Features alone have no
names: the masks are then taken as the release takes them, those in which object and background have a quarter of the
patches each, in the order of their names, and there have to be as many as images. The probe takes the labels of the
class folders of --data, or those in --tokens.
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import json
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from experiments.linear_probe import FOLDS, PATCHES, PENALTY, PROBES, chance, check_labels, draw_patches, probe
from experiments.object_masks import read_masks, read_masks_in_order
from experiments.spatial_correlations import (
    LABELS,
    PUBLISHED,
    correlate,
    ranks,
    read_table,
    report_correlations,
    show_table,
    verdict,
    write_table,
)
from experiments.structure_pictures import draw_pca, draw_similarity
from experiments.token_sources import GRID, RANDOM, Live, choose_sources, open_tokens, read_labels
from fid import Files, open_set
from inputs.teachers import DRAWN
from plumbing.files import mistakes, write_text
from plumbing.flags import make_parser
from plumbing.processes import pick_device
from plumbing.records import versions

BATCH = 16  # images
FAR = 6  # patches, as in the released code; the paper's text has half the grid


# ---- The metrics (arXiv 2512.10794, appendix B). x_t: tokens scaled to length 1; K: cosines; d: grid distances ----


def similarity(tokens):
    """K, the cosine of each token with each other: [B, T, D] -> float32 [B, T, T]."""
    x = F.normalize(tokens.float(), dim=-1)
    return x @ x.transpose(1, 2)


def distance(tokens):
    """d, rows plus columns between the places of tokens [B, T, D] in row-major order -> int [T, T]."""
    count = tokens.shape[1]
    side = math.isqrt(count)
    if side**2 != count or side < 5:
        raise ValueError(f"the metrics need a square grid of at least 5 x 5 tokens, not {count} tokens")
    place = torch.arange(count, device=tokens.device)
    row, column = place // side, place % side
    return (row[:, None] - row).abs() + (column[:, None] - column).abs()


def lds(tokens):
    """Local against distant similarity: mean of K where d = 1, minus mean of K where d >= 6. [B, T, D] -> [B]."""
    k, d = similarity(tokens), distance(tokens)
    return k[:, d == 1].mean(1) - k[:, d >= FAR].mean(1)


def cds(tokens):
    """Correlation decay slope: with m(r) the mean of K where d = r, minus the slope of the least-squares line through
    m(1), ..., m(8). [B, T, D] -> [B]."""
    k, d = similarity(tokens), distance(tokens)
    m = torch.stack([k[:, d == r].mean(1) for r in range(1, 9)], dim=1)  # (B, 8)
    r = torch.arange(1, 9, device=m.device) - 4.5
    return -(m @ r) / r.square().sum()


def srss(tokens, masks):
    """Semantic-region self-similarity: [B, T, D] and bool [B, T], True on the object -> [B].

    For each token of the object: mean of K over the object's tokens at d = 1, minus mean of K over the background's at
    d >= 6; then the mean over those tokens that have both. NaN for an image where none has.
    """
    k, d, masks = similarity(tokens), distance(tokens), masks.bool()
    near = (d == 1) & masks[:, None]  # (B, T, T)
    far = (d >= FAR) & ~masks[:, None]
    score = (k * near).sum(2) / near.sum(2) - (k * far).sum(2) / far.sum(2)  # (B, T)
    used = masks & near.any(2) & far.any(2)
    return torch.where(used, score, 0).sum(1) / used.sum(1)


def rmsc(tokens):
    """RMS spatial contrast: sqrt(mean_t |x_t - mean_s x_s|^2), 0 where all tokens point one way. [B, T, D] -> [B]."""
    x = F.normalize(tokens.float(), dim=-1)
    return (x - x.mean(1, keepdim=True)).square().sum(2).mean(1).sqrt()


METRICS = {"lds": lds, "cds": cds, "srss": srss, "rmsc": rmsc}


# ---- Images, masks ----


def choose_shown(args, files, indices):
    """-> [(index of the file, token)]: of --show, or the first three measured images at their centre."""
    chosen = []
    for item in args.show:
        name, row, column = re.fullmatch(r"(.*?)(?::(\d+),(\d+))?", item).groups(default=GRID // 2)
        found = [i for i, file in enumerate(files) if name in file]
        if len(found) != 1 or max(int(row), int(column)) >= GRID:
            raise ValueError(
                f"--show {item}: give NAME:ROW,COLUMN, NAME a part of the name of one image ({len(found)} have it), the"
                f" patch from 0,0 to {GRID - 1},{GRID - 1}"
            )
        chosen.append((found[0], int(row) * GRID + int(column)))
    return chosen or [(i, (GRID + 1) * GRID // 2) for i in indices[:3]]


@torch.no_grad()
def measure(title, tokens_of, places, masks, patches, device):
    """The images at `places`, with masks bool [N, T] or None and patches int64 [N, K], or None -> ({metric: float64
    [N]}, the mean tokens [N, D] and the tokens of these patches [N, K, D] or None, the seconds that it took)."""
    values, kept, start = {m: [] for m in METRICS if m != "srss" or masks is not None}, [], time.perf_counter()
    for i in tqdm(range(0, len(places), BATCH), title, unit="batch", leave=False):
        tokens = tokens_of(places[i : i + BATCH]).float()
        if not tokens.isfinite().all():
            raise ValueError(f"{title} gives tokens that are not finite")
        for metric, found in values.items():
            more = (masks[i : i + BATCH].to(device),) if metric == "srss" else ()
            found.append(METRICS[metric](tokens, *more).cpu())
        if patches is not None:
            chosen = patches[i : i + BATCH, :, None].to(device).expand(-1, -1, tokens.shape[2])
            kept.append((tokens.mean(1), tokens.gather(1, chosen)))
    values = {m: torch.cat(v).double().numpy() for m, v in values.items()}
    return values, [torch.cat(k) for k in zip(*kept)] or None, time.perf_counter() - start


# ---- Command line ----


def build_parser():
    parser = make_parser("experiments.spatial_structure", __doc__)
    add = parser.add_argument
    add("--data", metavar="DIR_OR_ZIP", help="images, at any depth")
    text = "(hog sift pixels, unless there are --features or --tokens)"
    add("--encoders", nargs="+", default=[], metavar="NAME", help=text)
    add("--weights", nargs="+", action="extend", default=[], metavar="NAME=FILE", help="local weights, or random")
    text = "read the tokens of --encoders from this cache, made by python -m inputs.teachers"
    add("--tokens", metavar="DIR", help=text)
    text = "tensors [images, 256, width] in .pt files; NAME names the row, else the file does"
    add("--features", nargs="+", default=[], metavar="[NAME=]FILE", help=text)
    add("--images", type=int, default=1000, metavar="N", help="at most, drawn with a fixed seed (1000)")
    add("--image-size", type=int, default=256, help="side of the centre crops, a multiple of 16 (256)")
    add("--masks", metavar="DIR", help="object masks, for SRSS")
    text = f"logistic regression on the mean token, and on {PATCHES} patches an image, drawn with a fixed seed; {FOLDS}"
    add("--probe", action="store_true", help=text + f" folds, L2 penalty {PENALTY} on standardised features")
    add("--show", nargs="+", default=[], metavar="NAME:ROW,COLUMN", help="images to draw, each with one of its patches")
    text = "csv of fid and accuracy, lds, cds, srss, rmsc; what it lacks comes, by its column encoder, from what is"
    text += " measured here and from the further tables (the published figures)"
    add("--correlate", nargs="*", metavar="TABLE.csv", help=text)
    add("--out", default="runs/spatial", metavar="DIR", help="must not exist (runs/spatial)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    return parser


class Work(NamedTuple):
    """What is measured, and of what."""

    sources: dict  # title: Live or Stored
    data: Files | None
    files: list | None  # the names of all images, sorted, or None where they have none
    count: int
    places: np.ndarray  # of the measured images among all
    shown: list  # [(place, patch)]
    masks: torch.Tensor | None  # bool [N, T], of the measured ones
    labels: np.ndarray | None  # of the measured ones, for the probe
    device: torch.device


def mean_and_error(values):
    """The mean and its standard error, without what is not finite."""
    finite = values[np.isfinite(values)]
    return dict(mean=float(finite.mean()), standard_error=float(finite.std(ddof=1) / len(finite) ** 0.5))


def compare(args, work):
    """Measure, print, draw. -> what results.json says of it."""
    some_live = any(isinstance(source, Live) for source in work.sources.values())
    wanted = {place for place, _ in work.shown}.union(work.places.tolist() if some_live else [])
    images = {i: work.data[i] for i in tqdm(sorted(wanted), "decoding", unit="img", leave=False)}
    patches = draw_patches(len(work.places), GRID**2) if args.probe else None
    values, drawn, result, rows = {}, {}, {}, []
    for title, source in work.sources.items():
        tokens_of, parameters = open_tokens(source, images, work.device)
        with torch.no_grad():
            drawn[title] = tokens_of([place for place, _ in work.shown]).float().cpu() if work.shown else None
        values[title], kept, seconds = measure(title, tokens_of, work.places, work.masks, patches, work.device)
        del tokens_of  # and its network, before the next one is there
        result[title] = dict(source.about(), parameters=parameters, seconds=seconds)
        for metric, v in values[title].items():
            per_image = [round(x, 6) if math.isfinite(x) else None for x in v.tolist()]
            result[title][metric] = dict(mean_and_error(v), per_image=per_image)
        cells = ["{mean:.4f} ± {standard_error:.4f}".format(**result[title][m]) for m in values[title]]
        for column, percent in (probe(*kept, work.labels) if args.probe else {}).items():
            result[title][column] = dict(mean_and_error(percent), per_fold=percent.tolist())
            cells.append("{mean:.1f} ± {standard_error:.1f}".format(**result[title][column]))
        rows.append((title, "" if parameters is None else f"{parameters:,}", *cells, f"{seconds:.1f}"))
    columns = [LABELS[c] for c in (*METRICS, *PROBES) if c in result[title]]
    print(f"{len(work.places)} of the {work.count} images of {name_of(args)}, mean ± standard error")
    show_table([("encoder", "parameters", *columns, "seconds"), *rows])
    say_how(args, work, values[title])
    if len(work.sources) > 1:
        rank(values, result)
    if work.shown:
        pictures, marked = torch.stack([images[place] for place, _ in work.shown]), [patch for _, patch in work.shown]
        draw_similarity(Path(args.out, "similarity.png"), pictures, marked, drawn)
        draw_pca(Path(args.out, "pca.png"), pictures, drawn)
    return dict(images=[work.files[i] if work.files else i for i in work.places.tolist()], encoders=result)


def rank(values, result):
    """{title: {metric: float64 [N]}}: print the ranking and what it says, and add the ranks to result[title]."""
    metrics = list(next(iter(values.values())))
    for metric in metrics:
        ranked = ranks(np.stack([found[metric] for found in values.values()]))
        for title, row in zip(values, ranked.tolist()):
            result[title].setdefault("ranks", {})[metric] = row
    order = sorted(values, key=lambda title: sum(r for r, _, _ in result[title]["ranks"].values()))
    cells = {t: ("{} [{}, {}]".format(*r) for r in result[t]["ranks"].values()) for t in order}
    print("rank by each metric, 1 has the most spatial structure [95% interval over the images]")
    show_table([("encoder", *(LABELS[m] for m in metrics)), *((title, *cells[title]) for title in order)])
    untrained = {title for title in order if title.endswith(RANDOM) or title in ("pixels", *DRAWN)}
    print(verdict(order, untrained) + "\n")


def name_of(args):
    return args.data or args.tokens or " ".join(args.features)


def say_how(args, work, values):
    """What the table was measured with, in words. values: {metric: float64 [N]} of one encoder."""
    if args.masks:
        how = "by their masks" if work.files else "by the masks in the order of their names"
        print(f"SRSS: over {int(np.isfinite(values['srss']).sum())} of them, {how}\n")
    else:
        print("No SRSS: no --masks\n")
    if args.features and work.files:
        print("--features: row i is taken for the i-th image by name\n")
    if args.probe:
        classes = len(np.unique(work.labels))
        print(
            f"Linear probe: {classes} classes, mean ± standard error over {FOLDS} folds; chance, which always says the"
            f" largest class, is right on {chance(work.labels):.1f} %\n"
        )
    if not work.shown:
        print("No pictures: no --data\n")


def prepare(args):
    """What can be refused before the work is. -> the Work, or None where nothing is measured."""
    measured = bool(args.data or args.tokens or args.features)
    if not measured and args.correlate is None:
        raise ValueError("name images with --data, or ask for --correlate; --tokens and --features need no images")
    if Path(args.out).exists():
        raise FileExistsError(f"--out {args.out} exists; another one leaves it as it is")
    work = prepare_work(args) if measured else None
    if args.correlate is not None:
        columns = [*METRICS, *(PROBES if args.probe else [])]
        numbers = {title: dict.fromkeys(columns, float(i)) for i, title in enumerate(work.sources if work else [])}
        correlate(read_table(args.correlate or [PUBLISHED], numbers), draws=100)  # any numbers will do here
    return work


def prepare_work(args):
    if args.image_size % GRID or args.image_size < 2 * GRID or args.images < 2:
        raise ValueError(f"--image-size is a multiple of {GRID} from {2 * GRID} up, and --images 2 at least")
    if args.show and not args.data:
        raise ValueError(f"--show {' '.join(args.show)}: there are no images to draw without --data")
    device, data = pick_device(args.device), open_images(args) if args.data else None
    sources, files, count = choose_sources(args, data and data.files)
    if count < 2:
        raise ValueError(f"{name_of(args)} holds one image, and a standard error needs two")
    places = np.sort(np.random.default_rng(0).permutation(count)[: args.images])
    shown = choose_shown(args, files, places.tolist()) if data else []
    masks = choose_masks(args, files, count, places) if args.masks else None
    labels = choose_labels(args, sources, files, places) if args.probe else None
    return Work(sources, data, files, count, places, shown, masks, labels, device)


def open_images(args):
    if not Path(args.data).exists():
        raise FileNotFoundError(f"--data {args.data} does not exist; name a folder of images, or a .zip of one")
    data, _ = open_set(args.data, args.image_size)
    if not isinstance(data, Files):
        raise ValueError(f"--data {args.data} is no folder of images, nor a .zip of one")
    return data


def choose_masks(args, files, count, places):
    """-> bool [N, T], the masks of the measured images."""
    if files:
        masks = read_masks(args.masks, [files[i] for i in places], args.image_size)
    else:
        masks = read_masks_in_order(args.masks, count)[places]
    one = torch.ones(1, GRID**2, 1)
    if sum(bool(srss(one, mask[None]).isfinite()) for mask in masks if mask.any()) < 2:
        such = f", such as {Path(args.masks, files[places[-1]]).with_suffix('.png')}" if files else ""
        raise ValueError(
            f"--masks {args.masks}: two images at least need a mask{such}, with a quarter of the patches on the object"
            " and a quarter off it"
        )
    return masks


def choose_labels(args, sources, files, places):
    """-> int64 [N], the labels of the measured images."""
    labels, classes = read_labels(args, sources, files)
    check_labels(labels[places], classes)
    return labels[places]


def main(argv=None):
    args = build_parser().parse_args(argv)
    out, record, measured = Path(args.out), dict(settings=vars(args), **versions()), {}
    with mistakes("experiments.spatial_structure"):
        work = prepare(args)
        out.mkdir(parents=True)
        try:
            if work:
                record |= compare(args, work)
                measured = {t: {c: e[c]["mean"] for c in LABELS if c in e} for t, e in record["encoders"].items()}
            table = read_table(args.correlate or [PUBLISHED], measured) if args.correlate is not None else []
            if work:
                write_table(out / "table.csv", measured, {row["encoder"]: row["fid"] for row in table})
            if args.correlate is not None:
                record["correlations"] = correlate(table)
                report_correlations(record["correlations"], out / "correlations.png")
            write_text(out / "results.json", json.dumps(record, indent=1) + "\n")
        finally:
            if not any(out.iterdir()):
                out.rmdir()  # or the next attempt is refused
    print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


if __name__ == "__main__":
    as_program(main)
