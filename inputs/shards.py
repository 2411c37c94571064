"""A row of float16 numbers for each image of a set, kept in a folder: what the caches of latents and tokens share.

    manifest.json               what the rows are, and of which images
    labels.npy, files.json      the labels and names of the set
    NAME-00000.npy, ...         rows in shards, each written whole or not at all, and memory-mapped when read

A shard that is there is kept: who was stopped, goes on. The processes of one run share the shards.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from inputs.images import IN_MEMORY, Batch, workers_for
from plumbing.files import one_line, shown, write_text, write_whole
from plumbing.processes import read_ahead

LIMIT = 65504  # the largest float16
NOTHING = {".lock", "labels.npy", "files.json", "files.json.tmp", "manifest.json.tmp"}  # in a cache that has just begun


# ---- Rows ----


class Shards:
    """The rows in `folder`: rows[indices] -> float16 [B, *shape]. A shard is known by the first of its rows.

    command: what writes them, for people.
    """

    def __init__(self, folder, name, count, shard, shape, command):
        self.folder, self.name, self.count, self.shard, self.shape = Path(folder), name, count, shard, shape
        self.command, self.maps = command, {}
        self.starts = range(0, count, shard)
        self.small = self.bytes() <= IN_MEMORY

    def path(self, start):
        return self.folder / f"{self.name}-{start // self.shard:05d}.npy"

    def bytes(self):
        """Of all shards, nearly."""
        return self.count * math.prod(self.shape) * 2

    def rows_in(self, start):
        return min(self.shard, self.count - start)

    def open(self, start):
        """A shard's memory map. ValueError where it is damaged, or not what the manifest says."""
        file, shape = self.path(start), (self.rows_in(start), *self.shape)
        try:
            stored = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as e:  # a damaged header makes numpy raise anything
            raise ValueError(f"{file} is damaged ({one_line(e)}); delete it and run {self.command} again") from e
        if stored.shape != shape or stored.dtype != np.float16:
            raise ValueError(f"{file} is damaged: {stored.dtype} {stored.shape}, not float16 {shape}; delete it")
        return stored

    def check(self):
        """ValueError where a shard is not there, or damaged."""
        for start in self.starts:
            if not self.path(start).exists():
                file = self.path(start).name
                raise ValueError(f"{self.folder} is unfinished: {file} is not there; run {self.command} again")
            self.open(start)

    def __getstate__(self):
        return {**self.__dict__, "maps": {}}

    def __getitem__(self, indices):
        out = np.empty((len(indices), *self.shape), np.float16)
        for place, i in zip(out, indices):
            start = i // self.shard * self.shard
            if start not in self.maps:
                self.maps[start] = np.load(self.path(start), mmap_mode="r", allow_pickle=False)
            place[:] = self.maps[start][i - start]
        return out

    def share(self, ranks):
        """-> (the shards of this process that are there, those that are to be written)."""
        own = list(self.starts)[ranks.rank :: ranks.world]
        there = [start for start in own if self.path(start).exists()]
        for start in there:
            self.open(start)  # before anything is computed
        return there, [start for start in own if start not in there]

    def fill(self, todo, data, make, ranks, what, batch_size=16):
        """Write the shards `todo`, whose rows are make(Batch) [B, *shape] of the images -> yields (start, rows).

        what: the work, for people. ValueError where a row does not fit float16.
        """
        parts = [
            np.arange(i, min(i + batch_size, start + self.rows_in(start)))
            for start in todo
            for i in range(start, start + self.rows_in(start), batch_size)
        ]
        feed = read_ahead(data, parts, workers_for(data))
        count, clock = sum(map(len, parts)), None
        with tqdm(total=count, unit="img", desc=what, disable=ranks.rank > 0) as bar:
            for number, (part, batch) in enumerate(zip(parts, feed)):
                start = part[0] // self.shard * self.shard
                if part[0] == start:
                    rows = np.empty((self.rows_in(start), *self.shape), np.float16)
                made = make(batch)
                if not torch.isfinite(made).all() or made.abs().max() > LIMIT:
                    first = shown(data.files[part[0]])
                    raise ValueError(f"{what}: numbers of {first} and after it do not fit float16, and are not clipped")
                rows[part - start] = made.cpu().numpy()
                bar.update(len(part))
                if part[-1] + 1 == start + len(rows):
                    write_whole(self.path(start), lambda f: np.save(f, rows))
                    yield start, rows
                clock = clock or (time.time(), bar.n)  # the first batch is a warm-up
                if number == 3 and ranks.rank == 0 and len(parts) > 8:
                    speed = (bar.n - clock[1]) / (time.time() - clock[0])
                    tqdm.write(f"{what}: {count} images here at {speed:.3g} a second, about {duration(count / speed)}")


