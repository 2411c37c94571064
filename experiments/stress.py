"""What a week on a cluster does to a run, in minutes on a CPU: each check prints a line, and a failure exits with 1.

python experiments/stress.py kill          50 kill -9 at random moments: the weights of a run never killed, to the bit
python experiments/stress.py memory        20,000 steps: the resident size does not grow
python experiments/stress.py fuzz          thousands of damaged checkpoints, caches, zips and npz: only named errors
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import fid  # noqa: E402
import sample  # noqa: E402
from inputs.images import Folder  # noqa: E402
from inputs.latents import Cached, digest_of, read_manifest  # noqa: E402

TINY = (
    "--image-size 16 --model SiT-S/4 --hidden-size 64 --depth 2 --num-heads 2 --batch-size 8 --lr 1e-3 --device cpu"
    " --precision fp32 --sample-every 0"
).split()


def photos(folder, count=24):
    rs = np.random.RandomState(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rs.randint(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
    return folder


def start(*flags):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, ROOT / "train.py", *flags]
    return subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------------------------


def kill(work, count, seed):
    """Kill a run `count` times, let it end, and compare it with one that nobody killed."""
    flags = [*TINY, "--data", photos(work / "photos"), "--steps", 4000, "--log-every", 5, "--ckpt-every", 2]
    clock = time.time()
    straight = start(*flags, "--out", work / "straight")
    while not (work / "straight/last.pt").exists():
        time.sleep(0.01)
    warm = time.time() - clock  # until the first checkpoint
    assert straight.wait() == 0
    rng, out, writing, kills = random.Random(seed), work / "killed", 0, 0
    bar = tqdm(total=count, unit="kill", file=sys.stderr)
    while True:
        begun = any((out / name).exists() for name in ("config.json", "last.pt"))
        run = start(*(["--resume", "--out", out] if begun else [*flags, "--out", out]))
        if kills == count:
            break
        try:
            run.wait(rng.uniform(0.5, 1.3) * warm if kills % 5 else rng.uniform(0, 1) * warm)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
            writing += (out / "last.pt.tmp").exists()
            bar.update()
            continue
        assert run.returncode in (0, 2), run.returncode  # 2: there was nothing left to do
        raise SystemExit(f"the run ended after {kills} kills: give it more steps")
    assert run.wait() == 0, "the last resume failed"
    a, b = (torch.load(work / name / "last.pt", weights_only=True) for name in ("straight", "killed"))
    equal = all(torch.equal(v, b[which][k]) for which in ("model", "ema") for k, v in a[which].items())
    rows = [[json.loads(row)["step"] for row in (work / n / "log.jsonl").open()] for n in ("straight", "killed")]
    whole = sorted(set(rows[1])) == rows[1] and set(rows[0]) <= set(rows[1])
    print(
        f"kill: {count} kills, {writing} while a checkpoint was written; weights and EMA equal: {equal}; log: {whole}"
    )
    return equal and whole


def memory(work, steps):
    """Resident MiB of a run of `steps` steps, by tenths."""
    flags = [*TINY, "--data", photos(work / "photos"), "--steps", steps, "--log-every", max(1, steps // 200)]
    run, seen = start(*flags, "--ckpt-every", steps // 10, "--out", work / "run"), {}
    while run.poll() is None:
        time.sleep(0.2)
        log = work / "run/log.jsonl"
        rows = log.read_text().splitlines() if log.exists() else []
        try:
            pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            break
        if len(rows) in range(1, 200) and pages:  # not the end, which draws the curves
            seen[len(rows) * 10 // 200] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert run.wait() == 0
    values = [seen[k] for k in sorted(seen)]
    print(f"memory: MiB by tenth of {steps} steps: {' '.join(f'{v:.0f}' for v in values)}")
    return values[-1] < values[1] * 1.02 + 2


# ---------------------------------------------------------------------------------------------------------------


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


def fuzz(work, count, seed):
    """Mutated files into every reader of strangers' files, `count` for each, in children with bounded memory."""
    flags = [*TINY, "--data", photos(work / "photos"), "--steps", 2, "--out", work / "run"]
    assert start(*flags).wait() == 0
    state = torch.load(work / "run/last.pt", weights_only=True)
    state = {k: v for k, v in state.items() if k not in ("opt",)}
    torch.save(state, work / "small.pt")
    with zipfile.ZipFile(work / "photos.zip", "w") as z:
        for path in (work / "photos").rglob("*.png"):
            z.write(path, path.relative_to(work / "photos"))
    images = np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    np.savez(work / "set.npz", arr_0=images)
    np.savez(work / "stats.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float16))
    spec = dict(vae="local", sha256="0" * 64, channels=4, factor=2, scale=[1.0] * 4, bias=[0.0] * 4)
    data = Folder(work / "photos", 16, progress=False)
    cache = work / "cache"
    cache.mkdir()
    manifest = dict(spec=spec, image_size=16, count=24, shard=16, classes=data.classes, precision="float32")
    manifest.update(files_sha256=digest_of(data))
    (cache / "manifest.json").write_text(json.dumps(manifest))
    for i, size in enumerate((16, 8)):
        np.save(cache / f"moments-{i:05d}.npy", np.zeros((size, 8, 8, 8), np.float16))

    def checkpoint(path):
        sample.load_checkpoint(path, projector=None)
        sample.method_of(sample.read_checkpoint(path))

    def cached(_):
        read_manifest(cache)
        Cached(data, cache)[np.arange(24)]

    def image_set(path):
        first = fid.open_set(path)[0]
        [first[i] for i in range(len(first))] if hasattr(first, "__getitem__") and hasattr(first, "__len__") else None

    readers = {
        "checkpoint, bytes": (work / "small.pt", checkpoint),
        "checkpoint, entries": (state, checkpoint),
        "cache, manifest": (cache / "manifest.json", cached),
        "cache, shard": (cache / "moments-00000.npy", cached),
        "zip of images": (work / "photos.zip", lambda p: Folder(p, 16, skip_broken=True, progress=False)),
        "npz, images": (work / "set.npz", image_set),
        "npz, statistics": (work / "stats.npz", image_set),
    }
    good = True
    for name, (source, read) in readers.items():
        path = (
            source
            if isinstance(source, Path) and source.parent == cache
            else work / f"mutated{Path(str(source)[-8:]).suffix or '.pt'}"
        )
        whole = source.read_bytes() if isinstance(source, Path) else None
        number = count if whole is None or len(whole) < 2**20 else max(1, count // 20)
        outcome = {"read": 0, "refused": 0, "failed": []}
        for first in tqdm(range(0, number, 50), desc=name, leave=False):
            report = work / "report.json"
            report.unlink(missing_ok=True)
            child = os.fork()
            if not child:
                batch(range(first, min(first + 50, number)), seed, source, whole, path, read, report)
            status = os.waitpid(child, 0)[1]
            found = json.loads(report.read_text()) if report.exists() else {}
            if status:
                found.setdefault("failed", []).append(f"the process died with {status} in {first} to {first + 50}")
            for key in found:
                outcome[key] += found[key]
        if whole is not None:
            source.write_bytes(whole)
        print(f"fuzz: {name}: {number} files: {outcome['read']} read, {outcome['refused']} refused by name,", end=" ")
        print(f"{len(outcome['failed'])} failed {outcome['failed'][:3]}")
        good &= not outcome["failed"]
    return good


def batch(numbers, seed, source, whole, path, read, report):
    """Numbers of one reader, in a child: a crash or a demand for memory cannot hide."""
    import resource

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", nargs="*", choices=("kill", "memory", "fuzz", []), help="all by default")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20_000, help="of memory")
    parser.add_argument("--files", type=int, default=1000, help="for each reader of fuzz")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, least in (("kills", 1), ("steps", 200), ("files", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(args, name)}")
    torch.set_num_threads(1)
    checks = dict(
        kill=lambda work: kill(work, args.kills, args.seed),
        memory=lambda work: memory(work, args.steps),
        fuzz=lambda work: fuzz(work, args.files, args.seed),
    )
    results = []
    for name in args.check or checks:
        with tempfile.TemporaryDirectory() as folder:
            clock = time.time()
            results.append(checks[name](Path(folder)))
            print(f"{name}: {'good' if results[-1] else 'FAILED'}, {time.time() - clock:.0f} s", flush=True)
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
