"""Does alignment speed up training, and which half of iREPA does it? Five arms, several seeds, one command.

    python experiments/convergence.py --data cifar10_train.zip                  two CPU cores, the HOG teacher
    python experiments/convergence.py                                           the same on drawn shapes, no data
    python experiments/convergence.py --data cifar10_train.zip --budget gpu --seeds 0
    python experiments/convergence.py --data cifar10_train.zip --encoder timm:test_vit3 --encoder-weights vit.pt \\
        --learn-teacher --out runs/convergence-vit
    python experiments/convergence.py --budget paper --processes 8 --data data/imagenet/train --inception FILE \\
        --reference VIRTUAL.stats.npz --encoder dinov2_vitb14 -- --latents data/imagenet/latents-256

Each arm and seed is a run of train.py in OUT/ARM-seedN, trained in equal legs; after each leg sample.py draws images
from its EMA, and their Frechet distance to the training images is taken. What follows `--` goes to train.py for all
arms. With one seed, all arms have the same initial trunk, data order, noise, times, label drops and sample noise.
A comparison that was stopped goes on when it is started again; arms and seeds can be added to a finished one.

The distance is FID where --inception gives the weights. Without it, it is `FD-classifier`: the same distance between
the penultimate features of a small network that is trained here to classify the same images. It compares the arms of
one comparison; it is no FID, and not comparable to any.

OUT holds results.json (all curves), table.md, curves.png, samples.png (the arms' images from the same noise).
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from inputs.images import Folder, Shapes, line  # noqa: E402
from inputs.latents import write_whole  # noqa: E402
from inputs.teachers import fast_bf16, read_weights  # noqa: E402

# The halves are REPA with one of iREPA's two changes, at REPA's coefficient of 0.5: the paper gives the coefficient 1
# to the whole of iREPA only. `-- --proj-coeff X` gives one to all.
ARMS = {
    "sit": "--method sit",
    "repa": "--method repa",
    "irepa": "--method irepa",
    "conv-only": "--method repa --projector conv",
    "norm-only": "--method repa --gamma 0.6",
}
COLOURS = {
    "sit": "tab:gray",
    "repa": "tab:blue",
    "irepa": "tab:red",
    "conv-only": "tab:orange",
    "norm-only": "tab:green",
}
# flags: of train.py; points: number of legs; images, sampling: of sample.py; learn: steps of the classifier, 128 images
BUDGETS = {
    "minutes": dict(
        flags="--image-size 32 --model SiT-S/4 --hidden-size 128 --depth 4 --num-heads 2 --encoder-depth 2"
        " --projector-dim 512 --batch-size 32 --steps 1600 --lr 2e-3 --warmup 100 --ema 0.995 --log-every 100",
        points=4, images=500, sampling="--sampler heun --steps 10", learn=1000,
    ),
    "gpu": dict(
        flags="--image-size 32 --model SiT-S/2 --batch-size 256 --steps 1200 --lr 5e-4 --warmup 100 --ema 0.995"
        " --log-every 100",
        points=4, images=2000, sampling="--sampler heun --steps 20 --batch-size 500", learn=3000,
    ),
    "paper": dict(
        flags="--image-size 256 --model SiT-XL/2 --batch-size 256 --steps 400000 --lr 1e-4 --ema 0.9999"
        " --log-every 500",
        points=8, images=50_000, sampling="--sampler sde --steps 250 --batch-size 64", learn=20_000,
    ),
}  # fmt: skip
OURS = "method align data demo encoder encoder-weights seed out resume cache-latents list-encoders".split()


# ---------------------------------------------------------------------------------------------------------------
# What is learned here: the classifier of the distance, and the teacher


class Classifier(nn.Module):
    """uint8 [B, 3, H, W] -> logits [B, classes]; .features(images) -> [B, 128]. A residual network for 32 px.

    Larger images are averaged down to 32 px first: the distance does not see what is finer.
    """

    def __init__(self, classes, width=32):
        super().__init__()
        widths = [width, width, 2 * width, 4 * width]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages, self.shortcuts = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            stride = 1 if i == 0 else 2
            first = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
            self.stages.append(nn.Sequential(*first, nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)))
            self.shortcuts.append(nn.Conv2d(a, b, 1, stride))
        self.head = nn.Linear(4 * width, classes)

    def features(self, images):
        x = images.float() / 127.5 - 1
        if x.shape[-1] > 32:
            x = F.adaptive_avg_pool2d(x, 32)
        x = self.stem(x)  # (B, 32, 16, 16)
        for stage, shortcut in zip(self.stages, self.shortcuts):
            x = F.relu(stage(x) + shortcut(x))  # (B, 32, 16, 16), (B, 64, 8, 8), (B, 128, 4, 4)
        return x.mean((2, 3))  # (B, 128)

    def forward(self, images):
        return self.head(self.features(images))  # (B, classes)


def fit(network, data, seen, unseen, steps, device, desc):
    """Train network(images) -> logits on data[seen] by cross-entropy, in place -> accuracy on data[unseen].

    AdamW with one cycle of the learning rate, batches of 128, flips, shifts by up to an eighth of the side.
    """
    rng, parameters = np.random.default_rng(0), [p for p in network.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps, pct_start=0.2)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device))
    network.to(device).train()
    bar = tqdm(range(steps), desc, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30)
    for _ in bar:
        images, labels = (a.to(device) for a in data[np.sort(rng.choice(seen, 128))])
        flips = torch.from_numpy(rng.random(128) < 0.5).to(device)
        images = torch.where(flips[:, None, None, None], images.flip(3), images)
        side = images.shape[-1]
        top, left = rng.integers(0, side // 4 + 1, 2)  # one shift a batch is cheap
        images = F.pad(images.float(), [side // 8] * 4, "reflect")[..., top : top + side, left : left + side]
        with autocast:
            loss = F.cross_entropy(network(images), labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
        cycle.step()
    network.eval()
    right = 0
    with torch.no_grad():
        for part in np.array_split(unseen, -(-len(unseen) // 256)):
            images, labels = data[part]
            right += (network(images.to(device)).argmax(1).cpu() == labels).sum().item()
    return right / len(unseen)


def parts_of(data):
    """(indices that are learned from, up to 5,000 others for the accuracy), both of train.py's training images."""
    training, _ = train.split(len(data))
    order = np.random.default_rng(1).permutation(training)
    few = min(5000, len(order) // 10)
    return np.sort(order[few:]), np.sort(order[:few])


def classifier_for(path, data, steps, device):
    """The classifier in `path`, which is trained and written there if it is absent -> (network, its accuracy)."""
    torch.manual_seed(0)
    network = Classifier(len(data.classes))
    if not path.exists():
        accuracy = fit(network, data, *parts_of(data), steps, device, "classifier")
        state = dict(state_dict=network.state_dict(), accuracy=accuracy, classes=data.classes, steps=steps)
        write_whole(path, lambda f: torch.save(state, f))
    state = sample.read_checkpoint(path)
    if state.get("classes") != data.classes or "accuracy" not in state:
        raise ValueError(f"{path} is no classifier of these classes: name another file, or delete it")
    network.load_state_dict(state["state_dict"])
    return network.eval().requires_grad_(False).to(device), state["accuracy"]


def learn_teacher(name, path, data, steps, grid, device):
    """A timm ViT trained to classify `data`, written to `path` as --encoder-weights reads it -> its accuracy.

    It sees what teachers.ViT will show it: images normalised, and resized so that each of grid x grid patches is one
    of ours. Its head keeps the size of timm's config, because timm then reads the file strictly.
    """
    import timm  # late: 1.5 s that nothing else here waits for

    if path.exists():
        return sample.read_checkpoint(path).get("accuracy")
    model_id = name.removeprefix("timm:")
    if name == model_id or not timm.is_model(model_id) or not model_id.startswith(("vit", "test_vit", "deit")):
        raise ValueError(f"--learn-teacher takes --encoder timm:<a ViT id of timm>, such as timm:test_vit3, not {name}")
    cfg = timm.get_pretrained_cfg(model_id)
    with torch.device("meta"):
        patch = timm.create_model(model_id).patch_embed.patch_size[0]
    torch.manual_seed(0)
    model = timm.create_model(model_id, img_size=grid * patch)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (cfg.mean, cfg.std))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            x = (images.float() / 255 - mean) / std
            x = F.interpolate(x, (grid * patch, grid * patch), mode=cfg.interpolation, align_corners=False)
            return model(x)[:, : len(data.classes)]

    accuracy = fit(Network(), data, *parts_of(data), steps, device, "teacher")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = dict(state_dict=model.cpu().state_dict(), accuracy=accuracy, steps=steps)
    write_whole(path, lambda f: torch.save(state, f))
    read_weights(path)  # as the loop will
    return accuracy


