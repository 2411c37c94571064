"""What a run leaves behind: log rows, curves, grids of images, versions."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from plumbing.files import one_line, write_text, write_whole

PATIENCE = 5  # non-finite steps in a row that end a run


class Meter:
    """Sums what steps report, on their device, so that nobody waits for a GPU until a row is due."""

    def __init__(self, step, seconds, world, images_of):
        """step, seconds: where a resumed run goes on; images_of(step) names the images of a step."""
        self.since, self.seconds, self.world, self.images_of = step, seconds, world, images_of
        self.sums, self.skips, self.streak, self.last, self.clock = None, [], 0, seconds, time.time()
        self.replaced = 0

    def add(self, terms, skipped, replaced=0):
        """terms: dict of scalars; skipped: 1. where the step was not applied, and counts in no mean; replaced: how many
        of this process's images stand in for broken ones."""
        self.replaced += replaced
        terms = {k: torch.where(skipped > 0, 0, v.detach()) for k, v in terms.items()}
        self.sums = {k: self.sums[k] + v for k, v in terms.items()} if self.sums else terms
        self.skips.append(skipped)

    def row(self, images, teacher=0.0):
        """-> the means since the last row, over all processes; `images` is how many a step sees, `teacher` the seconds
        that this process spent in the teacher.

        FloatingPointError, with the images of the first of them, at PATIENCE non-finite steps in a row.
        """
        flags, steps = torch.stack(self.skips).bool().tolist(), len(self.skips)
        sums = torch.stack([*self.sums.values(), torch.full_like(self.skips[0], self.replaced)])
        if self.world > 1:
            dist.all_reduce(sums)
        self.refuse_streak(flags)
        *sums, replaced = sums
        means = (torch.stack(sums) / max(1, steps - sum(flags)) / self.world).tolist()
        self.seconds += time.time() - self.clock
        self.clock = time.time()
        row = dict(step=self.since + steps, **dict(zip(self.sums, means)), skipped=sum(flags))
        row.update(replaced=int(replaced), seconds=self.seconds)
        row["images_per_s"] = steps * images / (self.seconds - self.last)
        row["teacher"] = teacher / (self.seconds - self.last)  # its share of the time
        self.since, self.last, self.sums, self.skips = self.since + steps, self.seconds, None, []
        self.replaced = 0
        return row

    def refuse_streak(self, flags):
        for step, skipped in enumerate(flags, start=self.since):
            self.streak = self.streak + 1 if skipped else 0
            if self.streak == PATIENCE:
                first = step - PATIENCE + 1
                names = self.images_of(first)
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                raise FloatingPointError(
                    f"loss or gradient was not finite in {PATIENCE} steps in a row from step {first} on; none of them"
                    f" was applied, and what has been saved is clean. A lower --lr or a longer --warmup may help."
                    f" The first of them saw {', '.join(names[:8])}{more}"
                )

    @contextmanager
    def paused(self, bar=None):
        """What is not training stays out of the seconds, of the images/s, and of what the bar expects."""
        began = time.time()
        self.seconds += began - self.clock
        yield
        self.clock = time.time()
        if bar:
            bar.start_t += self.clock - began
            bar.last_print_t += self.clock - began


# ---- The log ----


def open_log(out, record, resumed):
    """Write the run's settings, cut the log to the `resumed` step (None: a new run) -> the log's path."""
    name = "config.json" if resumed is None else f"config-from-step-{resumed}.json"
    earlier = [*out.glob("config.json"), *sorted(out.glob("config-from-step-*.json"), key=os.path.getmtime)]
    text, again = json.dumps(record, indent=1) + "\n", json.dumps({**record, "resume": False}, indent=1) + "\n"
    if not earlier or earlier[-1].read_text() not in (text, again):
        write_text(out / name, text)
    log = out / "log.jsonl"
    rows = log.read_text().splitlines(keepends=True) if log.exists() else []
    # later ones come again, and a half-written one
    kept = [row for row in rows if row.endswith("}\n") and json.loads(row)["step"] <= (resumed or 0)]
    write_text(log, "".join(kept))
    return log


