"""FID, sFID, Inception Score, precision and recall as OpenAI's ADM evaluator computes them, in PyTorch.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz          the numbers that papers report
    python fid.py runs/demo/pngs photos.zip --image-size 64            any two of: npz, folder, zip, statistics
    python fid.py --save-stats photos-256.npz photos --image-size 256  a reference from one's own images
    torchrun --nproc_per_node=8 fid.py samples.npz reference.npz       each process takes its share of the images

An image set is an .npz with arr_0 (uint8, N x H x W x 3), or a folder or a .zip of images, at any depth. Statistics,
an .npz or torch-fidelity's .pt with mu, sigma and, for sFID, mu_s, sigma_s, are used as they are; where such a file
also has arr_0, as the standard references do, precision and recall come from that.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import zipfile
import zlib
from collections import Counter, OrderedDict
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, also while torch is imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset, default_collate
from tqdm import tqdm

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
HASH = "6726825d"  # how the sha256 of that file begins
EXTENSIONS = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
EXTENSIONS -= set(".bufr .grib .h5 .hdf .mpeg .mpg .emf .wmf".split())  # which Pillow recognises, and cannot decode
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX|@eaDir|#recycle|@Recycle|\$RECYCLE|lost\+found|System Volume)")
PIXELS = 2 * 89_478_485  # above which Pillow by default takes an image for an attack; other code may lift its limit
# what turns an image upright, by EXIF's orientation from 2 on
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()


def check(ok, message):
    if not ok:
        raise ValueError(message)


# ---- The network: Inception v3 as TensorFlow's classify_image_graph_def of 2015-12-05 has it ----
def convolution(channels, out, kernel, stride=1, valid=False):
    padding = "valid" if valid or stride > 1 else "same"  # as in TF
    conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
    bn = nn.BatchNorm2d(out, eps=1e-3)  # torchvision's value too; PyTorch's own default is 1e-5
    return nn.Sequential(OrderedDict(conv=conv, bn=bn, relu=nn.ReLU(inplace=True)))


# TF averages over the pixels that exist, PyTorch by default over the padding too
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)  # VALID in TF: without padding


class Mixed(nn.Module):
    """Branches of convolutions and one of pooling, concatenated in this order. branches: name -> its layers in turn,
    {ending of the name: (out, kernel[, stride])}, where b sees the same input as a."""

    def __init__(self, channels, pool, pool_out=None, **branches):
        super().__init__()
        self.pool, self.sources = pool, {}  # layer -> the layer whose output it takes, or None: the input
        for branch, layers in branches.items():
            source, width = None, channels
            for ending, (out, *kernel) in layers.items():
                self.sources[branch + ending] = source
                self.add_module(branch + ending, convolution(width, out, *kernel))
                if not ending.endswith("a"):
                    source, width = branch + ending, out
        self.branch_pool = convolution(channels, pool_out, 1) if pool_out else nn.Identity()

    def forward(self, x):
        h = {None: x}
        for layer, source in self.sources.items():
            h[layer] = self.get_submodule(layer)(h[source])
        last = [h[layer] for layer in self.sources if layer not in self.sources.values()]
        return torch.cat([*last, self.branch_pool(self.pool(x))], dim=1)


class InceptionV3(nn.Module):
    """images uint8 [B, 3, H, W] -> pool [B, 2048], spatial [B, 2023], logits [B, 1008], float32.

    pool is pool_3; spatial the first 7 channels of mixed_6's first branch after its ReLU, flattened in TF's order
    (row, column, channel), as the reference files hold it; logits are pool @ W without the bias, as in the Inception
    Score. State-dict names are those of the released file. Always in eval mode.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = convolution(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = convolution(80, 192, 3, valid=True)
        for name, channels, out in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
            one, five = {"": (64, 1)}, {"_1": (48, 1), "_2": (64, 5)}
            double = {"_1": (64, 1), "_2": (96, 3), "_3": (96, 3)}
            self.add_module(name, Mixed(channels, average, out, branch1x1=one, branch5x5=five, branch3x3dbl=double))
        double = {"_1": (64, 1), "_2": (96, 3), "_3": (96, 3, 2)}
        self.Mixed_6a = Mixed(288, halve, branch3x3={"": (384, 3, 2)}, branch3x3dbl=double)
        for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            one, seven = {"": (192, 1)}, {"_1": (c, 1), "_2": (c, (1, 7)), "_3": (192, (7, 1))}
            double = {"_1": (c, 1), "_2": (c, (7, 1)), "_3": (c, (1, 7)), "_4": (c, (7, 1)), "_5": (192, (1, 7))}
            self.add_module(name, Mixed(768, average, 192, branch1x1=one, branch7x7=seven, branch7x7dbl=double))
        seven = {"_1": (192, 1), "_2": (192, (1, 7)), "_3": (192, (7, 1)), "_4": (192, 3, 2)}
        self.Mixed_7a = Mixed(768, halve, branch3x3={"_1": (192, 1), "_2": (320, 3, 2)}, branch7x7x3=seven)
        # TF's graph has a max in Mixed_7c, where the paper and torchvision average
        for name, channels, pool in (("Mixed_7b", 1280, average), ("Mixed_7c", 2048, maximum)):
            one, three = {"": (320, 1)}, {"_1": (384, 1), "_2a": (384, (1, 3)), "_2b": (384, (3, 1))}
            double = {"_1": (448, 1), "_2": (384, 3), "_3a": (384, (1, 3)), "_3b": (384, (3, 1))}
            self.add_module(name, Mixed(channels, pool, 192, branch1x1=one, branch3x3=three, branch3x3dbl=double))
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
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        pool = x.float().mean((2, 3))  # (B, 2048)
        return pool, spatial.float(), pool @ self.fc.weight.float().T


def resize(images):
    """[B, 3, H, W] -> float32 [B, 3, 299, 299] as TF1's bilinear resize: source = destination * (size / 299), without
    half-pixel centres and without antialiasing. With one more row and column that is PyTorch's align_corners."""
    x = F.pad(images.float(), (0, 1, 0, 1), mode="replicate")
    return F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299]


