"""MeanFlow (arXiv 2505.13447) with iREPA: one network evaluation from noise to image.

    python train.py --demo --method meanflow                            minutes on a CPU, ends in 1-step samples
    python train.py --method meanflow --encoder dinov2_vitb14 --latents DIR --latent-scale vae --no-ema-warmup
    python sample.py --ckpt runs/meanflow-SiT-B-2/last.pt [--steps 4]

SiT learns the velocity v at a point of the path; MeanFlow learns the average velocity of the way from t down to r,

    u(x_t, r, t) = 1/(t-r) * integral of v from r to t,        so that x_r = x_t - (t-r) u(x_t, r, t) exactly,

and a whole way from noise (t = 1) to data (r = 0) is one step. Multiplied by t-r and differentiated by t, this
defines u without the integral: u = v - (t-r) du/dt, where du/dt follows the path, (dx/dt, dr/dt, dt/dt) = (v, 0, 1).
That total derivative is one Jacobian-vector product (jvp, forward mode). The right-hand side, with the network's own
u in it and without gradient, is the regression target; where r = t nothing is left of it but v, as in irepa.py.

What changes against irepa.py: a second time embedder, the draw of (t, r), the target, guidance inside the target
instead of at sampling, a weight for each image in the loss, and the sampler.

What is ours, as no public code combines the two and the iREPA paper (its table of MeanFlow results) names neither
depth, coefficient nor rows:
  - the tokens of the ordinary forward at (x_t, r, t) are aligned, of all rows, at irepa.py's depth and coefficient;
    no projector runs in the passes for guidance and du/dt, which make targets only;
  - which rows have r < t is fixed by their place in the batch (see draw_times), and label drops do not depend on it.
    In the official JAX code both are the first rows, so that the null class hardly ever sees r < t;
  - gradients are clipped at norm 1 and the passes are under bf16 autocast, as in the other recipes: that code does
    neither (--clip none --precision fp32).

What du/dt costs: torch's fast attention kernels have no forward mode, on CPUs and on GPUs, so the jvp runs on
SDPBackend.MATH, which holds the T x T attention, and not through torch.compile. It runs without gradient and on the
rows with r < t alone, which are a quarter. A jvp costs three forwards of its rows: on one CPU core the demo's step took
1.3 times as long with du/dt, 1.6 times with guidance too (1.9 where kappa is not 0, which takes two more forwards in
place of one). Under bf16 autocast the jvp is in bf16 as well: on the demo's trained network that moves the target by 1%
of what u misses it by.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import irepa
from irepa import SiT, TimestepEmbedder, check, interpolate, precise, training_draws, with_alignment

# torch's own, printed through the progress bar at the first jvp
warnings.filterwarnings("ignore", ".*torch.jit.script. is deprecated")

# what it changes in train.py, in training and in --demo
TRAINING = dict(model="SiT-B/2", beta2=0.95)
DEMO = dict(omega=2.0, kappa=0.0, sample_cfg=1.0)
LATENT_SCALE = 0.18125  # of the latents of the public PyTorch code, not 0.18215


@dataclass
class Config(irepa.Config):
    """irepa.Config, and what MeanFlow adds. The defaults are those of MeanFlow's B/2: an effective guidance of 2."""

    share: float = 0.25  # share of the rows of a batch with r < t
    time_mean: float = -0.4  # of the logit-normal that t and r come from
    time_std: float = 1.0  # likewise
    omega: float = 1.0  # the guidance baked in has the effective scale omega / (1 - kappa); 1 and 0: none
    kappa: float = 0.5  # the part of it that comes from the network's own conditional velocity
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # guide for t in [LO, HI]
    power: float = 1.0  # p of the weight 1 / (squared error + c)^p of an image; 0: none
    offset: float = 0.01  # its c

    def __post_init__(self):
        super().__post_init__()
        self.guidance_interval = low, high = tuple(self.guidance_interval)
        check(0 <= self.share <= 1, f"share lies in [0, 1], not {self.share}")
        check(0 <= self.kappa < 1, f"kappa lies in [0, 1), not {self.kappa}")
        check(math.isfinite(self.omega), f"omega must be finite, not {self.omega}")
        check(low <= high, f"guidance_interval has LO <= HI, not {low} {high}")


class MeanFlow(SiT):
    """x [B, C, H, W], t and r [B] with 0 <= r <= t <= 1, y [B] int -> average velocity like x, tokens or None.

    The tokens are SiT's: projected, [B, T, encoder_dim]; project=False leaves them out.
    """

    def __init__(self, config):
        super().__init__(config)
        self.r_embedder = TimestepEmbedder(config.hidden_size)  # the public code's name, though it is fed t - r
        for layer in (self.r_embedder.mlp[0], self.r_embedder.mlp[2]):
            torch.nn.init.normal_(layer.weight, std=0.02)
            torch.nn.init.zeros_(layer.bias)

    def forward(self, x, t, y, r, project=True):
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.r_embedder(t - r) + self.y_embedder(y)  # (B, D)
        h = None
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, c)  # (B, T, D)
            if i == self.config.encoder_depth and len(self.projectors) and project:
                h = self.projectors[0](x)  # (B, T, encoder_dim)
        x = self.final_layer(x, c)  # (B, T, p*p*C)
        return self.unpatchify(x), h


# ---- The target ----


