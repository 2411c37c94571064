"""python -m pytest -q test_irepa.py: the whole project on a CPU, without a download, in about four minutes."""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import experiments.spatial_structure as spatial
import fid
import inputs.latents as latents
import inputs.teachers as teachers
import irepa
import sample
import train
import variants.meanflow as meanflow
import variants.repa_e as repa_e
from experiments import convergence
from inputs.images import BrokenImage, Folder, Shapes, center_crop, to_rgb
from inputs.teachers import load_encoder
from irepa import Config, SiT, alignment_loss, interpolate, irepa_loss, spatial_norm
from variants import jit

torch.set_num_threads(2)
HERE = Path(__file__).parent
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
RUN = (
    "--image-size 16 --model SiT-S/4 --hidden-size 32 --depth 2 --num-heads 2 --batch-size 8 --steps 4 --lr 1e-3"
    " --log-every 2 --ckpt-every 3 --device cpu --precision fp32"
).split()


def fill(model, strong=False):
    """Weights that depend on their names alone."""
    for name, p in model.state_dict().items():
        if name != "pos_embed":
            draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape))
            scale = 1.5 / math.sqrt(np.prod(p.shape[1:])) if p.dim() > 1 else 0.1
            draw = draw * (scale if strong else 0.05) + (strong and name.endswith("norm.weight"))
            p.copy_(torch.from_numpy(draw.astype(np.float32)))
    return model.eval()


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two classes of twelve 20x18 images each, one folder further down than the other."""
    root = tmp_path_factory.mktemp("photos")
    for k, folder in enumerate(("cats", "deep/er/dogs")):
        (root / folder).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.RandomState(100 * k + i).randint(0, 256, (18, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.{'PNG' if i % 2 else 'png'}")
    return root


def run(*flags):
    train.main([str(flag) for flag in flags])


def weights(out, which="model"):
    return torch.load(Path(out) / "last.pt", weights_only=True)[which]


# ---------------------------------------------------------------------------------------------------------------
# The method


def test_default_is_irepa():
    c = Config()
    assert (c.projector, c.kernel_size, c.gamma, c.proj_coeff) == ("conv", 3, 0.6, 1.0)
    layer = SiT(Config(**TINY)).projectors[0].projection_layer
    assert isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) and layer.bias is not None


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


@pytest.mark.parametrize("row,column", [(0, 1), (2, 1), (1, 0), (1, 2)])
def test_conv_projector_keeps_the_token_grid(row, column):
    projector = irepa.Projector("conv", 3, 3)
    with torch.no_grad():
        projector.projection_layer.weight.zero_()
        projector.projection_layer.bias.zero_()
        for d in range(3):
            projector.projection_layer.weight[d, d, row, column] = 1
        tokens = normal(1, 2, 16, 3)
        shifted = projector(tokens).view(2, 4, 4, 3)
    padded = torch.nn.functional.pad(tokens.view(2, 4, 4, 3), (0, 0, 1, 1, 1, 1))
    assert torch.equal(shifted, padded[:, row : row + 4, column : column + 4])


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
    model = SiT(Config.named(name, depth=2, num_classes=10, encoder_dim=8))
    v, z = model(normal(0, 2, 4, 32, 32), torch.tensor([0.1, 0.9]), torch.tensor([1, 10]))
    assert v.shape == (2, 4, 32, 32) and not v.any() and z.shape == (2, (32 // int(patch)) ** 2, 8)


def test_unknown_names_are_errors_that_list_what_there_is():
    for call, listed in (
        (lambda: Config.named("SiT-M/2"), "SiT-XL/2"),
        (lambda: Config.named("SiT-S/3"), "SiT-S/4"),
        (lambda: Config.named("SiT-S/2", patches=2), "patch_size"),
        (lambda: Config(input_size=30, patch_size=4), "multiple"),
        (lambda: Config(depth=4, encoder_depth=8), "encoder_depth"),
    ):
        with pytest.raises(ValueError, match=listed):
            call()


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


NUMBERS = [  # projector, qk_norm, mean v^2, three entries of v, two of z
    ("mlp", False, 3.697918, [-0.333957, -2.749124, 0.916266], [-1.994088, 2.339434]),
    ("linear", False, 3.697918, [-0.333957, -2.749124, 0.916266], [-6.418239, 5.500721]),
    ("conv", True, 3.823385, [-0.491907, -2.665686, 1.321012], [0.159795, -5.058365]),
    ("conv", False, 3.697918, [-0.333957, -2.749124, 0.916266], [0.48148, -3.88308]),
]
ALIGN = 0.025293
HOG = [0.015196, 0.148627, 0.119787, 0.009257]


def test_numbers_of_the_released_code():
    # taken from this network when it reproduced the released one, on the same weights, to 1e-6
    x, feat = normal(0, 3, 4, 8, 8), normal(1, 3, 16, 24)
    t, y = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 10, 7])
    for kind, qk_norm, v_sum, v_some, z_some in NUMBERS:
        model = fill(SiT(Config(**TINY, projector=kind, qk_norm=qk_norm)), strong=True)
        with torch.no_grad():
            v, z = model(x, t, y)
        got = torch.stack([v.square().mean(), v[0, 0, 0, 0], v[1, 1, 3, 5], v[2, 3, 7, 7], z[0, 0, 0], z[1, 7, 11]])
        torch.testing.assert_close(got, torch.tensor([v_sum, *v_some, *z_some]), rtol=1e-4, atol=1e-4)
    normed = spatial_norm(feat, 0.6)
    assert alignment_loss(z, normed).item() == pytest.approx(ALIGN, abs=1e-5)


def test_alignment_reaches_no_block_after_its_depth():
    config = Config(**TINY)
    model = fill(SiT(config), strong=True)
    batch = normal(0, 2, 4, 8, 8), torch.tensor([1, 2]), normal(1, 2, 16, 24)
    irepa_loss(model, *batch, config)["align"].backward()
    touched = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.blocks]
    assert touched == [True, True, False, False]
    assert not any(p.grad is not None and p.grad.any() for p in model.final_layer.parameters())


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_target_velocity_is_the_derivative_of_the_path(path):
    x, noise = normal(0, 4, 3).double(), normal(1, 4, 3).double()
    t = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: interpolate(x, noise, t, path)[0], (t,), (torch.ones_like(t),))
    torch.testing.assert_close(interpolate(x, noise, t, path)[1], derivative)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(interpolate(x[:2], noise[:2], ends, path)[0], torch.stack([x[0], noise[1]]))


def test_loss_is_its_formula_and_parts_make_a_whole():
    config = Config(**TINY, gamma=0.6, proj_coeff=0.7)
    model = fill(SiT(config), strong=True).train()
    x, y, target = normal(0, 4, 4, 8, 8), torch.arange(4), normal(1, 4, 16, 24)

    def loss(part=(0, 1), rows=slice(None)):
        return irepa_loss(model, x[rows], y[rows], target[rows], config, torch.Generator().manual_seed(5), part)

    whole = loss()
    halves = [loss((i, 2), slice(2 * i, 2 * i + 2)) for i in range(2)]
    for key in whole:
        torch.testing.assert_close(whole[key], (halves[0][key] + halves[1][key]) / 2)
    torch.testing.assert_close(whole["loss"], whole["denoise"] + 0.7 * whole["align"])
    g = torch.Generator().manual_seed(5)
    t, noise, drop = torch.rand(4, generator=g), torch.randn(x.shape, generator=g), torch.rand(4, generator=g)
    x_t = (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * noise
    v, z = model(x_t, t, torch.where(drop < 0.1, 10, y))
    torch.testing.assert_close(whole["denoise"], ((v - (noise - x)) ** 2).mean())
    a, b = z, spatial_norm(target, 0.6)
    torch.testing.assert_close(whole["align"], -((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean())
    with pytest.raises(ValueError, match=r"4\^2 tokens"):
        irepa_loss(model, x, y, target[:, :9], config)


# ---------------------------------------------------------------------------------------------------------------
# Sampling


def gaussian(t, path, mean=0.7, std=0.3):
    """The exact velocity for data N(mean, std^2): E[d x_t / dt | x_t]."""
    alpha, sigma, d_alpha, d_sigma = irepa.path_coefficients(torch.as_tensor(t, dtype=torch.float64), path)
    slope = (d_alpha * alpha * std**2 + d_sigma * sigma) / (alpha**2 * std**2 + sigma**2)
    return lambda x: d_alpha * mean + slope * (x - alpha * mean)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_samplers_carry_noise_to_a_known_gaussian(path):
    noise = normal(0, 20_000, 1).double()
    x = sample.sample_ode(lambda x, t: gaussian(t, path)(x), noise, 200, heun=True)
    torch.testing.assert_close(x, 0.7 + 0.3 * noise, rtol=0, atol=2e-3)  # point by point
    euler = sample.sample_ode(lambda x, t: gaussian(t, path)(x), noise, 200)
    torch.testing.assert_close(euler, 0.7 + 0.3 * noise, rtol=0, atol=5e-2)
    generator = torch.Generator().manual_seed(0)
    x = sample.sample_sde(lambda x, t: gaussian(t, path)(x), noise, 250, generator, path=path)
    assert x.mean().item() == pytest.approx(0.7, abs=0.01) and x.std().item() == pytest.approx(0.3, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([x[:, 0], noise[:, 0]]))[0, 1]) < 0.7  # and it is not the ODE


class Counting(torch.nn.Module):
    """A model of known velocity that counts its forwards: v = x * t + y."""

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
        plain = sample.sample_ode(lambda x, t: model(x.float(), t.float().expand(2), y)[0].double(), x, 7)
        model.sizes.clear()
        assert torch.equal(sample.sample_ode(sample.guided(model, y, 1.0), x, 7), plain)
        assert model.sizes == [2] * 7
        velocity = sample.guided(model, y, 3.0, (0.2, 0.5))
        for t, expected in ((0.2, 10 + 3 * (y - 10)), (0.5, 10 + 3 * (y - 10)), (0.51, y), (0.19, y)):
            model.sizes.clear()
            got = velocity(x, torch.tensor(t, dtype=torch.float64))
            assert model.sizes == ([4] if 0.2 <= t <= 0.5 else [2])
            torch.testing.assert_close(got, x * t + expected.view(-1, 1, 1, 1).float())


@pytest.mark.parametrize("sampler", ["sde", "heun"])
def test_samples_depend_on_seed_and_index_alone(sampler):
    model = fill(SiT(Config(**TINY)), strong=True)
    labels = sample.choose_labels("random", range(5), 10, seed=3)
    settings = dict(seed=3, sampler=sampler, steps=4, cfg=2.0)
    together = sample.generate(model, labels, range(5), **settings)
    apart = [sample.generate(model, labels[i : i + 1], [i], **settings) for i in (4, 0, 2)]
    torch.testing.assert_close(torch.cat(apart), together[[4, 0, 2]], rtol=1e-5, atol=1e-5)
    other = sample.generate(model, labels, range(5), **{**settings, "seed": 4})
    assert (other - together).abs().mean() > 0.1
    assert len({sample.seeded(0, i).initial_seed() for i in range(1000)}) == 1000


def test_rounding():
    assert sample.to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 3.0])).tolist() == [0, 0, 128, 255, 255]


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def released(kind, path, legacy=False, **extra):
    """A file as REPA or iREPA publish it -> its weights under our names."""
    model = fill(SiT(Config(**{**TINY, "hidden_size": 384, "num_heads": 6, "encoder_depth": 3}, projector=kind)))
    state = {"module._orig_mod." + k: v for k, v in model.state_dict().items()}
    if kind == "mlp":  # REPA's own name of it
        state = {k.replace("projection_layer.", ""): v for k, v in state.items()}
    if legacy:
        state = {k.replace("blocks.3.", "decoder_blocks.0."): v for k, v in state.items()}
    args = argparse.Namespace(encoder_depth=3, path_type="linear", lr=1e-4)
    torch.save(dict(model=state, ema=state, opt={}, args=args, steps=7, **extra), path)
    return model.state_dict()


@pytest.mark.parametrize(
    "kind,legacy", [("mlp", False), ("mlp", True), ("conv", False), ("linear", False), (None, False)]
)
def test_released_checkpoints_load_strictly(tmp_path, kind, legacy):
    state = released(kind, tmp_path / "0400000.pt", legacy)
    model, config = sample.load_checkpoint(tmp_path / "0400000.pt")
    assert (config.projector, config.encoder_depth if kind else 3, config.num_heads) == (kind, 3, 6)
    assert (config.input_size, config.num_classes, config.qk_norm) == (8, 10, False)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


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


def test_bad_checkpoints_are_named_errors(tmp_path):
    state = released("conv", tmp_path / "good.pt")

    def refused(data, message):
        torch.save(data, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=message):
            sample.load_checkpoint(tmp_path / "bad.pt")

    lacking = {k: v for k, v in state.items() if k != "blocks.2.mlp.fc1.bias"}
    refused(dict(ema=lacking), "missing blocks.2.mlp.fc1.bias")
    refused(dict(ema={**state, "extra.weight": torch.ones(1)}), "surplus extra.weight")
    refused(dict(ema={**state, "blocks.0.attn.proj.bias": torch.ones(3)}), r"attn.proj.bias is \[3\]")
    refused(dict(model=state), "no ema weights")
    refused([1, 2], "holds a list")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:50_000])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for name in ("cut.pt", "text.pt"):
        with pytest.raises(ValueError, match=name):
            sample.load_checkpoint(tmp_path / name)
    refused(dict(ema=state, config=dict(asdict(Config(**TINY)), num_heads=0)), "num_heads must be positive")
    odd = {**state, "projectors.1.projection_layer.weight": torch.ones(3)}
    refused(dict(ema=odd), "surplus projectors.1")
    assert sample.load_checkpoint(tmp_path / "bad.pt", projector=None, path="cosine")[1].path == "cosine"
    torch.save(dict(ema=state), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert sample.load_checkpoint(tmp_path / "old.pt")[1].projector == "conv"
    without = {k: v for k, v in state.items() if "projector" not in k}  # files for evaluation only
    torch.save(dict(ema=without), tmp_path / "eval.pt")
    assert sample.load_checkpoint(tmp_path / "eval.pt")[1].projector is None


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("save", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data))])
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save(dict(ema=Evil()), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        sample.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------------------------------------------------------
# What the loop is fed


def test_images_of_every_kind(tmp_path):
    rgb = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 36, 3)).astype(np.uint8))
    (tmp_path / "a").mkdir()
    (tmp_path / "b c é").mkdir()
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.new("L", rgb.size, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = Image.new("RGB", (32, 16), "black")
    turned.paste("white", (0, 0, 16, 16))
    deep = Image.fromarray((np.arange(256 * 16, dtype=np.uint16) * 16).reshape(64, 64))
    for name, image, more in (
        ("a/gray.JPG", rgb.convert("L"), {}),
        ("a/palette.png", rgb.convert("P"), {}),
        ("a/alpha.png", alpha, {}),
        ("a/cmyk.jpg", rgb.convert("CMYK"), {}),
        ("b c é/exif.jpeg", turned, dict(exif=exif)),
        ("b c é/16bit.png", deep, {}),
        ("b c é/small.bmp", rgb.resize((3, 2)), {}),
    ):
        image.save(tmp_path / name, **more)
    data = Folder(tmp_path, 16, progress=False)
    images, labels = data[np.arange(len(data))]
    assert images.shape == (7, 3, 16, 16) and data.classes == ["a", "b c é"] and labels.tolist() == [0] * 4 + [1] * 3
    named = dict(zip((Path(f).name for f in data.files), images))
    assert (named["alpha.png"] == 255).all()  # nothing but white shows through
    assert named["exif.jpeg"][:, :5].float().mean() > 200 > 50 > named["exif.jpeg"][:, -5:].float().mean()
    assert named["16bit.png"].float().mean() == pytest.approx(127, abs=2)
    Image.fromarray(np.full((16, 16), 200, np.uint16)).save(tmp_path / "dark.png")  # one scale for all 16-bit images
    with Image.open(tmp_path / "dark.png") as image:
        assert np.asarray(to_rgb(image)).max() == 1
    assert torch.equal(named["gray.JPG"][0], named["gray.JPG"][2])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as z:
        for file in data.files:
            z.write(tmp_path / file, f"inside/{file}")
        z.writestr("__MACOSX/a/._gray.jpg", b"resource fork")
    zipped = Folder(tmp_path / "all.zip", 16, progress=False)
    assert zipped.classes == data.classes and torch.equal(zipped[np.arange(7)][0], images)


def test_bad_data_is_a_named_error(photos, tmp_path):
    def refused(message, path, kind=ValueError, **settings):
        with pytest.raises(kind, match=message):
            Folder(path, 16, progress=False, **settings)

    refused("does not exist", tmp_path / "nowhere", FileNotFoundError)
    (tmp_path / "none").mkdir()
    refused("holds no images", tmp_path / "none")
    refused("one class only", photos / "cats")
    (tmp_path / "loop").symlink_to(photos)
    (photos / "cats/me").symlink_to(photos)
    try:
        assert len(Folder(tmp_path / "loop", 16, progress=False)) == 24  # each folder once
    finally:
        (photos / "cats/me").unlink()
    (tmp_path / "stray").mkdir()
    for file in ("a/x.png", "b/y.png", "z.png"):
        (tmp_path / "stray" / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "stray" / file)
    refused("z.png lies beside the class folders", tmp_path / "stray")
    (tmp_path / "x.zip").write_bytes(b"PK nonsense")
    refused("neither a folder nor a zip", tmp_path / "x.zip")
    broken = tmp_path / "broken"
    for folder in ("one", "two"):
        (broken / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(broken / folder / "good.jpg")
    (broken / "two/cut.jpg").write_bytes((broken / "two/good.jpg").read_bytes()[:400])
    (broken / "two/empty.png").write_bytes(b"")
    refused("two/cut.jpg.*1 more.*--skip-broken", broken, BrokenImage)
    data = Folder(broken, 16, skip_broken=True, progress=False)
    assert len(data) == 2 and len(data.broken) == 2 and "cut.jpg" in data.broken[0]


def test_each_file_of_a_bad_folder_ends_in_an_image_or_in_its_name(tmp_path):
    rgb = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 36, 3)).astype(np.uint8))
    good, bad = tmp_path / "data/good ones é", tmp_path / "data/bad"
    good.mkdir(parents=True)
    bad.mkdir()
    rgb.convert("P").save(good / "palette alpha.PNG", transparency=3)
    rgb.convert("CMYK").save(good / "cmyk.JPEG")
    Image.new("I;16", (20, 20), 40_000).save(good / "16bit.png")
    Image.new("RGB", (1, 1), "red").save(good / "dot.png")
    rgb.save(good / "animated.gif", save_all=True, append_images=[rgb.rotate(90), rgb])
    (good / "loop").symlink_to(tmp_path / "data")
    rgb.save(bad / "ok.jpg")
    (bad / "cut.jpg").write_bytes((bad / "ok.jpg").read_bytes()[:700])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("not an image")
    Image.new("1", (20_000, 20_000)).save(bad / "huge.png")  # 400 million pixels: a bomb, to PIL
    (bad / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (bad / "notes.txt").write_text("left alone")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    data = Folder(tmp_path / "data", 16, skip_broken=True, progress=False)
    assert len(data) == 6 and data.classes == ["bad", "good ones é"]
    for name in ("cut.jpg", "empty.jpg", "text.jpg", "huge.png", "gone.png"):
        assert sum(f"bad/{name} cannot be decoded" in broken for broken in data.broken) == 1
    assert before == {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as z:
        for name in ("../../a/up.png", "/b/root.png"):
            z.write(good / "dot.png", name)
    assert len(Folder(tmp_path / "evil.zip", 16, progress=False)) == 2  # read in place: nothing is extracted
    assert {*before, tmp_path / "evil.zip"} == {*tmp_path.rglob("*")} and not (tmp_path.parent.parent / "a").exists()


def test_shapes_are_drawn_from_index_and_seed():
    first, again, other = Shapes(16, 40), Shapes(16, 40), Shapes(16, 40, seed=1)
    i = np.arange(20)
    assert torch.equal(first[i][0], again[i][0]) and not torch.equal(first[i][0], other[i][0])
    assert first[i][1].tolist() == [*range(10)] * 2 and len(first.classes) == 10


def test_hog():
    hog = load_encoder("hog", grid=4)
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32)).astype(np.uint8))
    tokens = hog(images)
    assert tokens.shape == (2, 16, hog.dim)
    some = torch.stack([tokens[0, 0, 0], tokens[0, 5, 17], tokens[1, 10, 64], tokens[1, 15, 127]])
    torch.testing.assert_close(some, torch.tensor(HOG), rtol=1e-4, atol=1e-6)  # scikit-image's, on these pixels
    ramp = torch.arange(32, dtype=torch.uint8).mul(8)
    across = hog(ramp.expand(1, 3, 32, 32))  # a horizontal gradient votes for direction 0 alone
    down = hog(ramp[:, None].expand(1, 3, 32, 32))  # a vertical one for 90 degrees
    assert across.view(16, 16, 8)[..., 1:].abs().max() == 0 < across.view(16, 16, 8)[..., 0].min()
    assert down.view(16, 16, 8).sum((0, 1)).argmax() == 4
    with pytest.raises(ValueError, match="at least 8 px"):
        hog(images[..., :6, :6])


def test_sift():
    sift = load_encoder("sift", grid=4)
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32)).astype(np.uint8))
    tokens = sift(images)
    assert tokens.shape == (2, 16, sift.dim)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 16))
    ramp = torch.arange(32, dtype=torch.uint8).mul(8)
    for image, only in ((ramp.expand(1, 3, 32, 32), 0), (ramp[:, None].expand(1, 3, 32, 32), 2)):
        for direction, picture in ((only, image), (only + 4, 255 - image)):  # unlike HOG's, directions have a sign
            by_bin = sift(picture).view(16, 16, 8).sum((0, 1))
            assert by_bin.argmax() == direction and by_bin[direction] > 0.999 * by_bin.sum()
    shifted = sift(torch.roll(images, 8, dims=3))  # by one place of the grid; the border aside
    torch.testing.assert_close(shifted.view(2, 4, 4, -1)[:, :, 2], tokens.view(2, 4, 4, -1)[:, :, 1])
    with pytest.raises(ValueError, match="two pixels for each token"):
        load_encoder("sift", 16)(images[..., :24, :24])


def test_timm_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "fast_bf16", lambda device: False)  # where the processor has it, bf16 hides digits
    name = "timm:vit_tiny_patch16_224.augreg_in21k"
    teacher = load_encoder(name, grid=4, weights="random")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = teacher(images)
    assert tokens.shape == (2, 16, 192) == (2, 16, teacher.dim) and not tokens.requires_grad
    x = torch.nn.functional.interpolate((images / 255 - 0.5) / 0.5, (64, 64), mode="bicubic")  # this one's config
    torch.testing.assert_close(teacher(images), teacher.model.forward_features(x)[:, 1:], rtol=1e-4, atol=1e-4)

    import timm

    full = timm.create_model("vit_tiny_patch16_224.augreg_in21k").state_dict()
    torch.save(full, tmp_path / "full.pth")
    loaded = load_encoder(name, 4, tmp_path / "full.pth").model.state_dict()
    assert torch.equal(loaded["blocks.3.attn.qkv.weight"], full["blocks.3.attn.qkv.weight"])
    assert loaded["pos_embed"].shape == (1, 17, 192) and full["pos_embed"].shape == (1, 197, 192)
    torch.save({f"module.base_encoder.{k}": v for k, v in full.items()}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="foreign.pth does not fit"):  # and does not load nothing in silence
        load_encoder(name, 4, tmp_path / "foreign.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_encoder(name, 4, tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="not a ViT"):
        load_encoder("timm:resnet18", 4, "random")
    with pytest.raises(ValueError, match="unknown encoder"):
        load_encoder("dino", 4)


def test_bf16_moves_a_teacher_and_a_gradient_by_its_rounding_only(monkeypatch):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    exact, fast = [], []
    for bf16, out in ((False, exact), (True, fast)):
        monkeypatch.setattr(teachers, "fast_bf16", lambda device: bf16)
        torch.manual_seed(0)
        out.append(load_encoder("timm:vit_tiny_patch16_224.augreg_in21k", 4, "random")(images))
        model = fill(SiT(Config(**TINY, projector=None)))
        x, y = torch.randn(4, 4, 8, 8), torch.arange(4)
        with train.mixed(torch.device("cpu"), bf16):
            assert torch.backends.cuda.flash_sdp_enabled() != bf16
            model(x, torch.rand(4), y)[0].float().square().mean().backward()
        out += [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.backends.cuda.flash_sdp_enabled()  # nothing of it is left
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    for a, b in zip(exact, fast):
        assert a.dtype == b.dtype == torch.float32 and (a - b).norm() < 0.03 * a.norm() and not torch.equal(a, b)


@pytest.mark.parametrize("name", teachers.ENCODERS)
def test_every_teacher_has_its_grid_and_width(name):
    import timm

    entry = teachers.ENCODERS[name]
    side = 16 * entry.patch
    with torch.device("meta"):
        if name.startswith("webssl"):
            model = teachers.build_webssl(name)
        elif name.startswith("mocov3"):
            model = timm.create_model(f"vit_{'base' if 'vitb' in name else 'large'}_patch16_224", img_size=side)
            model.reset_classifier(0)
        else:
            model = teachers.without_head(teachers.build(entry.timm_id, 16, side))
        tokens = model.forward_features(torch.zeros(1, 3, side, side))[:, model.num_prefix_tokens :]
    assert tokens.shape == (1, 256, entry.dim)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(entry.millions, abs=0.6)
    assert name in teachers.list_encoders() and len(teachers.weights_file(name)) > 10


def test_perception_encoders_positions_count_patches(tmp_path):
    import timm

    native = timm.create_model("vit_pe_spatial_base_patch16_512.fb")
    torch.save(native.state_dict(), tmp_path / "pe.pth")
    teacher = load_encoder("pe_spatial_b16", 6, tmp_path / "pe.pth")
    images = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    assert teacher(images).shape == (1, 36, 768) and teacher.mean.flatten().tolist() == [0.5] * 3
    here, there = (m.rope.get_embed() for m in (teacher.model, native))
    torch.testing.assert_close(
        here.view(6, 6, -1), there.view(32, 32, -1)[:6, :6]
    )  # the same angles at the same places
    table = native.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (32, 32))
    table = torch.nn.functional.interpolate(table, (6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(teacher.model.pos_embed[:, 1:], table.flatten(2).transpose(1, 2))
    qkv = teacher.model.blocks[3].attn.qkv.weight
    assert torch.equal(qkv, native.blocks[3].attn.qkv.weight.to(qkv.dtype))  # bf16 where it is fast
    torch.save({f"module.base_encoder.{k}": v for k, v in native.state_dict().items()}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="foreign.pth does not fit"):
        load_encoder("pe_core_b16", 6, tmp_path / "foreign.pth")


def test_traps_of_the_other_teachers():
    radio = load_encoder("cradio_v3_b", 16, "random")
    assert radio.model.embeds.pos_embed_align_corners is False
    assert radio.mean.flatten().tolist() == pytest.approx(teachers.CLIP[0])
    images = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    assert radio(images).shape == (1, 256, 768)
    with torch.device("meta"):
        clip = teachers.build(teachers.ENCODERS["clip_vitl14"].timm_id, 16, 224)
    assert "QuickGELU" in type(clip.blocks[0].mlp.act).__name__ and not isinstance(clip.norm_pre, torch.nn.Identity)
    assert not teachers.ENCODERS["clip_vitl14"].norm and not teachers.ENCODERS["mae_vitl16"].norm
    assert teachers.ENCODERS["siglip_b"].stats == teachers.HALF  # the released code takes ImageNet's
    with pytest.raises(ValueError, match=r"cannot be downloaded.*huggingface.co/facebook/webssl.*--encoder-weights"):
        load_encoder("webssl_dino300m_full2b_224", 16)


def test_foreign_names_become_timms():
    import timm

    with torch.device("meta"):
        webssl = teachers.build_webssl("webssl_dino300m_full2b_224").state_dict()
        moco = timm.create_model("vit_large_patch16_224", num_classes=0).state_dict()
    layers = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense"}
    layers |= {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
    hf = {"embeddings.cls_token": 0, "embeddings.position_embeddings": 1, "embeddings.mask_token": 2}
    for kind in ("weight", "bias"):
        hf |= {f"embeddings.patch_embeddings.projection.{kind}": 3, f"layernorm.{kind}": 4}
        for i in range(24):
            hf |= {f"encoder.layer.{i}.{layer}.{kind}": 5 for layer in layers.values()}
            hf |= {
                f"encoder.layer.{i}.attention.attention.{n}.{kind}": k for k, n in enumerate(("key", "value", "query"))
            }
            hf |= {f"encoder.layer.{i}.layer_scale{n}.lambda1": n for n in (1, 2)}
    converted = teachers.webssl_names({k: torch.tensor([v]) for k, v in hf.items()})
    assert converted.keys() == webssl.keys() and converted["blocks.7.attn.qkv.weight"].tolist() == [2, 0, 1]
    native = {k.replace("blocks.7.", "blocks.1.7."): v for k, v in webssl.items()} | {"mask_token": None}
    native = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in native.items()}
    assert teachers.webssl_names(native).keys() == webssl.keys()
    odd = {"blocks.13.norm1.": "blocks.13.norm13.", "blocks.13.mlp.fc1.": "blocks.13.mlp.fc13."}
    odd |= {"blocks.14.norm2.": "blocks.14.norm14.", "blocks.14.mlp.fc2.": "blocks.14.mlp.fc14."}
    file = {"module.momentum_encoder.cls_token": 0, "module.base_encoder.head.0.weight": 0}
    for key in moco:
        for right, wrong in odd.items():
            key = key.replace(right, wrong)
        file[f"module.base_encoder.{key}"] = 0
    assert teachers.mocov3_names(file).keys() == moco.keys()


# ---------------------------------------------------------------------------------------------------------------
# The loop


def settings(*flags):
    return train.resolve(train.build_parser(), ["--out", "not/there", *flags])[0]


def test_flags_win_over_presets_and_presets_over_defaults(capsys):
    def five(*flags):
        config = train.network(settings("--image-size", "32", "--model", "SiT-S/4", *flags))
        return config.projector, config.kernel_size, config.gamma, config.proj_coeff, config.encoder_depth

    assert five() == five("--method", "irepa") == ("conv", 3, 0.6, 1.0, 4)
    assert five("--method", "repa") == ("mlp", 3, None, 0.5, 4)
    assert five("--method", "sit")[0] is None
    assert five("--gamma", "0.8", "--method", "repa", "--proj-coeff", "1") == ("mlp", 3, 0.8, 1.0, 4)
    assert five("--kernel-size", "1", "--gamma", "none", "--encoder-depth", "7") == ("conv", 1, None, 1.0, 7)
    assert five("--depth", "2")[4] == 2
    assert train.network(settings("--image-size", "32", "--model", "SiT-L/4")).encoder_depth == 8
    args = settings("--encoder", "dinov2_vitb14")  # the paper's
    assert (args.model, args.image_size, args.batch_size, args.lr, args.clip) == ("SiT-XL/2", 256, 256, 1e-4, 1.0)
    assert (args.ema, args.steps, args.data, args.warmup) == (0.9999, 400_000, "data/imagenet/train", 0)
    assert settings("--demo", "--steps", "7").steps == 7
    assert settings("--demo", "--model", "SiT-B/8").hidden_size is None and settings("--demo").hidden_size == 192
    assert settings("--demo", "--depth", "1").encoder_depth == 1
    with pytest.raises(ValueError, match="leave --data"):
        settings("--demo", "--data", "photos")
    with pytest.raises(SystemExit) as stop:
        settings("--kernel", "3", "--lerning-rate", "1")
    assert stop.value.code == 2 and "--lerning-rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--data nowhere", "nowhere does not exist"),
        ("--image-size 18", "18 is not a multiple of patch_size 4"),
        ("--batch-size 9 --accumulate 2", "does not divide"),
        ("--model SiT-M/4", "there are SiT-S/1"),
        ("--encoder nothing", "unknown encoder"),
        ("--depth 4 --encoder-depth 5", "encoder_depth 5"),
        ("--resume", "does not exist"),
        ("--device tpu9", "cannot be used"),
        ("--steps 0", "must be positive"),
        ("--lr nan", "must be positive"),
        ("--seed -1", "it is -1"),
        ("--kernel-size 0", "must be positive"),
        ("--image-size 4 --model SiT-S/2", "at least 8 px"),
        ("--image-size 512 --vae none", "16384 tokens"),
        ("--image-size 12 --cache-latents", "go with a --vae"),
        ("--vae nowhere", "neither a file or folder"),
        ("--image-size 132", "VAE's factor 8"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_2(photos, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(*RUN, "--data", photos, "--out", tmp_path / "run", *flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_batches_cover_epochs_and_do_not_depend_on_ranks():
    args = settings("--batch-size", "8", "--steps", "9", "--accumulate", "2")
    whole = np.concatenate(list(train.batches(np.arange(24), settings("--batch-size", "8", "--steps", "9"), 0, 0, 1)))
    for epoch in range(3):
        assert sorted(whole[24 * epoch : 24 * epoch + 24]) == list(range(24))
    ranks = [list(train.batches(np.arange(24), args, 0, rank, 2)) for rank in range(2)]
    assert np.array_equal(np.concatenate([part for pair in zip(*ranks) for part in pair]), whole)
    later = np.concatenate(list(train.batches(np.arange(24), settings("--batch-size", "8", "--steps", "9"), 5, 0, 1)))
    assert np.array_equal(later, whole[40:])
    few = np.concatenate(list(train.batches(np.arange(3), settings("--batch-size", "8", "--steps", "3"), 0, 0, 1)))
    assert len(few) == 24 and np.bincount(few).tolist() == [8, 8, 8]


def test_stop_and_resume_is_bit_for_bit(photos, tmp_path):
    flags = [*RUN, "--data", photos, "--seed", 3]
    run(*flags, "--steps", 6, "--out", tmp_path / "straight")
    run(*flags, "--steps", 3, "--out", tmp_path / "stopped")
    with pytest.raises(SystemExit):  # OUT exists
        run(*flags, "--out", tmp_path / "stopped")
    with pytest.raises(SystemExit):  # the order of the data would be another
        run("--resume", "--out", tmp_path / "stopped", "--batch-size", 4)
    with pytest.raises(SystemExit):  # another network
        run("--resume", "--out", tmp_path / "stopped", "--method", "repa")
    run("--resume", "--out", tmp_path / "stopped", "--steps", 6)  # the other settings come from the run
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "stopped"))
    for which in ("model", "ema"):
        assert all(torch.equal(v, b[which][k]) for k, v in a[which].items())
    for i, state in a["opt"]["state"].items():
        assert all(torch.equal(v, b["opt"]["state"][i][k]) for k, v in state.items())
    assert any((a["ema"][k] != v).any() for k, v in a["model"].items()) and a["classes"] == ["cats", "dogs"]
    (tmp_path / "straight/last.pt").rename(tmp_path / "kept.pt")  # as a run stopped before its first checkpoint
    assert json.loads((tmp_path / "straight/config.json").read_text())["device"] == "cpu"
    with pytest.raises(SystemExit):
        run("--resume", "--out", tmp_path / "stopped", "--steps", 6)  # nothing to do
    run("--resume", "--out", tmp_path / "straight")
    again = weights(tmp_path / "straight")
    assert all(torch.equal(v, again[k]) for k, v in a["model"].items())
    rows = [[json.loads(r) for r in (tmp_path / n / "log.jsonl").open()] for n in ("straight", "stopped")]
    assert [r["step"] for r in rows[0]] == [2, 4, 6] and [r["step"] for r in rows[1]] == [2, 3, 4, 6]
    assert rows[0][-1]["held_out"] == rows[1][-1]["held_out"]


def torchrun(script, *flags):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / script]
    return subprocess.run([*map(str, [*command, *flags])], env=env, capture_output=True, text=True, timeout=120)


def test_two_ranks_equal_one_process(photos, tmp_path):
    flags = [*RUN, "--data", photos, "--out"]
    run(*flags, tmp_path / "one")
    run(*flags, tmp_path / "parts", "--accumulate", 2)
    done = torchrun("train.py", *flags, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("parts", "two"):
        for k, v in weights(tmp_path / "one").items():
            # of steps of 1e-3: where a gradient is near Adam's epsilon, its rounding shows
            torch.testing.assert_close(weights(tmp_path / name)[k], v, rtol=1e-4, atol=2e-5)
    rows = [json.loads((tmp_path / n / "log.jsonl").read_text().splitlines()[-1]) for n in ("one", "two")]
    for key in ("loss", "denoise", "align", "held_out", "grad_norm"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4)
    torchrun(
        "sample.py", "--ckpt", tmp_path / "two/last.pt", "--num-images", 5, "--steps", 3, "--npz", tmp_path / "two.npz"
    )
    sample.main(
        ["--ckpt", str(tmp_path / "two/last.pt"), "--num", "5", "--steps", "3", "--npz", str(tmp_path / "one.npz")]
    )
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["labels"], two["labels"])
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1


def plant(monkeypatch, act):
    """Call act(step, losses) after the loss of each training step."""
    loss, calls = sample.irepa_loss, []

    def planted(*args, **kwargs):
        out = loss(*args, **kwargs)
        if args[0].training:
            calls.append(1)
            act(len(calls) - 1, out)
        return out

    monkeypatch.setattr(sample, "irepa_loss", planted)


def rows_of(out):
    return [json.loads(row) for row in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_is_not_applied(photos, tmp_path, monkeypatch, capsys, poison):
    def act(step, losses):
        if step in bad:
            losses["loss"] = losses["loss"] * poison

    bad = [3]
    plant(monkeypatch, act)
    run(*RUN, "--data", photos, "--steps", 4, "--ckpt-every", 1, "--keep", 3, "--out", tmp_path / "one")
    third, fourth = (torch.load(tmp_path / f"one/step-000000{n}.pt", weights_only=True) for n in (3, 4))
    assert all(torch.equal(v, fourth["model"][k]) for k, v in third["model"].items())
    assert not (tmp_path / "one/step-0000001.pt").exists()
    last = rows_of(tmp_path / "one")[-1]
    assert last["skipped"] == 1 and math.isfinite(last["loss"]) and all(map(math.isfinite, last.values()))

    monkeypatch.undo()
    bad = range(3, 99)
    plant(monkeypatch, act)
    monkeypatch.setattr(train, "PATIENCE", 3)
    flags = [*RUN, "--data", photos, "--steps", 20, "--ckpt-every", 4, "--seed", 5, "--sample-every", 0]
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--out", tmp_path / "many")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "in 3 steps in a row from step 3 on" in message
    data, args = Folder(photos, 16, progress=False), argparse.Namespace(seed=5, batch_size=8)
    for i in train.batch_at(3, train.split(24)[0], args, {}):
        assert data.files[i] in message
    state = torch.load(tmp_path / "many/last.pt", weights_only=True)
    assert state["step"] == 4  # the step before the last was the last that counted
    assert all(torch.isfinite(v).all() for w in ("model", "ema") for v in state[w].values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_75(photos, tmp_path, monkeypatch, capsys, number):
    flags = [*RUN, "--data", photos, "--workers", 2, "--ckpt-every", 100, "--sample-every", 0]
    run(*flags, "--out", tmp_path / "straight")
    plant(monkeypatch, lambda step, _: step == 1 and os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--out", tmp_path / "stopped")
    assert stop.value.code == 75 and "after step 3" in capsys.readouterr().out
    assert signal.getsignal(number) == before and torch.load(tmp_path / "stopped/last.pt")["step"] == 3
    run("--resume", "--out", tmp_path / "stopped")
    again = weights(tmp_path / "stopped")
    assert all(torch.equal(v, again[k]) for k, v in weights(tmp_path / "straight").items())


def test_all_ranks_stop_after_the_same_step(photos, tmp_path):
    script = tmp_path / "signalled.py"
    script.write_text(
        "import os, signal, sys\nimport sample, train\nloss, calls = sample.irepa_loss, []\n"
        "def planted(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return loss(*args, **kwargs)\n"
        "sample.irepa_loss = planted\ntrain.main(sys.argv[1:])\n"
    )
    flags = ["--data", photos, "--steps", 200, "--log-every", 200, "--ckpt-every", 200, "--out", tmp_path / "run"]
    done = torchrun(script, *RUN, *flags)
    assert "exitcode  : 75" in done.stderr and "stopped by a signal after step 4" in done.stdout
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 4
    script.write_text(script.read_text().replace("signal.SIGTERM", "signal.SIGKILL"))
    done = torchrun(script, "--resume", "--out", tmp_path / "run")  # a rank that dies takes the others along
    assert done.returncode and "Signal 9" in done.stderr


def test_a_full_disk_loses_no_checkpoint(photos, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    plant(monkeypatch, lambda step, _: step == 3 and resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1])))
    try:
        with pytest.raises(SystemExit, match="step 6 could not be saved"):
            run(*RUN, "--data", photos, "--steps", 6, "--out", tmp_path / "run", "--sample-every", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "last.pt cannot be written (" in capsys.readouterr().err
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 3
    assert not list((tmp_path / "run").glob("*.tmp"))
    run("--resume", "--out", tmp_path / "run")
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 6


def test_a_damaged_checkpoint_is_named_with_the_newest_good_one(photos, tmp_path, capsys):
    out = tmp_path / "run"
    run(*RUN, "--data", photos, "--ckpt-every", 1, "--keep", 2, "--out", out, "--sample-every", 0)
    assert sorted(file.name for file in out.glob("*.pt")) == ["last.pt", "step-0000003.pt", "step-0000004.pt"]
    for damaged in (out / "step-0000004.pt", out / "last.pt"):
        whole = damaged.read_bytes()
        damaged.unlink()
        damaged.write_bytes(whole[: len(whole) // 2])
    torch.save(dict(step=3), out / "step-0000009.pt")  # foreign
    with pytest.raises(SystemExit) as stop:
        run("--resume", "--out", out, "--steps", 5)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "last.pt is damaged" in message and "good one is" in message
    assert f"{out}/step-0000003.pt: copy it to {out}/last.pt" in message
    shutil.copy(out / "step-0000003.pt", out / "last.pt")
    run("--resume", "--out", out, "--steps", 4)


def test_a_second_run_in_one_folder_is_refused(photos, tmp_path, capsys):
    out, hold = tmp_path / "run", "import sys, inputs.latents as l; h = l.lock(sys.argv[1]); print(1); input()"
    run(*RUN, "--data", photos, "--out", out, "--sample-every", 0)
    torch.save(torch.load(out / "last.pt"), tmp_path / "m.pt")
    (tmp_path / "s.npz.parts").mkdir()
    for folder, call in (
        (out, lambda: run("--resume", "--out", out, "--steps", 5)),
        (
            tmp_path / "s.npz.parts",
            lambda: sample.main(["--ckpt", f"{out}/last.pt", "--num", "1", "--npz", f"{tmp_path}/s.npz"]),
        ),
    ):
        command = [sys.executable, "-c", hold, folder]
        other = subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        other.stdout.readline()
        with pytest.raises(SystemExit) as stop:
            call()
        assert stop.value.code == 2 and "another process is writing to" in capsys.readouterr().err
        other.kill()  # however it ends
        other.wait()
        call() if folder == out else None


def test_the_average_keeps_no_history():
    model = torch.nn.Linear(3, 2)
    ema = torch.nn.Linear(3, 2).requires_grad_(False)
    start, opt = ema.weight.clone(), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(1, 3)).sum().backward()
    train.update(model, ema, opt, 1.0, 0.9)
    torch.testing.assert_close(ema.weight, 0.9 * start + 0.1 * model.weight.detach())
    assert not ema.weight.requires_grad and ema.weight.grad_fn is None  # or memory grows with each step


def test_no_process_or_file_is_left_behind(photos, tmp_path):
    def counted():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(multiprocessing.active_children())

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are counted in /proc")
    sets = [tmp_path / "z.zip", photos]
    with zipfile.ZipFile(sets[0], "w") as z:
        for file in Folder(photos, 16, progress=False).files:
            z.write(photos / file, file)
    counts = []
    for n in range(4):
        run(*RUN, "--data", sets[n % 2], "--workers", 2 * (n % 2), "--out", tmp_path / f"{n}", "--sample-every", 0)
        counts.append(counted())
    assert counts[1] == counts[2] == counts[3] and counts[3][1] == 0


@pytest.mark.parametrize("method", ["irepa", "sit"])
def test_a_tiny_run_overfits(photos, tmp_path, method):
    few = tmp_path / "few"
    for name in ("black", "white"):
        (few / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16), name).save(few / name / f"{i}.png")
    flags = f"--method {method} --model SiT-S/2 --hidden-size 64 --steps 150 --lr 3e-3 --ema 0.9 --log-every 50"
    run(*RUN, "--data", few, "--out", tmp_path / "run", *flags.split())
    rows = [json.loads(row) for row in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rows[-1]["denoise"] < 0.25 < 0.4 < rows[0]["denoise"]
    if method == "sit":
        assert rows[-1]["align"] == 0
    model, config = sample.load_checkpoint(tmp_path / "run/last.pt")
    x = sample.generate(model, torch.tensor([0, 1] * 4), range(8), sampler="heun", steps=20).mean((1, 2, 3))
    assert (x[0::2] < -0.6).all() and (x[1::2] > 0.6).all()


def test_demo_then_sample(tmp_path, capsys):
    out = tmp_path / "demo"
    small = "--steps 4 --batch-size 8 --hidden-size 32 --num-heads 2 --depth 2 --log-every 2 --sample-every 4"
    run("--demo", "--out", out, "--device", "cpu", "--ckpt-every", 4, *small.split())
    assert f"python sample.py --ckpt {out}/last.pt" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 4 and config["torch"] == torch.__version__ and "git_commit" in config
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "denoise", "align", "held_out", "grad_norm", "lr", "images_per_s"} <= row.keys()
    grid = Image.open(out / "samples/step-0000004.png")
    assert grid.height >= 10 * 96 and (out / "curves.png").stat().st_size > 10_000
    common = ["--ckpt", str(out / "last.pt"), "--steps", "2"]
    sample.main(common)
    sample.main(common)  # another run takes another name
    grids = sorted(out.glob("last-*.png"))
    assert len(grids) == 2 and all(Image.open(g).height >= 10 * 96 for g in grids)
    sample.main([*common, "--num", "13", "--npz", str(tmp_path / "s.npz"), "--labels", "balanced", "--batch-size", "5"])
    data = np.load(tmp_path / "s.npz")
    assert data["arr_0"].shape == (13, 32, 32, 3) and data["arr_0"].dtype == np.uint8
    assert data["labels"].tolist() == [*range(10), 0, 1, 2]
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["step"] == 4 and record["cfg"] == 1.0 and len(record["checkpoint_sha256"]) == 64
    sample.main([*common, "--num", "3", "--out-dir", str(tmp_path / "pngs"), "--labels", "3,7"])
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    for flags in (
        ["--npz", str(tmp_path / "s.npz"), "--num", "2"],
        ["--npz", "new.npz"],
        ["--labels", "12"],
        ["--steps", "0"],
    ):
        with pytest.raises(SystemExit) as stop:
            sample.main([*common, *flags])
        assert stop.value.code == 2
    assert asdict(sample.load_checkpoint(out / "last.pt")[1]) == config["config"]


# ---------------------------------------------------------------------------------------------------------------
# Latents


def toy_vae(folder, seed):
    """A folder as diffusers writes it, of a VAE that halves images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    AutoencoderKL(**blocks, block_out_channels=[32, 32], layers_per_block=1, latent_channels=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return toy_vae(tmp_path_factory.mktemp("vae"), 0)


def test_the_pair_of_encoder_and_decoder(vae, tmp_path):
    network, spec = latents.load_vae(str(vae))
    assert (spec["factor"], spec["channels"], spec["scale"], spec["bias"]) == (2, 4, [0.18215] * 4, [0.0] * 4)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    moments = latents.encode(network, images)
    posterior = network.encode(images / 127.5 - 1).latent_dist
    mean, std = moments.chunk(2, dim=1)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, (posterior.logvar / 2).exp())  # the deviation, not its logarithm
    noise = normal(0, *mean.shape)
    torch.testing.assert_close(latents.to_latent(moments, noise, spec), (mean + std * noise) * 0.18215)
    scale, bias = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.save(dict(latents_scale=scale.view(1, 4, 1, 1), latents_bias=bias.view(1, 4, 1, 1)), tmp_path / "stats.pt")
    network, stats = latents.load_vae(str(vae), stats=tmp_path / "stats.pt")
    z = latents.to_latent(moments, 0 * noise, stats)
    torch.testing.assert_close(z, (mean - bias.view(4, 1, 1)) * scale.view(4, 1, 1))
    torch.testing.assert_close(latents.decode(network, z, stats), network.decode(mean).sample, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="latents with scale|holds latents of local with scale"):
        latents.same_spec(spec, stats, "here")
    from safetensors.torch import load_file, save_file

    file = toy_vae(tmp_path / "lacking", 0) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "quant_conv.bias"}, file)
    with pytest.raises(ValueError, match="lacks 1 tensors, such as quant_conv.bias"):  # and is not left random
        latents.load_vae(str(tmp_path / "lacking"))
    torch.save(dict(latents_scale=scale), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt is no file of .* 'latents_bias' is missing"):
        latents.read_stats(tmp_path / "bad.pt", 4)


LATENT = [*RUN, "--model", "SiT-S/2", "--vae-precision", "fp32"]


def test_a_cache_is_written_whole_resumed_and_refused(photos, vae, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cache"
    flags = ["--cache-latents", "--image-size", 16, "--data", photos, "--vae", vae, "--device", "cpu", "--out"]
    run(*flags, out)
    shards = sorted(out.glob("moments-*.npy"))
    before = [np.load(shard) for shard in shards]
    assert [b.shape for b in before] == [(16, 8, 8, 8), (8, 8, 8, 8)] and before[0].dtype == np.float16
    data = Folder(photos, 16, progress=False)
    moments = latents.encode(latents.load_vae(str(vae))[0], data[np.arange(16, 24)][0])
    torch.testing.assert_close(torch.from_numpy(before[1]).float(), moments, rtol=2e-3, atol=2e-3)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["count"] == 24 and manifest["classes"] == ["cats", "dogs"] and manifest["spec"]["factor"] == 2
    assert json.loads((out / "files.json").read_text()) == data.files and np.load(out / "labels.npy").sum() == 12

    encoded, encode = [], latents.encode
    monkeypatch.setattr(latents, "encode", lambda v, images: encoded.append(len(images)) or encode(v, images))
    run(*flags, out)
    assert not encoded  # a finished cache is left alone
    shards[1].unlink()  # as a run that was stopped leaves it
    with pytest.raises(SystemExit):
        run(*LATENT, "--data", photos, "--vae", vae, "--latents", out, "--out", tmp_path / "x")
    assert "moments-00001.npy is not there" in capsys.readouterr().err
    run(*flags, out)
    assert sum(encoded) == 8 and all(np.array_equal(np.load(s), b) for s, b in zip(shards, before))

    other = toy_vae(tmp_path / "other", 1)
    changed = shutil.copytree(photos, tmp_path / "changed")
    Image.new("RGB", (20, 18)).save(changed / "cats/0.png")
    for more, message in (
        (["--data", changed], "files_sha256"),  # other images under the same names
        (["--vae", other], "asked for is local with sha256"),
        (["--image-size", 32], "image_size"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*flags, out, *more)
        assert stop.value.code == 2 and message in capsys.readouterr().err
        with pytest.raises(SystemExit) as stop:
            run(*LATENT, "--data", photos, "--vae", vae, "--latents", out, "--out", tmp_path / "x", *more)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    shards[1].write_bytes(shards[1].read_bytes()[:600])
    with pytest.raises(SystemExit):
        run(*LATENT, "--data", photos, "--vae", vae, "--latents", out, "--out", tmp_path / "x")
    assert "moments-00001.npy is damaged" in capsys.readouterr().err
    shards[0].unlink()
    with pytest.raises(SystemExit):  # before anything is encoded
        run(*flags, out)
    assert "moments-00001.npy is damaged" in capsys.readouterr().err and sum(encoded) == 8
    with pytest.raises(SystemExit):
        run(*flags, photos)
    assert "something else" in capsys.readouterr().err


def test_training_on_latents(photos, vae, tmp_path, capsys):
    cache = tmp_path / "cache"
    common = ["--data", photos, "--vae", vae]
    torchrun("train.py", *common, "--cache-latents", "--image-size", 16, "--device", "cpu", "--out", cache)
    flags = [*LATENT, *common, "--sample-every", 0]
    run(*flags, "--out", tmp_path / "loop")  # the VAE in every step
    run(*flags, "--latents", cache, "--out", tmp_path / "cached", "--workers", 2)
    run(*flags, "--latents", cache, "--out", tmp_path / "stopped", "--steps", 3)
    run("--resume", "--out", tmp_path / "stopped", "--steps", 4)
    rows = [json.loads((tmp_path / n / "log.jsonl").read_text().splitlines()[-1]) for n in ("loop", "cached")]
    assert rows[0]["held_out"] == pytest.approx(rows[1]["held_out"], rel=1e-3)  # float16 moments are that close
    assert rows[0]["align"] == pytest.approx(rows[1]["align"], rel=1e-2)
    for key, value in weights(tmp_path / "cached").items():
        assert torch.equal(value, weights(tmp_path / "stopped")[key])
    assert not (tmp_path / "cached/samples").exists()
    with pytest.raises(SystemExit):  # other latents under the same run
        run("--resume", "--out", tmp_path / "loop", "--steps", 6, "--vae", toy_vae(tmp_path / "other", 1))
    assert "asked for is local with sha256" in capsys.readouterr().err

    ckpt = ["--ckpt", str(tmp_path / "cached/last.pt"), "--steps", "2", "--num", "5", "--batch-size", "2"]
    with pytest.raises(SystemExit):
        sample.main([*ckpt, "--npz", str(tmp_path / "s.npz")])
    assert "name its folder after --vae" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample.main([*ckpt, "--npz", str(tmp_path / "s.npz"), "--vae", str(tmp_path / "other")])
    assert "holds latents of local with sha256" in capsys.readouterr().err
    sample.main([*ckpt, "--npz", str(tmp_path / "s.npz"), "--vae", str(vae)])
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (5, 16, 16, 3)
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["latent"]["scale"] == [0.18215] * 4 and record["config"]["in_channels"] == 4


def test_sampling_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    model = fill(SiT(Config(**{**TINY, "in_channels": 3})), strong=True)
    torch.save(dict(ema=model.state_dict(), config=asdict(model.config)), tmp_path / "m.pt")
    flags = ["--ckpt", str(tmp_path / "m.pt"), "--steps", "2", "--num", "7", "--batch-size", "2", "--npz"]
    sample.main([*flags, str(tmp_path / "whole.npz")])
    calls, generate = [], sample.generate

    def dies(model, labels, indices, *args, **settings):
        calls.append(list(indices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(model, labels, indices, *args, **settings)

    monkeypatch.setattr(sample, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        sample.main([*flags, str(tmp_path / "s.npz")])
    with pytest.raises(SystemExit):
        sample.main([*flags, str(tmp_path / "s.npz"), "--seed", "1"])
    assert "unfinished samples with seed 0, not 1" in capsys.readouterr().err
    part = tmp_path / "s.npz.parts/00000000.npy"
    part.write_bytes(part.read_bytes()[:150])  # cut short by a failing disk: made again
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if Path(b).suffix != ".npz" else exit(9))
    with pytest.raises(SystemExit):  # killed when only the last move was left to do
        sample.main([*flags, str(tmp_path / "s.npz")])
    assert calls[2:] == [[4, 5], [0, 1], [4, 5], [6]] and not (tmp_path / "s.npz").exists()
    monkeypatch.setattr(os, "replace", replace)
    sample.main([*flags, str(tmp_path / ".." / tmp_path.name / "s.npz")])
    assert len(calls) == 6 and not (tmp_path / "s.npz.parts").exists()
    for key in ("arr_0", "labels"):
        assert np.array_equal(np.load(tmp_path / "s.npz")[key], np.load(tmp_path / "whole.npz")[key])


# ---------------------------------------------------------------------------------------------------------------
# JiT

JIT = dict(
    input_size=32, patch_size=4, hidden_size=96, depth=4, num_heads=4, bottleneck=16, num_classes=10, in_context_len=5,
    in_context_start=2, encoder_dim=24, encoder_depth=3, projector_dim=64,
)  # fmt: skip


def jit_model(**changes):
    """A tiny JiT whose weights depend on their names, with norms about 1: only then do rotations and norms show."""
    model = jit.JiT(jit.Config(**{**JIT, **changes}))
    for name, p in model.state_dict().items():
        if name != "pos_embed":
            draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape)) * 0.1
            p.copy_(torch.from_numpy((draw + ("norm" in name)).astype(np.float32)))
    return model.eval()


def some(x):
    return [x[0, 0, 0, 0].item(), x[1, 1, 3, 5].item(), x[2, 2, 31, 31].item(), x.square().mean().sqrt().item()]


def test_jit_gives_the_numbers_of_the_released_code(monkeypatch):
    rng = np.random.RandomState(11)  # every number below is the released code's
    x, noise = rng.uniform(-1, 1, (3, 3, 32, 32)), rng.standard_normal((3, 3, 32, 32))
    feat, start = rng.standard_normal((3, 64, 24)) * 2 + 1, rng.standard_normal((3, 3, 32, 32))
    x, noise, feat, start = (torch.from_numpy(a.astype(np.float32)) for a in (x, noise, feat, start))
    u, y = torch.tensor([0.12, 0.55, 0.97]), torch.tensor([1, 10, 7])  # JiT's time
    model, z_t = jit_model(), u.view(3, 1, 1, 1) * x + (1 - u).view(3, 1, 1, 1) * noise
    near = dict(rel=1e-5, abs=1e-5)
    with torch.no_grad():
        image, z = model(z_t, 1 - u, y)
        assert some(image) == pytest.approx([-0.2460538, -1.305179, 0.9916877, 1.0201077], **near)
        assert [z[0, 0, 0], z[1, 7, 11], z[2, 63, 23]] == pytest.approx([3.1462934, -1.9143469, -0.1997355], **near)
        z = jit_model(encoder_depth=2)(z_t, 1 - u, y)[1]  # where no class token has come in yet
        assert [z[0, 0, 0], z[1, 7, 11], z[2, 63, 23]] == pytest.approx([3.751494, -1.6799929, -0.8606848], **near)
        each = [(1.7380666, 0.0311098), (6.3802147, 0.0040461), (550.5833, 0.0343427)]
        for i, (denoise, align) in enumerate(each):
            given = iter([(torch.logit(u[i : i + 1]) + 0.8) / 0.8, noise[i : i + 1]])
            monkeypatch.setattr(jit, "draws", lambda *_: lambda sample, *shape: next(given))
            losses = jit.loss(model, x[i : i + 1], y[i : i + 1], feat[i : i + 1], model.config)
            assert losses["denoise"].item() == pytest.approx(denoise, rel=1e-5)
            assert losses["align"].item() == pytest.approx(align, **near)
            assert losses["loss"].item() == pytest.approx(denoise + 0.5 * align, rel=1e-5)
    samples = {
        (4, 1.0): [-0.693628, -0.8480802, 0.5852628, 1.0296122],
        (4, 2.5): [-0.0774962, -1.0702891, 0.6751028, 1.1951778],
        (30, 1.0): [-1.0326312, -0.7679803, 0.2769447, 1.0280137],
    }
    for (steps, cfg), expected in samples.items():
        got = jit.sampler(model, torch.tensor([1, 7, 3]), start, None, steps=steps, cfg=cfg)
        assert some(got) == pytest.approx(expected, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
    "name,size,count",
    [
        ("JiT-B/16", 256, 131_123_712),
        ("JiT-L/32", 512, 461_534_176),
        ("JiT-H/16", 256, 952_514_368),
    ],
)
def test_jit_sizes_are_the_published_ones(name, size, count):
    config = jit.Config.named(name, input_size=size, projector=None)
    with torch.device("meta"):
        model = jit.JiT(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert config.in_context_len == 32 and config.noise_scale == size / 256
    assert config.in_context_start == {"B": 4, "L": 8, "H": 10}[name[4]]


def test_jit_loss_is_its_formula_in_the_papers_time_and_parts_make_a_whole():
    model = jit_model(noise_scale=2.0, P_mean=0.5, P_std=2.0).train()
    config, x, y, target = model.config, normal(0, 4, 3, 32, 32), torch.arange(4), normal(1, 4, 64, 24)

    def loss(part=(0, 1), rows=slice(None)):
        return jit.loss(model, x[rows], y[rows], target[rows], config, torch.Generator().manual_seed(9), part)

    whole = loss()
    halves = [loss((i, 2), slice(2 * i, 2 * i + 2)) for i in range(2)]
    for key in whole:
        torch.testing.assert_close(whole[key], (halves[0][key] + halves[1][key]) / 2)
    g = torch.Generator().manual_seed(9)
    u = 1 / (1 + torch.exp(-0.5 - 2 * torch.randn(4, generator=g)))
    e, drop = 2 * torch.randn(x.shape, generator=g), torch.rand(4, generator=g)
    assert u.max() > 0.95 > u.min() and drop.min() < 0.1 < drop.max()  # or less would be seen
    u = u.view(4, 1, 1, 1)
    z = u * x + (1 - u) * e
    image, tokens = model(z, 1 - u.flatten(), torch.where(drop < 0.1, 10, y))
    v, predicted = ((a - z) / (1 - u).clamp(min=0.05) for a in (x, image))
    torch.testing.assert_close(whole["denoise"], (predicted - v).square().mean())
    torch.testing.assert_close(whole["align"], alignment_loss(tokens, spatial_norm(target, 0.8)))
    torch.testing.assert_close(whole["loss"], whole["denoise"] + 0.5 * whole["align"])
    with pytest.raises(ValueError, match=r"8\^2 tokens"):
        jit.loss(model, x, y, target[:, :9], config)


@pytest.mark.parametrize("depth", [2, 3])
def test_jit_alignment_reaches_no_block_after_its_depth(depth):
    model = jit_model(encoder_depth=depth)
    batch = normal(0, 2, 3, 32, 32), torch.tensor([1, 2]), normal(1, 2, 64, 24)
    jit.loss(model, *batch, model.config)["align"].backward()
    touched = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.blocks]
    assert touched == [i < depth for i in range(4)]
    assert not any(p.grad is not None and p.grad.any() for p in model.final_layer.parameters())
    # class tokens, which come after block 2, are not aligned themselves, only seen by the patches
    assert (model.in_context_posemb.grad is not None) == (depth > 2)


class Imagining(Counting):
    """Counting's numbers, as the image of a JiT."""

    config = jit.Config(**JIT, noise_scale=2.0)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.1, 0.7), (0.25, 0.75), (0.1, 1.0)])