def load_inception(file=None, device="cpu", fast=False):
    """-> (InceptionV3 ready to use, sha256 of its weights). `file`, or the released weights, downloaded once.
    ValueError, with what to do, where the weights are absent or are something else."""
    path = Path(file or Path(torch.hub.get_dir(), "checkpoints", URL.rsplit("/", 1)[1]))
    try:
        if not file and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, path, hash_prefix=HASH)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, RuntimeError) as e:
        way = f"fetch {URL} elsewhere and put it at {path}, or name it with --inception FILE"
        raise ValueError(f"the Inception weights are not here ({e}): {way}") from e
    check(file or digest.startswith(HASH), f"{path} is damaged (sha256 {digest[:8]}, not {HASH}): delete it")
    try:
        model, weights = InceptionV3(), torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception as e:  # pickle, zip and shape errors have no common class
        why = " ".join(str(e).split())[:300]
        raise ValueError(f"{path} does not hold pt_inception-2015-12-05's weights ({why})") from e
    for module in model.modules():
        if isinstance(module, nn.Sequential):  # the same features, faster
            module.conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.bn).requires_grad_(False)
            module.bn = nn.Identity()
    return model.to(device, torch.bfloat16 if fast else torch.float32, memory_format=torch.channels_last), digest


# ---- The metrics ----
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


