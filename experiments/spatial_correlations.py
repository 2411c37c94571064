"""What a teacher's spatial structure says of generation: each metric against FID, over a table of encoders."""

import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from plumbing.files import one_line

PUBLISHED = Path(__file__).with_name("encoder_table.csv")
LABELS = {"accuracy": "linear probe, %", "lds": "LDS", "cds": "CDS", "srss": "SRSS", "rmsc": "RMSC"}


def read_table(path, measured=None):
    """The rows of a csv with a column fid and some of LABELS, as numbers; lines with # are comments.

    measured, {encoder: {metric: value}}, gives the metrics that the table lacks, by its column encoder.
    """
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(text for text in f if not text.startswith("#")))
        table = []
        for row in rows:
            numbers = {k: float(row[k] or "nan") for k in ("fid", *LABELS) if k in row or k == "fid"}
            table.append({**(measured or {}).get(row.get("encoder"), {}), **numbers})
    except OSError as e:
        raise ValueError(f"--correlate {path} cannot be read: {e.strerror}") from e
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise ValueError(f"--correlate {path}: a table has a column fid and numbers ({one_line(e)})") from e
    return table


def pearson(a, b):
    """Correlation along the last axis; NaN where one of them is constant."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def correlate(table, draws=10_000):
    """-> {column: dict(x, fid, pearson, spearman)}, each r as [r, low, high]: 95% intervals from rows drawn again with
    replacement. Columns that are constant or have fewer than four points are left out; ValueError if that is all."""
    out = {}
    for column in LABELS:
        points = np.array([[row.get(column, np.nan), row["fid"]] for row in table]).reshape(-1, 2)
        x, y = points[np.isfinite(points).all(1)].T
        if len(x) < 4 or not np.ptp(x) or not np.ptp(y):
            continue
        drawn = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
        out[column] = dict(x=x.tolist(), fid=y.tolist())
        for name, prepare in (("pearson", np.asarray), ("spearman", lambda v: rankdata(v, axis=-1))):
            r, again = (pearson(prepare(a), prepare(b)) for a, b in ((x, y), (x[drawn], y[drawn])))
            out[column][name] = [float(r), *np.nanpercentile(again, [2.5, 97.5]).tolist()]
    if not out:
        raise ValueError(
            "--correlate: a correlation needs four rows with a fid and with a metric or accuracy, not all equal"
        )
    return out


def report_correlations(found, path):
    """What correlate() found -> a table and a PNG, one panel a column."""
    rows = [("against FID", "n", "Pearson r [95% interval]", "Spearman r [95% interval]")]
    figure = Figure(figsize=(2.6 * len(found) + 0.4, 3), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (column, f) in zip(axes, found.items()):
        cells = ["{:+.3f} [{:+.2f}, {:+.2f}]".format(*f[name]) for name in ("pearson", "spearman")]
        rows.append((LABELS[column], str(len(f["x"])), *cells))
        ends = np.array([min(f["x"]), max(f["x"])])
        axis.scatter(f["x"], f["fid"], s=18, alpha=0.8)
        axis.plot(ends, np.polyval(np.polyfit(f["x"], f["fid"], 1), ends), color="black", linewidth=1)
        axis.set_title(f"Pearson {cells[0]}", fontsize=9)
        axis.set_xlabel(LABELS[column])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("FID (lower is better)")
    figure.savefig(path, dpi=110)
    show_table(rows)


def show_table(rows):
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    print("\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows) + "\n")
