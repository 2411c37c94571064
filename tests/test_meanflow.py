"""MeanFlow: target, loss and sampler are the official code's and their formulas, and a run of it is whole."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from irepa import alignment_loss, interpolate, spatial_norm, stream
from plumbing.checkpoints import load_checkpoint
from test_irepa import TINY, fill, normal, parts_make_a_whole
from tests.common import RUN, black_and_white, refused, rows_of, run, run_sample, same_weights, settings, weights
from variants import meanflow


def meanflow_model(**changes):
    """A tiny MeanFlow whose weights depend on their names alone."""
    return fill(meanflow.MeanFlow(meanflow.Config(**{**TINY, **changes})), lambda name, draw: 0.1 * draw)


def flow(n=4):
    """Four points on paths -> x_t, t, r, labels and the paths' velocities."""
    x, noise = normal(0, n, 4, 8, 8), normal(1, n, 4, 8, 8)
    t, r = torch.linspace(0.9, 0.3, n), torch.linspace(0.1, 0.2, n)
    x_t, v = interpolate(x, noise, t)
    return x_t, t, r, torch.arange(n) % 10, v


# ---- Numbers of the official code ----


class Closed(torch.nn.Module):
    """u = (A x) sin(t) + r x^2 + b[y], whose derivatives are known."""

    def __init__(self, A, b):
        super().__init__()
        self.A, self.b = torch.nn.Parameter(A), torch.nn.Parameter(b)

    def forward(self, x, t, y, r, project=True):
        t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        return torch.einsum("ck,bkhw->bchw", self.A, x) * t.sin() + r * x**2 + self.b[y][:, :, None, None], None


def test_numbers_of_the_official_loss_and_sampler():
    # every number here is the official loss's and sampler's, in float64
    rng = np.random.RandomState(21)
    shapes = (3, 3), (6, 3), *[(8, 3, 4, 4)] * 3
    A, b, x, noise, start = (torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)
    net = Closed(A * 0.7, b * 0.5)
    t = torch.tensor([0.15, 0.5, 0.9, 0.35, 0.62, 0.78, 0.95, 0.81], dtype=torch.float64)
    r = torch.tensor([0.15, 0.5, 0.9, 0.1, 0.25, 0.0, 0.4, 0.3], dtype=torch.float64)
    y, near = torch.tensor([0, 1, 5, 3, 5, 0, 1, 2]), dict(rel=1e-10)  # 5 is the null class
    config = meanflow.Config(**{**TINY, "num_classes": 5})
    x_t, v = interpolate(x, noise, t)
    v = meanflow.guided_velocity(net, x_t, t, y, v, config)
    assert v[3, 0, 0].tolist() == pytest.approx([-0.3218386468869116, -0.8318484976126894, 2.795166559212112,
                                                 0.2817475863570366], **near)  # fmt: skip
    target = meanflow.average_target(net, x_t, t, r, y, v, torch.arange(3, 8))
    squares = (net(x_t, t, y, r)[0] - target).square().flatten(1).sum(1)
    assert squares.tolist() == pytest.approx([125.34021576275413, 147.95688181101576, 260.4711843719203,
        105.0436285438507, 121.55499500918371, 206.77450295015726, 221.43046466048455, 147.93004152901236],
        **near)  # fmt: skip
    meanflow.weighted(squares, config).mean().backward()
    slope = [-0.09227797440964844, 0.01665337301222717, -0.10956521516096077]
    assert net.A.grad[1].tolist() == pytest.approx(slope, **near)
    ends = [-1.2386728521656707, -0.43507990896199755], [-2.0384440699237727, -0.31128738741273676]
    for steps, end in enumerate(ends, start=1):
        y = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
        got = meanflow.solve(net, y, start, None, meanflow.Sampling(steps))
        assert got[5, 2, 1, :2].tolist() == pytest.approx(end, **near)


def test_numbers_of_the_official_network():
    rng, model = np.random.RandomState(22), meanflow_model()
    x, noise, start = (torch.from_numpy(rng.standard_normal((4, 4, 8, 8)).astype(np.float32)) for _ in range(3))
    t, r, y = torch.tensor([0.3, 0.7, 0.9, 0.5]), torch.tensor([0.3, 0.2, 0.0, 0.1]), torch.tensor([1, 10, 7, 3])
    x_t, v = interpolate(x, noise, t)
    near = dict(rel=1e-5, abs=1e-5)
    with torch.no_grad():
        target, u = meanflow.average_target(model, x_t, t, r, y, v, torch.arange(1, 4)), model(x_t, t, y, r)[0]
    assert u[1, 2, 3, :2].tolist() == pytest.approx([-1.5088551766, -0.2255232696], **near)
    assert target[1, 2, 3, :2].tolist() == pytest.approx([-1.0001067485, -1.1582344307], **near)
    squares = (u - target).square().flatten(1).sum(1)
    assert squares.tolist() == pytest.approx([941.407333917, 791.483618336, 951.843941445, 877.021341451], rel=1e-5)
    for steps, end in enumerate(([1.2355726329, 0.8166118113], [0.6581234426, 0.7279044838]), start=1):
        got = meanflow.solve(model, torch.tensor([1, 2, 7, 3]), start, None, meanflow.Sampling(steps))
        assert got[2, 1, 5, :2].tolist() == pytest.approx(end, **near)


