"""train.py: the same run however it is stopped, split over processes or disturbed."""

import argparse
import gc
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

import sample
import train
from inputs import images
from inputs.images import ImageSet
from irepa import Attention, Sampling
from plumbing import records
from plumbing.files import lock
from plumbing.jobs import open_job
from plumbing.processes import Noted, Ranks, noted_signals, spared
from tests.common import (
    HERE,
    RUN,
    black_and_white,
    plant,
    refused,
    rows_of,
    run,
    run_sample,
    same_weights,
    settings,
    weights,
)
from tests.processes import FORKED, call


def test_batches_cover_epochs_and_do_not_depend_on_ranks():
    nine, few = settings("--batch-size", "8", "--steps", "9"), settings("--batch-size", "8", "--steps", "3")
    whole = np.concatenate(list(train.batches(np.arange(24), nine, 0, 0, 1)))
    for epoch in range(3):
        assert sorted(whole[24 * epoch : 24 * epoch + 24]) == list(range(24))
    other = train.batch_at(0, np.arange(24), settings("--batch-size", "24", "--seed", "1"), {})
    assert len({tuple(order) for order in (np.arange(24), *whole.reshape(3, 24), other)}) == 5  # each its own order
    parted = settings("--batch-size", "8", "--steps", "9", "--accumulate", "2")
    ranks = [list(train.batches(np.arange(24), parted, 0, rank, 2)) for rank in range(2)]
    assert np.array_equal(np.concatenate([part for pair in zip(*ranks) for part in pair]), whole)
    later = np.concatenate(list(train.batches(np.arange(24), nine, 5, 0, 1)))
    assert np.array_equal(later, whole[40:])
    repeated = np.concatenate(list(train.batches(np.arange(3), few, 0, 0, 1)))
    assert len(repeated) == 24 and np.bincount(repeated).tolist() == [8, 8, 8]


def test_stop_and_resume_is_bit_for_bit(photos, tmp_path, monkeypatch, capsys):
    flags = [*RUN, "--data", photos, "--seed", 3, "--sample-every", 0]
    run(*flags, "--steps", 6, "--out", tmp_path / "straight", "--sample-every", 4)  # drawing changes nothing
    run(*flags, "--steps", 3, "--out", tmp_path / "stopped")
    again = "--resume", "--out", tmp_path / "stopped"
    assert "stopped exists; --resume continues it" in refused(capsys, run, *flags, "--out", tmp_path / "stopped")
    # the order of the data would be another; another network
    assert "--batch-size 8, not 4" in refused(capsys, run, *again, "--steps", 6, "--batch-size", 4)
    with monkeypatch.context() as patch:
        patch.setattr("plumbing.jobs.ImageSet", None)  # said before anything is decoded
        for flag, value, was in (("--method", "repa", "--method irepa"), ("--model", "SiT-B/4", "--model SiT-S/4")):
            said = refused(capsys, run, *again, "--steps", 6, flag, value)
            assert f"was started with {was}, not {value}" in said
    capsys.readouterr()
    run(*again, "--steps", 6)  # the other settings come from the run
    said = capsys.readouterr().out
    assert (
        "changed for the steps to come: steps 3 -> 6\n" in said and "23 images in 2 classes to train on, 1 held" in said
    )
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "stopped"))
    for which in ("model", "ema"):
        assert same_weights(a[which], b[which])
    for i, state in a["opt"]["state"].items():
        assert all(torch.equal(v, b["opt"]["state"][i][k]) for k, v in state.items())
    assert any((a["ema"][k] != v).any() for k, v in a["model"].items()) and a["classes"] == ["cats", "dogs"]
    (tmp_path / "straight/last.pt").rename(tmp_path / "kept.pt")  # as a run stopped before its first checkpoint
    for numbered in (tmp_path / "straight").glob("step-*.pt"):
        numbered.unlink()
    assert json.loads((tmp_path / "straight/config.json").read_text())["device"] == "cpu"
    assert "nothing to do" in refused(capsys, run, *again, "--steps", 6)
    shutil.copytree(photos / "dogs", tmp_path / "others/birds")
    said = refused(capsys, run, *again, "--steps", 7, "--data", tmp_path / "others")
    assert "was started with classes cats, dogs, not birds; start another --out" in said
    run("--resume", "--out", tmp_path / "straight")
    assert same_weights(a["model"], weights(tmp_path / "straight"))
    assert json.loads((tmp_path / "stopped/config-from-step-3.json").read_text())["steps"] == 6
    rows = [rows_of(tmp_path / name) for name in ("straight", "stopped")]
    assert [r["step"] for r in rows[0]] == [2, 4, 6] and [r["step"] for r in rows[1]] == [2, 3, 4, 6]
    assert rows[0][-1]["held_out"] == rows[1][-1]["held_out"]


