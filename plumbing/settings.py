"""Every knob of train.py once: the run's own in Run, the network's and the loss's in the Config of the method.

What the user writes wins over the settings of a resumed run, these over a preset, a preset over a default. Presets are
dicts over the knobs: what --align means, what a method changes in training, and --demo.
"""

import argparse
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from inputs.latents import VaeSource, settle_vae
from inputs.teachers import TeacherSource
from plumbing.checkpoints import listed, read_last
from plumbing.files import one_line
from plumbing.flags import add_flags, early_parser, make_parser, takes_none
from plumbing.methods import ALIGNMENTS, OWN, method_named, method_names

# the data, the VAE and the teacher say what these are
FOUND = ("input_size", "in_channels", "num_classes", "encoder_dim")
# of a run's config.json, what is no setting
FACTS = "git_commit torch numpy python config classes hardware world_size bf16 images parameters weights_sha256".split()

# --demo, on drawn shapes where there is no --data
DEMO = dict(
    image_size=32, model="SiT-S/4", hidden_size=192, depth=4, num_heads=3, encoder_depth=2, batch_size=32, steps=1800,
    lr=2e-3, warmup=100, lr_schedule="cosine", ema=0.998, log_every=50, sample_every=600,
    ckpt_every=600, sample_cfg=3.0, compile=False,
)  # fmt: skip


@dataclass
class Run(VaeSource, TeacherSource):
    """The run's own knobs. The defaults are the paper's setting, but for ema_warmup and the teacher."""

    # method
    method: str = "irepa"  # irepa: conv, spatial norm; repa: mlp; sit: none; or a file of variants/
    align: str = "irepa"  # how the method is aligned: irepa, repa or none
    model: str = "SiT-XL/2"  # size and patch, as in SiT-{S,B,L,XL}/{1,2,4,8}
    init: str | None = None  # start from this checkpoint's weights, ours or others': the average, where there is one
    released: str | None = None  # whose file --init is, where it does not show: sit (SiT's own) or dit
    # teacher
    tokens: str | None = None  # folder with the encoder's tokens, of python -m inputs.teachers: no teacher is built
    token_memory: float = 2.0  # GiB: where the tokens of all images take no more, each is computed once a run
    # data
    demo: bool = False  # a preset: a small model, minutes on two CPU cores; on drawn shapes, if there is no --data
    workers: int | None = None  # decoding processes a rank; by default none where images are kept in memory
    flip: bool = False  # mirror half of the images in training, left to right, by chance
    # latents
    latents: str | None = None  # cache of --data, REPA's vae-sd, or the release's folder; else the VAE encodes, slowly
    latent_scale: str = ""  # set (default with --latents): mean 0, variance 1 a channel; vae: its own; or a stats file
    # optimisation
    steps: int = 400_000  # optimiser steps
    batch_size: int = 256  # global: over all processes and accumulated parts
    accumulate: int = 1  # parts a process's share of the batch is split into
    lr: float = 1e-4  # AdamW, first beta 0.9, no weight decay
    beta2: float = 0.999  # second beta of AdamW
    warmup: int = 0  # steps of linear warm-up of the learning rate
    lr_schedule: str = "constant"  # constant or cosine, over all steps; times the warm-up
    clip: float | None = 1.0  # gradient norm, or none
    ema: float = 0.9999  # decay of the moving average of the weights, a step
    ema2: float | None = None  # decay of a second average, which checkpoints hold too, or none
    ema_warmup: bool = True  # let the decays rise to theirs as (1 + step) / (10 + step); the papers' are constant
    seed: int = 0  # of weights, data order, noise, times, label drops and flips
    precision: str = "auto"  # of the model: auto, bf16 or fp32; auto is bf16 autocast where it is fast, as the teacher
    # run
    out: str = ""  # folder for this run, which must not exist; default: runs/METHOD-MODEL
    resume: bool = False  # continue from OUT/last.pt with its settings; flags given still win
    plan: bool | float = False  # only say what this takes: memory, disk; with a number, how long at so many images/s
    log_every: int = 100  # steps
    ckpt_every: int = 10_000  # steps
    keep: int = 2  # newest checkpoints kept by number, step-N.pt, beside last.pt
    sample_every: int = 10_000  # steps between grids of samples, the last at the end; 0 is never
    sample_cfg: float = 1.0  # guidance scale of the grids; 1 is none
    tensorboard: bool = False  # the log and the grids also in OUT/tensorboard; pip install tensorboard
    wandb: str | None = None  # project of Weights & Biases that gets the log and the grids, too; pip install wandb
    compile: bool | None = None  # torch.compile the blocks; default: GPUs, CPUs from 1,000 steps on, not with --demo
    checkpoint_blocks: bool = False  # less memory: compute what is within each block twice, a third slower
    network: dict = field(default_factory=dict)  # the fields of the method's Config that are not as --model has them

    @property
    def averages(self):
        """The moving averages of the weights, each by the name of its knob and of its entry in a checkpoint."""
        return ["ema"] if self.ema2 is None else ["ema", "ema2"]

    def record(self):
        """Every setting by its flag's name."""
        own = asdict(self)
        return {**own, **own.pop("network")}