# ---- The target and the loss ----


def test_target_is_the_identity_by_finite_differences():
    model = meanflow_model()
    x_t, t, r, y, v = flow()
    rows = torch.tensor([0, 2, 3])
    with torch.no_grad():
        target = meanflow.average_target(model, x_t, t, r, y, v, rows)
        h = 5e-3  # along the path: x_t moves with v, t with 1, r stays
        ahead, behind = (model(x_t + s * h * v, t + s * h, y, r)[0] for s in (1, -1))
        expected = v - (t - r).view(-1, 1, 1, 1) * (ahead - behind) / (2 * h)
    assert ((target - expected)[rows].square().mean() / (expected - v)[rows].square().mean()).item() < 1e-5
    assert torch.equal(target[1], v[1]) and not torch.allclose(target[0], v[0], atol=1e-2)
    still = meanflow.average_target(model, x_t, t, t, y, v, rows)  # r = t: flow matching
    assert torch.equal(still, v)


def test_guides_inside_the_target():
    model = meanflow_model(omega=0.7, kappa=0.4, guidance_interval=(0.4, 0.8))
    x_t, t, r, y, v = flow()
    y[2] = 10  # dropped: nothing to guide to
    with torch.no_grad():
        cond, null = (model(x_t, t, label, t)[0] for label in (y, torch.full_like(y, 10)))
    guided = 0.7 * v + 0.4 * cond - 0.1 * null
    got = meanflow.guided_velocity(model, x_t, t, y, v, model.config)
    assert t.tolist() == pytest.approx([0.9, 0.7, 0.5, 0.3])
    torch.testing.assert_close(got[1], guided[1], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(got[i], v[i]) for i in (0, 2, 3))  # out of the interval, without a label


def test_without_its_additions_it_is_flow_matching():
    model = meanflow_model(share=0.0, omega=1.0, kappa=0.0, power=0.0).train()
    config, x, y, target = model.config, normal(3, 4, 4, 8, 8), torch.arange(4), normal(4, 4, 16, 24)
    losses = meanflow.loss(model, x, y, target, config, torch.Generator().manual_seed(12))
    g = torch.Generator().manual_seed(12)
    normals, noise, drop = torch.randn(4, 2, generator=g), torch.randn(x.shape, generator=g), torch.rand(4, generator=g)
    assert drop.min() < 0.1 < drop.max()  # one label is dropped
    t = torch.sigmoid(normals - 0.4).max(1)[0]
    x_t, v = interpolate(x, noise, t)
    u, h = model(x_t, t, torch.where(drop < 0.1, 10, y), t)
    align = alignment_loss(h, spatial_norm(target, 0.6))
    torch.testing.assert_close(losses["denoise"], (u - v).square().mean())
    torch.testing.assert_close(losses["align"], align)
    torch.testing.assert_close(losses["loss"], (u - v).square().mean() * x[0].numel() + align)


def test_parts_make_a_whole():
    model = meanflow_model().train()
    batch = normal(3, 8, 4, 8, 8), torch.arange(8), normal(4, 8, 16, 24)
    parts_make_a_whole(meanflow.loss, model, batch, 9)


def test_each_image_has_its_weight_and_a_quarter_of_a_batch_its_r():
    config = meanflow.Config()
    squares = torch.tensor([1e-3, 1.0, 50.0], requires_grad=True)
    meanflow.weighted(squares, config).sum().backward()
    torch.testing.assert_close(squares.grad, 1 / (squares.detach() + 0.01))
    t, r, rows = meanflow.draw_times(torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)), 0, config)
    assert len(rows) == 1000 and (r <= t).all() and torch.equal((r < t).nonzero()[:, 0], rows)
    assert torch.logit(torch.cat([t[rows], r[rows]])).mean() == pytest.approx(-0.4, abs=0.1)


def test_held_out_loss_is_the_plain_error_whatever_the_alignment():
    chunks = [((i, 2), lambda x=normal(i, 4, 4, 8, 8): x, torch.arange(4)) for i in range(2)]

    def loss(*args, **kwargs):
        assert not torch.is_grad_enabled()  # or the graphs of all chunks would be kept
        return meanflow.loss(*args, **kwargs)

    def held_out(**changes):
        model = meanflow_model(**changes)
        job = SimpleNamespace(method=SimpleNamespace(loss=loss), config=model.config, device="cpu")
        job.autocast = nullcontext
        return train.held_out_loss(chunks, SimpleNamespace(job=job, networks=dict(model=model)))

    error = held_out()
    assert error == held_out(projector=None) == held_out(projector="mlp", power=0.0, class_dropout=0.9)
    model = meanflow_model(projector=None)
    whole = torch.cat([x() for _, x, _ in chunks]), torch.cat([y for *_, y in chunks])
    losses = meanflow.loss(model, *whole, None, model.config, stream("held-out", 0))
    assert error == pytest.approx(losses["denoise"].item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(1, abs=1e-4)


def test_alignment_reaches_no_block_after_its_depth():
    model = meanflow_model()
    batch = normal(0, 4, 4, 8, 8), torch.tensor([1, 2, 3, 4]), normal(1, 4, 16, 24)
    meanflow.loss(model, *batch, model.config)["align"].backward()
    touched = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.blocks]
    assert touched == [True, True, False, False]


