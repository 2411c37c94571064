"""JiT: the network, the loss and the sampler are the published ones, and a run of it is whole."""

import argparse
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from inputs.images import ImageSet
from irepa import alignment_loss, spatial_norm
from plumbing.checkpoints import load_checkpoint
from plumbing.settings import network_config, resolve
from test_irepa import Counting, fill, normal, parts_make_a_whole
from tests.common import RUN, refused, rows_of, run, run_sample, same_weights, save_images, settings, weights
from variants import jit

JIT = dict(
    input_size=32, patch_size=4, hidden_size=96, depth=4, num_heads=4, bottleneck=16, num_classes=10, in_context_len=5,
    in_context_start=2, encoder_dim=24, encoder_depth=3, projector_dim=64,
)  # fmt: skip


def jit_model(**changes):
    """A tiny JiT whose weights depend on their names, with norms about 1: only then do rotations and norms show."""
    return fill(jit.JiT(jit.Config(**{**JIT, **changes})), lambda name, draw: 0.1 * draw + ("norm" in name))


def some(x):
    return [x[0, 0, 0, 0].item(), x[1, 1, 3, 5].item(), x[2, 2, 31, 31].item(), x.square().mean().sqrt().item()]


def test_numbers_of_the_released_code(monkeypatch):
    rng = np.random.RandomState(11)  # every number below is the released code's
    x, noise = rng.uniform(-1, 1, (3, 3, 32, 32)), rng.standard_normal((3, 3, 32, 32))
    feat, start = rng.standard_normal((3, 64, 24)) * 2 + 1, rng.standard_normal((3, 3, 32, 32))
    x, noise, feat, start = (torch.from_numpy(a.astype(np.float32)) for a in (x, noise, feat, start))
    u, y = torch.tensor([0.12, 0.55, 0.97]), torch.tensor([1, 10, 7])  # JiT's time
    model, z_t = jit_model(), u.view(3, 1, 1, 1) * x + (1 - u).view(3, 1, 1, 1) * noise
    near = dict(rel=1e-5, abs=1e-5)
    with torch.no_grad():
        image, h = model(z_t, 1 - u, y)
        assert some(image) == pytest.approx([-0.2460538, -1.305179, 0.9916877, 1.0201077], **near)
        assert [h[0, 0, 0], h[1, 7, 11], h[2, 63, 23]] == pytest.approx([3.1462934, -1.9143469, -0.1997355], **near)
        h = jit_model(encoder_depth=2)(z_t, 1 - u, y)[1]  # where no class token has come in yet
        assert [h[0, 0, 0], h[1, 7, 11], h[2, 63, 23]] == pytest.approx([3.751494, -1.6799929, -0.8606848], **near)
        each = [(1.7380666, 0.0311098), (6.3802147, 0.0040461), (550.5833, 0.0343427)]
        for i, (denoise, align) in enumerate(each):
            given = iter([(torch.logit(u[i : i + 1]) + 0.8) / 0.8, noise[i : i + 1]])
            monkeypatch.setattr("irepa.draws", lambda *_: lambda sample, *shape: next(given))
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
        got = jit.solve(model, torch.tensor([1, 7, 3]), start, None, jit.Sampling(steps=steps, cfg=cfg))
        assert some(got) == pytest.approx(expected, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
    "name,size,count",
    [
        ("JiT-B/16", 256, 131_123_712),
        ("JiT-L/32", 512, 461_534_176),
        ("JiT-H/16", 256, 952_514_368),
    ],
)
def test_sizes_are_the_published_ones(name, size, count):
    config = jit.Config.named(name, input_size=size, projector=None)
    with torch.device("meta"):
        model = jit.JiT(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert config.in_context_len == 32 and config.noise_scale == size / 256
    assert config.in_context_start == {"B": 4, "L": 8, "H": 10}[name[4]]
    assert jit.released(model.state_dict()).items() <= asdict(config).items()  # read off the shapes alone


def test_loss_is_its_formula_in_the_papers_time_and_parts_make_a_whole():
    model = jit_model(noise_scale=2.0, P_mean=0.5, P_std=2.0).train()
    config, x, y, target = model.config, normal(0, 4, 3, 32, 32), torch.arange(4), normal(1, 4, 64, 24)
    whole = parts_make_a_whole(jit.loss, model, (x, y, target), 9)
    g = torch.Generator().manual_seed(9)
    u = 1 / (1 + torch.exp(-0.5 - 2 * torch.randn(4, generator=g)))
    e, drop = 2 * torch.randn(x.shape, generator=g), torch.rand(4, generator=g)
    assert u.max() > 0.95 > u.min() and drop.min() < 0.1 < drop.max()  # or less would be seen
    u = u.view(4, 1, 1, 1)
    z = u * x + (1 - u) * e
    image, h = model(z, 1 - u.flatten(), torch.where(drop < 0.1, 10, y))
    v, predicted = ((a - z) / (1 - u).clamp(min=0.05) for a in (x, image))
    torch.testing.assert_close(whole["denoise"], (predicted - v).square().mean())
    torch.testing.assert_close(whole["align"], alignment_loss(h, spatial_norm(target, 0.8)))
    torch.testing.assert_close(whole["loss"], whole["denoise"] + 0.5 * whole["align"])
    with pytest.raises(ValueError, match=r"8\^2 tokens"):
        jit.loss(model, x, y, target[:, :9], config)


@pytest.mark.parametrize("depth", [2, 3])
def test_alignment_reaches_no_block_after_its_depth(depth):
    model = jit_model(encoder_depth=depth)
    batch = normal(0, 2, 3, 32, 32), torch.tensor([1, 2]), normal(1, 2, 64, 24)
    jit.loss(model, *batch, model.config)["align"].backward()
    touched = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.blocks]
    assert touched == [i < depth for i in range(4)]
    assert not any(p.grad is not None and p.grad.any() for p in model.final_layer.parameters())
    # class tokens, which come after block 2, are not aligned themselves, only seen by the patches
    assert (model.in_context_posemb.grad is not None) == (depth > 2)


