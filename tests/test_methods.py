"""plumbing/methods.py: a new method is one new file in variants/."""

import hashlib
import shutil
import sys

import pytest
import torch

import variants
from plumbing import methods
from plumbing.methods import method_named, method_names
from tests.common import HERE, refused, rows_of, run
from tests.processes import call

HUBER = '''"""A Huber loss in place of the squared error."""

from dataclasses import dataclass

import torch.nn.functional as F

import irepa

DEMO = dict(out="runs/huber-demo", warmup=0)


@dataclass
class Config(irepa.Config):
    delta: float = 1.0  # errors beyond it count linearly


@dataclass
class Sampling(irepa.Sampling):
    churn: bool = True  # a switch that can be off
    first: int = 1  # a number that can be 0


def loss(model, x, y, target, config, generator=None, part=(0, 1)):
    t, noise, y = irepa.training_draws(model, x, y, config, generator, part)
    x_t, velocity = irepa.interpolate(x, noise, t, config.path)
    v, h = model(x_t, t, y)
    return irepa.with_alignment(F.huber_loss(v.float(), velocity, delta=config.delta), h, target, config)
'''
DEMO = (
    "--demo --hidden-size 32 --depth 2 --num-heads 2 --batch-size 8 --log-every 1 --sample-every 0 --device cpu".split()
)


def sums(root):
    """What lies in a tree, but for what Python and a run put there -> {name: hash}."""
    files = (f for f in root.rglob("*") if f.is_file() and not {"__pycache__", "runs"} & set(f.parts))
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_a_new_method_is_one_new_file(tmp_path):
    tree = tmp_path / "tree"
    for name in ("plumbing", "inputs", "variants"):
        shutil.copytree(HERE / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("irepa.py", "fid.py", "train.py", "sample.py"):
        shutil.copy(HERE / name, tree / name)
    before = sums(tree)
    (tree / "variants/huber.py").write_text(HUBER)

    def there(module, *flags, code=0):
        codes, said = call(tree, tmp_path, module, *flags)
        assert codes == [code] and "Traceback" not in said, said
        return said

    assert "--delta" in there("train", "--method", "huber", "--help")
    said = there("train", *DEMO, "--method", "irepa", "--delta", 0.1, code=2)
    assert "unrecognized arguments: --delta 0.1" in said.splitlines()[-1]
    there("train", *DEMO, "--method", "huber", "--delta", 0.1, "--steps", 2)
    there("train", "--resume", "--out", "runs/huber-demo", "--steps", 3)
    checkpoint = torch.load(tree / "runs/huber-demo/last.pt", weights_only=True)
    assert checkpoint["step"] == 3 and checkpoint["config"]["delta"] == 0.1
    rows = rows_of(tree / "runs/huber-demo")
    assert len(rows) == 3 and all(row["denoise"] < 0.1 for row in rows)  # about 0.1 (|e| - 0.05), not e^2, which is 1
    how = "--num", 2, "--steps", 2, "--no-churn", "--first", 0, "--device", "cpu", "--npz", "s.npz"
    there("sample", "--ckpt", "runs/huber-demo/last.pt", *how)
    assert (tree / "s.npz").exists()
    after = sums(tree)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"variants/huber.py", "s.npz", "s.json"}


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("@dataclass\n", "", "variants/mine.py: Config is no dataclass, so that its fields would not count"),
        ("(irepa.Config)", "", "variants/mine.py: Config has no named(model, **fields)"),
        ("delta: float = 1.0", "warmup: int = 3", "variants.mine: Config.warmup has the name of another flag"),
        ("delta: float = 1.0  # errors", "lr: float = 1.0\n    # errors", "Config.lr has the name of another flag"),
        ("float = 1.0  #", "list = None  #", "variants.mine: Config.delta is <class 'list'>, and a flag takes int"),
        ("warmup=0", "stepz=5", "variants/mine.py: TRAINING or DEMO has stepz, which is no setting"),
        (", part=(0, 1))", ")", "variants/mine.py: loss cannot be called as loss(model, x, y, target, config"),
    ],
)
def test_a_mistaken_method_is_named(tmp_path, monkeypatch, capsys, old, new, message):
    mine(tmp_path, monkeypatch, HUBER.replace(old, new))
    assert message in refused(capsys, run, *DEMO, "--method", "mine", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "returned,message",
    [
        ("v.mean()", "returns a Tensor, not a dict of the scalars loss, denoise, align"),
        ("None", "returns a NoneType, not a dict"),
        ("dict(loss=v.mean())", "returns a dict of loss, not a dict"),
        ("{**terms, 'each': v.mean((1, 2, 3))}", "its term each is of shape [8], not a tensor of one number"),
        ("{**terms, 'mine': 0.5}", "its term mine is a float, not a tensor of one number"),
        ("{**terms, 'seconds': v.mean()}", "its term seconds has the name of another column of the log"),
    ],
)
def test_what_a_loss_returns_is_looked_at_in_the_first_step(tmp_path, monkeypatch, capsys, returned, message):
    mine(tmp_path, monkeypatch, HUBER.replace("    return ", "    terms = ") + f"    return {returned}\n")
    said = refused(capsys, run, *DEMO, "--method", "mine", "--steps", 9, "--out", tmp_path / "run")
    assert f"variants/mine.py: loss{'' if 'returns' in message else ':'} {message}" in said


def test_a_run_says_what_its_method_brings(tmp_path, monkeypatch, capsys):
    mine(tmp_path, monkeypatch, HUBER.replace("def loss(", "def losses("))
    run(*DEMO, "--method", "mine", "--steps", 1, "--out", tmp_path / "run")
    assert "variants/mine.py gives Config, Sampling; all else is irepa.py's" in capsys.readouterr().out
    (tmp_path / "irepa.py").write_text(HUBER)
    assert "variants/irepa.py has the name of a method of irepa.py" in refused(capsys, run, "--method", "irepa")


def test_types_may_be_text(tmp_path, monkeypatch, capsys):
    head = "from dataclasses import dataclass\n"
    mine(tmp_path, monkeypatch, HUBER.replace(head, f"from __future__ import annotations\n\n{head}"))
    with pytest.raises(SystemExit) as stop:
        run("--method", "mine", "--help")
    assert stop.value.code == 0 and "--delta X" in capsys.readouterr().out


def mine(folder, monkeypatch, text):
    """A method `mine` of this text."""
    (folder / "mine.py").write_text(text)
    monkeypatch.setattr(methods, "VARIANTS", folder)
    monkeypatch.setattr(variants, "__path__", [str(folder)])
    monkeypatch.delitem(sys.modules, "variants.mine", raising=False)


def test_unknown_methods_are_named(capsys):
    with pytest.raises(ValueError, match=f"one of {', '.join(method_names())}, not jitter"):
        method_named("jitter")
    assert "--method is one of" in refused(capsys, run, "--method", "jitter")
