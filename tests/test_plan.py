"""plumbing/plan.py: what a run costs is what it costs, and counting leaves nothing behind."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import plumbing.plan as planning
from irepa import Config
from plumbing.checkpoints import read_checkpoint
from plumbing.methods import method_names
from plumbing.settings import resolve
from tests.common import RUN, refused, run
from train import Learner

SMALL = "--image-size 32 --model SiT-S/8 --depth 3 --batch-size 4 --encoder hog".split()


def plan_of(*flags):
    asked, method, _ = resolve(["--plan", "--out", "not/there", *map(str, flags)])
    return planning.plan(asked, method, method.Learner or Learner)


def test_what_autograd_keeps_is_counted_once_and_as_long_as_it_is_kept():
    book = SimpleNamespace(times={}, own=set(), now=0, peak=0)
    x = torch.randn(10, 10, requires_grad=True)
    with saved_tensors_hooks(lambda t: planning.Kept(t, book), lambda kept: kept.tensor):
        y = x.exp()  # keeps its result
        z = (y.T * y[:5].sum()).sum()  # y again, twice as a view, and a number
    assert book.now == book.peak == 400 + 4
    z.backward()
    del y, z
    assert book.now == 0 and book.peak == 404


@pytest.mark.parametrize("gpu", [False, True])
def test_tensors_without_numbers_cost_what_real_ones_do(monkeypatch, gpu):
    asked, method, _ = resolve([*SMALL, "--out", "not/there"])
    config = Config.named("SiT-S/8", input_size=32, in_channels=3, num_classes=9, encoder_dim=128, depth=3)
    without = [planning.count_step(asked, method, config, Learner, 4, gpu, recompute) for recompute in (False, True)]
    monkeypatch.setattr(planning, "FakeTensorMode", nullcontext)
    real = [planning.count_step(asked, method, config, Learner, 4, gpu, recompute) for recompute in (False, True)]
    assert without == real
    (sizes, plain, flop), (_, kept, more) = real
    assert kept < plain / 2 and flop < more < 1.5 * flop
    weights = sum(p.numel() for p in method.model(config).parameters() if p.requires_grad)
    assert sizes == dict(model=weights)
    tokens = 16 * 4  # of four images; each weight of a block is met by each token forward, and in two ways backward
    assert flop > 3 * 2 * tokens * 3 * 10 * 384**2


@pytest.mark.parametrize("name", method_names())
def test_a_plan_of_each_method(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = plan_of("--demo", "--method", name)
    assert said.startswith(f"{name} ") and "10 classes" in said and "activations" in said
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_has_the_size_that_was_said(photos, tmp_path):
    flags = [*RUN, "--ema2", 0.9, "--steps", 1, "--sample-every", 0]
    run(*flags, "--data", photos, "--out", tmp_path / "run")
    size = float(plan_of(*flags).split("disk")[1].split("MB a checkpoint")[0])
    labels = 5 * 4 * read_checkpoint(tmp_path / "run" / "last.pt")["config"]["hidden_size"] * (1000 - 2)
    found = (tmp_path / "run" / "last.pt").stat().st_size + labels  # weights, Adam, two averages of 1,000 labels
    assert size == pytest.approx(found / 1e6, rel=0.05)  # names and settings are in it, too


def test_the_papers_setting_needs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = "--encoder dinov2_vitb14 --latents absent --tokens absent --device cuda --plan 4000".split()
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    said = capsys.readouterr().out
    assert stopped.value.code is None and not list(tmp_path.iterdir())
    for words in ("32 images at a time in each of 8 processes, on GPUs", "683M model, 85.7M teacher (dinov2_vitb14)"):
        assert words in said
    assert "102,400,000 images: each of ImageNet's 1,281,167 is seen 79.9 times" in said and "VAE" not in said
    assert "7.11 hours at 4,000 images a second" in said
    monkeypatch.delenv("WORLD_SIZE")
    for rate in (-1, 0, "nan"):
        assert f"takes images a second, not {rate}" in refused(capsys, run, "--plan", rate)
    assert "minutes at 0.8 images a second" in plan_of("--demo", "--steps", 3, "--plan", 0.8)
    assert "VAE (none with --latents)" in plan_of("--encoder", "efficientnet_lite0", "--model", "SiT-S/8")


def test_a_plan_counts_the_images_at_hand(photos, tmp_path, capsys):
    said = plan_of("--demo", "--data", photos, "--steps", 9)
    assert "2 classes" in said and f"288 images: each of the 24 in {photos} is seen 12 times" in said
    assert "ImageNet" not in said and f"B for the 24 in {photos}\n" in said and "--plan N says how long" in said
    run("--demo", "--data", photos, "--out", tmp_path / "run", "--steps", 1, "--sample-every", 0)
    assert f"{float(said.split('parameters')[1].split('M')[0]):.1f}M parameters, 23 images" in capsys.readouterr().out
    assert "nowhere does not exist" in refused(capsys, run, "--demo", "--data", "nowhere", "--plan")
