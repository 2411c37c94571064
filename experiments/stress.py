"""What a week on a cluster does to a run, in minutes on a CPU: each check prints a line, and a failure exits with 1.

python -m experiments.stress kill        50 kill -9 at random moments: the weights of a run never killed, to the bit
python -m experiments.stress stop        10 SIGTERM likewise; each ends the run after the step in which it arrives
python -m experiments.stress memory      20,000 steps: the resident size does not grow
python -m experiments.stress fuzz        thousands of damaged checkpoints, caches, zips and npz: only named errors
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import fid
from inputs.images import ImageSet
from inputs.latents import Cached, manifest_of
from inputs.prepared import Files, Prepared
from inputs.shards import labels_of
from inputs.teachers import load_encoder
from inputs.tokens import Tokens
from inputs.vae import read_stats
from plumbing.checkpoints import open_checkpoint
from plumbing.files import mistakes
from plumbing.flags import make_parser
from plumbing.processes import STOPPED
from plumbing.records import rows_of

ROOT = Path(__file__).parent.parent
TRAIN = (
    "train.py --image-size 16 --model SiT-S/4 --hidden-size 64 --depth 2 --num-heads 2 --batch-size 8 --lr 1e-3"
    " --device cpu --precision fp32 --sample-every 0 --no-compile"
).split()


def photos(folder, count=24):
    rs = np.random.RandomState(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rs.randint(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
    return folder


def start(*command):
    """python COMMAND in the repository's root, silent."""
    env, quiet = dict(os.environ, OMP_NUM_THREADS="1"), subprocess.DEVNULL
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, cwd=ROOT, stdout=quiet, stderr=quiet)


def steps_in(out):
    """The steps of the whole rows of a log."""
    return [row["step"] for row in rows_of(out / "log.jsonl")]


# ---- Interrupted runs ----


def start_again(flags, out):
    """The run of `flags` in `out`, from wherever it is."""
    begun = any((out / name).exists() for name in ("config.json", "last.pt"))
    return start(*(["train.py", "--resume", "--out", out] if begun else [*flags, "--out", out]))


def same_end(a, b):
    """-> (whether two runs have the same weights and averages, whether b's log has all of a's steps, each once)."""
    states = [torch.load(out / "last.pt", weights_only=True) for out in (a, b)]
    equal = all(torch.equal(v, states[1][which][k]) for which in ("model", "ema") for k, v in states[0][which].items())
    steps = steps_in(b)
    return equal, sorted(set(steps)) == steps and set(steps_in(a)) <= set(steps)


def kill(work, count, seed):
    """Kill a run `count` times, let it end, and compare it with one that nobody killed."""
    flags = [*TRAIN, "--data", photos(work / "photos"), "--steps", 4000, "--log-every", 5, "--ckpt-every", 2]
    clock = time.time()
    straight = start(*flags, "--out", work / "straight")
    while not (work / "straight/last.pt").exists():
        time.sleep(0.01)
    warm = time.time() - clock  # until the first checkpoint
    assert straight.wait() == 0
    rng, out, writing = random.Random(seed), work / "killed", 0
    for kills in tqdm(range(count), unit="kill"):
        run = start_again(flags, out)
        try:
            run.wait(rng.uniform(0.5, 1.3) * warm if kills % 5 else rng.uniform(0, 1) * warm)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            writing += (out / "last.pt.tmp").exists()
        else:
            assert run.returncode in (0, 2), run.returncode  # 2: there was nothing left to do
            raise SystemExit(f"the run ended after {kills} kills: give it more steps")
    assert start_again(flags, out).wait() == 0, "the last resume failed"
    equal, whole = same_end(work / "straight", out)
    print(
        f"kill: {count} kills, {writing} while a checkpoint was written; weights and EMA equal: {equal}; log: {whole}"
    )
    return equal and whole