def test_a_second_average_is_kept_beside_the_first(photos, tmp_path, capsys):
    flags = [*RUN, "--data", photos, "--sample-every", 0, "--ema", 0.5, "--no-ema-warmup"]
    flags += ["--ckpt-every", 1, "--keep", 4]
    run(*flags, "--ema2", 0.25, "--out", tmp_path / "two")
    run(*flags, "--out", tmp_path / "one")
    states = [torch.load(tmp_path / f"two/step-000000{n}.pt", weights_only=True) for n in range(1, 5)]
    for before, after in zip(states, states[1:]):
        for name, decay in dict(ema=0.5, ema2=0.25).items():
            for k, v in after["model"].items():
                torch.testing.assert_close(after[name][k], decay * before[name][k] + (1 - decay) * v)
    assert not same_weights(states[-1]["ema"], states[-1]["ema2"])
    assert all(same_weights(states[-1][which], weights(tmp_path / "one", which)) for which in ("model", "ema"))
    assert "ema2" not in torch.load(tmp_path / "one/last.pt", weights_only=True)
    run(*flags, "--ema2", 0.25, "--steps", 2, "--out", tmp_path / "stopped")
    run("--resume", "--out", tmp_path / "stopped", "--steps", 4)
    assert all(same_weights(states[-1][which], weights(tmp_path / "stopped", which)) for which in ("model", "ema2"))
    error = refused(capsys, run, "--resume", "--out", tmp_path / "one", "--steps", 5, "--ema2", 0.25)
    assert "was started without a second average: leave --ema2 out" in error


def test_flips_depend_on_seed_and_step_and_teacher_and_network_see_the_same(photos, tmp_path):
    job = open_job([*RUN, "--data", str(photos), "--flip", "--out", str(tmp_path / "run")], None, train.Learner)
    indices, _ = train.split(len(job.data))

    def seen(start=0, ranks=Ranks(), **changes):
        changed = job._replace(run=replace(job.run, **changes))
        return [(part, batch.images) for part, batch in train.feed(changed, indices, start, ranks)]

    def flips_of(seed):
        flips = []
        for (_, now), (_, plain) in zip(seen(seed=seed), seen(seed=seed, flip=False), strict=True):
            flips.append((now == plain.flip(3)).flatten(1).all(1))
            assert torch.equal(now[~flips[-1]], plain[~flips[-1]])
        return torch.stack(flips)

    flips, whole = flips_of(0), seen()
    assert flips.shape == (4, 8) and 8 < flips.sum() < 24 and not torch.equal(flips, flips_of(1))
    assert len({str(of_step) for of_step in flips}) == 4
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen(start=2), whole[2:], strict=True))
    ranks = [seen(ranks=Ranks(rank, 2), accumulate=2) for rank in range(2)]
    for step, (_, wanted) in enumerate(whole):
        parts = dict(part for own in ranks for part in own[2 * step : 2 * step + 2])
        assert torch.equal(torch.cat([parts[i, 4] for i in range(4)]), wanted)

    shown = []

    def loss(model, x, *args, **kwargs):
        shown.append(x)
        return dict(loss=sum(p.sum() for p in model.parameters()))

    def teacher(images):
        shown.append(images.float() / 127.5 - 1)

    teacher.grid = teacher.dim = 1
    learner = train.Learner(job._replace(method=replace(job.method, loss=loss)), Ranks(), indices)
    target = train.Target(teacher, len(job.data), 0, Ranks(), job.device)
    [(part, batch)] = train.fetch(train.feed(job, indices, 0, Ranks()), 1, Noted())[0]
    learner.gradients(0, [(part, target(batch))])
    assert torch.equal(*shown) and torch.equal(shown[0], whole[0][1].float() / 127.5 - 1)