def resolve(argv=None, description=None):
    """argv -> (Run, its Method, the checkpoint to resume from or None). ValueError or OSError for what does not fit."""
    early = early_parser("train.py", "method", "model", "out")
    for name in ("demo", "resume"):
        early.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    chosen = early.parse_known_args(argv)[0]
    method = method_named(chosen.method or "irepa")
    model = chosen.model or method.TRAINING.get("model", Run.model)
    known = {f.name for f in (*fields(Run), *fields(method.Config))}
    if strange := {*method.TRAINING, *method.DEMO} - known:
        raise ValueError(f"variants/{method.name}.py: TRAINING or DEMO has {min(strange)}, which is no setting")
    of = "" if method.name == "irepa" else f"{method.name.replace('_', '-')}-"
    demo = {**DEMO, "out": f"runs/{of}demo", **method.DEMO} if chosen.demo else {}
    out = Path(chosen.out or demo.get("out") or f"runs/{method.name}-{model.replace('/', '-')}")
    saved, checkpoint = saved_settings(out) if chosen.resume else ({}, None)
    if "method" in saved and not chosen.method:
        if saved["method"] not in method_names():
            raise ValueError(f"{out} was trained with --method {saved['method']}, which is not there any more")
        method = method_named(saved["method"])
    model = chosen.model or saved.get("model", model)
    given = vars(parser_of(method, model, description).parse_args(argv))
    if chosen.resume and "init" in given:
        raise ValueError(f"--init starts a run, and --resume goes on from {out}/last.pt: leave one of them out")
    if demo and "tokens" in given and "data" not in given:
        raise ValueError("--demo draws its own images: name those of --tokens with --data, or leave --tokens out")
    if demo and "model" in given:  # a size asked for by name is that size
        demo = {k: v for k, v in demo.items() if k not in ("hidden_size", "depth", "num_heads", "encoder_depth")}
    elif demo:
        demo["encoder_depth"] = max(1, min(demo["encoder_depth"], given.get("depth", demo["depth"])))
    align = OWN.get(method.name) or given.get("align") or saved.get("align", "irepa")
    if align not in ALIGNMENTS:
        raise ValueError(f"--align is one of {', '.join(ALIGNMENTS)}, not {align}")
    # a run that goes on has recorded every knob there was; what has come since stays at its default
    preset = {**ALIGNMENTS[align], **({} if saved else method.TRAINING), "align": align}
    kinds = {f.name: f for f in (*fields(Run), *fields(method.Config)) if f.name not in (*FOUND, "network")}
    if saved.get("method") == method.name:
        refuse_gone(out, saved, (checkpoint or saved).get("config"), {*kinds, "network", *FOUND, *FACTS})
    saved = {k: None if v == "none" and takes_none(kinds[k]) else v for k, v in saved.items() if k in kinds}
    saved = {k: v for k, v in saved.items() if v is not None or takes_none(kinds[k])}  # older runs wrote None for unset
    merged = {**preset, **demo, **saved, **given, "method": method.name, "out": str(out)}
    size = max(1, merged.get("batch_size", Run.batch_size))  # check() refuses what is below
    merged = {**method.scaled(size), **merged}
    own = {f.name for f in fields(Run)}
    run = Run(**{k: v for k, v in merged.items() if k in own})
    run.network = {k: v for k, v in merged.items() if k not in own}
    if run.demo and "vae" not in merged:
        run.vae = None
    settle_vae(run)
    check(run, method)
    settle_scale(run, given, checkpoint)
    if checkpoint and checkpoint["step"] >= run.steps:
        raise ValueError(f"{out} is at step {checkpoint['step']} already, and --steps is {run.steps}: nothing to do")
    if checkpoint and run.ema2 is not None and "ema2" not in checkpoint:
        raise ValueError(f"{out} was started without a second average: leave --ema2 out")
    return run, method, checkpoint


