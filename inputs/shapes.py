"""Drawn shapes: a data set of ten classes that needs no download."""

import colorsys
import functools

import numpy as np
import torch

from inputs.images import Batch


class Shapes:
    """Coloured shapes on coloured ground: image i is drawn from (seed, i), its class is i modulo 10."""

    quick = True
    classes = ["circle", "square", "triangle", "star", "heart", "ring", "cross", "crescent", "arrow", "bar"]

    def __init__(self, size, count, seed=0):
        self.size, self.seed, self.labels = size, seed, np.arange(count) % len(self.classes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, indices):
        images = np.stack([draw_shape(int(i) % len(self.classes), self.size, (self.seed, int(i))) for i in indices])
        images, labels, numbers = map(torch.from_numpy, (images, self.labels[indices], np.array(indices)))
        return Batch(images.permute(0, 3, 1, 2), labels, numbers=numbers)


@functools.cache
def draw_shape(label, size, seed):
    """uint8 [size, size, 3]: one shape with random colours, place, size and rotation, its edge a pixel wide."""
    rng = np.random.default_rng(seed)
    radius = rng.uniform(0.7, 0.95)  # of half the image
    centre = rng.uniform(-1, 1, 2) * (1 - radius)
    turn = rng.uniform(-0.25, 0.25)
    paint = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 1), rng.uniform(0.85, 1))  # bright
    ground = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 1), rng.uniform(0, 0.35))  # on dark
    ground, paint = np.array(ground), np.array(paint)
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    distance = signed_distance(Shapes.classes[label], x / radius, y / radius) * radius
    inside = np.clip(0.5 - distance * size / 2, 0, 1)[..., None]
    return ((ground + (paint - ground) * inside) * 255).round().astype(np.uint8)


def signed_distance(shape, x, y):
    """Distance to the edge of a shape within the unit circle, negative inside (arrays like x)."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.9
    if shape == "ring":
        return np.abs(r - 0.72) - 0.2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.7
    if shape == "bar":
        return np.maximum(np.abs(x) - 1, np.abs(y) - 0.25)
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - 0.95, short - 0.33)
    if shape == "crescent":
        return np.maximum(r - 0.95, 0.75 - np.hypot(x - 0.5, y))
    if shape == "star":
        turns = np.arange(10) * np.pi / 5
        points = np.where(np.arange(10) % 2, 0.5, 1.05)
        return polygon(x, y, points * np.sin(turns), -points * np.cos(turns))
    if shape == "triangle":
        turns = np.arange(3) * 2 * np.pi / 3
        return polygon(x, y, np.sin(turns), -np.cos(turns))
    if shape == "arrow":
        head = polygon(x, y, np.array([0.0, 0.75, -0.75]), np.array([-1.0, -0.05, -0.05]))
        return np.minimum(head, np.maximum(np.abs(x) - 0.25, np.abs(y - 0.45) - 0.55))
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)  # heart
    hx = 16 * np.sin(t) ** 3
    hy = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return polygon(x, y, hx / 16.5, -hy / 16.5)


def polygon(x, y, px, py):
    """Signed distance to a closed polygon with corners (px, py)."""
    qx, qy = np.roll(px, -1), np.roll(py, -1)
    ex, ey = qx - px, qy - py
    wx, wy = x[..., None] - px, y[..., None] - py
    along = np.clip((wx * ex + wy * ey) / (ex**2 + ey**2), 0, 1)
    distance = np.hypot(wx - along * ex, wy - along * ey).min(-1)
    crosses = ((py > y[..., None]) != (qy > y[..., None])) & (ex * wy / np.where(ey == 0, 1, ey) > wx)
    return np.where(crosses.sum(-1) % 2, -distance, distance)
