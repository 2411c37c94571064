"""FID, sFID, Inception Score, precision and recall as OpenAI's ADM evaluator computes them, in PyTorch.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz          the numbers that papers report
    python fid.py runs/demo/pngs photos.zip --json scores.json         any two of: npz, folder, zip, statistics
    python fid.py --save-stats photos-256.npz photos --image-size 256  a reference from one's own images
    torchrun --nproc_per_node=8 fid.py samples.npz reference.npz       each process takes its share of the images

An image set is an .npz with arr_0 (uint8, N x H x W x 3), or a folder or a .zip of images, at any depth. Statistics are
an .npz with mu, sigma and, for sFID, mu_s, sigma_s, which are used as they are; where such a file also has arr_0, as
the standard references do, precision and recall come from that. With the real weights, the standard reference
against admnet_guided_upsampled_imagenet256 gives FID 3.943, sFID 6.140, IS 215.84, precision 0.8265, recall 0.5309.
This file imports nothing else of the project.
"""

import argparse
import hashlib
import json
import math
import os
import re
import time
import zipfile
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
HASH = "6726825d"  # how the sha256 of that file begins
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}

# ---------------------------------------------------------------------------------------------------------------
# The network: Inception v3 as TensorFlow's classify_image_graph_def of 2015-12-05 has it


class BasicConv2d(nn.Module):
    def __init__(self, channels, out, kernel, stride=1, valid=False):
        super().__init__()
        rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = 0 if valid or stride > 1 else (rows // 2, columns // 2)  # TF's VALID (always where it strides), SAME
        self.conv = nn.Conv2d(channels, out, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)  # torchvision's value too; PyTorch's own default is 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


# TF averages over the pixels that exist, PyTorch by default over the padding too
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)  # VALID in TF: without padding


class Mixed(nn.Module):
    """Branches of convolutions and one of pooling, concatenated in this order.

    branches: name -> its layers, each (out, kernel[, stride]), or a list of two that see the same input.
    """

    def __init__(self, channels, branches, pool, pool_out=None):
        super().__init__()
        self.plan, self.pool = [], pool
        for name, layers in branches.items():
            width, steps = channels, []
            for n, layer in enumerate(layers, start=1):
                fork = layer if isinstance(layer, list) else [layer]
                keys = [f"{name}_{n}{letter if len(fork) > 1 else ''}" for letter, _ in zip("ab", fork)]
                keys = keys if len(layers) > 1 else [name]
                for key, spec in zip(keys, fork):
                    self.add_module(key, BasicConv2d(width, *spec))
                steps.append(keys)
                width = sum(spec[0] for spec in fork)
            self.plan.append(steps)
        self.branch_pool = BasicConv2d(channels, pool_out, 1) if pool_out else nn.Identity()

    def forward(self, x):
        out = []
        for steps in self.plan:
            h = [x]
            for keys in steps:
                h = [self.get_submodule(key)(h[0]) for key in keys]  # a fork, of two, is always the last step
            out += h
        return torch.cat([*out, self.branch_pool(self.pool(x))], dim=1)


def mixed_a(channels, pool_out):
    five, double = [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)]
    return Mixed(channels, dict(branch1x1=[(64, 1)], branch5x5=five, branch3x3dbl=double), average, pool_out)


def mixed_c(c):
    seven = [(c, 1), (c, (1, 7)), (192, (7, 1))]
    double = [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))]
    return Mixed(768, dict(branch1x1=[(192, 1)], branch7x7=seven, branch7x7dbl=double), average, 192)


def mixed_e(channels, pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    branches = dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), fork], branch3x3dbl=[(448, 1), (384, 3), fork])
    return Mixed(channels, branches, pool, 192)


