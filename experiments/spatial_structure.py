"""Would this encoder make a good teacher? The spatial structure of its patch tokens, measured and drawn.

    python -m experiments.spatial_structure --data photos.zip --encoders hog sift pixels dinov2_vitb14
    python -m experiments.spatial_structure --data photos --encoders hog timm:<your ViT> --weights timm:<your ViT>=FILE
    python -m experiments.spatial_structure --correlate        the published encoders: each metric against FID

The first two print a table (mean over the images, standard error) and a ranking, and write results.json, similarity.png
(the cosine of one patch with all others, before and after the spatial norm) and pca.png (the tokens' first principal
components as colours) to --out. An encoder is any of inputs/teachers.py, or `pixels`: the patches themselves. The
weights `random` make an untrained one. All give 16 x 16 tokens of the same crops, as for the published figures. SRSS
has to know the object: --masks holds a PNG for each image, of the same name, black on the background, and as large as
the image or already cropped.
"""

import json
import math
import os
import re
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.stats import rankdata
from tqdm import tqdm

from experiments.spatial_correlations import LABELS, PUBLISHED, correlate, read_table, report_correlations, show_table
from fid import Files, center_crop, open_set
from inputs.teachers import DRAWN, ENCODERS, load_encoder
from irepa import Config, spatial_norm
from plumbing.files import mistakes, one_line, write_text
from plumbing.flags import make_parser
from plumbing.processes import pick_device
from plumbing.records import versions

GRID = 16  # tokens a side
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


# ---- Encoders, images, masks ----


def pixels(images):
    """The patches as tokens, in [-1, 1]: uint8 [B, 3, S, S] -> [B, T, 3 (S/16)^2]."""
    p = images.shape[-1] // GRID
    return F.unfold(images.float() / 127.5 - 1, p, stride=p).transpose(1, 2)


def load(name, weights, device="cpu"):
    """-> (teacher, its number of parameters). ValueError in the words of our flags."""
    if weights and (name in DRAWN or name == "pixels"):
        raise ValueError(f"{name} has no weights: leave --weights {name}={weights} out")
    if name == "pixels":
        return pixels, 0
    torch.manual_seed(0)  # of random weights
    try:
        teacher = load_encoder(name, GRID, weights, device)
    except (ValueError, OSError) as e:
        raise ValueError(one_line(e).replace("--encoder-weights ", f"--weights {name}=")) from e
    return teacher, sum(p.numel() for p in teacher.parameters())


def choose_encoders(args):
    """-> {name: weights or None}. What can be known to fail does so now, not after hours with the others."""
    if len(set(args.encoders)) < len(args.encoders):
        raise ValueError(f"--encoders {' '.join(args.encoders)}: name each once")
    chosen = dict.fromkeys(args.encoders)
    for item in args.weights:
        name, _, file = item.partition("=")
        if not file or name not in chosen or chosen[name]:
            raise ValueError(f"--weights {item}: give NAME=FILE, once for a NAME among --encoders")
        chosen[name] = file
    for name, file in chosen.items():
        slow = name in ENCODERS or name.startswith("timm:")
        if not slow or file not in (None, "random") and not os.path.exists(file):
            load(name, file)
    return chosen


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


