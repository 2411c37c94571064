"""Checkpoints: released files load strictly, bad ones are named errors, and none runs code."""

import argparse
import os
import pickle
from dataclasses import asdict

import pytest
import torch

from irepa import Config, SiT
from plumbing.checkpoints import load_checkpoint
from test_irepa import TINY, fill
from tests.common import same_weights


def released(kind, path, legacy=False, **extra):
    """A file as REPA or iREPA publish it -> its weights under our names."""
    model = fill(SiT(Config(**{**TINY, "hidden_size": 384, "num_heads": 6, "encoder_depth": 3}, projector=kind)))
    state = {"module._orig_mod." + k: v for k, v in model.state_dict().items()}
    if kind == "mlp":  # REPA's own name of it
        state = {k.replace("projection_layer.", ""): v for k, v in state.items()}
    if legacy:
        state = {k.replace("blocks.3.", "decoder_blocks.0."): v for k, v in state.items()}
    args = argparse.Namespace(encoder_depth=3, path_type="linear", lr=1e-4)
    torch.save(dict(model=state, ema=state, opt={}, args=args, steps=7, **extra), path)
    return model.state_dict()


@pytest.mark.parametrize(
    "kind,legacy", [("mlp", False), ("mlp", True), ("conv", False), ("linear", False), (None, False)]
)
def test_released_checkpoints_load_strictly(tmp_path, kind, legacy):
    state = released(kind, tmp_path / "0400000.pt", legacy)
    model, config = load_checkpoint(tmp_path / "0400000.pt")
    assert (config.projector, config.encoder_depth if kind else 3, config.num_heads) == (kind, 3, 6)
    assert (config.input_size, config.num_classes, config.qk_norm) == (8, 10, False)
    assert same_weights(model.state_dict(), state)


def test_bad_checkpoints_are_named_errors(tmp_path):
    state = released("conv", tmp_path / "good.pt")

    def refused(data, message):
        torch.save(data, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "bad.pt")

    lacking = {k: v for k, v in state.items() if k != "blocks.2.mlp.fc1.bias"}
    refused(dict(ema=lacking), "missing blocks.2.mlp.fc1.bias")
    refused(dict(ema={**state, "extra.weight": torch.ones(1)}), "surplus extra.weight")
    refused(dict(ema={**state, "blocks.0.attn.proj.bias": torch.ones(3)}), r"attn.proj.bias is \[3\]")
    refused(dict(model=state), "no ema weights")
    refused([1, 2], "holds a list")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:50_000])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for name in ("cut.pt", "text.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    refused(dict(ema=state, config=dict(asdict(Config(**TINY)), num_heads=0)), "num_heads must be positive")
    odd = {**state, "projectors.1.projection_layer.weight": torch.ones(3)}
    refused(dict(ema=odd), "surplus projectors.1")
    assert load_checkpoint(tmp_path / "bad.pt", projector=None, path="cosine")[1].path == "cosine"
    torch.save(dict(ema=state), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pt")[1].projector == "conv"
    without = {k: v for k, v in state.items() if "projector" not in k}  # files for evaluation only
    torch.save(dict(ema=without), tmp_path / "eval.pt")
    assert load_checkpoint(tmp_path / "eval.pt")[1].projector is None
    torch.save(dict(ema=without, config=asdict(load_checkpoint(tmp_path / "good.pt")[1])), tmp_path / "ours.pt")
    assert load_checkpoint(tmp_path / "ours.pt")[1].projector is None


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("save", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data))])
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save(dict(ema=Evil()), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()