def test_two_ranks_equal_one_process(tmp_path):
    # of drawn shapes there are so many that each rank holds some of them out
    flags = [*RUN, "--demo", "--warmup", 0, "--lr-schedule", "constant", "--sample-every", 0, "--out"]
    run(*flags, tmp_path / "one")
    run(*flags, tmp_path / "parts", "--accumulate", 2)
    codes, said = call(HERE, tmp_path, "train", *flags, tmp_path / "two", world=2)
    assert codes == [0, 0], said[-3000:]
    for name in ("parts", "two"):
        for k, v in weights(tmp_path / "one").items():
            # of steps of 1e-3: where a gradient is near Adam's epsilon, its rounding shows
            torch.testing.assert_close(weights(tmp_path / name)[k], v, rtol=1e-4, atol=2e-5)
    rows = [rows_of(tmp_path / name)[-1] for name in ("one", "two")]
    for key in ("loss", "denoise", "align", "held_out", "grad_norm"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4)
    few = ["--ckpt", tmp_path / "two/last.pt", "--num-images", 5, "--steps", 3, "--npz"]
    assert call(HERE, tmp_path, "sample", *few, tmp_path / "two.npz", world=2)[0] == [0, 0]
    run_sample(*few, tmp_path / "one.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["labels"], two["labels"])
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_is_not_applied(photos, tmp_path, monkeypatch, capsys, poison):
    def act(step, losses):
        if step in bad:
            losses["loss"] = losses["loss"] * poison

    bad = [3]
    plant(monkeypatch, act)
    run(*RUN, "--data", photos, "--steps", 4, "--ckpt-every", 1, "--keep", 3, "--out", tmp_path / "one")
    third, fourth = (torch.load(tmp_path / f"one/step-000000{n}.pt", weights_only=True) for n in (3, 4))
    assert same_weights(third["model"], fourth["model"])
    assert not (tmp_path / "one/step-0000001.pt").exists()
    last = rows_of(tmp_path / "one")[-1]
    assert last["skipped"] == 1 and math.isfinite(last["loss"]) and all(map(math.isfinite, last.values()))

    monkeypatch.undo()
    bad = range(3, 99)
    plant(monkeypatch, act)
    monkeypatch.setattr(records, "PATIENCE", 3)
    flags = [*RUN, "--data", photos, "--steps", 20, "--ckpt-every", 4, "--seed", 5, "--sample-every", 0]
    message = refused(capsys, run, *flags, "--out", tmp_path / "many")
    assert "in 3 steps in a row from step 3 on" in message
    data, args = ImageSet(photos, 16, progress=False), argparse.Namespace(seed=5, batch_size=8)
    for i in train.batch_at(3, train.split(24)[0], args, {}):
        assert data.files[i] in message
    state = torch.load(tmp_path / "many/last.pt", weights_only=True)
    assert state["step"] == 4  # the step before the last was the last that counted
    assert all(torch.isfinite(v).all() for w in ("model", "ema") for v in state[w].values())


def test_a_broken_image_saves_the_run_and_another_stands_in(tmp_path, monkeypatch, capsys):
    data = black_and_white(tmp_path / "data", 20, 16)
    monkeypatch.setattr(images, "IN_MEMORY", 0)  # as of large sets, whose files are opened when their turn comes
    monkeypatch.setattr(images, "CHECK_ALL", 0)
    flags = [*RUN, "--data", data, "--steps", 6, "--ckpt-every", 100, "--sample-every", 0, "--workers"]
    seen = list(train.batches(train.split(40)[0], settings("--batch-size", "8", "--steps", "6"), 0, 0, 1))
    late = next(i for i in seen[3] if all(i not in batch for batch in seen[:3]))
    file = data / ImageSet(data, 16, progress=False).files[late]
    file.write_bytes(file.read_bytes()[:45])
    for workers in (0, 2):
        out = tmp_path / f"{workers}"
        message = refused(capsys, run, *flags, workers, "--out", out)
        assert f"{file} cannot be decoded" in message and "step 3 is saved" in message
        assert "let another stand in: --skip-broken" in message and f"--resume --out {out} goes on" in message
        assert torch.load(out / "last.pt", weights_only=True)["step"] == 3
        assert "step 3 is saved" in refused(capsys, run, "--resume", "--out", out)
        run("--resume", "--skip-broken", "--out", out)
        assert sum(row["replaced"] for row in rows_of(out)) == sum(late in batch for batch in seen)
    run(*flags, 0, "--skip-broken", "--out", tmp_path / "straight")
    assert same_weights(weights(tmp_path / "straight"), weights(tmp_path / "0"))
    assert same_weights(weights(tmp_path / "straight"), weights(tmp_path / "2"))
    (tmp_path / "lazy.py").write_text(
        f"import sys\nsys.path.append({str(HERE)!r})\nimport train\nfrom inputs import images\n"
        "images.IN_MEMORY = images.CHECK_ALL = 0\nmain = train.main\n"
    )
    codes, said = call(tmp_path, tmp_path, "lazy", *flags, 0, "--out", tmp_path / "two", world=2)
    assert sorted(codes) == [2, 75] and "step 3 is saved" in said and "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_75(photos, tmp_path, monkeypatch, capsys, number):
    flags = [*RUN, "--data", photos, "--workers", 2, "--accumulate", 8, "--ckpt-every", 100, "--sample-every", 0]
    run(*flags, "--out", tmp_path / "straight")

    def act(part, _):
        everyone = *multiprocessing.active_children(), multiprocessing.current_process()
        for process in everyone if part == 8 else ():  # the first of step 1, which wants seven more from the workers
            os.kill(process.pid, number)  # as Ctrl-C and schedulers do

    plant(monkeypatch, act)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--out", tmp_path / "stopped")
    assert stop.value.code == 75 and "step 2 is saved" in capsys.readouterr().out
    assert signal.getsignal(number) == before and torch.load(tmp_path / "stopped/last.pt")["step"] == 2
    run("--resume", "--out", tmp_path / "stopped")
    assert same_weights(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))
    assert not list((tmp_path / "stopped").glob("config-from-step-*"))  # no setting is another


