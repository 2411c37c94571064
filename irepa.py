"""iREPA: what matters for representation alignment is spatial structure (arXiv 2512.10794), on one page.

A diffusion transformer (SiT, arXiv 2401.08740) learns the velocity of a path from data to noise. REPA (arXiv
2410.06940) also asks the tokens after one of its blocks to agree with the patch tokens of a frozen vision encoder,
the teacher. iREPA changes two lines of that:

    projector: Conv2d(D, encoder_dim, 3, padding=1) over the token grid        instead of an MLP on each token
    target:    (z - gamma * mean_tokens z) / std_tokens z                      instead of z

This file is the whole method: Config, the network, the two changes, the path and the loss. Time runs from t = 0
(data) to t = 1 (noise) throughout. Shapes: B images, C channels, H = W = input_size, p = patch_size,
T = (H/p)^2 tokens in row-major order, D = hidden_size.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

# name: (depth, width, heads, block after which the alignment sits); DiT's sizes, REPA's depths
SIZES = {"S": (12, 384, 6, 4), "B": (12, 768, 12, 4), "L": (24, 1024, 16, 8), "XL": (28, 1152, 16, 8)}
PATCHES = (1, 2, 4, 8)


@dataclass
class Config:
    """Everything that defines the network and its loss. The defaults are SiT-XL/2 with iREPA on 256-px latents."""

    input_size: int = 32  # side of what the network sees: pixels, or latents (256-px images: 32)
    patch_size: int = 2
    in_channels: int = 4  # 3 for pixels, 4 for SD-VAE latents
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    num_classes: int = 1000  # the label num_classes is the null class
    class_dropout: float = 0.1  # share of labels replaced by the null class in training, for guidance
    qk_norm: bool = False
    path: str = "linear"  # or "cosine"
    encoder_dim: int = 768  # channels of the teacher's tokens
    encoder_depth: int = 8  # the alignment sits after this many blocks
    projector: str | None = "conv"  # "conv" (iREPA), "mlp" (REPA), "linear", or None: no alignment
    kernel_size: int = 3  # of the conv projector
    projector_dim: int = 2048  # hidden width of the mlp projector
    gamma: float | None = 0.6  # of the spatial norm; None: the teacher's tokens as they are
    proj_coeff: float = 1.0  # weight of the alignment in the loss

    def __post_init__(self):
        check_network(self)
        check(
            self.hidden_size % self.num_heads == 0 and self.hidden_size % 4 == 0,
            f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} and of 4",
        )
        check(self.path in ("linear", "cosine"), f"path is 'linear' or 'cosine', not {self.path!r}")

    @classmethod
    def named(cls, name, **overrides):
        """Config.named("SiT-B/2", num_classes=10): S, B, L, XL with patch 1, 2, 4, 8; any field can be overridden.

        The alignment sits after block 4 (S, B) or 8 (L, XL), never deeper than an overridden depth.
        ValueError, with the list of what there is, for a name or a field that does not exist.
        """
        (depth, width, heads, encoder_depth), patch = look_up(cls, "SiT", SIZES, PATCHES, name, overrides)
        settings = dict(patch_size=patch, depth=depth, hidden_size=width, num_heads=heads)
        settings["encoder_depth"] = min(encoder_depth, overrides.get("depth", depth))
        return cls(**{**settings, **overrides})


def check(ok, message):
    if not ok:
        raise ValueError(message)


def check_network(c):
    """What a Config of any transformer on patches must keep to, JiT's too."""
    positive = "input_size patch_size in_channels hidden_size depth num_heads num_classes kernel_size projector_dim"
    for name in positive.split():
        check(getattr(c, name) > 0, f"{name} must be positive, not {getattr(c, name)}")
    check(c.input_size % c.patch_size == 0, f"input_size {c.input_size} is not a multiple of patch_size {c.patch_size}")
    check(
        c.projector in ("conv", "mlp", "linear", None),
        f"projector is 'conv', 'mlp', 'linear' or None, not {c.projector!r}",
    )
    check(
        c.projector is None or 1 <= c.encoder_depth <= c.depth,
        f"encoder_depth {c.encoder_depth} is not among the {c.depth} blocks",
    )
    check(c.kernel_size % 2 == 1, f"kernel_size {c.kernel_size} must be odd, to keep the token grid")


