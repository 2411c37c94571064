"""A cache of latents: the moments of the VAE's posterior of each image of a data set.

    python -m inputs.latents --data data/imagenet/train --out data/imagenet/latents-256           writes the cache
    torchrun --nproc_per_node=8 -m inputs.latents --data data/imagenet/train --out data/imagenet/latents-256

Started again, it goes on where it was stopped. A cache serves any scale of its latents (see inputs/vae.py), and its
manifest holds their mean and standard deviation over the set.
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from inputs.images import DATA, Batch, ImageSet, Source
from inputs.shards import Shards, begin, labels_of, positive, read_manifest, refuse_other
from inputs.vae import FITS, encode, load_vae, same_spec
from plumbing.files import lock, mistakes, write_text
from plumbing.flags import add_flags, make_parser
from plumbing.processes import Ranks, is_first, pick_device, start_ranks


@dataclass
class VaeSource(Source):
    """Images and the VAE that sees them."""

    # latents
    vae: str | None = ""  # sd-vae-ft-mse (from 128 px up), sd-vae-ft-ema, tiny (untrained), a folder or file, or none
    vae_weights: str | None = None  # 'random' instead of the VAE's own, for tests only
    vae_precision: str = "fp32"  # of the VAE's encoder and decoder: fp32 or bf16


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
    """The moments of each image of an ImageSet as float16 shards under `out`, as inputs/shards.py keeps them.

    manifest.json says what they are, and at the end their mean and standard deviation. -> how many shards this process
    wrote. ValueError where `out` holds another cache.
    """
    out = Path(out)
    manifest = begin_cache(data, spec, str(vae.dtype), out, ranks.rank == 0)
    ranks.meet()  # the folder is there
    shards = shards_of(out, manifest)
    there, todo = shards.share(ranks)
    if not ranks.any(todo or "mean" not in manifest):
        return 0
    manifest = {key: value for key, value in manifest.items() if key not in ("mean", "std")}
    if ranks.rank == 0:
        write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    sums = np.zeros((len(shards.starts), 3, spec["channels"]))
    for start in there:
        sums[start // shards.shard] = sums_of(shards.open(start))
    made = shards.fill(todo, data, lambda b: encode(vae, b.images.to(device)), ranks, "encoding", batch_size)
    for start, moments in made:
        sums[start // shards.shard] = sums_of(moments)
    if ranks.world > 1:
        torch.distributed.all_reduce(torch.from_numpy(sums), group=ranks.cpu_group)  # each row is zero but on one
    if ranks.rank == 0:
        places = shards.shape[1] * shards.shape[2]
        mean, std = mean_and_std(sums.sum(axis=0), len(data) * places)
        manifest.update(mean=mean.tolist(), std=std.tolist())
        write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    return len(todo)


def begin_cache(data, spec, precision, out, first):
    """The manifest of the cache in `out`, where it is of these images; else a new one, written by the first process."""
    shard = min(2048, max(16, len(data) // 64))  # images in a file: 34 MB at most at 256 px, and little to lose
    manifest = dict(spec={key: spec[key] for key in ("vae", *FITS)}, image_size=data.size, crop="centre, as in ADM")
    manifest.update(moments="float16 [N, 2C, h, w]: mean, standard deviation", classes=data.classes, count=len(data))
    manifest.update(files_sha256=data.digest, precision=precision, shard=shard)
    manifest.update(stand_ins=sorted(data.instead.items()))  # images that cannot be decoded, and those that stand in
    found = manifest_of(out) if (out / "manifest.json").exists() else None
    if found:
        same_spec(spec, found["spec"], str(out), FITS)
    same = "image_size", "count", "files_sha256", "classes", "precision", "stand_ins"
    return begin(out, manifest, found, same, data, first)


def shards_of(path, manifest):
    """The moments [2C, h, w] of a cache, as inputs.shards has them."""
    spec = manifest["spec"]
    side = manifest["image_size"] // spec["factor"]
    shape = 2 * spec["channels"], side, side
    return Shards(path, "moments", manifest["count"], manifest["shard"], shape, "python -m inputs.latents")


def manifest_of(path):
    """The manifest of a cache of latents. ValueError, naming the file, where it is not one."""

    def check(manifest):
        spec = manifest["spec"]
        if not {"vae", *FITS} <= spec.keys():
            raise ValueError("entries are missing")
        positive(spec["channels"], spec["factor"])
        numbers = [manifest[key] for key in ("mean", "std") if key in manifest]  # both, but in older versions
        if numbers and (np.shape(numbers) != (2, spec["channels"]) or not np.isfinite(numbers).all()):
            raise ValueError("its mean and std are not a number for each channel")
        if numbers and min(numbers[1]) < 0:
            raise ValueError("its std is negative")

    return read_manifest(path, "latents", check)


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


class Cached:
    """A set of images with its cache: data[indices] -> Batch, without images where nobody needs them.

    ValueError where the cache is unfinished, or is of other images. Shards are memory-mapped: nothing is read ahead.
    """

    def __init__(self, data, path, images=True):
        manifest = manifest_of(path)
        self.data, self.path, self.spec, self.decode = data, str(path), manifest["spec"], images
        self.classes, self.files = data.classes, data.files
        self.labels = labels_of(path, manifest, data)
        self.shards = shards_of(path, manifest)
        self.shards.check()
        self.quick = self.shards.small and (data.quick or not images)

    def statistics(self):
        """-> (mean [C], standard deviation [C] of the latents over the set, on how many they rest, in words)."""
        manifest = manifest_of(self.path)
        if "mean" not in manifest:
            raise ValueError(
                f"{self.path} is of an earlier version, and holds no mean and standard deviation of its latents: run"
                " python -m inputs.latents again, which adds them and encodes nothing, or say --latent-scale vae"
            )
        return np.array(manifest["mean"]), np.array(manifest["std"]), f"over its {len(self)} images"

    def __len__(self):
        return len(self.data)

    def __getitem__(self, indices):
        batch = self.data[indices] if self.decode else Batch(None, torch.from_numpy(self.labels[indices]))
        return batch._replace(moments=torch.from_numpy(self.shards[indices]))


# ---- Command line ----


@dataclass
class Cache(VaeSource):
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
        data = ImageSet(asked.data or DATA, asked.image_size, asked.skip_broken, is_first(), asked.skip_broken)
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
    as_program(main)