@pytest.mark.parametrize("heun", [False, True])
def test_jit_sampler_is_the_papers_loop(interval, heun):
    model, y, noise, cfg = Imagining(), torch.tensor([1, 2]), normal(0, 2, 3, 4, 4), 2.5
    evaluations = []

    def velocity(z, k, steps):  # JiT's own time is k / steps
        low, high = (round(steps * end, 6) for end in interval)
        guide = k < high and (low == 0 or k > low)
        evaluations.append(4 if guide else 2)
        image, null = (z * (1 - k / steps) + label.view(2, 1, 1, 1) for label in (y, torch.full_like(y, 10)))
        return ((null + cfg * (image - null) if guide else image) - z) / max(1 - k / steps, 0.05)

    for steps in (10, 50):
        evaluations.clear()
        model.sizes.clear()
        z = 2.0 * noise.double()
        for k in range(steps):
            v = velocity(z, k, steps)
            if heun and k < steps - 1:
                v = (v + velocity(z + v / steps, k + 1, steps)) / 2
            z = z + v / steps
        settings = dict(sampler="heun" if heun else "euler", steps=steps, cfg=cfg, cfg_interval=interval)
        with torch.no_grad():
            torch.testing.assert_close(jit.sampler(model, y, noise, None, **settings), z.float(), rtol=1e-4, atol=1e-4)
        assert model.sizes == evaluations