def settle_scale(run, given, checkpoint):
    """Which scale of the latents, where the flags leave it open; ValueError where they do not fit together."""
    if run.vae is None:
        if "latent_scale" in given:
            raise ValueError("--latent-scale goes with a --vae, which below 128 px has to be named")
        run.latent_scale = ""
        return
    run.latent_scale = run.latent_scale or ("set" if run.latents else "vae")
    if checkpoint and run.latent_scale == checkpoint["settings"]["latent_scale"]:
        return  # its numbers lie in the checkpoint
    if run.latent_scale == "set" and not run.latents:
        why = "write a cache with python -m inputs.latents, and name it with --latents"
        raise ValueError(f"--latent-scale set takes the mean and standard deviation of a set of latents: {why}")
    if run.latent_scale not in ("set", "vae") and not Path(run.latent_scale).is_file():
        raise FileNotFoundError(f"--latent-scale is set, vae or a stats file, and {run.latent_scale} is none of them")


def parser_of(method, model, description):
    """The command line of train.py with the knobs of one method."""
    parser = make_parser("train.py", description)
    preset = {k: f"{v}; it follows --batch-size" for k, v in method.scaled(Run.batch_size).items()}
    preset.update(method.TRAINING)
    preset = {k: v for k, v in preset.items() if k in {f.name for f in fields(Run)}}
    add_flags(
        parser,
        Run,
        leave_out=["network", "align"] if method.name in OWN else ["network"],
        defaults=replace(Run(), **preset),
    )
    network = method.Config.named(model, **ALIGNMENTS[OWN.get(method.name, "irepa")])
    title = f"network and loss of --method {method.name}, with the sizes of {model}"
    add_flags(parser, method.Config, leave_out=FOUND, defaults=network, title=title)
    return parser


def saved_settings(out):
    """-> (the settings of the run in `out`, its checkpoint or None where it was stopped before the first)."""
    if out.is_file():
        raise FileNotFoundError(f"--resume: {out} is a file; --out takes the run's folder: --out {out.parent}")
    if not out.is_dir():
        runs = sorted(str(file.parent) for file in Path("runs").glob("*/last.pt"))
        hint = f" (there are {', '.join(runs)})" if runs else ""
        raise FileNotFoundError(f"--resume: {out} does not exist; name the run with --out{hint}, or leave --resume out")
    if (out / "last.pt").exists() or any(out.glob("step-*.pt")):  # a lost last.pt is no reason to start anew
        checkpoint = read_last(out)
        return todays(checkpoint["settings"]), checkpoint
    if not (out / "config.json").exists():
        raise FileNotFoundError(f"--resume: {out} holds no run of train.py (neither last.pt nor config.json)")
    try:
        return todays(dict(json.loads((out / "config.json").read_text()))), None
    except (ValueError, TypeError) as e:
        why = f"{out}/config.json is damaged ({one_line(e)}), and there is no checkpoint: delete {out}"
        raise ValueError(why) from e


def todays(settings):
    """The saved settings, with what earlier versions had in the place of --latent-scale under its name."""
    stats = settings.pop("latent_stats", None)
    if settings.get("vae") not in (None, "none"):
        settings.setdefault("latent_scale", stats or "vae")
    settings.setdefault("latent_scale", "")
    if settings.get("demo") and "plan" not in settings:
        settings["data"] = None  # a name that --demo did not look at
    return settings


def refuse_gone(out, saved, config, known):
    """ValueError where a run was started with settings that are not there any more, unless they were off."""
    saved = {**saved, **(config if isinstance(config, dict) else {})}
    saved = {k: v for k, v in saved.items() if not k.startswith("parameters_")}
    gone = {k: v for k, v in saved.items() if k not in known and v not in (None, False, "")}
    if gone:
        raise ValueError(
            f"{out} was started with {listed(gone)}, of which this version knows nothing: go on with the version that"
            f" {out}/config.json names, or start another --out with --init {out}/last.pt"
        )


