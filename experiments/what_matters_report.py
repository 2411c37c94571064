"""What came out of experiments/what_matters.py, so far: its table, correlations and figure."""

import json
import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.convergence_report import mean_and_interval, spread
from experiments.spatial_correlations import LABELS, SPELLED, correlate
from plumbing.files import lock, write_text
from plumbing.records import versions

ARMS = ["repa", "irepa"]
TITLES = {"repa": "REPA", "irepa": "iREPA"}


def known(out):
    """({teacher: metrics}, {(teacher, arm, seed): run}) of results.json."""
    file = out / "results.json"
    before = json.loads(file.read_text()) if file.exists() else dict(teachers={}, runs=[])
    return before["teachers"], {(run["teacher"], run["arm"], run["seed"]): run for run in before["runs"]}


def whole_seeds(runs, titles):
    """The runs of those seeds that all teachers have; all runs, where there is no such seed yet.

    Seeds differ more than teachers do: means over others would not compare.
    """
    there = {}
    for run in runs:
        there.setdefault(run["seed"], set()).add((run["teacher"], run["arm"]))
    whole = {seed for seed, found in there.items() if len(found) == 1 + len(ARMS) * len(titles)}
    return [run for run in runs if run["seed"] in whole] if whole else runs


def distances_of(result, name):
    """{teacher: {arm: {seed: distance}}}, None being the teacher of SiT."""
    found = {title: {arm: {} for arm in ARMS} for title in result["teachers"]} | {None: {"sit": {}}}
    for run in whole_seeds(result["runs"], result["teachers"]):
        found[run["teacher"]][run["arm"]][run["seed"]] = run["distance"][name]
    return found


def gains_of(of_arms):
    """{seed: REPA's distance minus iREPA's} where both are there."""
    repa, irepa = (of_arms[arm] for arm in ARMS)
    return {seed: repa[seed] - irepa[seed] for seed in repa if seed in irepa}


def table(result, name, found):
    """Markdown: a teacher a row, its accuracy and structure, the distances of both methods, and what iREPA gains."""
    columns = [c for c in LABELS if any(c in metrics for metrics in result["teachers"].values())]
    out = f"{name} after {result['steps']} steps, means over seeds; SiT without a teacher:"
    out += f" {spread(found[None]['sit'].values(), 2)}; real images: {result['of_real'][name]:.2f}.\n\n"
    out += f"| teacher | {' | '.join(LABELS[c] for c in columns)} | REPA | iREPA | gain |\n"
    out += f"|{'---|' * (len(columns) + 4)}\n"
    for title, metrics in result["teachers"].items():
        gains = gains_of(found[title])
        cells = [title, *(f"{metrics[c][0]:.{1 if 'probe' in LABELS[c] else 3}f}" for c in columns)]
        cells += [spread(found[title][arm].values(), 2) for arm in ARMS]
        cells += [mean_and_interval(gains.values(), 2)]
        out += f"| {' | '.join(cells)} |\n"
    return out


def correlations(result, found):
    """{arm: what correlate() finds over its teachers}, where they are four at least."""
    out = {}
    for arm in ARMS:
        rows = []
        for title, metrics in result["teachers"].items():
            if values := found[title][arm].values():
                rows.append(dict(fid=statistics.mean(values), **{key: value[0] for key, value in metrics.items()}))
        if len(rows) >= 4 and len({row["fid"] for row in rows}) > 1:
            out[arm] = correlate(rows)
    return out


def correlation_table(found, name):
    columns = [*next(iter(found.values()))]
    heads = ["", "n", *(f"{arm}: {r} r" for arm in found for r in ("Pearson", "Spearman"))]
    out = f"Correlation with {name} over the teachers, and 95 % bootstrap intervals:\n\n"
    out += f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
    for column in columns:
        of_arms = [of_arm[column] for of_arm in found.values()]
        rs = [of_arm[r] for of_arm in of_arms for r in ("pearson", "spearman")]
        cells = [LABELS[column], str(len(of_arms[0]["x"])), *("{:+.2f} [{:+.2f}, {:+.2f}]".format(*r) for r in rs)]
        out += f"| {' | '.join(cells)} |\n"
    return out


