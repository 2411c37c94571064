"""inputs/latents.py: the cache of latents, their scale, and training on both."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from inputs import latents
from inputs import vae as vaes
from inputs.images import ImageSet
from tests.common import HERE, RUN, refused, rows_of, run, run_sample, same_weights, toy_vae, weights
from tests.processes import call

LATENT = [*RUN, "--model", "SiT-S/2", "--vae-precision", "fp32"]


def write(*flags):
    latents.main([str(flag) for flag in flags])


def test_a_cache_is_written_whole_resumed_and_refused(photos, vae, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cache"
    flags = ["--image-size", 16, "--data", photos, "--vae", vae, "--device", "cpu", "--out"]
    cached = [*LATENT, "--data", photos, "--vae", vae, "--latents", out, "--out", tmp_path / "x"]
    write(*flags, out)
    shards = sorted(out.glob("moments-*.npy"))
    before = [np.load(shard) for shard in shards]
    assert [b.shape for b in before] == [(16, 8, 8, 8), (8, 8, 8, 8)] and before[0].dtype == np.float16
    data = ImageSet(photos, 16, progress=False)
    moments = vaes.encode(vaes.load_vae(str(vae))[0], data[np.arange(16, 24)][0])
    torch.testing.assert_close(torch.from_numpy(before[1]).float(), moments, rtol=2e-3, atol=2e-3)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["count"] == 24 and manifest["classes"] == ["cats", "dogs"] and manifest["spec"]["factor"] == 2
    assert json.loads((out / "files.json").read_text()) == data.files and np.load(out / "labels.npy").sum() == 12
    mean, std = np.split(np.concatenate(before).astype(np.float64), 2, axis=1)
    np.testing.assert_allclose(manifest["mean"], mean.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest["std"], np.sqrt((std**2).mean((0, 2, 3)) + mean.var((0, 2, 3))), rtol=1e-12)

    encoded, encode = [], latents.encode
    monkeypatch.setattr(latents, "encode", lambda v, images: encoded.append(len(images)) or encode(v, images))
    write(*flags, out)
    assert not encoded  # a finished cache is left alone
    shards[1].unlink()  # as a run that was stopped leaves it
    assert "moments-00001.npy is not there" in refused(capsys, run, *cached)
    write(*flags, out)
    assert sum(encoded) == 8 and all(np.array_equal(np.load(s), b) for s, b in zip(shards, before))
    assert json.loads((out / "manifest.json").read_text()) == manifest  # mean and std to the bit

    other = toy_vae(tmp_path / "other", 1)
    changed = shutil.copytree(photos, tmp_path / "changed")
    Image.new("RGB", (20, 18)).save(changed / "cats/0.png")
    for more, message in (
        (["--data", changed], "files_sha256"),  # other images under the same names
        (["--vae", other], "asked for is local with sha256"),
        (["--image-size", 32], "image_size"),
    ):
        assert message in refused(capsys, write, *flags, out, *more)
        assert message in refused(capsys, run, *cached, *more)
    shards[1].write_bytes(shards[1].read_bytes()[:600])
    assert "moments-00001.npy is damaged" in refused(capsys, run, *cached)
    shards[0].unlink()
    assert "moments-00001.npy is damaged" in refused(capsys, write, *flags, out)
    assert sum(encoded) == 8  # before anything is encoded
    assert "something else" in refused(capsys, write, *flags, photos) and not (photos / ".lock").exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--image-size 12", "name a folder with --out, and a --vae, or images from 128 px up"),
        ("--image-size 12 --vae nowhere", "neither a file or folder"),
        ("--vae-precision fp16", "--vae-precision is fp32 or bf16, not fp16"),
        ("--device tpu9", "cannot be used"),
    ],
)
def test_a_mistake_in_a_cache_is_one_sentence_and_exit_2(photos, tmp_path, capsys, flags, message):
    assert message in refused(capsys, write, "--data", photos, "--out", tmp_path / "cache", *flags.split())
    assert not (tmp_path / "cache").exists()


def manifest_of(cache):
    return json.loads((cache / "manifest.json").read_text())


def latent_of(out):
    return torch.load(out / "last.pt", weights_only=True)["latent"]


@pytest.fixture(scope="module")
def cache(photos, vae, tmp_path_factory):
    """Of the photographs at 16 px, written by two processes."""
    folder = tmp_path_factory.mktemp("latents")
    flags = ["--data", photos, "--vae", vae, "--image-size", 16, "--device", "cpu", "--out", folder / "cache"]
    codes, said = call(HERE, folder, "inputs.latents", *flags, world=2)
    assert codes == [0, 0], said[-3000:]
    return folder / "cache"


def test_a_caches_mean_and_std_do_not_depend_on_how_it_was_written(photos, vae, cache, tmp_path, monkeypatch, capsys):
    flags = ["--data", photos, "--vae", vae, "--image-size", 16, "--device", "cpu", "--out", tmp_path / "one"]
    write(*flags)
    assert manifest_of(tmp_path / "one") == manifest_of(cache)
    old = {key: value for key, value in manifest_of(cache).items() if key not in ("mean", "std")}
    old["spec"] = {**old["spec"], "scale": [0.18215] * 4, "bias": [0.0] * 4}  # as earlier versions wrote it
    (tmp_path / "one/manifest.json").write_text(json.dumps(old))
    cached = [*LATENT, "--data", photos, "--vae", vae, "--latents", tmp_path / "one", "--sample-every", 0, "--out"]
    error = refused(capsys, run, *cached, tmp_path / "run")
    assert "holds no mean and standard deviation of its latents: run python -m inputs.latents again" in error
    run(*cached, tmp_path / "run", "--steps", 1, "--latent-scale", "vae")
    monkeypatch.setattr(latents, "encode", None)
    write(*flags)
    assert manifest_of(tmp_path / "one") == {**old, **{key: manifest_of(cache)[key] for key in ("mean", "std")}}
    run(*cached, tmp_path / "again", "--steps", 1)
    (tmp_path / "one/manifest.json").write_text(json.dumps({**old, "mean": [0, 0], "std": [1, 1]}))
    assert "its mean and std are not a number for each channel" in refused(capsys, run, *cached, tmp_path / "x")


def test_the_scale_of_latents(photos, vae, cache, tmp_path, capsys):
    def scaled(name, *flags):
        capsys.readouterr()
        flags = ["--data", photos, "--vae", vae, *flags]
        run(*LATENT, *flags, "--sample-every", 0, "--out", tmp_path / name)
        return capsys.readouterr().out.splitlines()[1], latent_of(tmp_path / name)

    cached = ["--latents", cache]
    for method in ("irepa", "sit"):
        said, spec = scaled(method, *cached, "--method", method)
        assert "mean 0 and variance 1 in each channel, over its 24 images, as in the iREPA release" in said
        assert "--latent-scale vae" in said
        assert spec["bias"] == manifest_of(cache)["mean"]
        np.testing.assert_allclose(spec["scale"], 1 / np.array(manifest_of(cache)["std"]), rtol=1e-15)
    data = latents.Cached(ImageSet(photos, 16, progress=False), cache, images=False)
    moments = data[np.arange(24)].moments.repeat(20, 1, 1, 1)
    z = vaes.to_latent(moments, torch.randn(480, 4, 8, 8, generator=torch.Generator().manual_seed(0)), spec)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=0.02, atol=0)

    said, spec = scaled("own", *cached, "--latent-scale", "vae")
    assert "the VAE's own scale, as in SiT and REPA (scale 0.18215, bias 0)" in said and said.endswith("set)")
    assert spec["scale"] == [0.18215] * 4
    said, spec = scaled("loop")
    assert said.endswith("(--latent-scale set, which takes a cache: python -m inputs.latents, then --latents)")
    assert spec["scale"] == [0.18215] * 4
    stats = dict(latents_scale=torch.arange(1.0, 5).view(1, 4, 1, 1), latents_bias=torch.full((1, 4, 1, 1), 0.5))
    torch.save(stats, tmp_path / "stats.pt")
    said, spec = scaled("file", *cached, "--latent-scale", tmp_path / "stats.pt")
    assert "stats.pt scales each channel (scale 1 2 3 4, bias 0.5)" in said
    assert (spec["scale"], spec["bias"]) == ([1.0, 2, 3, 4], [0.5] * 4)
    for flags, message in (
        (["--latent-scale", "set"], "write a cache with python -m inputs.latents, and name it with --latents"),
        (["--latent-scale", "sets", *cached], "--latent-scale is set, vae or a stats file, and sets is none of them"),
        (["--latent-scale", "vae", "--vae", "none"], "--latent-scale goes with a --vae"),
    ):
        assert message in refused(capsys, run, *LATENT, "--data", photos, "--vae", vae, *flags, "--out", tmp_path / "x")


def test_a_resumed_run_keeps_the_scale_of_its_checkpoint(photos, vae, cache, tmp_path, capsys):
    flags = [*LATENT, "--data", photos, "--vae", vae, "--latents", cache, "--sample-every", 0]
    run(*flags, "--out", tmp_path / "whole")
    run(*flags, "--out", tmp_path / "stopped", "--steps", 3)
    resume = ["--resume", "--out", tmp_path / "stopped", "--steps", 4]
    error = refused(capsys, run, *resume, "--latent-scale", "vae")
    assert "holds latents of local with scale" in error and "asked for is local with scale [0.18215" in error
    other = shutil.copytree(cache, tmp_path / "other")  # its numbers would now be others
    (other / "manifest.json").write_text(json.dumps({**manifest_of(cache), "mean": [1.0] * 4}))
    run(*resume, "--latents", other, "--latent-scale", "set")
    assert "as at the start" in capsys.readouterr().out
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))

    old = torch.load(tmp_path / "stopped/last.pt", weights_only=True)  # of a version without the setting
    del old["settings"]["latent_scale"]
    old["settings"]["latent_stats"] = None
    old["latent"].update(scale=[0.18215] * 4, bias=[0.0] * 4)
    torch.save(old, tmp_path / "stopped/last.pt")
    resume = ["--resume", "--out", tmp_path / "stopped", "--steps"]
    assert "holds latents of local with scale" in refused(capsys, run, *resume, 5, "--latent-scale", "set")
    run(*resume, 5)
    run(*resume, 6, "--latent-scale", "vae")
    assert latent_of(tmp_path / "stopped") == old["latent"]


def test_training_on_latents(photos, vae, cache, tmp_path, capsys):
    flags = [*LATENT, "--data", photos, "--vae", vae, "--latent-scale", "vae", "--sample-every", 0]
    run(*flags, "--out", tmp_path / "loop")  # the VAE in every step
    run(*flags, "--latents", cache, "--out", tmp_path / "cached", "--workers", 2)
    run(*flags, "--latents", cache, "--out", tmp_path / "stopped", "--steps", 3)
    run("--resume", "--out", tmp_path / "stopped", "--steps", 4)
    rows = [rows_of(tmp_path / name)[-1] for name in ("loop", "cached")]
    assert rows[0]["held_out"] == pytest.approx(rows[1]["held_out"], rel=1e-3)  # float16 moments are that close
    assert rows[0]["align"] == pytest.approx(rows[1]["align"], rel=1e-2)
    assert same_weights(weights(tmp_path / "cached"), weights(tmp_path / "stopped"))
    assert not (tmp_path / "cached/samples").exists()
    other = toy_vae(tmp_path / "other", 1)  # other latents under the same run
    message = refused(capsys, run, "--resume", "--out", tmp_path / "loop", "--steps", 6, "--vae", other)
    assert "asked for is local with sha256" in message

    few = ["--ckpt", tmp_path / "cached/last.pt", "--steps", 2, "--num", 5, "--batch-size", 2]
    few += ["--npz", tmp_path / "s.npz"]
    assert "name its folder after --vae" in refused(capsys, run_sample, *few)
    assert "holds latents of local with sha256" in refused(capsys, run_sample, *few, "--vae", other)
    run_sample(*few, "--vae", vae)
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (5, 16, 16, 3)
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["latent"]["scale"] == [0.18215] * 4 and record["config"]["in_channels"] == 4


def test_a_vae_that_makes_no_images_is_said(photos, vae, tmp_path, capsys):
    network = vaes.load_vae(str(vae)).vae
    network.decoder.conv_out.bias.fill_(float("nan"))
    network.save_pretrained(tmp_path / "vae")
    flags = [*LATENT, "--data", photos, "--vae", tmp_path / "vae", "--sample-every", 4, "--out", tmp_path / "run"]
    run(*flags)
    assert "warning: the VAE made images that are not finite; training goes on" in capsys.readouterr().err
    assert (tmp_path / "run/last.pt").exists() and not list((tmp_path / "run/samples").glob("step*"))
    sampled = ["--ckpt", tmp_path / "run/last.pt", "--vae", tmp_path / "vae", "--steps", 2, "--num", 2, "--labels", "0"]
    assert "the VAE made images that are not finite" in refused(capsys, run_sample, *sampled)