def test_a_second_signal_ends_a_run_that_a_script_has_started(monkeypatch, capfd):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of what is started with & there
    try:
        with pytest.raises(KeyboardInterrupt), noted_signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "once more" in capfd.readouterr().err


def test_a_compiler_survives_ctrl_c(capfd):
    compiler = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(100)"]
    with noted_signals() as signals:
        with spared(True):
            process = subprocess.Popen(compiler, stdout=subprocess.PIPE)
            process.stdout.readline()
            for pid in (process.pid, os.getpid()):  # as a terminal does
                os.kill(pid, signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
        assert signals == [signal.SIGINT]
    process.kill()
    process.wait()


def test_a_signal_ends_a_grid_and_leaves_no_half_of_it(photos, tmp_path, monkeypatch, capsys):
    save = Image.Image.save

    def stopped(image, file, *args, **settings):
        if "samples" not in file.name:
            return save(image, file, *args, **settings)
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)

    monkeypatch.setattr(Image.Image, "save", stopped)
    with pytest.raises(SystemExit) as stop:
        run(*RUN, "--data", photos, "--out", tmp_path / "run", "--sample-every", 2)
    assert stop.value.code == 75 and torch.load(tmp_path / "run/last.pt")["step"] == 2
    assert not list((tmp_path / "run/samples").iterdir())
    run(*RUN, "--data", photos, "--out", tmp_path / "last", "--steps", 2, "--sample-every", 2)  # in the last one
    assert f"{tmp_path}/last/curves.png shows the run" in capsys.readouterr().out


