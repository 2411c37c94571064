"""Files that are whole or not there, folders that one process holds, tensors read without executing anything."""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

OURS = "irepa"  # in the metadata of a .safetensors, before what a checkpoint holds beside its tensors


def one_line(error, most=None):
    """An error's text on one line, for a person; of a longer one the first `most` characters and …"""
    text = str(error).strip()
    if "Original Traceback" in text:  # of a DataLoader's worker: what it said, without the name of the class
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    if isinstance(error, KeyError) and isinstance(error.args[0], str):
        return f"{text} is missing"
    if most and len(text) > most:
        text = f"{text[:most].rpartition(' ')[0] or text[:most]} …"
    return text or type(error).__name__


def shown(name):
    """A name for people: bytes of it that are no UTF-8 as \\xe9, where printing them would fail."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@contextmanager
def mistakes(program, *kinds):
    """A user's mistake, an error of `kinds` (ValueError and OSError by default), ends in one sentence and exit 2."""
    try:
        yield
    except kinds or (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read what it says has gone, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it ends
            raise SystemExit(141) from error
        time.sleep(2 * (os.environ.get("LOCAL_RANK", "0") != "0"))  # let one process of a machine speak first
        tqdm.write(f"{program}: error: {one_line(error)}", file=sys.stderr)  # on a line of its own, beside a bar
        raise SystemExit(2) from error


def write_whole(path, save):
    """All of what save(file) writes or nothing under `path`: killed while writing, what was there before stays.

    OSError where it does not fit on the disk.
    """
    try:
        with open(f"{path}.tmp", "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except RuntimeError as e:  # torch.save's own for a full disk
        raise OSError(f"{path} cannot be written (the disk is full, or fails: {one_line(e, 200)})") from e
    except OSError as e:
        raise OSError(f"{path} cannot be written ({one_line(e, 200)})") from e
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


def write_text(path, text):
    write_whole(path, lambda f: f.write(text.encode()))


def lock(folder, wait=False):
    """A context that holds `folder` for this process, however it ends. ValueError where another process holds it, but
    with wait, until that one lets go."""
    try:
        import fcntl
    except ImportError:
        print(f"warning: this system has no file locks; see that no second run writes to {folder}")
        return nullcontext()
    file = open(Path(folder) / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))  # not inherited by workers, unlike flock
    except (BlockingIOError, PermissionError) as e:
        file.close()
        raise ValueError(f"another process is writing to {folder}: wait for it, or choose another name") from e
    return file


def hold_unfinished(folder, record, leave_out):
    """Make the folder of unfinished work, or find that it is of the same settings, and hold it. ValueError if not.

    The settings are those of record but for what is left out.
    """
    same = json.loads(json.dumps({k: v for k, v in record.items() if k not in leave_out}))  # tuples become lists
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    if not {file.name for file in folder.iterdir()} - {"settings.json.tmp", ".lock"}:
        write_text(folder / "settings.json", json.dumps(same))
    try:
        found = dict(json.loads((folder / "settings.json").read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"{folder} holds no settings that can be read ({one_line(e)}): delete it") from e
    for key in same:
        if same[key] != found.get(key):
            was = f"{key} {found.get(key)}, not {same[key]}"
            raise ValueError(f"{folder} holds unfinished samples with {was}: delete it, or use another name")
    return held


def free_at(path):
    """Bytes that are free on the disk where `path` lies, or will."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.is_dir())).free


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()  # a piece at a time: some have tens of gigabytes


def downloaded(repo, *names):
    """Whether one of these files of a repository of the Hugging Face hub has been downloaded before.

    OSError, at once, where none has and the hub cannot be reached: its own library tries for a minute.
    """
    from huggingface_hub import constants, try_to_load_from_cache, utils  # late: of what is downloaded alone

    if any(isinstance(try_to_load_from_cache(repo, name), str) for name in names):
        return True
    if not constants.HF_HUB_OFFLINE:
        try:
            utils.get_session().head(constants.ENDPOINT, timeout=20)
        except Exception as e:  # the library beneath it, and its errors, change with the version
            raise OSError(f"{constants.ENDPOINT} cannot be reached: {one_line(e, 200)}") from e
    return False


def read_safetensors(path):
    """The tensors by name; of a file that sample.py exported, the dict of a checkpoint."""
    with safe_open(path, "pt") as file:
        facts, tensors = (file.metadata() or {}).get(OURS), {name: file.get_tensor(name) for name in file.keys()}
    if facts is None:
        return tensors
    data = json.loads(facts)
    for name, tensor in tensors.items():
        entry, _, name = name.partition(".")
        data.setdefault(entry, {})[name] = tensor
    return data


def read_pt(path):
    """What torch.save or safetensors wrote to `path`, on the CPU, executing nothing in it. ValueError, saying why."""
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA's released files hold one
            # the format before torch 1.6 is no zip, and cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL ([\w.]+)", str(e))
        why = f"; it would call {name[1]}" if name else ""
        raise ValueError(f"{path} is refused: it is no file of tensors, or would run code when loaded{why}") from e
    except Exception as e:  # the readers of zip, pickle and tensors raise anything on a damaged file
        raise ValueError(f"{path} is damaged, or no file of tensors ({type(e).__name__}: {one_line(e, 200)})") from e
