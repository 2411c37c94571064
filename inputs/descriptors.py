"""Teachers made by hand, without weights: HOG and dense SIFT. images uint8 [B, 3, H, W] -> tokens [B, grid^2, 128]."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def towards(tokens, whole, weight):
    """Tokens [B, T, D] moved towards one for the whole image, [B, 1, D], by default their mean; weight in [0, 1]."""
    if not weight:
        return tokens
    return tokens * (1 - weight) + (tokens.mean(1, keepdim=True) if whole is None else whole) * weight


class Hog(nn.Module):
    """Histograms of oriented gradients (Dalal and Triggs, 2005): 8 directions, cells of 2x2 pixels, blocks of 4x4
    cells normalised by L2-Hys, each block scaled to length 1, then the block map resized to the grid."""

    dim, bins, cell, block = 128, 8, 2, 4

    def __init__(self, grid, cls_weight=0.0):
        super().__init__()
        self.grid, self.cls_weight = grid, cls_weight

    @torch.no_grad()
    def forward(self, images):
        side = min(images.shape[-2:])
        if side < self.cell * self.block:
            raise ValueError(f"hog needs images of at least {self.cell * self.block} px, not {side}")
        gray = luminance(images)  # (B, H, W)
        dx, dy = torch.zeros_like(gray), torch.zeros_like(gray)
        dx[:, :, 1:-1] = gray[:, :, 2:] - gray[:, :, :-2]
        dy[:, 1:-1] = gray[:, 2:] - gray[:, :-2]
        angle = torch.atan2(dy, dx).mul(180 / torch.pi) % 180  # a gradient and its opposite are one direction
        bins = (angle * (self.bins / 180)).long().clamp(max=self.bins - 1)
        votes = torch.zeros(len(gray), self.bins, *gray.shape[1:], device=gray.device)
        votes.scatter_(1, bins[:, None], torch.hypot(dx, dy)[:, None])
        cells = F.avg_pool2d(votes, self.cell)  # (B, 8, H/2, W/2)
        blocks = cells.unfold(2, self.block, 1).unfold(3, self.block, 1)  # (B, 8, h, w, 4, 4), a view
        # bilinear resize to the grid, touching only the blocks that it needs: all of them are 2 MB an image at 256 px
        for axis in (2, 3):
            low, high, share = bilinear(blocks.shape[axis], self.grid, gray.device)
            if axis == 2:
                rows, row_share = torch.stack([low, high]), share
            else:
                columns, column_share = torch.stack([low, high]), share
        corners = blocks[:, :, rows[:, None, :, None], columns[None, :, None, :]]  # (B, 8, 2, 2, g, g, 4, 4)
        corners = corners.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(5)  # (B, 2, 2, g, g, 128)
        corners = l2(l2(corners).clamp(max=0.2))  # L2-Hys
        corners = F.normalize(corners, dim=-1)
        corners = torch.lerp(corners[:, 0], corners[:, 1], row_share[:, None, None])
        tokens = torch.lerp(corners[:, 0], corners[:, 1], column_share[:, None])  # (B, g, g, 128)
        return towards(tokens.flatten(1, 2), None, self.cls_weight)  # (B, T, 128)


def luminance(images):
    """uint8 [B, 3, H, W] -> [B, H, W] in [0, 1]."""
    r, g, b = images.float().div(255).unbind(1)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def l2(x, eps=1e-5):
    return x / (x.square().sum(-1, keepdim=True) + eps**2).sqrt()


def bilinear(size, grid, device):
    """Where each of `grid` points lies between the `size` samples of an axis (half-pixel centres): low, high, share."""
    place = ((torch.arange(grid, device=device) + 0.5) * (size / grid) - 0.5).clamp(0, size - 1)
    low = place.long()
    return low, (low + 1).clamp(max=size - 1), place - low


class Sift(nn.Module):
    """Dense SIFT (Lowe, 2004): at each place of the grid an upright descriptor of 4x4 cells and 8 directions.

    A descriptor covers twice the grid's spacing, which is 32x32 pixels at 256 px as in the released code; that one
    turns each to its dominant direction, here all stay upright. Gaussian window, clipped at 0.2, length 1.
    """

    dim, bins, cells = 128, 8, 4

    def __init__(self, grid, cls_weight=0.0):
        super().__init__()
        self.grid, self.cls_weight = grid, cls_weight

    @torch.no_grad()
    def forward(self, images):
        side = min(images.shape[-2:])
        cell = side / self.grid / 2  # pixels
        if cell < 1:
            raise ValueError(f"sift needs two pixels for each token, and has {side} for {self.grid}")
        gray = F.pad(luminance(images), (1, 1, 1, 1), mode="replicate")  # (B, H+2, W+2)
        dx, dy = gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2], gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1]
        # between two bins, the last and first too
        place = torch.atan2(dy, dx) * (self.bins / (2 * torch.pi)) % self.bins
        low = place.floor()
        votes = torch.zeros(len(gray), self.bins, *dx.shape[1:], device=gray.device)
        for n, weight in ((low, 1 + low - place), (low + 1, place - low)):
            votes.scatter_add_(1, (n % self.bins).long()[:, None], (weight * torch.hypot(dx, dy))[:, None])
        reach = math.ceil(cell) - 1  # each pixel votes for the cells on both sides of it, in proportion
        tent = (1 - torch.arange(-reach, reach + 1, device=gray.device).abs() / cell).view(1, 1, 1, -1)
        votes = F.conv2d(votes.flatten(0, 1)[:, None], tent, padding=(0, reach))
        votes = F.conv2d(votes, tent.transpose(2, 3), padding=(reach, 0)).view(-1, self.bins, *dx.shape[1:])
        offset = torch.arange(self.cells, device=gray.device) - (self.cells - 1) / 2  # -1.5 ... 1.5
        centre = (torch.arange(self.grid, device=gray.device) + 0.5) * 2 / self.grid - 1
        axis = (centre[:, None] + offset / self.grid).flatten()  # (grid * 4,) in [-1, 1]
        points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).expand(len(gray), -1, -1, -1)
        cells = F.grid_sample(votes, points, align_corners=False)  # (B, 8, grid*4, grid*4), zero outside the image
        cells = cells.unflatten(3, (self.grid, 4)).unflatten(2, (self.grid, 4))  # (B, 8, g, 4, g, 4)
        window = torch.exp(-((offset / 2) ** 2) / 2)
        cells = cells * window.view(4, 1, 1) * window
        tokens = l2(cells.permute(0, 2, 4, 3, 5, 1).flatten(3)).clamp(max=0.2)  # (B, g, g, 128)
        return towards(F.normalize(tokens, dim=-1).flatten(1, 2), None, self.cls_weight)  # (B, T, 128)
