"""What came out of a comparison of experiments/convergence.py, so far: its table, curves and samples."""

import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import t

import fid
from plumbing.files import lock, write_text
from plumbing.records import plain_ticks, rows_of, save_grid, versions


def collect(args):
    """The runs so far: dict(arm, seed, images_per_s, held_out, align and distance, by name, each {step: value}).

    Those of results.json, and what is newer in folders: who needs the room may delete these.
    """
    file, runs = Path(args.out) / "results.json", {}
    for run in json.loads(file.read_text())["runs"] if file.exists() else []:
        curves = {k: by_step(v) for k, v in run.items() if k in ("held_out", "align")}
        distance = {name: by_step(curve) for name, curve in run["distance"].items()}
        runs[run["arm"], run["seed"]] = dict(run, **curves, distance=distance)
    for arm, seed in itertools.product(args.arms, args.seeds):
        folder = Path(args.out) / f"{arm}-seed{seed}"
        log, far = rows_of(folder / "log.jsonl"), rows_of(folder / "distance.jsonl")
        if log:
            old = runs.get((arm, seed), dict(held_out={}, align={}, distance={}))
            curves = {key: old[key] | {row["step"]: row[key] for row in log} for key in ("held_out", "align")}
            names = dict.fromkeys([*old["distance"], *(name for row in far for name in row if name != "step")])
            distance = {
                name: old["distance"].get(name, {}) | {row["step"]: row[name] for row in far if name in row}
                for name in names
            }
            speed = statistics.median(row["images_per_s"] for row in log)
            runs[arm, seed] = dict(arm=arm, seed=seed, images_per_s=speed, **curves, distance=distance)
    order = [*dict.fromkeys([*args.arms, *(arm for arm, _ in runs)])]
    return sorted(runs.values(), key=lambda run: (order.index(run["arm"]), run["seed"]))


def by_step(curve):
    return {int(step): value for step, value in curve.items()}  # keys of JSON are text


def measured(args, arm, seed, step):
    """Whether the distances of this run are known at `step`."""
    found = [run["distance"] for run in collect(args) if (run["arm"], run["seed"]) == (arm, seed)]
    return bool(found) and bool(found[0]) and all(step in curve for curve in found[0].values())


# ---- What the seeds say ----


def by_seed(runs, arm, curve_of):
    """{seed: curve {step: value}} of an arm."""
    return {run["seed"]: curve_of(run) for run in runs if run["arm"] == arm}


def against(curves, base):
    """{seed: {step: value - that of the base with the same seed}} where there is one."""
    both = {seed: (curve, base[seed]) for seed, curve in curves.items() if seed in base}
    return {seed: {s: v - other[s] for s, v in curve.items() if s in other} for seed, (curve, other) in both.items()}


def interval(values):
    """95 % interval of the mean of a few seeds' values, by Student's t; None for fewer than three.

    Of a bootstrap's, which draws seeds again, only four in five hold the mean of a normal variable at four seeds.
    """
    values = [*values]
    if len(values) < 3:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def passage(curve, goal):
    """The step at which a curve {step: distance} first is at `goal`: between two measured steps its logarithm is
    linear, before the first it is that one. None where it does not come to it."""
    before = None
    for step, value in sorted(curve.items()):
        if value <= goal:
            if before is None:
                return float(step)
            (s, v) = before
            return s + (step - s) * float((np.log(v) - np.log(goal)) / (np.log(v) - np.log(value)))
        before = step, value
    return None


def speedup(curve, base):
    """How many times fewer steps a run takes to the last distance of `base`, its partner of the same seed; None where
    it does not come to it."""
    goal = base[max(base)]
    own = passage(curve, goal)
    return own and passage(base, goal) / own


# ---- Table and curves ----


def mean_and_interval(values, digits):
    """Mean [95 % interval] of some numbers, a dash of none."""
    values = [*values]
    around = interval(values)
    text = f"{statistics.mean(values):.{digits}f}" if values else "–"
    return text + (f" [{around[0]:.{digits}f}, {around[1]:.{digits}f}]" if around else "")


def spread(values, digits):
    """Mean ± standard deviation of some numbers, a dash of none."""
    values = [*values]
    error = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}" if values else "–"


def table(runs, step, facts, base):
    """Markdown, an arm a row, at `step`: mean ± standard deviation over seeds, differences with their intervals."""
    metrics = {"held-out loss": (lambda run: run["held_out"], 4)}
    metrics |= {name: (lambda run, name=name: run["distance"][name], 2) for name in facts["of_real"]}
    done = [run for run in runs if all(step in run["distance"].get(name, ()) for name in facts["of_real"])]
    real = ", ".join(f"{name} {value:.2f}" for name, value in facts["of_real"].items())
    out = f"Step {step}: mean ± standard deviation over seeds, 95 % intervals of differences; distances of"
    out += f" {facts['samples']} samples; {facts['real']} real images have {real}.\n\n"
    heads = ["arm", "seeds", *itertools.chain(*((name, f"minus {base}'s, same seed") for name in metrics)), "images/s"]
    out += f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
    for arm in dict.fromkeys(run["arm"] for run in done):
        own = [run for run in done if run["arm"] == arm]
        cells = [arm, str(len(own))]
        for curve_of, digits in metrics.values():
            curves = by_seed(done, arm, curve_of)
            values = [curve[step] for curve in curves.values()]
            gaps = against(curves, by_seed(done, base, curve_of)) if arm != base else {}
            cells += [spread(values, digits), mean_and_interval([gap[step] for gap in gaps.values()], digits)]
        cells += [f"{statistics.median(run['images_per_s'] for run in own):.0f}"]
        out += f"| {' | '.join(cells)} |\n"
    return out