def duration(seconds):
    """In words."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# ---- Whose rows they are ----


def begin(out, manifest, found, same, data, first):
    """-> the manifest of the cache in `out`: `found`, where there is one, else `manifest`, which the first process
    writes.

    ValueError where the two differ in a key of `same`, or where `out` holds something else.
    """
    if found:
        wanted = json.loads(json.dumps(manifest))  # tuples become lists
        for key in same:
            if found.get(key, []) != wanted[key]:
                raise ValueError(f"{out} holds another cache: its {key} is {found.get(key)}, not {wanted[key]}")
        return found
    if first:
        refuse_other(out)
        out.mkdir(parents=True, exist_ok=True)
        np.save(out / "labels.npy", data.labels)
        write_text(out / "files.json", json.dumps(data.files))
        write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def refuse_other(out):
    """ValueError where `out` is neither new, nor empty, nor a cache, whole or just begun."""
    there = {file.name for file in out.iterdir()} if out.exists() else set()
    if "manifest.json" not in there and there - NOTHING:
        raise ValueError(f"{out} holds something else, and is left as it is; name a new folder with --out")


def read_manifest(path, kind, check):
    """The manifest of a cache. ValueError, naming the file, where it is not one.

    kind: of the rows, for people; check(manifest): ValueError or KeyError for what these need besides.
    """
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_text())
        if not {"image_size", "count", "shard", "classes", "files_sha256", "precision"} <= manifest.keys():
            raise ValueError("entries are missing")
        positive(*(manifest[key] for key in ("image_size", "count", "shard")))
        if not manifest["classes"] or not all(isinstance(name, str) for name in manifest["classes"]):
            raise ValueError("its classes are no names")
        if not all(i in range(manifest["count"]) for pair in manifest.get("stand_ins", []) for i in pair):
            raise ValueError("its stand_ins are no pairs of images")
        check(manifest)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as e:
        raise ValueError(f"{path} is no cache of {kind}: manifest.json cannot be used ({one_line(e)})") from e
    return manifest


def positive(*numbers):
    """ValueError where one is no positive whole number."""
    if not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ValueError("its sizes are not positive numbers")


def load_labels(path):
    """labels.npy of a cache, int64 [N]."""
    try:
        return np.load(Path(path) / "labels.npy", allow_pickle=False)
    except Exception as e:  # a damaged header makes numpy raise anything
        raise ValueError(f"{path}/labels.npy cannot be read ({one_line(e, 200)})") from e


def labels_of(path, manifest, data):
    """The labels [N] of a cache of the images `data`. ValueError where it is of others.

    Of a set of labels alone, count and labels are compared, of others also size, names and some of the bytes.
    """
    own = dict(image_size=data.size, count=len(data), files_sha256=data.digest) if hasattr(data, "digest") else {}
    for key, value in (own or dict(count=len(data))).items():
        if manifest[key] != value:
            what = f"its {key} is {manifest[key]}, not {value}"
            if key == "files_sha256":
                what = "files have other names, sizes or contents (its files_sha256 is another)"
            raise ValueError(f"{path} is not a cache of {data.path}: {what}; name its images, or write another")
    labels = data.labels.copy()
    for i, j in manifest.get("stand_ins", []):
        labels[i] = data.labels[j]
    if not np.array_equal(labels, load_labels(path)):
        raise ValueError(f"{path} is not a cache of {data.path}: the labels of some images were others then")
    return labels


class Recorded:
    """The set that a cache was made of, as the cache has it: labels, names and classes. data[indices] -> Batch without
    images. ValueError where the folder, of the manifest given, does not have them."""

    broken, quick = (), True

    def __init__(self, path, manifest):
        self.path, self.size, self.digest = str(path), manifest["image_size"], manifest["files_sha256"]
        self.classes, self.labels = manifest["classes"], load_labels(path)
        try:
            self.files = json.loads((Path(path) / "files.json").read_text())
        except (OSError, ValueError) as e:
            raise ValueError(f"{path}/files.json cannot be read ({one_line(e, 200)})") from e
        if not len(self.files) == len(self.labels) == manifest["count"] or self.labels.dtype != np.int64:
            raise ValueError(f"{path} is damaged: names, labels and count do not belong together")
        if not ((self.labels >= 0) & (self.labels < len(self.classes))).all():
            raise ValueError(f"{path} is damaged: some labels are of none of its {len(self.classes)} classes")

    def __str__(self):
        many = f"{len(self)} images in {len(self.classes)} class{'es' if len(self.classes) > 1 else ''}"
        return f"{shown(self.path)}: names and labels of {many}; no image is opened"

    def __len__(self):
        return len(self.files)

    def __getitem__(self, indices):
        return Batch(None, torch.from_numpy(self.labels[indices]))