def read_mask(file, size):
    """-> bool [T]: which patches of the centre crop touch the object, that is, what is not black."""
    try:
        image = Image.open(file)
        mask = np.atleast_3d(image)[..., [band != "A" for band in image.getbands()]].any(2)
    except Exception as e:  # PIL's readers raise anything
        raise ValueError(f"{file} cannot be read ({type(e).__name__}: {e})") from e
    mask = np.asarray(center_crop(Image.fromarray(mask.astype(np.uint8) * 255), size)) > 127
    return torch.from_numpy(mask.reshape(GRID, size // GRID, GRID, size // GRID).any((1, 3)).flatten())


def read_masks(folder, files, size):
    """-> bool [N, T]. All False, so that SRSS leaves the image out, where there is no mask or, as in the released code,
    where object or background have less than a quarter of the patches."""
    masks = torch.zeros(len(files), GRID**2, dtype=torch.bool)
    for i, name in enumerate(files):
        file = Path(folder, name).with_suffix(".png")
        mask = read_mask(file, size) if file.exists() else masks[i]
        if 0.25 <= mask.float().mean() <= 0.75 and srss(torch.ones(1, GRID**2, 1), mask[None]).isfinite():
            masks[i] = mask
    if masks.any(1).sum() < 2:
        raise ValueError(
            f"--masks {folder}: two images at least need a mask, such as {file}, with a quarter of the patches on the"
            " object and a quarter off it"
        )
    return masks


@torch.no_grad()
def measure(name, teacher, images, masks, device):
    """-> ({metric: float64 [N]}, seconds that the tokens and the metrics took)."""
    values, start = {m: [] for m in METRICS if m != "srss" or masks is not None}, time.perf_counter()
    for i in tqdm(range(0, len(images), BATCH), name, unit="batch", leave=False):
        tokens = teacher(images[i : i + BATCH].to(device))
        if not tokens.isfinite().all():
            raise ValueError(f"{name} gives tokens that are not finite")
        for metric, found in values.items():
            more = (masks[i : i + BATCH].to(device),) if metric == "srss" else ()
            found.append(METRICS[metric](tokens, *more).cpu())
    return {m: torch.cat(v).double().numpy() for m, v in values.items()}, time.perf_counter() - start


# ---- What the numbers say ----


def ranks(values, draws=2000):
    """float [encoders, N], of the same N images -> int [encoders, 3]: rank (1 has the largest mean) and its 95%
    interval, over means of images drawn again with replacement, the same for all encoders."""
    values = values[:, np.isfinite(values).all(0)]
    drawn = np.random.default_rng(0).integers(values.shape[1], size=(draws, values.shape[1]))
    means = np.stack([v[drawn].mean(1) for v in values])  # (encoders, draws)
    low, high = np.percentile(rankdata(-means, "min", axis=0), [2.5, 97.5], axis=1, method="nearest")
    return np.stack([rankdata(-values.mean(1), "min"), low, high], axis=1).astype(int)


def verdict(order, untrained):
    """What a ranking (names, best first) does and does not predict, for a person."""
    table = read_table(PUBLISHED)
    r = {k: f"{v['pearson'][0]:.2f}" for k, v in correlate(table, draws=100).items()}
    metrics = ", ".join(f"{LABELS[m]} {r[m]}" for m in METRICS)
    words = (
        f"Over the {len(table)} published encoders FID falls as the metrics rise (Pearson r {metrics}; accuracy"
        f" {r['accuracy']}): of two trained encoders the one ranked higher here is the likelier good teacher. This is"
        " a correlation, measured for SiT-XL/2 with REPA after 100K steps and on other images: no cause, no forecast of"
        " a FID, and nothing about untrained features."
    )
    floor = [name for name in order if name in untrained]
    below = [name for name in order[order.index(floor[0]) :] if name not in untrained] if floor else []
    if below:
        words += f" Here {floor[0]}, untrained, ranks above {', '.join(below)}: structure is not all."
    return textwrap.fill(words, 110)


# ---- Pictures ----


def panel(axis, picture, title="", patch=None, **more):
    """A picture without ticks, a square around one of its patches."""
    shown = axis.imshow(np.asarray(picture), **more)
    axis.set(xticks=[], yticks=[])
    axis.set_title(textwrap.fill(title, 18), fontsize=10)
    if patch is not None:
        p = len(picture) / GRID
        corner = patch % GRID * p - 0.5, patch // GRID * p - 0.5
        axis.add_patch(Rectangle(corner, p, p, fill=False, edgecolor="cyan", linewidth=1.6))
    return shown


def draw_similarity(path, images, patches, tokens):
    """images uint8 [n, 3, S, S], a patch of each, {title: tokens [n, T, D]} -> a PNG, two rows an image."""
    gamma, size = Config().gamma, (1.6 * (len(tokens) + 2) + 0.4, 3.2 * len(images) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    places = figure.add_gridspec(2 * len(images), len(tokens) + 2)
    for i, (image, patch) in enumerate(zip(images, patches)):
        panel(figure.add_subplot(places[2 * i : 2 * i + 2, :2]), image.permute(1, 2, 0), "" if i else "image", patch)
        for j, (title, z) in enumerate(tokens.items()):
            for k, x in enumerate((z[i : i + 1], spatial_norm(z[i : i + 1], gamma))):
                cosine = similarity(x)[0, patch].reshape(GRID, GRID)
                axis = figure.add_subplot(places[2 * i + k, j + 2])
                shown = panel(axis, cosine, "" if i or k else title, patch, cmap="magma", vmin=-0.2, vmax=1)
                if j == 0:
                    axis.set_ylabel(("tokens", "spatial norm")[k], fontsize=10)
    bar = figure.colorbar(shown, ax=figure.axes, location="bottom", shrink=0.4, aspect=40, extend="min", pad=0.02)
    bar.set_label(f"cosine with the marked patch, before and after the spatial norm (gamma {gamma})", fontsize=10)
    figure.savefig(path, dpi=75)


def colours(tokens):
    """First three principal components of one image's tokens: [T, D] -> [16, 16, 3] in [0, 1]."""
    u, s, _ = torch.linalg.svd(tokens.double() - tokens.double().mean(0), full_matrices=False)
    parts = u[:, :3] * s[:3]
    parts = parts * torch.where(parts.pow(3).sum(0) < 0, -1, 1)  # a component has no sign of its own
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    return ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).reshape(GRID, GRID, 3)


def draw_pca(path, images, tokens):
    """images uint8 [n, 3, S, S], {title: tokens [n, T, D]} -> a PNG, one row an image."""
    figure = Figure(figsize=(1.9 * (len(tokens) + 1), 1.9 * len(images) + 0.6), layout="constrained")
    figure.suptitle("first three principal components of an image's tokens as red, green, blue", fontsize=10)
    for i, row in enumerate(figure.subplots(len(images), len(tokens) + 1, squeeze=False)):
        panel(row[0], images[i].permute(1, 2, 0), "" if i else "image")
        for axis, (title, z) in zip(row[1:], tokens.items()):
            panel(axis, colours(z[i]), "" if i else title)
    figure.savefig(path, dpi=75)


# ---- Command line ----


def build_parser():
    parser = make_parser("experiments.spatial_structure", __doc__)
    add = parser.add_argument
    add("--data", metavar="DIR_OR_ZIP", help="images, at any depth")
    add("--encoders", nargs="+", default=["hog", "sift", "pixels"], metavar="NAME", help="(hog sift pixels)")
    add("--weights", nargs="+", action="extend", default=[], metavar="NAME=FILE", help="local weights, or random")
    add("--images", type=int, default=1000, metavar="N", help="at most, drawn with a fixed seed (1000)")
    add("--image-size", type=int, default=256, help="side of the centre crops, a multiple of 16 (256)")
    add("--masks", metavar="DIR", help="object masks, for SRSS")
    add("--show", nargs="+", default=[], metavar="NAME:ROW,COLUMN", help="images to draw, each with one of its patches")
    text = "csv of fid and accuracy, lds, cds, srss, rmsc; or of encoder and fid, for the metrics measured here"
    add("--correlate", nargs="?", const=str(PUBLISHED), metavar="TABLE.csv", help=text + " (the published figures)")
    add("--out", default="runs/spatial", metavar="DIR", help="must not exist (runs/spatial)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    return parser


def compare(args, encoders, data, indices, shown, masks, device):
    """Measure, print, draw. -> what results.json says of it."""
    images = torch.stack([data[i] for i in tqdm(indices, "decoding", unit="img", leave=False)])
    pictures, patches = torch.stack([data[i] for i, _ in shown]), [patch for _, patch in shown]
    values, drawn, untrained, result, rows = {}, {}, set(), {}, []
    for name, weights in encoders.items():
        teacher, parameters = load(name, weights, device)
        title = f"{name} (random)" if weights == "random" else name
        if weights == "random" or not parameters:
            untrained.add(title)
        with torch.no_grad():
            drawn[title] = teacher(pictures.to(device)).cpu()
        values[title], seconds = measure(name, teacher, images, masks, device)
        result[title] = dict(weights=weights, parameters=parameters, seconds=seconds)
        for metric, v in values[title].items():
            mean, error = float(np.nanmean(v)), float(np.nanstd(v, ddof=1) / np.isfinite(v).sum() ** 0.5)
            per_image = [round(x, 6) if math.isfinite(x) else None for x in v.tolist()]
            result[title][metric] = dict(mean=mean, standard_error=error, per_image=per_image)
        cells = ("{mean:.4f} ± {standard_error:.4f}".format(**result[title][m]) for m in values[title])
        rows.append((title, f"{parameters:,}", *cells, f"{seconds:.1f}"))
        del teacher  # before the next one is there
    metrics = [LABELS[m] for m in values[title]]
    print(f"{len(indices)} of the {data.count} images of {args.data}, mean ± standard error")
    show_table([("encoder", "parameters", *metrics, "seconds"), *rows])
    print(f"SRSS: over {int(masks.any(1).sum())} of them, by their masks\n" if args.masks else "No SRSS: no --masks\n")
    if len(encoders) > 1:
        for metric in values[title]:
            ranked = ranks(np.stack([found[metric] for found in values.values()]))
            for title, row in zip(values, ranked.tolist()):
                result[title].setdefault("ranks", {})[metric] = row
        order = sorted(values, key=lambda title: sum(r for r, _, _ in result[title]["ranks"].values()))
        cells = {t: ("{} [{}, {}]".format(*r) for r in result[t]["ranks"].values()) for t in order}
        print("rank by each metric, 1 has the most spatial structure [95% interval over the images]")
        show_table([("encoder", *metrics), *((title, *cells[title]) for title in order)])
        print(verdict(order, untrained) + "\n")
    draw_similarity(Path(args.out, "similarity.png"), pictures, patches, drawn)
    draw_pca(Path(args.out, "pca.png"), pictures, drawn)
    return dict(images=[data.files[i] for i in indices], encoders=result)


def prepare(args):
    """What can be refused before the work is. -> the other arguments of compare(), or None without --data."""
    if not args.data and not args.correlate:
        raise ValueError("name images with --data, or ask for --correlate")
    if Path(args.out).exists():
        raise FileExistsError(f"--out {args.out} exists; another one leaves it as it is")
    work, numbers = None, {}
    if args.data:
        if args.image_size % GRID or args.image_size < 2 * GRID or args.images < 2:
            raise ValueError(f"--image-size is a multiple of {GRID} from {2 * GRID} up, and --images 2 at least")
        if not Path(args.data).exists():
            raise FileNotFoundError(f"--data {args.data} does not exist; name a folder of images, or a .zip of one")
        device, encoders = pick_device(args.device), choose_encoders(args)
        data, _ = open_set(args.data, args.image_size)
        if not isinstance(data, Files):
            raise ValueError(f"--data {args.data} is no folder of images, nor a .zip of one")
        if data.count < 2:
            raise ValueError(f"{args.data} holds one image, and a standard error needs two")
        indices = np.sort(np.random.default_rng(0).permutation(data.count)[: args.images]).tolist()
        shown = choose_shown(args, data.files, indices)
        masks = read_masks(args.masks, [data.files[i] for i in indices], args.image_size) if args.masks else None
        work = encoders, data, indices, shown, masks, device
        numbers = {name: dict.fromkeys(METRICS, float(i)) for i, name in enumerate(encoders)}  # any will do here
    if args.correlate:
        correlate(read_table(args.correlate, numbers), draws=100)
    return work


def main(argv=None):
    args = build_parser().parse_args(argv)
    out, record, measured = Path(args.out), dict(settings=vars(args), **versions()), {}
    with mistakes("experiments.spatial_structure"):
        work = prepare(args)
        out.mkdir(parents=True)
        try:
            if work:
                record |= compare(args, *work)
                found = zip(args.encoders, record["encoders"].values())
                measured = {name: {m: e[m]["mean"] for m in METRICS if m in e} for name, e in found}
            if args.correlate:
                record["correlations"] = correlate(read_table(args.correlate, measured))
                report_correlations(record["correlations"], out / "correlations.png")
            write_text(out / "results.json", json.dumps(record, indent=1) + "\n")
        finally:
            if not any(out.iterdir()):
                out.rmdir()  # or the next attempt is refused
    print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


if __name__ == "__main__":
    main()