# ---- Sampling, and runs ----


class Straight(torch.nn.Module):
    """Every path ends in the image of its class: u = (x - image) / t."""

    def __init__(self, images):
        super().__init__()
        self.images = torch.nn.Parameter(images)

    def forward(self, x, t, y, r):
        return (x - self.images[y]) / t.view(-1, 1, 1, 1), None


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampling_of_a_known_flow_is_exact(steps):
    images = normal(5, 3, 3, 4, 4).double()
    noise, how = normal(6, 2, 3, 4, 4).double(), meanflow.Sampling(steps)
    x = meanflow.solve(Straight(images), torch.tensor([2, 0]), noise, None, how)
    torch.testing.assert_close(x, images[[2, 0]])


def test_a_run_overfits_stops_and_resumes(tmp_path, capsys):
    flags = [*RUN, "--data", black_and_white(tmp_path / "few", 6, 8), "--method", "meanflow", "--log-every", 20]
    flags += "--image-size 8 --batch-size 32 --lr 5e-3 --ema 0.9 --hidden-size 64 --class-dropout 0".split()
    flags += "--omega 1 --kappa 0 --align none --sample-every 0".split()
    run(*flags, "--out", tmp_path / "straight", "--steps", 160, "--lr-schedule", "cosine")
    run(*flags, "--out", tmp_path / "stopped", "--steps", 3)
    run("--resume", "--out", tmp_path / "stopped", "--steps", 6)
    run(*flags, "--out", tmp_path / "six", "--steps", 6)
    for which in ("model", "ema"):
        assert same_weights(weights(tmp_path / "six", which), weights(tmp_path / "stopped", which))
    rows = rows_of(tmp_path / "straight")
    assert rows[-1]["denoise"] < 0.2 < 0.8 < rows[0]["denoise"]
    ckpt = ["--ckpt", tmp_path / "straight/last.pt", "--labels", "0,1", "--num", 8]
    run_sample(*ckpt, "--npz", tmp_path / "s.npz")
    assert json.loads((tmp_path / "s.json").read_text())["steps"] == 1  # one evaluation an image
    x = np.load(tmp_path / "s.npz")["arr_0"].mean((1, 2, 3))
    assert (x[0::2] < 64).all() and (x[1::2] > 191).all()
    error = refused(capsys, run_sample, *ckpt, "--cfg", 2, "--npz", tmp_path / "t.npz")
    assert "unrecognized arguments: --cfg 2" in error
    for wrong, message in (
        ("--sample-cfg 2", "--method meanflow has no --sample-cfg"),
        ("--kappa 1", "kappa lies in [0, 1)"),
        ("--share 2", "share lies in [0, 1]"),
        ("--guidance-interval 0.8 0.4", "--guidance-interval has LO <= HI"),
        ("--method irepa", "unrecognized arguments: --omega 1 --kappa 0 --align none"),
    ):
        assert message in refused(capsys, run, *flags, "--out", tmp_path / "x", *wrong.split())
    assert not (tmp_path / "x").exists()


def test_flags_reach_the_run_and_its_checkpoint(photos, tmp_path, capsys):
    assert settings("--method", "meanflow").model == "SiT-B/2" and settings("--method", "meanflow").beta2 == 0.95
    demo = settings("--demo", "--method", "meanflow", "--kappa", "0.25")
    assert (demo.network["omega"], demo.network["kappa"], demo.sample_cfg) == (2.0, 0.25, 1.0)
    flags = [*RUN, "--data", photos, "--method", "meanflow", "--sample-every", 4]
    run(*flags, "--guidance-interval", 0.2, 0.7, "--share", 0.5, "--kappa", 0.3, "--out", tmp_path / "run")
    config = load_checkpoint(tmp_path / "run/last.pt")[1]
    assert (config.guidance_interval, config.share, config.kappa, config.projector) == ((0.2, 0.7), 0.5, 0.3, "conv")
    assert all(row["align"] < 0 for row in rows_of(tmp_path / "run"))
    assert (tmp_path / "run/samples/step-0000004.png").stat().st_size > 1000
    for kind in ("repa", "none"):  # another network
        error = refused(capsys, run, "--resume", "--out", tmp_path / "run", "--steps", 6, "--align", kind)
        assert "was started with" in error
    run("--resume", "--out", tmp_path / "run", "--steps", 6)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["config"]["guidance_interval"] == (0.2, 0.7)