@pytest.mark.parametrize("ema,kind", [(True, "conv"), (False, "mlp"), (True, None)])
def test_released_jit_checkpoints_load_strictly(tmp_path, capsys, ema, kind):
    state = jit_model(projector=kind, noise_scale=2.0).state_dict()
    args = argparse.Namespace(model="JiT-B/16", P_mean=-0.4, noise_scale=2.0, encoder_depth=2)
    other = {f"net.{k}": torch.zeros_like(v) for k, v in state.items()}
    file = dict(model=other, model_ema1=other, model_ema2=other, optimizer={}, epoch=3, args=args)
    file["model_ema1" if ema else "model"] = {f"net.{k}": v for k, v in state.items()}
    torch.save(file, tmp_path / "jit.pth")
    with torch.random.fork_rng():
        model, config = sample.load_checkpoint(tmp_path / "jit.pth", ema=ema, in_context_start=2)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    inferred = dict(JIT, noise_scale=2.0, P_mean=-0.4, projector=kind, encoder_depth=2)
    if kind != "mlp":
        del inferred["projector_dim"]
    if kind is None:
        del inferred["encoder_dim"]
    assert inferred.items() <= asdict(config).items()
    assert (config.gamma, config.proj_coeff) == (None if kind == "mlp" else 0.8, 0.5)
    torch.save({k: v for k, v in state.items() if k != "blocks.1.mlp.w12.bias"}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="missing blocks.1.mlp.w12.bias"):
        sample.load_checkpoint(tmp_path / "bare.pth")
    flags = ["--ckpt", str(tmp_path / "jit.pth"), "--steps", "2", "--num", "2", "--labels", "3"]
    sample.main([*flags, "--npz", str(tmp_path / "s.npz"), *([] if ema else ["--no-ema"])])
    assert json.loads((tmp_path / "s.json").read_text())["sampler"] == "heun"
    with pytest.raises(SystemExit):
        sample.main([*flags, "--npz", str(tmp_path / "t.npz"), "--sampler", "sde"])
    assert "jit samples with --sampler heun or euler" in capsys.readouterr().err