class InceptionV3(nn.Module):
    """images uint8 [B, 3, H, W] -> pool [B, 2048], spatial [B, 2023], logits [B, 1008], float32.

    pool is pool_3; spatial the first 7 channels of mixed_6's first branch after its ReLU, flattened in TF's order
    (row, column, channel), as the reference files hold it; logits are pool @ W without the bias, as in the Inception
    Score. State-dict names are those of pt_inception-2015-12-05-6726825d.pth. Always in eval mode.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, valid=True)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        double = [(64, 1), (96, 3), (96, 3, 2)]
        self.Mixed_6a = Mixed(288, dict(branch3x3=[(384, 3, 2)], branch3x3dbl=double), halve)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(mixed_c, (128, 160, 160, 192))
        seven = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]
        self.Mixed_7a = Mixed(768, dict(branch3x3=[(192, 1), (320, 3, 2)], branch7x7x3=seven), halve)
        self.Mixed_7b = mixed_e(1280, average)
        self.Mixed_7c = mixed_e(2048, maximum)  # TF's graph has a max here, where the paper and torchvision average
        self.fc = nn.Linear(2048, 1008)  # 1,008 classes in TF's graph, not 1,000
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        x = (resize(images) - 128) / 128  # TF's scaling, not x / 127.5 - 1
        x = x.to(self.fc.weight.dtype, memory_format=torch.channels_last)  # (B, 3, 299, 299)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))  # (B, 192, 71, 71)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))  # (B, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 2023): branch1x1 comes first in Mixed_6d
            x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
            x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        pool = x.float().mean((2, 3))  # (B, 2048)
        return pool, spatial.float(), pool @ self.fc.weight.float().T

    def fold(self):
        """Each BatchNorm into the convolution before it, and channels_last: the same features, faster."""
        for module in self.modules():
            if isinstance(module, BasicConv2d):
                module.conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.bn).requires_grad_(False)
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


def resize(images):
    """[B, 3, H, W] -> float32 [B, 3, 299, 299] as TF1's bilinear resize: source = destination * (size / 299), without
    half-pixel centres and without antialiasing. With one more row and column that is PyTorch's align_corners."""
    x = F.pad(images.float(), (0, 1, 0, 1), mode="replicate")
    return F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299]


def load_inception(file=None, device="cpu", fast=False):
    """-> (InceptionV3 ready to use, sha256 of its weights). `file`, or the released weights, downloaded once.

    ValueError or FileNotFoundError, with what to do, where the weights are absent or are something else.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    if file is None and not cache.exists():
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, cache, hash_prefix=HASH)
        except (OSError, RuntimeError) as e:
            raise ValueError(
                f"the Inception weights cannot be downloaded ({e}): fetch {URL} elsewhere and put it at {cache}, or"
                " name it with --inception FILE"
            ) from e
    path = Path(file or cache)
    if not path.is_file():
        raise FileNotFoundError(f"--inception {path}: there is no such file")
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if file is None and not digest.startswith(HASH):
        raise ValueError(f"{path} is damaged (sha256 {digest[:8]}, not {HASH}): delete it to download it again")
    try:
        model, weights = InceptionV3(), torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception as e:  # pickle, zip and shape errors have no common class
        why = " ".join(str(e).split())[:300] or type(e).__name__
        raise ValueError(f"{path} does not hold pt_inception-2015-12-05's weights ({why})") from e
    model = model.fold().to(device)
    return (model.bfloat16() if fast else model), digest


# ---------------------------------------------------------------------------------------------------------------
# The metrics


class Moments:
    """Mean and covariance of [B, D] batches, streamed in float64."""

    def __init__(self, dim, device="cpu"):
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, x):
        x = x.to(self.sum.device, torch.float64)
        self.count += len(x)
        self.sum += x.sum(0)
        self.products.addmm_(x.T, x)

    def result(self):
        """(mu [D], sigma [D, D]) in float64 numpy; sigma as np.cov has it, over N - 1."""
        mu = self.sum / self.count
        sigma = (self.products - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) between two Gaussians: mu [D], sigma [D, D].

    The trace of the root is the sum of the singular values of A1^T A2 for any A with A A^T = sigma: real by
    construction, and right for covariances without full rank, where sqrtm of the product is not. ValueError for shapes
    or NaN.
    """
    given = [torch.as_tensor(a, dtype=torch.float64).cpu() for a in (mu1, sigma1, mu2, sigma2)]
    shapes, d = [tuple(a.shape) for a in given], given[0].numel()
    if shapes != [(d,), (d, d)] * 2 or not all(torch.isfinite(a).all() for a in given):
        raise ValueError(f"mu [D], sigma [D, D] of one D, all finite, are needed; the shapes are {shapes}")
    mu1, sigma1, mu2, sigma2 = given

    def root(sigma):
        factor, info = torch.linalg.cholesky_ex((sigma + sigma.T) / 2)  # seven times faster than eigh
        if info == 0:
            return factor
        values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)  # no full rank; below zero is rounding only
        return vectors * values.clamp(min=0).sqrt()

    cross = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(distance.item(), 0.0)  # equal inputs: zero to rounding, of either sign