# ---------------------------------------------------------------------------------------------------------------
# The distance


@torch.no_grad()
def moments_of(features, batches, device):
    """(mu, sigma) of features(images) over batches of uint8 [B, 3, H, W]."""
    moments = None
    for images in batches:
        x = features(images.to(device)).float().cpu()
        moments = moments or fid.Moments(x.shape[1])
        moments.add(x)
    return moments.result()


def batches_of(data, indices, size=250):
    for i in range(0, len(indices), size):
        yield data[indices[i : i + size]][0]


def batches_of_npz(path, size=250):
    images = np.load(path)["arr_0"]
    for i in range(0, len(images), size):
        yield torch.from_numpy(images[i : i + size]).permute(0, 3, 1, 2)


def meter(args, data, images, steps, device):
    """-> (distance(batches) to the training images or --reference, facts about it for results.json)."""
    if args.inception:
        network, digest = fid.load_inception(args.inception, device)
        features, facts = lambda x: network(x)[0], dict(name="FID", inception_sha256=digest)
    else:
        path = Path(args.classifier or f"{args.out}/classifier.pt")
        network, accuracy = classifier_for(path, data, steps, device)
        features, facts = network.features, dict(name="FD-classifier", classifier_accuracy=accuracy)
    training, unseen = train.split(len(data))[0], parts_of(data)[1]
    if args.reference:
        stored = np.load(args.reference)
        if not {"mu", "sigma"} <= set(stored):
            raise ValueError(f"--reference {args.reference} holds no mu and sigma: make it with fid.py --save-stats")
        reference = stored["mu"], stored["sigma"]
    else:
        bar = tqdm(batches_of(data, training), "reference", -(-len(training) // 250), leave=False)
        reference = moments_of(features, bar, device)

    def distance(batches):
        return fid.frechet_distance(*moments_of(features, batches, device), *reference)

    # what as many photographs would get: no arm can be expected below it
    facts.update(images=images, of_real_images=distance(batches_of(data, unseen[:images])))
    facts.update(real_images=len(unseen[:images]))
    return distance, facts


# ---------------------------------------------------------------------------------------------------------------
# Train, sample, measure


def call(module, flags, processes):
    """train.py or sample.py with flags: here, or under torchrun on several processes."""
    if processes == 1:
        return module.main(flags)
    run = subprocess.run(["torchrun", f"--nproc_per_node={processes}", module.__file__, *flags])
    if run.returncode:
        raise SystemExit(run.returncode)  # it has said why


def leg(folder, flags, step, processes):
    """Train the run in `folder` up to `step`, from wherever it is."""
    last = folder / "last.pt"
    if last.exists() and sample.read_checkpoint(last)["step"] >= step:
        return
    if last.exists() or (folder / "config.json").exists():
        flags = [*flags, "--resume"]
    elif folder.exists():
        folder.rmdir()  # stopped before it wrote anything
    call(train, [*flags, "--out", str(folder), "--steps", str(step)], processes)


def measure(folder, step, plan, distance, processes):
    """Samples of the EMA at `step` -> OUT/ARM-seedN/samples.npz; their distance is added to distance.jsonl."""
    npz = folder / f"samples-{step}.npz"
    if not npz.exists():  # what bears the name is whole
        flags = f"--ckpt {folder}/last.pt --num {plan['images']} --labels balanced --seed 0 {plan['sampling']}"
        call(sample, [*flags.split(), "--npz", str(npz), *plan["decoder"]], processes)
    row = dict(step=step, distance=distance(batches_of_npz(npz)))
    with open(folder / "distance.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    for old in folder.glob("samples-*.npz"):  # only the last set is kept
        if old != npz:
            old.unlink()


def rows_of(path):
    """The rows of a .jsonl, without a half-written last one; none if there is no file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(row) for row in text.splitlines(keepends=True) if row.endswith("}\n")]


# ---------------------------------------------------------------------------------------------------------------
# What came out


def collect(out, arms, seeds):
    """The curves of the runs that have begun: a list of dict(arm, seed, steps, held_out, points, distance)."""
    runs = []
    for arm in arms:
        for seed in seeds:
            folder = out / f"{arm}-seed{seed}"
            log, far = rows_of(folder / "log.jsonl"), rows_of(folder / "distance.jsonl")
            curves = dict(steps=[r["step"] for r in log], held_out=[r["held_out"] for r in log])
            curves.update(align=[r["align"] for r in log], images_per_s=[r["images_per_s"] for r in log])
            curves.update(points=[r["step"] for r in far], distance=[r["distance"] for r in far])
            if log:
                runs.append(dict(arm=arm, seed=seed, **curves))
    return runs


def at(run, metric, step):
    """A run's held_out or distance at a step, or None."""
    steps = run["steps" if metric == "held_out" else "points"]
    return run[metric][steps.index(step)] if step in steps else None


def mean_spread(values, digits):
    """'mean ± standard deviation' of several seeds; one value has no spread."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(runs, step, facts):
    """Markdown: an arm a row, at `step`: mean ± standard deviation over seeds; differences are of equal seeds."""
    name = facts["name"]
    lines = [
        f"Step {step}; {name} of {facts['images']} samples to the training images; {facts['real_images']} photographs"
        f" that the classifier did not learn from have {facts['of_real_images']:.2f}."
        if name != "FID"
        else f"Step {step}; FID of {facts['images']} samples; {facts['real_images']} real images have"
        f" {facts['of_real_images']:.2f}.",
        "",
        f"| arm | seeds | held-out loss | below sit, same seed | {name} | below sit, same seed | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    base = {run["seed"]: run for run in runs if run["arm"] == "sit"}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm and at(run, "distance", step) is not None]
        cells = [arm, str(len(own))]
        for metric, digits in (("held_out", 4), ("distance", 3)):
            pairs = [(at(run, metric, step), base.get(run["seed"])) for run in own]
            less = [at(sit, metric, step) - v for v, sit in pairs if sit and at(sit, metric, step) is not None]
            cells += [mean_spread([v for v, _ in pairs], digits), mean_spread(less, digits) if arm != "sit" else ""]
        speeds = [statistics.median(run["images_per_s"]) for run in own]
        lines.append(f"| {' | '.join(cells)} | {statistics.median(speeds) if speeds else 0:.0f} |")
    return "\n".join(lines) + "\n"


def plot(runs, facts, path):
    """Held-out loss and distance against steps: the mean over seeds, from least to most as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, metric, label in zip(axes, ("held_out", "distance"), ("held-out denoising loss", facts["name"])):
        ends = []
        for arm in dict.fromkeys(run["arm"] for run in runs):
            own = [run for run in runs if run["arm"] == arm]
            steps = sorted({s for run in own for s in run["steps" if metric == "held_out" else "points"]})
            steps = [s for s in steps if all(at(run, metric, s) is not None for run in own)]
            values = np.array([[at(run, metric, s) for s in steps] for run in own])
            if not steps:
                continue
            axis.plot(steps, values.mean(0), color=COLOURS[arm], marker="o" if metric == "distance" else None)
            axis.fill_between(steps, values.min(0), values.max(0), color=COLOURS[arm], alpha=0.15, linewidth=0)
            ends.append([values[:, -1].mean(), steps[-1], arm])
        axis.set(xlabel="step", ylabel=label, yscale="log")
        if metric == "distance":
            axis.axhline(facts["of_real_images"], color="black", linestyle=":", linewidth=1)
        axis.grid(alpha=0.3, which="both")
        axis.margins(x=0.02)
        height = None
        for value, step, arm in sorted(ends):  # beside the curves, from below, no two on one another
            wanted = axis.transAxes.inverted().transform(axis.transData.transform((step, value)))[1]
            height = wanted if height is None else max(wanted, height + 0.05)
            axis.annotate(
                arm, (step, value), (1.02, height), textcoords="axes fraction", color=COLOURS[arm], va="center",
                arrowprops=dict(arrowstyle="-", color=COLOURS[arm], linewidth=0.5),
            )  # fmt: skip
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(out, arms, seeds, plan, facts, settings):
    """results.json, table.md, curves.png and samples.png in OUT, from what is there so far."""
    runs = collect(out, arms, seeds)
    done = [s for s in plan["legs"] if any(at(run, "distance", s) is not None for run in runs)]
    everything = dict(settings=settings, distance=facts, runs=runs, **sample.versions())
    text = json.dumps(everything, indent=1)
    write_whole(out / "results.json", lambda f: f.write(text.encode() + b"\n"))
    words = "".join(table(runs, step, facts) + "\n" for step in reversed(done))
    write_whole(out / "table.md", lambda f: f.write(words.encode()))
    plot(runs, facts, out / "curves.png")
    rows = {arm: out / f"{arm}-seed{seeds[0]}" / f"samples-{plan['legs'][-1]}.npz" for arm in arms}
    rows = {arm: next(batches_of_npz(npz, 10)) for arm, npz in rows.items() if npz.exists()}
    if rows:
        sample.save_grid(torch.cat([*rows.values()]), list(rows), out / "samples.png")
    return table(runs, done[-1], facts)


# ---------------------------------------------------------------------------------------------------------------
# Command line


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [flags] [-- flags of train.py]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", metavar="PATH", help="folder of class folders, or a .zip of one; drawn shapes without it")
    add("--budget", default="minutes", choices=BUDGETS, help="sizes of model and run; minutes is for two CPU cores")
    add("--out", default="runs/convergence", metavar="DIR")
    add("--arms", nargs="+", default=[*ARMS], choices=ARMS)
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--encoder", default="hog", help="the teacher, as in train.py")
    add("--encoder-weights", metavar="FILE", help="as in train.py")
    add("--learn-teacher", type=int, nargs="?", const=0, metavar="STEPS", help="make that FILE first, on --data")
    add("--images", type=int, help="samples for the distance")
    add("--inception", metavar="FILE", help="weights as fid.py takes them: the distance is then FID")
    add("--reference", metavar="FILE", help="statistics of fid.py --save-stats, instead of the training images'")
    add("--classifier", metavar="FILE", help="read from, or made for, another comparison; default: OUT/classifier.pt")
    add("--processes", type=int, default=1, help="GPUs: above one, under torchrun")
    add("--device", default="auto", help="as in train.py")
    return parser


def prepare(parser, argv):
    """argv -> (args, plan). plan: flags of train.py for all arms, legs, what sampling takes. ValueError if unfit."""
    argv = [str(a) for a in (sys.argv[1:] if argv is None else argv)]
    cut = argv.index("--") if "--" in argv else len(argv)
    args, extra = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    for name in OURS:
        if any(flag.split("=")[0] == f"--{name}" for flag in extra):
            raise ValueError(f"--{name} after -- is set by convergence.py for each arm; leave it out there")
    if args.reference and not args.inception:
        raise ValueError("--reference holds FID statistics: it goes with --inception FILE")
    if args.learn_teacher is not None and not args.encoder_weights:
        raise ValueError("--learn-teacher writes the file of --encoder-weights: name it")
    if args.processes < 1 or len({*args.seeds}) < len(args.seeds) or len({*args.arms}) < len(args.arms):
        raise ValueError("--processes is at least 1, and --arms and --seeds are named once each")
    plan = dict(BUDGETS[args.budget])
    plan["images"] = args.images or plan["images"]
    if plan["images"] < 2 or (args.learn_teacher or 1) < 1:
        raise ValueError("--images is at least 2, and --learn-teacher at least 1 step")
    flags = [*plan["flags"].split(), *"--lr-schedule constant --ema-warmup --sample-every 0".split()]
    flags += ["--data", args.data] if args.data else ["--demo"]
    flags += ["--encoder", args.encoder, "--device", args.device]
    flags += ["--encoder-weights", args.encoder_weights] if args.encoder_weights else []
    plan["flags"] = [*flags, *extra]
    given = train.build_parser().parse_args(plan["flags"])
    if given.lr_schedule != "constant":
        raise ValueError("the runs are trained in legs: --lr-schedule stays constant")
    if given.steps < plan["points"]:
        raise ValueError(f"--steps {given.steps} are too few for {plan['points']} points of the curve")
    plan["legs"] = [given.steps * (i + 1) // plan["points"] for i in range(plan["points"])]
    plan["decoder"] = ["--device", args.device]
    for name in ("vae", "vae_weights", "latent_stats"):
        if getattr(given, name) is not None:
            plan["decoder"] += [f"--{name.replace('_', '-')}", getattr(given, name)]
    return args, plan, given


def same_comparison(path, settings):
    """Write the settings to `path`, or find them there. ValueError where they differ."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(path, lambda f: f.write(json.dumps(settings, indent=1).encode()))
    old = json.loads(path.read_text())
    for key, value in settings.items():
        if old.get(key) != value:
            raise ValueError(f"{path.parent} was started with {key} {old.get(key)}, not {value}; start another --out")


def main(argv=None):
    parser = build_parser()
    try:
        args, plan, given = prepare(parser, argv)
        device, out = sample.pick_device(args.device), Path(args.out)
        # each leg asks for the same images; decoding CIFAR-10 takes ten seconds
        train.Folder = functools.lru_cache(1)(Folder)
        data = train.Folder(args.data, given.image_size, given.skip_broken, True) if args.data else None
        data = data or Shapes(given.image_size, 10_000)
        settings = dict(train=plan["flags"], images=plan["images"], sampling=plan["sampling"], legs=plan["legs"])
        settings.update(inception=args.inception, reference=args.reference, data_images=len(data))
        same_comparison(out / "settings.json", settings)
        if args.learn_teacher is not None:
            config = train.network(given)
            where = args.encoder, Path(args.encoder_weights), data, args.learn_teacher or plan["learn"]
            accuracy = learn_teacher(*where, config.input_size // config.patch_size, device)
            print(f"the teacher {args.encoder} of {args.encoder_weights} classifies {accuracy:.1%} of unseen images")
            settings["teacher_accuracy"] = accuracy
        distance, facts = meter(args, data, plan["images"], plan["learn"], device)
    except (ValueError, OSError) as e:
        parser.error(line(e))
    if "classifier_accuracy" in facts:
        print(f"FD-classifier: the network classifies {facts['classifier_accuracy']:.1%} of images it did not see")
    todo = [(seed, arm, step) for seed in args.seeds for arm in args.arms for step in plan["legs"]]
    words = ""
    with tqdm(todo, "legs", unit="leg") as bar:
        for seed, arm, step in bar:
            bar.set_description(f"{arm}, seed {seed}, to step {step}")
            folder = out / f"{arm}-seed{seed}"
            if step not in [row["step"] for row in rows_of(folder / "distance.jsonl")]:
                leg(folder, [*plan["flags"], *ARMS[arm].split(), "--seed", str(seed)], step, args.processes)
                measure(folder, step, plan, distance, args.processes)
            words = report(out, args.arms, args.seeds, plan, facts, settings)
    print(f"{words}\n{out}: results.json, table.md, curves.png, samples.png")


if __name__ == "__main__":
    main()
