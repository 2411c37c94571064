"""Does alignment speed up training, and which half of iREPA does it? Five arms, several seeds, one command.

    python -m experiments.convergence --data cifar10_train.zip                 two CPU cores, the HOG teacher
    python -m experiments.convergence                                          the same on drawn shapes, no data
    python -m experiments.convergence --data cifar10_train.zip --budget gpu --seeds 0
    python -m experiments.convergence --data cifar10_train.zip --budget short --sweep --out runs/knobs
    python -m experiments.convergence --data cifar10_train.zip --encoder timm:test_vit --encoder-weights vit.pt \\
        --learn-teacher 1500 --classifier runs/convergence/classifier.pt --out runs/convergence-vit
    python -m experiments.convergence --budget paper --processes 8 --data data/imagenet/train --inception FILE \\
        --reference VIRTUAL_imagenet256_labeled.npz --encoder dinov2_vitb14 -- --latents data/imagenet/latents-256

Each arm and seed is a run of train.py in OUT/ARM-seedN, trained in equal legs; after each leg sample.py draws images
from its EMA, and their Frechet distance to the training images is taken. What follows `--` goes to train.py for all
arms. With one seed, all arms have the same initial trunk, data order, noise, times, label drops and sample noise.
A comparison that was stopped goes on when it is started again; arms and seeds can be added to a finished one.

The distance is FID where --inception gives the weights. Without it, it is `FD-classifier`: the same distance between
the penultimate features of a small network that is trained here to classify the same images. It compares the arms of
one comparison; it is no FID, and not comparable to any. --also takes another in the mean tokens of a teacher, which
should not be that of the arms.

OUT holds results.json (all curves), table.md, curves.png, samples.png (the arms' images from the same noise).
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fid
import sample
import train
from experiments.convergence_report import measured, report
from experiments.learned import classifier_for, learn_teacher, learns, parts_of
from inputs.images import ImageSet
from inputs.shapes import Shapes
from inputs.teachers import load_encoder
from inputs.tokens import Tokens, weights_sha256
from plumbing import jobs
from plumbing.checkpoints import read_checkpoint
from plumbing.files import lock, mistakes, sha256_of, write_text, write_whole
from plumbing.flags import make_parser
from plumbing.processes import STOPPED, fast_bf16, pick_device, settle_compile
from plumbing.records import rows_of
from plumbing.settings import network_config, resolve

PROGRAM = "experiments.convergence"
# The halves are REPA with one of iREPA's two changes, at REPA's coefficient of 0.5: the paper gives the coefficient 1
# to the whole of iREPA only. `-- --proj-coeff X` gives one to all.
ARMS = {
    "sit": "--method sit",
    "repa": "--method repa",
    "irepa": "--method irepa",
    "conv-only": "--method repa --projector conv",
    "norm-only": "--method repa --gamma 0.6",
}
# What a user could choose otherwise, one at a time.
KNOBS = {"irepa": "--method irepa"} | {
    f"{knob}-{value}": f"--method irepa --{knob} {value}"
    for knob, values in {
        "gamma": (0, 0.3, 0.9, 1),
        "kernel-size": (1, 5),
        "proj-coeff": (0.25, 0.5, 2),
        "encoder-depth": (1, 3, 4),
    }.items()
    for value in values
}
# flags: of train.py; points: number of legs; images, sampling: of sample.py; learn: steps of the classifier, 128 images
# The paper's average has a constant decay and its samples random labels. The other budgets are ours: short runs, whose
# average must forget the first weights, and few samples, which are drawn in equal numbers of each class.
BUDGETS = {
    "short": dict(
        flags="--image-size 32 --model SiT-S/4 --hidden-size 128 --depth 4 --num-heads 2 --encoder-depth 2"
        " --projector-dim 512 --batch-size 64 --steps 1000 --lr 2e-3 --warmup 100 --ema 0.99 --ema-warmup"
        " --log-every 100",
        points=2, images=2000, sampling="--labels balanced --sampler heun --steps 10 --batch-size 250", learn=4000,
    ),
    "laptop": dict(
        flags="--image-size 32 --model SiT-S/4 --hidden-size 192 --depth 4 --num-heads 3 --encoder-depth 2"
        " --projector-dim 512 --batch-size 64 --steps 2000 --lr 2e-3 --warmup 100 --ema 0.995 --ema-warmup"
        " --log-every 100",
        points=4, images=2000, sampling="--labels balanced --sampler heun --steps 10 --batch-size 250", learn=4000,
    ),
    "gpu": dict(
        flags="--image-size 32 --model SiT-S/2 --batch-size 256 --steps 1200 --lr 5e-4 --warmup 100 --ema 0.995"
        " --ema-warmup --log-every 100",
        points=4, images=2000, sampling="--labels balanced --sampler heun --steps 20 --batch-size 500", learn=3000,
    ),
    "paper": dict(
        flags="--image-size 256 --model SiT-XL/2 --batch-size 256 --steps 400000 --lr 1e-4 --ema 0.9999"
        " --no-ema-warmup --log-every 500",
        points=8, images=50_000, sampling="--labels random --sampler sde --steps 250 --batch-size 64", learn=20_000,
    ),
}  # fmt: skip
ALSO_GRID = 4  # tokens a side of --also: 128 px at stride 32
OURS = "method align projector gamma data demo encoder encoder-weights tokens seed init out resume device".split()


# ---- The distance ----


def sha256(path):
    if path in (None, "random"):
        return path
    return sha256_of(path)


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


def digest_of(data):
    """Of the images of a set, by their names and bytes; of drawn shapes their size."""
    return data.digest if hasattr(data, "digest") else f"shapes of {data.size} px"


def meters(args, data, device):
    """-> ({name: distance(batches of uint8 [B, 3, H, W]) to the training images or --reference}, facts about them)."""
    networks, facts = {}, dict(samples=args.images, network={}, of_real={})
    if args.inception:
        inception, digest = fid.load_inception(args.inception, device)
        networks["FID"], facts["network"]["FID"] = lambda x: inception(x)[0], digest
    else:
        path = Path(args.classifier or f"{args.out}/classifier.pt")
        classifier, facts["accuracy"] = classifier_for(path, data, args.learn, device)
        networks["FD-classifier"], facts["network"]["FD-classifier"] = classifier.features, sha256(path)
    if args.also:
        teacher = load_encoder(args.also, ALSO_GRID, None, device)
        networks[f"FD-{args.also}"] = lambda x: teacher(x).mean(1)
        facts["network"][f"FD-{args.also}"] = weights_sha256(teacher)
    training, _ = train.split(len(data))
    real = parts_of(data)[1][: args.images]
    distances = {}
    for name, features in networks.items():
        if args.reference:
            _, stored = fid.open_set(args.reference)
            if "mu" not in stored:
                raise ValueError(f"--reference {args.reference} has no mu and sigma: make it with fid.py --save-stats")
            if stored.get("inception", digest) != digest:
                raise ValueError(f"--reference {args.reference} was made with other Inception weights")
            reference = stored["mu"], stored["sigma"]
        else:
            reference = reference_of(name, features, facts["network"][name], args, data, training, device)

        def distance(batches, features=features, reference=reference):
            return fid.frechet_distance(*moments_of(features, batches, device), *reference)

        distances[name] = distance
        facts["of_real"][name] = distance(batches_of(data, real))  # what to hope for
    return distances, dict(facts, real=len(real))


def reference_of(name, features, digest, args, data, training, device):
    """Mean and covariance of the training images, kept in OUT for the next start."""
    file = Path(args.out) / f"reference-{str(digest)[:12]}-{digest_of(data)[:12]}.npz"
    if file.exists():
        with np.load(file) as stored:
            return stored["mu"], stored["sigma"]
    bar = tqdm(batches_of(data, training), f"{name} of training images", -(-len(training) // 250), leave=False)
    mu, sigma = moments_of(features, bar, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda f: np.savez(f, mu=mu, sigma=sigma))
    return mu, sigma


# ---- Train, sample, measure ----


def call(module, flags, processes):
    """train.py or sample.py with flags: here, or under torchrun on several processes."""
    if processes == 1:
        try:
            return module.main(flags)
        except SystemExit as stop:
            if stop.code == STOPPED:  # which tells how that run goes on alone
                print("of a comparison: the same command goes on with it")
            raise
    run = subprocess.run(["torchrun", f"--nproc_per_node={processes}", module.__file__, *flags])
    if run.returncode:
        raise SystemExit(run.returncode)  # it has said why


def leg(args, folder, arm, seed, step):
    """Train the run in `folder` up to `step`, from wherever it is before."""
    last = folder / "last.pt"
    reached = read_checkpoint(last)["step"] if last.exists() else 0
    if reached > step:
        raise SystemExit(f"{PROGRAM}: {folder} is at step {reached}, and was not measured at {step}: delete it")
    if reached == step:
        return
    flags = [*args.flags, *args.place, *(ARMS | KNOBS)[arm].split(), "--seed", str(seed)]
    flags += ["--out", str(folder), "--steps", str(step)]
    if last.exists() or (folder / "config.json").exists():
        flags += ["--resume"]
    elif folder.exists():
        folder.rmdir()  # stopped before it wrote anything
    call(train, flags, args.processes)


def measure(args, folder, step, distances):
    """Draw OUT/ARM-seedN/samples-STEP.npz from the EMA, and add its distances to distance.jsonl.

    All runs have the same noise and labels of samples, also those of other seeds.
    """
    npz = folder / f"samples-{step}.npz"
    if not npz.exists():  # what bears the name is whole
        flags = f"--num {args.images} --seed 0 {args.sampling}".split()
        flags += ["--ckpt", str(folder / "last.pt"), "--npz", str(npz), *args.decoder]
        call(sample, flags, args.processes)
    row = dict(step=step)
    for name, distance in distances.items():
        row[name] = distance(fid.Npz(npz).batches(0, args.images, 250))
    rows = [*rows_of(folder / "distance.jsonl"), row]
    write_text(folder / "distance.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for old in {*folder.glob("samples-*.npz")} - {npz}:
        old.unlink()


# ---- Command line ----


def add_common(add, budget):
    """The flags of every program that compares short runs; budget: the default."""
    add("--budget", default=budget, choices=BUDGETS, help="sizes of model and run")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--images", type=int, help="samples for the distance")
    add("--inception", metavar="FILE", help="weights as fid.py takes them: the distance is then FID")
    add("--reference", metavar="FILE", help="npz with mu and sigma, as ADM's: instead of the training images'")
    add("--also", metavar="ENCODER", help="a second distance, in the mean tokens of this teacher")
    add("--classifier", metavar="FILE", help="read from, or made for, another comparison; default: OUT/classifier.pt")
    add("--processes", type=int, default=1, help="GPUs: above one, training and sampling are under torchrun")
    add("--device", default="auto", help="as in train.py")


def build_parser():
    parser = make_parser(PROGRAM, __doc__, "[flags] [-- flags of train.py]")
    add = parser.add_argument
    add("--data", metavar="PATH", help="folder of class folders, or a .zip of one; drawn shapes without it")
    add("--out", default="runs/convergence", metavar="DIR")
    text = "the first is what the others are compared with (sit repa irepa conv-only norm-only)"
    add("--arms", nargs="+", default=[*ARMS], choices=ARMS | KNOBS, metavar="ARM", help=text)
    add("--sweep", action="store_true", help="the arms are irepa, and its knobs, one at a time")
    add("--encoder", default="hog", help="the teacher, as in train.py")
    add("--encoder-weights", metavar="FILE", help="as in train.py")
    add("--tokens", metavar="DIR", help="as in train.py")
    add("--learn-teacher", type=int, metavar="STEPS", help="make that file first, in as many steps on --data")
    add_common(add, "laptop")
    return parser


def parse(parser, argv):
    """-> (args, what stands behind `--`)."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


