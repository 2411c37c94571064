"""A method by its name: irepa, repa and sit are settings of irepa.py, and each file of variants/ is another.

A file of variants/ gives what it changes, under these names; what it does not define is irepa.py's:

    Config      a dataclass, and Config.named(model, **fields); its fields with a comment behind them are flags of
                train.py: int, float, str or bool, one of these or None, or a tuple of two numbers
    model       model(config) -> network, with .config, .blocks, .projectors and the forward that loss and solve call
    loss        loss(model, x, y, target, config, generator, part) -> dict of scalars: loss, denoise, align
    Sampling    a dataclass; its fields are flags of sample.py
    solve       solve(model, y, noise, generators, how) -> x like noise; how is a Sampling

and, where it needs them, what irepa.py has not:

    TRAINING    dict of settings of train.py that it changes in training; DEMO: likewise in its --demo
    scaled      scaled(batch_size) -> likewise those that follow --batch-size where they are not given
    Learner     instead of train.Learner, where one network, one loss and one optimiser are not enough
    check_run   check_run(run): ValueError where flags do not fit the method
    released    released(weights, args) -> the Config fields of a released state dict that irepa.py's names and shapes
                do not show, or None if it is not its own; LATENT_SCALE: of the latents of these, if not the VAE's
    stored_vae  stored_vae(checkpoint, model, device, given) -> the Latents of inputs/vae.py that a checkpoint of it
                holds; where it holds none, `given`, those that the user names, if any, with the checkpoint's scale
"""

import functools
import importlib
import inspect
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Callable

import torch

import irepa

ALIGNMENTS = {"irepa": {}, "repa": irepa.REPA, "none": dict(projector=None)}
OWN = {"irepa": "irepa", "repa": "repa", "sit": "none"}  # irepa.py's methods, by their alignment
VARIANTS = Path(__file__).parent.parent / "variants"
TERMS = "loss", "denoise", "align"  # that a loss returns; more of them are logged, but for these columns of the log:
COLUMNS = set("step skipped replaced seconds images_per_s teacher lr held_out grad_norm".split())


class Unkept(Exception):
    """A method does not keep to what is written above, as only its call shows."""


@dataclass(frozen=True)
class Method:
    name: str
    Config: type
    model: Callable
    loss: Callable
    Sampling: type
    solve: Callable
    TRAINING: dict = field(default_factory=dict)
    DEMO: dict = field(default_factory=dict)
    scaled: Callable = lambda batch_size: {}
    Learner: type | None = None
    check_run: Callable = lambda run: None
    released: Callable = lambda weights, args: None
    LATENT_SCALE: float | None = None
    stored_vae: Callable | None = None

    @property
    def own(self):
        """The names of what it gives in the place of irepa.py's."""
        return [key for key in NEEDED if getattr(self, key) is not getattr(irepa, key)]


NEEDED = "Config", "model", "loss", "Sampling", "solve"


def method_names():
    return [*OWN, *sorted(file.stem for file in VARIANTS.glob("*.py") if not file.stem.startswith("_"))]


def method_named(name):
    """-> Method. ValueError, with the list of what there is, for an unknown name."""
    if name not in method_names():
        raise ValueError(f"--method is one of {', '.join(method_names())}, not {name}")
    if name in OWN and (VARIANTS / f"{name}.py").exists():
        raise ValueError(f"variants/{name}.py has the name of a method of irepa.py: rename it")
    module = irepa if name in OWN else importlib.import_module(f"variants.{name}")
    needed = {key: getattr(irepa, key) for key in NEEDED}
    own = {f.name: getattr(module, f.name) for f in fields(Method) if f.name != "name" and hasattr(module, f.name)}
    if not own:
        names = ", ".join(f.name for f in fields(Method)[1:])
        raise ValueError(f"variants/{name}.py is no method: it defines none of {names}")
    for key in ("Config", "Sampling"):
        if key in own:
            settle_types(own[key], f"variants/{name}.py: {key}")
    if not hasattr(own.get("Config", irepa.Config), "named"):
        why = "let it build on irepa.Config, or give it one"
        raise ValueError(f"variants/{name}.py: Config has no named(model, **fields): {why}")
    if "loss" in own:
        own["loss"] = kept(own["loss"], f"variants/{name}.py: loss")
    return Method(name, **(needed if name in OWN else {**needed, **own}))


def kept(loss, where):
    """`loss`, called and read as the loop does. ValueError where it cannot be called so; Unkept, when it is called, for
    what is not its terms."""
    try:
        inspect.signature(loss).bind(*[None] * 6, part=(0, 1))
    except TypeError as e:
        how = "loss(model, x, y, target, config, generator, part=(0, 1))"
        raise ValueError(f"{where} cannot be called as {how}: {e}") from e

    @functools.wraps(loss)
    def checked(*inputs, **more):
        terms = loss(*inputs, **more)
        if not isinstance(terms, dict) or not terms.keys() >= set(TERMS):
            found = f"a {type(terms).__name__}" + (f" of {', '.join(terms)}" if isinstance(terms, dict) else "")
            raise Unkept(f"{where} returns {found}, not a dict of the scalars {', '.join(TERMS)}")
        for term, value in terms.items():
            if not torch.is_tensor(value) or value.dim():
                found = f"of shape {list(value.shape)}" if torch.is_tensor(value) else f"a {type(value).__name__}"
                raise Unkept(f"{where}: its term {term} is {found}, not a tensor of one number: .mean() makes one")
            if term in COLUMNS:
                raise Unkept(f"{where}: its term {term} has the name of another column of the log: rename it")
        return terms

    return checked


def settle_types(cls, where):
    """The types of a method's dataclass as types, where `from __future__ import annotations` leaves text. ValueError
    for a class that is no dataclass, whose fields would be another's."""
    if "__dataclass_fields__" not in vars(cls):
        raise ValueError(f"{where} is no dataclass, so that its fields would not count: write @dataclass above it")
    hints = typing.get_type_hints(cls)
    for entry in fields(cls):
        entry.type = hints[entry.name]
