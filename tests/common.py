"""What several test files use: tiny networks and runs, and a look at what a run leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import irepa
import sample
import train
from plumbing.settings import resolve

HERE = Path(__file__).parent.parent  # the repository's root
RUN = (
    "--image-size 16 --model SiT-S/4 --hidden-size 32 --depth 2 --num-heads 2 --batch-size 8 --steps 4 --lr 1e-3"
    " --log-every 2 --ckpt-every 3 --device cpu --precision fp32"
).split()


# ---- Inputs ----


def save_images(folder, count, image):
    """`count` copies of a PIL image as PNGs in a new folder."""
    folder.mkdir(parents=True)
    for i in range(count):
        image.save(folder / f"{i}.png")


def black_and_white(folder, count, size):
    """Two classes of `count` images of one colour each -> the folder."""
    for name in ("black", "white"):
        save_images(folder / name, count, Image.new("RGB", (size, size), name))
    return folder


def toy_vae(folder, seed):
    """A folder as diffusers writes it, of a VAE that halves images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    AutoencoderKL(**blocks, block_out_channels=[32, 32], layers_per_block=1, latent_channels=4).save_pretrained(folder)
    return folder


# ---- Runs ----


def settings(*flags):
    """The Run that flags of train.py ask for."""
    return resolve(["--out", "not/there", *flags])[0]


def run(*flags):
    train.main([str(flag) for flag in flags])


def run_sample(*flags):
    sample.main([str(flag) for flag in flags])


def refused(capsys, program, *flags):
    """The program, a function of flags, ends with exit code 2 and a sentence -> the sentence."""
    capsys.readouterr()  # what was said before
    with pytest.raises(SystemExit) as stop:
        program(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "error: " in error and "Traceback" not in error
    return error


def torchrun(script, *flags):
    """Two processes of a file, started by torchrun itself; tests.processes.call does without its ten seconds."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / script]
    return subprocess.run([*map(str, [*command, *flags])], env=env, capture_output=True, text=True, timeout=120)


def plant(monkeypatch, act):
    """Call act(step, losses) after the loss of each training step."""
    loss, calls = irepa.loss, []

    def planted(*args, **kwargs):
        out = loss(*args, **kwargs)
        if args[0].training:
            calls.append(1)
            act(len(calls) - 1, out)
        return out

    monkeypatch.setattr(irepa, "loss", planted)


def weights(out, which="model"):
    return torch.load(Path(out) / "last.pt", weights_only=True)[which]


def same_weights(a, b):
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def rows_of(out):
    return [json.loads(row) for row in (Path(out) / "log.jsonl").read_text().splitlines()]
