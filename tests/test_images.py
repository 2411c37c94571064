"""inputs/images.py: whatever people call an image becomes the upright RGB crop that the model sees."""

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fid import to_rgb
from inputs import images
from inputs.images import BrokenImage, ImageSet
from tests.common import black_and_white


def test_images_of_every_kind(tmp_path):
    rgb = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 36, 3)).astype(np.uint8))
    (tmp_path / "a").mkdir()
    (tmp_path / "b c é").mkdir()
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.new("L", rgb.size, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = Image.new("RGB", (32, 16), "black")
    turned.paste("white", (0, 0, 16, 16))
    deep = Image.fromarray((np.arange(256 * 16, dtype=np.uint16) * 16).reshape(64, 64))
    for name, image, more in (
        ("a/gray.JPG", rgb.convert("L"), {}),
        ("a/palette.png", rgb.convert("P"), {}),
        ("a/alpha.png", alpha, {}),
        ("a/cmyk.jpg", rgb.convert("CMYK"), {}),
        ("b c é/exif.jpeg", turned, dict(exif=exif)),
        ("b c é/16bit.png", deep, {}),
        ("b c é/small.bmp", rgb.resize((3, 2)), {}),
    ):
        image.save(tmp_path / name, **more)
    data = ImageSet(tmp_path, 16, progress=False)
    images, labels, *_ = data[np.arange(len(data))]
    assert images.shape == (7, 3, 16, 16) and data.classes == ["a", "b c é"] and labels.tolist() == [0] * 4 + [1] * 3
    named = dict(zip((Path(f).name for f in data.files), images))
    assert (named["alpha.png"] == 255).all()  # nothing but white shows through
    assert named["exif.jpeg"][:, :5].float().mean() > 200 > 50 > named["exif.jpeg"][:, -5:].float().mean()
    assert named["16bit.png"].float().mean() == pytest.approx(127, abs=2)
    Image.fromarray(np.full((16, 16), 200, np.uint16)).save(tmp_path / "dark.png")  # one scale for all 16-bit images
    with Image.open(tmp_path / "dark.png") as image:
        assert np.asarray(to_rgb(image)).max() == 1
    assert torch.equal(named["gray.JPG"][0], named["gray.JPG"][2])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as z:
        for file in data.files:
            z.write(tmp_path / file, f"inside/{file}")
        z.writestr("__MACOSX/a/._gray.jpg", b"resource fork")
    zipped = ImageSet(tmp_path / "all.zip", 16, progress=False)
    assert zipped.classes == data.classes and torch.equal(zipped[np.arange(7)][0], images)


def broken_set(root):
    """Two classes of which three files are broken: c/2, c/3 and d/9, the last of all."""
    for i, name in enumerate(("c/1", "c/2", "c/3", "d/1", "d/2", "d/9")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(root / f"{name}.png")
    (root / "c/2.png").write_bytes((root / "c/2.png").read_bytes()[:45])
    (root / "c/3.png").write_bytes(b"")
    (root / "d/9.png").write_text("not an image")
    return root


def test_images_of_the_same_names_and_sizes_are_others(tmp_path):
    digests = set()
    for name, turned in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = np.random.RandomState(i).randint(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(np.rot90(pixels, 2 * turned)).save(tmp_path / name / f"{i}.bmp")
        digests.add(ImageSet(tmp_path / name, 8, progress=False).digest)
        assert {file.stat().st_size for file in (tmp_path / name).iterdir()} == {246}
    assert len(digests) == 2


@pytest.mark.parametrize("at_once", [True, False])
def test_the_next_image_stands_in_for_a_broken_one(tmp_path, monkeypatch, at_once):
    root = broken_set(tmp_path / "data")
    if not at_once:  # as of large sets, whose files are opened when their turn comes
        monkeypatch.setattr(images, "IN_MEMORY", 0)
        monkeypatch.setattr(images, "CHECK_ALL", 0)
    data = ImageSet(root, 8, skip_broken=True, progress=False)
    assert len(data) == 6 and data.classes == ["c", "d"]  # a resumed run counts as many
    batch = data[np.array([0, 1, 2, 5, 3])]
    assert images.split(6)[1].tolist() == [[3]]  # held out: d/1, the next good one after c/3
    assert batch.images[:, 0, 0, 0].tolist() == [0, 4, 4, 0, 3] and batch.labels.tolist() == [0, 1, 1, 0, 1]
    assert batch.replaced == 3 and len(data.broken) == (3 if at_once else 0)
    with pytest.raises(BrokenImage, match="c/2.png cannot be decoded.*2 more.*--skip-broken" if at_once else "c/2.png"):
        ImageSet(root, 8, progress=False)[np.array([1])]
    (root / "d/1.png").write_text("not an image")
    with pytest.raises(ValueError, match="d/1.png cannot be decoded.*nor can any that may stand in for it"):
        ImageSet(root, 8, skip_broken=True, progress=False)[np.array([3])]
    for file in root.rglob("*.png"):
        file.write_text("not an image")
    monkeypatch.setattr(images, "NEIGHBOURS", 4)
    with pytest.raises(ValueError, match="none of the 6 images|c/1.png cannot be decoded.*nor can any that may stand"):
        ImageSet(root, 8, skip_broken=True, progress=False)[np.array([0])]


def test_held_out_images_stand_in_for_one_another(tmp_path):
    root = black_and_white(tmp_path / "data", 20, 8)
    assert images.split(40)[1].tolist() == [[11, 27]]
    (root / ImageSet(root, 8, progress=False).files[11]).write_text("not an image")
    data = ImageSet(root, 8, skip_broken=True, progress=False)
    assert data.instead == {11: 27} and data[[11, 12]].labels.tolist() == [1, 0]


def test_a_good_image_is_read_whatever_its_exif(tmp_path):
    # orientation 6, and a resolution of -1/0 that cannot be written back
    entries = struct.pack("<HHHII", 2, 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x011A, 10, 1, 38) + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + struct.pack("<ii", -1, 0)
    turned = Image.new("RGB", (32, 16), "black")
    turned.paste("white", (0, 0, 16, 16))
    turned.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as image:
        upright = to_rgb(image)
    assert upright.size == (16, 32) and upright.getpixel((8, 4)) > (200, 200, 200) > upright.getpixel((8, 28))
    turned.save(tmp_path / "damaged.webp", exif=b"Exif\0\0XX*\0" + bytes(20))
    with Image.open(tmp_path / "damaged.webp") as image:
        assert to_rgb(image).size == (32, 16)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned.save(tmp_path / "x.png", exif=exif)
        with Image.open(tmp_path / "x.png") as image:
            assert np.array_equal(to_rgb(image), ImageOps.exif_transpose(image))


def test_a_very_large_photograph_is_read_with_a_word(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    Image.new("1", (14_000, 13_000), 1).save(tmp_path / "a/large.png")  # 182 million pixels: an attack, to Pillow
    data = ImageSet(tmp_path, 8, progress=False)
    assert data[[0]].images.min() == 255 and "large.png has 182 million pixels" in capsys.readouterr().err