def test_jits_presets_and_what_it_has_not(photos, tmp_path, capsys):
    args = settings("--method", "jit")
    assert (args.model, args.vae, args.lr, args.beta2, args.clip, args.ema) == (
        "JiT-B/16", "none", 5e-5, 0.95, None, 0.9999,
    )  # fmt: skip
    alignments = {"irepa": ("conv", 0.8, 0.5), "repa": ("mlp", None, 0.5), "none": (None, 0.6, 1.0)}
    for align, expected in alignments.items():
        config = train.network(settings("--method", "jit", "--align", align))
        assert (config.projector, config.gamma, config.proj_coeff) == expected and config.input_size == 256
    assert settings("--beta2", "0.9").clip == 1.0 and settings().beta2 == 0.999
    demo = settings("--demo", "--method", "jit")
    assert demo.model == "JiT-S/4" and demo.hidden_size and demo.beta2 == 0.95 and settings("--demo").beta2 == 0.999
    small = [*RUN, "--data", photos, "--out", tmp_path / "run", "--method", "jit", "--model", "JiT-S/4"]
    for flags, message in (
        ("--qk-norm", "jit has no --qk-norm"),
        ("--path cosine", "jit has no --path"),
        ("--model SiT-S/4", "there are JiT-S/4"),
        ("--image-size 128 --vae sd-vae-ft-mse", "JiT is made for pixels"),
        ("--num-heads 16", "4 x num_heads 16"),
        ("--beta2 1", "--beta2 lie in [0, 1)"),
        ("--clip 0", "--clip must be positive"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*small, *flags.split())
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(ValueError, match="in_context_start 4"):
        jit.Config(**{**JIT, "in_context_start": 4})


def test_jit_overfits_stops_and_resumes(tmp_path):
    for name, half in (("left", np.s_[:, :8]), ("top", np.s_[:8])):  # the lit half, which is at 1, the other at -1
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[half] = 255
        (tmp_path / "few" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(pixels).save(tmp_path / "few" / name / f"{i}.png")
    flags = [*RUN, "--data", tmp_path / "few", "--method", "jit", "--model", "JiT-S/4", "--log-every", 20]
    flags += "--lr 3e-3 --warmup 0 --ema 0.9 --hidden-size 64 --class-dropout 0 --sample-every 0".split()
    run(*flags, "--out", tmp_path / "straight", "--steps", 150, "--lr-schedule", "cosine")
    run(*flags, "--out", tmp_path / "stopped", "--steps", 4)
    with pytest.raises(SystemExit):
        run("--resume", "--out", tmp_path / "stopped", "--steps", 8, "--align", "none")
    run("--resume", "--out", tmp_path / "stopped", "--steps", 8)
    run(*flags, "--out", tmp_path / "eight", "--steps", 8)
    for which in ("model", "ema"):
        other = weights(tmp_path / "stopped", which)
        assert all(torch.equal(v, other[k]) for k, v in weights(tmp_path / "eight", which).items())
    rows = [json.loads(row) for row in (tmp_path / "straight/log.jsonl").read_text().splitlines()]
    assert rows[-1]["denoise"] < 0.25 * rows[0]["denoise"] and "held_out" in rows[-1]
    assert rows[-1]["align"] < rows[0]["align"] < 0
    model, config = sample.load_checkpoint(tmp_path / "straight/last.pt")
    data = Folder(tmp_path / "few", 16)[np.array([0, 6])][0]
    assert isinstance(model, jit.JiT) and config.projector == "conv"
    x = sample.generate(model, torch.tensor([0, 1] * 3), range(6), draw=jit.sampler, steps=10)
    wrong = (x - torch.stack([data[k] for k in (0, 1) * 3]).float() / 127.5 + 1).abs().mean((1, 2, 3))
    assert wrong.mean() < 0.3 and wrong.max() < 0.7  # an image of the other class is wrong by 1
    run(*flags, "--out", tmp_path / "plain", "--steps", 2, "--align", "none")
    assert json.loads((tmp_path / "plain/log.jsonl").read_text())["align"] == 0


# ---------------------------------------------------------------------------------------------------------------
# MeanFlow


def meanflow_model(**changes):
    torch.manual_seed(0)
    model = meanflow.MeanFlow(meanflow.Config(**{**TINY, **changes}))
    for name, p in model.state_dict().items():
        if name != "pos_embed":
            draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape)) * 0.1
            p.copy_(torch.from_numpy(draw.astype(np.float32)))
    return model.eval()


