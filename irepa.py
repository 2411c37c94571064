"""iREPA: what matters for representation alignment is spatial structure (arXiv 2512.10794), on one page.

A diffusion transformer (SiT, arXiv 2401.08740) learns the velocity of a path from data to noise. REPA (arXiv
2410.06940) also asks the tokens after one of its blocks to agree with the patch tokens of a frozen vision encoder,
the teacher. iREPA changes the projector and the target, and gives their agreement twice REPA's weight:

    h = Conv2d(D, encoder_dim, 3, padding=1)(tokens, on their grid)            instead of an MLP on each token
    target = (z - gamma * mean_tokens z) / std_tokens z                        instead of z
    loss = denoising + 1.0 * alignment(h, target)                              instead of 0.5

Time runs from t = 0 (data) to t = 1 (noise): x is data, x_t on its path. z are the teacher's tokens, h the projected
ones. Shapes: B images, C channels, H = W = input_size, p = patch_size, T = (H/p)^2 tokens by rows, D = hidden_size.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, fields
from zlib import crc32

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- The two changes of iREPA ----

# Config's defaults are iREPA; REPA is this instead
REPA = dict(projector="mlp", gamma=None, proj_coeff=0.5)


class Projector(nn.Module):
    """From the transformer's tokens to the teacher's: [B, T, D] -> [B, T, encoder_dim]. iREPA's is "conv"."""

    def __init__(self, config):
        super().__init__()
        dim, width, out, kernel = config.hidden_size, config.projector_dim, config.encoder_dim, config.kernel_size
        if config.projector == "conv":
            self.projection_layer = nn.Conv2d(dim, out, kernel, padding=kernel // 2)
        elif config.projector == "linear":
            self.projection_layer = nn.Linear(dim, out)
        else:  # "mlp", REPA's: three layers on each token alone
            self.projection_layer = nn.Sequential(
                nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out)
            )

    def forward(self, x):
        if not isinstance(self.projection_layer, nn.Conv2d):
            return self.projection_layer(x)  # (B, T, encoder_dim)
        side = math.isqrt(x.shape[1])
        x = x.transpose(1, 2).unflatten(2, (side, side))  # (B, D, side, side)
        return self.projection_layer(x).flatten(2).transpose(1, 2)  # (B, T, encoder_dim)


def spatial_norm(z, gamma, eps=1e-6):
    """Spatial normalisation of the teacher's tokens, [B, T, encoder_dim] -> float32 of that shape (iREPA, section 4).

    Over the tokens of one image, for each channel: remove a share gamma of the mean, which is the global information,
    and divide by the standard deviation (unbiased), which brings out the contrast between places.
    """
    z = z.float()  # a std in bfloat16 loses the digits that matter
    return (z - gamma * z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + eps)


def alignment_loss(h, target):
    """Minus the mean cosine between projected tokens and the teacher's, both [B, T, encoder_dim] (REPA, eq. 8)."""
    return -F.cosine_similarity(h.float(), target.float(), dim=-1).mean()


# ---- The path from data to noise, and the loss ----


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


def stream(purpose, seed, index=0, device="cpu"):
    """The generator of one step, image or label: an index counts on from a hash of the rest, so that no two collide."""
    return torch.Generator(device).manual_seed((crc32(f"{purpose} {seed}".encode()) + index) % 2**32)


def draws(x, generator=None, part=(0, 1)):
    """-> draw(sample, *shape): torch.rand's or torch.randn's numbers for each image of x, [len(x), *shape], beside x.

    They come from `generator`, on its device. part = (i, n) says that x is the i-th of n equal parts of a batch: the
    draws are those of the whole batch: n ranks or parts, each with a generator of the same state, train as one.
    """
    (i, n), size = part, len(x)
    device = generator.device if generator is not None else x.device

    def draw(sample, *shape):
        whole = sample(n * size, *shape, generator=generator, device=device)
        return whole[i * size : (i + 1) * size].to(x.device)

    return draw