def look_up(cls, family, sizes, patches, name, overrides):
    """-> the row of `sizes` and the patch size that `name`, as "SiT-B/2", asks for; ValueError as in Config.named."""
    size, _, patch = name.removeprefix(f"{family}-").partition("/")
    if not name.startswith(f"{family}-") or size not in sizes or patch not in map(str, patches):
        names = " ".join(f"{family}-{s}/{p}" for s in sizes for p in patches)
        raise ValueError(f"unknown model {name!r}; there are {names}")
    known = [f.name for f in fields(cls)]
    for field in overrides:
        if field not in known:
            raise ValueError(f"unknown field {field!r} of Config; there are {' '.join(known)}")
    return sizes[size], int(patch)


# ---------------------------------------------------------------------------------------------------------------
# The two changes of iREPA


class Projector(nn.Module):
    """From the transformer's tokens to the teacher's: [B, T, D] -> [B, T, encoder_dim]. iREPA is kind 'conv'."""

    def __init__(self, kind, dim, encoder_dim, kernel_size=3, projector_dim=2048):
        super().__init__()
        if kind == "conv":
            self.projection_layer = nn.Conv2d(dim, encoder_dim, kernel_size, padding=kernel_size // 2)
        elif kind == "linear":
            self.projection_layer = nn.Linear(dim, encoder_dim)
        else:  # REPA's: three layers on each token alone
            hidden = projector_dim
            self.projection_layer = nn.Sequential(
                nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, encoder_dim)
            )

    def forward(self, x):
        if not isinstance(self.projection_layer, nn.Conv2d):
            return self.projection_layer(x)  # (B, T, encoder_dim)
        side = math.isqrt(x.shape[1])
        x = x.transpose(1, 2).unflatten(2, (side, side))  # (B, D, h, w)
        return self.projection_layer(x).flatten(2).transpose(1, 2)  # (B, T, encoder_dim)


def spatial_norm(z, gamma, eps=1e-6):
    """Spatial normalisation of the teacher's tokens, [B, T, D] -> float32 [B, T, D] (iREPA, section 4).

    Over the tokens of one image, for each channel: remove a share gamma of the mean, which is the global information,
    and divide by the standard deviation (unbiased), which brings out the contrast between places.
    """
    z = z.float()  # a std in bfloat16 loses the digits that matter
    return (z - gamma * z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + eps)


