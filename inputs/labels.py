"""Which class an image is of, told by its folder, by dataset.json or by a column of numbers; never guessed."""

import json
import os
import re
import sys
from pathlib import PurePosixPath

import numpy as np

from plumbing.files import one_line, shown

SPLIT = re.compile(
    r"(images?[-_])?(train|training|val|valid|validation|test|testing|dev|eval)([-_]?(\d+|set|images?))?", re.IGNORECASE
)
NO_CLASS = "images"  # the one class of a set without classes
MOST = 100_000  # classes: more are no labels, but numbers of something else


def no_classes(count):
    return np.zeros(count, np.int64), [NO_CLASS]


def by_folder(path, images, folders):
    """-> (labels, classes, notes). The class of an image is the path of its folder, less what all share at the front,
    and less a folder at the end that each class has alone (Tiny-ImageNet's n01443530/images).

    folders are all there are, also those without images. ValueError where it is not clear.
    """
    of_image = [sys.intern(os.path.dirname(name)) for name in images]  # one string for all images of a folder
    flat = all(re.match("ILSVRC2012_(val|test)", os.path.basename(name)) for name in images) and len(set(of_image)) == 1
    notes = ["ImageNet's labels of these lie in LOC_val_solution.csv: to use them, make class folders"] if flat else []
    if not any(of_image):
        return *no_classes(len(images)), notes
    if "" in of_image:
        stray = shown(images[of_image.index("")])
        raise ValueError(f"{shown(path)}: {stray} lies beside the class folders, in none of them; move or remove it")
    names = class_names(set(of_image), path)
    classes = sorted(set(names.values()))
    if all(name.isdigit() for name in classes) and classes != sorted(classes, key=int):
        notes.append(f"the folders are numbers, counted in the order {', '.join(classes[:5])}, ...: see --labels")
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[names[folder]] for folder in of_image])
    return labels, [shown(name) for name in classes], [*notes, *without_images(folders, of_image)]


def class_names(folders, path):
    """{folder with images: name of its class}. ValueError where the folders are the parts of a set, such as train and
    test, and not its classes."""
    parts = {folder: folder.split("/") for folder in folders}

    def shared(place):
        return all(len(p) > 1 for p in parts.values()) and len({p[place] for p in parts.values()}) == 1

    front = []
    while shared(0):
        front = [*front, next(iter(parts.values()))[0]]
        parts = {folder: p[1:] for folder, p in parts.items()}
    tops = {p[0] for p in parts.values()}
    splits = sorted(top for top in tops if SPLIT.fullmatch(top))
    holding = [s for s in splits if any(p[0] == s and len(p) > 1 for p in parts.values())]
    if len(tops) > 1 and (holding or len(splits) == len(tops)):
        meant = next((s for s in holding or splits if s.lower().startswith("train")), (holding or splits)[0])
        unpacked = "" if os.path.isdir(path) else " (once unpacked)"
        raise ValueError(
            f"{shown(path)} holds {shown(', '.join(splits))}: parts of a set, and no classes; name one of them,"
            f" probably --data {shown('/'.join([path.rstrip('/'), *front, meant]))}{unpacked}"
        )
    while shared(-1):
        parts = {folder: p[:-1] for folder, p in parts.items()}
    return {folder: "/".join(p) for folder, p in parts.items()}


def without_images(folders, of_image):
    """The note on folders that hold no images, at any depth: classes, perhaps, that got none."""
    full = {"", "."} | {str(parent) for folder in set(of_image) for parent in (PurePosixPath(folder) / "x").parents}
    empty = sorted(f for f in set(folders) - full if os.path.dirname(f) in full)
    more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    return [f"folders without images, which are no classes: {shown(', '.join(empty[:5]))}{more}"] if empty else []


def read_json(path, text):
    """{name: label} of a dataset.json, {"labels": [["00000/img00000000.png", 3], ...]}; None where they are null."""
    try:
        pairs = json.loads(text)["labels"]
        return None if pairs is None else {str(name).replace("\\", "/"): label for name, label in pairs}
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{shown(path)}: its dataset.json cannot be read ({one_line(e, 200)})") from e


def by_json(path, images, text):
    """-> (labels, classes, notes) by the text of a dataset.json, which must have a label of each image, or none."""
    stored = read_json(path, text)
    if stored is None:
        return *no_classes(len(images)), ["its labels are null"]
    lacking = [name for name in images if name not in stored]
    if lacking:
        count = f"({len(lacking)} such images)" if len(lacking) > 1 else ""
        raise ValueError(f"{shown(path)}: dataset.json has no label of {shown(lacking[0])} {count}")
    labels, classes, notes = numbered(path, [stored[name] for name in images])
    absent = len(stored) - len(images)
    return labels, classes, [*notes, *([f"{absent} images of dataset.json are not there"] if absent else [])]


def numbered(path, labels, names=None):
    """Labels as they are stored -> (int64 [N], classes, notes). ValueError where they are no numbers of classes.

    A class without a name in `names` is called by its number.
    """
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= MOST:
        odd = next((x for x in labels if type(x) is not int or not 0 <= x < MOST), labels[0])
        why = f"labels are whole numbers from 0 to {MOST - 1:,}, and one is {odd!r}"
        why += ", which stands for an image without a label: take the part that has them" if odd == -1 else ""
        raise ValueError(f"{shown(path)}: {why}")
    classes = names or [str(i) for i in range(array.max() + 1)]
    if array.max() >= len(classes):
        raise ValueError(f"{shown(path)}: a label is {array.max()}, and there are names of {len(classes)} classes")
    empty = np.flatnonzero(np.bincount(array, minlength=len(classes)) == 0)
    notes = [f"{len(empty)} classes without images, such as {classes[empty[0]]}"] if len(empty) else []
    return array.astype(np.int64), classes, notes