def test_workers_that_give_nothing_keep_no_run(photos, tmp_path, monkeypatch, capsys):
    flags = [*RUN, "--data", photos, "--workers", 2, "--sample-every", 0]
    read = ImageSet.__getitem__

    def hang(data, part):  # as of a network drive that is gone
        if get_worker_info() and get_worker_info().id == 1:
            time.sleep(1000)
        return read(data, part)

    monkeypatch.setattr(ImageSet, "__getitem__", hang)
    # while step 1 is waited for
    plant(monkeypatch, lambda step, _: threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start())
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--out", tmp_path / "stopped")
    assert stop.value.code == 75 and torch.load(tmp_path / "stopped/last.pt")["step"] == 1
    for worker in multiprocessing.active_children():  # as at the end of a process: kill_workers
        worker.kill()
        worker.join()

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(ImageSet, "__getitem__", read)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    said = refused(capsys, run, *flags, "--out", tmp_path / "full")
    assert "no room in shared memory" in said and "--shm-size" in said and "--workers 0" in said


def test_all_ranks_stop_after_the_same_step(photos, tmp_path):
    script = tmp_path / "signalled.py"
    script.write_text(
        f"import os, signal, sys\nsys.path.append({str(HERE)!r})\nimport irepa, train\nloss, calls = irepa.loss, []\n"
        "def planted(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return loss(*args, **kwargs)\n"
        "irepa.loss, main = planted, train.main\n"
    )
    flags = ["--data", photos, "--steps", 200, "--log-every", 200, "--ckpt-every", 200, "--out", tmp_path / "run"]
    codes, said = call(tmp_path, tmp_path, "signalled", *RUN, *flags, world=2)
    assert codes == [75, 75] and said.count("stopped: step 3 is saved") == 1
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 3
    script.write_text(script.read_text().replace("signal.SIGTERM", "signal.SIGKILL"))
    codes, said = call(tmp_path, tmp_path, "signalled", "--resume", "--out", tmp_path / "run", world=2)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, codes[1])  # a rank that dies leaves no other waiting


@pytest.mark.parametrize("method,precision", [("irepa", "fp32"), ("irepa", "bf16"), ("meanflow", "fp32")])
def test_checkpointed_blocks_compute_the_same_twice(photos, tmp_path, monkeypatch, method, precision):
    forwards, forward = [], Attention.forward

    def counted(attention, x):
        forwards[-1] += torch.is_grad_enabled()
        return forward(attention, x)

    monkeypatch.setattr(Attention, "forward", counted)
    for flag in ("--no-checkpoint-blocks", "--checkpoint-blocks"):
        forwards.append(0)
        how = ["--method", method, "--precision", precision, flag, "--sample-every", 0]
        run(*RUN, "--data", photos, *how, "--out", tmp_path / flag)
    assert same_weights(*(weights(tmp_path / flag) for flag in ("--no-checkpoint-blocks", "--checkpoint-blocks")))
    assert forwards[1] == 2 * forwards[0] > 0


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert records.versions()["git_commit"] is None and records.versions()["torch"] == str(torch.__version__)