def inception_score(logits, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) over consecutive splits of logits [N, classes], averaged over the splits."""
    scores = []
    for part in torch.as_tensor(logits).split(split_size):
        log_p = part.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return float(np.mean(scores))


def precision_recall(reference, samples, k=3):
    """(precision, recall) of features [N, D], [M, D] (Kynkaanniemi et al., 2019, as in ADM's evaluator).

    precision: the share of samples within some reference's distance to its k-th neighbour; recall: the reverse.
    Distances are float64, in blocks. ValueError for k or fewer features on a side.
    """
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"precision and recall need more than k = {k} images on each side")

    def blocks(rows, columns):
        columns = columns.double()
        norms = columns.square().sum(1)
        for part in rows.split(max(1, 2**25 // len(columns))):
            part = part.double()
            yield torch.addmm(part.square().sum(1, keepdim=True) + norms, part, columns.T, alpha=-2).clamp_(min=0)

    def radii(x):  # the nearest is the image itself
        return torch.cat([d.topk(k + 1, dim=1, largest=False).values[:, -1] for d in blocks(x, x)])

    reference_radii, sample_radii = radii(reference), radii(samples)
    covered, inside = torch.zeros(len(reference), dtype=torch.bool, device=reference.device), 0
    for start, d in zip(range(0, 2**62, max(1, 2**25 // len(reference))), blocks(samples, reference)):
        inside += (d <= reference_radii).any(1).sum().item()
        covered |= (d <= sample_radii[start : start + len(d), None]).any(0)
    return inside / len(samples), covered.double().mean().item()


# ---------------------------------------------------------------------------------------------------------------
# Images in


class Npz:
    """arr_0 of an .npz, read as a stream: a set of 50,000 images of 256 px is 9.8 GB."""

    def __init__(self, path):
        self.path, self.name = path, path
        with zipfile.ZipFile(path) as z, z.open("arr_0.npy") as f:
            shape, fortran, dtype = read_header(f)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or fortran:
            order = " in Fortran order" if fortran else ""
            raise ValueError(f"{path}: arr_0 is {dtype} {list(shape)}{order}; images are uint8 [N, H, W, 3] in C order")
        self.count, self.size = shape[0], shape[1:3]

    def __len__(self):
        return self.count

    def batches(self, low, high, batch_size):
        height, width = self.size
        pixels = height * width * 3
        with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
            read_header(f)
            f.seek(f.tell() + low * pixels)
            for start in range(low, high, batch_size):
                count = min(batch_size, high - start)
                try:
                    data = f.read(count * pixels)
                except (zipfile.BadZipFile, zlib.error, EOFError) as e:
                    raise ValueError(f"{self.path} is damaged between images {start} and {start + count} ({e})") from e
                if len(data) < count * pixels:
                    raise ValueError(f"{self.path} is truncated at image {start + len(data) // pixels}")
                images = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                yield images.view(count, height, width, 3).permute(0, 3, 1, 2)


def read_header(f):
    version = np.lib.format.read_magic(f)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(f)


class Files:
    """The images in a folder or a .zip, at any depth, sorted by name; with crop, centre-cropped to that side."""

    def __init__(self, path, crop=None):
        self.name, self.path, self.crop, self.zips, self.size = str(path), Path(path), crop, {}, None
        if self.path.is_dir():
            files, seen = [], set()
            for folder, below, names in os.walk(path, followlinks=True):
                if os.path.realpath(folder) in seen:  # a loop of links
                    below.clear()
                    continue
                seen.add(os.path.realpath(folder))
                files += [(Path(folder) / name).relative_to(path).as_posix() for name in names]
        else:
            try:
                files = [f for f in zipfile.ZipFile(path).namelist() if not f.endswith("/")]
            except (zipfile.BadZipFile, ValueError, OSError) as e:
                raise ValueError(f"{path} is a damaged zip ({e})") from e
        visible = (f for f in files if not any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(f).parts))
        self.files = sorted(f for f in visible if PurePosixPath(f).suffix.lower() in EXTENSIONS)
        if not self.files:
            raise ValueError(f"{path} holds no images ({' '.join(sorted(EXTENSIONS))})")
        self.size = tuple(self[0].shape[1:])

    def __len__(self):
        return len(self.files)

    def __getstate__(self):
        return {**self.__dict__, "zips": {}}

    def __getitem__(self, i):
        where = f"{self.name}/{self.files[i]}"
        try:
            if self.path.is_dir():
                image = to_rgb(Image.open(self.path / self.files[i]))
            else:
                if os.getpid() not in self.zips:  # an open file position cannot be shared between processes
                    self.zips = {os.getpid(): zipfile.ZipFile(self.path)}
                with self.zips[os.getpid()].open(self.files[i]) as f:
                    image = to_rgb(Image.open(f))
        except Exception as e:  # whatever PIL or zipfile raises, on purpose: the formats' readers raise anything
            raise ValueError(f"{where} cannot be read ({type(e).__name__}: {e})") from e
        pixels = np.array(center_crop(image, self.crop) if self.crop else image)
        if self.size and pixels.shape[:2] != self.size:
            sizes = f"{pixels.shape[1]}x{pixels.shape[0]}, the first {self.size[1]}x{self.size[0]}"
            raise ValueError(f"{where} is {sizes}: images of one size are scored; --save-stats takes --image-size")
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def batches(self, low, high, batch_size):
        share = torch.utils.data.Subset(self, range(low, high))
        workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        workers //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        pin = torch.cuda.is_available()
        return torch.utils.data.DataLoader(share, batch_size, num_workers=min(workers, high - low), pin_memory=pin)


def to_rgb(image):
    """Upright, transparent parts white, 8 bits a channel. ValueError for images without a fixed range."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits: scaled as in training, where PIL would clip
        array = np.asarray(image, np.float64)
        if image.mode == "F" or array.min() < 0 or array.max() > 65535:
            raise ValueError(f"its mode {image.mode} has no fixed range; convert it to 8 or 16 bits")
        image = Image.fromarray((array / 257).round().astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """The square crop of ADM, and of training: halve by boxes while twice too large, bicubic, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_set(path, crop=None):
    """-> (images or None, statistics, {} if there are none). ValueError or OSError, with the file's name, otherwise."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    if Path(path).is_dir() or (Path(path).suffix != ".npz" and zipfile.is_zipfile(path)):
        return Files(path, crop), {}
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no folder, zip or npz, or is truncated")
        with np.load(path, allow_pickle=False) as data:
            images = Npz(path) if "arr_0" in data else None
            statistics = {k: data[k] for k in ("mu", "sigma", "mu_s", "sigma_s") if k in data}
            for key, kind in (("n", int), ("size", lambda size: (int(size[0]), int(size[1]))), ("fast", bool)):
                if key in data:  # of --save-stats
                    statistics[key] = kind(data[key])
            if "inception" in data:
                statistics["inception"] = str(data["inception"])
        if images is None and "mu" not in statistics:
            raise ValueError("it has neither arr_0 nor mu and sigma")
        for mu, sigma, d in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
            shapes = [np.shape(statistics.get(k)) for k in (mu, sigma)]
            if (mu in statistics or sigma in statistics) and shapes != [(d,), (d, d)]:
                raise ValueError(f"{mu} and {sigma} have shapes {shapes}, not [{d}] and [{d}, {d}]")
            if mu in statistics and not all(np.isfinite(statistics[k]).all() for k in (mu, sigma)):
                raise ValueError(f"{mu} or {sigma} has entries that are not finite")
    except Exception as e:  # a damaged zip or header makes numpy raise anything
        raise ValueError(f"{path} cannot be used: {str(e).removeprefix(f'{path}: ')}") from e
    return images, statistics


# ---------------------------------------------------------------------------------------------------------------
# Evaluate


@contextmanager
def together(world):
    """Where one process fails at its share, the others leave too instead of waiting for it."""
    error = None
    try:
        yield
    except ValueError as e:
        error = e
    failed = torch.tensor(float(error is not None))
    if world > 1:
        dist.all_reduce(failed)
    if error:
        raise error
    if failed:
        raise SystemExit(2)  # the one that failed says why


def extract(images, model, device, batch_size, rank=0, world=1, exact=None):
    """The network over an image set -> (pool [N, 2048] float32, statistics), whole on rank 0, a share elsewhere.

    exact: a float32 network to run the first batch with too; statistics["difference"] is then the mean |difference|
    of the pool features over their mean |value|.
    """
    low, high = (len(images) * r // world for r in (rank, rank + 1))
    on = device if device.type == "cuda" else "cpu"  # MPS has no float64
    pool, done, difference = torch.empty(high - low, 2048, device=on), 0, None
    moments = Moments(2048, on), Moments(2023, on)
    bar = tqdm(total=high - low, unit="img", desc=Path(images.name).name, disable=rank > 0)
    with bar, together(world):
        for batch in images.batches(low, high, batch_size):
            batch = (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
            features, spatial, _ = model(batch)
            if exact is not None and done == 0:
                wanted = exact(batch)[0]
                difference = ((features - wanted).abs().mean() / wanted.abs().mean()).item()
            pool[done : done + len(batch)] = features
            moments[0].add(features)
            moments[1].add(spatial)
            done += len(batch)
            bar.update(len(batch))
    pool = pool.cpu()
    if not torch.isfinite(pool).all():
        raise ValueError(f"{images.name}: the features are not finite; are the network's weights?")
    if world > 1:  # moments add up, and features line up in the order of the files
        for m in moments:
            m.sum, m.products, m.count = m.sum.cpu(), m.products.cpu(), len(images)
            dist.all_reduce(m.sum)
            dist.all_reduce(m.products)
        if rank:
            dist.send(pool, 0)
        else:
            bounds = [len(images) * r // world for r in range(world + 1)]
            parts = [pool] + [torch.empty(b - a, 2048) for a, b in zip(bounds[1:], bounds[2:])]
            for r in range(1, world):
                dist.recv(parts[r], r)
            pool = torch.cat(parts)
    (mu, sigma), (mu_s, sigma_s) = (m.result() for m in moments)
    return pool, dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, n=len(images), difference=difference)


def score(sides, weight, device):
    """sides: (pool or None, statistics) of samples and reference -> {metric: value, or why it is not available}."""
    (pool, statistics), (reference_pool, reference) = sides
    values = {}
    for metric, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        values[metric] = f"not available: statistics without {mu}"
        if mu in statistics and mu in reference:
            values[metric] = frechet_distance(statistics[mu], statistics[sigma], reference[mu], reference[sigma])
    values["Inception Score"] = "not available: the samples are statistics only"
    if pool is not None:
        values["Inception Score"] = inception_score(pool @ weight.float().cpu().T)
    if pool is None or reference_pool is None:
        side = "samples are" if pool is None else "reference is"
        precision = recall = f"not available: the {side} statistics only"
    elif min(len(pool), len(reference_pool)) < 4:
        precision = recall = "not available: it takes 4 images on each side"
    else:
        on = device if device.type == "cuda" else "cpu"
        precision, recall = precision_recall(reference_pool.to(on), pool.to(on))
    return {**values, "Precision": precision, "Recall": recall}


def warnings_for(args, sides, digest):
    """What a reader of the table must know before quoting it."""
    out, counts = [], [statistics.get("n") for _, statistics in sides]
    for name, n in zip(("samples", "reference"), counts):
        if n is not None and n < 2048:
            out.append(f"{name}: {n} images, fewer than the 2,048 features: a singular covariance, and a biased FID")
    if counts[0] is not None and counts[0] != 50_000:
        out.append(f"{counts[0]} samples, not 50,000: not comparable with published numbers")
    if digest and not digest.startswith(HASH):
        out.append(f"the Inception weights (sha256 {digest[:8]}) are not the released ones: not comparable")
    differences = [s["difference"] for _, s in sides if s.get("difference") is not None]
    if any(s.get("fast") for _, s in sides) and not args.fast:
        out.append("stored statistics were made with --fast: approximate, not for reporting")
    if args.fast:
        out.append(
            f"--fast: approximate, not for reporting; bf16 moves the features by {max(differences, default=0):.2%}"
        )
    return out


def report(args, sides, model, digest, device, seconds):
    """The table on the screen, and what --save-stats and --json ask for, each written whole or not at all."""
    warnings = warnings_for(args, sides, digest)
    if args.save_stats:
        statistics = {k: v for k, v in sides[0][1].items() if v is not None and k != "difference"}
        np.savez(f"{args.save_stats}.part.npz", **statistics, inception=digest, fast=args.fast)
        os.replace(f"{args.save_stats}.part.npz", args.save_stats)
        print(f"{args.save_stats}: the statistics of {statistics['n']} images of {args.images[0]}")
        return print(*(f"{'warning':<16} {w}" for w in warnings if "samples, not" not in w), sep="\n")
    values = score(sides, model and model.fc.weight, device)
    settings = dict(network="bfloat16" if args.fast else "float32", inception=digest and digest[:8], device=str(device))
    settings.update(torch=str(torch.__version__), splits_of=5000, neighbours=3, seconds=round(seconds, 1))
    record = {}
    for metric, value in values.items():
        print(f"{metric:<16} {value if isinstance(value, str) else f'{value:.4f}'}")
        record[metric.lower().replace(" ", "_")] = None if isinstance(value, str) else value
    for name, path, (pool, statistics) in zip(("samples", "reference"), args.images, sides):
        n, seen = statistics.get("n"), 0 if pool is None else len(pool)
        print(f"{name:<16} {path}: statistics of {n or 'an unknown number of'} images, {seen} images seen here")
        record[name] = dict(path=path, n=n, images_seen=seen)
    print(f"{'settings':<16} {', '.join(f'{k} {v}' for k, v in settings.items())}")
    for warning in warnings:
        print(f"{'warning':<16} {warning}")
    if args.json:
        reasons = {k: v for k, v in zip(record, values.values()) if isinstance(v, str)}
        record.update(not_available=reasons, settings=settings, warnings=warnings)
        Path(f"{args.json}.part").write_text(json.dumps(record, indent=1) + "\n")
        os.replace(f"{args.json}.part", args.json)


def build_parser():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        usage="%(prog)s SAMPLES REFERENCE [flags], which --help lists", description=__doc__, formatter_class=style,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("images", nargs="+", metavar="SAMPLES REFERENCE", help="npz, folder or zip of images, or statistics npz")
    add("--save-stats", metavar="OUT", help="write the statistics of one image set to OUT.npz instead")
    add("--image-size", type=int, metavar="SIDE", help="with --save-stats: centre-crop to SIDE as training does")
    add("--json", metavar="OUT", help="write the table as JSON too")
    add("--inception", metavar="FILE", help=f"local weights instead of a download of {URL.rsplit('/', 1)[1]}")
    add("--batch-size", type=int, default=64, help="images at a time on each process (64)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--fast", action="store_true", help="bf16 network: approximate, for checks during training")
    return parser


def prepare(args):
    """Everything that can be wrong, before anything slow -> (device, image sets). ValueError or OSError."""

    def check(ok, message):
        if not ok:
            raise ValueError(message)

    check(args.batch_size > 0, f"--batch-size must be positive, not {args.batch_size}")
    wanted = 1 if args.save_stats else 2
    check(len(args.images) == wanted, "give SAMPLES and REFERENCE, or --save-stats OUT.npz and one image set")
    check(not args.image_size or args.save_stats, "--image-size goes with --save-stats: scored images stay as they are")
    check(args.image_size is None or args.image_size > 0, f"--image-size must be positive, not {args.image_size}")
    check(not args.save_stats or args.save_stats.endswith(".npz"), "the name after --save-stats must end in .npz")
    check(not (args.save_stats and args.json), "--json is of a score; --save-stats writes none")
    for out in filter(None, (args.save_stats, args.json)):
        check(not Path(out).exists(), f"{out} exists and is left as it is; choose another name")
        check(Path(out).absolute().parent.is_dir(), f"{out}: there is no such folder")
    sets, sizes = [open_set(path, args.image_size) for path in args.images], []
    for path, (images, statistics) in zip(args.images, sets):
        check(images is None or len(images) > 1, f"{path} holds one image only: a covariance needs at least two")
        check(images or not args.save_stats, f"{path} holds statistics already, and no images")
        sizes.append(tuple(images.size if images else statistics.get("size", ())))
        if args.save_stats:
            statistics.clear()  # those of the images are asked for
    if args.save_stats and args.image_size:
        check(sizes[0] == (args.image_size,) * 2, f"{args.images[0]}: an npz is not cropped, and is {sizes[0]} px")
    same = len({*filter(None, sizes)}) < 2
    check(
        same, f"image sizes differ: {' and '.join(f'{p} is {s}' for p, s in zip(args.images, sizes))}; see --save-stats"
    )
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}") from e
    return torch.device(name), sets


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    start = time.time()
    try:
        device, sets = prepare(args)
        if world > 1:
            dist.init_process_group("gloo")  # a few hundred MB once, from the CPU: it works everywhere
            if local:
                dist.barrier()  # the first process of each machine downloads
        model, digest, exact = None, None, None
        if any(images for images, _ in sets):
            model, digest = load_inception(args.inception, device, args.fast)
        if world > 1 and not local:
            dist.barrier()
        known = {digest, *(statistics.get("inception") for _, statistics in sets)} - {None}
        if len(known) > 1:
            raise ValueError(
                f"statistics of other Inception weights: sha256 {' and '.join(k[:8] for k in sorted(known))}"
            )
        if model and args.fast:
            exact, _ = load_inception(args.inception, device)
        sides = []
        for images, statistics in sets:
            pool = None
            # where the reference's statistics are stored, its images serve precision and recall alone
            if images and ("mu" not in statistics or sets[0][0]):
                pool, computed = extract(images, model, device, args.batch_size, rank, world, exact)
                computed["size"] = images.size
                statistics = {"difference": computed["difference"], **statistics} if "mu" in statistics else computed
            sides.append((pool, statistics))
        if rank == 0:
            report(args, sides, model, digest, device, time.time() - start)
    except (ValueError, OSError, zipfile.BadZipFile) as e:
        time.sleep(2 * (rank > 0))  # let the first process speak first
        last = str(e).strip().splitlines()[-1]  # behind a worker's traceback
        parser.error(re.sub(r"^\w+(Error|File): ", "", last))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
