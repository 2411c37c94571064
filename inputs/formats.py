"""What people's data are as files: where the images lie, and which class each is of.

    class folders        of a folder or a zip, at any depth: Places365's c/church/indoor is a class
    dataset.json         at the root of a folder or a zip (EDM2, StyleGAN, REPA): its labels; folders mean nothing
    no folders at all    no classes
    Hugging Face         what datasets' save_to_disk wrote; parquet files, a folder of them, or 'data/train-*.parquet'

listing(path) tells which it is. What is left out is counted there, and what cannot be told is refused: no label is
guessed.
"""

import functools
import glob
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from inputs.hugging_face import rows_of_disk, rows_of_parquet
from inputs.labels import by_folder, by_json
from plumbing.files import one_line, shown

# folders that operating systems and network drives keep for themselves
SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "@Recycle", "@Recently-Snapshot", "$RECYCLE.BIN", "lost+found"}
SYSTEM |= {"System Volume Information"}


def extensions():
    """Those of the formats that the installed Pillow decodes, and does not only recognise."""
    Image.init()
    known = [name for name, (reader, _) in Image.OPEN.items() if name != "MPEG" and not is_stub(reader)]
    return {extension for extension, name in Image.registered_extensions().items() if name in known}


def is_stub(reader):
    return isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)


EXTENSIONS = extensions()


class Listing(NamedTuple):
    """A data set before anything is decoded."""

    kind: str  # what it was taken for, in words
    files: list  # a name for each image, in order
    labels: np.ndarray  # int64 [N]
    classes: list  # the name of each class
    source: object  # .open(i) -> the file of image i, to be read; .sizes() -> bytes of each; .where(i) -> its place
    notes: list  # what was left out, in words


# ---- Where images lie ----


class Disk:
    """Files under a folder."""

    def __init__(self, path, files):
        self.path, self.files = str(path), files

    def where(self, i):
        return os.path.join(self.path, self.files[i])

    def open(self, i):
        return open(self.where(i), "rb")

    def sizes(self):
        return (os.stat(f"{self.path}/{file}").st_size for file in self.files)


class Zip:
    """Members of a zip, read in place."""

    def __init__(self, path, members):
        self.path, self.members, self.zips = str(path), members, {}

    def where(self, i):
        return f"{self.path}:{self.members[i]}"

    def zip(self):
        if (key := os.getpid()) not in self.zips:  # an open file position cannot be shared between processes
            self.zips = {key: zipfile.ZipFile(self.path)}
        return self.zips[key]

    def __getstate__(self):
        return {**self.__dict__, "zips": {}}

    def open(self, i):
        return self.zip().open(self.members[i])

    def sizes(self):
        return (self.zip().getinfo(member).file_size for member in self.members)


# ---- Which it is ----


def listing(path):
    """-> Listing. FileNotFoundError or ValueError, with what to do, where there is nothing to train on, or where
    labels would have to be guessed."""
    path = str(path)
    pattern = sorted(glob.glob(path, recursive=True)) if not os.path.exists(path) and glob.has_magic(path) else []
    if pattern and all(file.endswith(".parquet") for file in pattern):
        return Listing(*rows_of_parquet(path, pattern))
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{shown(path)} does not exist; --data takes a folder of class folders, a .zip of one, or parquet files"
        )
    if path.endswith(".parquet") and os.path.isfile(path):
        return Listing(*rows_of_parquet(path, [path]))
    if os.path.isdir(path):
        if any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            return Listing(*rows_of_disk(path))
        names, folders = walk(path)
        images, notes = left_out(names)
        parquet = [os.path.join(path, name) for name in names if name.endswith(".parquet")]
        if parquet and not images:
            return Listing(*rows_of_parquet(path, parquet))
        source, kind = Disk(path, images), "a folder"
    else:
        images, notes, folders, source, names = open_zip(path)
        kind = "a zip"
    if not images:
        found = f"; there are {notes[0]}" if notes else ""
        raise ValueError(f"{shown(path)} holds no images that Pillow {Image.__version__} can open, at any depth{found}")
    labelled = [name for name in names if os.path.basename(name) == "dataset.json"]
    labelled = [name for name in labelled if any(image.startswith(name[:-12]) for image in images)]
    if labelled:
        root = labelled[0][:-12]
        stray = next((image for image in images if not image.startswith(root)), None)
        if stray:
            why = f"{labelled[0]} has labels, and not of {stray}: name the folder of either with --data"
            raise ValueError(f"{shown(path)}: {shown(why)}")
        with type(source)(path, labelled[:1]).open(0) as file:
            labels, classes, more = by_json(path, [image.removeprefix(root) for image in images], file.read())
        kind += " with dataset.json"
    else:
        labels, classes, more = by_folder(path, images, folders)
        kind += " of class folders" if any("/" in name for name in images) else " of images without classes"
    return Listing(kind, images, labels, classes, source, [*notes, *more])