def flow(seed=0, n=4):
    x, noise = normal(seed, n, 4, 8, 8), normal(seed + 1, n, 4, 8, 8)
    t, r = torch.linspace(0.9, 0.3, n), torch.linspace(0.1, 0.2, n)
    z, v = interpolate(x, noise, t)
    return z, t, r, torch.arange(n) % 10, v


class Closed(torch.nn.Module):
    """u = (A z) sin(t) + r z^2 + b[y], whose derivatives are known."""

    def __init__(self, A, b):
        super().__init__()
        self.A, self.b = torch.nn.Parameter(A), torch.nn.Parameter(b)

    def forward(self, z, t, y, r, project=True):
        t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        return torch.einsum("ck,bkhw->bchw", self.A, z) * t.sin() + r * z**2 + self.b[y][:, :, None, None], None


def test_meanflow_gives_the_numbers_of_the_official_code():
    # every number here is the official loss's and sampler's, in float64
    rng = np.random.RandomState(21)
    shapes = (3, 3), (6, 3), *[(8, 3, 4, 4)] * 3
    A, b, x, noise, start = (torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)
    net = Closed(A * 0.7, b * 0.5)
    t = torch.tensor([0.15, 0.5, 0.9, 0.35, 0.62, 0.78, 0.95, 0.81], dtype=torch.float64)
    r = torch.tensor([0.15, 0.5, 0.9, 0.1, 0.25, 0.0, 0.4, 0.3], dtype=torch.float64)
    y, near = torch.tensor([0, 1, 5, 3, 5, 0, 1, 2]), dict(rel=1e-10)  # 5 is the null class
    config = meanflow.Config(**{**TINY, "num_classes": 5})
    z, v = interpolate(x, noise, t)
    v = meanflow.guided_velocity(net, z, t, y, v, config)
    assert v[3, 0, 0].tolist() == pytest.approx([-0.3218386468869116, -0.8318484976126894, 2.795166559212112,
                                                 0.2817475863570366], **near)  # fmt: skip
    target = meanflow.average_target(net, z, t, r, y, v, torch.arange(3, 8))
    squares = (net(z, t, y, r)[0] - target).square().flatten(1).sum(1)
    assert squares.tolist() == pytest.approx([125.34021576275413, 147.95688181101576, 260.4711843719203,
        105.0436285438507, 121.55499500918371, 206.77450295015726, 221.43046466048455, 147.93004152901236],
        **near)  # fmt: skip
    meanflow.weighted(squares, config).mean().backward()
    assert net.A.grad[1].tolist() == pytest.approx(
        [-0.09227797440964844, 0.01665337301222717, -0.10956521516096077], **near
    )
    ends = [-1.2386728521656707, -0.43507990896199755], [-2.0384440699237727, -0.31128738741273676]
    for steps, end in enumerate(ends, start=1):
        got = meanflow.sampler(net, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]), start, None, steps=steps)
        assert got[5, 2, 1, :2].tolist() == pytest.approx(end, **near)

    rng, model = np.random.RandomState(22), meanflow_model()  # the network, in float32
    x, noise, start = (torch.from_numpy(rng.standard_normal((4, 4, 8, 8)).astype(np.float32)) for _ in range(3))
    t, r, y = torch.tensor([0.3, 0.7, 0.9, 0.5]), torch.tensor([0.3, 0.2, 0.0, 0.1]), torch.tensor([1, 10, 7, 3])
    z, v = interpolate(x, noise, t)
    near = dict(rel=1e-5, abs=1e-5)
    with torch.no_grad():
        target, u = meanflow.average_target(model, z, t, r, y, v, torch.arange(1, 4)), model(z, t, y, r)[0]
    assert u[1, 2, 3, :2].tolist() == pytest.approx([-1.5088551766, -0.2255232696], **near)
    assert target[1, 2, 3, :2].tolist() == pytest.approx([-1.0001067485, -1.1582344307], **near)
    squares = (u - target).square().flatten(1).sum(1)
    assert squares.tolist() == pytest.approx([941.407333917, 791.483618336, 951.843941445, 877.021341451], rel=1e-5)
    for steps, end in enumerate(([1.2355726329, 0.8166118113], [0.6581234426, 0.7279044838]), start=1):
        got = meanflow.sampler(model, torch.tensor([1, 2, 7, 3]), start, None, steps=steps)
        assert got[2, 1, 5, :2].tolist() == pytest.approx(end, **near)


def test_meanflow_held_out_loss_is_the_plain_error_whatever_the_alignment():
    chunks = [(i, 2, normal(i, 4, 4, 8, 8), torch.arange(4)) for i in range(2)]

    def held_out(**changes):
        model = meanflow_model(**changes)

        def loss(*args, **kwargs):
            assert not torch.is_grad_enabled()  # or the graphs of all chunks would be kept
            return meanflow.loss(*args, **kwargs)

        return train.held_out_loss(model, loss, chunks, model.config, contextlib.nullcontext, "cpu")

    error = held_out()
    assert error == held_out(projector=None) == held_out(projector="mlp", power=0.0, class_dropout=0.9)
    model = meanflow_model()
    whole = torch.cat([chunks[0][2], chunks[1][2]]), torch.cat([chunks[0][3], chunks[1][3]])
    plain = dataclasses.replace(model.config, projector=None)
    losses = meanflow.loss(model, *whole, None, plain, sample.seeded(0, 0))
    assert error == pytest.approx(losses["denoise"].item(), rel=1e-5) and losses["loss"].item() == pytest.approx(
        1, abs=1e-4
    )


def test_meanflow_target_is_the_identity_by_finite_differences():
    model = meanflow_model()
    z, t, r, y, v = flow()
    rows = torch.tensor([0, 2, 3])
    with torch.no_grad():
        target = meanflow.average_target(model, z, t, r, y, v, rows)
        h = 5e-3  # along the path: z moves with v, t with 1, r stays
        ahead, behind = (model(z + s * h * v, t + s * h, y, r)[0] for s in (1, -1))
        expected = v - (t - r).view(-1, 1, 1, 1) * (ahead - behind) / (2 * h)
    assert ((target - expected)[rows].square().mean() / (expected - v)[rows].square().mean()).item() < 1e-5
    assert torch.equal(target[1], v[1]) and not torch.allclose(target[0], v[0], atol=1e-2)
    still = meanflow.average_target(model, z, t, t, y, v, rows)  # r = t: flow matching
    assert torch.equal(still, v)


def test_meanflow_without_its_additions_is_flow_matching():
    model = meanflow_model(share=0.0, omega=1.0, kappa=0.0, power=0.0).train()
    config, x, y, target = model.config, normal(3, 4, 4, 8, 8), torch.arange(4), normal(4, 4, 16, 24)
    losses = meanflow.loss(model, x, y, target, config, torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(2)
    normals, noise, drop = torch.randn(4, 2, generator=g), torch.randn(x.shape, generator=g), torch.rand(4, generator=g)
    t = torch.sigmoid(normals - 0.4).max(1)[0]
    z, v = interpolate(x, noise, t)
    u, tokens = model(z, t, torch.where(drop < 0.1, 10, y), t)
    align = alignment_loss(tokens, spatial_norm(target, 0.6))
    torch.testing.assert_close(losses["denoise"], (u - v).square().mean())
    torch.testing.assert_close(losses["align"], align)
    torch.testing.assert_close(losses["loss"], (u - v).square().mean() * x[0].numel() + align)


def test_meanflow_weights_each_image_and_parts_make_a_whole():
    model = meanflow_model().train()
    config, x, y, target = model.config, normal(3, 8, 4, 8, 8), torch.arange(8), normal(4, 8, 16, 24)

    def loss(part=(0, 1), rows=slice(None)):
        return meanflow.loss(model, x[rows], y[rows], target[rows], config, torch.Generator().manual_seed(9), part)

    whole = loss()
    halves = [loss((i, 2), slice(4 * i, 4 * i + 4)) for i in range(2)]
    for key in whole:
        torch.testing.assert_close(whole[key], (halves[0][key] + halves[1][key]) / 2)
    squares = torch.tensor([1e-3, 1.0, 50.0], requires_grad=True)
    meanflow.weighted(squares, config).sum().backward()
    torch.testing.assert_close(squares.grad, 1 / (squares.detach() + 0.01))
    t, r, rows = meanflow.draw_times(torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)), 0, config)
    assert len(rows) == 1000 and (r <= t).all() and torch.equal((r < t).nonzero()[:, 0], rows)
    assert torch.logit(torch.cat([t[rows], r[rows]])).mean() == pytest.approx(-0.4, abs=0.1)


def test_meanflow_guides_inside_the_target():
    model = meanflow_model(omega=0.7, kappa=0.4, guidance_interval=(0.4, 0.8))
    z, t, r, y, v = flow()
    y[2] = 10  # dropped: nothing to guide to
    with torch.no_grad():
        cond, null = (model(z, t, label, t)[0] for label in (y, torch.full_like(y, 10)))
    guided = 0.7 * v + 0.4 * cond - 0.1 * null
    got = meanflow.guided_velocity(model, z, t, y, v, model.config)
    assert t.tolist() == pytest.approx([0.9, 0.7, 0.5, 0.3])
    torch.testing.assert_close(got[1], guided[1], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(got[i], v[i]) for i in (0, 2, 3))  # out of the interval, without a label


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_meanflow_sampling_of_a_known_flow_is_exact(steps):
    class Straight(torch.nn.Module):  # every path ends in the image of its class: u = (z - image) / t
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x, t, y, r):
            return (x - images[y]) / t.view(-1, 1, 1, 1), None

    images = normal(5, 3, 3, 4, 4).double()
    x = meanflow.sampler(Straight(), torch.tensor([2, 0]), normal(6, 2, 3, 4, 4).double(), None, steps=steps)
    torch.testing.assert_close(x, images[[2, 0]])