def test_a_full_disk_loses_no_checkpoint(photos, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    plant(monkeypatch, lambda step, _: step == 3 and resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1])))
    try:
        with pytest.raises(SystemExit, match="step 6 could not be saved"):
            run(*RUN, "--data", photos, "--steps", 6, "--out", tmp_path / "run", "--sample-every", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "last.pt cannot be written (" in capsys.readouterr().err
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 3
    assert not list((tmp_path / "run").glob("*.tmp"))
    run("--resume", "--out", tmp_path / "run")
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 6


def test_a_damaged_checkpoint_is_named_with_the_newest_good_one(photos, tmp_path, capsys):
    out = tmp_path / "run"
    run(*RUN, "--data", photos, "--ckpt-every", 1, "--keep", 3, "--out", out, "--sample-every", 0)
    kept = ["last.pt", "step-0000002.pt", "step-0000003.pt", "step-0000004.pt"]
    assert sorted(file.name for file in out.glob("*.pt")) == kept
    for damaged in (out / "step-0000004.pt", out / "last.pt"):
        whole = damaged.read_bytes()
        damaged.unlink()
        damaged.write_bytes(whole[: len(whole) // 2])
    torch.save(dict(step=3), out / "step-0000009.pt")  # foreign
    message = refused(capsys, run, "--resume", "--out", out, "--steps", 5)
    assert "last.pt is damaged" in message and "good one is" in message
    assert f"{out}/step-0000003.pt: copy it to {out}/last.pt" in message
    (out / "last.pt").unlink()
    log = (out / "log.jsonl").read_bytes()
    assert f"{out}/step-0000003.pt: copy it to {out}/last.pt" in refused(capsys, run, "--resume", "--out", out)
    assert (out / "log.jsonl").read_bytes() == log
    shutil.copy(out / "step-0000003.pt", out / "last.pt")
    run("--resume", "--out", out, "--steps", 4)


def hold(folder, line):
    held = lock(folder)
    line.send("held")
    line.recv()
    held.close()


@contextmanager
def holding(folder):
    """Another process holds the folder meanwhile, and is then killed."""
    ours, theirs = FORKED.Pipe()
    process = FORKED.Process(target=hold, args=(folder, theirs))
    process.start()
    assert ours.recv() == "held"
    try:
        yield
    finally:
        process.kill()
        process.join()


def test_a_second_run_in_one_folder_is_refused(photos, tmp_path, capsys):
    out, unfinished = tmp_path / "run", tmp_path / "s.npz.parts"
    run(*RUN, "--data", photos, "--out", out, "--sample-every", 0)
    unfinished.mkdir()
    again = run, "--resume", "--out", out, "--steps", 5
    samples = run_sample, "--ckpt", out / "last.pt", "--num", 1, "--steps", 2, "--npz", tmp_path / "s.npz"
    for folder, (program, *flags) in ((out, again), (unfinished, samples)):
        with holding(folder):
            assert "another process is writing to" in refused(capsys, program, *flags)
        program(*flags)  # the other was killed, and left its file


def test_the_rate_warms_up_then_falls_and_the_decay_rises():
    run = settings("--lr", "1", "--steps", "20", "--warmup", "4", "--ema", "0.9")
    assert [train.learning_rate(run, step) for step in (0, 1, 3, 4, 19)] == [0.25, 0.5, 1, 1, 1]
    run.lr_schedule = "cosine"
    rates = [train.learning_rate(run, step) for step in (0, 2, 5, 10)]
    assert rates == pytest.approx([0.25, 0.75 * 0.975528, 0.853553, 0.5], rel=1e-5)  # (1 + cos(pi step / 20)) / 2
    decays = [train.ema_decay(run, step) for step in (0, 8, 79, 80, 10**6)]
    assert decays == pytest.approx([0.1, 0.5, 80 / 89, 0.9, 0.9])
    run.ema_warmup = False
    assert train.ema_decay(run, 0) == 0.9


def test_a_step_is_clipped_and_its_whole_norm_reported():
    moments = {}
    for clip in (None, 100.0, 2.0):
        model = torch.nn.Linear(3, 1, bias=False)
        opt = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        (10 * model(torch.tensor([[1.0, 2.0, 2.0]]))).sum().backward()  # a gradient of norm 30
        norms, skipped = train.update(dict(model=model), dict(model=opt), [], clip, 0.1)
        assert norms["grad_norm"].item() == pytest.approx(30) and skipped == 0 and model.weight.grad is None
        moments[clip] = opt.state[model.weight]["exp_avg"].norm().item()
    assert moments == pytest.approx({None: 3.0, 100.0: 3.0, 2.0: 0.2}, rel=1e-4)  # a tenth of what is applied


def test_the_average_keeps_no_history():
    model = torch.nn.Linear(3, 2)
    ema = torch.nn.Linear(3, 2).requires_grad_(False)
    start, opt = ema.weight.clone(), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(1, 3)).sum().backward()
    train.update(dict(model=model), dict(model=opt), [], 1.0, 0.1)
    train.average(ema, model, 0.9)
    torch.testing.assert_close(ema.weight, 0.9 * start + 0.1 * model.weight.detach())
    assert not ema.weight.requires_grad and ema.weight.grad_fn is None  # or memory grows with each step


def test_no_process_or_file_is_left_behind(photos, tmp_path):
    def counted():
        gc.collect()
        for worker in multiprocessing.active_children():  # a busy machine takes its time
            worker.join(60)
        return len(os.listdir("/proc/self/fd")), len(multiprocessing.active_children())

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are counted in /proc")
    sets = [tmp_path / "z.zip", photos]
    with zipfile.ZipFile(sets[0], "w") as z:
        for file in ImageSet(photos, 16, progress=False).files:
            z.write(photos / file, file)
    counts = []
    for n in range(4):
        run(*RUN, "--data", sets[n % 2], "--workers", 2 * (n % 2), "--out", tmp_path / f"{n}", "--sample-every", 0)
        counts.append(counted())
    assert counts[1] == counts[2] == counts[3] and counts[3][1] == 0


@pytest.mark.parametrize("method", ["irepa", "sit"])
def test_a_tiny_run_overfits(tmp_path, method):
    few = black_and_white(tmp_path / "few", 2, 16)
    flags = f"--method {method} --model SiT-S/2 --hidden-size 64 --steps 150 --lr 3e-3 --ema 0.9 --log-every 50"
    run(*RUN, "--data", few, "--out", tmp_path / "run", *flags.split())
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["denoise"] < 0.25 < 0.4 < rows[0]["denoise"]
    if method == "sit":
        assert rows[-1]["align"] == 0
    model, _ = sample.load_checkpoint(tmp_path / "run/last.pt")
    x = sample.generate(model, torch.tensor([0, 1] * 4), range(8), how=Sampling("heun", 20)).mean((1, 2, 3))
    assert (x[0::2] < -0.6).all() and (x[1::2] > 0.6).all()


def test_a_mistaken_teacher_is_said_before_an_image_is_decoded(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ImageSet, "decode", lambda *_: pytest.fail("an image was decoded"))
    flags = [*RUN, "--data", photos, "--out", tmp_path / "run", "--encoder"]
    assert "unknown encoder 'hogg'" in refused(capsys, run, *flags, "hogg")
    assert "timm knows no model 'resnt18'; it has resnet18" in refused(capsys, run, *flags, "timm:resnt18")
    assert "there is no such file" in refused(capsys, run, *flags, "timm:resnet18", "--encoder-weights", "nowhere")
    assert "--cls-weight lies in [0, 1]" in refused(capsys, run, *flags, "hog", "--cls-weight", 2)


def test_a_map_and_its_mean_are_a_teacher(photos, tmp_path, capsys):
    flags = [*RUN, "--data", photos, "--encoder", "timm:test_convnext", "--encoder-weights", "random", "--out"]
    losses = []
    for a in (0, 0.5):
        run(*flags, tmp_path / f"{a}", "--cls-weight", a)
        losses.append([row["align"] for row in rows_of(tmp_path / f"{a}")])
    assert losses[0] != losses[1]
    message = refused(capsys, run, "--resume", "--steps", 6, "--cls-weight", 0.2, "--out", tmp_path / "0.5")
    assert "was started with --cls-weight 0.5, not 0.2" in message


def test_the_demos_model_learns_ones_own_images(photos, tmp_path, capsys):
    flags = [*RUN, "--demo", "--data", photos, "--out", tmp_path / "run"]
    run(*flags)
    assert "photos0: a folder of class folders, 24 images in 2 classes" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["data"], record["classes"], record["ema"]) == (str(photos), ["cats", "dogs"], 0.998)
    run("--resume", "--out", tmp_path / "run", "--steps", 5)
    assert rows_of(tmp_path / "run")[-1]["step"] == 5
