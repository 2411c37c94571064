"""A set of images with labels, each as the square crop that the model sees: fid.py's, so that references have the same.

A data set here has .classes (names), .labels, len(), data[indices] -> Batch, and .quick: whether that is a mere copy.
"""

import functools
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fid import PIXELS, center_crop, to_rgb
from inputs.formats import listing
from plumbing.files import shown

DATA = "data/imagenet/train"  # where no --data is given
IN_MEMORY = 2**30  # bytes of decoded images up to which a data set is decoded once and kept
CHECK_ALL = 100_000  # above this many images, they are not all opened beforehand
LOOK = 64  # images or latents, from all over a set, that are looked at in the place of all
NEIGHBOURS = 100  # how many are tried in the place of a broken one
Image.MAX_IMAGE_PIXELS = None  # Pillow takes a file of so many for an attack; these are the user's own


@dataclass
class Source:
    """Which images: the knobs of each program that reads some."""

    # data
    data: str | None = None  # folder, .zip, parquet or Hugging Face; default: data/imagenet/train
    image_size: int = 256  # side in pixels; images are centre-cropped to it as in ADM
    skip_broken: bool = False  # let the next image stand in for one that cannot be decoded
    # run
    device: str = "auto"  # auto, cpu, cuda, mps


class BrokenImage(ValueError):
    """An image that cannot be decoded; the message names the file."""


class Batch(NamedTuple):
    """What a data set gives for some of its images."""

    images: torch.Tensor | None  # uint8 [B, 3, S, S]
    labels: torch.Tensor  # int64 [B]
    moments: torch.Tensor | None = None  # of a VAE's posterior, [B, 2C, h, w], from a cache
    tokens: torch.Tensor | None = None  # of a teacher, [B, T, D], from a cache
    numbers: torch.Tensor | None = None  # of the images in the set, int64 [B]: of one that stands in, its own
    replaced: int = 0  # images that cannot be decoded, with another in their place


# ---- A set ----


