"""inputs/formats.py: a folder or a zip ends in images with labels, or in one sentence that names what is wrong."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from inputs.images import BrokenImage, ImageSet


def test_bad_data_is_a_named_error(photos, tmp_path):
    def refused(message, path, kind=ValueError, **settings):
        with pytest.raises(kind, match=message):
            ImageSet(path, 16, progress=False, **settings)

    refused("does not exist", tmp_path / "nowhere", FileNotFoundError)
    (tmp_path / "none").mkdir()
    refused("holds no images", tmp_path / "none")
    refused("one class only", photos / "cats")
    (tmp_path / "loop").symlink_to(photos)
    (photos / "cats/me").symlink_to(photos)
    try:
        assert len(ImageSet(tmp_path / "loop", 16, progress=False)) == 24  # each folder once
    finally:
        (photos / "cats/me").unlink()
    (tmp_path / "stray").mkdir()
    for file in ("a/x.png", "b/y.png", "z.png"):
        (tmp_path / "stray" / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "stray" / file)
    refused("z.png lies beside the class folders", tmp_path / "stray")
    (tmp_path / "x.zip").write_bytes(b"PK nonsense")
    refused("neither a folder nor a zip", tmp_path / "x.zip")
    broken = tmp_path / "broken"
    for folder in ("one", "two"):
        (broken / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(broken / folder / "good.jpg")
    (broken / "two/cut.jpg").write_bytes((broken / "two/good.jpg").read_bytes()[:400])
    (broken / "two/empty.png").write_bytes(b"")
    refused("two/cut.jpg.*1 more.*--skip-broken", broken, BrokenImage)
    data = ImageSet(broken, 16, skip_broken=True, progress=False)
    assert len(data) == 2 and len(data.broken) == 2 and "cut.jpg" in data.broken[0]


def test_each_file_of_a_bad_folder_ends_in_an_image_or_in_its_name(tmp_path):
    rgb = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 36, 3)).astype(np.uint8))
    good, bad = tmp_path / "data/good ones é", tmp_path / "data/bad"
    good.mkdir(parents=True)
    bad.mkdir()
    rgb.convert("P").save(good / "palette alpha.PNG", transparency=3)
    rgb.convert("CMYK").save(good / "cmyk.JPEG")
    Image.new("I;16", (20, 20), 40_000).save(good / "16bit.png")
    Image.new("RGB", (1, 1), "red").save(good / "dot.png")
    rgb.save(good / "animated.gif", save_all=True, append_images=[rgb.rotate(90), rgb])
    (good / "loop").symlink_to(tmp_path / "data")
    rgb.save(bad / "ok.jpg")
    (bad / "cut.jpg").write_bytes((bad / "ok.jpg").read_bytes()[:700])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("not an image")
    Image.new("1", (20_000, 20_000)).save(bad / "huge.png")  # 400 million pixels: a bomb, to PIL
    (bad / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (bad / "notes.txt").write_text("left alone")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    data = ImageSet(tmp_path / "data", 16, skip_broken=True, progress=False)
    assert len(data) == 6 and data.classes == ["bad", "good ones é"]
    images, labels, *_ = data[np.arange(6)]  # what was left out has moved no image to another's name or label
    assert labels.tolist() == [0, 1, 1, 1, 1, 1] and all(file.startswith("good") for file in data.files[1:])
    assert np.array_equal(images.permute(0, 2, 3, 1), [data.decode(file) for file in data.files])
    for name in ("cut.jpg", "empty.jpg", "text.jpg", "huge.png", "gone.png"):
        assert sum(f"bad/{name} cannot be decoded" in broken for broken in data.broken) == 1
    assert before == {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as z:
        for name in ("../../a/up.png", "/b/root.png"):
            z.write(good / "dot.png", name)
    assert len(ImageSet(tmp_path / "evil.zip", 16, progress=False)) == 2  # read in place: nothing is extracted
    assert {*before, tmp_path / "evil.zip"} == {*tmp_path.rglob("*")} and not (tmp_path.parent.parent / "a").exists()
