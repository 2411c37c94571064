"""iREPA in JiT (arXiv 2511.13720): a transformer on pixels that predicts the clean image.

    python train.py --demo --method jit                                           minutes on a CPU, no download
    torchrun --nproc_per_node=8 train.py --method jit --encoder dinov2_vitb14 --no-ema-warmup     the paper's JiT-B/16
    python sample.py --ckpt jit-b-16.pth --cfg 3 --cfg-interval 0.1 1             ours, or a released one

What changes from irepa.py, where the projector, the spatial norm and the alignment are the same code:

    network      predicts the image, not the velocity; RMSNorm, SwiGLU, rotary positions, normed queries and keys, a
                 patch embedding through a bottleneck, and copies of the label among the tokens of the later blocks
    loss         the error of the velocity that follows from the image, at times that favour noise
    alignment    of patch tokens only; its defaults are gamma 0.8 and coefficient 0.5
    sampler      50 Heun steps
    training     half of the images mirrored, rate and warm-up that follow the batch size, and two averages of the
                 weights, of which the paper reports the better one

The released JiT-H also drops activations of its middle blocks in training, which is left out here: a dropout would
have to draw from the step's generator for a resumed run to be the same run.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import irepa
from irepa import check, guided, interpolate, modulate, sample_ode, training_draws, with_alignment

# what it changes in train.py, in training and in --demo, whose crescents all lie to the left
TRAINING = dict(model="JiT-B/16", vae=None, flip=True, beta2=0.95, clip=None, ema2=0.9996)
DEMO = dict(model="JiT-S/4", flip=False, steps=900, sample_every=300, ckpt_every=300)


def scaled(batch_size):
    """The paper's learning rate, in proportion to the batch, and its warm-up over 5 epochs of ImageNet, in steps."""
    return dict(lr=5e-5 * batch_size / 256, warmup=round(25_000 * 256 / batch_size))


# name: (depth, width, heads, bottleneck, block after which the alignment sits). B, L, H and patches of 16 (256 px) and
# 32 (512 px) are the paper's; S, the smaller patches and H's depth of alignment are ours.
SIZES = {
    "S": (12, 384, 6, 128, 4),
    "B": (12, 768, 12, 128, 4),
    "L": (24, 1024, 16, 128, 8),
    "H": (32, 1280, 16, 256, 8),
}
PATCHES = (4, 8, 16, 32)


@dataclass
class Config:
    """Everything that defines the network and its loss. The defaults are JiT-B/16 with iREPA on 256-px images."""

    input_size: int = 256  # side of the images in pixels
    patch_size: int = 16  # side of a token
    in_channels: int = 3
    hidden_size: int = 768  # width of the tokens
    depth: int = 12  # blocks
    num_heads: int = 12  # of attention
    bottleneck: int = 128  # width between the two layers of the patch embedding
    num_classes: int = 1000  # the label num_classes is the null class
    class_dropout: float = 0.1  # share of labels replaced by the null class in training, for guidance
    in_context_len: int | None = None  # copies of the label that join the tokens; none: 32, at most an eighth of them
    in_context_start: int = 4  # after this many blocks: a third of them
    noise_scale: float | None = None  # standard deviation of the noise; none: image size / 256, and at least 1
    P_mean: float = -0.8  # of the logit of JiT's time
    P_std: float = 0.8  # likewise
    t_eps: float = 0.05  # the velocity is an error of the image divided by t, or by this where t is smaller
    encoder_dim: int = 768
    encoder_depth: int = 4  # align after this many blocks of the transformer
    projector: str | None = "conv"  # conv (iREPA), mlp (REPA), linear, or none: no alignment
    kernel_size: int = 3  # of the conv projector
    projector_dim: int = 2048  # hidden width of the mlp projector
    gamma: float | None = 0.8  # of the spatial norm; none: the teacher's tokens as they are
    proj_coeff: float = 0.5  # weight of the alignment in the loss

    def __post_init__(self):
        if self.noise_scale is None:  # the paper has 1 at 256 px and 2 at 512; below, 1 is ours
            self.noise_scale = max(1.0, self.input_size / 256)
        irepa.check_network(self)
        if self.in_context_len is None:  # the paper always has 256 tokens; fewer are ours
            self.in_context_len = max(1, min(32, (self.input_size // self.patch_size) ** 2 // 8))
        for name in "bottleneck in_context_len noise_scale P_std t_eps".split():
            check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        check(self.in_channels == 3, f"JiT is made for pixels (--vae none), not for {self.in_channels} channels")
        width, heads, start = self.hidden_size, self.num_heads, self.in_context_start
        check(width % (4 * heads) == 0, f"hidden_size {width} must be a multiple of 4 x {heads} heads, to be rotated")
        check(0 <= start < self.depth, f"in_context_start {start} leaves none of the {self.depth} blocks after it")

    @classmethod
    def named(cls, name, **overrides):
        """Config.named("JiT-B/16", num_classes=10): S, B, L, H with patch 4, 8, 16, 32; any field can be overridden.

        ValueError, with the list of what there is, for a name or a field that does not exist.
        """
        row, patch = irepa.look_up(cls, "JiT", SIZES, PATCHES, name, overrides)
        depth, width, heads, bottleneck, encoder_depth = row
        settings = dict(patch_size=patch, depth=depth, hidden_size=width, num_heads=heads, bottleneck=bottleneck)
        depth = overrides.get("depth", depth)
        settings.update(encoder_depth=min(encoder_depth, depth), in_context_start=depth // 3)
        return cls(**{**settings, **overrides})


def own_time(t):
    """From the project's time (0 data, 1 noise) to JiT's (0 noise, 1 data), or back.

    Only what the paper and the released weights state in JiT's time passes through here: what the network is told, the
    distribution of training times, and the guidance interval.
    """
    return 1 - t


# ---- The network, with the state-dict names of the released checkpoints ----


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):  # float32 up to the end, under autocast too
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-6).to(x.dtype)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, bottleneck, dim):
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, bottleneck, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, dim, 1)

    def forward(self, x):
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)  # (B, T, D)


