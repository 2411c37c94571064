"""inputs/prepared.py: latents, and labels without images, as REPA and the iREPA release keep them."""

import json
import sys

import numpy as np
import pytest
import torch

from inputs import prepared
from inputs.images import Batch, BrokenImage, ImageSet
from inputs.prepared import Files, HuggingFace, Labels, Prepared
from inputs.vae import encode, load_vae
from tests.common import RUN, refused, rows_of, run, same_weights, weights

LATENT = [*RUN, "--model", "SiT-S/2", "--sample-every", 0]
SPEC = dict(channels=4, factor=2)  # of the VAE of the tests


def write_files(folder, moments, labels):
    """As REPA's preprocessing does."""
    names = [f"{i // 10:05d}/img-mean-std-{i:08d}.npy" for i in range(len(moments))]
    for name, array in zip(names, moments):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, array)
    pairs = None if labels is None else [[name, int(label)] for name, label in zip(names, labels)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return folder


def write_hugging_face(folder, rows, column="data"):
    """As the release's folder is written."""
    datasets = pytest.importorskip("datasets", reason="the format of Hugging Face takes its package")
    datasets.Dataset.from_dict({column: rows}).save_to_disk(str(folder))
    return folder


class Named:
    """A data set of files and labels, without the images."""

    path, quick = "named", True

    def __init__(self, labels, files):
        self.labels, self.files, self.classes = np.array(labels), files, [str(i) for i in range(max(labels) + 1)]

    def __len__(self):
        return len(self.labels)


@pytest.fixture(scope="module")
def moments(photos, vae):
    """Of the photographs at 16 px: float32 [24, 8, 8, 8], in their order, and their labels."""
    data = ImageSet(photos, 16, progress=False)
    return encode(load_vae(str(vae)).vae, data[np.arange(24)].images).numpy(), data.labels


@pytest.fixture(scope="module")
def files(moments, tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("repa") / "vae-sd", *moments)


def test_training_on_latents_of_repa_and_of_the_release(photos, vae, moments, files, tmp_path, capsys):
    release = write_hugging_face(tmp_path / "release", moments[0][:, None].tolist())
    (tmp_path / "labels.txt").write_text("".join(f"{label}\n" for label in moments[1]))
    common = [*LATENT, "--vae", vae]
    run(*common, "--data", photos, "--out", tmp_path / "images", "--latent-scale", "vae")  # the VAE in every step
    of_files = ["--data", photos, "--latents", files, "--latent-scale", "vae", "--workers", 2]
    run(*common, *of_files, "--out", tmp_path / "files")
    rows = [rows_of(tmp_path / name)[-1] for name in ("images", "files")]
    for key in ("held_out", "denoise", "align"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4)
    capsys.readouterr()
    for data, latents, name in (
        (photos, files, "sit"),
        (files / "dataset.json", files, "json"),
        (tmp_path / "labels.txt", release, "text"),
    ):
        run(*common, "--method", "sit", "--data", data, "--latents", latents, "--out", tmp_path / name)
        said = capsys.readouterr().out.splitlines()
        assert said[1].startswith(f"{latents} does not say of which VAE its latents are: --vae {vae} is taken")
        assert "mean 0 and variance 1 in each channel, estimated from its 24 latents" in said[2]
    assert same_weights(weights(tmp_path / "sit"), weights(tmp_path / "json"))
    assert same_weights(weights(tmp_path / "sit"), weights(tmp_path / "text"))
    assert json.loads((tmp_path / "text/config.json").read_text())["classes"] == ["0", "1"]
    spec = torch.load(tmp_path / "text/last.pt", weights_only=True)["latent"]
    np.testing.assert_allclose(spec["bias"], moments[0][:, :4].mean((0, 2, 3)), rtol=1e-5)
    run("--resume", "--out", tmp_path / "text", "--steps", 5)


def test_a_row_is_read_as_it_was_written(moments, files, tmp_path):
    labels = Named(moments[1].tolist(), [f"{i}.png" for i in range(24)])
    released = moments[0][:, None]
    folders = [write_hugging_face(tmp_path / "double", released.tolist())]  # lists make float64
    folders.append(write_hugging_face(tmp_path / "bare", list(moments[0])))  # no leading dimension
    for rows in (Files(files), *map(HuggingFace, folders)):
        data = Prepared(labels, rows, SPEC, 16, images=False)
        batch = data[np.array([23, 0, 7])]
        assert isinstance(batch, Batch) and batch.images is None and batch.labels.tolist() == [1, 0, 0]
        assert torch.equal(batch.moments, torch.from_numpy(moments[0][[23, 0, 7]]))


def test_mean_and_std_are_estimated_from_some_of_many(moments, files, monkeypatch):
    data = Prepared(Labels(files / "dataset.json"), Files(files), SPEC, 16)
    monkeypatch.setattr(prepared, "ENOUGH", 4)
    some = moments[0][[0, 8, 15, 23]].astype(np.float64)
    mean, std, how = data.statistics()
    assert how == "estimated from 4 of its 24 latents"
    np.testing.assert_allclose(mean, some[:, :4].mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std**2, (some[:, 4:] ** 2).mean((0, 2, 3)) + some[:, :4].var((0, 2, 3)), rtol=1e-6)


def test_latents_that_do_not_fit_are_refused(moments, files, tmp_path):
    found, labels = moments
    numbers = [f"00000/img{i:08d}.png" for i in range(24)]

    def message(rows, data=Named(labels.tolist(), numbers), size=16):
        with pytest.raises(ValueError) as error:
            Prepared(data, rows, SPEC, size)
        return str(error.value)

    few = write_files(tmp_path / "few", found[:23], labels[:23])
    assert "holds 23 latents, and named 24 images or labels" in message(Files(few))
    flipped = Named((1 - labels).tolist(), numbers)
    assert "the label of 00000/img-mean-std-00000000.npy is 0, and that of 00000/img00000000.png" in message(
        Files(files), flipped
    )
    gap = Named(labels.tolist(), [*numbers[:5], *(f"00000/img{i + 1:08d}.png" for i in range(5, 24))])
    error = message(Files(files), gap)  # another is missing on either side, so that the counts are equal
    assert "00000/img-mean-std-00000005.npy stands in the place of 00000/img00000006.png in named" in error
    unlabelled = Files(write_files(tmp_path / "unlabelled", found, None))
    assert "stands in the place of" in message(unlabelled, gap)
    assert "holds float32 [8, 8, 8] for each image; the VAE and --image-size make floats [8, 16, 16]" in message(
        Files(files), size=32
    )
    whole = write_files(tmp_path / "whole", (found * 10).astype(np.int64), labels)
    assert "holds int64 [8, 8, 8] for each image" in message(Files(whole))
    logarithm = np.concatenate([found[:, :4], 2 * np.log(found[:, 4:])], axis=1)
    assert "it may be the logarithm of a variance" in message(Files(write_files(tmp_path / "log", logarithm, None)))
    (few / "00000/img-mean-std-00000003.npy").unlink()
    with pytest.raises(ValueError, match="differ, in 1, such as 00000/img-mean-std-00000003.npy"):
        Files(few)
    rows = Files(files)
    names = [files / rows.names[i] for i in (3, 4)]
    before = [name.read_bytes() for name in names]
    names[0].write_bytes(before[0][:-1])
    names[1].unlink()
    for i, why in ((3, "is damaged, or of another shape"), (4, "cannot be read")):
        with pytest.raises(BrokenImage, match=f"img-mean-std-0000000{i}.npy {why}"):
            rows.read([0, i])
    for name, content in zip(names, before):
        name.write_bytes(content)


def test_what_is_no_folder_of_latents(photos, vae, moments, files, tmp_path, monkeypatch, capsys):
    (tmp_path / "labels.txt").write_text("0\n1\n" * 12)
    (tmp_path / "odd.txt").write_text("0\n1\ncat\n")
    (tmp_path / "images.json").write_text('{"labels": [["00000/img00000000.png", 3]]}')
    (tmp_path / "wide.txt").write_text("1440764\n")
    images = write_hugging_face(tmp_path / "images", [[[1.0]]] * 24, column="image")
    release = write_hugging_face(tmp_path / "release", moments[0].tolist())
    sit = ["--method", "sit"]
    for data, latents, message in (
        (photos, "nowhere", "--latents nowhere: there is no such folder"),
        (photos, photos, "holds neither manifest.json, as a cache of inputs.latents, nor dataset.json"),
        (photos, files.parent, f"did you mean {files}?"),
        (photos, images, "has the columns image, and no data"),
        (tmp_path / "odd.txt", files, "in each line: line 3 is 'cat'"),
        (tmp_path / "images.json", files, "names no .npy files with labels; for images, name their folder"),
        (tmp_path / "wide.txt", files, "whole numbers from 0 to 99,999, and one is 1440764"),
        (tmp_path / "labels.txt", files, "img-mean-std-00000001.npy is 0, and that of line 2 in its place in"),
    ):
        flags = [*LATENT, "--vae", vae, *sit, "--data", data, "--latents", latents, "--out", tmp_path / "x"]
        assert message in refused(capsys, run, *flags)
    labels = [*LATENT, "--vae", vae, "--data", tmp_path / "labels.txt", "--out", tmp_path / "x"]
    assert "holds labels alone, which go with --latents" in refused(capsys, run, *labels, *sit)
    assert "the teacher looks at images: --method sit has none" in refused(capsys, run, *labels, "--latents", release)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(capsys, run, *labels, *sit, "--latents", release)
    assert not (tmp_path / "x").exists()
