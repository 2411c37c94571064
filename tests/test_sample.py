"""Sampling: images by their numbers, what is written, and a run that was stopped."""

import json
import os
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

import irepa
import sample
from inputs.shapes import Shapes
from irepa import Config, Sampling, SiT
from plumbing import records
from plumbing.records import to_uint8
from test_irepa import TINY, fill, strong
from tests.common import RUN, refused, rows_of, run, run_sample


def test_what_samplers_are_made_of_is_irepas():
    for name in ("guided", "sample_ode", "sample_sde"):
        assert getattr(sample, name) is getattr(irepa, name)


@pytest.mark.parametrize("sampler", ["sde", "heun"])
def test_samples_depend_on_seed_and_index_alone(sampler):
    model = fill(SiT(Config(**TINY)), strong)
    labels = sample.choose_labels("random", range(5), 10, seed=3)
    how = Sampling(sampler=sampler, steps=4, cfg=2.0)
    together = sample.generate(model, labels, range(5), seed=3, how=how)
    apart = [sample.generate(model, labels[i : i + 1], [i], seed=3, how=how) for i in (4, 0, 2)]
    torch.testing.assert_close(torch.cat(apart), together[[4, 0, 2]], rtol=1e-5, atol=1e-5)
    other = sample.generate(model, labels, range(5), seed=4, how=how)
    assert (other - together).abs().mean() > 0.1


def test_rounding():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_demo_then_sample(tmp_path, capsys):
    out = tmp_path / "demo"
    small = "--steps 4 --batch-size 8 --patch-size 8 --hidden-size 32 --num-heads 2 --depth 2 --log-every 2"
    run("--demo", "--out", out, "--device", "cpu", "--ckpt-every", 4, "--sample-every", 4, *small.split())
    said = capsys.readouterr().out
    assert f"python sample.py --ckpt {out}/last.pt" in said and "--sampler heun --steps 25" in said  # not SDE's 250
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 4 and config["torch"] == torch.__version__ and "git_commit" in config
    assert config["data"] is None
    row = rows_of(out)[-1]
    assert {"step", "loss", "denoise", "align", "held_out", "grad_norm", "lr", "images_per_s"} <= row.keys()
    grid = Image.open(out / "samples/step-0000004.png")
    assert grid.height >= 10 * 96 and (out / "curves.png").stat().st_size > 10_000
    assert Image.open(out / "samples/progress.png").height == 100  # one time so far
    common = ["--ckpt", out / "last.pt", "--steps", 2]
    run_sample(*common)
    run_sample(*common)  # another run takes another name
    grids = sorted(out.glob("last-*.png"))
    assert len(grids) == 2 and all(Image.open(g).height >= 10 * 96 for g in grids)
    run_sample(*common, "--num", 13, "--npz", tmp_path / "s.npz", "--labels", "balanced", "--batch-size", 5)
    data = np.load(tmp_path / "s.npz")
    assert data["arr_0"].shape == (13, 32, 32, 3) and data["arr_0"].dtype == np.uint8
    assert data["labels"].tolist() == [*range(10), 0, 1, 2]
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["precision"] == "fp32"  # TensorFloat-32 is a GPU's
    assert record["step"] == 4 and record["cfg"] == 1.0 and len(record["checkpoint_sha256"]) == 64
    assert record["ema"] is True and record["sampler"] == "sde"
    assert record["config"] == {**config["config"], "projector": None}
    run_sample(*common, "--num", 3, "--out-dir", tmp_path / "pngs", "--labels", "3,7")
    assert sorted(p.name for p in (tmp_path / "pngs").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    run_sample(*common, "--num", 3, "--npz", tmp_path / "named.npz", "--labels", f"{Shapes.classes[3]},7")
    assert np.load(tmp_path / "named.npz")["labels"].tolist() == [3, 7, 3]
    for flags, message in (
        (["--npz", tmp_path / "s.npz", "--num", 2], "exists and is left as it is"),
        (["--npz", "new.npz"], "say how many images"),
        (["--labels", "12"], "classes are 0 to 9"),
        (["--labels", "circle,stra"], "'stra' is no class of this checkpoint; write random, balanced, numbers"),
        (["--labels", "nosuch"], "numbers such as 3,7, or names such as circle, square, triangle"),
        (["--num", "15"], "--num 15 does not fill 10 rows of a grid, one for each label: take a multiple of 10"),
        (["--num", 20_000], "a grid has 10,000 images at most, not 20,000"),
        (["--seed", "-1"], "--seed is 0 or more"),
        (["--ckpt", out], f"it is a folder: {out}/last.pt"),
        (["--cfg", "-1"], "--cfg must not be negative"),
        (["--npz", "x.png", "--num", 2], "must end in .npz"),
        (["--num", 10**11], "GB left"),
        (["--steps", "0"], "must be at least 1"),
        (["--sampler", "rk4"], "sampler is sde, euler or heun, not rk4"),
        (["--precision", "fp8"], "--precision is fp32, tf32 or bf16, not fp8"),
        (["--device", "tpu9"], "--device tpu9 cannot be used here"),
    ):
        assert message in refused(capsys, run_sample, *common, *flags)
    assert asdict(sample.load_checkpoint(out / "last.pt")[1]) == config["config"]


def test_progress_is_the_same_noise_over_time(tmp_path):
    names, drawn = ["dark", "light", "other"], {}
    for step in range(100, 2100, 100):  # twenty times, of which twelve are shown, the first and the last among them
        drawn[step] = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8)
        records.save_grid(drawn[step], names, tmp_path / f"step-{step:07d}.png")
    records.save_progress(tmp_path, names, 8)
    strip = np.asarray(Image.open(tmp_path / "progress.png"))
    assert len(strip) == 12 * 100
    for y, step in ((0, 100), (1100, 2000)):
        tiles = strip[y + 2 : y + 98, -600:].reshape(96, 6, 100, 3)[:, :, :96]  # two of each class
        for place, number in enumerate((0, 1, 8, 9, 16, 17)):
            assert np.array_equal(tiles[::6, place, ::6], drawn[step][number].permute(1, 2, 0).numpy())


