"""A cache of latents: the moments of the VAE's posterior of each image of a data set.

    python -m inputs.latents --data data/imagenet/train --out data/imagenet/latents-256           writes the cache
    torchrun --nproc_per_node=8 -m inputs.latents --data data/imagenet/train --out data/imagenet/latents-256

Started again, it goes on where it was stopped. A cache serves any scale of its latents (see inputs/vae.py), and its
manifest holds their mean and standard deviation over the set.
"""

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from inputs.images import Batch, ImageSet, workers_for
from inputs.vae import FITS, encode, load_vae, same_spec
from plumbing.files import lock, mistakes, one_line, write_text, write_whole
from plumbing.flags import add_flags, make_parser
from plumbing.processes import Ranks, is_first, pick_device, start_ranks


@dataclass
class Source:
    """Images and what is made of them: the knobs of `python -m inputs.latents`, and of train.py with its own."""

    # data
    data: str = "data/imagenet/train"  # folder or .zip of class folders or with dataset.json, parquet, Hugging Face
    image_size: int = 256  # side in pixels; images are centre-cropped to it as in ADM
    skip_broken: bool = False  # let the next image stand in for one that cannot be decoded
    # latents
    vae: str | None = ""  # sd-vae-ft-mse (from 128 px up the default), sd-vae-ft-ema, a folder or file, none: pixels
    vae_weights: str | None = None  # 'random' instead of the VAE's own, for tests only
    vae_precision: str = "fp32"  # of the VAE's encoder and decoder: fp32 or bf16
    # run
    device: str = "auto"  # auto, cpu, cuda, mps


def settle_vae(source):
    """Which VAE, where the flags leave it open; ValueError where they do not fit together."""
    if source.vae == "":
        source.vae = None if source.image_size < 128 else "sd-vae-ft-mse"
    if source.vae_precision not in ("fp32", "bf16"):
        raise ValueError(f"--vae-precision is fp32 or bf16, not {source.vae_precision}")


def open_vae(source, device):
    """The Latents that the flags ask for; None for pixels."""
    if source.vae is None:
        return None
    if source.vae_weights and is_first():
        print("warning: the VAE's weights are random; this is for tests only")
    return load_vae(source.vae, source.vae_weights, device, source.vae_precision == "bf16")


# ---- The cache ----