class Imagining(Counting):
    """A JiT of known image, x * t + y, that counts its forwards."""

    config = jit.Config(**JIT, noise_scale=2.0)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.1, 0.7), (0.25, 0.75), (0.1, 1.0)])
@pytest.mark.parametrize("heun", [False, True])
def test_sampler_is_the_papers_loop(interval, heun):
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
        how = jit.Sampling("heun" if heun else "euler", steps, cfg, interval)
        with torch.no_grad():
            torch.testing.assert_close(jit.solve(model, y, noise, None, how), z.float(), rtol=1e-4, atol=1e-4)
        assert model.sizes == evaluations


@pytest.mark.parametrize("ema,kind", [(True, "conv"), (False, "mlp"), (True, None), (2, "conv")])
def test_released_checkpoints_load_strictly(tmp_path, capsys, ema, kind):
    state = jit_model(projector=kind, noise_scale=2.0).state_dict()
    args = argparse.Namespace(model="JiT-B/16", P_mean=-0.4, noise_scale=2.0, encoder_depth=2)
    other = {f"net.{k}": torch.zeros_like(v) for k, v in state.items()}
    file = dict(model=other, model_ema1=other, model_ema2=other, optimizer={}, epoch=3, args=args)
    file[["model", "model_ema1", "model_ema2"][ema]] = {f"net.{k}": v for k, v in state.items()}
    torch.save(file, tmp_path / "jit.pth")
    model, config = load_checkpoint(tmp_path / "jit.pth", ema=ema, in_context_start=2)
    assert same_weights(model.state_dict(), state)
    inferred = dict(JIT, noise_scale=2.0, P_mean=-0.4, projector=kind, encoder_depth=2)
    if kind != "mlp":
        del inferred["projector_dim"]
    if kind is None:
        del inferred["encoder_dim"]
    assert inferred.items() <= asdict(config).items()
    assert (config.gamma, config.proj_coeff) == (None if kind == "mlp" else 0.8, 0.5)
    torch.save({k: v for k, v in state.items() if k != "blocks.1.mlp.w12.bias"}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="missing blocks.1.mlp.w12.bias"):
        load_checkpoint(tmp_path / "bare.pth")
    flags = ["--ckpt", tmp_path / "jit.pth", "--steps", 2, "--num", 2, "--labels", 3]
    run_sample(*flags, "--npz", tmp_path / "s.npz", *[["--no-ema"], [], ["--ema", 2]][ema])
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["sampler"] == "heun" and record["ema"] == ema
    error = refused(capsys, run_sample, *flags, "--npz", tmp_path / "t.npz", "--sampler", "sde")
    assert "--sampler is heun or euler, not sde" in error