def settle(args, extra, own=(), flags=(), place=(), arms=((),)):
    """What budget and flags come to, into args -> (train.py's Run, its Config) of the first arm. ValueError where they
    do not fit, in any arm.

    extra: flags of train.py, those behind `--`; own: those that cannot be among them, besides OURS; flags, place: a
    program's own for all runs; arms: for some. args.flags are then train.py's for every run, args.place more of them,
    which say where it runs and on what, and args.decoder is of sample.py.
    """
    if taken := {f.split("=")[0] for f in extra} & {f"--{name}" for name in (*OURS, *own)}:
        raise ValueError(f"{min(taken)} after -- is what this comparison sets itself: leave it out there")
    if args.reference and (args.also or not args.inception):
        raise ValueError("--reference holds statistics for FID: it goes with --inception FILE, and without --also")
    vars(args).update({k: v for k, v in BUDGETS[args.budget].items() if k != "images" or args.images is None})
    if args.images < 2 or args.processes < 1 or min(args.seeds) < 0:
        raise ValueError("--images is at least 2, --processes at least 1, --seeds are 0 or more")
    args.seeds = [*dict.fromkeys(args.seeds)]
    args.flags = [*args.flags.split(), *"--lr-schedule constant --sample-every 0".split(), *flags, *extra]
    args.place = [*(["--data", args.data] if args.data else ["--demo"]), *place, "--device", args.device]
    if args.budget != "paper" and fast_bf16(pick_device(args.device)):
        args.sampling += " --precision bf16"  # half the time
    found = [resolve([*args.flags, *args.place, *arm, "--out", f"{args.out}/none"]) for arm in arms]
    configs = [network_config(run, method) for run, method, _ in found]  # before anything slow
    run = found[0][0]
    compiled = settle_compile(run.compile, pick_device(args.device), run.steps)  # not by the length of a leg
    args.place += ["--compile" if compiled else "--no-compile"]
    args.decoder = ["--device", args.device, args.place[-1]]
    for name in ("vae", "vae_weights"):
        if getattr(run, name) is not None:
            args.decoder += [f"--{name.replace('_', '-')}", getattr(run, name)]
    return run, configs[0]


