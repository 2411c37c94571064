"""inputs/images.py: whatever people call an image becomes the upright RGB crop that the model sees."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inputs.images import ImageSet, to_rgb


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