def speedups(runs, step, facts, base):
    """Markdown: how many times fewer steps, and seconds, each arm takes to the distance that the run of the arm `base`
    with the same seed has at `step`."""
    rows = []
    for name in facts["of_real"]:
        done = [run for run in runs if step in run["distance"].get(name, ())]
        speed = {(run["arm"], run["seed"]): run["images_per_s"] for run in done}
        for arm in dict.fromkeys(run["arm"] for run in done):
            own, others = (by_seed(done, which, lambda run: run["distance"][name]) for which in (arm, base))
            times = {seed: speedup(own[seed], others[seed]) for seed in own if seed in others}
            if arm != base and times:
                short = [*times.values()].count(None)
                cells = [f"not reached by {short}"] * 2
                if not short:  # fewer steps, each of which takes longer
                    seconds = [times[seed] * speed[arm, seed] / speed[base, seed] for seed in times]
                    cells = [mean_and_interval(values, 2) for values in (times.values(), seconds)]
                rows.append([name, arm, str(len(times)), *cells])
    if not rows:
        return ""
    out = f"To {base}'s distance at step {step} with the same seed, times fewer, and 95 % intervals:\n\n"
    out += f"| distance | arm | seeds | steps | seconds |\n{'|---' * 5}|\n"
    return out + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot(runs, arms, facts, base, path):
    """Held-out loss, its difference to the arm `base`, and each distance against steps: the mean over seeds, least to
    most as a band."""

    def curves_of(curve_of):
        return {arm: by_seed(runs, arm, curve_of) for arm in arms}

    held_out = curves_of(lambda run: run["held_out"])
    panels = {"held-out denoising loss": held_out}
    panels[f"held-out loss minus {base}'s, same seed"] = {
        arm: against(curves, held_out.get(base, {})) for arm, curves in held_out.items() if arm != base
    }
    for name, real in facts["of_real"].items():
        panels[f"{name} (real images: {real:.2f})"] = curves_of(lambda run, name=name: run["distance"].get(name, {}))
    rows = 2 if len(panels) > 3 else 1
    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(5.3 * columns, 4 * rows), layout="constrained")
    for axis, (label, curves) in zip(figure.subplots(rows, columns).flat, panels.items()):
        ends, is_distance = [], "real images" in label
        for i, arm in enumerate(arms):
            own = [*curves.get(arm, {}).values()]
            steps = sorted({step for curve in own for step in curve})
            if steps:
                values = [[curve[step] for curve in own if step in curve] for step in steps]
                mean = [statistics.mean(v) for v in values]
                axis.plot(steps, mean, color=f"C{i}", marker="o" if is_distance else None)
                axis.fill_between(steps, [*map(min, values)], [*map(max, values)], color=f"C{i}", alpha=0.15, lw=0)
                ends.append((mean[-1], steps[-1], arm, f"C{i}"))
        axis.set(xlabel="step", ylabel=label, yscale="linear" if "minus" in label else "log")
        plain_ticks(axis.yaxis)
        axis.grid(alpha=0.3, which="both")
        height = -1.0
        for value, step, arm, colour in sorted(ends):  # beside the curves, from below, no two on one another
            place = axis.transAxes.inverted().transform(axis.transData.transform((step, value)))
            height = max(place[1], height + 0.05)
            axis.text(1.02, height, arm, color=colour, transform=axis.transAxes, va="center")
        if "minus" in label:
            axis.axhline(0, color="C0", linewidth=1)
    seeds = max(len(curves) for of_arms in panels.values() for curves in of_arms.values())
    bands = "the mean over seeds, bands from the least to the most" if seeds > 1 else "one seed"
    figure.suptitle(f"training by arm: {bands}; lower is better")
    figure.savefig(path, dpi=120)


def report(args, facts):
    """results.json, table.md, curves.png and samples.png in OUT, from what is there so far -> the newest tables.

    args: of convergence.py, with legs, the first arm being the base of differences; facts: on the distances.
    """
    with lock(args.out, wait=True):  # another process may be at other seeds
        return write_report(args, facts)


def write_report(args, facts):
    out, runs = Path(args.out), collect(args)
    done = [step for step in args.legs if any(step in c for run in runs for c in run["distance"].values())]
    paths = "data out encoder_weights tokens inception reference classifier place decoder".split()
    settings = {k: v for k, v in vars(args).items() if k not in paths}  # these are of this machine only
    everything = dict(settings=settings, distance=facts, runs=runs, **versions())
    write_text(out / "results.json", json.dumps(everything, indent=1) + "\n")
    base = args.arms[0]
    tables = [speedups(runs, args.legs[-1], facts, base), *(table(runs, step, facts, base) for step in reversed(done))]
    write_text(out / "table.md", "\n".join(tables))
    plot(runs, args.arms, facts, base, out / "curves.png")
    sets = {arm: out / f"{arm}-seed{args.seeds[0]}" / f"samples-{args.legs[-1]}.npz" for arm in args.arms}
    rows = {arm: first_of(npz, min(10, args.images)) for arm, npz in sets.items() if npz.exists()}
    if rows:
        save_grid(torch.cat([*rows.values()]), [*rows], out / "samples.png")
    return "\n".join(tables[:2])


def first_of(npz, count):
    return next(fid.Npz(npz).batches(0, count, count))  # (count, 3, S, S)
