"""inputs/formats.py: what people have ends in images with the right labels, or in a sentence saying what is wrong."""

import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from inputs.formats import EXTENSIONS, listing
from inputs.images import ImageSet


def make(root, names, **more):
    """Images, one for each name, of a colour of its own."""
    for i, name in enumerate(names):
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new("RGB", (8, 8), (i * 7 % 256, i, 255 - i)).save(path, **more)
    return root


def pack(path, names, name_of=lambda name: name):
    """A zip of images under other names."""
    with zipfile.ZipFile(path, "w") as z:
        for i, name in enumerate(names):
            with z.open(name_of(name), "w") as file:
                Image.new("RGB", (8, 8), (i * 7 % 256, i, 255 - i)).save(file, "PNG")
    return path


def refused(message, path, kind=ValueError):
    with pytest.raises(kind, match=message):
        listing(path)


# ---- Class folders ----

LAYOUTS = {
    "torchvision": (["n01/a.png", "n02/b.png"], ["n01", "n02"]),
    "Kaggle's train alone": ([f"ILSVRC/Data/CLS-LOC/train/{n}/a.png" for n in ("n01", "n02")], ["n01", "n02"]),
    "Tiny-ImageNet": (["n01/images/a.png", "n02/images/b.png"], ["n01", "n02"]),
    "Places365": (
        [f"{n}/x.png" for n in ("a/airfield", "a/apartment_building/outdoor", "b/bakery/shop", "c/church/indoor")]
        + ["c/church/outdoor/x.png", "h/hotel/outdoor/x.png"],
        ["a/airfield", "a/apartment_building/outdoor", "b/bakery/shop", "c/church/indoor", "c/church/outdoor"]
        + ["h/hotel/outdoor"],
    ),
    "a class called train": (["bus/a.png", "plane/b.png", "train/c.png"], ["bus", "plane", "train"]),
    "a class within another": (["cats/a.png", "cats/big/b.png", "dogs/c.png"], ["cats", "cats/big", "dogs"]),
    "one class": (["cats/a.png", "cats/b.png"], ["cats"]),
    "none": (["a.png", "b.png"], ["images"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_class_is_the_path_of_the_folder(tmp_path, layout):
    names, classes = LAYOUTS[layout]
    found = listing(make(tmp_path / "data", names))
    zipped = listing(pack(tmp_path / "x.zip", names))
    windows = listing(pack(tmp_path / "w.zip", names, lambda name: name.replace("/", "\\")))
    inside = listing(pack(tmp_path / "i.zip", names, lambda name: f"inside/{name}")) if layout != "none" else found
    for each in (found, zipped, windows, inside):
        assert each.classes == classes and not each.notes
        assert each.labels.tolist() == found.labels.tolist() and len(set(each.labels)) == len(classes)
    assert found.files == sorted(names)


@pytest.mark.parametrize(
    "names,meant",
    [
        (["train/n01/a.png", "train/n02/b.png", "test/n01/c.png", "test/n02/d.png"], "data/train"),
        (["ILSVRC/Data/train/n01/a.png", "ILSVRC/Data/val/b.png", "ILSVRC/Data/test/c.png"], "data/ILSVRC/Data/train"),
        (["train/n01/images/a.png", "val/images/b.png", "test/images/c.png"], "data/train"),
        (["Training/n01/a.png", "Validation/n01/b.png"], "data/Training"),
        (["train2017/a.png", "val2017/b.png"], "data/train2017"),
        (["images_train/n01/a.png", "images_val/n01/b.png"], "data/images_train"),
        (["trainset/a.png", "testset/b.png"], "data/trainset"),
    ],
)
def test_parts_of_a_set_are_no_classes(tmp_path, names, meant):
    refused(f"parts of a set, and no classes.*--data .*{meant}$", make(tmp_path / "data", names))
    assert len(listing(tmp_path / meant).files) >= 1


def test_images_of_imagenets_validation_are_told_where_their_labels_are(tmp_path):
    found = listing(make(tmp_path / "val", ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]))
    assert found.classes == ["images"] and "LOC_val_solution.csv" in found.notes[0]
    assert "LOC_val_solution.csv" in listing(tmp_path).notes[0]


def test_numbers_as_names_are_said_to_count_by_their_letters(tmp_path):
    found = listing(make(tmp_path / "many", [f"{i}/a.png" for i in range(12)]))
    assert found.classes[:3] == ["0", "1", "10"] and "counted in the order 0, 1, 10, 11, 2, ..." in found.notes[0]
    assert not listing(make(tmp_path / "few", [f"{i}/a.png" for i in range(10)])).notes


def test_nothing_vanishes(tmp_path, monkeypatch, photos):
    assert {".jfif", ".pgm", ".avif", ".jp2", ".jpg", ".png", ".webp"} <= EXTENSIONS
    assert not {".h5", ".mpg", ".txt", ".pdf"} & EXTENSIONS  # which Pillow knows, and cannot decode
    root = make(tmp_path / "data", ["b/1.png", "b/@eaDir/thumb.jpg", "d/2.jfif", "d/.thumbs/3.png"])
    Image.new("L", (8, 8)).save(root / "d/gray.pgm")
    for name in ("a", "c/deeper"):
        (root / name).mkdir(parents=True)
    for name in ("b/notes.txt", "c/more.txt", "README", "d/features.h5", ".DS_Store"):
        (root / name).write_text("x")
    found = listing(root)
    assert found.classes == ["b", "d"] and found.files == ["b/1.png", "d/2.jfif", "d/gray.pgm"]
    assert found.notes[0] == "left out: 3 hidden or the system's own, 2 .txt, 1 without extension, 1 .h5"
    assert found.notes[1] == "folders without images, which are no classes: a, c"
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        for folder, _, files in os.walk(root):
            z.mkdir(os.path.relpath(folder, root)) if folder != str(root) else None
            for name in files:
                z.write(os.path.join(folder, name), os.path.relpath(os.path.join(folder, name), root))
    zipped = listing(tmp_path / "z.zip")
    assert zipped.files == found.files and zipped.notes[1] == found.notes[1]
    said = f"{root}: a folder of class folders, 3 images in 2 classes; left out: 3 hidden"
    assert str(ImageSet(root, 8, progress=False)).startswith(said)

    def scandir(path, real=os.scandir):
        if str(path).endswith("cats"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused("the folder .*cats cannot be read", photos)


def test_bad_data_is_a_named_error(photos, tmp_path):
    refused("does not exist", tmp_path / "nowhere", FileNotFoundError)
    (tmp_path / "none").mkdir()
    refused("holds no images", tmp_path / "none")
    (tmp_path / "none/x.mp4").write_text("x")
    refused("holds no images.*1 .mp4", tmp_path / "none")
    (tmp_path / "loop").symlink_to(photos)
    (photos / "cats/me").symlink_to(photos)
    try:
        for path in (tmp_path / "loop", f"{photos}/", f"{photos}/cats/.."):
            assert len(listing(path).files) == 24  # each folder once
    finally:
        (photos / "cats/me").unlink()
    (tmp_path / "links").mkdir()
    for name in ("a", "b"):  # two names of one folder are no circle: none of them vanishes
        (tmp_path / "links" / name).symlink_to(photos / "cats")
    assert listing(tmp_path / "links").classes == ["a", "b"] and len(listing(tmp_path / "links").files) == 24
    refused("z.png lies beside the class folders", make(tmp_path / "stray", ["a/x.png", "b/y.png", "z.png"]))
    (tmp_path / "x.zip").write_bytes(b"PK nonsense")
    refused("neither a folder nor a zip", tmp_path / "x.zip")


def test_a_zip_that_python_cannot_read_is_said_once(tmp_path):
    pack(tmp_path / "plain.zip", ["a/1.png", "b/2.png"])
    plain = (tmp_path / "plain.zip").read_bytes()
    for place, value, message in ((8, 1, "encrypted"), (10, 9, "deflate64|compression")):
        data = bytearray(plain)
        start = -1
        while (start := data.find(b"PK\x01\x02", start + 1)) >= 0:
            data[start + place] = value
        (tmp_path / "odd.zip").write_bytes(data)
        refused(f"a zip that Python cannot read .*{message}.*unpack it", tmp_path / "odd.zip")


def test_names_that_are_not_utf_8(tmp_path, capsys):
    root = os.fsencode(tmp_path / "data")
    for i, name in enumerate((b"caf\xe9/\xe9.png", b"the/a.png", b"the/ok.png")):
        os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
        with open(os.path.join(root, name), "wb") as file:
            Image.new("RGB", (8, 8), (i, i, i)).save(file, "PNG")
    data = ImageSet(os.fsdecode(root), 8, progress=False)
    assert data.classes == ["caf\\xe9", "the"] and data[[0, 1]].images[:, 0, 0, 0].tolist() == [0, 1]
    with open(os.path.join(root, b"the/\xff.png"), "wb") as file:
        file.write(b"broken")
    data = ImageSet(os.fsdecode(root), 8, skip_broken=True, progress=False)
    print(data, data.broken)
    assert "\\xff.png cannot be decoded" in capsys.readouterr().out


# ---- dataset.json ----

BUCKETS = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png"]


@pytest.mark.parametrize("inside", ["", "images/"])
def test_the_labels_of_dataset_json_not_its_folders(tmp_path, inside):
    names = [inside + name for name in BUCKETS]
    root = make(tmp_path / "data", names)
    text = json.dumps({"labels": [["00000\\img00000001.png", 0], [BUCKETS[0], 3], [BUCKETS[2], 3]]})
    (root / f"{inside}dataset.json").write_text(text)
    zipped = pack(tmp_path / "x.zip", names)
    with zipfile.ZipFile(zipped, "a") as z:
        z.writestr(f"{inside}dataset.json", text)
    (root / "vae-sd").mkdir()  # REPA's, beside its images
    (root / "vae-sd/dataset.json").write_text("{}")
    (root / "vae-sd/img-mean-std-00000000.npy").write_text("x")
    for path in (root, zipped):
        found = listing(path)
        assert found.labels.tolist() == [3, 0, 3] and found.classes == ["0", "1", "2", "3"]
        assert "with dataset.json" in found.kind and "2 classes without images, such as 1" in found.notes
    (root / f"{inside}dataset.json").write_text('{"labels": null}')
    assert listing(root).classes == ["images"] and "its labels are null" in listing(root).notes
    for bad, message in (
        ('{"labels": [["a.png", 1]]}', r"no label of 00000/img00000000.png \(3 such images\)"),
        (
            json.dumps({"labels": [[name, "cat"] for name in BUCKETS]}),
            "and one is 'cat'",
        ),
        (json.dumps({"labels": [[name, [0, 1]] for name in BUCKETS]}), "whole numbers from 0 to 99,999"),
        (json.dumps({"labels": [[name, -1] for name in BUCKETS]}), "whole numbers from 0 to 99,999, and one is -1"),
        ('{"labels": 3}', "dataset.json cannot be read"),
        ("[", "dataset.json cannot be read"),
    ):
        (root / f"{inside}dataset.json").write_text(bad)
        refused(message, root)
    make(root, ["other/x.png"])
    if inside:
        refused("images/dataset.json has labels, and not of other/x.png", root)


# ---- Hugging Face ----


def hub(count=6, **columns):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    images = [Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)) for i in range(count)]
    features = dict(img=datasets.Image(), fine_label=datasets.ClassLabel(names=["ant", "bee", "cat"]))
    features = {name: features.get(name, datasets.Value("string")) for name in ("img", *columns)}
    return datasets.Dataset.from_dict(dict(img=images, **columns), features=datasets.Features(features))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """datasets keeps its copies of parquet files here."""
    try:
        import datasets
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def test_a_hugging_face_folder_and_parquet_files(tmp_path):
    rows = hub(fine_label=[0, 2, 2, 0, 2, 0])
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "data").mkdir()
    rows.select(range(4)).to_parquet(tmp_path / "data/train-00000-of-00002.parquet")
    rows.select(range(4, 6)).to_parquet(tmp_path / "data/train-00001-of-00002.parquet")
    rows.to_parquet(tmp_path / "all.parquet")
    for path in ("saved", "data", "all.parquet", "data/train-*.parquet"):
        data = ImageSet(tmp_path / path, 8, progress=False)
        assert data.classes == ["ant", "bee", "cat"] and data.labels.tolist() == [0, 2, 2, 0, 2, 0]
        assert data[range(6)].images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert "1 classes without images, such as bee" in str(data) and all(size > 50 for size in data.source.sizes())
        assert ("datasets keeps a copy of" in str(data)) == ("parquet" in str(data).split(";")[0])
    rows.to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    refused(r"parts of a set, test, train: name one, such as --data '.*/data/train-\*.parquet'", tmp_path / "data")
    assert len(listing(tmp_path / "data/train-*.parquet").files) == 6


