"""What came out of a comparison of experiments/convergence.py, so far: its table, curves and samples."""

import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from plumbing.files import write_text
from plumbing.records import rows_of, save_grid, versions


def collect(args):
    """The runs that have begun: dict(arm, seed, images_per_s, and {step: value} of held_out, align, distance)."""
    runs = []
    for arm, seed in itertools.product(args.arms, args.seeds):
        folder = Path(args.out) / f"{arm}-seed{seed}"
        log, far = rows_of(folder / "log.jsonl"), rows_of(folder / "distance.jsonl")
        if log:
            curves = {name: {row["step"]: row[name] for row in log} for name in ("held_out", "align")}
            curves["distance"] = {row["step"]: row["distance"] for row in far}
            speed = statistics.median(row["images_per_s"] for row in log)
            runs.append(dict(arm=arm, seed=seed, images_per_s=speed, **curves))
    return runs


def against_sit(runs, metric):
    """[(arm, {step: value - that of sit with the same seed})] of the runs for which there is one."""
    base = {run["seed"]: run[metric] for run in runs if run["arm"] == "sit"}
    pairs = [(run, base.get(run["seed"], {})) for run in runs if run["arm"] != "sit"]
    return [(run["arm"], {s: v - sit[s] for s, v in run[metric].items() if s in sit}) for run, sit in pairs]


def table(runs, step, facts):
    """Markdown, an arm a row, at `step`: mean ± standard deviation over seeds."""

    def cell(curves, arm, digits):
        values = [curve[step] for name, curve in curves if name == arm and step in curve]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}" if values else "–"

    name = facts["name"]
    out = f"Step {step}, mean ± standard deviation over seeds; {name} of {facts['samples']} samples, where"
    out += f" {facts['real']} real images have {facts['of_real']:.2f}.\n\n"
    out += f"| arm | seeds | held-out loss | minus sit's, same seed | {name} | minus sit's, same seed | images/s |\n"
    out += "|---|---|---|---|---|---|---|\n"
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm and step in run["distance"]]
        cells = [arm, str(len(own))]
        for metric, digits in (("held_out", 4), ("distance", 2)):
            cells += [cell([(arm, run[metric]) for run in own], arm, digits)]
            cells += [cell(against_sit(runs, metric), arm, digits)]
        cells += [f"{statistics.median(run['images_per_s'] for run in own):.0f}" if own else "–"]
        out += f"| {' | '.join(cells)} |\n"
    return out


def plot(runs, arms, facts, path):
    """Held-out loss, its difference to sit's, and distance against steps: mean over seeds, least to most as a band."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    name = f"{facts['name']} (real images: {facts['of_real']:.2f})"
    panels = {
        "held-out denoising loss": [(run["arm"], run["held_out"]) for run in runs],
        "held-out loss minus sit's, same seed": against_sit(runs, "held_out"),
        name: [(run["arm"], run["distance"]) for run in runs],
    }
    for axis, (label, curves) in zip(axes, panels.items()):
        ends = []
        for i, arm in enumerate(arms):
            own = [curve for name, curve in curves if name == arm]
            steps = sorted({step for curve in own for step in curve})
            if steps:
                values = [[curve[step] for curve in own if step in curve] for step in steps]
                mean = [statistics.mean(v) for v in values]
                axis.plot(steps, mean, color=f"C{i}", marker="o" if label == name else None)
                axis.fill_between(steps, [*map(min, values)], [*map(max, values)], color=f"C{i}", alpha=0.15, lw=0)
                ends.append((mean[-1], steps[-1], arm, f"C{i}"))
        axis.set(xlabel="step", ylabel=label, yscale="linear" if "minus" in label else "log")
        axis.grid(alpha=0.3, which="both")
        height = -1.0
        for value, step, arm, colour in sorted(ends):  # beside the curves, from below, no two on one another
            place = axis.transAxes.inverted().transform(axis.transData.transform((step, value)))
            height = max(place[1], height + 0.05)
            axis.text(1.02, height, arm, color=colour, transform=axis.transAxes, va="center")
    axes[1].axhline(0, color="C0", linewidth=1)
    figure.savefig(path, dpi=120)


def report(args, arms, facts):
    """results.json, table.md, curves.png and samples.png in OUT, from what is there so far -> the newest table.

    args: of convergence.py, with legs; arms: all that there could be, each with its colour; facts: on the distance.
    """
    out, runs = Path(args.out), collect(args)
    done = [step for step in args.legs if any(step in run["distance"] for run in runs)]
    paths = "data out encoder_weights inception reference classifier place decoder".split()  # of this machine only
    settings = {k: v for k, v in vars(args).items() if k not in paths}
    everything = dict(settings=settings, distance=facts, runs=runs, **versions())
    write_text(out / "results.json", json.dumps(everything, indent=1) + "\n")
    tables = [table(runs, step, facts) for step in reversed(done)]
    write_text(out / "table.md", "\n".join(tables))
    plot(runs, arms, facts, out / "curves.png")
    sets = {arm: out / f"{arm}-seed{args.seeds[0]}" / f"samples-{args.legs[-1]}.npz" for arm in args.arms}
    rows = {arm: np.load(npz)["arr_0"][:10] for arm, npz in sets.items() if npz.exists()}  # (10, S, S, 3) each
    if rows:
        images = torch.from_numpy(np.concatenate([*rows.values()])).permute(0, 3, 1, 2)
        save_grid(images, [*rows], out / "samples.png")
    return tables[0]