def training_draws(model, x, y, config, generator=None, part=(0, 1), times=lambda draw: draw(torch.rand)):
    """A loss's random numbers, in this order -> t = times(draw), [B], noise like x, y [B], in training with drops."""
    draw = draws(x, generator, part)
    t, noise = times(draw), draw(torch.randn, *x.shape[1:])
    if model.training:
        y = torch.where(draw(torch.rand) < config.class_dropout, config.num_classes, y)
    return t, noise, y


def with_alignment(denoise, h, z, config):
    """denoise + proj_coeff * alignment (REPA, eq. 9), as a dict of scalars: loss, denoise, align.

    h [B, T, encoder_dim] projected tokens, z the teacher's raw ones, whose spatial norm is taken here.
    """
    if h is None:  # a model without projector
        return dict(loss=denoise, denoise=denoise, align=torch.zeros_like(denoise))
    found, side = None if z is None else list(z.shape), math.isqrt(h.shape[1])
    check(found and found[1] == h.shape[1], f"the model has {side}^2 tokens, the teacher's are {found}")
    target = z if config.gamma is None else spatial_norm(z, config.gamma)
    align = alignment_loss(h, target)
    return dict(loss=denoise + config.proj_coeff * align, denoise=denoise, align=align)


def irepa_loss(model, x, y, target, config, generator=None, part=(0, 1)):
    """The loss of a step, as a dict of scalars: loss, denoise, align. Its random numbers: see training_draws.

    x [B, C, H, W] clean images in [-1, 1] or scaled latents, y [B] labels, target [B, T, encoder_dim] the teacher's
    raw tokens z (ignored without projector).
    """
    t, noise, y = training_draws(model, x, y, config, generator, part)
    x_t, velocity = interpolate(x, noise, t, config.path)
    v, h = model(x_t, t, y)
    return with_alignment((v.float() - velocity).square().mean(), h, target, config)


# ---- The samplers, which go back along the path ----


class guided:
    """velocity(x, t) of `model` for labels y [B], with classifier-free guidance where interval[0] <= t <= interval[1].

    v = v_null + scale * (v_y - v_null). Scale 1 is exactly the conditional model, at one forward an evaluation.
    """

    def __init__(self, model, y, scale=1.0, interval=(0.0, 1.0)):
        self.model, self.y, self.scale, self.interval = model, y, scale, interval

    def __call__(self, x, t, start=None):
        """x [B, C, H, W], t a number -> the velocity, like x. start: the time whose place in the interval counts."""
        dtype, (low, high) = next(self.model.parameters()).dtype, self.interval
        x_in, times = x.to(dtype), torch.as_tensor(t).to(x.device, dtype).expand(len(x))
        if self.scale == 1 or not low <= float(t if start is None else start) <= high:
            return self.model(x_in, times, self.y)[0].to(x.dtype)
        labels = torch.cat([self.y, torch.full_like(self.y, self.model.config.num_classes)])
        v, v_null = self.model(x_in.repeat(2, 1, 1, 1), times.repeat(2), labels)[0].to(x.dtype).chunk(2)
        return v_null + self.scale * (v - v_null)


def precise(noise):
    return noise.to(torch.float32 if noise.device.type == "mps" else torch.float64)  # MPS has no float64


@torch.no_grad()
def sample_ode(velocity, noise, steps, heun=False):
    """Integrate dx/dt = velocity(x, t) from t = 1 (noise, [B, ...]) to 0 in equal steps of Euler's or Heun's.

    t is a 0-dim float64 tensor on the CPU. The state is float64 (see precise); the result has the dtype of `noise`.
    """
    x, times = precise(noise), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, t_next in zip(times[:-1], times[1:]):
        slope = velocity(x, t)
        if heun and t_next > 0:  # the last step stays Euler, as in the released sampler
            # and guidance is on or off for a whole step, by the time at its start
            kept = dict(start=t) if isinstance(velocity, guided) else {}
            slope = (slope + velocity(x + (t_next - t) * slope, t_next, **kept)) / 2
        x = x + (t_next - t) * slope
    return x.to(noise.dtype)


