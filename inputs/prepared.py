"""Latents, and labels without images, that people have prepared for other programs.

    REPA's vae-sd        dataset.json, and below it a .npy [2C, h, w] for each image: mean, then standard deviation
    the iREPA release's  a `datasets` folder of Hugging Face; its column data holds [2C, h, w], or [1, 2C, h, w]
    labels alone         for these, where no teacher needs images: a .txt of a number a line, or vae-sd's dataset.json

Row i, in the order of sorted names where there are names, belongs to image i of --data. None of the files names its
VAE.
"""

import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from inputs.hugging_face import need_datasets
from inputs.images import IN_MEMORY, LOOK, Batch, BrokenImage, spread
from inputs.labels import numbered, read_json
from inputs.latents import Cached, mean_and_std, sums_of
from plumbing.files import one_line

ENOUGH = 10_000  # latents from which mean and standard deviation are estimated


def open_latents(path, data, spec, image_size, images=True):
    """The latents in the folder `path` that belong to `data` -> Cached or Prepared. ValueError where they do not fit.

    spec: of their VAE, as far as it is known; images: whether the teacher needs them.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"--latents {path}: there is no such folder")
    if (folder / "manifest.json").exists() and not isinstance(data, Labels):
        return Cached(data, path, images)
    if (folder / "state.json").exists():
        return Prepared(data, HuggingFace(path), spec, image_size, images)
    if (folder / "dataset.json").exists():
        return Prepared(data, Files(path), spec, image_size, images)
    if (folder / "manifest.json").exists():
        raise ValueError(f"--latents {path} is a cache, which goes with its images, and {data.path} holds labels alone")
    inside = [name for name in ("vae-sd", "train") if (folder / name).is_dir()]
    hint = f"; did you mean {folder / inside[0]}?" if inside else ""
    raise ValueError(
        f"--latents {path} holds neither manifest.json, as a cache of inputs.latents, nor dataset.json, as REPA's"
        f" vae-sd, nor state.json, as a folder of Hugging Face datasets{hint}"
    )


class Prepared:
    """A data set with latents of other people's: data[indices] -> Batch, without images where no teacher needs them.

    ValueError where some of them, from all over the set, are not what the VAE makes of images of image_size.
    """

    def __init__(self, data, rows, spec, image_size, images=True):
        self.data, self.rows, self.decode, self.spec = data, rows, images, None  # it is not in their files
        self.classes, self.labels = data.classes, data.labels
        if hasattr(data, "files"):
            self.files = data.files
        if len(rows) != len(data):
            raise ValueError(
                f"{rows.path} holds {len(rows)} latents, and {data.path} {len(data)} images or labels: each latent"
                " belongs to the image in its place, so that none may be left out on either side"
            )
        self.shape = 2 * spec["channels"], image_size // spec["factor"], image_size // spec["factor"]
        self.quick = (data.quick or not images) and 4 * len(rows) * math.prod(self.shape) <= IN_MEMORY
        some = self.moments(spread(len(rows), LOOK))
        if not np.isfinite(some).all() or some[:, spec["channels"] :].min() <= 0:
            raise ValueError(
                f"{rows.path}: the second half of the channels is to be a standard deviation, and some of it is not"
                " above 0: it may be the logarithm of a variance"
            )
        self.same_rows()

    def same_rows(self):
        """ValueError where labels or numbers in names show that latents and images do not stand in the same order."""
        data, rows = self.data, self.rows
        if rows.labels is not None and len(data.classes) > 1 and (rows.labels != data.labels).any():
            i = int(np.flatnonzero(rows.labels != data.labels)[0])
            raise ValueError(
                f"{rows.path}: the label of {rows.names[i]} is {rows.labels[i]}, and that of {name_of(data, i)} in its"
                f" place in {data.path} is {data.labels[i]}"
            )
        for pair in zip(rows.names, getattr(data, "files", [])):
            theirs, ours = (re.search(r"(?:^|/)img\D*(\d+)\.\w+$", name) for name in pair)
            if theirs and ours and int(theirs[1]) != int(ours[1]):
                raise ValueError(f"{rows.path}: {pair[0]} stands in the place of {pair[1]} in {data.path}")

    def moments(self, indices):
        """float32 [B, 2C, h, w]. ValueError where it is another shape or kind of numbers."""
        found = self.rows.read(indices)
        if found.dtype.kind != "f" or found.shape[1:] != self.shape:
            raise ValueError(
                f"{self.rows.path} holds {found.dtype} {list(found.shape[1:])} for each image; the VAE and --image-size"
                f" make floats {list(self.shape)}, mean and standard deviation of each channel"
            )
        return found.astype(np.float32)  # a copy: what was read may not be written to

    def statistics(self):
        """-> (mean [C], standard deviation [C] of the latents over the set, on how many they rest, in words)."""
        indices = spread(len(self), ENOUGH)
        sums = sum(sums_of(self.moments(part)) for part in np.array_split(indices, -(-len(indices) // 256)))
        mean, std = mean_and_std(sums, len(indices) * self.shape[1] * self.shape[2])
        some = "its" if len(indices) == len(self) else f"{len(indices):,} of its"
        return mean, std, f"estimated from {some} {len(self):,} latents"

    def __len__(self):
        return len(self.data)

    def __getitem__(self, indices):
        moments = torch.from_numpy(self.moments(indices))
        batch = self.data[indices] if self.decode else Batch(None, torch.from_numpy(self.labels[indices]))
        return batch._replace(moments=moments)


def name_of(data, i):
    return data.files[i] if hasattr(data, "files") else f"line {i + 1}"


# ---- Where they lie ----


class Files:
    """REPA's vae-sd: rows of .npy files in the order of their names. labels: int64 [N], or None without."""

    def __init__(self, path):
        self.path, stored = str(path), read_json(path, (Path(path) / "dataset.json").read_text())
        walk = ((os.path.relpath(folder, path), names) for folder, _, names in os.walk(path))
        names = [Path(folder, name).as_posix() for folder, files in walk for name in files if name.endswith(".npy")]
        self.names = sorted(name for name in names if not Path(name).name.startswith("."))
        if not self.names:
            raise ValueError(f"--latents {path}: there are no .npy files beside dataset.json")
        differ = {*self.names} ^ {*stored} if stored else None
        if differ:
            why = "the files that are there and those that dataset.json names differ"
            raise ValueError(f"--latents {path}: {why}, in {len(differ)}, such as {min(differ)}")
        self.labels = numbered(path, [stored[name] for name in self.names])[0] if stored else None
        try:
            first = np.load(self.where(0), mmap_mode="r", allow_pickle=False)
        except Exception as e:  # a damaged header makes numpy raise anything
            raise ValueError(f"{self.where(0)} is no .npy file of numbers ({one_line(e, 200)})") from e
        if not first.flags.c_contiguous:
            raise ValueError(f"{self.where(0)} holds its numbers in Fortran's order")
        self.shape, self.dtype = first.shape, first.dtype
        self.header, self.size = Path(self.where(0)).read_bytes()[: first.offset], os.path.getsize(self.where(0))

    def where(self, i):
        return os.path.join(self.path, self.names[i])

    def __len__(self):
        return len(self.names)

    def read(self, indices):
        """[B, 2C, h, w]. BrokenImage, with the name, where a file is not like the first; to parse each is slow."""
        out = np.empty((len(indices), *self.shape), self.dtype)
        for place, i in zip(out, indices):
            try:
                data = Path(self.where(i)).read_bytes()
            except OSError as e:
                raise BrokenImage(f"{self.where(i)} cannot be read ({one_line(e)})") from e
            if not data.startswith(self.header) or len(data) != self.size:
                raise BrokenImage(f"{self.where(i)} is damaged, or of another shape than {self.names[0]}")
            place[:] = np.frombuffer(data, self.dtype, offset=len(self.header)).reshape(self.shape)
        return out


