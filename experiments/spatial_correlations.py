"""What a teacher's spatial structure says of generation: each metric against FID, over a table of encoders."""

import csv
import io
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from plumbing.files import one_line, write_text

PUBLISHED = Path(__file__).with_name("encoder_table.csv")
LABELS = {
    "accuracy": "linear probe, %",
    "accuracy_patches": "probe of patches, %",
    "lds": "LDS",
    "cds": "CDS",
    "srss": "SRSS",
    "rmsc": "RMSC",
}
SPELLED = {
    "lds": "LDS: local against distant similarity",
    "cds": "CDS: slope at which likeness falls",
    "srss": "SRSS: object against background",
    "rmsc": "RMSC: contrast of the tokens",
}


def read_rows(path):
    """A csv -> ([(encoder or "", {column: number, of fid and LABELS})], its columns). Lines with # are comments."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(text for text in f if not text.startswith("#")))
        numbers = [{k: float(row[k]) for k in ("fid", *LABELS) if row.get(k)} for row in rows]
    except OSError as e:
        raise ValueError(f"--correlate {path} cannot be read: {e.strerror}") from e
    except (TypeError, ValueError, csv.Error) as e:
        raise ValueError(f"--correlate {path}: a table has a column fid and numbers ({one_line(e)})") from e
    if not rows:
        raise ValueError(f"--correlate {path} has no rows")
    return [(row.get("encoder") or "", found) for row, found in zip(rows, numbers)], rows[0].keys()


def read_table(paths, measured=None):
    """The rows of a csv with a column fid and some of LABELS, as numbers -> [{"encoder": name or "", column: number}].

    What a row lacks is filled in, by its column encoder, from measured, {encoder: {metric: value}}, and from the csv
    that come after the first one in `paths`, which need no fid. ValueError where two of these have the same encoder.
    """
    first, *others = paths
    rows, columns = read_rows(first)
    if "fid" not in columns:
        raise ValueError(f"--correlate {first}: a table has a column fid and numbers (fid is missing)")
    known = dict(measured or {})
    for path in others:
        for name, numbers in read_rows(path)[0]:
            if name in known:
                raise ValueError(f"--correlate {path}: {name} is measured twice, here and before; leave one out")
            if name:
                known[name] = numbers
    return [{"encoder": name, "fid": np.nan, **known.get(name, {}), **numbers} for name, numbers in rows]


def write_table(path, measured, fids):
    """{encoder: {metric: value}} and {encoder: fid}, which may lack some, -> a csv that read_table reads."""
    text = io.StringIO()
    columns = ["fid", *(c for c in LABELS if any(c in found for found in measured.values()))]
    table = csv.DictWriter(text, ["encoder", *columns], lineterminator="\n")
    table.writeheader()
    for name, found in measured.items():
        numbers = {"fid": fids.get(name, np.nan), **found}
        table.writerow({"encoder": name, **{c: v for c, v in numbers.items() if np.isfinite(v)}})
    write_text(path, text.getvalue())


def pearson(a, b):
    """Correlation along the last axis; NaN where one of them is constant."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def correlate(table, draws=10_000):
    """-> {column: dict(x, fid, encoder, pearson, spearman)}, each r as [r, low, high]: 95% intervals from rows drawn
    again with replacement. Columns that are constant or have fewer than four points are left out; ValueError if that is
    all."""
    out = {}
    for column in LABELS:
        points = np.array([[row.get(column, np.nan), row["fid"]] for row in table]).reshape(-1, 2)
        there = np.isfinite(points).all(1)
        x, y = points[there].T
        if len(x) < 4 or not np.ptp(x) or not np.ptp(y):
            continue
        drawn = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
        names = [row.get("encoder", "") for row, kept in zip(table, there) if kept]
        out[column] = dict(x=x.tolist(), fid=y.tolist(), encoder=names)
        for name, prepare in (("pearson", np.asarray), ("spearman", lambda v: rankdata(v, axis=-1))):
            r, again = (pearson(prepare(a), prepare(b)) for a, b in ((x, y), (x[drawn], y[drawn])))
            out[column][name] = [float(r), *np.nanpercentile(again, [2.5, 97.5]).tolist()]
    if not out:
        raise ValueError(
            "--correlate: a correlation needs four rows with a fid and with a metric or accuracy, not all equal"
        )
    return out