def test_meanflow_alignment_reaches_no_block_after_its_depth():
    model = meanflow_model()
    batch = normal(0, 4, 4, 8, 8), torch.tensor([1, 2, 3, 4]), normal(1, 4, 16, 24)
    meanflow.loss(model, *batch, model.config)["align"].backward()
    touched = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.blocks]
    assert touched == [True, True, False, False]


def test_meanflow_overfits_stops_and_resumes(tmp_path, capsys):
    for name in ("black", "white"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), name).save(tmp_path / "few" / name / f"{i}.png")
    flags = [*RUN, "--data", tmp_path / "few", "--method", "meanflow", "--log-every", 20, "--sample-every", 0]
    flags += "--image-size 8 --batch-size 32 --lr 5e-3 --ema 0.9 --hidden-size 64 --class-dropout 0 --omega 1".split()
    flags += "--kappa 0 --align none".split()
    run(*flags, "--out", tmp_path / "straight", "--steps", 200, "--lr-schedule", "cosine")
    run(*flags, "--out", tmp_path / "stopped", "--steps", 3)
    run("--resume", "--out", tmp_path / "stopped", "--steps", 6)
    run(*flags, "--out", tmp_path / "six", "--steps", 6)
    for which in ("model", "ema"):
        other = weights(tmp_path / "stopped", which)
        assert all(torch.equal(v, other[k]) for k, v in weights(tmp_path / "six", which).items())
    rows = rows_of(tmp_path / "straight")
    assert rows[-1]["denoise"] < 0.2 < 0.8 < rows[0]["denoise"]
    sample.main(
        ["--ckpt", f"{tmp_path}/straight/last.pt", "--num", "8", "--labels", "0,1", "--npz", f"{tmp_path}/s.npz"]
    )
    assert json.loads((tmp_path / "s.json").read_text())["steps"] == 1  # one evaluation an image
    x = np.load(tmp_path / "s.npz")["arr_0"].mean((1, 2, 3))
    assert (x[0::2] < 64).all() and (x[1::2] > 191).all()
    with pytest.raises(SystemExit):
        sample.main(
            ["--ckpt", f"{tmp_path}/straight/last.pt", "--num", "2", "--cfg", "2", "--npz", f"{tmp_path}/t.npz"]
        )
    assert "meanflow has no --cfg" in capsys.readouterr().err
    for wrong, message in (
        ("--sample-cfg 2", "has no --sample-cfg"),
        ("--kappa 1", "kappa lies in [0, 1)"),
        ("--method irepa --align irepa", "--method irepa has no --omega"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*flags, "--out", tmp_path / "x", *wrong.split())
        assert stop.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# REPA-E


def latent_normal(model):
    """Statistics for bn that are neither 0 nor 1."""
    model.bn.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    model.bn.running_var.copy_(torch.tensor([4.0, 0.3, 1.0, 9.0]))
    return model


@pytest.fixture(scope="session")
def joint():
    """What a step of REPA-E takes: networks, a batch, and the VAE's loss of it."""
    config = Config(**TINY)
    model = latent_normal(repa_e.SiT(config))
    model.load_state_dict({**model.state_dict(), **fill(SiT(config), strong=True).state_dict()})
    vae, disc = latents.load_vae("tiny")[0].requires_grad_(True), repa_e.Discriminator(4)
    batch = normal(0, 4, 3, 32, 32).clamp(-1, 1), torch.tensor([1, 2, 3, 4]), normal(1, 4, 16, 24)

    def vae_loss(coeff=1.5, perceptual=None):
        seeds = (torch.Generator().manual_seed(i) for i in (5, 6))
        return repa_e.vae_loss(model, vae, disc, *batch, config, (coeff, 0.1), perceptual, *seeds)

    return config, model, vae, disc, batch, vae_loss


def test_which_networks_learn_from_which_loss(joint):
    config, model, vae, disc, (x, y, target), vae_loss = joint
    losses, z, recon = vae_loss()
    assert z.shape == (4, 4, 8, 8) and recon.shape == x.shape
    inner = {"encoder", "quant_conv"}

    names = {p: "sit" for p in model.parameters()} | {p: "disc" for p in disc.parameters()}
    names = {p: name for p, name in names.items() if p.requires_grad}
    names |= {p: key.split(".")[0] for key, p in vae.named_parameters()}

    def reached(loss):
        grads = torch.autograd.grad(loss, [*names], retain_graph=True, allow_unused=True)
        return {name for name, grad in zip(names.values(), grads) if grad is not None and grad.any()}

    assert reached(losses["l1"]) == inner | {"decoder", "post_quant_conv"} and reached(losses["kl"]) == inner
    assert reached(losses["gan"]) == inner | {"decoder", "post_quant_conv", "disc"}
    assert reached(losses["vae_align"]) == inner | {"sit"} and reached(repa_e.hinge_loss(disc, x, recon)) == {"disc"}

    def gradients(net):
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    nets = {net: [p for p in net.parameters() if p.requires_grad] for net in (vae, disc, model)}
    repa_e.set_gradients(losses["loss"], nets[vae])
    assert len(gradients(vae)) == len(nets[vae]) and not gradients(disc) and not gradients(model)
    assert all(p.grad.stride() == p.stride() for p in nets[vae])  # the fused optimiser takes them to be alike
    repa_e.set_gradients(repa_e.hinge_loss(disc, x, recon), nets[disc])
    before = gradients(vae)
    assert len(gradients(disc)) == len(nets[disc]) and not gradients(model)
    sit = repa_e.loss(model.train(), z.detach(), y, target, config, torch.Generator().manual_seed(6))
    repa_e.set_gradients(sit["loss"], nets[model])
    assert len(gradients(model)) == len(nets[model]) == len([*model.parameters()]) - 1  # not the position table
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(vae)))
    # the alignment adds 1.5 of its own gradient to the encoder's, and nothing to the decoder's
    with_it, without = (torch.autograd.grad(vae_loss(c)[0]["loss"], nets[vae]) for c in (1.5, 0.0))
    alone = torch.autograd.grad(vae_loss()[0]["vae_align"], [*vae.encoder.parameters()])
    names = [name for name, _ in vae.named_parameters()]
    for name, a, b in zip(names, with_it, without):
        assert torch.equal(a, b) == name.startswith(("decoder.", "post_quant_conv.")), name
    for g, a, b in zip(alone, with_it, without):
        torch.testing.assert_close(a - b, 1.5 * g, rtol=1e-3, atol=1e-5)
    for net in nets:
        net.zero_grad()


def test_the_vaes_losses_are_their_formulas(joint):
    config, model, vae, disc, (x, y, target), vae_loss = joint
    losses, z, recon = vae_loss(2.0, lambda a, b: (a - b).square().mean((1, 2, 3), keepdim=True))
    with torch.no_grad():
        found = vae.encode(x).latent_dist
        std = (found.logvar / 2).exp()
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(z, found.mean + std * noise)
        posteriors = torch.distributions.Normal(found.mean, std)
        kl = torch.distributions.kl_divergence(posteriors, torch.distributions.Normal(0, 1)).sum() / 4
        torch.testing.assert_close(losses["kl"], kl, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(recon, vae.decode(z).sample)
        g = torch.Generator().manual_seed(6)
        t, eps = torch.rand(4, generator=g), torch.randn(z.shape, generator=g)
        mean, var = (v.view(4, 1, 1) for v in (model.bn.running_mean, model.bn.running_var))
        w = t.view(4, 1, 1, 1)
        model.eval()
        _, tokens = model((1 - w) * (z - mean) / (var + 1e-4).sqrt() + w * eps, t, y)  # no label is dropped
        align = alignment_loss(tokens, spatial_norm(target, config.gamma))
        torch.testing.assert_close(losses["vae_align"], align, rtol=1e-5, atol=1e-5)
        total = (x - recon).abs().mean() + (x - recon).square().mean() + 1e-6 * kl + 2 * align
        torch.testing.assert_close(losses["loss"], total - 0.1 * disc(recon).mean(), rtol=1e-5, atol=1e-5)
        real, false = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])  # patch by patch
        assert repa_e.hinge_loss(lambda v: v, real, false).item() == pytest.approx(0.5 * (2 / 2 + 1.5 / 2))
    with torch.device("meta"):
        disc = repa_e.Discriminator()
        assert disc(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert sum(p.numel() for p in disc.parameters()) == 2_765_633 and disc.main[11].out_channels == 1


def test_latents_are_normalised_by_running_and_batch_statistics(joint, monkeypatch):
    config, model, _, _, (_, y, target), vae_loss = joint
    drawn = []
    for module in (repa_e, irepa):
        monkeypatch.setattr(module, "interpolate", lambda *args: drawn.append(args) or interpolate(*args))
    blocks = []
    handles = [block.register_forward_hook(lambda *_, i=i: blocks.append(i)) for i, block in enumerate(model.blocks)]
    mean, var = model.bn.running_mean.clone(), model.bn.running_var.clone()
    z = vae_loss()[1].detach()
    assert blocks == [0, 1]  # no block after the alignment's
    assert torch.equal(model.bn.running_mean, mean) and torch.equal(model.bn.running_var, var)
    repa_e.loss(model.train(), z, y, target, config, torch.Generator().manual_seed(6))
    for handle in handles:
        handle.remove()
    per_channel = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.bn.running_mean, 0.9 * mean + 0.1 * per_channel.mean(1))
    torch.testing.assert_close(model.bn.running_var, 0.9 * var + 0.1 * per_channel.var(1))
    (first, noise, t, _), (second, *again) = drawn
    assert torch.equal(noise, again[0]) and torch.equal(t, again[1])  # both passes draw the same
    torch.testing.assert_close(first, (z - mean.view(4, 1, 1)) / (var + 1e-4).sqrt().view(4, 1, 1))
    torch.testing.assert_close(second.transpose(0, 1).flatten(1).mean(1), torch.zeros(4), rtol=0, atol=1e-4)
    variance = per_channel.var(1, unbiased=False)
    torch.testing.assert_close(second.transpose(0, 1).flatten(1).var(1, unbiased=False), variance / (variance + 1e-4))
    model.eval()
    spec = repa_e.latent_spec(latent_normal(model), dict(channels=4))
    scale, bias = latents.per_channel(spec, z)
    torch.testing.assert_close(model.bn(z) / scale + bias, z)  # what decode() does


JOINT = [*RUN, *"--method repa_e --image-size 32 --model SiT-S/2 --vae tiny --lpips none --disc-width 4".split()]


def test_repa_e_stops_resumes_and_samples(photos, tmp_path, capsys):
    flags = [*JOINT, "--data", photos, "--ema", 0.5, "--warmup", 2, "--sample-every"]
    run(*flags, 0, "--steps", 3, "--out", tmp_path / "straight")
    run(*flags, 2, "--steps", 2, "--out", tmp_path / "stopped")
    run("--resume", "--out", tmp_path / "stopped", "--steps", 3, "--sample-every", 0)
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "stopped"))
    for which in ("model", "ema", "vae", "discriminator"):
        assert all(torch.equal(v, b[which][k]) for k, v in a[which].items())
    for which in ("opt", "opt_vae", "opt_disc"):
        assert len(a[which]["state"]) > 10
        for i, state in a[which]["state"].items():
            assert all(torch.equal(v, b[which]["state"][i][k]) for k, v in state.items())
    start = latents.load_vae("tiny")[0].state_dict()
    assert all((a["vae"][k] != v).any() for k, v in start.items())
    for key in ("bn.running_mean", "bn.running_var"):  # the EMA follows the statistics too
        assert (a["ema"][key] != a["model"][key]).all() and (a["ema"][key] - a["model"][key]).abs().max() < 1
    rows = [json.loads((tmp_path / n / "log.jsonl").read_text().splitlines()[-1]) for n in ("straight", "stopped")]
    assert rows[0].keys() >= {*repa_e.MEANS, "held_out", "step", "lr"} and rows[0]["held_out"] == rows[1]["held_out"]
    assert (tmp_path / "stopped/samples/reconstructions-0000002.png").stat().st_size > 1000
    assert (tmp_path / "stopped/samples/step-0000002.png").stat().st_size > 1000
    with pytest.raises(SystemExit):  # another network
        run("--resume", "--out", tmp_path / "stopped", "--steps", 4, "--align", "repa")

    ckpt = ["--ckpt", str(tmp_path / "stopped/last.pt"), "--sampler", "euler", "--steps", "3", "--num", "4"]
    for which, more in (("ema", []), ("model", ["--no-ema"])):
        sample.main([*ckpt, *more, "--npz", str(tmp_path / f"{which}.npz")])
        got, (model, _) = np.load(tmp_path / f"{which}.npz"), sample.load_checkpoint(ckpt[1], ema=which == "ema")
        x = sample.generate(model, torch.from_numpy(got["labels"]), range(4), sampler="euler", steps=3)
        mean, var = (b[which][f"bn.running_{k}"].view(4, 1, 1) for k in ("mean", "var"))
        vae = latents.load_vae("tiny")[0]
        vae.load_state_dict(b["vae"])
        with torch.no_grad():
            images = sample.to_uint8(vae.decode(x * (var + 1e-4).sqrt() + mean).sample).permute(0, 2, 3, 1)
        assert np.abs(got["arr_0"].astype(int) - images.numpy()).max() <= 1
    record = json.loads((tmp_path / "ema.json").read_text())
    assert record["latent"]["bias"] == pytest.approx(b["ema"]["bn.running_mean"].tolist(), rel=1e-6)
    for flags, message in ((["--vae", "tiny"], "holds its own VAE"), (["--labels", "9"], "classes are 0 to 1")):
        with pytest.raises(SystemExit) as stop:
            sample.main([*ckpt, *flags, "--npz", str(tmp_path / "x.npz")])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    torch.save({**b, "vae": {}}, tmp_path / "bad.pt")
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(tmp_path / "bad.pt"), "--npz", str(tmp_path / "x.npz"), "--num", "2"])
    assert "the checkpoint's VAE cannot be used" in capsys.readouterr().err


def test_repa_e_on_two_ranks_equals_one_process(photos, tmp_path):
    # the discriminator alone sees a process's own share: without it nothing but rounding may differ
    flags = [*JOINT, "--data", photos, "--gan-coeff", 0, "--lr", 1e-4, "--log-every", 1, "--sample-every", 0, "--out"]
    run(*flags, tmp_path / "one", "--steps", 3)
    torchrun("train.py", *flags, tmp_path / "two", "--steps", 3)
    one, two = ([json.loads(r) for r in (tmp_path / n / "log.jsonl").open()] for n in ("one", "two"))
    for row, other in zip(one, two, strict=True):
        for key in "l1 kl vae_align loss denoise align grad_norm grad_norm_vae held_out".split():
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), (row["step"], key)


