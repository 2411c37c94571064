"""Teachers: frozen encoders whose patch tokens the transformer is aligned with.

load_encoder(name, grid) -> teacher; teacher(images uint8 [B, 3, H, W]) -> tokens [B, grid*grid, teacher.dim], raw:
the spatial norm is the method's, not the teacher's. Names: hog (no weights), dinov2_vitb14, timm:<any ViT of timm>.
"""

import os

import torch
import torch.nn as nn
import torch.nn.functional as F

TIMM = {"dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m"}


def load_encoder(name, grid, weights=None, device="cpu"):
    """The teacher `name` for a grid x grid token map, in eval mode, without gradients.

    weights: a local file in timm's or the original layout, None to let timm download, or "random" (tests only).
    ValueError for an unknown name, a grid that the teacher cannot match, or weights that do not fit.
    """
    if name == "hog":
        if weights:
            raise ValueError("--encoder hog has no weights: leave --encoder-weights out")
        return Hog(grid).to(device)
    if name not in TIMM and not name.startswith("timm:"):
        raise ValueError(f"unknown encoder {name!r}; there are hog, {', '.join(TIMM)} and timm:<any ViT id of timm>")
    return TimmViT(TIMM.get(name, name.removeprefix("timm:")), grid, weights, device)


class Hog(nn.Module):
    """Histograms of oriented gradients (Dalal and Triggs, 2005): 8 directions, cells of 2x2 pixels, blocks of 4x4
    cells normalised by L2-Hys, each block scaled to length 1, then the block map resized to the grid."""

    dim, bins, cell, block = 128, 8, 2, 4

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    @torch.no_grad()
    def forward(self, images):
        side = min(images.shape[-2:])
        if side < self.cell * self.block:
            raise ValueError(f"hog needs images of at least {self.cell * self.block} px, not {side}")
        r, g, b = images.float().div(255).unbind(1)
        gray = 0.2126 * r + 0.7152 * g + 0.0722 * b  # (B, H, W)
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
        return tokens.flatten(1, 2)  # (B, T, 128)


def l2(x, eps=1e-5):
    return x / (x.square().sum(-1, keepdim=True) + eps**2).sqrt()


def bilinear(size, grid, device):
    """Where each of `grid` points lies between the `size` samples of an axis (half-pixel centres): low, high, share."""
    place = ((torch.arange(grid, device=device) + 0.5) * (size / grid) - 0.5).clamp(0, size - 1)
    low = place.long()
    return low, (low + 1).clamp(max=size - 1), place - low


class TimmViT(nn.Module):
    """A ViT of timm: its patch tokens after the final norm, without class token and registers.

    Images are normalised with the model's own mean and std and resized, without antialiasing as in the released
    code, so that its token grid equals ours; timm resamples the position table to that grid when it loads.
    """

    def __init__(self, timm_id, grid, weights, device):
        super().__init__()
        import timm  # late: 1.5 s that other teachers need not wait for

        if not timm.is_model(timm_id):
            near = ", ".join(timm.list_models(f"*{timm_id.split('.')[0]}*")[:5])
            raise ValueError(f"timm knows no model {timm_id!r}" + (f"; it has {near}" if near else ""))
        if "vit_pe_" in timm_id:
            raise ValueError(f"{timm_id}: away from its native size timm turns its rotary positions differently")
        with torch.device("meta"):
            probe = timm.create_model(timm_id)
        if not hasattr(probe, "num_prefix_tokens") or not hasattr(probe, "patch_embed"):
            raise ValueError(f"{timm_id} is not a ViT with patch tokens")
        side = grid * probe.patch_embed.patch_size[0]
        self.cfg, self.dim, self.side, self.grid = probe.pretrained_cfg, probe.num_features, side, grid
        # num_classes stays as in the model's own config: with another, timm loads without strict, and a file
        # that fits nowhere would load nothing and say nothing
        make = dict(img_size=side, pretrained=weights != "random")
        if weights not in (None, "random"):
            if not os.path.isfile(weights):
                raise FileNotFoundError(f"--encoder-weights {weights}: there is no such file")
            make["pretrained_cfg_overlay"] = dict(file=weights, custom_load=False)
        try:
            model = timm.create_model(timm_id, **make)
        except TypeError as e:
            raise ValueError(f"{timm_id} takes no other image size ({e}); choose another ViT") from e
        except Exception as e:  # network, hub, pickle and shape errors have no common class
            source = weights or self.cfg.get("url") or f"https://huggingface.co/{self.cfg.get('hf_hub_id')}"
            problem = (
                "does not fit the model" if weights else "cannot be downloaded: fetch it, then --encoder-weights FILE"
            )
            raise ValueError(f"{timm_id}: {source} {problem} ({str(e).strip().splitlines()[0][:300]})") from e
        model.reset_classifier(0)
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.model.to(torch.bfloat16)
        self.register_buffer("mean", torch.tensor(self.cfg["mean"], device=device).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.cfg["std"], device=device).view(3, 1, 1), persistent=False)
        got = self(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)).shape[1]
        if got != grid**2:
            raise ValueError(f"{timm_id} gives {got} tokens at {side} px, the model has {grid}x{grid}")

    @torch.no_grad()
    def forward(self, images):
        x = (images.float() / 255 - self.mean) / self.std
        if x.shape[-1] != self.side:
            mode = self.cfg["interpolation"]
            x = F.interpolate(x, (self.side, self.side), mode=mode, align_corners=False)  # (B, 3, g*p, g*p)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device)):
            tokens = self.model.forward_features(x.to(self.model.patch_embed.proj.weight.dtype))
        return tokens[:, self.model.num_prefix_tokens :].float()  # (B, T, dim)


def fast_bf16(device):
    """Whether bf16 is worth having: on GPUs, and on CPUs with instructions for it (others are 100 times slower)."""
    if torch.device(device).type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