# ---------------------------------------------------------------------------------------------------------------
# The network: SiT, in the layout and with the state-dict names of the released checkpoints


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, T, D)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        half = self.frequencies // 2
        omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t.float()[:, None] * omega  # (B, 128): float32 always, and t is not multiplied by 1000
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))  # (B, D)


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)  # the last row is the null class

    def forward(self, y):
        return self.embedding_table(y)  # (B, D)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, D/heads) each
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, T, D)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block whose layer norms are shifted, scaled and gated by the condition (adaLN-Zero, DiT)."""

    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (B, T, D)


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, T, p*p*C)


def position_table(dim, side):
    """Fixed 2-D sin-cos table [1, side*side, dim]: first half from the column, second from the row (as in MAE)."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, dim/2)
    column, row = axis.expand(side, side, -1), axis[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(1, side * side, dim).float()


def xavier(module):
    """Initialise a Linear as DiT does; a conv projector keeps PyTorch's own."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class SiT(nn.Module):
    """x [B, C, H, W], t [B] in [0, 1], y [B] int -> velocity like x, projected tokens [B, T, encoder_dim] or None."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        side = c.input_size // c.patch_size
        self.x_embedder = PatchEmbed(c.patch_size, c.in_channels, c.hidden_size)
        self.t_embedder = TimestepEmbedder(c.hidden_size)
        self.y_embedder = LabelEmbedder(c.num_classes, c.hidden_size)
        # a parameter without gradient, not a buffer: the released state dicts and counts have it so
        self.pos_embed = nn.Parameter(position_table(c.hidden_size, side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(c.hidden_size, c.num_heads, c.qk_norm) for _ in range(c.depth))
        self.projectors = nn.ModuleList()
        self.final_layer = FinalLayer(c.hidden_size, c.patch_size**2 * c.in_channels)
        self.initialize()
        if c.projector:  # last, so that a seed gives the same trunk whatever the projector
            self.projectors.append(Projector(c.projector, c.hidden_size, c.encoder_dim, c.kernel_size, c.projector_dim))
            self.projectors.apply(xavier)

    def initialize(self):
        """Every initialisation of the trunk. Zero gates and a zero last layer: a new model outputs exactly 0."""
        self.apply(xavier)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a patch embedding is a Linear of a patch
        nn.init.zeros_(self.x_embedder.proj.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, x):
        """[B, T, p*p*C] -> [B, C, H, W]; a token holds its patch as (row, column, channel)."""
        p, side = self.config.patch_size, math.isqrt(x.shape[1])
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (B, h, w, p, q, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        z = None
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, c)  # (B, T, D)
            if i == self.config.encoder_depth and len(self.projectors):
                z = self.projectors[0](x)  # (B, T, encoder_dim)
        x = self.final_layer(x, c)  # (B, T, p*p*C)
        return self.unpatchify(x), z


# ---------------------------------------------------------------------------------------------------------------
# The path from data to noise, and the loss


def path_coefficients(t, path="linear"):
    """alpha, sigma and their derivatives at t: x_t = alpha x + sigma noise (SiT, section 2)."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    angle = t * math.pi / 2
    return angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()


def interpolate(x, noise, t, path="linear"):
    """x, noise [B, ...] and t [B] -> the point x_t on the path and its time derivative, the target velocity."""
    t = t.reshape(-1, *[1] * (x.dim() - 1))
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def alignment_loss(z, target):
    """Minus the mean cosine between the projected tokens and the teacher's, both [B, T, D] (REPA, eq. 8)."""
    return -F.cosine_similarity(z.float(), target.float(), dim=-1).mean()


def draws(x, generator=None, part=(0, 1)):
    """-> draw(sample, *shape): torch.rand's or torch.randn's numbers for each image of x, [len(x), *shape], beside x.

    They come from `generator`, on its device. part = (i, n) says that x is the i-th of n equal parts of a batch: the
    draws are those of the whole batch, so that n ranks, or n accumulated parts, train as one.
    """
    (i, n), size = part, len(x)
    device = generator.device if generator is not None else x.device

    def draw(sample, *shape):
        whole = sample(n * size, *shape, generator=generator, device=device)
        return whole[i * size : (i + 1) * size].to(x.device)

    return draw


def with_alignment(denoise, z, target, config):
    """denoise + proj_coeff * alignment (REPA, eq. 9), as a dict of scalars: loss, denoise, align.

    z [B, T, encoder_dim] projected tokens, target the teacher's raw ones, to which the spatial norm is applied here.
    """
    if not config.projector:
        return dict(loss=denoise, denoise=denoise, align=torch.zeros_like(denoise))
    if target is None or target.shape[1] != z.shape[1]:
        got = None if target is None else list(target.shape)
        raise ValueError(f"the model has {config.input_size // config.patch_size}^2 tokens, the teacher's are {got}")
    if config.gamma is not None:
        target = spatial_norm(target, config.gamma)
    align = alignment_loss(z, target)
    return dict(loss=denoise + config.proj_coeff * align, denoise=denoise, align=align)


def irepa_loss(model, x, y, target, config, generator=None, part=(0, 1)):
    """Denoising + proj_coeff * alignment (REPA, eq. 9), as a dict of scalars: loss, denoise, align.

    x [B, C, H, W] clean images in [-1, 1] or scaled latents, y [B] labels, target [B, T, encoder_dim] the teacher's
    raw tokens (ignored without projector). generator and part, as in draws, give the times, noise and label drops.
    """
    draw = draws(x, generator, part)
    t, noise = draw(torch.rand), draw(torch.randn, *x.shape[1:])
    if model.training:
        y = torch.where(draw(torch.rand) < config.class_dropout, config.num_classes, y)
    x_t, velocity = interpolate(x, noise, t, config.path)
    v, z = model(x_t, t, y)
    return with_alignment((v.float() - velocity).square().mean(), z, target, config)