def test_presets_and_what_it_has_not(photos, tmp_path, capsys):
    asked = settings("--method", "jit")
    assert (asked.model, asked.vae, asked.beta2, asked.clip) == ("JiT-B/16", None, 0.95, None)
    assert asked.flip and (asked.ema, asked.ema2, asked.ema_warmup) == (0.9999, 0.9996, True)
    assert not settings().flip and settings().ema2 is None and not settings("--demo", "--method", "jit").flip
    alignments = {"irepa": ("conv", 0.8, 0.5), "repa": ("mlp", None, 0.5), "none": (None, 0.8, 0.5)}
    for align, expected in alignments.items():
        config = network_config(*resolve(["--out", "not/there", "--method", "jit", "--align", align])[:2])
        assert (config.projector, config.gamma, config.proj_coeff) == expected and config.input_size == 256
    assert settings("--beta2", "0.9").clip == 1.0 and settings().beta2 == 0.999
    demo = settings("--demo", "--method", "jit")
    assert demo.model == "JiT-S/4" and demo.network["hidden_size"] and demo.beta2 == 0.95
    assert settings("--demo").beta2 == 0.999
    small = [*RUN, "--data", photos, "--out", tmp_path / "run", "--method", "jit", "--model", "JiT-S/4"]
    for flags, message in (
        ("--qk-norm", "unrecognized arguments: --qk-norm"),
        ("--path cosine", "unrecognized arguments: --path cosine"),
        ("--model SiT-S/4", "there are JiT-S/4"),
        ("--image-size 128 --vae sd-vae-ft-mse", "JiT is made for pixels"),
        ("--num-heads 16", "4 x 16 heads"),
        ("--beta2 1", "--beta2 lie in [0, 1)"),
        ("--clip 0", "--clip must be positive"),
        ("--align repae", "--align is one of irepa, repa, none, not repae"),
    ):
        assert message in refused(capsys, run, *small, *flags.split())
    with pytest.raises(ValueError, match="in_context_start 4"):
        jit.Config(**{**JIT, "in_context_start": 4})


def test_rate_and_warm_up_follow_the_batch_size(photos, tmp_path, monkeypatch, capsys):
    def found(*flags):
        asked = settings(*flags)
        return asked.lr, asked.warmup

    own = "--method", "jit", "--batch-size"
    assert found("--method", "jit") == (5e-5, 25_000) and found(*own, "1024") == (2e-4, 6_250)  # the paper's
    assert found(*own, "64", "--lr", "1e-3") == (1e-3, 100_000) and found(*own, "64", "--warmup", "7") == (1.25e-5, 7)
    assert found("--demo", *own, "64") == (2e-3, 100) and found("--batch-size", "1024") == (1e-4, 0)
    with pytest.raises(ValueError, match="--batch-size must be positive"):
        settings(*own, "0")
    with pytest.raises(SystemExit):
        settings("--method", "jit", "--help")
    assert "(5e-05; it follows --batch-size)" in capsys.readouterr().out
    flags = "--image-size 16 --model JiT-S/4 --hidden-size 32 --depth 2 --num-heads 2 --batch-size 8 --sample-every 0"
    flags += " --device cpu --precision fp32 --method jit"
    run(*flags.split(), "--data", photos, "--steps", 1, "--out", tmp_path / "run")
    monkeypatch.setattr(jit, "scaled", lambda batch_size: dict(lr=1.0, warmup=1))  # of another version
    run("--resume", "--out", tmp_path / "run", "--steps", 2)
    for name in ("config.json", "config-from-step-1.json"):
        record = json.loads((tmp_path / "run" / name).read_text())
        assert (record["lr"], record["warmup"]) == (5e-5 * 8 / 256, 800_000)