class HuggingFace:
    """The release's folder: rows of the column data, read as Arrow's own arrays (a hundred times faster than lists)."""

    names, labels = (), None

    def __init__(self, path):
        self.path, datasets = str(path), need_datasets(path)
        try:
            rows = datasets.load_from_disk(self.path)
        except Exception as e:  # json, Arrow and schema errors have no common class
            raise ValueError(f"--latents {path} cannot be read by datasets ({one_line(e, 200)})") from e
        if "data" not in rows.column_names:
            raise ValueError(f"--latents {path} has the columns {', '.join(rows.column_names)}, and no data")
        self.rows = rows.select_columns("data").with_format("arrow")

    def __len__(self):
        return len(self.rows)

    def read(self, indices):
        """[B, 2C, h, w]. BrokenImage where rows are not alike, or cannot be read."""
        try:
            column, shape = self.rows[list(map(int, indices))]["data"].combine_chunks(), []
            column = getattr(column, "storage", column)  # of datasets' own type for arrays
            while hasattr(column, "flatten") and hasattr(column, "values"):  # a list within a list
                inner = column.flatten()
                shape.append(len(inner) // len(column))
                column = inner
            found = column.to_numpy(zero_copy_only=False).reshape(len(indices), *shape)
        except Exception as e:  # Arrow's errors have no common class
            raise BrokenImage(f"{self.path}: rows {indices[0]} and after cannot be read ({one_line(e, 200)})") from e
        return found[:, 0] if len(shape) == 4 and shape[0] == 1 else found


# ---- Labels ----


class Labels:
    """A data set of labels alone: data[indices] -> Batch without images. Class names are their numbers."""

    broken, quick = (), True

    @staticmethod
    def takes(path):
        return os.path.isfile(path) and Path(path).suffix in (".txt", ".json")

    def __init__(self, path):
        self.path = str(path)
        if Path(path).suffix == ".json":
            stored = read_json(path, Path(path).read_text())
            if not stored or not all(name.endswith(".npy") for name in stored):
                raise ValueError(f"--data {path} names no .npy files with labels; for images, name their folder")
            self.files = sorted(stored)
            self.labels, self.classes, _ = numbered(path, [stored[name] for name in self.files])
        else:
            lines = Path(path).read_text().strip().splitlines()
            odd = [i for i, line in enumerate(lines) if not re.fullmatch(r"\s*\d{1,18}\s*", line)]
            if odd or not lines:
                what = f"line {odd[0] + 1} is {lines[odd[0]][:40]!r}" if odd else "it is empty"
                raise ValueError(f"--data {path} is to hold a label, a whole number from 0 on, in each line: {what}")
            self.labels, self.classes, _ = numbered(path, list(map(int, lines)))

    def __str__(self):
        return f"{self.path}: labels without images, {len(self)} in {len(self.classes)} classes"

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, indices):
        return Batch(None, torch.from_numpy(self.labels[indices]))