def test_labels_of_hugging_face_rows(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    hub(3, label=["dog", "cat", "dog"]).save_to_disk(tmp_path / "words")
    words = listing(tmp_path / "words")
    assert words.classes == ["cat", "dog"] and words.labels.tolist() == [1, 0, 1]
    rows = hub(3)
    rows.save_to_disk(tmp_path / "none")
    assert listing(tmp_path / "none").classes == ["images"] and "no column label" in listing(tmp_path / "none").notes[0]
    rows.add_column("label", [1, 4, 1]).save_to_disk(tmp_path / "numbers")
    assert listing(tmp_path / "numbers").classes == ["0", "1", "2", "3", "4"]
    both = rows.add_column("fine_label", [0, 1, 1]).add_column("coarse_label", [5, 5, 5])
    both.save_to_disk(tmp_path / "both")
    assert "labels of fine_label, not of coarse_label" in listing(tmp_path / "both").notes
    rows.add_column("label", [-1, -1, -1]).save_to_disk(tmp_path / "hidden")
    refused("whole numbers from 0 to 99,999, and one is -1, which stands for an image without", tmp_path / "hidden")
    rows.rename_column("img", "picture").save_to_disk(tmp_path / "picture")
    refused(r"no column image or img \(there are picture\)", tmp_path / "picture")
    datasets.Dataset.from_dict(dict(image=[1, 2, 3])).save_to_disk(tmp_path / "odd")
    refused("its column image holds no images", tmp_path / "odd")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "dict")
    refused("holds test, train: name one of them, such as --data .*/dict/train", tmp_path / "dict")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "one")
    refused("holds train: name it: --data .*/one/train", tmp_path / "one")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    refused("bad.parquet cannot be read as parquet", tmp_path / "bad.parquet")


# ---- Reading in place ----


def test_nothing_is_written_beside_the_data(tmp_path):
    make(tmp_path / "data", ["a/dot.png"])
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as z:
        for name in ("../../a/up.png", "/b/root.png"):
            z.write(tmp_path / "data/a/dot.png", name)
    before = {*tmp_path.rglob("*")}
    assert len(ImageSet(tmp_path / "evil.zip", 16, progress=False)) == 2
    assert before == {*tmp_path.rglob("*")} and not (tmp_path.parent.parent / "a").exists()
    assert np.array_equal(*[ImageSet(tmp_path / "evil.zip", 16, progress=False)[[i]].images for i in (0, 1)])
