"""plumbing/trackers.py: TensorBoard and Weights & Biases get what the log has, also from a run that goes on."""

import json
import sys

import pytest

from tests.common import RUN, refused, rows_of, run


def twice(out, *flags):
    """A run of four steps that goes on to eight, rows and grids every two -> the rows of its log."""
    run(*RUN, "--demo", "--sample-every", 2, *flags, "--out", out)
    run("--resume", "--steps", 8, "--out", out)
    return rows_of(out)


def test_tensorboard_has_the_rows_and_the_grids(tmp_path):
    pytest.importorskip("tensorboard", reason="an optional package: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = twice(tmp_path / "run", "--tensorboard")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert {*events.Tags()["scalars"]} == rows[0].keys() - {"step"}
    for name in ("loss", "held_out", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [2, 4, 6, 8]
        assert [value for _, value in found] == pytest.approx([row[name] for row in rows], rel=1e-5)
    grids = events.Images("samples")
    assert [grid.step for grid in grids] == [2, 4, 6, 8] and grids[0].height == 1000


def in_leveldb(data):
    """The records of a log in LevelDB's format, as wandb writes it behind a header of its own."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:  # the rest of a block
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_wandb_has_the_rows_and_the_grids_in_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="an optional package: pip install wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows, found, runs = twice(tmp_path / "run", "--wandb", "alignment"), [], []
    for file in sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb")):
        for data in in_leveldb(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    losses = [(row["step"], row["loss"]) for row in found if "loss" in row]
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-5)) for row in rows]
    assert [row["step"] for row in found if "samples" in row] == [2, 4, 6, 8]
    assert {(run.project, run.run_id) for run in runs} == {("alignment", (tmp_path / "run/wandb-id.txt").read_text())}


def test_a_package_that_is_absent_is_said_before_training(tmp_path, monkeypatch, capsys):
    for package, flags in (("tensorboard", ["--tensorboard"]), ("wandb", ["--wandb", "alignment"])):
        monkeypatch.setitem(sys.modules, package, None)
        assert f"pip install {package}" in refused(capsys, run, *RUN, "--demo", *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