def test_names_in_any_letters(tmp_path, monkeypatch, capsys):
    names, images = ["cat", "قطة", "кошка", "猫"], torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    fonts = [records.font_for(name) for name in names]
    assert all("DejaVu" in font.getname()[0] for font in fonts[1:3])  # matplotlib brings it along
    glyph = TTGlyphPen(None)
    for corner, move in (((0, 0), glyph.moveTo), ((0, 700), glyph.lineTo), ((500, 700), glyph.lineTo)):
        move(corner)
    glyph.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord("猫"): "cat"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": glyph.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "cat": (500, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable(dict(familyName="Cats", styleName="Regular"))
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "cats.ttf")
    cats = font_manager.FontEntry(fname=str(tmp_path / "cats.ttf"), name="Cats", style="normal", weight=400)
    for there, said in (([cats], ""), ([], "numbers in the grids: class 7: 猫")):
        records.font_for.cache_clear()
        monkeypatch.setattr(font_manager.fontManager, "ttflist", there + [font_manager.FontEntry(fonts[1].path)])
        for file in ("first.png", "second.png"):
            records.save_grid(images, names, tmp_path / file, [0, 2, 5, 7])
        error = capsys.readouterr().err
        assert said in error and error.count("note") == (said != "")  # once
        assert (records.font_for("猫") is None) == (said != "")
    records.font_for.cache_clear()


def test_one_class_trains_and_samples_and_guidance_has_nothing_to_guide(tmp_path, monkeypatch, capsys):
    class OneClass(Shapes):
        classes = ["all"]

    monkeypatch.setattr("plumbing.jobs.Shapes", OneClass)
    out, said = tmp_path / "run", "guidance has nothing to guide"
    run(*RUN, "--demo", "--out", out, "--sample-every", 4, "--sample-cfg", 2)
    assert capsys.readouterr().out.count(said) == 1 and (out / "samples/step-0000004.png").exists()
    assert json.loads((out / "config.json").read_text())["sample_cfg"] == 1.0
    model, config = sample.load_checkpoint(out / "last.pt")
    assert config.num_classes == 1 and rows_of(out)[-1]["loss"] > 0
    flags = ["--ckpt", out / "last.pt", "--sampler", "euler", "--steps", 2, "--num", 3, "--npz"]
    run_sample(*flags, tmp_path / "plain.npz")
    assert said not in capsys.readouterr().out
    run_sample(*flags, tmp_path / "guided.npz", "--cfg", 3)
    assert capsys.readouterr().out.count(said) == 1
    a, b = (np.load(tmp_path / f"{name}.npz") for name in ("plain", "guided"))
    assert np.array_equal(a["arr_0"], b["arr_0"]) and a["labels"].tolist() == [0, 0, 0]
    assert json.loads((tmp_path / "guided.json").read_text())["cfg"] == 1.0
    run("--resume", "--out", out, "--steps", 5)
    run_sample("--ckpt", out / "last.pt", "--steps", 2)  # a grid