def walk(path):
    """-> (names of all files under `path`, sorted, links followed, but not in a circle; names of all folders).

    ValueError for a folder that cannot be read: its images would be missing in silence.
    """

    def stop(error):
        raise ValueError(f"the folder {shown(error.filename)} cannot be read ({error.strerror}): allow it, or move it")

    names, folders = [], []
    above = {os.fspath(path): set()}  # the real folders that a folder lies in
    for folder, below, files in os.walk(path, followlinks=True, onerror=stop):
        real, outer = os.path.realpath(folder), above.pop(folder)
        if real in outer:
            below.clear()
            continue
        above.update((os.path.join(folder, name), {real, *outer}) for name in below)
        place = Path(os.path.relpath(folder, path)).as_posix()
        inside = "" if place == "." else f"{place}/"  # put together by hand: of a million files Path takes ten seconds
        names += [inside + file for file in files]
        folders.append(place)
        names += [f"{inside}{name}/" for name in below if is_system(name)]
        below[:] = [name for name in below if not is_system(name)]
    return sorted(names), folders


def is_system(name):
    return name in SYSTEM or name.startswith(".")


def in_system(name):
    return any(is_system(part) for part in name.split("/") if part != "..")


def open_zip(path):
    """-> (names of images, notes, folders, Zip, all names). ValueError where it, or a kind of member, is unreadable."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{shown(path)} is neither a folder nor a zip file, or the zip is damaged")
    try:
        with zipfile.ZipFile(path) as file:
            infos = file.infolist()
            # Windows' own separator, which other programs there leave in the names
            names = [info.filename.replace("\\", "/") for info in infos]
            images, notes = left_out(names)
            by_name = dict(zip(names, infos))
            wanted = [by_name[name] for name in images]
            for info in {(info.compress_type, info.flag_bits & 1): info for info in wanted}.values():
                with file.open(info):
                    pass
    except (NotImplementedError, RuntimeError) as e:
        why = f"{shown(path)} is a zip that Python cannot read ({one_line(e)})"
        raise ValueError(f"{why}: unpack it and name the folder, or pack it anew without password or Deflate64") from e
    except Exception as e:  # the reader of a damaged zip raises anything
        raise ValueError(f"{shown(path)} is a zip that is damaged, or of a kind that cannot be read ({e})") from e
    folders = [os.path.dirname(name) for name in names if not in_system(name)]
    return images, notes, folders, Zip(path, [info.filename for info in wanted]), names


def left_out(names):
    """-> (the images among the names of files, the notes on how many others there are of which kind)."""
    images, others, hidden = [], Counter(), functools.cache(in_system)
    for name in names:
        folder, _, file = name.rpartition("/")
        extension = os.path.splitext(file)[1]
        if hidden(folder) or is_system(file):
            others["hidden or the system's own"] += 1
        elif extension.lower() in EXTENSIONS:
            images.append(name)
        elif file not in ("", "dataset.json"):
            others[extension or "without extension"] += 1
    counts = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
    return images, [f"left out: {shown(counts)}"] if counts else []
