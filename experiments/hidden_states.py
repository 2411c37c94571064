"""What a trained model's hidden tokens know, block by block: classes, the teacher's neighbours, spatial structure.

    python -m experiments.hidden_states --ckpt runs/sit/last.pt runs/irepa/last.pt --data photos.zip
    python -m experiments.hidden_states --ckpt irepa=runs/a/last.pt --data data/imagenet/train --latents DIR \\
        --encoder dinov2_vitb14

For each checkpoint, noise level and block: the accuracy of a linear probe on the mean token (linear_probe.py), CKNNA
between the mean tokens and the teacher's, and LDS (spatial_structure.py; below 5 x 5 tokens there is none). Images are
those of --data, drawn with a fixed seed, of all checkpoints the same, with the same noise; the label given to the model
is the null class, so that it does not tell what the probe asks. OUT holds results.json, table.md, curves.png and
similarity.png: the cosine of one patch with all others in the tokens at the aligned block, behind the projector, and in
the teacher's.
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from experiments.linear_probe import check_labels, cross_validate
from experiments.spatial_structure import lds
from inputs.images import ImageSet
from inputs.prepared import open_latents
from inputs.teachers import load_encoder
from inputs.vae import FITS, same_spec, to_latent
from irepa import SiT, interpolate
from plumbing.checkpoints import open_checkpoint
from plumbing.files import mistakes, write_text
from plumbing.flags import make_parser
from plumbing.processes import pick_device
from plumbing.records import versions

PROGRAM = "experiments.hidden_states"
NEIGHBOURS = 10
BATCH = 50


def cknna(a, b, k=NEIGHBOURS):
    """Centred kernel nearest-neighbour alignment of the rows of a [N, D] and b [N, E], 1 where they agree.

    Huh et al., The Platonic Representation Hypothesis (arXiv 2405.07987, appendix A), as their code and REPA measure
    it: K[i, j] = <a_i, a_j> for rows of length 1, L of b alike, both 0 but where j is among the k nearest of i in a and
    in b, the row itself not counted; CKNNA = H(K, L) / sqrt(H(K, K) H(L, L)), in whose factors only the own neighbours
    count, with the unbiased HSIC H of Song et al. (JMLR 13, 2012, equation 5). Neighbours are not mutual, so that K is
    not symmetric: its trace(K L) has the pairs alone that are.
    """
    if len(a) != len(b) or len(a) <= k:
        raise ValueError(f"CKNNA needs as many rows of both, and more than {k}: {len(a)} and {len(b)}")
    kernels, near = [], []
    for x in (a, b):
        x = F.normalize(x.double(), dim=-1)
        kernel = x @ x.T  # (N, N)
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        chosen = kernel.masked_fill(itself, -torch.inf).topk(k, dim=1).indices
        near.append(torch.zeros_like(itself).scatter(1, chosen, True))
        kernels.append(kernel)

    def hsic(i, j):
        n, both = len(a), near[i] & near[j]
        K, L = kernels[i] * both, kernels[j] * both
        return (K * L.T).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * (K @ L).sum() / (n - 2)

    return (hsic(0, 1) / (hsic(0, 0) * hsic(1, 1)).sqrt()).item()


# ---- The tokens of a model ----


@torch.no_grad()
def hidden(model, x, t):
    """x [B, C, H, W] at time t -> (the tokens [B, T, D] behind each block, those behind the projector or None)."""
    kept = []
    hooks = [block.register_forward_hook(lambda _, inputs, out: kept.append(out)) for block in model.blocks]
    try:
        null = torch.full((len(x),), model.config.num_classes, device=x.device)
        _, h = model(x, torch.full((len(x),), t, device=x.device), null)
    finally:
        for hook in hooks:
            hook.remove()
    return kept, h


def noisy(x, numbers, t, path):
    """x [B, C, H, W] at time t, the noise of each image being its own."""
    noise = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(int(i))) for i in numbers]
    return interpolate(x, torch.stack(noise).to(x.device), torch.full((len(x),), t, device=x.device), path)[0]


def inputs_of(batch, spec, device):
    """What a model sees of a batch: pixels in [-1, 1], or the means of its latents."""
    if spec is None:
        return batch.images.to(device).float() / 127.5 - 1
    moments = batch.moments.to(device)
    return to_latent(moments, torch.zeros_like(moments.chunk(2, 1)[0]), spec)


def measure(model, spec, data, places, labels, target, t, device):
    """[{block, accuracy, cknna, lds}] of a model at time t. target: the teacher's mean tokens [N, E]."""
    means, structure = [[] for _ in model.blocks], [[] for _ in model.blocks]
    for part in np.array_split(places, -(-len(places) // BATCH)):
        x = noisy(inputs_of(data[part], spec, device), part, t, model.config.path)
        for i, tokens in enumerate(hidden(model, x, t)[0]):
            means[i].append(tokens.mean(1).cpu())
            if tokens.shape[1] >= 25:
                structure[i].append(lds(tokens).cpu())
    rows = []
    for i, found in enumerate(map(torch.cat, means)):
        right = cross_validate(found[:, None], found, labels)
        row = dict(block=i + 1, accuracy=right.mean(), cknna=cknna(found, target))
        rows.append(dict(row, lds=torch.cat(structure[i]).mean().item() if structure[i] else None))
    return rows


# ---- Table and pictures ----


def table(result):
    out = "| model | t | block | linear probe, % | CKNNA | LDS |\n|---|---|---|---|---|---|\n"
    for name, found in result["models"].items():
        for t, rows in found["at"].items():
            for row in rows:
                structure = "–" if row["lds"] is None else f"{row['lds']:.3f}"
                out += f"| {name} | {t} | {row['block']} | {row['accuracy']:.1f} | {row['cknna']:.3f} | {structure} |\n"
    accuracy, structure = result["teacher"]["accuracy"], result["teacher"]["lds"]
    structure = "–" if structure is None else f"{structure:.3f}"
    return out + f"| {result['encoder']} | 0 | | {accuracy:.1f} | 1 | {structure} |\n"


def draw_curves(result, path):
    """A column for each noise level, a row for each measure, a line for each model, a black one for the teacher."""
    measures = {"accuracy": "linear probe, %", "cknna": f"CKNNA to {result['encoder']}", "lds": "LDS"}
    levels = [*next(iter(result["models"].values()))["at"]]
    figure = Figure(figsize=(3.4 * len(levels) + 1.2, 8.3), layout="constrained")
    axes = figure.subplots(3, len(levels), sharex=True, sharey="row", squeeze=False)
    for row, (measure_, label) in zip(axes, measures.items()):
        row[0].set_ylabel(label)
        for axis, t in zip(row, levels):
            for i, (name, found) in enumerate(result["models"].items()):
                values = [r[measure_] for r in found["at"][t]]
                if None not in values:
                    axis.plot(
                        [r["block"] for r in found["at"][t]], values, f"C{i}", marker="o", markersize=3, label=name
                    )
                if found["aligned"]:
                    axis.axvline(found["aligned"], color=f"C{i}", linewidth=0.8, linestyle=":")
            if result["teacher"].get(measure_) is not None:
                axis.axhline(result["teacher"][measure_], color="black", linewidth=0.8, label=result["encoder"])
            axis.grid(alpha=0.3)
    for axis, t in zip(axes[0], levels):
        axis.set_title(f"t = {t} ({'data' if t == 0 else f'{t:.0%} noise'})")
    for axis in axes[-1]:
        axis.set_xlabel("block (dotted: aligned behind it)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, -1].legend(fontsize=8)
    figure.suptitle("the tokens behind each block, of noised images; black: the teacher's, of the images themselves")
    figure.savefig(path, dpi=110)


def draw_maps(images, columns, path):
    """images uint8 [n, 3, S, S], {title: tokens [n, T, D]} -> the cosine of the middle patch with all others."""
    figure = Figure(figsize=(1.7 * (len(columns) + 1), 1.7 * len(images) + 1.2), layout="constrained")
    for i, row in enumerate(figure.subplots(len(images), len(columns) + 1, squeeze=False)):
        row[0].imshow(images[i].permute(1, 2, 0).numpy())
        for axis, tokens in zip(row[1:], columns.values()):
            side = int(tokens.shape[1] ** 0.5)
            patch = side // 2 * side + side // 2
            x = F.normalize(tokens[i].float(), dim=-1)
            shown = axis.imshow((x @ x[patch]).reshape(side, side).numpy(), cmap="magma", vmin=-0.2, vmax=1)
            axis.plot(patch % side, patch // side, "c+", markersize=7)
        for axis, title in zip(row, ["image", *columns]):
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_title(title, fontsize=8)
    figure.colorbar(shown, ax=figure.axes, location="bottom", shrink=0.4, aspect=40).set_label(
        "cosine with the marked patch", fontsize=9
    )
    figure.savefig(path, dpi=110, bbox_inches="tight")


# ---- Command line ----


def open_models(args, device):
    """{name: (model, spec of its latents or None)}. ValueError where one is no SiT, or they do not go together."""
    models = {}
    for item in args.ckpt:
        name, given, path = item.partition("=")
        if not given or Path(item).exists():
            name, path = Path(item).parent.name or Path(item).stem, item
        if name in models:
            raise ValueError(f"--ckpt {item}: {name} is there already; write another NAME=FILE")
        model, config, _, file = open_checkpoint(path)
        if type(model) is not SiT:
            raise ValueError(f"--ckpt {path} is of another recipe: tokens and times are compared between SiTs")
        models[name] = model.to(device), file.get("latent")
    grids = {name: model.config.input_size // model.config.patch_size for name, (model, _) in models.items()}
    sides = {model.config.input_size for model, _ in models.values()}
    if len({*grids.values()}) > 1 or len(sides) > 1:
        raise ValueError(f"--ckpt: the models see images or latents of {sides} px in grids of {grids}: one at a time")
    latent = {model.config.in_channels != 3 for model, _ in models.values()}
    if latent == {True, False} or (latent == {True}) != bool(args.latents):
        raise ValueError("models of latents need --latents, models of pixels none: compare models of one kind")
    for name, (_, spec) in models.items():
        if args.latents and spec is None:
            raise ValueError(f"--ckpt {name} does not say how its latents are scaled: only this project's own do")
    return models, next(iter(grids.values())), sides.pop()


def build_parser():
    parser = make_parser(PROGRAM, __doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="[NAME=]FILE", help="the average of each is looked at")
    add("--data", required=True, metavar="PATH", help="class folders, or a .zip of them")
    add("--latents", metavar="DIR", help="a cache of theirs, for models of latents")
    add("--image-size", type=int, help="of the crops (models of pixels know it; 256)")
    add("--encoder", default="hog", help="the teacher that CKNNA compares with")
    add("--encoder-weights", metavar="FILE", help="as in train.py")
    add("--levels", nargs="+", type=float, default=[0.1, 0.4, 0.7], metavar="T", help="0 is data, 1 noise")
    add("--images", type=int, default=1000, metavar="N")
    add("--out", default="runs/hidden", metavar="DIR", help="must not exist")
    add("--device", default="auto", help="as in train.py")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    with mistakes(PROGRAM):
        if not all(0 <= t < 1 for t in args.levels) or args.images < 20:
            raise ValueError("--levels lie in [0, 1), and --images is at least 20")
        out, device = Path(args.out), pick_device(args.device)
        if out.exists():
            raise ValueError(f"--out {out} is there already, and is left as it is: name a new folder")
        models, grid, side = open_models(args, device)
        size = args.image_size or (256 if args.latents else side)
        if not args.latents and size != side:
            raise ValueError(f"--image-size {size}: these models see pixels, {side} a side")
        teacher = load_encoder(args.encoder, grid, args.encoder_weights, device)
        images = ImageSet(args.data, size)
        data = images
        if args.latents:
            specs = [spec for _, spec in models.values()]
            data = open_latents(args.latents, images, specs[0], size)
            for spec in specs:
                if data.spec:
                    same_spec(spec, data.spec, args.latents, FITS)
        places = np.sort(np.random.default_rng(0).permutation(len(data))[: args.images])
        labels = np.asarray(data.labels)[places]
        check_labels(labels, data.classes)
        out.mkdir(parents=True)
    means, structure = [], []
    for part in tqdm(np.array_split(places, -(-len(places) // BATCH)), "teacher", leave=False):
        tokens = teacher(data[part].images.to(device)).float()
        means.append(tokens.mean(1).cpu())
        structure += [lds(tokens).cpu()] if grid >= 5 else []
    target = torch.cat(means)
    known = dict(accuracy=cross_validate(target[:, None], target, labels).mean())
    known["lds"] = torch.cat(structure).mean().item() if structure else None
    result = dict(settings=vars(args), encoder=args.encoder, teacher=known, images=len(places), models={}, **versions())
    with tqdm(total=len(models) * len(args.levels), desc="models and levels") as bar:
        for name, (model, spec) in models.items():
            aligned = model.config.encoder_depth if len(model.projectors) else None
            result["models"][name] = dict(aligned=aligned, at={})
            for t in args.levels:
                found = measure(model, spec, data, places, labels, target, t, device)
                result["models"][name]["at"][t] = found
                bar.update()
    write_text(out / "results.json", json.dumps(result, indent=1) + "\n")
    write_text(out / "table.md", table(result))
    draw_curves(result, out / "curves.png")

    some = places[np.random.default_rng(1).permutation(len(places))[:4]]
    batch, t, columns = data[some], args.levels[0], {}
    for name, (model, spec) in models.items():
        kept, h = hidden(model, noisy(inputs_of(batch, spec, device), some, t, model.config.path), t)
        block = min(model.config.encoder_depth, len(kept))
        columns[f"{name}\nblock {block}"] = kept[block - 1].cpu()
        if h is not None:
            columns[f"{name}\nprojector"] = h.cpu()
    columns[args.encoder] = teacher(batch.images.to(device)).cpu()
    draw_maps(batch.images, columns, out / "similarity.png")
    print(f"{table(result)}\n{out}: results.json, table.md, curves.png, similarity.png")


if __name__ == "__main__":
    as_program(main)
