"""VAE latents: one encode/decode pair with its scale, and a cache of a data set's posteriors.

    python -m inputs.latents --data data/imagenet/train --out data/imagenet/latents-256           writes the cache
    torchrun --nproc_per_node=8 -m inputs.latents --data data/imagenet/train --out data/imagenet/latents-256

Started again, it goes on where it was stopped.

A latent is z = (posterior sample - bias) * scale, per channel; SD-VAE: scale 0.18215, bias 0. What a latent means is
its spec, a dict (vae, sha256 of its weights, channels, factor, scale, bias), which lies in every cache and checkpoint:
latents of another VAE or scale look alike and mean something else.
"""

import hashlib
import json
import os
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from inputs.images import Batch, ImageSet, workers_for
from plumbing.files import lock, mistakes, one_line, read_pt, write_text, write_whole
from plumbing.flags import add_flags, make_parser
from plumbing.processes import is_first, pick_device, start_ranks

VAES = {name: f"stabilityai/{name}" for name in ("sd-vae-ft-mse", "sd-vae-ft-ema")}
SPEC = ("vae", "sha256", "channels", "factor", "scale", "bias")
# the architecture of both, for files that hold tensors only
SD_VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4,
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=256, scaling_factor=0.18215,
)  # fmt: skip

# small, with random weights, for a method that trains its VAE: 32 px make 8 x 8 x 4
TINY_VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4,
    block_out_channels=[16, 16, 32], layers_per_block=1, norm_num_groups=8,
)  # fmt: skip


@dataclass
class Source:
    """Images and what is made of them: the knobs of `python -m inputs.latents`, and of train.py with its own."""

    # data
    data: str = "data/imagenet/train"  # folder of class folders, or a .zip of one
    image_size: int = 256  # side in pixels; images are centre-cropped to it as in ADM
    skip_broken: bool = False  # leave out, and list, images that cannot be decoded
    # latents
    vae: str | None = ""  # sd-vae-ft-mse (from 128 px up the default), sd-vae-ft-ema, a folder or file, none: pixels
    vae_weights: str | None = None  # 'random' instead of the VAE's own, for tests only
    vae_precision: str = "fp32"  # of the VAE's encoder and decoder: fp32 or bf16
    latent_stats: str | None = None  # file with scale and bias of each channel, as the release's .pt has them
    # run
    device: str = "auto"  # auto, cpu, cuda, mps


# ---- The pair ----


class Latents(NamedTuple):
    """What makes latents of images, and images of latents."""

    vae: object  # AutoencoderKL of diffusers
    spec: dict  # what a latent of it means


def load_vae(name, weights=None, stats=None, device="cpu", bf16=False):
    """-> Latents. name: one of VAES, a diffusers folder, a file of the release, or tiny.

    weights: "random" (tests only); stats: a .pt with latents_scale and latents_bias. ValueError where it cannot be had.
    """
    try:
        from diffusers import AutoencoderKL  # late: four seconds that pixels need not wait for
    except ImportError as e:
        raise ValueError(f"--vae {name} takes diffusers: pip install diffusers ({e})") from e
    if name not in (*VAES, "tiny") and not os.path.exists(name):
        raise FileNotFoundError(f"--vae {name}: neither a file or folder, nor one of {', '.join(VAES)}, none")
    if weights not in (None, "random"):
        raise ValueError(f"--vae-weights takes 'random', not {weights}; a file or folder goes after --vae")
    try:
        if weights == "random" or name == "tiny":
            torch.manual_seed(0)
            vae, missing = AutoencoderKL(**(TINY_VAE if name == "tiny" else SD_VAE)), []
            if name == "tiny":  # begins with a narrow posterior: to learn one takes many steps
                torch.nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], -6)
        elif os.path.isfile(name):
            found = {fingerprint(v) for v in tensors(name)}  # diffusers leaves random what the file lacks
            with tempfile.TemporaryDirectory() as folder:  # without a config at hand diffusers asks the hub for one
                with torch.device("meta"):
                    AutoencoderKL(**SD_VAE).save_config(folder)
                vae = AutoencoderKL.from_single_file(
                    name, config=folder, local_files_only=True, low_cpu_mem_usage=False
                )
            missing = [k for k, v in vae.state_dict().items() if fingerprint(v) not in found]
        else:
            source, local = VAES.get(name, name), name not in VAES
            vae, info = AutoencoderKL.from_pretrained(
                source, local_files_only=local, low_cpu_mem_usage=False, output_loading_info=True
            )
            missing = info["missing_keys"]
        if missing:
            raise ValueError(f"it lacks {len(missing)} tensors, such as {missing[0]}")
    except Exception as e:  # network, hub, format and shape errors have no common class
        hint = f": fetch huggingface.co/{VAES[name]} and name its folder after --vae" if name in VAES else ""
        raise ValueError(f"--vae {name} cannot be loaded ({one_line(e)[:300]}){hint}") from e
    digest = hashlib.sha256()
    for key, value in sorted(vae.state_dict().items()):
        digest.update(key.encode() + value.numpy().tobytes())
    channels = vae.config.latent_channels
    scale, bias = [vae.config.scaling_factor] * channels, [0.0] * channels
    if stats:
        scale, bias = read_stats(stats, channels)
    spec = dict(
        vae=name if name in (*VAES, "tiny") else "local", sha256=digest.hexdigest(), channels=channels, scale=scale
    )
    spec.update(bias=bias, factor=2 ** (len(vae.config.block_out_channels) - 1))
    vae = vae.eval().requires_grad_(False).to(device)
    return Latents(vae.bfloat16() if bf16 else vae, spec)