def prepare(argv):
    """argv -> (args with what the budget says, (train.py's Run, its Config)). ValueError where flags do not fit."""
    args, extra = parse(build_parser(), argv)
    if args.learn_teacher is not None and (args.learn_teacher < 10 or not args.encoder_weights):
        raise ValueError("--learn-teacher, at least 10, writes the file of --encoder-weights: name it")
    if args.learn_teacher is not None and not learns(args.encoder):
        raise ValueError(f"--learn-teacher: {args.encoder} does not learn, only a ViT as timm:<id>")
    args.arms = [*dict.fromkeys(KNOBS if args.sweep else args.arms)]
    place = ["--encoder-weights", args.encoder_weights] if args.encoder_weights else []
    place += ["--tokens", args.tokens] if args.tokens else []
    arms = [(ARMS | KNOBS)[arm].split() for arm in args.arms]
    run, config = settle(args, extra, flags=["--encoder", args.encoder], place=place, arms=arms)
    if run.lr_schedule != "constant" or run.steps < args.points:
        raise ValueError(f"the {args.points} legs need --lr-schedule constant, and as many --steps")
    args.legs = [run.steps * (i + 1) // args.points for i in range(args.points)]
    return args, (run, config)


def same_comparison(path, settings):
    """Write the settings to `path`, or find the same there. ValueError where they differ."""
    if not path.exists():
        return write_text(path, json.dumps(settings, indent=1) + "\n")
    old = json.loads(path.read_text())
    for key, value in settings.items():
        was = old.get(key)
        if was != value:
            if isinstance(value, list) and isinstance(was, list):  # of flags: only what differs
                was, value = ([v for v in a if v not in b] for a, b in ((was, value), (value, was)))
            raise ValueError(f"{path.parent} was started with {key} {was}, not {value}; start another --out")


def open_comparison(args, run, facts_of=lambda data, device: {}):
    """-> (the images, {name: distance}, facts about them): the classifier and references are made where they are not
    there, while other processes wait. ValueError where OUT is of another comparison.

    facts_of(data, device): of what else the runs depend on, and must be the same.
    """
    device, out = pick_device(args.device), Path(args.out)
    jobs.ImageSet = functools.lru_cache(1)(ImageSet)  # the runs' too: decoding CIFAR-10 takes ten seconds
    size, skip = run.image_size, run.skip_broken
    data = jobs.ImageSet(args.data, size, skip, needed=True, later=True) if args.data else Shapes(size, 10_000)
    if len(data.classes) < 2 and not args.inception:
        raise ValueError(f"{args.data} is of one class: FD-classifier needs two, FID --inception FILE")
    if args.data:
        data.decode_all()
    also = facts_of(data, device)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out, wait=True):
        distances, facts = meters(args, data, device)
        same = {name: getattr(args, name) for name in ("flags", "images", "sampling", "reference")}
        same_comparison(out / "settings.json", dict(same, data=digest_of(data), network=facts["network"], **also))
    if "accuracy" in facts:
        print(f"FD-classifier: its network is right on {facts['accuracy']:.1%} of images that it did not see")
    return data, distances, facts