def check_gaussian(mu, sigma, d):
    """ValueError unless these are numbers of the shapes [d] and [d, d]."""
    shapes = np.shape(mu), np.shape(sigma)
    check(shapes == ((d,), (d, d)), f"mu and sigma have shapes {shapes}, not [{d}] and [{d}, {d}]")
    check(np.isfinite(mu).all() and np.isfinite(sigma).all(), "mu or sigma has entries that are not finite")


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) between two Gaussians: mu [D], sigma [D, D].

    The trace of the root is the sum of the singular values of A1^T A2 for any A with A A^T = sigma: real by
    construction, and right without full rank, where sqrtm of the product is not. ValueError for shapes or NaN.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64).cpu() for a in (mu1, sigma1, mu2, sigma2))
    check_gaussian(mu1.numpy(), sigma1.numpy(), mu1.numel())
    check_gaussian(mu2.numpy(), sigma2.numpy(), mu1.numel())

    def root(sigma):
        factor, info = torch.linalg.cholesky_ex((sigma + sigma.T) / 2)  # seven times faster than eigh
        if info == 0:
            return factor
        values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)  # no full rank; below zero is rounding only
        return vectors * values.clamp(min=0).sqrt()

    cross = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    return max(((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item(), 0.0)  # or -1e-13


def inception_score(logits, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) over consecutive splits of logits [N, classes], averaged over the splits."""
    scores = []
    for part in torch.as_tensor(logits).split(split_size):
        log_p = part.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return float(np.mean(scores))


def precision_recall(reference, samples, k=3):
    """(precision, recall) of features [N, D], [M, D] (Kynkaanniemi et al., 2019): the share of samples within some
    reference's distance to its k-th neighbour, and the reverse. ADM's float16 distances make them up to 0.004 larger,
    ours are in float64. ValueError for k or fewer on a side."""
    reference, samples = (torch.as_tensor(x).double() for x in (reference, samples))
    check(min(len(reference), len(samples)) > k, f"precision and recall need more than k = {k} images on each side")

    def distances(rows, columns):
        return (torch.cdist(part, columns) for part in rows.split(max(1, 2**25 // len(columns))))

    def covered(points, by):
        """The share of points within some other's distance to its k-th neighbour, where the nearest is itself."""
        radii = torch.cat([d.topk(k + 1, dim=1, largest=False).values[:, -1] for d in distances(by, by)])
        return torch.cat([(d <= radii).any(1) for d in distances(points, by)]).double().mean().item()

    return covered(samples, reference), covered(reference, samples)


# ---- Images in: npz, folders and zips as uint8 pixels ----
class Npz:
    """arr_0 of an .npz, read as a stream: a set of 50,000 images of 256 px is 9.8 GB."""

    def __init__(self, path):
        with zipfile.ZipFile(path) as z, z.open("arr_0.npy") as f:
            check(np.lib.format.read_magic(f) == (1, 0), "arr_0 is not of version 1.0 of the npy format")
            (shape, fortran, dtype), self.start = np.lib.format.read_array_header_1_0(f), f.tell()
        good = dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and min(shape) > 0 and not fortran
        check(good, f"arr_0 is {dtype} {list(shape)}{' in Fortran order' * fortran}, not uint8 [N, H, W, 3] in C order")
        self.name, self.crop, self.left_out, self.count, self.size = str(path), None, "", shape[0], shape[1:3]

    def batches(self, low, high, batch_size):
        """Images low ... high - 1, as uint8 [B, 3, H, W]. ValueError, with the place, where the file is damaged."""
        pixels, start, stop = 3 * math.prod(self.size), low, low
        try:
            with zipfile.ZipFile(self.name) as z, z.open("arr_0.npy") as f:
                f.read(self.start)  # after a seek from here zipfile would not check the CRC
                f.seek(self.start + low * pixels)
                for start in range(low, high, batch_size):
                    stop = min(start + batch_size, high)
                    data = bytearray(f.read((stop - start) * pixels))
                    found = start + len(data) // pixels
                    check(found == stop, f"{self.name} is truncated at image {found}")
                    yield torch.frombuffer(data, dtype=torch.uint8).view(-1, *self.size, 3).permute(0, 3, 1, 2)
        except (zipfile.BadZipFile, zlib.error, EOFError) as e:
            raise ValueError(f"{self.name} is damaged between images {start} and {stop} ({e})") from e


class Files:
    """The images in a folder or a .zip, at any depth, sorted by name; with crop, centre-cropped to that side."""

    def __init__(self, path, crop=None):
        self.name, self.path, self.crop, self.zips, self.size = str(path), Path(path), crop, {}, None
        names = self.zip().namelist() if self.path.is_file() else walk(path)
        kinds = {name: Path(name).suffix.lower() for name in sorted(names) if not HIDDEN.search(name)}
        self.files = [name for name, kind in kinds.items() if kind in EXTENSIONS]
        others = Counter(k or "without extension" for n, k in kinds.items() if k not in EXTENSIONS and n[-1] != "/")
        self.left_out = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        check(self.files, f"it holds no images that Pillow opens; there are {self.left_out or 'no files'}")
        self.count, self.size = len(self.files), tuple(self[0].shape[1:])

    def zip(self):
        if (key := os.getpid()) not in self.zips:  # an open file position cannot be shared between processes
            self.zips = {key: zipfile.ZipFile(self.path)}
        return self.zips[key]

    def __getstate__(self):
        return {**self.__dict__, "zips": {}}

    def __getitem__(self, i):
        """Image i as uint8 [3, H, W]. ValueError, with its name, where it cannot be read or has another size."""
        where = f"{self.name}/{self.files[i]}"
        try:
            file = self.zip().open(self.files[i]) if self.path.is_file() else self.path / self.files[i]
            image = Image.open(file)
            check(math.prod(image.size) <= PIXELS, f"{math.prod(image.size)} pixels are too many")
            image = to_rgb(image)
        except Exception as e:  # whatever PIL or zipfile raises, on purpose: the formats' readers raise anything
            raise ValueError(f"{where} cannot be read ({type(e).__name__}: {e})") from e
        pixels = np.array(center_crop(image, self.crop) if self.crop else image)
        found, wanted = ("{1}x{0}".format(*size) for size in (pixels.shape, self.size or pixels.shape))
        check(found == wanted, f"{where} is {found}, the first {wanted}; --image-size SIDE crops all to one")
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def batches(self, low, high, batch_size):
        """As Npz.batches; processes decode ahead of the network."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), high - low)
        return DataLoader(Subset(self, range(low, high)), batch_size, num_workers=workers, collate_fn=together)


def together(images):
    """A batch, in shared memory where a worker makes it."""
    try:
        return default_collate(images)
    except RuntimeError as e:
        raise ValueError("no room in shared memory: docker run --shm-size 8g gives more, or lower --batch-size") from e


def walk(path):
    """The files below a folder, links followed, but not in a circle. OSError for a folder that cannot be read."""

    def stop(error):
        raise error

    files, above = [], {os.fspath(path): set()}  # above: the real folders that a folder lies in
    for folder, below, names in os.walk(path, followlinks=True, onerror=stop):
        real, outer = os.path.realpath(folder), above.pop(folder)
        below[:] = [name for name in below if real not in outer and not HIDDEN.search(name)]
        files += [(Path(folder) / name).relative_to(path).as_posix() for name in names if real not in outer]
        above.update((os.path.join(folder, name), {real, *outer}) for name in below)
    return files


def upright(image):
    """Turned as its EXIF says. ImageOps.exif_transpose also rewrites the EXIF, and fails where it cannot."""
    turn = None
    with suppress(SyntaxError):  # PIL's word for an EXIF block whose header is damaged: it says of no turn
        turn = image.getexif().get(0x0112)
    return image.transpose(Image.Transpose[TURNS[turn - 2]]) if turn in range(2, 9) else image


def to_rgb(image):
    """Upright, transparent parts white, 8 bits a channel. ValueError for images without a fixed range."""
    image = upright(image)
    if image.mode[0] in "IF":  # 16 bits: scaled as in training, where PIL would clip
        array = np.asarray(image, np.float64)
        fixed = image.mode != "F" and array.min() >= 0 and array.max() <= 65535
        check(fixed, f"its mode {image.mode} has no fixed range; convert it to 8 or 16 bits")
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


def load_pt(path):
    """{name: array} of a torch-fidelity cache: a pickle, of which nothing but arrays is read."""
    make, kinds = np._core.multiarray._reconstruct, (np.dtypes.Float32DType, np.dtypes.Float64DType)
    safe = [np.ndarray, np.dtype, *kinds, make, (make, "numpy.core.multiarray._reconstruct")]  # numpy 1's name of it
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # whose words would advise to run whatever it holds
        raise ValueError("it holds other things than arrays, or is damaged") from e


def open_set(path, crop=None):
    """-> (images or None, statistics, {} if there are none). ValueError, with the file's name, otherwise."""
    check(Path(path).exists(), f"{path} does not exist")
    try:
        if Path(path).is_dir() or (Path(path).suffix not in (".npz", ".pt") and zipfile.is_zipfile(path)):
            return Files(path, crop), {}
        check(zipfile.is_zipfile(path), "it is no folder, zip, npz or pt, or is truncated")
        with nullcontext(load_pt(path)) if Path(path).suffix == ".pt" else np.load(path, allow_pickle=False) as data:
            images = Npz(path) if "arr_0" in data else None
            arrays = dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s"), np.asarray)
            kinds = dict(arrays, n=int, fast=bool, inception=str, size=lambda a: tuple(a.tolist()))
            statistics = {k: kind(data[k]) for k, kind in kinds.items() if k in data}
        check(images or "mu" in statistics, "it has neither arr_0 nor mu and sigma")
        for mu, sigma, d in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
            if mu in statistics or sigma in statistics:
                check_gaussian(statistics.get(mu), statistics.get(sigma), d)
    except Exception as e:  # a damaged zip or header makes numpy raise anything
        raise ValueError(f"{path} cannot be used: {e}") from e
    return images, statistics


# ---- Evaluate: from the arguments to the table ----
def extract(images, model, device, batch_size, rank=0, world=1):
    """The network over an image set -> (pool [N, 2048] float32, statistics), whole on rank 0, a share elsewhere.
    ValueError, on every rank, where an image cannot be used on any."""
    low, high = (images.count * r // world for r in (rank, rank + 1))
    on = device if device.type == "cuda" else "cpu"  # MPS has no float64
    pools, errors = [torch.empty(0, 2048, device=on)], [None] * world
    moments = Moments(2048, on), Moments(2023, on)
    batches, number = images.batches(low, high, batch_size), math.ceil((high - low) / batch_size)
    try:
        for batch in tqdm(batches, images.name, number, unit="img", unit_scale=batch_size, disable=rank > 0):
            batch = (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
            features, spatial, _ = model(batch)
            pools.append(features.to(on))
            moments[0].add(features)
            moments[1].add(spatial)
        pool = torch.cat(pools).cpu()
        check(torch.isfinite(pool).all(), f"{images.name}: the features are not finite; are the network's weights?")
    except ValueError as e:
        errors[rank] = e
    if world > 1:
        dist.all_gather_object(errors, errors[rank])
    for error in filter(None, errors):
        raise error
    if world > 1:  # moments add up, and features line up in the order of the files
        for m in moments:
            m.sum, m.products, m.count = m.sum.cpu(), m.products.cpu(), images.count
            dist.all_reduce(m.sum)
            dist.all_reduce(m.products)
        shares = [None] * world if rank == 0 else None
        dist.gather_object(pool, shares)
        pool = torch.cat(shares or [pool])
    (mu, sigma), (mu_s, sigma_s) = (m.result() for m in moments)
    return pool, dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, n=images.count, size=images.size)


def score(sides, weight, device):
    """sides: (pool or None, statistics) of samples and reference -> {metric: value, or why it is not available}."""
    (pool, statistics), (reference_pool, reference) = sides
    values, seen = {}, [0 if features is None else len(features) for features in (pool, reference_pool)]
    for metric, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        values[metric] = f"not available: statistics without {mu}"
        if mu in statistics and mu in reference:
            values[metric] = frechet_distance(statistics[mu], statistics[sigma], reference[mu], reference[sigma])
    values["Inception Score"] = "not available: the samples are statistics only"
    if pool is not None:
        values["Inception Score"] = inception_score(pool @ weight.float().cpu().T)
    precision = recall = f"not available: it takes 4 images on each side, and there are {seen[0]} and {seen[1]}"
    if min(seen) > 3:
        on = device if device.type == "cuda" else "cpu"
        precision, recall = precision_recall(reference_pool.to(on), pool.to(on))
    return {**values, "Precision": precision, "Recall": recall}


def warnings_for(sets, sides, digest, moved):
    """What a reader of the table must know before quoting it."""
    counts = [statistics.get("n") for _, statistics in sides]
    few = "fewer than the 2,048 features: a singular covariance, and a biased FID"
    out = [f"{name}: {n} images, {few}" for name, n in zip(("samples", "reference"), counts) if n and n < 2048]
    if len(sides) == 2 and counts[0] not in (None, 50_000):
        out.append(f"{counts[0]} samples, not 50,000: not comparable with published numbers")
    out += [f"{images.name}: left out {images.left_out}" for images, _ in sets if images and images.left_out]
    if any("mu" in statistics and "mu_s" not in statistics for _, statistics in sides):
        out.append("statistics without mu_s, as torch-fidelity's, compare only with numbers by the same file")
    if digest and not digest.startswith(HASH):
        out.append(f"the Inception weights (sha256 {digest[:8]}) are not the released ones: not comparable")
    if moved is not None:
        out.append(f"--fast: approximate, not for reporting; bf16 moves the features by {moved:.2%}")
    elif any(statistics.get("fast") for _, statistics in sides):
        out.append("stored statistics were made with --fast: approximate, not for reporting")
    return out


def report(args, sets, sides, values, settings, warnings):
    """The table on the screen, and as --json."""
    rows = {metric: value if isinstance(value, str) else f"{value:.4f}" for metric, value in values.items()}
    record = {metric.lower().replace(" ", "_"): value for metric, value in values.items()}
    reasons = {key: value for key, value in record.items() if isinstance(value, str)}
    record.update(dict.fromkeys(reasons), not_available=reasons, settings=settings, warnings=warnings)
    for name, path, (images, _), (pool, statistics) in zip(("samples", "reference"), args.images, sets, sides):
        n, seen, crop = statistics.get("n"), 0 if pool is None else len(pool), images and images.crop
        rows[name] = f"{path}: statistics of {n or 'an unknown number of'} images, {seen} images seen here"
        rows[name] += f", each centre-cropped to {crop} px" if crop else ""
        record[name] = dict(path=path, n=n, images_seen=seen, cropped_to=crop)
    rows["settings"] = ", ".join(f"{k} {v}" for k, v in settings.items())
    for name, text in rows.items():
        print(f"{name:<16} {text}")
    if args.json:
        Path(f"{args.json}.part").write_text(json.dumps(record, indent=1) + "\n")
        os.replace(f"{args.json}.part", args.json)  # whole or not at all


def prepare(args):
    """-> [(images or None, statistics)] of each side; before anything slow, ValueError for what is wrong."""
    save, side, out = args.save_stats, args.image_size, args.save_stats or args.json
    check(args.batch_size > 0, f"--batch-size must be positive, not {args.batch_size}")
    check(len(args.images) == (1 if save else 2), "give SAMPLES and REFERENCE, or --save-stats OUT.npz and one set")
    check(side is None or side > 0, f"--image-size must be positive, not {side}")
    check(not save or save.endswith(".npz"), "the name after --save-stats must end in .npz")
    check(not (save and args.json), "--json is of a score; --save-stats writes none")
    check(not out or not Path(out).exists(), f"{out} exists and is left as it is; choose another name")
    check(not out or Path(out).absolute().parent.is_dir(), f"{out}: there is no such folder")
    sets = [open_set(path, side) for path in args.images]
    sizes = [images.size if images else statistics.get("size") for images, statistics in sets]
    for path, size, (images, statistics) in zip(args.images, sizes, sets):
        check(images is None or images.count > 1, f"{path} holds one image only: a covariance needs at least two")
        check(not side or size in (None, (side, side)), f"{path} is {size} px; only folders and zips are cropped")
    check(len(set(sizes) - {None}) < 2, f"image sizes differ: {dict(zip(args.images, sizes))}; see --image-size")
    if save and "mu" in sets[0][1]:  # those that are there count; of another number of images they would be others
        sets = [(None, {**sets[0][1], "size": sizes[0]} if sizes[0] else sets[0][1])]
    return sets


def pick_device(name):
    """ValueError for one that is not here. Under torchrun, cuda is the process's own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name == "cpu":  # what is freed is kept for the next batch: to get it again, zeroed, is an eighth of the time
        with suppress(AttributeError, TypeError):  # of glibc alone
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: none lies outside the heap
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: which does not shrink
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}") from e


def evaluate(args, rank, world, local):
    """From the arguments to the table or the file of statistics. ValueError or OSError for what cannot be used."""
    start, sets, device = time.time(), prepare(args), pick_device(args.device)
    if world > 1:
        dist.init_process_group("gloo")  # a few hundred MB once, from the CPU: it works everywhere
        if local:
            dist.barrier()  # the first process of each machine downloads
    seen, moved, sides = [images for images, _ in sets if images], None, []
    model, digest = load_inception(args.inception, device, args.fast) if seen else (None, None)
    if world > 1 and not local:
        dist.barrier()
    known = sorted({digest, *(stored.get("inception") for _, stored in sets)} - {None})
    check(len(known) < 2, f"statistics of other Inception weights: sha256 {' and '.join(k[:8] for k in known)}")
    for images, stored in sets:
        pool, statistics = None, stored
        # where the reference's statistics are stored, its images serve precision and recall alone
        if images and ("mu" not in stored or sets[0][0]):
            pool, statistics = extract(images, model, device, args.batch_size, rank, world)
        sides.append((pool, stored if "mu" in stored else statistics))
    if rank > 0:
        return
    if args.fast and seen:
        moved, (exact, _) = 0, load_inception(args.inception, device)
        for images in seen:
            batch = next(iter(images.batches(0, min(args.batch_size, images.count), args.batch_size))).to(device)
            wanted = exact(batch)[0]
            moved = max(moved, ((model(batch)[0] - wanted).abs().mean() / wanted.abs().mean()).item())
    warnings = warnings_for(sets, sides, digest, moved)
    for warning in warnings:  # before the numbers that they are about
        print(f"{'warning':<16} {warning}")
    if args.save_stats:
        made = dict(inception=digest, fast=args.fast) if seen else {}
        np.savez(f"{args.save_stats}.part.npz", **sides[0][1], **made)
        os.replace(f"{args.save_stats}.part.npz", args.save_stats)
        what = f"the statistics of {seen[0].count} images of" if seen else "the stored statistics, as they are, of"
        print(f"{args.save_stats}: {what} {args.images[0]}")
    else:
        settings = dict(network="bfloat16" if args.fast else "float32", inception=digest and digest[:8])
        settings.update(device=str(device), torch=str(torch.__version__), splits_of=5000, neighbours=3)
        values = score(sides, model and model.fc.weight, device)
        report(args, sets, sides, values, dict(settings, seconds=round(time.time() - start, 1)), warnings)


def main(argv=None):
    usage = "%(prog)s SAMPLES REFERENCE [flags], which --help lists"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("images", nargs="+", metavar="SAMPLES REFERENCE", help="npz, folder or zip of images, or statistics")
    add("--save-stats", metavar="OUT", help="write one set's statistics to OUT.npz instead; stored ones as they are")
    add("--image-size", type=int, metavar="SIDE", help="centre-crop folders and zips to SIDE as training does")
    add("--json", metavar="OUT", help="write the table as JSON too")
    add("--inception", metavar="FILE", help=f"local weights instead of a download of {URL.rsplit('/', 1)[1]}")
    add("--batch-size", type=int, default=64, help="images at a time on each process (64)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--fast", action="store_true", help="bf16 network: approximate, for checks during training")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        evaluate(args, rank, world, local)
    except (ValueError, OSError) as e:
        time.sleep(2 * (rank > 0))  # let the first process speak first
        parser.error(re.sub(r"^\w+(Error|File): ", "", str(e).strip().splitlines()[-1]))  # behind a worker's traceback
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
