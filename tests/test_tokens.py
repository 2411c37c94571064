"""inputs/tokens.py and inputs/shards.py: tokens that are computed once, in a folder or in the memory of a run."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from inputs import teachers, tokens
from inputs.images import ImageSet
from inputs.teachers import load_encoder
from inputs.tokens import Tokens, weights_sha256
from tests.common import HERE, RUN, refused, rows_of, run, same_weights, weights
from tests.processes import call, start

VIT = "timm:test_vit"
SMALL = ["--image-size", 16, "--grid", 4, "--device", "cpu"]
QUIET = [*RUN, "--sample-every", 0]
PARTS = ("loss", "denoise", "align", "held_out", "grad_norm")


def write(*flags):
    teachers.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def cache(photos, tmp_path_factory):
    """Of hog and of a network with random weights."""
    folder = tmp_path_factory.mktemp("tokens") / "cache"
    write(*SMALL, "--data", photos, "--encoder", "hog", "--out", folder)
    write(*SMALL, "--data", photos, "--encoder", VIT, "--encoder-weights", "random", "--out", folder)
    return folder


def test_a_cache_holds_what_the_teacher_gives(photos, cache, tmp_path, capsys):
    data = ImageSet(photos, 16, progress=False)
    for name, random in (("hog", None), (VIT, "random")):
        teacher, found = load_encoder(name, 4, random), Tokens(cache, name, 4)
        live = teacher(data[range(24)].images)
        torch.testing.assert_close(found[np.arange(24)].float(), live, rtol=1e-3, atol=1e-4)
        assert torch.equal(found[[20, 3]], found[np.arange(24)][[20, 3]]) and found[[0]].dtype == torch.float16
        assert found.images.files == data.files and (found.images.labels == data.labels).all()
        manifest = json.loads((cache / name.replace(":", "-") / "manifest.json").read_text())
        assert manifest["weights_sha256"] == weights_sha256(teacher) and manifest["random"] == bool(random)
    assert weights_sha256(load_encoder("hog", 4)) is None
    torch.save(teacher.model.state_dict(), tmp_path / "vit.pth")
    other = load_encoder(VIT, 8, tmp_path / "vit.pth")  # another grid has another table of positions
    assert weights_sha256(other) == manifest["weights_sha256"]
    other.model.blocks[0].attn.qkv.weight[0, 0] += 1
    assert weights_sha256(other) != manifest["weights_sha256"]


def test_a_stopped_cache_goes_on_and_processes_share_it(photos, cache, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--data", photos, "--encoder", "hog", "--out"]
    codes, said = call(HERE, tmp_path, "inputs.teachers", *flags, tmp_path / "two", world=2)
    assert codes == [0, 0], said[-3000:]
    assert "0.0001 GB of tokens are to be written" in said.replace("9.83e-05", "0.0001") and "complete" in said
    whole = {file.name: file.read_bytes() for file in (cache / "hog").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "two/hog").iterdir()} == whole
    shard = tmp_path / "two/hog/tokens-00001.npy"
    shard.unlink()
    lines = [*QUIET, "--data", photos, "--tokens", tmp_path / "two", "--out", tmp_path / "x"]
    assert "is unfinished: tokens-00001.npy is not there" in refused(capsys, run, *lines)
    made, fill = [], tokens.Shards.fill

    def counted(self, todo, *args):
        made.extend(todo)
        return fill(self, todo, *args)

    monkeypatch.setattr(tokens.Shards, "fill", counted)
    write(*flags, tmp_path / "two")
    assert made == [16] and {f.name: f.read_bytes() for f in (tmp_path / "two/hog").iterdir()} == whole
    shard.write_bytes(whole[shard.name][:300])
    assert "tokens-00001.npy is damaged" in refused(capsys, write, *flags, tmp_path / "two")
    assert "tokens-00001.npy is damaged" in refused(capsys, run, *lines)


def test_a_cache_that_is_killed_goes_on(tmp_path, photos):
    data = tmp_path / "data/all"
    data.mkdir(parents=True)
    for i in range(40):
        for file in (photos / "cats").iterdir():
            shutil.copy(file, data / f"{i}-{file.name}")
    flags = [*SMALL, "--data", tmp_path / "data", "--encoder", VIT, "--encoder-weights", "random", "--out"]
    write(*flags, tmp_path / "whole")
    process = start(HERE, "inputs.teachers", [*flags, tmp_path / "killed"], tmp_path / "said.txt")
    folder = tmp_path / "killed/timm-test_vit"
    for _ in range(6000):
        if any(folder.glob("tokens-*.npy")):
            break
        time.sleep(0.01)
    process.kill()
    process.join()
    there = len([*folder.glob("tokens-*.npy")])
    assert process.exitcode == -signal.SIGKILL and 0 < there < 30
    write(*flags, tmp_path / "killed")
    for file in (tmp_path / "whole/timm-test_vit").iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()


@pytest.mark.parametrize("encoder", ["hog", VIT])
def test_live_memory_and_cache_have_the_same_losses(photos, cache, tmp_path, encoder, capsys):
    weights_of = [] if encoder == "hog" else ["--encoder-weights", "random"]
    flags = [*QUIET, "--data", photos, "--steps", 9, "--ckpt-every", 9, "--encoder", encoder, "--out"]
    run(*flags, tmp_path / "live", "--token-memory", 0, *weights_of)
    run(*flags, tmp_path / "memory", *weights_of)
    run(*flags, tmp_path / "stopped", "--steps", 4, *weights_of)
    run("--resume", "--out", tmp_path / "stopped", "--steps", 9)
    capsys.readouterr()
    run(*flags, tmp_path / "cached", "--tokens", cache)
    assert ("teacher's weights are random" in capsys.readouterr().out) == (encoder == VIT)
    live, memory, cached = (rows_of(tmp_path / name) for name in ("live", "memory", "cached"))
    for name in ("memory", "stopped"):
        assert same_weights(weights(tmp_path / "live"), weights(tmp_path / name))
    assert all(a[key] == b[key] for a, b in zip(live, memory) for key in PARTS)
    for a, b in zip(live, cached, strict=True):
        for key in PARTS:
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-5), key
    assert not same_weights(weights(tmp_path / "live"), weights(tmp_path / "cached"))  # float16 rounds
    assert all(row["teacher"] > 0 for row in live) and not any(row["teacher"] for row in cached)
    assert [row["teacher"] > 0 for row in memory] == [True, True, False, False, False]  # three steps are an epoch


def test_two_processes_compute_each_image_once(photos, tmp_path):
    flags = [*QUIET, "--data", photos, "--steps", 8, "--ckpt-every", 8, "--log-every", 4, "--out"]
    run(*flags, tmp_path / "one")
    codes, said = call(HERE, tmp_path, "train", *flags, tmp_path / "two", world=2)
    assert codes == [0, 0], said[-3000:]
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert all(a[key] == pytest.approx(b[key], rel=1e-4) for a, b in zip(one, two) for key in PARTS)
    assert two[0]["teacher"] > 0 and two[1]["teacher"] == 0


def test_mirrored_images_are_not_kept(photos, tmp_path):
    run(*QUIET, "--data", photos, "--flip", "--steps", 8, "--out", tmp_path / "flip")
    assert all(row["teacher"] > 0 for row in rows_of(tmp_path / "flip"))


def test_two_caches_need_no_image(photos, vae, cache, tmp_path, capsys):
    own = shutil.copytree(photos, tmp_path / "photos")
    flags = ["--data", own, "--image-size", 16, "--device", "cpu"]
    call(HERE, tmp_path, "inputs.latents", *flags, "--vae", vae, "--out", tmp_path / "latents")
    write(*flags, "--grid", 4, "--encoder", "hog", "--out", tmp_path / "tokens")
    latents = [*QUIET, "--model", "SiT-S/2", "--vae", vae, "--latents", tmp_path / "latents"]
    both = [*latents, "--tokens", tmp_path / "tokens", "--out"]
    run(*latents, "--data", own, "--out", tmp_path / "live")
    run(*both, tmp_path / "named", "--data", own)
    shutil.rmtree(own)
    capsys.readouterr()
    run(*both, tmp_path / "cached")
    assert "names and labels of 24 images in 2 classes; no image is opened" in capsys.readouterr().out
    run(*both, tmp_path / "stopped", "--steps", 3)
    run("--resume", "--out", tmp_path / "stopped", "--steps", 4)
    for a, b in zip(rows_of(tmp_path / "live"), rows_of(tmp_path / "cached"), strict=True):
        for key in PARTS:
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-5), key
    for name in ("named", "stopped"):
        assert same_weights(weights(tmp_path / "cached"), weights(tmp_path / name))
    assert torch.load(tmp_path / "cached/last.pt", weights_only=True)["classes"] == ["cats", "dogs"]
    run(*latents, "--method", "sit", "--out", tmp_path / "sit")
    assert "no image is opened" in capsys.readouterr().out
    shutil.copytree(tmp_path / "tokens", tmp_path / "fewer")
    manifest = json.loads((tmp_path / "fewer/hog/manifest.json").read_text())
    (tmp_path / "fewer/hog/manifest.json").write_text(json.dumps({**manifest, "files_sha256": "0"}))
    error = refused(capsys, run, *latents, "--tokens", tmp_path / "fewer", "--out", tmp_path / "x")
    assert "latents is not a cache of" in error and "files_sha256" in error


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--tokens {0}/none", "none has none of hog: there is no such folder"),
        ("--tokens {0} --encoder sift", "has none of sift, only of hog, timm:test_vit: choose one with --encoder"),
        ("--tokens {0}/hog", "hog has none of hog: name the folder above it, {0}"),
        ("--tokens {0} --model SiT-S/2", "its grid is 4, not 8"),
        ("--tokens {0} --cls-weight 0.5", "its cls_weight is 0.0, not 0.5"),
        ("--tokens {0} --image-size 32 --model SiT-S/8", "its image_size is 16, not 32"),
        ("--tokens {0} --data {1}", "its count is 24, not 12"),
        ("--tokens {0} --flip", "--flip mirrors images, and --tokens holds none of mirrored ones"),
        (
            "--tokens {0} --method jit --model JiT-B/4",
            "--flip mirrors images, and --tokens holds none of mirrored ones",
        ),
        ("--tokens {0} --encoder-weights random", "leave --encoder-weights out"),
        ("--token-memory nan", "--token-memory must not be negative"),
        ("--tokens {0} --demo", "with --data, or leave --tokens out"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(photos, cache, tmp_path, capsys, flags, message):
    few = shutil.copytree(photos / "cats", tmp_path / "few/cats").parent
    lines = [*QUIET, *([] if "--demo" in flags else ["--data", photos]), "--out", tmp_path / "x"]
    assert message.format(cache) in refused(capsys, run, *lines, *flags.format(cache, few).split())


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--encoder hog", "name teachers with --encoder, and a folder with --out"),
        ("--encoder hog hog --out {0}/x", "--encoder hog hog: name each once"),
        ("--encoder hog hogg --out {0}/x", "unknown encoder 'hogg'"),
        ("--encoder hog --out {0}/x --grid 0", "--grid and --image-size must be positive"),
        ("--encoder hog --out {1}/cats", "cats holds something else, as "),
        ("--encoder hog --out {2} --grid 8", "holds another cache: its grid is 4, not 8"),
        ("--encoder sift --out {0}/x --grid 16", "sift needs two pixels for each token"),
        ("--encoder hog timm:test_vit --encoder-weights {1}/cats/0.png --out {0}/x", "is of one encoder"),
        ("--encoder timm:test_vit --encoder-weights {1}/cats/0.png --out {0}/x", "does not fit the model"),
    ],
)
def test_a_mistake_in_writing_is_one_sentence(photos, cache, tmp_path, capsys, flags, message):
    error = refused(capsys, write, *SMALL, "--data", photos, *flags.format(tmp_path, photos, cache).split())
    assert message in error and not [*tmp_path.rglob("*.npy")]


def test_tokens_beyond_float16_and_a_full_disk_are_refused(photos, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--data", photos, "--encoder", "hog", "--out", tmp_path / "x"]
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=10_000))
    error = refused(capsys, write, *flags)
    assert "9.83e-05 GB of tokens are to be written" in error and "make room, or name another --out" in error
    assert not (tmp_path / "x").exists()
    monkeypatch.undo()
    forward = teachers.DRAWN["hog"].forward
    monkeypatch.setattr(teachers.DRAWN["hog"], "forward", lambda self, images: forward(self, images) * 1e6)
    assert "cats/0.png and after it do not fit float16, and are not clipped" in refused(capsys, write, *flags)
    assert not [*tmp_path.rglob("tokens-*")]


def test_a_run_goes_on_with_tokens_of_the_same_weights_alone(photos, cache, tmp_path, capsys):
    flags = [*QUIET, "--data", photos, "--encoder", VIT, "--out", tmp_path / "run"]
    run(*flags, "--tokens", cache, "--steps", 2)
    other = shutil.copytree(cache, tmp_path / "other")
    manifest = json.loads((other / "timm-test_vit/manifest.json").read_text())
    (other / "timm-test_vit/manifest.json").write_text(json.dumps({**manifest, "weights_sha256": "0"}))
    more = ["--resume", "--out", tmp_path / "run", "--steps", 3]
    assert "is of other weights of the encoder than those" in refused(capsys, run, *more, "--tokens", other)
    run(*more)
    run("--resume", "--out", tmp_path / "run", "--steps", 4, "--tokens", "none", "--encoder-weights", "random")


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(grid="4"), "its sizes are not positive numbers"),
        (dict(classes=3), "manifest.json cannot be used"),
        (dict(classes=[]), "its classes are no names"),
        (dict(classes=["one"]), "some labels are of none of its 1 classes"),
        (dict(stand_ins=5), "manifest.json cannot be used"),
        (dict(stand_ins=[[0, 99]]), "its stand_ins are no pairs of images"),
        (dict(files_sha256="0"), "files have other names, sizes or contents"),
        (dict(dim=10**12), "tokens-00000.npy is damaged"),
    ],
)
def test_a_damaged_record_is_refused(photos, cache, tmp_path, capsys, change, message):
    own = shutil.copytree(cache, tmp_path / "cache")
    manifest = json.loads((own / "hog/manifest.json").read_text())
    (own / "hog/manifest.json").write_text(json.dumps({**manifest, **change}))
    assert message in refused(capsys, run, *QUIET, "--data", photos, "--tokens", own, "--out", tmp_path / "x")