def rows_of(log):
    """The rows of a .jsonl, without a half-written last one; none if there is no file."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(row) for row in text.splitlines(keepends=True) if row.endswith("}\n")]


def append(log, row):
    with open(log, "a") as f:
        f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def warned(write):
    """write(), and whether it could: neither a full disk nor a bad picture must end a run that can still train."""
    try:
        write()
    except (OSError, FloatingPointError) as e:
        tqdm.write(f"warning: {one_line(e)}; training goes on", file=sys.stderr)
        return False
    return True


def progress(total, done, first, unit="step", what=None):
    """The bar of a run; in a file, a line each half minute."""
    often = 0.5 if sys.stderr.isatty() else 30
    return tqdm(None, what, total, disable=not first, unit=unit, mininterval=often, miniters=0, initial=done)


def versions():
    """What a result depends on besides its settings."""
    folder, commit = Path(__file__).parent.parent, None
    if (folder / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
        commit = None if git.returncode else git.stdout.strip()
    return dict(
        git_commit=commit,
        torch=str(torch.__version__),
        numpy=np.__version__,
        python=sys.version.split()[0],
    )


# ---- Pictures ----


def plot(out):
    """out/log.jsonl -> out/curves.png."""
    import matplotlib  # late: a second that sampling need not wait for

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(out / "log.jsonl")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    for axis, names in zip(axes, (("denoise", "held_out"), ("align",))):
        for name in names:
            mark = "." if len(rows) == 1 else None
            axis.plot(steps, [row[name] for row in rows], label=name.replace("_", "-"), marker=mark)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set(ylabel="mean squared error of the velocity", yscale="log")
    plain_ticks(axes[0].yaxis)
    axes[1].set(ylabel="minus the mean cosine to the teacher")
    figure.suptitle(f"{Path(out).resolve().name}: the loss, in training and on held-out images, and the alignment")
    write_whole(out / "curves.png", lambda f: figure.savefig(f, format="png", dpi=120))
    plt.close(figure)


def plain_ticks(axis):
    """0.6, not 6 x 10^-1, beside a logarithmic axis."""
    from matplotlib.ticker import ScalarFormatter  # late, as above

    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(ScalarFormatter())


def to_uint8(x):
    """[-1, 1] -> uint8, rounded: truncation, as in the released code, darkens by half a grey level."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@functools.cache
def font_for(name):
    """A font that has each letter of a name: Pillow's own, or one of the system's; None where there is none."""
    if name.isascii():
        return ImageFont.load_default(size=16)
    from matplotlib import font_manager, ft2font  # late: a second that other names need not wait for

    plain = [font for font in font_manager.fontManager.ttflist if font.weight in (400, "normal", "regular")]
    # the last resort has a box for each letter
    paths = {font.fname for font in plain if font.style == "normal" and "LastResort" not in font.fname}
    for path in sorted(paths):
        if {ord(letter) for letter in name} <= ft2font.FT2Font(path).get_charmap().keys():
            return ImageFont.truetype(path, 16)
    return None


@functools.cache
def told(text):
    tqdm.write(text, file=sys.stderr)


def save_grid(images, names, path, classes=None):
    """Write uint8 [rows * columns, 3, H, W] as a PNG with names[row] before each row, enlarged to be seen.

    classes: the number of the class of each row, by default the row's own, where no font has the letters of its name.
    """
    images = images.permute(0, 2, 3, 1).cpu().numpy()
    rows, side = len(names), images.shape[1]
    columns, zoom = len(images) // rows, max(1, 96 // side)
    numbered = {name: f"class {i}" for name, i in zip(names, classes or range(rows)) if not font_for(name)}
    if numbered:
        which = ", ".join(f"{number}: {name}" for name, number in numbered.items())
        told(f"note: no font here has the letters of some names, which are numbers in the grids: {which}")
    names = [numbered.get(name, name) for name in names]
    cell = side * zoom + 4
    margin = int(max(font_for(name).getlength(name) for name in names)) + 16
    grid = Image.new("RGB", (margin + columns * cell, rows * cell), "white")
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
        grid.paste(tile, (margin + i % columns * cell, i // columns * cell + 2))
    for row, name in enumerate(names):
        draw.text((8, (row + 0.5) * cell), name, fill="black", font=font_for(name), anchor="lm")
    os.makedirs(Path(path).parent, exist_ok=True)
    write_whole(path, lambda f: grid.save(f, "PNG"))


def save_progress(folder, names, columns):
    """Write folder/progress.png from its grids step-*.png, of names[row] and `columns` images each: the first of every
    row, or some of a few rows, a line a time; of many times twelve."""
    files = sorted(folder.glob("step-*.png"))
    files = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, 12).round().astype(int))]
    tiles = []
    for file in files:
        with Image.open(file) as image:
            grid = np.asarray(image)
        cell = len(grid) // len(names)
        left = grid.shape[1] - columns * cell
        for y in range(0, len(grid), cell):
            for x in range(left, left + cell * max(1, columns // len(names)), cell):
                tiles.append(grid[y + 2 : y + cell - 2, x : x + cell - 4])
    images = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
    save_grid(images, [f"step {int(file.stem[5:])}" for file in files], folder / "progress.png")


def write_npz(path, chunks, shape, labels):
    """An npz of arr_0, uint8 of `shape`, from the .npy files `chunks`, one after the other, and of labels."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        with z.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=tuple(shape)))
            for chunk in chunks:
                f.write(np.load(chunk).tobytes())
        with z.open("labels.npy", "w") as f:
            np.lib.format.write_array(f, labels)