def test_a_run_from_before_flips_and_a_second_average_goes_on_without(photos, tmp_path):
    flags = [*RUN, "--data", photos, "--method", "jit", "--model", "JiT-S/4", "--sample-every", 0]
    run(*flags, "--no-flip", "--ema2", "none", "--out", tmp_path / "straight")
    run(*flags, "--no-flip", "--ema2", "none", "--steps", 2, "--out", tmp_path / "stopped")
    old = torch.load(tmp_path / "stopped/last.pt", weights_only=True)
    del old["settings"]["flip"], old["settings"]["ema2"]
    torch.save(old, tmp_path / "stopped/last.pt")
    run("--resume", "--out", tmp_path / "stopped", "--steps", 4)
    assert same_weights(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))


def test_a_run_overfits_stops_and_resumes(photos, tmp_path, capsys):
    for name, half in (("left", np.s_[:, :8]), ("top", np.s_[:8])):  # the lit half, which is at 1, the other at -1
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[half] = 255
        save_images(tmp_path / "few" / name, 6, Image.fromarray(pixels))
    flags = [*RUN, "--method", "jit", "--model", "JiT-S/4", "--log-every", 20, "--ema", 0.9, "--ema2", 0.5]
    flags += "--lr 3e-3 --warmup 0 --hidden-size 64 --class-dropout 0 --sample-every 0 --data".split()
    flat = tmp_path / "few", "--no-flip"  # a mirrored left is no left
    run(*flags, *flat, "--out", tmp_path / "straight", "--steps", 150, "--lr-schedule", "cosine")
    flags += [photos]
    run(*flags, "--out", tmp_path / "stopped", "--steps", 4)
    error = refused(capsys, run, "--resume", "--out", tmp_path / "stopped", "--steps", 8, "--align", "none")
    assert "was started with --align irepa, not none" in error
    run("--resume", "--out", tmp_path / "stopped", "--steps", 8)
    run(*flags, "--out", tmp_path / "eight", "--steps", 8)
    for which in ("model", "ema", "ema2"):
        assert same_weights(weights(tmp_path / "eight", which), weights(tmp_path / "stopped", which))
    rows = rows_of(tmp_path / "straight")
    assert rows[-1]["denoise"] < 0.25 * rows[0]["denoise"] and "held_out" in rows[-1]
    assert rows[-1]["align"] < rows[0]["align"] < 0
    model, config = load_checkpoint(tmp_path / "straight/last.pt")
    data = ImageSet(tmp_path / "few", 16)[np.array([0, 6])][0]
    assert isinstance(model, jit.JiT) and config.projector == "conv"
    how = jit.Sampling(steps=10)
    x = sample.generate(model, torch.tensor([0, 1] * 3), range(6), solve=jit.solve, how=how)
    wrong = (x - torch.stack([data[k] for k in (0, 1) * 3]).float() / 127.5 + 1).abs().mean((1, 2, 3))
    assert wrong.mean() < 0.3 and wrong.max() < 0.7  # an image of the other class is wrong by 1
    run(*flags, "--out", tmp_path / "plain", "--steps", 2, "--align", "none")
    assert rows_of(tmp_path / "plain")[0]["align"] == 0
