"""Tokens of a teacher that are computed once: in a folder, or in the memory of a run.

    OUT/ENCODER/tokens-00000.npy ...    float16 [images, tokens, width], rows of the grid first, raw: the spatial norm
                                        is the method's; what else lies there, inputs/shards.py says

Images are not augmented here, so that each epoch would compute the same again. A mirrored image is another.
"""

import hashlib
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from inputs.shards import Recorded, Shards, begin, positive, read_manifest, refuse_other
from plumbing.files import lock
from plumbing.processes import fast_bf16

SHARD = 2**27  # bytes of a shard, at most
COMMAND = "python -m inputs.teachers"


def folder_of(out, encoder):
    """Where the cache of an encoder lies in the folder `out`."""
    return Path(out) / encoder.replace(":", "-").replace("/", "-")


# ---- In a folder ----


def write_tokens(data, teacher, encoder, out, device, ranks, random=False, batch_size=32):
    """The tokens of each image of an ImageSet, under out/ENCODER -> how many shards this process wrote.

    teacher: of load_encoder for `encoder`; random: whether its weights are. ValueError where another cache is there, or
    tokens do not fit float16.
    """
    folder, row = folder_of(out, encoder), 2 * teacher.grid**2 * teacher.dim
    shard = max(1, min(SHARD // row, max(16, len(data) // 64)))  # little to lose
    weights = weights_sha256(teacher)
    manifest = dict(encoder=encoder, weights_sha256=weights, random=random, cls_weight=teacher.cls_weight)
    manifest.update(grid=teacher.grid, dim=teacher.dim, image_size=data.size, crop="centre, as in ADM")
    manifest.update(tokens="float16 [N, T, D], rows of the grid first, raw", classes=data.classes, count=len(data))
    manifest.update(files_sha256=data.digest, precision="bf16" if weights and fast_bf16(device) else "fp32")
    manifest.update(shard=shard, stand_ins=sorted(data.instead.items()))
    if ranks.rank == 0:
        refuse_other(folder)
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder) if ranks.rank == 0 else nullcontext():
        found = manifest_of(folder) if (folder / "manifest.json").exists() else None
        ranks.meet()  # all have looked
        manifest = begin(folder, manifest, found, sorted({*manifest} - {"shard"}), data, ranks.rank == 0)
        ranks.meet()  # the folder is there
        shards = shards_of(folder, manifest)
        _, todo = shards.share(ranks)
        for _ in shards.fill(todo, data, lambda b: teacher(b.images.to(device)), ranks, encoder, batch_size):
            pass
        ranks.meet()
    return len(todo)


def weights_sha256(teacher):
    """Of a network's weights as machines with bfloat16 hold them, without position tables, which follow the grid; None
    where there are none."""
    digest, names = hashlib.sha256(), []
    for name, weight in sorted(teacher.named_parameters()):
        if "pos_embed" not in name:
            names.append(name)
            digest.update(name.encode() + weight.detach().bfloat16().cpu().contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest() if names else None


def shards_of(folder, manifest):
    """The tokens [T, D] of a cache, as inputs.shards has them."""
    shape = manifest["grid"] ** 2, manifest["dim"]
    return Shards(folder, "tokens", manifest["count"], manifest["shard"], shape, COMMAND)


def manifest_of(folder):
    """The manifest of a cache of tokens. ValueError, naming the file, where it is not one."""

    def check(manifest):
        positive(manifest["grid"], manifest["dim"])
        if not {"encoder", "random", "cls_weight", "weights_sha256"} <= manifest.keys():
            raise ValueError("entries are missing")

    return read_manifest(folder, "tokens", check)


class Tokens:
    """The tokens of the images of a set, from a folder that write_tokens filled: tokens[indices] -> float16 [B, T, D].

    .images: the set, as the cache records it. FileNotFoundError or ValueError, in words, where the folder has no cache
    of the encoder at this grid and cls_weight, or an unfinished one. Shards are memory-mapped: nothing is read ahead.
    """

    def __init__(self, path, encoder, grid, cls_weight=0.0):
        folder = folder_of(path, encoder)
        if not (folder / "manifest.json").exists():
            raise FileNotFoundError(f"--tokens {path} has none of {encoder}{there_is(path)}")
        self.path, manifest = str(folder), manifest_of(folder)
        for key, value in dict(encoder=encoder, grid=grid, cls_weight=cls_weight).items():
            if manifest[key] != value:
                raise ValueError(f"{folder} is another cache: its {key} is {manifest[key]}, not {value}")
        self.manifest, self.grid, self.dim, self.random = manifest, grid, manifest["dim"], manifest["random"]
        self.images = Recorded(folder, manifest)
        self.shards = shards_of(folder, manifest)
        self.shards.check()

    def __getitem__(self, indices):
        return torch.from_numpy(self.shards[indices])


def there_is(path):
    """What caches of tokens there are in a folder, in words."""
    if (Path(path) / "manifest.json").exists():
        return f": name the folder above it, {Path(path).parent}"
    if not Path(path).is_dir():
        return ": there is no such folder"
    found = [manifest_of(file.parent)["encoder"] for file in sorted(Path(path).glob("*/manifest.json"))]
    return f", only of {', '.join(found)}: choose one with --encoder" if found else f": write them with {COMMAND}"


class Taught:
    """A set with the tokens of its images: data[indices] -> Batch with tokens."""

    def __init__(self, data, tokens):
        self.data, self.tokens, self.weights_sha256 = data, tokens, tokens.manifest["weights_sha256"]
        self.classes, self.labels = data.classes, data.labels
        self.quick = data.quick and tokens.shards.small
        if hasattr(data, "files"):
            self.files = data.files

    def __len__(self):
        return len(self.data)

    def __getitem__(self, indices):
        return self.data[indices]._replace(tokens=self.tokens[indices])


# ---- In memory ----


class Target:
    """What a run is aligned with: batch -> the same with tokens, float32 [B, T, D], or with none without a teacher.

    A teacher's tokens are kept where those of all images, `count`, take at most `memory` bytes: each image is computed
    in the first epoch, by one process for all, and no more. Whole parts of batches are computed, known images among
    them, as convolutions round by the number of images: a run that goes on has the bits of one that was not stopped.
    """

    def __init__(self, teacher, count, memory, ranks, device):
        self.teacher, self.ranks, self.device, self.kept = teacher, ranks, device, None
        self.seconds, self.events = 0.0, []
        shape = (count, teacher.grid**2, teacher.dim) if teacher else (0,)
        if teacher and 4 * math.prod(shape) <= memory:
            self.kept, self.known = torch.empty(shape), torch.zeros(count, dtype=torch.bool)

    def __call__(self, batch):
        if batch.tokens is not None:
            return batch._replace(tokens=batch.tokens.float())
        if not self.teacher:
            return batch
        if self.kept is None:
            return batch._replace(tokens=self.timed(batch.images))
        together = self.ranks.gather(batch.numbers)
        if self.known[together].all():
            return batch._replace(tokens=self.kept[batch.numbers].to(self.device))
        tokens = self.timed(batch.images)
        self.kept[together], self.known[together] = self.ranks.gather(tokens).cpu(), True
        return batch._replace(tokens=tokens)

    def timed(self, images):
        """The teacher's tokens; on a GPU, the time that they take is asked for later, so that nobody waits for it."""
        if self.device.type != "cuda":
            start, tokens = time.perf_counter(), self.teacher(images)
            self.seconds += time.perf_counter() - start
            return tokens
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        tokens = self.teacher(images)
        end.record()
        self.events.append((start, end))
        return tokens

    def spent(self):
        """Seconds in the teacher since the last call."""
        if self.events:
            torch.cuda.synchronize(self.device)
        seconds = self.seconds + sum(start.elapsed_time(end) for start, end in self.events) / 1000
        self.seconds, self.events = 0.0, []
        return seconds