def report_correlations(found, path):
    """What correlate() found -> a table and a PNG, one panel a column, and a number for each encoder with a name."""
    rows = [("against FID", "n", "Pearson r [95% interval]", "Spearman r [95% interval]")]
    numbers = {}
    for f in found.values():  # in the order of their FID
        for _, name in sorted(zip(f["fid"], f["encoder"])):
            if name:
                numbers.setdefault(name, len(numbers) + 1)
    wide = -(-(len(found) + 1) // 2)
    figure = Figure(figsize=(4.4 * wide, 8.4), layout="constrained")
    figure.suptitle("FID of the transformer against what its teacher is like")
    *axes, names = figure.subplots(2, wide).flat[: len(found) + 1]
    for spare in figure.axes[len(found) :]:
        spare.axis("off")
    for axis, (column, f) in zip(axes, found.items()):
        cells = ["{:+.3f} [{:+.2f}, {:+.2f}]".format(*f[name]) for name in ("pearson", "spearman")]
        rows.append((LABELS[column], str(len(f["x"])), *cells))
        ends = np.array([min(f["x"]), max(f["x"])])
        axis.scatter(f["x"], f["fid"], s=18, alpha=0.8)
        for name, *place in zip(f["encoder"], f["x"], f["fid"]):
            if name:
                axis.annotate(numbers[name], place, (3, 2), textcoords="offset points", fontsize=8)
        axis.plot(ends, np.polyval(np.polyfit(f["x"], f["fid"], 1), ends), color="black", linewidth=1)
        axis.set_title(f"Pearson r {cells[0]}", fontsize=10)
        axis.set_xlabel(SPELLED.get(column, LABELS[column]))
        axis.set_ylabel("FID (lower is better)")
        axis.grid(alpha=0.3)
    words = "\n".join(f"{i}  {name}" for name, i in numbers.items())
    names.text(0, 1, words, va="top", fontsize=8, transform=names.transAxes)
    figure.savefig(path, dpi=90)
    show_table(rows)


def ranks(values, draws=2000):
    """float [encoders, N], of the same N images -> int [encoders, 3]: rank (1 has the largest mean) and its 95%
    interval, over means of images drawn again with replacement, the same for all encoders."""
    values = values[:, np.isfinite(values).all(0)]
    drawn = np.random.default_rng(0).integers(values.shape[1], size=(draws, values.shape[1]))
    means = np.stack([v[drawn].mean(1) for v in values])  # (encoders, draws)
    low, high = np.percentile(rankdata(-means, "min", axis=0), [2.5, 97.5], axis=1, method="nearest")
    return np.stack([rankdata(-values.mean(1), "min"), low, high], axis=1).astype(int)


def verdict(order, untrained):
    """What a ranking (names, best first) does and does not predict, for a person."""
    table = read_table([PUBLISHED])
    r = {k: f"{v['pearson'][0]:.2f}" for k, v in correlate(table, draws=100).items()}
    metrics = ", ".join(f"{LABELS[m]} {r[m]}" for m in r if m != "accuracy")
    words = (
        f"Over the {len(table)} published encoders FID falls as the metrics rise (Pearson r {metrics}; accuracy"
        f" {r['accuracy']}): of two such encoders the one ranked higher here is the likelier good teacher. This is"
        " a correlation, measured for SiT-XL/2 with REPA after 100K steps and on other images: no cause, no forecast of"
        " a FID, and nothing about untrained features."
    )
    floor = [name for name in order if name in untrained]
    below = [name for name in order[order.index(floor[0]) :] if name not in untrained] if floor else []
    if below:
        words += f" Here {floor[0]}, untrained, ranks above {', '.join(below)}: structure is not all."
    return textwrap.fill(words, 110)


def show_table(rows):
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    print("\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows) + "\n")