def test_sampling_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    model = fill(SiT(Config(**{**TINY, "in_channels": 3})), strong)
    torch.save(dict(ema=model.state_dict(), config=asdict(model.config)), tmp_path / "m.pt")
    flags = ["--ckpt", tmp_path / "m.pt", "--steps", 2, "--num", 7, "--batch-size", 2, "--npz"]
    run_sample(*flags, tmp_path / "whole.npz")
    calls, generate = [], sample.generate

    def dies(model, labels, indices, *args, **settings):
        calls.append(list(indices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(model, labels, indices, *args, **settings)

    monkeypatch.setattr(sample, "generate", dies)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        run_sample(*flags, tmp_path / "s.npz")
    assert f"kept in {tmp_path}/s.npz.parts, and the same command goes on from it" in capsys.readouterr().out
    error = refused(capsys, run_sample, *flags, tmp_path / "s.npz", "--seed", 1)
    assert "unfinished samples with seed 0, not 1" in error
    part = tmp_path / "s.npz.parts/00000000.npy"
    part.write_bytes(part.read_bytes()[:150])  # cut short by a failing disk: made again
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if Path(b).suffix != ".npz" else exit(9))
    with pytest.raises(SystemExit):  # killed when only the last move was left to do
        run_sample(*flags, tmp_path / "s.npz")
    assert calls[2:] == [[4, 5], [0, 1], [4, 5], [6]] and not (tmp_path / "s.npz").exists()
    monkeypatch.setattr(os, "replace", replace)
    run_sample(*flags, tmp_path / ".." / tmp_path.name / "s.npz")
    assert len(calls) == 6 and not (tmp_path / "s.npz.parts").exists()
    for key in ("arr_0", "labels"):
        assert np.array_equal(np.load(tmp_path / "s.npz")[key], np.load(tmp_path / "whole.npz")[key])


def test_a_released_irepa_checkpoint_asks_for_its_scale(vae, tmp_path, capsys):
    model = fill(SiT(Config(**{**TINY, "projector": "mlp"})), strong)
    state = model.state_dict()
    bare = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    files = dict(
        irepa=dict(ema=state, steps=400_000),
        wrapped=dict(ema={f"module.{key}": value for key, value in state.items()}),
        eval=dict(ema=bare, args=Namespace(zscore_alpha=0.6, path_type="linear")),
        norm=dict(ema=bare, args=Namespace(spnorm_method="zscore", path_type="linear")),
        repa=dict(ema={key.replace("projection_layer.", ""): value for key, value in state.items()}),
    )
    for name, file in files.items():
        torch.save(file, tmp_path / f"{name}.pt")
    scale, bias = [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.5]
    torch.save(dict(latents_scale=torch.tensor(scale), latents_bias=torch.tensor(bias)), tmp_path / "stats.pt")

    def scale_of(name, *flags):
        out = tmp_path / f"{name}{len(flags)}.npz"
        few = ["--steps", 2, "--num", 2, "--vae", vae, "--npz", out]
        run_sample("--ckpt", tmp_path / f"{name}.pt", *few, *flags)
        latent = json.loads(out.with_suffix(".json").read_text())["latent"]
        return latent["scale"][0], latent["bias"][3]

    for name in ("irepa", "wrapped", "eval", "norm"):
        error = refused(capsys, scale_of, name)
        assert f"{name}.pt is of the iREPA release" in error and "--latent-scale" in error
        assert "fetch pretrained_models/sdvae-ft-mse-f8d4-latents-stats.pt from its iREPA-collections" in error
    assert scale_of("irepa", "--latent-scale", tmp_path / "stats.pt") == (1.0, 0.5)
    assert scale_of("eval", "--latent-scale", "vae", "--seed", 1) == (0.18215, 0.0)
    assert scale_of("repa") == (0.18215, 0.0)
    error = refused(capsys, scale_of, "repa", "--latent-scale", "set")
    assert "--latent-scale set: there is no such file of latents_scale and latents_bias" in error