def split(count, most=256):
    """(training indices, held-out indices in chunks of equal size): a twentieth, at most 256; the same for any seed."""
    order = np.random.default_rng(0).permutation(count)
    held = min(most, max(1, count // 20))
    size = min(32, held)
    chunks = order[: held // size * size].reshape(-1, size)
    return np.sort(order[chunks.size :]), chunks


def spread(count, most):
    """Numbers below `count`, evenly spaced, `most` of them or all."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


class ImageSet:
    """The images that inputs.formats.listing finds at `path`, as square crops of side `size`.

    Sets of up to IN_MEMORY bytes are decoded once. An image that cannot be decoded raises BrokenImage, of up to
    CHECK_ALL images (or with check_all) at once; with skip_broken the next one that can be stands in for it, with its
    label: of those that train, for one that trains, and else a held-out one. needed: whether any is to be decoded;
    later: not before decode_all() is called. ValueError or FileNotFoundError, with what to do, where there is nothing
    to train on.
    """

    def __init__(self, path, size, skip_broken=False, progress=True, check_all=False, needed=True, later=False):
        self.path, self.size, self.skip_broken = str(path), size, skip_broken
        self.kind, self.files, self.labels, self.classes, self.source, self.notes = listing(path)
        self.images, self.instead, self.broken = None, {}, []  # instead: broken image -> the one that stands in
        self.quick = needed and len(self) * 3 * size**2 <= IN_MEMORY
        self.unseen = self.quick or check_all or (needed and len(self) <= CHECK_ALL)  # all are yet to be decoded
        if not later:
            self.decode_all(progress)

    def __str__(self):
        """What it was taken for, and what is left out: a line for the start of a run."""
        many = f"{len(self)} images in {len(self.classes)} class{'es' if len(self.classes) > 1 else ''}"
        broken = [f"{len(self.broken)} cannot be decoded, another stands in for each"] if self.broken else []
        return "; ".join([f"{shown(self.path)}: {self.kind}, {many}", *self.notes, *broken])

    def decode_all(self, progress=True):
        """Decode every file once, where that comes before the first batch: broken ones show up now. Their pixels go
        into self.images where these are kept."""
        if not self.unseen:
            return
        if self.quick:
            self.images = np.empty((len(self), self.size, self.size, 3), np.uint8)

        def work(i):
            try:
                image = self.decode(i)
            except BrokenImage as error:
                return error
            if self.images is not None:
                self.images[i] = image

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes outside the GIL
            results = pool.map(work, range(len(self)))
            errors = list(tqdm(results, "decoding", len(self), unit="img", leave=False, disable=not progress))
        good = {i for i, error in enumerate(errors) if not error}
        self.broken = [str(error) for error in errors if error]
        if self.broken and not self.skip_broken:
            more = f" (and {len(self.broken) - 1} more)" if len(self.broken) > 1 else ""
            raise BrokenImage(f"{self.broken[0]}{more}; repair or remove it, or let another stand in: --skip-broken")
        if not good:
            raise ValueError(f"{self.path}: none of the {len(self)} images can be decoded: {self.broken[0]}")
        for i in range(len(self)):
            if errors[i]:
                j = next((j for j in self.stand_ins(i) if j in good), None)
                if j is None:
                    raise ValueError(f"{errors[i]}, nor can any that may stand in for it; repair or remove it")
                self.instead[i], self.labels[i] = j, self.labels[j]
                if self.images is not None:
                    self.images[i] = self.images[j]
        self.unseen = False

    @functools.cached_property
    def digest(self):
        """Of the names of the files, their sizes in bytes, and what LOOK of them hold: those of other images may all
        have the same names and, where nothing is compressed, the same sizes."""
        digest, line = hashlib.sha256(), ""
        for file, size in zip(self.files, self.source.sizes()):  # not all lines at once: they may be a million
            digest.update(f"{line}{file} {size}".encode("utf-8", "surrogateescape"))
            line = "\n"
        for i in spread(len(self), LOOK).tolist():
            digest.update(self.bytes_of(i))
        return digest.hexdigest()

    def bytes_of(self, i):
        """The file of image i; nothing of one that cannot be read, which --skip-broken lets pass."""
        try:
            with self.source.open(i) as file:
                return file.read()
        except Exception:  # the readers of damaged zips raise anything
            return b""

    def decode(self, i):
        """Image i -> uint8 [size, size, 3]. BrokenImage, with its name, if it cannot be read."""
        where = shown(self.source.where(i))
        try:
            with self.source.open(i) as file, Image.open(file) as image:
                if image.width * image.height > PIXELS:
                    tqdm.write(f"{where} has {image.width * image.height / 1e6:.0f} million pixels", file=sys.stderr)
                return np.asarray(center_crop(to_rgb(image), self.size))
        except Exception as e:  # whatever PIL or zipfile raises, on purpose: the formats' readers raise anything
            raise BrokenImage(f"{where} cannot be decoded ({type(e).__name__}: {e})") from e

    def stand_ins(self, i):
        """The images that may stand in for image i, the next one first: never a held-out one where i trains, nor the
        reverse, as the held-out loss would be of images that the network has seen."""
        held = np.zeros(len(self), bool)
        held[split(len(self))[1]] = True
        same = np.flatnonzero(held == held[i])
        return np.roll(same, -np.searchsorted(same, i))[1:].tolist()

    def decode_near(self, i):
        """-> (pixels, j): of image i, or of the first that may stand in for it and can be decoded, j."""
        try:
            return self.decode(i), i
        except BrokenImage as e:
            broken = e
        if not self.skip_broken:
            raise BrokenImage(f"{broken}; repair or remove it, or let another stand in: --skip-broken") from broken
        for j in self.stand_ins(i)[: NEIGHBOURS - 1]:
            try:
                return self.decode(j), j
            except BrokenImage:
                continue
        raise BrokenImage(f"{broken}, nor can any that may stand in for it; repair or remove it") from broken

    def __len__(self):
        return len(self.files)

    def __getitem__(self, indices):
        used = [self.instead.get(int(i), int(i)) for i in indices]
        if self.images is not None:
            images = self.images[used]
        else:
            images, used = zip(*map(self.decode_near, used))
            images = np.stack(images)
        replaced, used = sum(i != j for i, j in zip(indices, used)), np.array(used)
        images, labels, numbers = map(torch.from_numpy, (images, self.labels[used], used))
        return Batch(images.permute(0, 3, 1, 2), labels, numbers=numbers, replaced=int(replaced))


def workers_for(data):
    """Processes that read a data set: none where it is quick."""
    if data.quick:
        return 0
    return min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
