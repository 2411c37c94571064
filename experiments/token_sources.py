"""Whose tokens spatial_structure.py measures: an encoder at work, a file of features, a cache of tokens.

Each gives 16 x 16 tokens of an image by the image's place in the set, the images sorted by name.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from inputs.formats import listing
from inputs.teachers import DRAWN, find_encoder, load_encoder
from inputs.tokens import Tokens
from plumbing.files import one_line, read_pt, shown

GRID = 16  # tokens a side
RANDOM = " (random)"  # behind the name of an untrained encoder


class Live(NamedTuple):
    """An encoder that is run on the images."""

    name: str
    weights: str | None

    def about(self):
        return dict(weights=self.weights)


class Stored(NamedTuple):
    """Tokens that are there: those of image i of the set are tokens[[rows[i]]], float [1, 256, D]."""

    tokens: object  # a tensor [B, 256, D], or inputs.tokens.Tokens
    rows: np.ndarray
    path: str

    def about(self):
        return dict(tokens=self.path)


def open_tokens(source, images, device):
    """-> (a function from places in the set to tokens [B, 256, D] on the device, the encoder's number of parameters).

    images: {place: uint8 [3, S, S]}, which a Live source needs; the number is None where tokens are Stored.
    """
    if isinstance(source, Stored):
        return lambda places: source.tokens[source.rows[places].tolist()].to(device), None
    teacher, parameters = load(*source, device)
    return lambda places: teacher(torch.stack([images[i] for i in places]).to(device)), parameters


# ---- An encoder at work ----


def pixels(images, grid=GRID):
    """The patches as tokens, in [-1, 1]: uint8 [B, 3, S, S] -> [B, T, 3 (S / grid)^2]."""
    p = images.shape[-1] // grid
    return F.unfold(images.float() / 127.5 - 1, p, stride=p).transpose(1, 2)


def load(name, weights, device="cpu"):
    """-> (teacher, its number of parameters). ValueError in the words of our flags."""
    if name == "pixels":
        return pixels, 0
    try:
        teacher = load_encoder(name, GRID, weights, device)
    except (ValueError, OSError) as e:
        raise ValueError(in_our_words(e, name)) from e
    return teacher, sum(p.numel() for p in teacher.parameters())


def in_our_words(error, name):
    text = one_line(error).replace("--encoder-weights ", f"--weights {name}=")
    return text.replace("--encoder ", "--encoders ")


def choose_encoders(names, weights, cached=()):
    """--encoders, --weights, and those that need not run -> {title: Live}, of the others. ValueError for what can be
    known to fail before an image is decoded."""
    if len(set(names)) < len(names):
        raise ValueError(f"--encoders {' '.join(names)}: name each once")
    files = {}
    for item in weights:
        name, _, file = item.partition("=")
        if not file or name not in names or name in files:
            raise ValueError(f"--weights {item}: give NAME=FILE, once for a NAME among --encoders")
        if name in ("pixels", *DRAWN):
            raise ValueError(f"{name} has no weights: leave --weights {item} out")
        files[name] = file
    live = [Live(name, files.get(name)) for name in names if name not in cached]
    for source in live:
        try:
            if source.name != "pixels":
                find_encoder(*source)
        except (ValueError, OSError) as e:
            raise ValueError(in_our_words(e, source.name)) from e
    return {source.name + RANDOM * (source.weights == "random"): source for source in live}


# ---- Files of features, as the release has them ----


def read_features(path):
    """The tokens in a file, a tensor [B, 256, D] or a dict with one -> that tensor, not yet read from the disk."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"--features {path}: there is no such file")
    found = read_pt(path)
    if isinstance(found, dict):
        tensors = {name: t for name, t in found.items() if torch.is_tensor(t) and t.ndim == 3}
        if len(tensors) != 1:
            names = ", ".join(map(str, tensors)) or "none"
            raise ValueError(f"--features {path} needs one tensor of [images, tokens, width], and holds {names}")
        found = next(iter(tensors.values()))
    if not torch.is_tensor(found) or found.ndim != 3 or not found.is_floating_point():
        what = f"{found.dtype} {list(found.shape)}" if torch.is_tensor(found) else type(found).__name__
        raise ValueError(f"--features {path} needs a tensor of numbers [images, tokens, width], and holds {what}")
    if found.shape[1] != GRID**2 or found.shape[2] < 3:
        raise ValueError(
            f"--features {path} has {found.shape[1]} tokens of width {found.shape[2]} an image: the metrics compare"
            f" encoders at {GRID} x {GRID} patch tokens, without a class token"
        )
    return found


def choose_features(items, taken):
    """--features -> {name: Stored}. taken: names that others have. ValueError also where the files have not equally
    many images."""
    sources = {}
    for item in items:
        name, given, path = item.partition("=")
        if not given or os.path.exists(item):  # a path may hold the sign itself
            name, path = Path(item).stem, item
        if name.startswith("#") or not name or name in sources or name in taken:
            raise ValueError(
                f"--features {item}: a row cannot be called {name!r}, or is already: give another NAME=FILE"
            )
        tokens = read_features(path)
        sources[name] = Stored(tokens, np.arange(len(tokens)), path)
    counts = {name: len(source.rows) for name, source in sources.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"--features: encoders are compared on the same images, and there are ({said}): one at a time")
    return sources


# ---- Caches of tokens, and which sources there are ----


def places_of(files, names):
    """The place of each of `files` among names, those of another listing of the same set -> [int, or None]."""
    place = {name: i for i, name in enumerate(names)}
    return [place.get(file, place.get(file.replace("\\", "/"))) for file in files]  # the separator in zips of Windows


def from_cache(cache, path, files):
    """A cache's tokens of the images `files` -> Stored. ValueError where it is not of exactly these images."""
    names = cache.images.files
    rows = places_of(files, names)
    if None in rows or len(rows) != len(names):
        rest = set(range(len(names))).difference(rows)
        other = f"no {shown(files[rows.index(None)])}" if None in rows else f"also {shown(names[min(rest)])}"
        raise ValueError(f"--tokens {path} is of other images: it has {other}")
    return Stored(cache, np.array(rows), path)


def choose_sources(args, files):
    """files: the sorted names of the images of --data, or None -> ({title: source}, the names of the images or None
    where they have none, how many they are). ValueError where the sources cannot be compared."""
    names = args.encoders or ([] if args.features or args.tokens else ["hog", "sift", "pixels"])
    cached = [name for name in names if args.tokens and name != "pixels"]
    if args.tokens and not cached:
        raise ValueError(f"--tokens {args.tokens}: name those of its encoders that are to be measured with --encoders")
    if args.tokens and args.weights:
        raise ValueError(f"--weights {' '.join(args.weights)}: with --tokens no encoder is run; leave it out")
    sources = choose_encoders(names, args.weights, cached)
    if sources and not args.data:
        raise ValueError(f"--encoders {' '.join(source.name for source in sources.values())}: name images with --data")
    for name in cached:
        cache = Tokens(args.tokens, name, GRID)
        side = cache.images.size
        if args.data and side != args.image_size:
            raise ValueError(f"--tokens {args.tokens} is of crops of {side} px: --image-size {side}")
        files = files or sorted(cache.images.files)
        sources[name + RANDOM * cache.random] = from_cache(cache, args.tokens, files)
    sources |= choose_features(args.features, sources)
    count = len(files) if files else len(next(iter(sources.values())).rows)
    for title, source in sources.items():
        if isinstance(source, Stored) and len(source.rows) != count:
            raise ValueError(
                f"--features {source.path} has {len(source.rows)} images, and {args.data or args.tokens} {count}: row i"
                " has to be of the i-th image by name"
            )
    return sources, files, count


# ---- Labels ----


def read_labels(args, sources, files):
    """-> (int64 [N] of all images, names of the classes): of --data's folders or dataset.json, or of a cache."""
    caches = [source.tokens.images for source in sources.values() if isinstance(getattr(source, "tokens", 0), Tokens)]
    if not args.data and not caches:
        raise ValueError("--probe needs labels: those of the class folders of --data, or of a cache of --tokens")
    found = listing(args.data) if args.data else caches[0]
    rows = places_of(files, found.files)
    if None in rows:
        raise ValueError(f"{shown(args.data)} has no label of {shown(files[rows.index(None)])}")
    return np.asarray(found.labels)[rows], found.classes
