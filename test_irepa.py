"""python -m pytest -q test_irepa.py: what irepa.py promises, in its order, in seconds on a CPU; tests/ has the rest."""

import math
import zlib

import numpy as np
import pytest
import torch

import irepa
from irepa import Config, Projector, SiT, alignment_loss, interpolate, irepa_loss, spatial_norm

torch.set_num_threads(1)  # networks of this size gain nothing by more, and lose much where cores are shared
TINY = dict(
    input_size=8,
    hidden_size=96,
    depth=4,
    num_heads=4,
    encoder_depth=2,
    encoder_dim=24,
    projector_dim=64,
    num_classes=10,
)


def drawn(name, shape):
    """Normal numbers that depend on the name alone."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def weak(name, draw):
    return 0.05 * draw


def strong(name, draw):
    """With 0.05 the attention is almost uniform, and most mistakes leave no trace."""
    scale = 1.5 / math.sqrt(np.prod(draw.shape[1:])) if draw.ndim > 1 else 0.1
    return draw * scale + name.endswith("norm.weight")


def fill(model, recipe=weak):
    """Weights that depend on their names alone: recipe(name, normal numbers) of each."""
    for name, p in model.state_dict().items():
        if name != "pos_embed":
            p.copy_(torch.from_numpy(recipe(name, drawn(name, p.shape)).astype(np.float32)))
    return model.eval()


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def parts_make_a_whole(loss, model, batch, seed):
    """-> the loss of a batch (x, y, target); its halves, each with a generator of the same state, average to it."""
    size = len(batch[0]) // 2

    def of(rows, part=(0, 1)):
        generator = torch.Generator().manual_seed(seed)
        return loss(model, *(a[rows] for a in batch), model.config, generator, part)

    whole = of(slice(None))
    halves = [of(slice(i * size, (i + 1) * size), (i, 2)) for i in range(2)]
    for key in whole:
        torch.testing.assert_close(whole[key], (halves[0][key] + halves[1][key]) / 2)
    return whole


# ---- The two changes of iREPA ----


def test_default_is_irepa():
    c = Config()
    assert (c.projector, c.kernel_size, c.gamma, c.proj_coeff) == ("conv", 3, 0.6, 1.0)
    layer = SiT(Config(**TINY)).projectors[0].projection_layer
    assert isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) and layer.bias is not None


@pytest.mark.parametrize("row,column", [(0, 1), (2, 1), (1, 0), (1, 2)])
def test_conv_projector_keeps_the_token_grid(row, column):
    projector = Projector(Config(hidden_size=4, num_heads=1, encoder_dim=4))
    with torch.no_grad():
        projector.projection_layer.weight.zero_()
        projector.projection_layer.bias.zero_()
        for d in range(4):
            projector.projection_layer.weight[d, d, row, column] = 1
        tokens = normal(1, 2, 16, 4)
        shifted = projector(tokens).view(2, 4, 4, 4)
    padded = torch.nn.functional.pad(tokens.view(2, 4, 4, 4), (0, 0, 1, 1, 1, 1))
    assert torch.equal(shifted, padded[:, row : row + 4, column : column + 4])


def test_spatial_norm_is_its_formula():
    z = normal(0, 2, 16, 5).double() * 3 + 1
    expected = torch.empty_like(z)
    for b in range(2):
        for d in range(5):
            tokens = z[b, :, d].tolist()
            mean = sum(tokens) / 16
            std = math.sqrt(sum((v - mean) ** 2 for v in tokens) / 15)
            expected[b, :, d] = torch.tensor([(v - 0.6 * mean) / (std + 1e-6) for v in tokens])
    torch.testing.assert_close(spatial_norm(z, 0.6), expected.float(), rtol=1e-5, atol=1e-5)
    constant = spatial_norm(torch.full((1, 16, 3), 7.0, dtype=torch.bfloat16), 0.6)
    assert constant.dtype == torch.float32 and torch.isfinite(constant).all()


def test_alignment_is_minus_the_mean_cosine():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    h, target = torch.stack([east, 3 * east, east, 5 * east])[None], torch.stack([2 * east, north, -east, east])[None]
    assert alignment_loss(h, target).item() == pytest.approx(-(1 + 0 - 1 + 1) / 4)


# ---- The path from data to noise, and the loss ----


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_target_velocity_is_the_derivative_of_the_path(path):
    x, noise = normal(0, 4, 3).double(), normal(1, 4, 3).double()
    t = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: interpolate(x, noise, t, path)[0], (t,), (torch.ones_like(t),))
    torch.testing.assert_close(interpolate(x, noise, t, path)[1], derivative)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(interpolate(x[:2], noise[:2], ends, path)[0], torch.stack([x[0], noise[1]]))


def test_each_index_has_a_stream_of_its_own():
    seeds = {irepa.stream(purpose, 0, i).initial_seed() for purpose in ("image", "step") for i in range(1000)}
    assert len(seeds) == 2000


def test_loss_is_its_formula_and_parts_make_a_whole():
    config = Config(**TINY, gamma=0.6, proj_coeff=0.7)
    model = fill(SiT(config), strong).train()
    x, y, target = normal(0, 4, 4, 8, 8), torch.arange(4), normal(1, 4, 16, 24)
    whole = parts_make_a_whole(irepa_loss, model, (x, y, target), 12)
    torch.testing.assert_close(whole["loss"], whole["denoise"] + 0.7 * whole["align"])
    g = torch.Generator().manual_seed(12)
    t, noise, drop = torch.rand(4, generator=g), torch.randn(x.shape, generator=g), torch.rand(4, generator=g)
    assert drop.min() < 0.1 < drop.max()  # one label is dropped
    x_t = (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * noise
    v, h = model(x_t, t, torch.where(drop < 0.1, 10, y))
    torch.testing.assert_close(whole["denoise"], ((v - (noise - x)) ** 2).mean())
    a, b = h, spatial_norm(target, 0.6)
    torch.testing.assert_close(whole["align"], -((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean())
    with pytest.raises(ValueError, match=r"4\^2 tokens"):
        irepa_loss(model, x, y, target[:, :9], config)
    with pytest.raises(ValueError, match="the teacher's are None"):
        irepa_loss(model, x, y, None, config)


# ---- The samplers ----


def gaussian(t, path, mean=0.7, std=0.3):
    """The exact velocity for data N(mean, std^2): E[d x_t / dt | x_t]."""
    alpha, sigma, d_alpha, d_sigma = irepa.path_coefficients(torch.as_tensor(t, dtype=torch.float64), path)
    slope = (d_alpha * alpha * std**2 + d_sigma * sigma) / (alpha**2 * std**2 + sigma**2)
    return lambda x: d_alpha * mean + slope * (x - alpha * mean)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_samplers_carry_noise_to_a_known_gaussian(path):
    noise = normal(0, 20_000, 1).double()
    x = irepa.sample_ode(lambda x, t: gaussian(t, path)(x), noise, 200, heun=True)
    torch.testing.assert_close(x, 0.7 + 0.3 * noise, rtol=0, atol=2e-3)  # point by point
    euler = irepa.sample_ode(lambda x, t: gaussian(t, path)(x), noise, 200)
    torch.testing.assert_close(euler, 0.7 + 0.3 * noise, rtol=0, atol=5e-2)
    generator = torch.Generator().manual_seed(0)
    x = irepa.sample_sde(lambda x, t: gaussian(t, path)(x), noise, 250, generator, path=path)
    assert x.mean().item() == pytest.approx(0.7, abs=0.01) and x.std().item() == pytest.approx(0.3, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([x[:, 0], noise[:, 0]]))[0, 1]) < 0.7  # and it is not the ODE


class Counting(torch.nn.Module):
    """A model of known velocity, x * t + y, that counts its forwards."""

    config = Config(num_classes=10)

    def __init__(self):
        super().__init__()
        self.scale, self.sizes = torch.nn.Parameter(torch.ones(())), []

    def forward(self, x, t, y):
        self.sizes.append(len(x))
        return self.scale * x * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1), None


def test_guidance():
    x, y = normal(0, 2, 4, 2, 2), torch.tensor([1, 2])
    model = Counting()
    with torch.no_grad():
        plain = irepa.sample_ode(lambda x, t: model(x.float(), t.float().expand(2), y)[0].double(), x, 7)
        model.sizes.clear()
        assert torch.equal(irepa.sample_ode(irepa.guided(model, y, 1.0), x, 7), plain)
        assert model.sizes == [2] * 7
        velocity = irepa.guided(model, y, 3.0, (0.2, 0.5))
        for t, expected in ((0.2, 10 + 3 * (y - 10)), (0.5, 10 + 3 * (y - 10)), (0.51, y), (0.19, y)):
            model.sizes.clear()
            got = velocity(x, torch.tensor(t, dtype=torch.float64))
            assert model.sizes == ([4] if 0.2 <= t <= 0.5 else [2])
            torch.testing.assert_close(got, x * t + expected.view(-1, 1, 1, 1).float())
    model.sizes.clear()  # on or off for a whole step of Heun's, by the time at its start: 1, 0.75, 0.5, 0.25
    irepa.sample_ode(irepa.guided(model, y, 3.0, (0.3, 1.0)), x, 4, heun=True)
    assert model.sizes == [4, 4, 4, 4, 4, 4, 2]


def test_the_samplers_are_sde_euler_and_heun():
    model, y, noise = Counting(), torch.tensor([1, 2]), normal(0, 2, 4, 2, 2)
    for sampler, evaluations in (("sde", 6), ("euler", 6), ("heun", 11)):  # Heun's last step is Euler's
        how, streams = irepa.Sampling(sampler, steps=6), [irepa.stream("image", 0, i) for i in range(2)]
        model.sizes.clear()
        x = irepa.solve(model, y, noise, streams, how)
        assert model.sizes == [2] * evaluations and x.shape == noise.shape and x.dtype == noise.dtype
    assert (irepa.Sampling().sampler, irepa.Sampling().steps, irepa.Sampling().cfg) == ("sde", 250, 1.0)
    with pytest.raises(ValueError, match="sampler is sde, euler or heun, not rk4"):
        irepa.Sampling("rk4")


# ---- The network ----


def test_state_dict_names_are_the_released_ones():
    block = "attn.qkv attn.proj mlp.fc1 mlp.fc2 adaLN_modulation.1".split()
    layers = [f"blocks.{i}.{layer}" for i in range(4) for layer in block]
    layers += (
        "x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 final_layer.linear final_layer.adaLN_modulation.1".split()
    )
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    names |= {"pos_embed", "y_embedder.embedding_table.weight"}
    for kind, ours in (("conv", [""]), ("linear", [""]), ("mlp", ["0.", "2.", "4."]), (None, [])):
        more = {f"projectors.0.projection_layer.{n}{k}" for n in ours for k in ("weight", "bias")}
        assert SiT(Config(**TINY, projector=kind)).state_dict().keys() == names | more
    qk = {f"blocks.3.attn.{n}_norm.{k}" for n in "qk" for k in ("weight", "bias")}
    assert qk <= SiT(Config(**TINY, qk_norm=True)).state_dict().keys()


def test_unpatchify_inverts_the_patch_order():
    model = SiT(Config(**TINY))
    x = normal(3, 2, 4, 8, 8)
    patches = x.view(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 16)  # (h, w), then (p, q, c)
    assert torch.equal(model.unpatchify(patches), x)
    # and the patch embedding reads tokens in the same row-major order
    with torch.no_grad():
        model.x_embedder.proj.weight.zero_()
        model.x_embedder.proj.bias.zero_()
        model.x_embedder.proj.weight[0, 0, 0, 0] = 1
        assert torch.equal(model.x_embedder(x)[..., 0], x[:, 0, ::2, ::2].flatten(1))


NUMBERS = [  # projector, qk_norm, mean v^2, three entries of v, two of h
    ("mlp", False, 3.697918, [-0.333957, -2.749124, 0.916266], [-1.994088, 2.339434]),
    ("linear", False, 3.697918, [-0.333957, -2.749124, 0.916266], [-6.418239, 5.500721]),
    ("conv", True, 3.823385, [-0.491907, -2.665686, 1.321012], [0.159795, -5.058365]),
    ("conv", False, 3.697918, [-0.333957, -2.749124, 0.916266], [0.48148, -3.88308]),
]
ALIGN = 0.025293


def test_numbers_of_the_released_code():
    # taken from this network when it reproduced the released one, on the same weights, to 1e-6
    x, feat = normal(0, 3, 4, 8, 8), normal(1, 3, 16, 24)
    t, y = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 10, 7])
    for kind, qk_norm, v_sum, v_some, h_some in NUMBERS:
        model = fill(SiT(Config(**TINY, projector=kind, qk_norm=qk_norm)), strong)
        with torch.no_grad():
            v, h = model(x, t, y)
        got = torch.stack([v.square().mean(), v[0, 0, 0, 0], v[1, 1, 3, 5], v[2, 3, 7, 7], h[0, 0, 0], h[1, 7, 11]])
        torch.testing.assert_close(got, torch.tensor([v_sum, *v_some, *h_some]), rtol=1e-4, atol=1e-4)
    normed = spatial_norm(feat, 0.6)
    assert alignment_loss(h, normed).item() == pytest.approx(ALIGN, abs=1e-5)


def test_alignment_reaches_no_block_after_its_depth():
    config = Config(**TINY)
    model = fill(SiT(config), strong)
    batch = normal(0, 2, 4, 8, 8), torch.tensor([1, 2]), normal(1, 2, 16, 24)
    irepa_loss(model, *batch, config)["align"].backward()
    touched = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.blocks]
    assert touched == [True, True, False, False]
    assert not any(p.grad is not None and p.grad.any() for p in model.final_layer.parameters())


def test_without_a_projector_nothing_is_aligned():
    config = Config(**TINY, projector=None)
    model = fill(SiT(config), strong)
    losses = irepa_loss(model, normal(0, 2, 4, 8, 8), torch.tensor([1, 2]), None, config)
    assert losses["align"] == 0 and losses["loss"] == losses["denoise"] > 0


# ---- Config ----

COUNTS = {"S": 32_858_896, "B": 130_303_504, "L": 457_824_272, "XL": 674_816_272}  # patch 2, 4 channels


@pytest.mark.parametrize("name", [f"SiT-{s}/{p}" for s in irepa.SIZES for p in irepa.PATCHES])
def test_named_sizes(name):
    size, patch = name[4:].split("/")
    with torch.device("meta"):
        model = SiT(Config.named(name, projector=None))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = model.config.hidden_size
    patches = 4 * (int(patch) ** 2 - 4) * (2 * width + 1)  # patch embedding, last layer and its bias
    assert trainable == COUNTS[size] + patches
    assert model.pos_embed.shape == (1, (32 // int(patch)) ** 2, width)  # latents of 256-px images
    model = SiT(Config.named(name, input_size=16, depth=2, num_classes=10, encoder_dim=8))
    v, h = model(normal(0, 2, 4, 16, 16), torch.tensor([0.1, 0.9]), torch.tensor([1, 10]))
    assert v.shape == (2, 4, 16, 16) and not v.any() and h.shape == (2, (16 // int(patch)) ** 2, 8)


def test_unknown_names_are_errors_that_list_what_there_is():
    for call, listed in (
        (lambda: Config.named("SiT-M/2"), "SiT-XL/2"),
        (lambda: Config.named("SiT-S/3"), "SiT-S/4"),
        (lambda: Config.named("SiT-S/2", patches=2), "patch_size"),
        (lambda: Config(input_size=30, patch_size=4), "multiple"),
        (lambda: Config(depth=4, encoder_depth=8), "encoder_depth"),
        (lambda: Config(path="circle"), "path is linear or cosine, not 'circle'"),
        (lambda: Config(projector="attention"), "projector is conv, mlp, linear or none, not attention"),
        (lambda: Config(kernel_size=2), "must be odd"),
    ):
        with pytest.raises(ValueError, match=listed):
            call()