def rotary_table(head_dim, side, others, device=None):
    """cos and sin [2, others + side^2, head_dim] of rotary positions: rows of the grid turn the first half, columns
    the second, neighbouring channels by one angle. The `others`, which come first, have no place and do not turn.
    """
    omega = 10000.0 ** (-torch.arange(head_dim // 4, dtype=torch.float32, device=device) / (head_dim // 4))
    axis = torch.arange(side, device=device)[:, None] * omega.repeat_interleave(2)  # (side, head_dim/2)
    row, column = axis[:, None].expand(side, side, -1), axis.expand(side, side, -1)
    angle = F.pad(torch.cat([row, column], dim=2).flatten(0, 1), (0, 0, others, 0))
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, rotary):
    """x [B, heads, T, head_dim], each pair of channels turned by its angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary
    return (x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin).to(x.dtype)


class Attention(irepa.Attention):
    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads, qk_norm=False)
        self.q_norm, self.k_norm = RMSNorm(dim // num_heads), RMSNorm(dim // num_heads)

    def forward(self, x, rotary):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, D/heads) each
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, T, D)


class SwiGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        hidden = 8 * dim // 3  # as many weights as a plain MLP of width 4 D
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, x = self.w12(x).chunk(2, dim=-1)  # (B, T, hidden) each
        return self.w3(F.silu(gate) * x)  # (B, T, D)


class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, rotary):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotary)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (B, T, D)


class JiT(nn.Module):
    """x [B, 3, H, W], t [B] in [0, 1], y [B] int -> the clean image like x, projected tokens [B, T, encoder_dim] or
    None. Time is the project's: t = 0 is data.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.x_embedder = PatchEmbed(c.patch_size, c.in_channels, c.bottleneck, c.hidden_size)
        self.t_embedder = irepa.TimestepEmbedder(c.hidden_size)
        self.y_embedder = irepa.layers(embedding_table=nn.Embedding(c.num_classes + 1, c.hidden_size))
        table = irepa.position_table(c.hidden_size, c.input_size // c.patch_size)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.in_context_posemb = nn.Parameter(torch.zeros(1, c.in_context_len, c.hidden_size))
        self.blocks = nn.ModuleList(Block(c.hidden_size, c.num_heads) for _ in range(c.depth))
        self.projectors = nn.ModuleList()
        if c.projector:
            self.projectors.append(irepa.Projector(c))
        self.final_layer = irepa.FinalLayer(c.hidden_size, c.patch_size**2 * c.in_channels)
        self.final_layer.norm_final = RMSNorm(c.hidden_size)
        self.initialize()

    unpatchify = irepa.SiT.unpatchify

    def initialize(self):
        """Every initialisation in one place. Zero gates and a zero last layer: a new model outputs exactly 0."""
        for module in self.modules():  # a conv projector keeps PyTorch's own
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for conv in (self.x_embedder.proj1, self.x_embedder.proj2):
            nn.init.xavier_uniform_(conv.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj2.bias)
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.normal_(self.in_context_posemb, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y):
        config, label = self.config, self.y_embedder(y)  # (B, D)
        c = self.t_embedder(own_time(t)) + label  # (B, D)
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        patches, h = x.shape[1], None
        head_dim = config.hidden_size // config.num_heads
        rotary = rotary_table(head_dim, math.isqrt(patches), config.in_context_len, x.device)
        for i, block in enumerate(self.blocks, start=1):
            if i == config.in_context_start + 1:
                x = torch.cat([label.unsqueeze(1) + self.in_context_posemb, x], dim=1)  # (B, in_context_len + T, D)
            x = block(x, c, rotary[:, -x.shape[1] :])
            if i == config.encoder_depth and len(self.projectors):
                h = self.projectors[0](x[:, -patches:])  # (B, T, encoder_dim)
        x = self.final_layer(x[:, -patches:], c)  # (B, T, p*p*3)
        return self.unpatchify(x), h


model = JiT

# ---- The loss and the sampler ----


def loss(model, x, y, target, config, generator=None, part=(0, 1)):
    """As irepa.irepa_loss: x [B, 3, H, W] in [-1, 1] -> dict of scalars loss, denoise, align.

    With x_t = (1 - t) x + t noise the velocity is (x_t - x) / t, and the predicted one (x_t - image) / t:
    denoise, its mean squared error, is that of the image over t^2 (x-prediction with v-loss in the paper). Both take
    t_eps for a smaller t.
    """

    def times(draw):
        return own_time(torch.sigmoid(config.P_mean + config.P_std * draw(torch.randn)))

    t, noise, y = training_draws(model, x, y, config, generator, part, times)
    noise = config.noise_scale * noise
    x_t, _ = interpolate(x, noise, t)
    image, h = model(x_t, t, y)
    error = (image.float() - x) / t.clamp(min=config.t_eps).view(-1, 1, 1, 1)
    return with_alignment(error.square().mean(), h, target, config)


@dataclass
class Sampling:
    """How samples are drawn; as published."""

    sampler: str = "heun"  # heun or euler
    steps: int = 50  # steps from noise to image
    cfg: float = 1.0  # guidance scale; 1 is none
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # guide for t in [LO, HI], in JiT's time, where 1 is data

    def __post_init__(self):
        check(self.sampler in ("heun", "euler"), f"--sampler is heun or euler, not {self.sampler}")


def solve(model, y, noise, generators, how):
    """noise [n, 3, H, W], labels y [n] -> images like noise; generators are unused, as nothing else is drawn.

    cfg_interval is in JiT's time, as published: (0.1, 1) spares the first tenth, from noise on, and has no guidance at
    its ends themselves, except that 0 includes the start. The velocity's t_eps acts here too, so that the last of 50
    steps goes 40 % of the way to the image, as in the released sampler.
    """
    config, (low, high) = model.config, how.cfg_interval
    # guided() counts the ends in; the millionth also absorbs the rounding of the times
    interval = own_time(high) + 1e-6, own_time(low) - 1e-6 if low > 0 else 1.0
    image = guided(model, y, how.cfg, interval)  # of images as of velocities: the two differ by an affine map

    def velocity(x, t):
        return (x - image(x, t)) / max(float(t), config.t_eps)

    return sample_ode(velocity, config.noise_scale * noise, how.steps, heun=how.sampler == "heun")


def released(weights, args=None):
    """The Config fields that a released JiT shows by its shapes, and its args (a Namespace, or None) by name."""
    if "x_embedder.proj1.weight" not in weights:
        return None
    bottleneck, channels, patch, _ = weights["x_embedder.proj1.weight"].shape
    width = weights["x_embedder.proj2.bias"].shape[0]
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    by_width = {width: encoder_depth for _, width, _, _, encoder_depth in SIZES.values()}
    settings = dict(
        input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=width // weights["blocks.0.attn.q_norm.weight"].shape[0],
        bottleneck=bottleneck,
        num_classes=weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        in_context_len=weights["in_context_posemb"].shape[1],
        in_context_start=depth // 3,
        encoder_depth=min(getattr(args, "encoder_depth", by_width.get(width, 1)), depth),
    )
    settings.update({k: getattr(args, k) for k in ("noise_scale", "P_mean", "P_std", "t_eps") if hasattr(args, k)})
    return settings
