"""experiments/what_matters.py: many teachers, the same runs with each."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from experiments import convergence, what_matters
from inputs.images import ImageSet
from plumbing import jobs
from tests.common import refused


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A zip of class folders with 240 images of 16 px in two classes, and the smallest budget."""
    rng = np.random.default_rng(0)
    for i in range(240):
        folder = tmp_path / "data" / ("dark" if i % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 128 if i % 2 else 256, (16, 16, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    monkeypatch.setattr(jobs, "ImageSet", ImageSet)  # which the comparison replaces
    monkeypatch.setattr(train, "plot", lambda out: None)
    flags = (
        "--image-size 16 --model SiT-S/2 --hidden-size 32 --depth 2 --num-heads 2 --batch-size 8 --steps 4 --ema 0.5"
    )
    budget = dict(flags=f"{flags} --lr 0.02 --encoder-depth 1 --log-every 4 --precision fp32", images=12, learn=3)
    monkeypatch.setitem(convergence.BUDGETS, "short", dict(budget, sampling="--sampler heun --steps 2"))
    return tmp_path / "data"


def compare(data, out, *flags):
    what_matters.main(["--data", str(data), "--out", str(out), "--looked-at", "60", "--device", "cpu", *flags])
    return json.loads((Path(out) / "results.json").read_text())


def test_each_teacher_has_its_row_and_the_same_runs(tiny, tmp_path, capsys, monkeypatch):
    titles, decode, decoded = ["hog", "pixels", "timm:test_vit=0", "hog+0.5", "timm:test_vit=10"], ImageSet.decode, []
    monkeypatch.setattr(ImageSet, "decode", lambda data, i: decoded.append(i) or decode(data, i))
    result = compare(tiny, tmp_path / "out", "--seeds", "0", "--teachers", *titles)
    assert sorted(decoded) == [*range(240)]  # once for all runs
    assert [*result["teachers"]] == titles and {*result["teachers"]["hog"]} >= {"accuracy", "lds", "cds", "rmsc"}
    wanted = [(None, "sit"), *((title, arm) for title in titles for arm in ("repa", "irepa"))]
    assert [(run["teacher"], run["arm"]) for run in result["runs"]] == wanted
    assert len({run["distance"]["FD-classifier"] for run in result["runs"]}) > 8
    assert result["teachers"]["hog"] != result["teachers"]["hog+0.5"]  # the class weight is in the tokens
    assert result["teachers"]["timm:test_vit=0"] != result["teachers"]["timm:test_vit=10"]
    configs = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("out/runs/hog*-irepa-seed0/config.json"))]
    assert sorted(config["cls_weight"] for config in configs) == [0.0, 0.5]
    text = (tmp_path / "out/table.md").read_text()
    assert "| hog+0.5 |" in text and "| LDS | 5 |" in text
    assert Image.open(tmp_path / "out/what_matters.png").width > 1000
    assert not [*tmp_path.glob("out/runs/*/*.pt")]

    other = dict(teacher="hog", arm="repa", seed=7, distance={"FD-classifier": 1.0})  # of another process, meanwhile
    changed = {**result, "runs": [*result["runs"], other]}
    (tmp_path / "out/results.json").write_text(json.dumps(changed))
    monkeypatch.setattr(what_matters, "leg", None)  # what is measured is not trained again
    shutil.rmtree(tmp_path / "out/runs")  # nor what is in results.json
    assert compare(tiny, tmp_path / "out", "--seeds", "0", "--teachers", *titles)["runs"] == changed["runs"]
    assert (tmp_path / "out/table.md").read_text() == text  # seed 7 is not of all teachers
    hog = "--teachers", "hog", "--images", "14"  # the default teachers' package may not be there
    assert "was started with images 12, not 14" in refused(capsys, compare, tiny, tmp_path / "out", *hog)


def test_pixels_are_the_patches():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels = what_matters.Pixels(8, 32)
    tokens = pixels(images)
    assert tokens.shape == (2, 64, 48) == (2, 64, pixels.dim)
    torch.testing.assert_close(tokens[1, 11].view(3, 4, 4), images[1, :, 4:8, 12:16].float() / 127.5 - 1)


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--teachers hogg", "unknown encoder 'hogg'"),
        ("--teachers hog=5", "only a ViT, timm:<id>, learns"),
        ("--teachers timm:resnet18=50", "only a ViT, timm:<id>, learns"),
        ("--teachers timm:test_vit=5", "in 10 steps at least"),
        ("--teachers timm:test_vit=many", "write NAME, NAME=STEPS"),
        ("--teachers hog+2", "--cls-weight lies in [0, 1]"),
        ("--teachers pixels+0.5", "pixels have no class token"),
        ("--teachers hog --looked-at 3", "--looked-at is at least 50"),
        ("--teachers hog --reference stats.npz", "goes with --inception"),
        ("--teachers hog --processes 0", "--processes at least 1"),
        ("--teachers hog -- --encoder sift", "--encoder after --"),
        ("--teachers hog -- --cls-weight 0.5", "--cls-weight after --"),
        ("--teachers hog -- --flip", "--flip mirrors images"),
        ("--teachers hog -- --patch-size 4", "needs a grid of 5 x 5"),
    ],
)
def test_a_mistake_is_one_sentence(tiny, tmp_path, capsys, flags, message):
    error = refused(capsys, compare, tiny, tmp_path / "out", *flags.split())
    assert message in error and not (tmp_path / "out").exists()