def stop(work, count, seed):
    """Ask a run to stop `count` times, let it end, and compare it with one that nobody stopped."""
    flags = [*TRAIN, "--data", photos(work / "photos"), "--steps", 100 * count, "--log-every", 1]
    assert start(*flags, "--out", work / "straight").wait() == 0
    rng, out, late = random.Random(seed), work / "stopped", []
    for _ in tqdm(range(count), unit="stop"):
        before, run = len(steps_in(out)), start_again(flags, out)
        while len(steps_in(out)) == before and run.poll() is None:  # until it trains
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        run.send_signal(signal.SIGSTOP)  # frozen: what it has logged is where it is
        os.waitpid(run.pid, os.WUNTRACED)
        done = steps_in(out)[-1]
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGCONT)
        assert run.wait() == STOPPED, run.returncode
        late.append(torch.load(out / "last.pt", weights_only=True)["step"] - done)
    assert start_again(flags, out).wait() == 0, "the last resume failed"
    equal, whole = same_end(work / "straight", out)
    # the step at hand is the one after the last that was logged, or has ended already and is being logged
    print(f"stop: {count} stops, {late} steps after the last one logged; equal: {equal}; log: {whole}")
    return equal and whole and max(late) <= 2


def memory(work, steps):
    """Resident MiB of a run of `steps` steps, by tenths."""
    flags = [*TRAIN, "--data", photos(work / "photos"), "--steps", steps, "--log-every", max(1, steps // 200)]
    run, seen = start(*flags, "--ckpt-every", steps // 10, "--out", work / "run"), {}
    while run.poll() is None:
        time.sleep(0.2)
        rows = len(steps_in(work / "run"))
        try:
            pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            break
        if rows in range(1, 200) and pages:  # not the end, which draws the curves
            seen[rows * 10 // 200] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert run.wait() == 0
    values = [seen[k] for k in sorted(seen)]
    print(f"memory: MiB by tenth of {steps} steps: {' '.join(f'{v:.0f}' for v in values)}")
    return values[-1] < values[1] * 1.02 + 2


# ---- Damaged files ----


def mutated(data, rng):
    """A few bytes changed, cut out, doubled or blown up."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        i = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0:
            data[i : i + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[i : i + rng.choice((1, 16, len(data)))]
        elif kind == 2:
            data[i:i] = data[i : i + rng.choice((1, 64))]
        elif kind == 3:
            data[i : i + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"))
        elif kind == 4:
            data[i : i + 8] = os.urandom(8)
        else:
            digits = [k for k in range(len(data)) if chr(data[k]).isdigit()]
            k = rng.choice(digits) if digits else 0
            data[k : k + 1] = rng.choice((b"9" * 12, b"-1", b"0", b"1e9", b'"x"', b"null", b"[]"))
    return bytes(data)


ODD = (None, -1, 0, 1, 3, 10**9, 10**30, 1.5, float("nan"), "x", "", [], {}, [1], True, torch.zeros(3), torch.zeros(()))


def odd_checkpoint(state, rng):
    """The checkpoint with one entry, at any depth, replaced or removed."""
    state = {k: dict(v) if isinstance(v, dict) else v for k, v in state.items()}
    place = rng.choice([state, *(v for v in state.values() if isinstance(v, dict) and v)])
    key = rng.choice(list(place))
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(ODD)
    return state


def make_files(work):
    """One good file of each kind, in `work` -> (a checkpoint's dict, the images of the cache)."""
    flags = ["--data", photos(work / "photos"), "--image-size", 16, "--device", "cpu"]
    assert start(*TRAIN, *flags, "--steps", 2, "--out", work / "run").wait() == 0
    assert start("-m", "inputs.latents", *flags, "--vae", "tiny", "--out", work / "cache").wait() == 0
    state = torch.load(work / "run/last.pt", weights_only=True)
    del state["opt"]
    torch.save(state, work / "small.pt")
    with zipfile.ZipFile(work / "photos.zip", "w") as z:
        for path in (work / "photos").rglob("*.png"):
            z.write(path, path.relative_to(work / "photos"))
    images = np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    np.savez(work / "set.npz", arr_0=images)
    np.savez(work / "stats.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float16))
    grid = ["--grid", 5, "--encoder", "hog", "--out", work / "tokens"]
    assert start("-m", "inputs.teachers", *flags, *grid).wait() == 0
    assert start("sample.py", "--ckpt", work / "run/last.pt", "--export", work / "small.safetensors").wait() == 0
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(24)]
    for name in names:  # as REPA's preprocessing writes them
        (work / "vae-sd/00000").mkdir(parents=True, exist_ok=True)
        np.save(work / "vae-sd" / name, np.ones((8, 4, 4), np.float32))
    (work / "vae-sd/dataset.json").write_text(json.dumps({"labels": [[name, i // 12] for i, name in enumerate(names)]}))
    encoded = [{"bytes": path.read_bytes(), "path": None} for path in sorted((work / "photos").rglob("*.png"))]
    rows = datasets.Dataset.from_dict({"image": encoded, "label": [i % 2 for i in range(24)]})
    rows.to_parquet(work / "rows.parquet")
    rows.save_to_disk(work / "rows")
    torch.save(load_encoder("timm:test_vit", 5, "random").model.state_dict(), work / "encoder.pth")
    stats = dict(latents_scale=torch.ones(1, 4, 1, 1), latents_bias=torch.zeros(1, 4, 1, 1))
    torch.save(stats, work / "scale.pt")
    return state, ImageSet(work / "photos", 16, progress=False)


def fuzz(work, count, seed):
    """Mutated files into every reader of strangers' files, `count` for each, in children with bounded memory."""
    state, data = make_files(work)
    cache, mutant = work / "cache", work / "mutant"

    def cached(_):
        manifest_of(cache)
        latents = Cached(data, cache)
        latents[np.arange(len(data))]
        latents.statistics()

    def image_set(path):
        images, _ = fid.open_set(path)
        for _ in images.batches(0, images.count, 8) if images else ():
            pass

    def taught(_):
        tokens = Tokens(work / "tokens", "hog", 5)
        labels_of(tokens.path, tokens.manifest, data)
        tokens[np.arange(24)]

    def repas(_):
        prepared = Prepared(data, Files(work / "vae-sd"), dict(channels=4, factor=4), 16)
        prepared[np.arange(24)]
        prepared.statistics()

    def hugging_face(path):
        ImageSet(path, 16, True, False)

    def teacher(path):
        load_encoder("timm:test_vit", 5, path)

    (arrow,) = (work / "rows").glob("*.arrow")
    tokens, vae_sd, rows = work / "tokens/hog", work / "vae-sd", work / "rows"
    readers = {  # what is damaged, where the damaged one lies, who reads it
        "checkpoint, bytes": (work / "small.pt", mutant.with_suffix(".pt"), open_checkpoint),
        "checkpoint, entries": (state, mutant.with_suffix(".pt"), open_checkpoint),
        "cache, manifest": (cache / "manifest.json", cache / "manifest.json", cached),
        "cache, shard": (cache / "moments-00000.npy", cache / "moments-00000.npy", cached),
        "zip of images": (work / "photos.zip", mutant.with_suffix(".zip"), lambda p: ImageSet(p, 16, True, False)),
        "npz, images": (work / "set.npz", mutant.with_suffix(".npz"), image_set),
        "npz, statistics": (work / "stats.npz", mutant.with_suffix(".npz"), image_set),
        "export, bytes": (work / "small.safetensors", mutant.with_suffix(".safetensors"), open_checkpoint),
        "tokens, manifest": (tokens / "manifest.json", tokens / "manifest.json", taught),
        "tokens, shard": (tokens / "tokens-00000.npy", tokens / "tokens-00000.npy", taught),
        "REPA's dataset.json": (vae_sd / "dataset.json", vae_sd / "dataset.json", repas),
        "REPA's latent": (vae_sd / "00000/img-mean-std-00000003.npy",) * 2 + (repas,),
        "parquet": (work / "rows.parquet", mutant.with_suffix(".parquet"), hugging_face),
        "datasets, state": (rows / "state.json", rows / "state.json", lambda _: hugging_face(rows)),
        "datasets, arrow": (arrow, arrow, lambda _: hugging_face(rows)),
        "teacher's weights": (work / "encoder.pth", mutant.with_suffix(".pth"), teacher),
        "scale of latents": (work / "scale.pt", mutant.with_suffix(".pt"), lambda path: read_stats(path, 4)),
    }
    good = True
    for name, (source, path, read) in readers.items():
        whole = source.read_bytes() if isinstance(source, Path) else None
        if whole:
            read(source)  # the good one, or a reader that refuses everything would do
        number = count if whole is None or len(whole) < 2**20 else max(1, count // 20)
        outcome = {"read": 0, "refused": 0, "failed": []}
        for first in tqdm(range(0, number, 50), desc=name, leave=False):
            numbers, report = range(first, min(first + 50, number)), work / "report.json"
            report.unlink(missing_ok=True)
            child = os.fork()
            if not child:
                batch(numbers, seed, source, whole, path, read, report)
            status = os.waitpid(child, 0)[1]
            found = json.loads(report.read_text()) if report.exists() else {}
            if status:
                found.setdefault("failed", []).append(f"the process died with {status} in {numbers}")
            for key in found:
                outcome[key] += found[key]
        if whole is not None:
            source.write_bytes(whole)
        failed = outcome["failed"]
        print(f"fuzz: {name}: {number} files: {outcome['read']} read, {outcome['refused']} refused by name,", end=" ")
        print(f"{len(failed)} failed {failed[:3]}")
        good &= not failed
    return good


def batch(numbers, seed, source, whole, path, read, report):
    """Numbers of one reader, in a child: a crash or a demand for memory cannot hide."""
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    outcome = {"read": 0, "refused": 0, "failed": []}
    for n in numbers:
        rng = random.Random(f"{seed}-{path.name}-{n}")
        if whole is None:
            torch.save(odd_checkpoint(source, rng), path)
        else:
            path.write_bytes(mutated(whole, rng))
        try:
            read(path)
            outcome["read"] += 1
        except (ValueError, OSError) as e:  # BrokenImage is one
            outcome["refused"] += 1
            if not str(e):
                outcome["failed"].append(f"{n}: an error without a word: {type(e).__name__}")
        except BaseException as e:
            outcome["failed"].append(f"{n}: {type(e).__name__}: {str(e)[:100]}")
    report.write_text(json.dumps(outcome))
    os._exit(0)


def main(argv=None):
    checks = dict(
        kill=lambda work: kill(work, args.kills, args.seed),
        stop=lambda work: stop(work, args.stops, args.seed),
        memory=lambda work: memory(work, args.steps),
        fuzz=lambda work: fuzz(work, args.files, args.seed),
    )
    parser = make_parser("experiments.stress", __doc__, "[kill] [stop] [memory] [fuzz] [flags], which --help lists")
    parser.add_argument("check", nargs="*", help="all by default")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20_000, help="of memory")
    parser.add_argument("--files", type=int, default=1000, help="for each reader of fuzz")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with mistakes("experiments.stress"):
        for name in args.check:
            if name not in checks:
                raise ValueError(f"the checks are {', '.join(checks)}, not {name}")
        for name, least in (("kills", 1), ("stops", 1), ("steps", 200), ("files", 1)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    torch.set_num_threads(1)
    results = []
    for name in args.check or checks:
        with tempfile.TemporaryDirectory() as folder:
            clock = time.time()
            results.append(checks[name](Path(folder)))
            print(f"{name}: {'good' if results[-1] else 'FAILED'}, {time.time() - clock:.0f} s", flush=True)
    sys.exit(not all(results))


if __name__ == "__main__":
    as_program(main)