def draw(result, found, correlated, name, path):
    """A panel for each metric: distances against it, a number a teacher; and the gain of iREPA over REPA, by name."""
    titles = [*result["teachers"]]
    columns = [*next(iter(correlated.values()))]
    rows = -(-(len(columns) + 1) // 3)
    figure = Figure(figsize=(13.5, 4.4 * rows + 0.4), layout="constrained")
    figure.suptitle(f"{name} after {result['steps']} steps against what a teacher is like; each number is a teacher")
    *axes, bars = figure.subplots(rows, 3).flat[: len(columns) + 1]
    for spare in figure.axes[len(columns) + 1 :]:
        spare.remove()
    for axis, column in zip(axes, columns):
        lines = []
        for colour, (arm, of_arm) in zip(("C0", "C3"), correlated.items()):
            x, y = np.array(of_arm[column]["x"]), np.array(of_arm[column]["fid"])
            axis.scatter(x, y, s=14, color=colour, label=TITLES[arm])
            for title, *place in zip([t for t in titles if found[t][arm]], x, y):
                number, beside = str(titles.index(title) + 1), dict(textcoords="offset points", fontsize=9)
                axis.annotate(number, place, (3, 2), color=colour, **beside)
            ends = np.array([x.min(), x.max()])
            axis.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=colour, linewidth=1)
            r, rank = (of_arm[column][kind][0] for kind in ("pearson", "spearman"))
            lines.append(f"{TITLES[arm]}: r {r:+.2f}, of ranks {rank:+.2f}")
        axis.set_xlabel(SPELLED.get(column, LABELS[column]))
        axis.set_title("\n".join(lines), fontsize=10)
        axis.ticklabel_format(useOffset=False)
        axis.grid(alpha=0.3)
        axis.set_ylabel(f"{name} (lower is better)")
    axes[0].legend(fontsize=9)
    for i, title in enumerate(titles):
        if gains := [*gains_of(found[title]).values()]:
            bars.barh(i, statistics.mean(gains), color="C2", alpha=0.5)
            bars.plot(gains, [i] * len(gains), "k.", markersize=4)
        beside = dict(transform=bars.get_yaxis_transform(), fontsize=8, verticalalignment="center")
        bars.text(0.02, i, title, **beside)  # within, where it makes no panel smaller
    low, high = bars.get_xlim()
    bars.set_xlim(low - (high - low) * 0.8, high)
    bars.set_yticks(range(len(titles)), range(1, len(titles) + 1), fontsize=9)
    bars.invert_yaxis()
    bars.axvline(0, color="black", linewidth=1)
    bars.set(xlabel="REPA's distance minus iREPA's, a dot a seed", title="what iREPA gains")
    bars.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=90)


def report(args, teachers, new, facts):
    """Add the runs `new` to results.json, table.md and the figures in OUT -> the tables."""
    out, texts = Path(args.out), []
    with lock(out, wait=True):  # another process may be at other seeds
        others, runs = known(out)
        runs |= {(run["teacher"], run["arm"], run["seed"]): run for run in new}
        result = dict(steps=args.steps, flags=args.flags, teachers=others | teachers, runs=[*runs.values()], **facts)
        write_text(out / "results.json", json.dumps({**result, **versions()}, indent=1) + "\n")
        for i, name in enumerate(facts["of_real"]):
            found = distances_of(result, name)
            texts.append(table(result, name, found))
            if correlated := correlations(result, found):
                texts.append(correlation_table(correlated, name))
                draw(result, found, correlated, name, out / f"what_matters{f'-{name}' if i else ''}.png")
        write_text(out / "table.md", "\n".join(texts))
    return "\n".join(texts)