@torch.no_grad()
def sample_sde(velocity, noise, steps, generator, last_step=0.04, path="linear"):
    """Euler-Maruyama for the reverse SDE with the velocity's marginals and diffusion w(t) = 2t (SiT, section 2.3).

    t goes from 1 to `last_step` in steps-1 equal steps, then to 0 in one without noise. `generator` is one
    torch.Generator, or a list of one for each image: then an image does not depend on its batch.
    """
    x = precise(noise)
    times = torch.cat([torch.linspace(1, last_step, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    for t, t_next in zip(times[:-1], times[1:]):
        v = velocity(x, t)
        alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
        # given x, the expected data X and noise E solve x = alpha X + sigma E, v = alpha' X + sigma' E: with the ratio
        # alpha / alpha', E = (ratio v - x) / (ratio sigma' - sigma). The score of the density of x is -E / sigma
        ratio = alpha / d_alpha
        score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
        w, dt = 2 * t, t_next - t
        x = x + (v - w / 2 * score) * dt
        if t_next > 0:
            x = x + torch.sqrt(w * -dt) * randn(noise.shape, generator, noise.device)
    return x.to(noise.dtype)


def randn(shape, generator, device):
    """Normal draws; from a list of generators, one image from each."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator]).to(device)
    return torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)


@dataclass
class Sampling:
    """How samples are drawn. The defaults are the protocol of the reported numbers."""

    sampler: str = "sde"  # sde, euler or heun
    steps: int = 250  # steps from noise to image
    cfg: float = 1.0  # guidance scale; 1 is none
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # guide for t in [LO, HI]

    def __post_init__(self):
        check(self.sampler in ("sde", "euler", "heun"), f"sampler is sde, euler or heun, not {self.sampler}")


def solve(model, y, noise, generators, how):
    """noise [n, C, H, W], labels y [n], a generator for each image, how (Sampling) -> x like noise."""
    velocity = guided(model, y, how.cfg, how.cfg_interval)
    if how.sampler == "sde":
        return sample_sde(velocity, noise, how.steps, generators, path=model.config.path)
    return sample_ode(velocity, noise, how.steps, heun=how.sampler == "heun")


# ---- The network: SiT, in the layout and with the state-dict names of the released checkpoints ----


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def layers(**named):
    """One after the other, under the names of the released state dicts."""
    return nn.Sequential(OrderedDict(named))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, T, D)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        omega = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angle = t.float()[:, None] * omega  # (B, 128): float32 always, and t is not multiplied by 1000
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))  # (B, D)


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


class Block(nn.Module):
    """A transformer block: the condition shifts and scales its norms and gates its branches (adaLN-Zero, DiT)."""

    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = layers(fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU("tanh"), fc2=nn.Linear(4 * dim, dim))
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
        self.y_embedder = layers(embedding_table=nn.Embedding(c.num_classes + 1, c.hidden_size))
        # a parameter without gradient, not a buffer: the released state dicts and counts have it so
        self.pos_embed = nn.Parameter(position_table(c.hidden_size, side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(c.hidden_size, c.num_heads, c.qk_norm) for _ in range(c.depth))
        self.projectors = nn.ModuleList()
        self.final_layer = FinalLayer(c.hidden_size, c.patch_size**2 * c.in_channels)
        self.initialize()
        if c.projector:  # last, so that a seed gives the same trunk whatever the projector
            self.projectors.append(Projector(c))
            self.projectors.apply(xavier)

    def initialize(self):
        """The trunk's initial weights. Zero gates and a zero last layer: a new model outputs exactly 0."""
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
        h = None
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, c)  # (B, T, D)
            if i == self.config.encoder_depth and len(self.projectors):
                h = self.projectors[0](x)  # (B, T, encoder_dim)
        x = self.final_layer(x, c)  # (B, T, p*p*C)
        return self.unpatchify(x), h


# ---- Config: what the data does not fix is a flag of train.py too, with its comment as the help ----

# name: (depth, width, heads, block after which the alignment sits); DiT's sizes, REPA's depths
SIZES = {"S": (12, 384, 6, 4), "B": (12, 768, 12, 4), "L": (24, 1024, 16, 8), "XL": (28, 1152, 16, 8)}
PATCHES = (1, 2, 4, 8)


@dataclass
class Config:
    """Everything that defines the network and its loss. The defaults are SiT-XL/2 with iREPA on 256-px latents."""

    input_size: int = 32  # side of what the network sees: pixels, or latents (256-px images: 32)
    patch_size: int = 2  # side of a token
    in_channels: int = 4  # 3 for pixels, 4 for SD-VAE latents
    hidden_size: int = 1152  # width of the tokens
    depth: int = 28  # blocks
    num_heads: int = 16  # of attention
    num_classes: int = 1000  # the label num_classes is the null class
    class_dropout: float = 0.1  # share of labels replaced by the null class in training, for guidance
    qk_norm: bool = False  # layer norm on queries and keys
    path: str = "linear"  # from data to noise: linear or cosine
    encoder_dim: int = 768  # channels of the teacher's tokens
    encoder_depth: int = 8  # align after this many blocks of the transformer
    projector: str | None = "conv"  # conv (iREPA), mlp (REPA), linear, or none: no alignment
    kernel_size: int = 3  # of the conv projector
    projector_dim: int = 2048  # hidden width of the mlp projector
    gamma: float | None = 0.6  # of the spatial norm; none: the teacher's tokens as they are
    proj_coeff: float = 1.0  # weight of the alignment in the loss

    def __post_init__(self):
        check_network(self)
        width, heads = self.hidden_size, self.num_heads
        check(width % heads == 0 and width % 4 == 0, f"hidden_size {width} must be a multiple of {heads} heads and 4")
        check(self.path in ("linear", "cosine"), f"path is linear or cosine, not {self.path!r}")

    @classmethod
    def named(cls, name, **overrides):
        """Config.named("SiT-B/2", num_classes=10); ValueError, with what there is, for an unknown name or field."""
        (depth, width, heads, encoder_depth), patch = look_up(cls, "SiT", SIZES, PATCHES, name, overrides)
        settings = dict(patch_size=patch, depth=depth, hidden_size=width, num_heads=heads)
        settings["encoder_depth"] = min(encoder_depth, overrides.get("depth", depth))
        return cls(**{**settings, **overrides})


def check(ok, message):
    if not ok:
        raise ValueError(message)


def check_network(c):
    """What a Config of any transformer on patches must keep to."""
    positive = "input_size patch_size in_channels hidden_size depth num_heads num_classes kernel_size projector_dim"
    for name in positive.split():
        check(getattr(c, name) > 0, f"{name} must be positive, not {getattr(c, name)}")
    check(c.input_size % c.patch_size == 0, f"input_size {c.input_size} is not a multiple of patch_size {c.patch_size}")
    check(c.projector in ("conv", "mlp", "linear", None), f"projector is conv, mlp, linear or none, not {c.projector}")
    check(not c.projector or 1 <= c.encoder_depth <= c.depth, f"encoder_depth {c.encoder_depth} is not in 1..{c.depth}")
    check(c.kernel_size % 2 == 1, f"kernel_size {c.kernel_size} must be odd, to keep the token grid")


def look_up(cls, family, sizes, patches, name, overrides):
    """-> the row of `sizes` and the patch size that `name`, as "SiT-B/2", asks for; ValueError as in Config.named."""
    known = {f"{family}-{size}/{patch}": (sizes[size], patch) for size in sizes for patch in patches}
    check(name in known, f"unknown model {name!r}; there are {' '.join(known)}")
    own = [field.name for field in fields(cls)]
    check(set(overrides) <= set(own), f"unknown fields {set(overrides) - set(own)}; there are {' '.join(own)}")
    return known[name]


# What a method gives to train.py and sample.py (a file of variants/: what it changes): Config, Sampling, solve, and
model, loss = SiT, irepa_loss