def test_repa_e_overfits(tmp_path, monkeypatch):
    for name in ("black", "white"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for i in range(2):
            image = Image.new("RGB", (32, 32), name)
            image.paste("grey", (6, 12, 14, 20))  # for the teacher to see
            image.save(tmp_path / "few" / name / f"{i}.png")
    loss, free = repa_e.loss, []
    monkeypatch.setattr(
        repa_e, "loss", lambda m, z, *args, **kw: free.append(z.requires_grad) or loss(m, z, *args, **kw)
    )
    flags = "--image-size 24 --hidden-size 64 --batch-size 4 --steps 70 --lr 5e-3 --ema 0.9 --log-every 10"
    flags += " --gan-coeff 0.01 --vae-proj-coeff 0.5 --sample-every 0"
    run(*JOINT, "--data", tmp_path / "few", "--out", tmp_path / "run", *flags.split())
    rows = [json.loads(row) for row in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(free) > 70 and not any(free)  # the denoising loss never reaches the VAE
    assert rows[-1]["l1"] < 0.2 < 0.5 < rows[0]["l1"] and rows[-1]["denoise"] < 0.75 * rows[0]["denoise"]
    flags = "--num 8 --sampler heun --steps 20 --cfg 4 --labels 0,1 --ckpt"
    sample.main([*flags.split(), str(tmp_path / "run/last.pt"), "--npz", str(tmp_path / "s.npz")])
    x = np.load(tmp_path / "s.npz")["arr_0"].mean((1, 2, 3))
    assert x[0::2].max() < 150 < x[1::2].min()


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--vae none", "trains a VAE"),
        ("--accumulate 2", "leave --accumulate out"),
        ("--image-size 16", "takes 24 px"),
        ("--latent-stats x.pt", "leave --latent-stats out"),
        ("--latents x", "leave --latents and"),
        ("--vae-precision bf16", "leave --vae-precision out"),
        ("--lpips nowhere.pth", "nowhere.pth: there is no such file: fetch https"),
        ("--disc-width 0", "--disc-width must be positive"),
        ("--gan-coeff inf", "must be finite"),
        ("--method irepa", "--lpips is for --method repa_e"),
        ("--demo --method jitter", "invalid choice"),
    ],
)
def test_what_does_not_fit_repa_e_is_one_sentence(photos, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(*JOINT, "--data", photos, "--out", tmp_path / "run", *flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error and not (tmp_path / "run").exists()


def test_lpips_is_torchvisions_vgg_or_an_error(tmp_path, monkeypatch):
    class Package(torch.nn.Module):  # as lpips.LPIPS: VGG's layers in slices, under their numbers
        def __init__(self, **settings):
            super().__init__()
            assert settings == dict(net="vgg", pnet_rand=True, verbose=False)
            slices = {"slice1": {"0": torch.nn.Conv2d(3, 4, 3)}, "slice2": {"5": torch.nn.Conv2d(4, 4, 3)}}
            self.net = torch.nn.ModuleDict({k: torch.nn.ModuleDict(v) for k, v in slices.items()})

    monkeypatch.setitem(sys.modules, "lpips", argparse.Namespace(LPIPS=Package))
    state = {k.replace("net.slice1", "features").replace("net.slice2", "features"): v + 1
             for k, v in Package(net="vgg", pnet_rand=True, verbose=False).state_dict().items()}  # fmt: skip
    torch.save({**state, "classifier.0.weight": torch.ones(2)}, tmp_path / "vgg.pth")
    net = repa_e.load_lpips(str(tmp_path / "vgg.pth"), "cpu")
    assert torch.equal(net.net["slice2"]["5"].weight, state["features.5.weight"])
    assert not any(p.requires_grad for p in net.parameters()) and repa_e.load_lpips("none", "cpu") is None
    torch.save({"features.0.weight": torch.ones(2)}, tmp_path / "other.pth")
    for weights, message in ((tmp_path / "other.pth", "does not hold torchvision's VGG16"), (None, "takes --lpips")):
        with pytest.raises(ValueError, match=message):
            repa_e.load_lpips(weights, "cpu")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        repa_e.load_lpips(tmp_path / "vgg.pth", "cpu")


# ---------------------------------------------------------------------------------------------------------------
# The claims, re-run: convergence


def test_arms_are_the_published_settings_and_their_halves():
    found = {}
    for arm, flags in convergence.ARMS.items():
        args = settings("--demo", *flags.split())
        found[arm] = args.projector, args.gamma, args.proj_coeff
    del found["sit"]  # without a projector, the others say nothing
    assert settings("--demo", *convergence.ARMS["sit"].split()).projector is None
    assert found == {
        "repa": ("mlp", None, 0.5),
        "irepa": ("conv", 0.6, 1.0),
        "conv-only": ("conv", None, 0.5),
        "norm-only": ("mlp", 0.6, 0.5),
    }


def test_arms_of_a_seed_share_trunk_data_and_noise(photos, tmp_path):
    for arm, flags in convergence.ARMS.items():
        coefficient = () if arm == "sit" else ("--proj-coeff", 0)
        small = *RUN, "--projector-dim", 32, "--sample-every", 0
        run(*small, *flags.split(), *coefficient, "--data", photos, "--out", tmp_path / arm)
    sit = weights(tmp_path / "sit")
    for arm in convergence.ARMS:  # an alignment that counts for nothing changes nothing, from the first weights on
        trunk = {k: v for k, v in weights(tmp_path / arm).items() if not k.startswith("projectors")}
        assert trunk.keys() == sit.keys() and all(torch.equal(v, sit[k]) for k, v in trunk.items()), arm


@pytest.fixture
def few(monkeypatch):
    """convergence.py's smallest budget: 200 drawn shapes of 16 px, two legs of two steps."""
    for module in (convergence, train):
        monkeypatch.setattr(module, "Shapes", lambda size, count: Shapes(size, 200))
    monkeypatch.setattr(train, "Folder", Folder)  # which convergence.py replaces
    flags = "--image-size 16 --model SiT-S/4 --hidden-size 32 --depth 2 --num-heads 2 --batch-size 8 --steps 4"
    budget = dict(flags=f"{flags} --encoder-depth 1 --log-every 2 --precision fp32", points=2, images=12, learn=3)
    monkeypatch.setitem(convergence.BUDGETS, "minutes", dict(budget, sampling="--sampler heun --steps 2"))


def test_a_comparison_that_was_stopped_goes_on(few, tmp_path, monkeypatch):
    def compare(out, *flags):
        convergence.main(["--out", str(tmp_path / out), "--device", "cpu", "--seeds", "0", *flags])
        return json.loads((tmp_path / out / "results.json").read_text())

    straight = compare("straight", "--arms", "sit", "irepa")
    assert [run["arm"] for run in straight["runs"]] == ["sit", "irepa"]
    assert all([*run[name]] == ["2", "4"] for run in straight["runs"] for name in ("held_out", "distance"))
    assert 0 <= straight["distance"]["accuracy"] <= 1 and straight["distance"]["name"] == "FD-classifier"
    text = (tmp_path / "straight/table.md").read_text()
    gap = straight["runs"][1]["held_out"]["4"] - straight["runs"][0]["held_out"]["4"]
    assert f"| irepa | 1 | {straight['runs'][1]['held_out']['4']:.4f} | {gap:.4f} |" in text
    assert Image.open(tmp_path / "straight/curves.png").width > 1000
    assert Image.open(tmp_path / "straight/samples.png").height == 2 * (16 * 6 + 4)  # a row an arm

    compare("stopped", "--arms", "sit")
    whole, calls = convergence.measure, []

    def stop(args, folder, step, distance):
        calls.append((folder.name, step))
        if step == 4:
            raise KeyboardInterrupt  # trained, not yet measured
        return whole(args, folder, step, distance)

    monkeypatch.setattr(convergence, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        compare("stopped", "--arms", "sit", "irepa")
    assert calls == [("irepa-seed0", 2), ("irepa-seed0", 4)]
    monkeypatch.setattr(convergence, "measure", whole)
    resumed = compare("stopped", "--arms", "sit", "irepa")
    for a, b in zip(straight["runs"], resumed["runs"]):
        del a["images_per_s"], b["images_per_s"]
        assert a == b
    with pytest.raises(SystemExit) as exit:  # another comparison
        compare("stopped", "--arms", "sit", "--", "--lr", "1e-3")
    assert exit.value.code == 2


def test_the_distance_of_equal_sets_is_zero(few, tmp_path):
    args, _ = convergence.prepare(["--out", str(tmp_path)])
    data = convergence.Shapes(16, 10_000)
    distance, facts = convergence.meter(args, data, torch.device("cpu"))
    training, held = train.split(len(data))
    assert distance([data[training][0]]) == pytest.approx(0, abs=1e-6)
    assert distance([data[training[:50]][0], data[training[50:]][0]]) == pytest.approx(0, abs=1e-6)
    assert distance([255 - data[training][0]]) > 10 * distance([data[held.flatten()][0]]) > 0
    seen, unseen = convergence.parts_of(data)
    assert sorted([*seen, *unseen, *held.flatten()]) == list(range(200))
    first = convergence.parts_of(range(50_000))[1][:500]  # files lie class by class: the first must not be of one class
    assert len(np.unique(first // 5000)) == 10


def test_a_teacher_is_learned_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "fast_bf16", lambda device: False)
    monkeypatch.setattr(convergence, "fast_bf16", lambda device: False)
    data, file = Shapes(16, 60), tmp_path / "new/vit.pt"
    accuracy = convergence.learn_teacher("timm:test_vit", file, data, 2, 4, torch.device("cpu"))
    assert 0 <= accuracy <= 1
    teacher = load_encoder("timm:test_vit", 4, file)
    saved, random = teachers.read_weights(file), load_encoder("timm:test_vit", 4, "random")
    assert all(torch.equal(v, saved[k]) for k, v in teacher.model.state_dict().items())
    images = data[np.arange(2)][0]
    assert teacher(images).shape == (2, 16, 64) and not torch.allclose(teacher(images), random(images))
    assert convergence.learn_teacher("timm:test_vit", file, data, 10**9, 4, torch.device("cpu")) == accuracy


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--data nowhere", "nowhere does not exist"),
        ("--encoder nothing", "unknown encoder 'nothing'"),
        ("--reference stats.npz", "goes with --inception"),
        ("--learn-teacher 15", "--encoder-weights: name it"),
        ("--learn-teacher 15 --encoder-weights nowhere", "hog has no weights"),
        ("--learn-teacher 5 --encoder-weights nowhere", "--learn-teacher at least 10"),
        ("--images 1", "--images is at least 2"),
        ("-- --out elsewhere", "--out after --"),
        ("-- --lr-schedule cosine", "need --lr-schedule constant"),
        ("-- --steps 1", "need --lr-schedule constant, and as many --steps"),
        ("-- --gamma", "expected one argument"),
        ("-- --patch 3", "unrecognized arguments"),
    ],
)
def test_a_mistake_in_a_comparison_is_one_sentence(few, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        convergence.main(["--out", str(tmp_path / "out"), "--device", "cpu", *flags.split()])
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------
# The evaluator


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file with the names and shapes of the released Inception, filled from the names."""
    weights = {}
    for name, p in fid.InceptionV3().state_dict().items():
        if not p.is_floating_point():
            continue  # the released file has no batch counters
        draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape))
        if name.endswith("conv.weight") or name == "fc.weight":
            draw *= math.sqrt(2 / np.prod(p.shape[1:]))
        elif name.endswith("running_var"):
            draw = 1 + 0.1 * abs(draw)
        else:
            draw = 0.1 * draw + name.endswith("bn.weight")
        weights[name] = torch.from_numpy(draw.astype(np.float32))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


def noise_images():
    rs = np.random.RandomState(5)
    small = rs.randint(0, 256, size=(3, 32, 32, 3)).astype(np.uint8)
    large = rs.randint(0, 256, size=(2, 256, 256, 3)).astype(np.uint8)
    blocks = rs.randint(0, 256, size=(1, 8, 8, 3)).astype(np.uint8).repeat(32, 1).repeat(32, 2)
    return [torch.from_numpy(a).permute(0, 3, 1, 2) for a in (small, large, blocks)]


def test_inception_is_tensorflows(inception):
    # numbers of OpenAI's evaluator on a graph with these weights
    model = fid.InceptionV3()
    assert len(torch.load(inception, weights_only=True)) == 472
    model.load_state_dict(torch.load(inception, weights_only=True))
    resized = torch.cat([fid.resize(images) for images in noise_images()])
    some = torch.stack([resized[i, c, h, w] for i, c, h, w in ((0, 0, 1, 1), (1, 1, 149, 150), (3, 2, 297, 298))])
    torch.testing.assert_close(some, torch.tensor([111.8586, 71.8194, 16.9031]), rtol=0, atol=1e-4)
    folded, digest = fid.load_inception(inception)
    assert len(digest) == 64 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    for network in (model, folded):
        pool, spatial, logits = (torch.cat(part) for part in zip(*map(network, noise_images())))
        assert pool.shape == (6, 2048) and spatial.shape == (6, 2023) and logits.shape == (6, 1008)
        some = torch.stack([pool[i, j] for i, j in ((0, 0), (1, 777), (3, 2047), (4, 5), (5, 1024))])
        expected = torch.tensor([0.0, 1.371389, 0.666493, 0.712859, 0.467613])
        torch.testing.assert_close(some, expected, rtol=0, atol=2e-5)
        places = (0, 0, 0, 0), (1, 6, 16, 3), (3, 2, 5, 9), (4, 3, 10, 0), (5, 5, 8, 16)  # image, channel, row, column
        some = torch.stack([spatial[i, (h * 17 + w) * 7 + c] for i, c, h, w in places])
        expected = torch.tensor([0.366499, 0.0, 0.0, 0.616447, 0.305103])
        torch.testing.assert_close(some, expected, rtol=0, atol=2e-5)
        some = torch.stack([logits[0, 0], logits[3, 1007], logits[5, 500]])
        torch.testing.assert_close(some, torch.tensor([0.42913, -0.24715, -0.41308]), rtol=0, atol=3e-5)


def test_frechet_distance_in_closed_form():
    rs = np.random.RandomState(0)
    a, b, mu = rs.uniform(0.5, 2, 40), rs.uniform(0.5, 2, 40), rs.standard_normal(40)
    basis = np.linalg.qr(rs.standard_normal((40, 40)))[0]  # covariances that commute
    expected = (mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    first, second = (0 * mu, basis * a @ basis.T), (mu, basis * b @ basis.T)
    assert fid.frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-10)
    assert fid.frechet_distance(*first, *first) < 1e-6 * a.sum()
    x, y = rs.standard_normal((30, 200)), rs.standard_normal((40, 200)) * np.linspace(0.2, 1, 200)  # rank 29 and 39
    sides = [(f.mean(0), np.cov(f, rowvar=False)) for f in (x, y)]
    cross = np.linalg.norm((x - x.mean(0)) @ (y - y.mean(0)).T, "nuc") / math.sqrt(29 * 39)
    exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + sides[0][1].trace() + sides[1][1].trace() - 2 * cross
    assert fid.frechet_distance(*sides[0], *sides[1]) == pytest.approx(exact, rel=2e-6)
    assert fid.frechet_distance(*sides[0], *sides[0]) < 1e-6 * sides[0][1].trace()
    for bad in ((mu[:3], *second), (*first[:1], np.full((40, 40), np.nan), *second)):
        with pytest.raises(ValueError, match="finite"):
            fid.frechet_distance(*(*bad, *second)[:4])


def test_moments_stream():
    x = np.random.RandomState(0).standard_normal((103, 7)).astype(np.float32) + 5
    moments = fid.Moments(7)
    for part in torch.from_numpy(x).split(10):
        moments.add(part)
    mu, sigma = moments.result()
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12)


def test_inception_score_of_known_posteriors():
    sure = 1e4 * torch.eye(8).repeat(5, 1)
    assert fid.inception_score(sure) == pytest.approx(8)
    assert fid.inception_score(torch.zeros(40, 8)) == pytest.approx(1)
    ordered = sure[torch.arange(40).remainder(8).argsort(stable=True)]  # each split of 10 sees two classes
    assert fid.inception_score(ordered, 10) == pytest.approx(2)
    logits = normal(0, 30, 6).double()
    p = logits.softmax(1)
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert fid.inception_score(logits) == pytest.approx(kl.exp().item())


def test_precision_and_recall():
    line = torch.arange(10.0)[:, None]
    assert fid.precision_recall(line, line) == (1, 1)
    # of five samples three lie within some radius; a radius is the distance to the third neighbour, the edge included
    samples = torch.tensor([[0.0], [9.0], [12.0], [12.1], [40.0]])
    assert fid.precision_recall(line, samples)[0] == pytest.approx(0.6)
    rs = np.random.RandomState(77)
    reference, samples = rs.standard_normal((300, 16)), rs.standard_normal((200, 16)) * 0.9 + 0.15
    features = (torch.from_numpy(f.astype(np.float32)) for f in (reference, samples))
    assert fid.precision_recall(*features) == pytest.approx((0.88, 0.636667), abs=1e-6)  # OpenAI's evaluator on these
    with pytest.raises(ValueError, match="more than k"):
        fid.precision_recall(line, line[:3])


@pytest.fixture(scope="session")
def image_sets(tmp_path_factory):
    """The same nine 24x20 images as npz, compressed npz, folder and zip."""
    root = tmp_path_factory.mktemp("sets")
    pixels = np.random.RandomState(1).randint(0, 256, (9, 20, 24, 3)).astype(np.uint8)
    np.savez(root / "plain.npz", pixels)
    np.savez_compressed(root / "small.npz", pixels)
    (root / "folder/deep").mkdir(parents=True)
    with zipfile.ZipFile(root / "all.zip", "w") as z:
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(root / f"folder/deep/{i}.PNG")
            z.write(root / f"folder/deep/{i}.PNG", f"x/{i}.PNG")
    return root


@pytest.mark.parametrize("name", ["plain.npz", "small.npz", "folder", "all.zip"])
def test_every_kind_of_image_set_is_the_same(image_sets, name):
    images, statistics = fid.open_set(image_sets / name)
    whole = torch.cat(list(images.batches(0, 9, 4)))
    expected = np.load(image_sets / "plain.npz")["arr_0"]
    assert np.array_equal(whole.permute(0, 2, 3, 1), expected) and statistics == {} and images.size == (20, 24)
    assert torch.equal(torch.cat(list(images.batches(3, 8, 2))), whole[3:8])


def test_the_crop_of_a_reference_is_that_of_training():
    for width, height in ((100, 70), (33, 64), (32, 32), (20, 31), (300, 130)):
        image = Image.fromarray(np.random.RandomState(width).randint(0, 256, (height, width, 3)).astype(np.uint8))
        assert np.array_equal(fid.center_crop(image, 32), center_crop(image, 32))
    deep = Image.fromarray(np.random.RandomState(0).randint(0, 65536, (9, 9)).astype(np.uint16))
    for image in (deep, image.convert("RGBA"), image.convert("P"), image.convert("LA"), image.convert("CMYK")):
        assert np.array_equal(fid.to_rgb(image), to_rgb(image))


def score(*flags):
    fid.main([*map(str, flags), "--device", "cpu"])


def test_two_ranks_give_the_statistics_of_one(inception, image_sets, tmp_path):
    flags = ["--inception", inception, image_sets / "folder", "--batch-size", 2, "--save-stats"]
    score(*flags, tmp_path / "one.npz")
    torchrun("fid.py", *flags, tmp_path / "two.npz", "--device", "cpu")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["n"] == two["n"] == 9 and one["size"].tolist() == [20, 24] and sorted(one) == sorted(two)
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_allclose(two[key], one[key], rtol=1e-4, atol=1e-6)


class Means(torch.nn.Module):
    """In Inception's place: features that are quick to compute."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2048, 5)

    def forward(self, images):
        pixels = images.float().flatten(1) / 255
        return pixels[:, :1].expand(-1, 2048), pixels[:, -1:].expand(-1, 2023), pixels[:, :5]


def test_the_table(image_sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "load_inception", lambda *args: (Means(), fid.HASH + "0" * 56))
    sides = []  # a distance of 2,048 dimensions takes seconds
    monkeypatch.setattr(fid, "frechet_distance", lambda *args: sides.append(args) or float(len(sides)))
    score(image_sets / "plain.npz", image_sets / "all.zip", "--json", tmp_path / "out.json")
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["fid"], record["sfid"], record["precision"], record["recall"]) == (1, 2, 1, 1)
    assert record["samples"]["n"] == record["reference"]["n"] == 9 and record["not_available"] == {}
    assert [len(w) > 0 for w in record["warnings"]] == [True] * 3  # both small, and not 50,000
    table = capsys.readouterr().out
    assert "FID" in table and "not comparable with published numbers" in table
    pixels = np.load(image_sets / "plain.npz")["arr_0"].reshape(9, -1) / 255
    assert sides[0][0] == pytest.approx(pixels[:, 0].mean()) and sides[1][3][7, 9] == pytest.approx(
        pixels[:, -1].var(ddof=1)
    )
    score("--save-stats", tmp_path / "stats.npz", image_sets / "folder")
    score(image_sets / "plain.npz", tmp_path / "stats.npz", "--json", tmp_path / "more.json")
    record = json.loads((tmp_path / "more.json").read_text())
    assert record["precision"] is None and "reference is statistics only" in record["not_available"]["precision"]
    other = dict(np.load(tmp_path / "stats.npz"), inception="f" * 64, fast=True)
    np.savez(tmp_path / "other.npz", **other)
    with pytest.raises(SystemExit):
        score(image_sets / "plain.npz", tmp_path / "other.npz")
    assert "other Inception weights" in capsys.readouterr().err
    score(tmp_path / "other.npz", tmp_path / "other.npz")  # needs no network
    assert "made with --fast" in capsys.readouterr().out
    stored = dict(np.load(tmp_path / "stats.npz"))  # a standard reference: statistics of more than its images
    del stored["mu_s"], stored["sigma_s"], stored["n"]
    stored["mu"] = stored["mu"] + 1
    np.savez(tmp_path / "reference.npz", arr_0=np.load(image_sets / "plain.npz")["arr_0"], **stored)
    score(image_sets / "plain.npz", tmp_path / "reference.npz", "--json", tmp_path / "third.json")
    record = json.loads((tmp_path / "third.json").read_text())
    assert record["precision"] == 1 and record["reference"] == dict(
        path=str(tmp_path / "reference.npz"), n=None, images_seen=9
    )
    assert "mu_s" in record["not_available"]["sfid"] and np.array_equal(sides[-1][2], stored["mu"])


BAD = {
    "absent.npz": (None, "does not exist"),
    "one.npz": (np.zeros((1, 8, 8, 3), np.uint8), "one image only"),
    "float.npz": (np.zeros((4, 8, 8, 3), np.float32), "arr_0 is float32"),
    "nchw.npz": (np.zeros((4, 3, 8, 8), np.uint8), r"arr_0 is uint8 [4, 3, 8, 8]"),
    "small.npz": (np.zeros((4, 8, 8, 3), np.uint8), "image sizes differ"),
    "mu.npz": (dict(mu=np.zeros(2048)), "mu and sigma have shapes"),
    "nan.npz": (dict(mu=np.full(2048, np.nan), sigma=np.zeros((2048, 2048))), "not finite"),
    "cut.npz": (b"PK", "truncated"),
    "text.npz": (b"hello", "cannot be used"),
    "broken": ({"a.png": b"\x89PNG", "b.png": b""}, "broken/a.png cannot be read"),
    "sizes": ({"a.png": (24, 20), "b.png": (24, 20), "c.png": (24, 21)}, "sizes/c.png is 24x21"),
    "empty": ({"notes.txt": b"none"}, "holds no images"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_set_is_named(image_sets, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(fid, "load_inception", lambda *args: (Means(), "0" * 64))
    content, message = BAD[name]
    path = tmp_path / name
    if isinstance(content, dict) and "." not in name:
        path.mkdir()
        for file, data in content.items():
            (path / file).write_bytes(data) if isinstance(data, bytes) else Image.new("RGB", data).save(path / file)
    elif isinstance(content, bytes):
        path.write_bytes((image_sets / "plain.npz").read_bytes()[:3000] if content == b"PK" else content)
    elif content is not None:
        np.savez(path, **content) if isinstance(content, dict) else np.savez(path, content)
    with pytest.raises(SystemExit) as stop:
        score(image_sets / "plain.npz", path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and name in error and "Traceback" not in error


def test_weights_that_are_absent_or_wrong_are_named(image_sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / "wrong.pth")
    for flags, message in (
        ([], f"put it at {tmp_path}/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"),
        (["--inception", tmp_path / "absent.pth"], "no such file"),
        (["--inception", tmp_path / "wrong.pth"], "wrong.pth does not hold"),
        (["--image-size", 8], "goes with --save-stats"),
    ):
        with pytest.raises(SystemExit) as stop:
            score(image_sets / "plain.npz", image_sets / "folder", *flags)
        assert stop.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# Spatial structure


def halves(side):
    """Tokens of two kinds at right angles, left and right: [1, T, 2], and the left half as a mask [1, T]."""
    left = torch.arange(side).repeat(side)[None] < side // 2
    return torch.stack([left, ~left], dim=2).float() * 3, left


def test_spatial_metrics_in_closed_form():
    tokens, left = halves(6)
    apart, same = torch.eye(36)[None] * 5, torch.ones(1, 36, 3)
    # 54 of 60 pairs at d = 1 lie in one half, and 20 of 140 at d >= 6
    assert spatial.lds(tokens).item() == pytest.approx(54 / 60 - 20 / 140, abs=1e-6)
    assert spatial.srss(tokens, left).item() == 1 and spatial.srss(tokens, ~left).item() == 1
    for metric, expected in ((spatial.lds, 0), (spatial.cds, 0), (spatial.rmsc, math.sqrt(35 / 36))):
        assert metric(apart).item() == pytest.approx(expected, abs=1e-6)
        assert metric(same).item() == pytest.approx(0, abs=1e-6)
    assert spatial.rmsc(tokens).item() == pytest.approx(math.sqrt(0.5))
    assert spatial.srss(tokens, torch.zeros(1, 36)).isnan().all()
    with pytest.raises(ValueError, match="at least 5 x 5 tokens, not 35"):
        spatial.lds(apart[:, :35])


def test_spatial_metrics_are_their_definitions():
    side, z = 7, normal(41, 2, 49, 5) + 0.3
    mask = torch.from_numpy(np.random.RandomState(42).rand(2, 49) < 0.5)
    for b in range(2):
        x = z[b].double().numpy()
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        place = np.stack(np.divmod(np.arange(side**2), side), axis=1)
        pairs = [(s, t, np.abs(place[s] - place[t]).sum(), x[s] @ x[t]) for s in range(49) for t in range(49)]

        def mean(keep):
            found = [k for s, t, d, k in pairs if keep(s, t, d)]
            return np.mean(found) if found else np.nan

        slope = np.polyfit(range(1, 9), [mean(lambda s, t, d, r=r: d == r) for r in range(1, 9)], 1)[0]
        m = mask[b].numpy()
        scores = [
            mean(lambda s, t, d: s == i and m[t] and d == 1) - mean(lambda s, t, d: s == i and not m[t] and d >= 6)
            for i in np.flatnonzero(m)
        ]
        expected = dict(
            lds=mean(lambda s, t, d: d == 1) - mean(lambda s, t, d: d >= 6), cds=-slope, srss=np.nanmean(scores),
            rmsc=math.sqrt(1 - np.square(x.mean(0)).sum()),
        )  # fmt: skip
        for name, value in expected.items():
            got = spatial.METRICS[name](z, *([mask] if name == "srss" else []))[b].item()
            assert got == pytest.approx(value, abs=1e-6), name


def test_published_correlations(tmp_path, capsys):
    spatial.main(["--correlate", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/results.json").read_text())["correlations"]
    r = {name: round(f["pearson"][0], 3) for name, f in found.items()}
    assert r == dict(accuracy=-0.260, lds=-0.852, cds=-0.847, srss=-0.886, rmsc=-0.889)
    assert all(f["pearson"][1] < f["pearson"][0] < f["pearson"][2] and len(f["x"]) == 27 for f in found.values())
    assert round(found["accuracy"]["spearman"][0], 2) == 0.03 and round(found["srss"]["spearman"][0], 2) == -0.91
    assert "RMSC             27  -0.889" in capsys.readouterr().out
    assert Image.open(tmp_path / "out/correlations.png").size > (1000, 300)


def test_ranks_of_equals_and_of_the_better():
    noise = np.random.RandomState(43).standard_normal((3, 200))
    assert spatial.ranks(noise + np.array([[0], [3], [3]]))[0].tolist() == [3, 3, 3]
    assert sorted(map(tuple, spatial.ranks(noise + np.array([[0], [3], [3]]))[1:].tolist())) == [(1, 1, 2), (2, 1, 2)]
    noise[:, :3] = np.nan  # images without a mask
    assert spatial.ranks(noise + np.array([[0], [9], [5]])).tolist() == [[3, 3, 3], [1, 1, 1], [2, 2, 2]]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Six drawn shapes in one folder, the mask of each but the last, and a table of FIDs."""
    root = tmp_path_factory.mktemp("drawn")
    (root / "images").mkdir(), (root / "masks").mkdir()
    images, _ = Shapes(64, 6)[range(6)]
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(root / f"images/{i}.png")
        if i < 5:
            Image.fromarray(image.max(2) > 140).save(root / f"masks/{i}.png")
    rows = "hog,9,70\nsift,8,60\npixels,7,\ntimm:vit_tiny_patch16_224,6,50\nother,5,40\n"
    (root / "fid.csv").write_text(f"# a comment\nencoder,fid,accuracy\n{rows}")
    (root / "bad.csv").write_text("encoder,fid\nhog,nine\n")
    (root / "few.csv").write_text("encoder,fid\nhog,9\nsift,7\n")
    return root


def test_spatial_structure_of_drawn_shapes(drawn, tmp_path, capsys):
    vit, out = "timm:vit_tiny_patch16_224", tmp_path / "out"
    flags = f"--data {drawn}/images --image-size 64 --images 5 --encoders hog sift pixels {vit} --weights {vit}=random"
    flags += f" --masks {drawn}/masks --correlate {drawn}/fid.csv --show 2.png:9,7 --device cpu --out {out}"
    spatial.main(flags.split())
    said = " ".join(capsys.readouterr().out.split())
    record = json.loads((out / "results.json").read_text())
    assert sorted(f.name for f in out.iterdir()) == ["correlations.png", "pca.png", "results.json", "similarity.png"]
    assert "5 of the 6 images" in said and "pixels" in said and "no forecast of a FID" in said
    assert len(record["images"]) == 5 and list(record["encoders"]) == ["hog", "sift", "pixels", f"{vit} (random)"]
    images = torch.stack([torch.from_numpy(np.array(Image.open(drawn / "images" / f))) for f in record["images"]])
    tokens, result = spatial.pixels(images.permute(0, 3, 1, 2)), record["encoders"]["pixels"]
    assert tokens.shape == (5, 256, 48) and torch.equal(tokens[0, 17, 0], images[0, 4, 4, 0] / 127.5 - 1)
    values = spatial.lds(tokens)
    assert result["lds"]["per_image"] == pytest.approx(values.tolist(), abs=1e-5)
    assert result["lds"]["mean"] == pytest.approx(values.mean().item(), abs=1e-5)
    assert result["lds"]["standard_error"] == pytest.approx(values.std().item() / math.sqrt(5), abs=1e-5)
    masked = sum(score is not None for score in result["srss"]["per_image"])
    assert 2 <= masked <= 5 and f"SRSS: over {masked} of them" in said
    assert record["encoders"][f"{vit} (random)"]["parameters"] > 5e6 and result["parameters"] == 0
    found = record["correlations"]
    assert found["lds"]["x"] == [e["lds"]["mean"] for e in record["encoders"].values()] and found["lds"]["fid"][0] == 9
    assert found["accuracy"]["x"] == [70, 60, 50, 40]
    assert found["accuracy"]["pearson"][0] == pytest.approx(7 / math.sqrt(50))


@pytest.mark.parametrize(
    "flags,message",
    [
        ("", "name images with --data, or ask for --correlate"),
        ("--data absent", "--data absent does not exist"),
        ("--data {0}/masks --images 1", "--images 2 at least"),
        ("--data {0}/images --image-size 60", "a multiple of 16"),
        ("--data {0}/images --encoders hog resnet", "unknown encoder 'resnet'"),
        ("--data {0}/images --encoders hog hog", "name each once"),
        ("--data {0}/images --encoders hog --weights hog=random", "hog has no weights"),
        ("--data {0}/images --encoders hog --weights sift=x", "NAME=FILE"),
        (
            "--data {0}/images --encoders dino_vitb16 --weights dino_vitb16=x.pt",
            "--weights dino_vitb16=x.pt: there is no",
        ),
        ("--data {0}/images --show png", "(6 have it)"),
        ("--data {0}/images --show 0.png:16,0", "from 0,0 to 15,15"),
        ("--data {0}/images --masks {0}", "need a mask"),
        ("--data {0}/fid.csv", "fid.csv"),
        ("--data {0}/images --correlate {0}/few.csv", "needs four rows"),
        ("--correlate {0}/bad.csv", "could not convert string to float: 'nine'"),
        ("--correlate {0}/absent.csv", "No such file"),
        ("--correlate --out {0}/images", "exists; another one leaves it as it is"),
    ],
)
def test_spatial_structure_says_what_is_wrong(drawn, tmp_path, capsys, flags, message):
    flags = flags.format(drawn)
    with pytest.raises(SystemExit) as stop:
        spatial.main((flags if "--out" in flags else f"{flags} --out {tmp_path / 'out'}").split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() and len(list((drawn / "images").iterdir())) == 6