def write_cache(data, vae, spec, out, device, batch_size=16, ranks=Ranks()):
    """The moments of each image of an ImageSet as float16 shards under `out`, each written whole or not at all.

    manifest.json says what they are, and at the end their mean and standard deviation. A shard that is there is kept: a
    run that was stopped goes on. The processes share the shards -> how many this one wrote. ValueError where `out`
    holds another cache.
    """
    out, side = Path(out), data.size // spec["factor"]
    manifest = begin_cache(data, spec, str(vae.dtype), out, ranks.rank == 0)
    ranks.meet()  # the folder is there
    shard, shape = manifest["shard"], (2 * spec["channels"], side, side)
    starts = range(0, len(data), shard)
    stops = {start: min(start + shard, len(data)) for start in list(starts)[ranks.rank :: ranks.world]}
    there = {s: open_shard(out, s, shard, (stops[s] - s, *shape)) for s in stops if shard_path(out, s, shard).exists()}
    todo = [start for start in stops if start not in there]
    if not ranks.any(todo or "mean" not in manifest):
        return 0
    manifest = {key: value for key, value in manifest.items() if key not in ("mean", "std")}
    if ranks.rank == 0:
        write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    sums = np.zeros((len(starts), 3, spec["channels"]))
    for start, moments in there.items():
        sums[start // shard] = sums_of(moments)
    parts = [np.arange(i, min(i + batch_size, stops[s])) for s in todo for i in range(s, stops[s], batch_size)]
    feed = torch.utils.data.DataLoader(data, batch_size=None, sampler=parts, num_workers=workers_for(data))
    count = sum(map(len, parts))
    with tqdm(total=count, unit="img", desc="encoding", disable=ranks.rank > 0) as bar:
        for part, batch in zip(parts, feed):
            start = part[0] // shard * shard
            if part[0] == start:
                moments = np.empty((stops[start] - start, *shape), np.float16)
            encoded = encode(vae, batch.images.to(device))
            if not torch.isfinite(encoded).all() or encoded.abs().max() > 65504:
                raise ValueError(f"the VAE's moments of {data.files[part[0]]} and after it do not fit float16")
            moments[part - start] = encoded.cpu().numpy()
            bar.update(len(part))
            if part[-1] + 1 == stops[start]:
                write_whole(shard_path(out, start, shard), lambda f: np.save(f, moments))
                sums[start // shard] = sums_of(moments)
    if ranks.world > 1:
        torch.distributed.all_reduce(torch.from_numpy(sums), group=ranks.cpu_group)  # each row is zero but on one
    if ranks.rank == 0:
        mean, std = mean_and_std(sums.sum(axis=0), len(data) * side**2)
        manifest.update(mean=mean.tolist(), std=std.tolist())
        write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    return len(todo)


def begin_cache(data, spec, precision, out, first):
    """The manifest of the cache in `out`, where it is of these images; else a new one, written by the first process."""
    shard = min(2048, max(16, len(data) // 64))  # images in a file: 34 MB at most at 256 px, and little to lose
    manifest = dict(spec={key: spec[key] for key in ("vae", *FITS)}, image_size=data.size, crop="centre, as in ADM")
    manifest.update(moments="float16 [N, 2C, h, w]: mean, standard deviation", classes=data.classes, count=len(data))
    manifest.update(files_sha256=digest_of(data), precision=precision, shard=shard)
    manifest.update(stand_ins=sorted(data.instead.items()))  # images that cannot be decoded, and those that stand in
    if (out / "manifest.json").exists():
        found = read_manifest(out)
        same_spec(spec, found["spec"], str(out), FITS)
        manifest = json.loads(json.dumps(manifest))  # tuples become lists
        for key in ("image_size", "count", "files_sha256", "classes", "precision", "stand_ins"):
            if found.get(key, []) != manifest[key]:
                raise ValueError(f"{out} holds another cache: its {key} is {found[key]}, not {manifest[key]}")
        return found
    if first:
        refuse_other(out)
        out.mkdir(parents=True, exist_ok=True)
        np.save(out / "labels.npy", data.labels)
        write_text(out / "files.json", json.dumps(data.files))
        write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def refuse_other(out):
    """ValueError where `out` is neither new, nor empty, nor a cache, whole or just begun."""
    begun = {".lock", "labels.npy", "files.json", "files.json.tmp", "manifest.json.tmp"}
    there = {file.name for file in out.iterdir()} if out.exists() else set()
    if "manifest.json" not in there and there - begun:
        raise ValueError(f"{out} holds something else, and is left as it is; name a new folder with --out")


def sums_of(moments):
    """Moments [N, 2C, h, w] -> float64 [3, C]: sums over images and places of the mean, its square, and std^2."""
    mean, std = np.split(np.asarray(moments, np.float64), 2, axis=1)
    return np.stack([x.sum(axis=(0, 2, 3)) for x in (mean, mean**2, std**2)])


def mean_and_std(sums, count):
    """Mean and standard deviation [C] of the latents over a set: E[mean] and the root of E[std^2] + Var[mean].

    sums: as sums_of() gives them, added up; count: of all places in all images.
    """
    mean, square, variance = sums / count
    return mean, np.sqrt(np.maximum(variance + square - mean**2, 0))


def shard_path(out, start, shard):
    return Path(out) / f"moments-{start // shard:05d}.npy"


def open_shard(out, start, shard, shape):
    """The shard's memory map. ValueError where it is damaged, or not what the manifest says."""
    file = shard_path(out, start, shard)
    try:
        stored = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # a damaged header makes numpy raise anything
        raise ValueError(f"{file} is damaged ({one_line(e)}); delete it and run python -m inputs.latents again") from e
    if stored.shape != shape or stored.dtype != np.float16:
        raise ValueError(f"{file} is damaged: {stored.dtype} {stored.shape}, not float16 {shape}; delete it")
    return stored


def load_labels(path):
    """labels.npy of a cache, int64 [N]."""
    try:
        return np.load(Path(path) / "labels.npy", allow_pickle=False)
    except Exception as e:  # a damaged header makes numpy raise anything
        raise ValueError(f"{path}/labels.npy cannot be read ({one_line(e)[:200]})") from e


def digest_of(data):
    """Of an ImageSet's file names and their sizes in bytes: other images seldom have both the same."""
    lines = "\n".join(f"{file} {size}" for file, size in zip(data.files, data.source.sizes()))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def read_manifest(path):
    """The manifest of a cache. ValueError, naming the file, where it is not one."""
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_text())
        needed = {"spec", "image_size", "count", "shard", "classes", "files_sha256", "precision"}
        if not needed <= manifest.keys() or not {"vae", *FITS} <= manifest["spec"].keys():
            raise ValueError("entries are missing")
        spec, counts = manifest["spec"], [manifest[k] for k in ("image_size", "count", "shard")]
        if not all(isinstance(n, int) and n > 0 for n in (*counts, spec["channels"], spec["factor"])):
            raise ValueError("its sizes are not positive numbers")
        numbers = [manifest[key] for key in ("mean", "std") if key in manifest]  # both, but in older versions
        if numbers and (np.shape(numbers) != (2, spec["channels"]) or not np.isfinite(numbers).all()):
            raise ValueError("its mean and std are not a number for each channel")
        if numbers and min(numbers[1]) < 0:
            raise ValueError("its std is negative")
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is no cache of latents: manifest.json cannot be used ({e})") from e
    return manifest


class Cached:
    """An ImageSet with its cache: data[indices] -> Batch, without images where the teacher needs none.

    ValueError where the cache is unfinished, or is of other images. Shards are memory-mapped: nothing is read ahead.
    """

    def __init__(self, data, path, images=True):
        manifest = read_manifest(path)
        self.data, self.path, self.spec, self.decode = data, str(path), manifest["spec"], images
        self.classes, self.files, self.labels, self.maps = data.classes, data.files, data.labels.copy(), {}
        self.images = data.images
        for key, value in (("image_size", data.size), ("count", len(data)), ("files_sha256", digest_of(data))):
            if manifest[key] != value:
                raise ValueError(f"{path} is not a cache of {data.path}: its {key} is {manifest[key]}, not {value}")
        for i, j in manifest.get("stand_ins", []):
            self.labels[i] = data.labels[j]
        if not np.array_equal(self.labels, load_labels(path)):
            raise ValueError(f"{path} is not a cache of {data.path}: the labels of some images were others then")
        side = data.size // self.spec["factor"]
        self.shard = manifest["shard"]
        for start in range(0, len(data), self.shard):
            file = shard_path(path, start, self.shard)
            shape = min(self.shard, len(data) - start), 2 * self.spec["channels"], side, side
            if not file.exists():
                raise ValueError(f"{path} is unfinished: {file.name} is not there; run python -m inputs.latents again")
            open_shard(path, start, self.shard, shape)

    def statistics(self):
        """-> (mean [C], standard deviation [C] of the latents over the set, on how many they rest, in words)."""
        manifest = read_manifest(self.path)
        if "mean" not in manifest:
            raise ValueError(
                f"{self.path} is of an earlier version, and holds no mean and standard deviation of its latents: run"
                " python -m inputs.latents again, which adds them and encodes nothing, or say --latent-scale vae"
            )
        return np.array(manifest["mean"]), np.array(manifest["std"]), f"over its {len(self)} images"

    def __len__(self):
        return len(self.data)

    def __getstate__(self):
        return {**self.__dict__, "maps": {}}

    def __getitem__(self, indices):
        moments = []
        for i in indices:
            start = i // self.shard * self.shard
            if start not in self.maps:
                self.maps[start] = np.load(shard_path(self.path, start, self.shard), mmap_mode="r", allow_pickle=False)
            moments.append(self.maps[start][i - start])
        batch = self.data[indices] if self.decode else Batch(None, torch.from_numpy(self.labels[indices]))
        return batch._replace(moments=torch.from_numpy(np.stack(moments)))


# ---- Command line ----


@dataclass
class Cache(Source):
    out: str = ""  # folder of the cache


def main(argv=None):
    parser = make_parser("python -m inputs.latents", __doc__, "--data PATH --out DIR [flags], which --help lists")
    add_flags(parser, Cache)
    with mistakes("inputs.latents"):
        asked = Cache(**vars(parser.parse_args(argv)))
        settle_vae(asked)
        if asked.vae is None or not asked.out:
            raise ValueError("name a folder with --out, and a --vae, or images from 128 px up")
        refuse_other(Path(asked.out))
        device = pick_device(asked.device)
        vae, spec = open_vae(asked, device)
        # with --skip-broken all are decoded first: what stands in for what belongs into the manifest
        data = ImageSet(asked.data, asked.image_size, asked.skip_broken, is_first(), check_all=asked.skip_broken)
        ranks, start = start_ranks(device, 24 * 60), time.time()  # the first to finish waits for the last
        if is_first():
            print("\n".join([str(data), *(f"another image stands in: {broken}" for broken in data.broken)]))
            Path(asked.out).mkdir(parents=True, exist_ok=True)
        with lock(asked.out) if is_first() else nullcontext():
            written = write_cache(data, vae, spec, asked.out, device, ranks=ranks)
        ranks.part()
        if is_first():
            Cached(data, asked.out)  # checks every shard
            size = sum(file.stat().st_size for file in Path(asked.out).iterdir())
            print(
                f"{asked.out}: the latents of {len(data)} images, {size / 2**20:.1f} MiB, complete;"
                f" {written} shards written here in {time.time() - start:.0f} s"
            )


if __name__ == "__main__":
    main()