def check(run, method):
    """ValueError, naming the flag, where a setting is out of range or does not go with another."""
    positive = "image_size steps batch_size accumulate log_every ckpt_every lr clip".split()
    not_negative = "sample_cfg warmup workers keep sample_every seed gamma proj_coeff".split()
    for name in (*positive, *not_negative, *run.network):
        value, flag = getattr(run, name, run.network.get(name)), f"--{name.replace('_', '-')}"
        if name in positive and value is not None and not 0 < value < math.inf:  # --clip none
            raise ValueError(f"{flag} must be positive, not {value}")
        if isinstance(value, (int, float)) and not math.isfinite(value):
            raise ValueError(f"{flag} must be finite, and is {value}")
        if name in not_negative and value is not None and value < 0:
            raise ValueError(f"{flag} must not be negative, and is {value}")
    if run.seed >= 2**63:
        raise ValueError(f"--seed must be below 2^63, not {run.seed}")
    if not all(0 <= share < 1 for share in (run.ema, run.ema2 or 0, run.beta2, run.network.get("class_dropout", 0))):
        raise ValueError("--class-dropout, --ema, --ema2 and --beta2 lie in [0, 1)")
    for name, choices in dict(precision=("auto", "bf16", "fp32"), lr_schedule=("constant", "cosine")).items():
        if getattr(run, name) not in choices:
            raise ValueError(f"--{name.replace('_', '-')} is {' or '.join(choices)}, not {getattr(run, name)}")
    if run.released and not run.init:
        raise ValueError("--released says whose file --init is: name that, or leave --released out")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if run.batch_size % (world * run.accumulate):
        raise ValueError(
            f"--batch-size {run.batch_size} does not divide by {world} processes x --accumulate {run.accumulate}"
        )
    if run.latents and run.vae is None:
        raise ValueError("--latents goes with a --vae, which below 128 px has to be named")
    if run.tokens and run.flip:
        raise ValueError("--flip mirrors images, and --tokens holds none of mirrored ones: --no-flip, or no --tokens")
    if run.tokens and run.encoder_weights:
        raise ValueError("--tokens holds what an encoder's weights have made: leave --encoder-weights out")
    if not run.token_memory >= 0:
        raise ValueError(f"--token-memory must not be negative, and is {run.token_memory}")
    if run.latents and run.flip:
        raise ValueError("--flip mirrors images, and --latents holds no mirrored ones: leave one of them out")
    if run.vae == "tiny" and method.Learner is None:
        raise ValueError("--vae tiny starts untrained: it is for a --method that trains its VAE")
    if run.sample_cfg != 1 and not hasattr(method.Sampling(), "cfg"):
        raise ValueError(f"--method {method.name} has no --sample-cfg: its guidance is trained in")
    method.check_run(run)


def network_config(run, method, spec=None, num_classes=1000, encoder_dim=1):
    """The method's Config that the flags ask for, on latents of `spec`. ValueError where they do not fit together."""
    factor, channels = (spec["factor"], spec["channels"]) if spec else (8, 4) if run.vae else (1, 3)
    if run.image_size % factor:
        raise ValueError(f"--image-size {run.image_size} is not a multiple of the VAE's factor {factor}")
    found = dict(input_size=run.image_size // factor, in_channels=channels)
    found.update(num_classes=num_classes, encoder_dim=encoder_dim)
    try:
        config = method.Config.named(run.model, **found, **run.network)
    except ValueError as e:  # which speaks of fields
        flags = {f.name: f"--{f.name.replace('_', '-')}" for f in fields(method.Config)}
        flags.update(input_size=f"--image-size by {factor}" if spec or run.vae else "--image-size")
        words = re.sub(r"\w+", lambda word: flags.get(word[0], word[0]), str(e))
        raise ValueError(f"--model {run.model}: {words}") from e
    tokens = (config.input_size // config.patch_size) ** 2
    if tokens > 4096:
        raise ValueError(
            f"{run.model} on {run.image_size}-px images has {tokens} tokens: leave --vae none out, or choose a larger"
            " patch or smaller images, such as --model SiT-S/4 --image-size 32"
        )
    return config