def tensors(path):
    """Every tensor in a .pt or .safetensors file, at any depth of its dicts."""
    if str(path).endswith(".safetensors"):
        return list(load_file(path).values())
    stack, out = [read_pt(path)], []
    while stack:
        item = stack.pop()
        stack += item.values() if isinstance(item, dict) else []
        out += [item] if torch.is_tensor(item) else []
    return out


def fingerprint(tensor):
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).digest()  # the same for any shape


def read_stats(path, channels):
    """(scale, bias), a list each, from the release's file of latents_scale and latents_bias."""
    try:
        data = read_pt(path)
        scale, bias = (torch.as_tensor(data[k]).flatten().tolist() for k in ("latents_scale", "latents_bias"))
    except Exception as e:  # pickle, zip and key errors have no common class
        raise ValueError(
            f"--latent-stats {path} is no file of latents_scale and latents_bias: {one_line(e)[:300]}"
        ) from e
    if len(scale) != channels or len(bias) != channels or not np.isfinite(scale + bias).all() or 0 in scale:
        raise ValueError(f"--latent-stats {path}: {channels} finite scales and biases are needed, not {scale}, {bias}")
    return scale, bias


@torch.no_grad()
def encode(vae, images):
    """images uint8 [B, 3, H, W] -> the posterior's moments, float32 [B, 2C, h, w]: mean, then standard deviation."""
    with torch.autocast(images.device.type, enabled=False):  # the loop's autocast is not meant for the VAE
        posterior = vae.encode((images.float() / 127.5 - 1).to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def per_channel(spec, like):
    return (torch.tensor(spec[k], device=like.device, dtype=torch.float32).view(-1, 1, 1) for k in ("scale", "bias"))


def to_latent(moments, noise, spec):
    """Moments [B, 2C, h, w] and normal noise [B, C, h, w] -> the latent that the model sees, float32."""
    mean, std = moments.float().chunk(2, dim=1)
    scale, bias = per_channel(spec, mean)
    return (mean + std * noise - bias) * scale


@torch.no_grad()
def decode(vae, z, spec):
    """Latents [B, C, h, w] -> images [B, 3, H, W] in about [-1, 1], float32; eight at a time, for the memory's sake."""
    scale, bias = per_channel(spec, z)
    with torch.autocast(z.device.type, enabled=False):
        z = (z.float() / scale + bias).to(vae.dtype)
        return torch.cat([vae.decode(part).sample.float() for part in z.split(8)])


def same_spec(wanted, found, where):
    """ValueError, with both values, where latents mean different things."""
    for key in ("sha256", "scale", "bias", "channels", "factor"):
        if wanted[key] != found[key]:
            ours, theirs = (f"{s['vae']} with {key} {str(s[key])[:80]}" for s in (wanted, found))
            raise ValueError(f"{where} holds latents of {theirs}; asked for is {ours}")


def settle_vae(source):
    """Which VAE, where the flags leave it open; ValueError where they do not fit together."""
    if source.vae == "":
        source.vae = None if source.image_size < 128 else "sd-vae-ft-mse"
    if source.vae is None and source.latent_stats:
        raise ValueError("--latent-stats goes with a --vae, and with images from 128 px up")
    if source.vae_precision not in ("fp32", "bf16"):
        raise ValueError(f"--vae-precision is fp32 or bf16, not {source.vae_precision}")


def open_vae(source, device):
    """The Latents that the flags ask for; None for pixels."""
    if source.vae is None:
        return None
    if source.vae_weights and is_first():
        print("warning: the VAE's weights are random; this is for tests only")
    return load_vae(source.vae, source.vae_weights, source.latent_stats, device, source.vae_precision == "bf16")


# ---- The cache ----


def write_cache(data, vae, spec, out, device, batch_size=16, rank=0, world=1):
    """The moments of each image of an ImageSet as float16 shards under `out`, each written whole or not at all.

    manifest.json says what they are. A shard that is there is kept: a run that was stopped goes on. With `world`
    processes each takes every world-th shard. ValueError where `out` holds another cache.
    """
    out = Path(out)
    side = data.size // spec["factor"]
    shard = min(2048, max(16, len(data) // 64))  # images in a file: 34 MB at most at 256 px, and little to lose
    manifest = dict(spec=spec, image_size=data.size, crop="centre, as in ADM", count=len(data), shard=shard)
    manifest.update(moments="float16 [N, 2C, h, w]: mean, standard deviation", classes=data.classes)
    manifest.update(files_sha256=digest_of(data), precision=str(vae.dtype))
    if (out / "manifest.json").exists():
        found = read_manifest(out)
        same_spec(spec, found["spec"], str(out))
        shard = found["shard"]
        for key in ("image_size", "count", "files_sha256", "classes", "precision"):
            if found[key] != manifest[key]:
                raise ValueError(f"{out} holds another cache: its {key} is {found[key]}, not {manifest[key]}")
    elif rank == 0:
        begun = {".lock", "labels.npy", "files.json", "files.json.tmp", "manifest.json.tmp"}
        out.mkdir(parents=True, exist_ok=True)
        if {file.name for file in out.iterdir()} - begun:
            raise ValueError(f"{out} holds something else, and is left as it is; name a new folder with --out")
        np.save(out / "labels.npy", data.labels)
        write_text(out / "files.json", json.dumps(data.files))
        write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    if world > 1:
        torch.distributed.barrier()  # the folder is there
    starts = range(0, len(data), shard)
    shape = 2 * spec["channels"], side, side
    todo = [s for s in list(starts)[rank::world] if not shard_path(out, s, shard).exists()]
    for start in {*list(starts)[rank::world]} - {*todo}:
        open_shard(out, start, shard, (min(shard, len(data) - start), *shape))
    count = sum(min(shard, len(data) - s) for s in todo)
    stops = {start: min(start + shard, len(data)) for start in todo}
    parts = [np.arange(i, min(i + batch_size, stop)) for s, stop in stops.items() for i in range(s, stop, batch_size)]
    feed = torch.utils.data.DataLoader(data, batch_size=None, sampler=parts, num_workers=workers_for(data))
    with tqdm(total=count, unit="img", desc="encoding", disable=rank > 0) as bar:
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
    return len(todo)


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


def digest_of(data):
    """Of an ImageSet's file names and their sizes in bytes: other images seldom have both the same."""
    lines = "\n".join(f"{file} {size}" for file, size in zip(data.files, data.source.sizes()))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def read_manifest(path):
    """The manifest of a cache. ValueError, naming the file, where it is not one."""
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_text())
        needed = {"spec", "image_size", "count", "shard", "classes", "files_sha256", "precision"}
        if not needed <= manifest.keys() or not {*SPEC} <= manifest["spec"].keys():
            raise ValueError("entries are missing")
        spec, counts = manifest["spec"], [manifest[k] for k in ("image_size", "count", "shard")]
        if not all(isinstance(n, int) and n > 0 for n in (*counts, spec["channels"], spec["factor"])):
            raise ValueError("its sizes are not positive numbers")
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
        self.classes, self.files, self.labels, self.maps = data.classes, data.files, data.labels, {}
        self.images, self.broken = data.images, data.broken
        for key, value in (("image_size", data.size), ("count", len(data)), ("files_sha256", digest_of(data))):
            if manifest[key] != value:
                raise ValueError(f"{path} is not a cache of {data.path}: its {key} is {manifest[key]}, not {value}")
        side = data.size // self.spec["factor"]
        self.shard = manifest["shard"]
        for start in range(0, len(data), self.shard):
            file = shard_path(path, start, self.shard)
            shape = min(self.shard, len(data) - start), 2 * self.spec["channels"], side, side
            if not file.exists():
                raise ValueError(f"{path} is unfinished: {file.name} is not there; run python -m inputs.latents again")
            open_shard(path, start, self.shard, shape)

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
        images = self.data[indices].images if self.decode else None
        return Batch(images, torch.from_numpy(self.labels[indices]), torch.from_numpy(np.stack(moments)))


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
        device = pick_device(asked.device)
        vae, spec = open_vae(asked, device)
        data = ImageSet(asked.data, asked.image_size, asked.skip_broken, is_first())
        ranks, start = start_ranks(device, 24 * 60), time.time()  # the first to finish waits for the last
        if is_first():
            print("\n".join([str(data), *(f"another image stands in: {broken}" for broken in data.broken)]))
            Path(asked.out).mkdir(parents=True, exist_ok=True)
        with lock(asked.out) if is_first() else nullcontext():
            written = write_cache(data, vae, spec, asked.out, device, rank=ranks.rank, world=ranks.world)
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
