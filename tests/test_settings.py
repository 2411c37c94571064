"""plumbing/settings.py: flags over presets over defaults, each knob once, and each mistake in one sentence."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from inputs.teachers import load_encoder
from inputs.vae import load_vae
from plumbing.flags import comments_of
from plumbing.methods import method_named, method_names
from plumbing.processes import settle_compile
from plumbing.settings import FOUND, Run, network_config, resolve
from tests.common import HERE, RUN, refused, run, run_sample, settings


def network(*flags):
    run, method, _ = resolve(["--out", "not/there", *flags])
    return network_config(run, method)


def test_flags_win_over_presets_and_presets_over_defaults(capsys):
    def five(*flags):
        config = network("--image-size", "32", "--model", "SiT-S/4", *flags)
        return config.projector, config.kernel_size, config.gamma, config.proj_coeff, config.encoder_depth

    assert five() == five("--method", "irepa") == ("conv", 3, 0.6, 1.0, 4)
    assert five("--method", "repa") == ("mlp", 3, None, 0.5, 4)
    assert five("--method", "sit")[0] is None
    assert five("--gamma", "0.8", "--method", "repa", "--proj-coeff", "1") == ("mlp", 3, 0.8, 1.0, 4)
    assert five("--kernel-size", "1", "--gamma", "none", "--encoder-depth", "7") == ("conv", 1, None, 1.0, 7)
    assert five("--depth", "2")[4] == 2
    assert network("--image-size", "32", "--model", "SiT-L/4").encoder_depth == 8
    args = settings("--encoder", "dinov2_vitb14")  # the paper's
    assert (args.model, args.image_size, args.batch_size, args.lr, args.clip) == ("SiT-XL/2", 256, 256, 1e-4, 1.0)
    assert (args.ema, args.steps, args.data, args.warmup) == (0.9999, 400_000, None, 0)
    assert settings("--demo", "--steps", "7").steps == 7
    assert network("--demo", "--model", "SiT-B/8").hidden_size == 768 and network("--demo").hidden_size == 192
    assert network("--demo", "--depth", "1").encoder_depth == 1
    assert settings("--demo", "--data", "photos").data == "photos"
    with pytest.raises(ValueError, match="with --data, or leave --tokens"):
        settings("--demo", "--tokens", "tokens")
    with pytest.raises(SystemExit) as stop:
        settings("--kernel", "3", "--lerning-rate", "1")
    # a flag is written out
    assert stop.value.code == 2 and "unrecognized arguments: --kernel 3 --lerning-rate 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        settings("--data", "train-0.parquet", __file__)  # as the shell makes it of a pattern
    assert "made these names of a pattern, write it in quotes" in capsys.readouterr().err


def test_each_field_is_a_flag_with_its_comment_as_help(capsys):
    for name in method_names():
        method = method_named(name)
        with pytest.raises(SystemExit) as stop:
            resolve(["--method", name, "--help"])
        shown = capsys.readouterr().out
        own = [field.name for field in fields(method.Config)]
        assert stop.value.code == 0 and {*FOUND} <= {*own}
        for part, left_out in ((Run, ["network"]), (method.Config, FOUND)):
            comments = comments_of(part)
            for field in fields(part):
                if field.name in left_out or (field.name == "align" and name in ("irepa", "repa", "sit")):
                    assert not re.search(rf"--{field.name.replace('_', '-')}\b[^-]", shown), (name, field.name)
                    continue
                text = comments[field.name][1]  # a field without a comment would be no flag, and not be missed
                assert text and re.search(rf"^  --{field.name.replace('_', '-')}\b", shown, re.M), (name, field.name)
                assert text[:60].split("(")[0].strip() in " ".join(shown.split()), (name, field.name)


def test_a_flag_of_another_method_is_unknown(capsys):
    for flags in ("--omega 2", "--method irepa --omega 2", "--method jit --lpips none", "--align repa"):
        with pytest.raises(SystemExit) as stop:
            settings(*flags.split())
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"unrecognized arguments: {' '.join(flags.split()[-2:])}" in error


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--data nowhere", "nowhere does not exist"),
        ("--image-size 18", "--image-size 18 is not a multiple of --patch-size 4"),
        ("--batch-size 9 --accumulate 2", "does not divide"),
        ("--model SiT-M/4", "there are SiT-S/1"),
        ("--method jitter", "--method is one of irepa, repa, sit, "),
        ("--method meanflow --align jepa", "--align is one of irepa, repa, none, not jepa"),
        ("--path straight", "--path is linear or cosine, not 'straight'"),
        ("--projector lin", "--projector is conv, mlp, linear or none, not lin"),
        ("--precision fp16", "--precision is auto or bf16 or fp32, not fp16"),
        ("--lr-schedule step", "--lr-schedule is constant or cosine, not step"),
        ("--encoder nothing", "unknown encoder"),
        ("--depth 4 --encoder-depth 5", "--encoder-depth 5 is not in"),
        ("--resume", "does not exist"),
        ("--resume --out README.md", "README.md is a file; --out takes the run's folder: --out ."),
        ("--device tpu9", "cannot be used"),
        ("--steps 0", "must be positive"),
        ("--lr nan", "must be positive"),
        ("--seed -1", "--seed must not be negative, and is -1"),
        ("--seed 9223372036854775808", "--seed must be below 2^63"),
        ("--kernel-size 0", "--kernel-size must be positive"),
        ("--image-size 4 --model SiT-S/2", "at least 8 px"),
        ("--image-size 512 --vae none", "16384 tokens"),
        ("--image-size 12 --latents cache", "--latents goes with a --vae"),
        ("--image-size 128 --latents cache --flip", "--latents holds no mirrored ones"),
        ("--ema2 1", "--ema2 and --beta2 lie in [0, 1)"),
        ("--vae nowhere", "neither a file or folder"),
        ("--gamma -1", "--gamma must not be negative, and is -1"),
        ("--proj-coeff -0.5", "--proj-coeff must not be negative, and is -0.5"),
        ("--encoder dinov2_vitb41", "unknown encoder 'dinov2_vitb41'; did you mean dinov2_vitb14? there are"),
        ("--image-size 132", "VAE's factor 8"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_2(photos, tmp_path, capsys, flags, message):
    error = refused(capsys, run, *RUN, "--data", photos, "--out", tmp_path / "run", *flags.split())
    assert message in error and not (tmp_path / "run").exists()


def test_what_the_surroundings_lack_is_said_before_a_run(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "or try --demo" in refused(capsys, run)  # before a VAE is fetched
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/last.pt").touch()
    assert "name the run with --out (there are runs/mine)" in refused(capsys, run, "--resume")
    flags = [*RUN, "--data", photos, "--out", tmp_path / "run"]
    assert "--batch 3; did you mean --batch-size?" in refused(capsys, run, *flags, "--batch", 3)

    def broken(function):
        raise RuntimeError(
            "backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nand a page of advice"
        )

    monkeypatch.setattr(torch, "compile", broken)
    said = refused(capsys, run, *flags, "--compile")
    assert "No working C++ compiler found): --no-compile goes without it" in said and "advice" not in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is set, but not RANK, MASTER_ADDR, MASTER_PORT" in refused(capsys, run, *flags)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "0")
    said = refused(capsys, run, *flags)
    assert "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start it with torchrun" in said


@pytest.mark.parametrize(
    "flags", [["--data", ""], ["--init", ""], ["--method", ""], ["--out="], ["--resume", "--out", ""]]
)
def test_an_empty_value_is_no_value(capsys, flags):
    name = [flag for flag in flags if flag][-1].strip("=")
    assert f"{name} has an empty value" in refused(capsys, run, "--demo", *flags)


@pytest.mark.parametrize("flags", [["--ckpt", ""], ["--ckpt", "x.pt", "--export", ""], ["--ckpt="]])
def test_an_empty_value_is_none_of_sampling_either(capsys, flags):
    assert "has an empty value" in refused(capsys, run_sample, *flags)


def test_who_reads_may_go():
    program = "from plumbing.files import mistakes\nwith mistakes('p'):\n    for _ in range(10**5): print('x' * 99)"
    ended = subprocess.run(f'"{sys.executable}" -c "{program}" | head -1', shell=True, capture_output=True, cwd=HERE)
    assert ended.stdout == b"x" * 99 + b"\n" and not ended.stderr


def test_blocks_are_compiled_where_it_pays(monkeypatch, capsys):
    cpu, asked = torch.device("cpu"), []
    monkeypatch.setattr(torch, "compile", lambda f: asked.append(f) or f)
    assert settle_compile(None, cpu, 1000) is settle_compile(True, cpu, 1) is True and len(asked) == 2
    assert settle_compile(None, cpu, 999) is settle_compile(False, cpu, 10**6) is False and len(asked) == 2

    def broken(function):
        raise RuntimeError("backend raised:\nno compiler\n\nadvice")

    monkeypatch.setattr(torch, "compile", broken)
    assert settle_compile(None, cpu, 1000) is False  # nobody asked for it
    assert capsys.readouterr().out.endswith("which would save a quarter of the time: backend raised: no compiler\n")
    assert settings("--demo").compile is False  # its first step should not wait
    assert resolve(["--demo", "--method", "repa"])[0].out == "runs/repa-demo"


def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path, monkeypatch, capsys):
    def get_session():
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.utils.get_session", get_session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, load in (("sd-vae-ft-mse", load_vae), ("timm:resnet18", lambda name: load_encoder(name, 8))):
        with pytest.raises(ValueError, match=f"{name} cannot be .*cannot be reached: Name or service not known"):
            load(name)