def teacher_of(args, run, config, data, device):
    """What a comparison depends on in its teacher, which is learned first where that is asked for."""
    grid = config.input_size // config.patch_size
    if args.learn_teacher is not None:
        file = Path(args.encoder_weights)
        args.teacher_accuracy = learn_teacher(args.encoder, file, data, args.learn_teacher, grid, device)
        print(f"{args.encoder} of {file}: right on {args.teacher_accuracy:.1%} of images that it did not see")
    if run.tokens:
        weights = Tokens(run.tokens, run.encoder, grid, run.cls_weight).manifest["weights_sha256"]
    else:
        weights = weights_sha256(load_encoder(args.encoder, grid, args.encoder_weights))
    return dict(legs=args.legs, teacher=weights)


def main(argv=None):
    with mistakes(PROGRAM):
        args, (run, config) = prepare(sys.argv[1:] if argv is None else argv)
        teacher = functools.partial(teacher_of, args, run, config)
        _, distances, facts = open_comparison(args, run, teacher)
        out = Path(args.out)
    with tqdm([*itertools.product(args.seeds, args.arms, args.legs)], "legs", unit="leg") as bar:
        for seed, arm, step in bar:
            bar.set_description(f"{arm}, seed {seed}, to step {step}")
            folder = out / f"{arm}-seed{seed}"
            if not measured(args, arm, seed, step):
                leg(args, folder, arm, seed, step)
                measure(args, folder, step, distances)
                report(args, facts)
    print(f"{report(args, facts)}\n{out}: results.json, table.md, curves.png, samples.png")


if __name__ == "__main__":
    as_program(main)
