"""fid.py: TensorFlow's Inception and resize, metrics in closed form, and image sets of every kind."""

import json
import math
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import fid
from test_irepa import drawn, normal
from tests.common import HERE
from tests.processes import call


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file with the names and shapes of the released Inception, filled from the names."""
    weights = {}
    for name, p in fid.InceptionV3().state_dict().items():
        if not p.is_floating_point():
            continue  # the released file has no batch counters
        draw = drawn(name, p.shape)
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
    for bad, message in (((mu[:3], first[1]), "have shapes"), ((mu, np.full((40, 40), np.nan)), "not finite")):
        with pytest.raises(ValueError, match=message):
            fid.frechet_distance(*bad, *second)


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


def test_the_crop_halves_by_boxes_then_scales_and_cuts_the_centre():
    rs = np.random.RandomState(0)
    square = rs.randint(0, 256, (64, 64, 3)).astype(np.uint8)
    wide = np.concatenate([0 * square, square, 0 * square], axis=1)
    assert np.array_equal(fid.center_crop(Image.fromarray(wide), 64), square)
    means = square.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert abs(np.asarray(fid.center_crop(Image.fromarray(wide), 32)) - means).max() <= 1  # each direction rounds
    bicubic = Image.fromarray(square).resize((40, 40), Image.Resampling.BICUBIC)
    assert np.array_equal(fid.center_crop(Image.fromarray(square), 40), bicubic)  # less than twice too large
    for width, height in ((100, 70), (33, 64), (20, 31), (300, 130)):
        assert fid.center_crop(Image.new("RGB", (width, height)), 32).size == (32, 32)


def score(*flags):
    fid.main([*map(str, flags), "--device", "cpu"])


def test_two_ranks_give_the_statistics_of_one(inception, image_sets, tmp_path):
    flags = ["--inception", inception, image_sets / "folder", "--batch-size", 2, "--save-stats"]
    score(*flags, tmp_path / "one.npz")
    assert call(HERE, tmp_path, "fid", *flags, tmp_path / "two.npz", "--device", "cpu", world=2)[0] == [0, 0]
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
    score(image_sets / "all.zip", image_sets / "folder", "--fast")
    assert "bf16 moves the features by 0.00%" in capsys.readouterr().out
    score("--save-stats", tmp_path / "stats.npz", image_sets / "folder")
    score(image_sets / "plain.npz", tmp_path / "stats.npz", "--json", tmp_path / "more.json")
    record = json.loads((tmp_path / "more.json").read_text())
    assert record["precision"] is None and "and there are 9 and 0" in record["not_available"]["precision"]
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
        path=str(tmp_path / "reference.npz"), n=None, images_seen=9, cropped_to=None
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
    "text.pt": (b"hello", "cannot be used"),
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


def test_photographs_of_any_size_are_cropped_to_one(image_sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "load_inception", lambda *args: (Means(), fid.HASH + "0" * 56))
    monkeypatch.setattr(fid, "frechet_distance", lambda *args: 1.0)
    rs = np.random.RandomState(3)
    (tmp_path / "photos").mkdir()
    for i, size in enumerate(((30, 40), (16, 16), (70, 33), (20, 20), (50, 16))):
        image = Image.fromarray(rs.randint(0, 256, (*size, 3)).astype(np.uint8))
        image.save(tmp_path / f"photos/{i}.png")
    with pytest.raises(SystemExit):
        score(tmp_path / "photos", tmp_path / "photos")
    assert "is 16x16, the first 40x30; --image-size SIDE crops all to one" in capsys.readouterr().err
    score(tmp_path / "photos", image_sets / "all.zip", "--image-size", 16, "--json", tmp_path / "out.json")
    record = json.loads((tmp_path / "out.json").read_text())
    assert 0 <= record["precision"] <= 1 and 0 <= record["recall"] <= 1
    assert [record[side]["cropped_to"] for side in ("samples", "reference")] == [16, 16]
    assert capsys.readouterr().out.count("each centre-cropped to 16 px") == 2
    for size, fits in ((16, True), (20, False)):  # what is not cropped has to be of that size
        np.savez(tmp_path / f"{size}.npz", rs.randint(0, 256, (5, size, size, 3)).astype(np.uint8))
        flags = tmp_path / f"{size}.npz", tmp_path / "photos", "--image-size", 16
        if fits:
            score(*flags)
            assert capsys.readouterr().out.count("each centre-cropped to 16 px") == 1
        else:
            with pytest.raises(SystemExit):
                score(*flags)
            assert "20.npz is (20, 20) px; only folders and zips are cropped" in capsys.readouterr().err


def stored_statistics(seed=0):
    rs = np.random.RandomState(seed)
    return dict(mu=rs.standard_normal(2048).astype(np.float32), sigma=np.diag(rs.uniform(1, 2, 2048)))


def test_stored_statistics_are_saved_as_they_are(image_sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "load_inception", lambda *args: pytest.fail("nothing is to be computed"))
    pixels, stored = np.load(image_sets / "plain.npz")["arr_0"], stored_statistics()
    spatial = dict(mu_s=np.ones(2023), sigma_s=np.eye(2023))
    for name, more in (("all", spatial), ("fid", {})):  # as ADM's references: of more images than arr_0 has
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels, **stored, **more)
        score("--save-stats", tmp_path / f"{name}-kept.npz", tmp_path / f"{name}.npz")
        kept = np.load(tmp_path / f"{name}-kept.npz")
        assert set(kept) == {*stored, *more, "size"} and kept["size"].tolist() == [20, 24]  # n is unknown, and stays so
        assert all(np.array_equal(kept[key], value) for key, value in {**stored, **more}.items())
        assert "the stored statistics, as they are, of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        score("--save-stats", tmp_path / "x.npz", tmp_path / "all.npz", "--image-size", 16)
    assert "all.npz is (20, 24) px; only folders and zips are cropped" in capsys.readouterr().err


@pytest.mark.parametrize("numpy", ["numpy._core", "numpy.core"])  # as numpy 2 and numpy 1 name themselves in a pickle
def test_statistics_of_other_evaluators_are_read(image_sets, tmp_path, monkeypatch, capsys, numpy):
    monkeypatch.setattr(fid, "load_inception", lambda *args: (Means(), fid.HASH + "0" * 56))
    sides, stored = [], stored_statistics()
    monkeypatch.setattr(fid, "frechet_distance", lambda *args: sides.append(args) or 1.0)
    torch.save(stored, tmp_path / "written.pt")
    with zipfile.ZipFile(tmp_path / "written.pt") as old, zipfile.ZipFile(tmp_path / "stat-fid-2048.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info, old.read(info).replace(b"numpy._core", numpy.encode()))
    np.savez(tmp_path / "in256_stats.npz", **stored)
    for name in ("stat-fid-2048.pt", "in256_stats.npz"):
        score(image_sets / "folder", tmp_path / name, "--json", tmp_path / f"{name}.json")
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["fid"] == 1 and record["sfid"] is None and record["precision"] is None
        assert np.array_equal(sides[-1][2], stored["mu"]) and np.array_equal(sides[-1][3], stored["sigma"])
        assert "compare only with numbers by the same file" in capsys.readouterr().out
    torch.save(dict(model=torch.ones(2)), tmp_path / "network.pt")
    torch.save(dict(mu=print), tmp_path / "code.pt")
    for name, message in (("network.pt", "neither arr_0 nor mu and sigma"), ("code.pt", "other things than arrays")):
        with pytest.raises(SystemExit) as stop:
            score(image_sets / "folder", tmp_path / name)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"{name} cannot be used" in error and message in error


def test_nothing_in_a_folder_vanishes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "load_inception", lambda *args: (Means(), fid.HASH + "0" * 56))
    monkeypatch.setattr(fid, "frechet_distance", lambda *args: 1.0)
    root, pixels = tmp_path / "photos", np.random.RandomState(4).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    (root / "@eaDir").mkdir(parents=True)
    for name in ("a.jfif", "b.ppm", "c.avif", "d.jp2", "e.tif", "@eaDir/a.png", ".f.png"):
        if Path(name).suffix in fid.EXTENSIONS:
            Image.fromarray(pixels).save(root / name)
    (root / os.fsdecode(b"caf\xe9.png")).write_bytes((root / "@eaDir/a.png").read_bytes())
    (root / "list.txt").write_text("a.jfif")
    (root / "loop").symlink_to(root)
    files = fid.open_set(root)[0].files
    assert {"a.jfif", "b.ppm", "e.tif", os.fsdecode(b"caf\xe9.png")} <= {*files} and len({*files}) == len(files) <= 6
    score(root, root, "--json", tmp_path / "out.json")
    assert "photos: left out 1 .txt" in capsys.readouterr().out
    (root / os.fsdecode(b"caf\xe9.png")).write_text("damaged")
    with pytest.raises(ValueError, match="caf.*png cannot be read"):
        fid.open_set(root)[0][files.index(os.fsdecode(b"caf\xe9.png"))]

    def walk(path, followlinks, onerror):
        onerror(PermissionError(13, "Permission denied", f"{root}/private"))

    monkeypatch.setattr(os, "walk", walk)  # who runs the tests may be allowed to read everything
    with pytest.raises(ValueError, match="photos cannot be used: .*Permission denied: .*private"):
        fid.open_set(root)


def test_images_are_turned_by_their_exif_and_bombs_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as code beside this may have it
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 12, 3)).astype(np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "x.png", exif=exif)
        with Image.open(tmp_path / "x.png") as turned:
            assert np.array_equal(fid.to_rgb(turned), ImageOps.exif_transpose(turned))
    (tmp_path / "bomb").mkdir()
    Image.new("1", (14_000, 13_000)).save(tmp_path / "bomb/a.png")
    with pytest.raises(ValueError, match="a.png cannot be read .*182000000 pixels are too many"):
        fid.open_set(tmp_path / "bomb")


def test_no_room_in_shared_memory_is_said(image_sets, monkeypatch):
    def full(images):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(fid, "default_collate", full)
    with pytest.raises(ValueError, match="no room in shared memory.*--shm-size"):  # by way of a worker
        next(iter(fid.open_set(image_sets / "folder")[0].batches(0, 2, 2)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc is told what to keep")
@pytest.mark.parametrize("module", ["fid", "plumbing.processes"])
def test_freed_memory_is_kept_for_the_next_batch(module):
    program = f"""import torch, {module} as module
def pages(): return int(open("/proc/self/statm").read().split()[1])
module.pick_device("cpu")
batch = torch.ones(2**24); before = pages(); del batch; print(before - pages())"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert int(ended.stdout) < 1000, ended.stderr  # of 16,384


def test_weights_that_are_absent_or_wrong_are_named(image_sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / "wrong.pth")
    for flags, message in (
        ([], f"put it at {tmp_path}/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"),
        (["--inception", tmp_path / "absent.pth"], "No such file"),
        (["--inception", tmp_path / "wrong.pth"], "wrong.pth does not hold"),
        (["--image-size", 0], "--image-size must be positive"),
    ):
        with pytest.raises(SystemExit) as stop:
            score(image_sets / "plain.npz", image_sets / "folder", *flags)
        assert stop.value.code == 2 and message in capsys.readouterr().err
