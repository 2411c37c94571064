"""inputs/latents.py: the pair of encoder and decoder, the cache of latents, and training on both."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from inputs import latents
from inputs.images import ImageSet
from test_irepa import normal
from tests.common import HERE, RUN, refused, rows_of, run, run_sample, same_weights, toy_vae, weights
from tests.processes import call

LATENT = [*RUN, "--model", "SiT-S/2", "--vae-precision", "fp32"]


def write(*flags):
    latents.main([str(flag) for flag in flags])


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
    file = toy_vae(tmp_path / "lacking", 0) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if k != "quant_conv.bias"}, file)
    with pytest.raises(ValueError, match="lacks 1 tensors, such as quant_conv.bias"):  # and is not left random
        latents.load_vae(str(tmp_path / "lacking"))
    torch.save(dict(latents_scale=scale), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt is no file of .* 'latents_bias' is missing"):
        latents.read_stats(tmp_path / "bad.pt", 4)


def test_a_cache_is_written_whole_resumed_and_refused(photos, vae, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cache"
    flags = ["--image-size", 16, "--data", photos, "--vae", vae, "--device", "cpu", "--out"]
    cached = [*LATENT, "--data", photos, "--vae", vae, "--latents", out, "--out", tmp_path / "x"]
    write(*flags, out)
    shards = sorted(out.glob("moments-*.npy"))
    before = [np.load(shard) for shard in shards]
    assert [b.shape for b in before] == [(16, 8, 8, 8), (8, 8, 8, 8)] and before[0].dtype == np.float16
    data = ImageSet(photos, 16, progress=False)
    moments = latents.encode(latents.load_vae(str(vae))[0], data[np.arange(16, 24)][0])
    torch.testing.assert_close(torch.from_numpy(before[1]).float(), moments, rtol=2e-3, atol=2e-3)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["count"] == 24 and manifest["classes"] == ["cats", "dogs"] and manifest["spec"]["factor"] == 2
    assert json.loads((out / "files.json").read_text()) == data.files and np.load(out / "labels.npy").sum() == 12

    encoded, encode = [], latents.encode
    monkeypatch.setattr(latents, "encode", lambda v, images: encoded.append(len(images)) or encode(v, images))
    write(*flags, out)
    assert not encoded  # a finished cache is left alone
    shards[1].unlink()  # as a run that was stopped leaves it
    assert "moments-00001.npy is not there" in refused(capsys, run, *cached)
    write(*flags, out)
    assert sum(encoded) == 8 and all(np.array_equal(np.load(s), b) for s, b in zip(shards, before))

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
    assert "something else" in refused(capsys, write, *flags, photos)


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--image-size 12", "name a folder with --out, and a --vae, or images from 128 px up"),
        ("--image-size 12 --latent-stats stats.pt", "--latent-stats goes with a --vae"),
        ("--image-size 12 --vae nowhere", "neither a file or folder"),
        ("--vae-precision fp16", "--vae-precision is fp32 or bf16, not fp16"),
        ("--device tpu9", "cannot be used"),
    ],
)
def test_a_mistake_in_a_cache_is_one_sentence_and_exit_2(photos, tmp_path, capsys, flags, message):
    assert message in refused(capsys, write, "--data", photos, "--out", tmp_path / "cache", *flags.split())
    assert not (tmp_path / "cache").exists()


def test_training_on_latents(photos, vae, tmp_path, capsys):
    cache = tmp_path / "cache"
    common = ["--data", photos, "--vae", vae]
    flags = [*common, "--image-size", 16, "--device", "cpu", "--out", cache]
    codes, said = call(HERE, tmp_path, "inputs.latents", *flags, world=2)
    assert codes == [0, 0], said[-3000:]
    flags = [*LATENT, *common, "--sample-every", 0]
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