@torch.no_grad()
def guided_velocity(net, x_t, t, y, v, config):
    """The velocity that u averages, [B, ...] like the path's own v (MeanFlow, section 4.2, with the appendix's kappa).

    omega v + kappa u(x_t, t, t, y) + (1 - omega - kappa) u(x_t, t, t, null), from the current weights: guidance that
    sampling need not repeat. It stays v for t outside of the interval, and where y is null already.
    """
    if config.omega == 1 and config.kappa == 0:
        return v
    null = torch.full_like(y, config.num_classes)
    labels = [null, y] if config.kappa else [null]
    n = len(labels)
    t_n = t.repeat(n)
    u = net(x_t.repeat(n, 1, 1, 1), t_n, torch.cat(labels), t_n, project=False)[0].to(v.dtype)
    u_null, u_cond = u.chunk(n)[0], u.chunk(n)[-1]
    guided = config.omega * v + config.kappa * u_cond + (1 - config.omega - config.kappa) * u_null
    low, high = config.guidance_interval
    guides = (low <= t) & (t <= high) & (y != null)
    return torch.where(guides.view(-1, 1, 1, 1), guided, v)


@torch.no_grad()
def average_target(net, x_t, t, r, y, v, rows):
    """v - (t-r) du/dt (MeanFlow, eq. 6 and 10), like v [B, ...]; `rows` [n] int64 are those where r < t may hold.

    With v the guided velocity, which is then also the direction of du/dt. The other rows are v, as t-r is 0 there.
    """
    target = v.clone()
    if len(rows):
        x_t, t, r, y, v = (a[rows] for a in (x_t, t, r, y, v))
        tangents = v, torch.ones_like(t), torch.zeros_like(r)
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            _, du_dt = torch.func.jvp(lambda x, t, r: net(x, t, y, r, project=False)[0], (x_t, t, r), tangents)
        target[rows] = v - (t - r).view(-1, 1, 1, 1) * du_dt.to(v.dtype)
    return target


def draw_times(normals, first, config):
    """Standard normals [B, 2] of the rows first, first+1, ... of a batch -> t [B], r [B] <= t, and the rows with r < t.

    t and r are the larger and the smaller of two logit-normal draws, then r is t but for a `share` of the batch
    (MeanFlow, section 4.3). That share is spread evenly over the batch, from its first row on, and not drawn: a
    batch of any size has some, their number is known without waiting for a GPU, and parts of a batch are as the whole.
    """
    t, r = torch.sigmoid(config.time_mean + config.time_std * normals).sort(dim=1, descending=True)[0].unbind(1)
    before = [math.ceil((first + i) * config.share) for i in range(len(t) + 1)]
    rows = torch.tensor([i for i in range(len(t)) if before[i] < before[i + 1]], dtype=torch.int64, device=t.device)
    mean_rows = torch.zeros_like(t, dtype=torch.bool).index_fill(0, rows, True)
    return t, torch.where(mean_rows, r, t), rows


def meanflow_loss(model, x, y, target, config, generator=None, part=(0, 1)):
    """MeanFlow's weighted loss (eq. 9, section 4.3) + proj_coeff * alignment; arguments and draws as in irepa_loss.

    A dict of scalars: loss, denoise, align. With power 1 the weighted part always prints nearly 1, so that `denoise`
    is the mean squared error itself, of u against its target.
    """
    normals, noise, y = training_draws(model, x, y, config, generator, part, lambda draw: draw(torch.randn, 2))
    t, r, rows = draw_times(normals, part[0] * len(x), config)
    x_t, v = interpolate(x, noise, t, config.path)
    net = getattr(model, "module", model)  # DDP knows no forward mode, and the target needs none of its gradients
    v = guided_velocity(net, x_t, t, y, v, config)
    u_target = average_target(net, x_t, t, r, y, v, rows)
    u, h = model(x_t, t, y, r)
    squares = (u.float() - u_target).square().flatten(1)  # (B, C*H*W)
    losses = with_alignment(weighted(squares.sum(1), config).mean(), h, target, config)
    return {**losses, "denoise": squares.mean()}


def weighted(squares, config):
    """Squared errors [B], each the sum of an image, times 1 / (itself + c)^p without gradient (MeanFlow, sec. 4.3)."""
    return squares / (squares.detach() + config.offset) ** config.power


# ---- Sampling ----


@dataclass
class Sampling:
    """How samples are drawn."""

    steps: int = 1  # equal steps from noise to image


@torch.no_grad()
def solve(model, y, noise, generators, how):
    """noise [n, C, H, W], labels y [n] -> x like noise, in equal steps from t = 1 to 0 (MeanFlow, eq. 12).

    Guidance is in the weights already. The state is float64; nothing is drawn, so that `generators` stay unused.
    """
    x, dtype = precise(noise), next(model.parameters()).dtype
    times = torch.linspace(1, 0, how.steps + 1, dtype=torch.float64).tolist()
    for t, r in zip(times[:-1], times[1:]):
        t_r = torch.tensor([[t], [r]], dtype=dtype, device=x.device).expand(2, len(x))
        x = x - (t - r) * model(x.to(dtype), t_r[0], y, t_r[1])[0].to(x.dtype)
    return x.to(noise.dtype)


def released(weights, args=None):
    """The Config fields of the public PyTorch code's files (zhuyu-cs/MeanFlow), which its args name; None for others.

    Its network is this one: time from data (0) to noise (1), not multiplied, and r_embedder fed t - r.
    """
    if "r_embedder.mlp.0.weight" not in weights:
        old = hasattr(args, "ratio_r_not_equal_t")
        check(not old, "it is of MeanFlow code before r_embedder, whose one time embedder took t and t - r: not read")
        return None
    names = dict(share="ratio_r_not_equal_t", time_mean="time_mu", time_std="time_sigma")
    names.update(omega="cfg_omega", kappa="cfg_kappa")
    fields = {ours: getattr(args, theirs) for ours, theirs in names.items() if hasattr(args, theirs)}
    if hasattr(args, "cfg_min_t"):
        fields["guidance_interval"] = args.cfg_min_t, args.cfg_max_t
    return fields


model, loss = MeanFlow, meanflow_loss
