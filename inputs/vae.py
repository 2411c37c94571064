"""The VAE: one pair of encoder and decoder, and what its latents mean.

A latent is z = (posterior sample - bias) * scale, per channel. SiT's and REPA's have the scale 0.18215 and no bias, the
iREPA release's are normalised over the data set (--latent-scale). What a latent means is its spec, a dict (vae, sha256
of its weights, channels, factor, scale, bias), which lies in every checkpoint: latents of another VAE or scale look
alike and mean something else.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from plumbing.files import downloaded, one_line, read_pt
from plumbing.processes import is_first

VAES = {name: f"stabilityai/{name}" for name in ("sd-vae-ft-mse", "sd-vae-ft-ema")}
FITS, SCALE = ("sha256", "channels", "factor"), ("scale", "bias")
SPEC = ("vae", *FITS, *SCALE)
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


class Latents(NamedTuple):
    """What makes latents of images, and images of latents."""

    vae: object  # AutoencoderKL of diffusers
    spec: dict  # what a latent of it means


# ---- Loading ----


def load_vae(name, weights=None, device="cpu", bf16=False):
    """-> Latents, with the VAE's own scale and bias. ValueError where it cannot be had.

    name: one of VAES, a folder of diffusers (a VAE's or a pipeline's), a file of the release, or tiny.
    weights: "random" (tests only).
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
            source, variant = (VAES[name], None) if name in VAES else folder_of(name)
            here = name not in VAES or downloaded(source, "diffusion_pytorch_model.safetensors")
            vae, info = AutoencoderKL.from_pretrained(
                source, variant=variant, local_files_only=here, low_cpu_mem_usage=False, output_loading_info=True
            )
            missing = info["missing_keys"]
        if missing:
            raise ValueError(f"it lacks {len(missing)} tensors, such as {missing[0]}")
        scale, bias = own_scale(vae.config)
    except Exception as e:  # network, hub, format and shape errors have no common class
        fetch = f": fetch huggingface.co/{VAES.get(name)} and name its folder after --vae"
        hint = f"{fetch}; below 128 px (--image-size 64) there is none by default" if name in VAES else ""
        raise ValueError(f"--vae {name} cannot be loaded ({one_line(e, 300)}){hint}") from e
    digest = hashlib.sha256()
    for key, value in sorted(vae.state_dict().items()):
        digest.update(key.encode() + value.numpy().tobytes())
    spec = dict(vae=name if name in (*VAES, "tiny") else "local", sha256=digest.hexdigest())
    spec.update(channels=vae.config.latent_channels, scale=scale, bias=bias)
    spec.update(factor=2 ** (len(vae.config.block_out_channels) - 1))
    vae = vae.eval().requires_grad_(False).to(device)
    return Latents(vae.bfloat16() if bf16 else vae, spec)


def folder_of(name):
    """A folder of diffusers -> (the VAE's folder, the variant of its files or None); says what is not as its name is.

    A pipeline's folder has the VAE's within; files of a variant, such as fp16, have it in their names.
    """
    folder, said = Path(name), []
    if (folder / "model_index.json").exists():
        folder, said = folder / "vae", ["is a pipeline: its vae/ is taken"]
    files = [file.name.split(".") for file in folder.glob("diffusion_pytorch_model*.*")]  # name, perhaps variant, kind
    variants = sorted(file[1] for file in files if len(file) == 3 and file[2] in ("safetensors", "bin"))
    if any(len(file) == 2 for file in files):
        variants = []
    variant = "fp16" if "fp16" in variants else variants[0] if variants else None
    said += [f"holds weights of the variant {variant}, which are taken"] if variant else []
    if said and is_first():
        print(f"--vae {name} {'; it '.join(said)}")
    return folder, variant


def own_scale(config):
    """(scale, bias) of a VAE's config, a list each, as the pipelines of diffusers undo them.

    SDXL's take z = (x - latents_mean) * scaling_factor / latents_std, SD3's and FLUX's (x - shift_factor) *
    scaling_factor, the others x * scaling_factor. ValueError where the config is not one of these.
    """
    channels, scale, shift = config.latent_channels, config.scaling_factor, config.shift_factor or 0.0
    mean, std = config.latents_mean, config.latents_std
    if mean is None and std is None:
        return [scale] * channels, [shift] * channels
    if mean is None or std is None or not len(mean) == len(std) == channels or 0 in std:
        raise ValueError(f"its config has latents_mean {mean} and latents_std {std}, and {channels} channels")
    return [scale / s for s in std], list(mean)


def tensors(path):
    """Every tensor in a .pt or .safetensors file, at any depth of its dicts."""
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
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--latent-scale {path}: there is no such file of latents_scale and latents_bias")
    try:
        data = read_pt(path)
        scale, bias = (torch.as_tensor(data[k]).flatten().tolist() for k in ("latents_scale", "latents_bias"))
    except Exception as e:  # pickle, zip and key errors have no common class
        raise ValueError(
            f"--latent-scale {path} is no file of latents_scale and latents_bias: {one_line(e, 300)}"
        ) from e
    if len(scale) != channels or len(bias) != channels or not np.isfinite(scale + bias).all() or 0 in scale:
        raise ValueError(f"--latent-scale {path}: {channels} finite scales and biases are needed, not {scale}, {bias}")
    return scale, bias


# ---- The pair ----


@torch.no_grad()
def encode(vae, images):
    """images uint8 [B, 3, H, W] -> the posterior's moments, float32 [B, 2C, h, w]: mean, then standard deviation."""
    with torch.autocast(images.device.type, enabled=False):  # the loop's autocast is not meant for the VAE
        posterior = vae.encode((images.float() / 127.5 - 1).to(vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def per_channel(spec, like):
    return (torch.tensor(spec[k], device=like.device, dtype=torch.float32).view(-1, 1, 1) for k in SCALE)


def to_latent(moments, noise, spec):
    """Moments [B, 2C, h, w] and normal noise [B, C, h, w] -> the latent that the model sees, float32."""
    mean, std = moments.float().chunk(2, dim=1)
    scale, bias = per_channel(spec, mean)
    return (mean + std * noise - bias) * scale


@torch.no_grad()
def decode(vae, z, spec):
    """Latents [B, C, h, w] -> images [B, 3, H, W] in about [-1, 1], float32; eight at a time, for the memory's sake, on
    CPUs, where one may take seconds, each alone.

    FloatingPointError where a number of them is not finite.
    """
    scale, bias = per_channel(spec, z)
    with torch.autocast(z.device.type, enabled=False):
        z = (z.float() / scale + bias).to(vae.dtype)
        parts = z.split(1 if z.device.type == "cpu" else 8)
        shown = tqdm(parts, "decoding", unit="img", delay=5, leave=False, disable=not is_first())
        images = torch.cat([vae.decode(part).sample.float() for part in shown])
    if not torch.isfinite(images).all():
        raise FloatingPointError("the VAE made images that are not finite")
    return images


def same_spec(wanted, found, where, keys=(*FITS, *SCALE)):
    """ValueError, with both values, where latents mean different things."""
    for key in keys:
        if wanted[key] != found[key]:
            ours, theirs = (f"{s['vae']} with {key} {str(s[key])[:80]}" for s in (wanted, found))
            raise ValueError(f"{where} holds latents of {theirs}; asked for is {ours}")
