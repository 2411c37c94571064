"""One image: what counts as one, and from a file's bytes to the square crop that the model sees."""

from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}


class BrokenImage(ValueError):
    """An image that cannot be decoded; the message names the file."""


def is_image(file):
    path = PurePosixPath(file)
    hidden = any(part.startswith((".", "__MACOSX")) and part not in (".", "..") for part in path.parts)
    return path.suffix.lower() in EXTENSIONS and not hidden


def to_rgb(image):
    """Any PIL image -> upright RGB; transparent parts become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits a pixel: PIL would clip, not scale
        array = np.asarray(image, np.float64)
        if image.mode == "F" or array.min() < 0 or array.max() > 65535:
            raise ValueError(f"its mode {image.mode} has no fixed range; convert it to 8 or 16 bits")
        image = Image.fromarray((array / 257).round().astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """The square crop of ADM: halve with a box filter while twice too large, then bicubic, then cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        wanted = (round(image.width * scale), round(image.height * scale))
        image = image.resize(wanted, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
