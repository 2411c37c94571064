"""Images for training: a folder of class folders, a zip of one, or drawn shapes that need no data.

A data set here has .classes (names), len(), and data[indices] -> (uint8 [B, 3, S, S], int64 [B]).
"""

import colorsys
import functools
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
IN_MEMORY = 2**30  # bytes of decoded images up to which a data set is decoded once and kept
CHECK_ALL = 100_000  # above this many images, they are only all opened beforehand with skip_broken


class BrokenImage(ValueError):
    """An image that cannot be decoded; the message names the file."""


def line(error):
    """An error's text on one line, for a person."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) and isinstance(error.args[0], str):
        return f"{text} is missing"
    return text or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------
# Files


class Folder:
    """The images under `path`: the class of an image is the name of the folder that holds it, at any depth.

    path is a folder or a .zip; size is the side of the square crops. Small sets are decoded once, into memory.
    skip_broken leaves out, and lists in .broken, what cannot be decoded; otherwise that raises BrokenImage.
    ValueError or FileNotFoundError, with what to do, where there is nothing to train on.
    """

    def __init__(self, path, size, skip_broken=False, progress=True):
        self.path, self.size, self.zips = str(path), size, {}
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist; --data takes a folder of class folders, or a .zip of one")
        if os.path.isfile(path):
            if not zipfile.is_zipfile(path):
                raise ValueError(f"{path} is neither a folder nor a zip file, or the zip is damaged")
            try:
                files = [i.filename for i in self.zip().infolist() if not i.is_dir()]
            except Exception as e:  # the reader of a damaged zip raises anything
                raise ValueError(f"{path} is a zip that is damaged, or of a kind that cannot be read ({e})") from e
        else:
            walk = ((os.path.relpath(d, path), names) for d, names in folders_of(path))
            files = [Path(folder, name).as_posix() for folder, names in walk for name in names]
        files = sorted(f for f in files if is_image(f))
        if not files:
            raise ValueError(f"{path} holds no images ({' '.join(sorted(EXTENSIONS))}), at any depth")
        self.images, self.broken = None, []
        in_memory = len(files) * 3 * size**2 <= IN_MEMORY
        if in_memory:
            self.images = np.empty((len(files), size, size, 3), np.uint8)
        if in_memory or skip_broken or len(files) <= CHECK_ALL:
            files = self.decode_all(files, skip_broken, progress)
        folders = [PurePosixPath(f).parent.name for f in files]
        if "" in folders and any(folders):
            stray = files[folders.index("")]
            raise ValueError(f"{path}: {stray} lies beside the class folders, in none of them; move or remove it")
        self.classes = sorted(set(folders))
        if len(self.classes) < 2:
            raise ValueError(
                f"{path} holds one class only ({self.classes[0] or 'no folder'}): put the images of each class"
                " into a folder of their own"
            )
        number = {name: i for i, name in enumerate(self.classes)}
        self.files, self.labels = files, np.array([number[name] for name in folders])

    def decode_all(self, files, skip_broken, progress):
        """Decode every file once: broken ones show up now. -> the good files; their pixels in self.images if kept."""

        def work(i):
            try:
                image = self.decode(files[i])
            except BrokenImage as error:
                return error
            if self.images is not None:
                self.images[i] = image

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes outside the GIL
            results = pool.map(work, range(len(files)))
            errors = list(tqdm(results, "decoding", len(files), unit="img", leave=False, disable=not progress))
        self.broken = [str(error) for error in errors if error]
        if self.broken and not skip_broken:
            more = f" (and {len(self.broken) - 1} more files)" if len(self.broken) > 1 else ""
            raise BrokenImage(f"{self.broken[0]}{more}; repair or remove it, or leave such files out: --skip-broken")
        if self.broken:
            good = [i for i, error in enumerate(errors) if not error]
            if not good:
                raise ValueError(f"{self.path}: none of the {len(files)} images can be decoded: {self.broken[0]}")
            files = [files[i] for i in good]
            self.images = self.images[good] if self.images is not None else None
        return files

    def zip(self):
        key = os.getpid()  # an open file position cannot be shared between processes
        if key not in self.zips:
            self.zips = {key: zipfile.ZipFile(self.path)}
        return self.zips[key]

    def __getstate__(self):
        return {**self.__dict__, "zips": {}}

    def bytes_of(self, file):
        """The size of a file, as stored."""
        if os.path.isfile(self.path):
            return self.zip().getinfo(file).file_size
        return os.path.getsize(os.path.join(self.path, file))

    def decode(self, file):
        """-> uint8 [size, size, 3]. BrokenImage, with the name, if it cannot be read."""
        where = f"{self.path}:{file}" if os.path.isfile(self.path) else os.path.join(self.path, file)
        try:
            if os.path.isfile(self.path):
                with self.zip().open(file) as stream:
                    return np.asarray(center_crop(to_rgb(Image.open(stream)), self.size))
            with Image.open(where) as image:
                return np.asarray(center_crop(to_rgb(image), self.size))
        except Exception as e:  # whatever PIL or zipfile raises, on purpose: the formats' readers raise anything
            raise BrokenImage(f"{where} cannot be decoded ({type(e).__name__}: {e})") from e

    def __len__(self):
        return len(self.files)

    def __getitem__(self, indices):
        if self.images is not None:
            images = self.images[indices]
        else:
            images = np.stack([self.decode(self.files[i]) for i in indices])
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])


def folders_of(path):
    """(folder, names of its files) for each folder under `path`, links followed, each real folder once."""
    seen = set()
    for folder, below, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:
            below.clear()
            continue
        seen.add(os.path.realpath(folder))
        yield folder, names


def workers_for(data):
    """Decoding processes for a data set: none where its images are in memory."""
    if getattr(data, "images", True) is not None:
        return 0
    return min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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


# ---------------------------------------------------------------------------------------------------------------
# Drawn shapes


class Shapes:
    """Coloured shapes on coloured ground: image i is drawn from (seed, i), its class is i modulo 10."""

    classes = ["circle", "square", "triangle", "star", "heart", "ring", "cross", "crescent", "arrow", "bar"]

    def __init__(self, size, count, seed=0):
        self.size, self.seed, self.labels = size, seed, np.arange(count) % len(self.classes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, indices):
        images = np.stack([draw_shape(int(i) % len(self.classes), self.size, (self.seed, int(i))) for i in indices])
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])


@functools.cache
def draw_shape(label, size, seed):
    """uint8 [size, size, 3]: one shape with random colours, place, size and rotation, its edge a pixel wide."""
    rng = np.random.default_rng(seed)
    radius = rng.uniform(0.7, 0.95)  # of half the image
    centre = rng.uniform(-1, 1, 2) * (1 - radius)
    turn = rng.uniform(-0.25, 0.25)
    paint = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 1), rng.uniform(0.85, 1))  # bright
    ground = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 1), rng.uniform(0, 0.35))  # on dark
    ground, paint = np.array(ground), np.array(paint)
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    distance = signed_distance(Shapes.classes[label], x / radius, y / radius) * radius
    inside = np.clip(0.5 - distance * size / 2, 0, 1)[..., None]
    return ((ground + (paint - ground) * inside) * 255).round().astype(np.uint8)


def signed_distance(shape, x, y):
    """Distance to the edge of a shape within the unit circle, negative inside (arrays like x)."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.9
    if shape == "ring":
        return np.abs(r - 0.72) - 0.2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.7
    if shape == "bar":
        return np.maximum(np.abs(x) - 1, np.abs(y) - 0.25)
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - 0.95, short - 0.33)
    if shape == "crescent":
        return np.maximum(r - 0.95, 0.75 - np.hypot(x - 0.5, y))
    if shape == "star":
        turns = np.arange(10) * np.pi / 5
        points = np.where(np.arange(10) % 2, 0.5, 1.05)
        return polygon(x, y, points * np.sin(turns), -points * np.cos(turns))
    if shape == "triangle":
        turns = np.arange(3) * 2 * np.pi / 3
        return polygon(x, y, np.sin(turns), -np.cos(turns))
    if shape == "arrow":
        head = polygon(x, y, np.array([0.0, 0.75, -0.75]), np.array([-1.0, -0.05, -0.05]))
        return np.minimum(head, np.maximum(np.abs(x) - 0.25, np.abs(y - 0.45) - 0.55))
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)  # heart
    hx = 16 * np.sin(t) ** 3
    hy = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return polygon(x, y, hx / 16.5, -hy / 16.5)


def polygon(x, y, px, py):
    """Signed distance to a closed polygon with corners (px, py)."""
    qx, qy = np.roll(px, -1), np.roll(py, -1)
    ex, ey = qx - px, qy - py
    wx, wy = x[..., None] - px, y[..., None] - py
    along = np.clip((wx * ex + wy * ey) / (ex**2 + ey**2), 0, 1)
    distance = np.hypot(wx - along * ex, wy - along * ey).min(-1)
    crosses = ((py > y[..., None]) != (qy > y[..., None])) & (ex * wy / np.where(ey == 0, 1, ey) > wx)
    return np.where(crosses.sum(-1) % 2, -distance, distance)
