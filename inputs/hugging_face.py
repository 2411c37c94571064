"""Sets of images in the formats of Hugging Face: what datasets' save_to_disk wrote, and parquet files.

Each function gives (kind in words, names of the images, labels, classes, where they lie, notes), as inputs/formats.py.
"""

import io
import os
import re

from inputs.labels import SPLIT, no_classes, numbered
from plumbing.files import one_line, shown


class Rows:
    """A column of images of a Hugging Face Dataset, as files that it does not decode."""

    def __init__(self, path, rows, column):
        self.path, self.rows, self.column = str(path), rows, column

    def where(self, i):
        return f"{self.path}: row {i}"

    def open(self, i):
        value = self.rows[i][self.column]
        return io.BytesIO(value["bytes"]) if value["bytes"] is not None else open(value["path"], "rb")

    def sizes(self):
        import pyarrow.compute as pc  # which datasets brings

        sizes = pc.binary_length(pc.struct_field(self.rows.data.column(self.column), "bytes"))
        return sizes.to_pylist()


def need_datasets(path):
    try:
        import datasets  # late: a package that other formats do not need
    except ImportError as e:
        raise ValueError(f"{shown(path)} takes the package datasets: pip install datasets ({e})") from e
    return datasets


def rows_of_disk(path):
    """What datasets' save_to_disk wrote."""
    datasets = need_datasets(path)
    if os.path.exists(os.path.join(path, "dataset_dict.json")):
        splits = sorted(e.name for e in os.scandir(path) if e.is_dir())
        first = next((s for s in splits if s.startswith("train")), splits[0] if splits else "train")
        which = "name one of them, such as" if len(splits) > 1 else "name it:"
        raise ValueError(f"{shown(path)} holds {', '.join(splits)}: {which} --data {path}/{first}")
    try:
        rows = datasets.load_from_disk(path)
    except Exception as e:  # of arrow, json and files, which have no common class
        raise ValueError(f"{shown(path)} is no folder of datasets.save_to_disk ({one_line(e, 300)})") from e
    return by_column(path, "a Hugging Face folder", rows, [])


def rows_of_parquet(path, files):
    """Parquet files of one part of a set."""
    parts = dict(map(part_of, files))
    if len(parts) > 1:
        first = next((part for part in parts if part.startswith("train")), min(parts))
        names = ", ".join(part or "others" for part in sorted(parts))
        raise ValueError(f"{shown(path)} holds parts of a set, {names}: name one, such as --data '{parts[first]}'")
    datasets = need_datasets(path)
    try:
        rows = datasets.Dataset.from_parquet(files)
    except Exception as e:  # of parquet, arrow and files, which have no common class
        raise ValueError(f"{shown(path)} cannot be read as parquet ({one_line(e, 300)})") from e
    cache = {os.path.dirname(entry["filename"]) for entry in rows.cache_files}
    size = sum(os.path.getsize(entry["filename"]) for entry in rows.cache_files) / 2**20
    notes = [f"datasets keeps a copy of {size:.0f} MiB in {', '.join(sorted(cache))}"] if cache else []
    return by_column(path, "one parquet file" if len(files) == 1 else f"{len(files)} parquet files", rows, notes)


def part_of(file):
    """-> (train, test, ..., as the hub's file or folder is called, or nothing; a pattern for its files)."""
    folder, name = os.path.split(file)
    piece = re.fullmatch(r"(.+)-\d+-of-\d+\.parquet", name)
    if piece:
        return piece[1], os.path.join(folder, f"{piece[1]}-*.parquet")
    if SPLIT.fullmatch(name.removesuffix(".parquet")):
        return name.removesuffix(".parquet"), file
    inside = os.path.basename(folder)
    return (inside, os.path.join(folder, "*.parquet")) if SPLIT.fullmatch(inside) else ("", file)


def by_column(path, kind, rows, notes):
    """The columns image or img, label or fine_label; class names from the metadata."""
    datasets = need_datasets(path)
    columns = ", ".join(rows.column_names)
    image = next((name for name in ("image", "img") if name in rows.column_names), None)
    label = next((name for name in ("label", "fine_label") if name in rows.column_names), None)
    if not image or not len(rows):
        what = f"no column image or img (there are {columns})" if len(rows) else "no rows"
        raise ValueError(f"{shown(path)} has {what}")
    try:
        rows = rows.cast_column(image, datasets.Image(decode=False))
    except Exception as e:  # arrow's own, of a column of something else
        raise ValueError(f"{shown(path)}: its column {image} holds no images ({one_line(e, 200)})") from e
    files, source = [f"row {i}" for i in range(len(rows))], Rows(path, rows, image)
    if not label:
        notes = [*notes, f"no column label or fine_label (there are {columns})"]
        return f"{kind} without classes", files, *no_classes(len(files)), source, notes
    others = [name for name in ("fine_label", "coarse_label") if name in rows.column_names and name != label]
    notes = [*notes, f"labels of {label}, not of {', '.join(others)}"] if others else notes
    names, stored = getattr(rows.features[label], "names", None), rows.data.column(label).to_pylist()
    if all(isinstance(value, str) for value in stored):
        names = sorted(set(stored))
        number = {name: i for i, name in enumerate(names)}
        stored = [number[value] for value in stored]
    labels, classes, more = numbered(path, stored, names)
    return kind, files, labels, classes, source, [*notes, *more]
