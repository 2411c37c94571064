"""The pictures of spatial_structure.py: one patch's cosine with all others, and the tokens' principal components."""

import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.token_sources import GRID
from irepa import Config, spatial_norm


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
                x = F.normalize(x[0].float(), dim=-1)
                cosine = (x @ x[patch]).reshape(GRID, GRID)
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
