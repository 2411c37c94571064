"""Teachers: frozen encoders whose patch tokens the transformer is aligned with.

    python -m inputs.teachers            the table: names, sizes, licences, and the files that offline machines need

load_encoder(name, grid) -> teacher; teacher(images uint8 [B, 3, H, W]) -> tokens [B, grid*grid, teacher.dim], raw:
the spatial norm is the method's, not the teacher's. Names: hog, sift (no weights), those of ENCODERS, timm:<any ViT>.
"""

import os
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from inputs.descriptors import Hog, Sift
from inputs.foreign import build_webssl, mocov3_names, read_weights, webssl_names
from plumbing.files import one_line
from plumbing.processes import fast_bf16

DRAWN = {"hog": Hog, "sift": Sift}  # made by hand: no weights

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class Encoder(NamedTuple):
    timm_id: str  # or, for weights that timm does not list, the source of the file
    dim: int
    millions: int  # of parameters that the tokens need
    patch: int
    stats: tuple = IMAGENET  # mean and std
    resize: str = "bicubic"  # without antialiasing, as in the released code
    norm: bool = True  # tokens after the final norm, or before it
    licence: str = "apache-2.0"


def pe(size, dim, millions, patch):
    return Encoder(f"vit_pe_{size}.fb", dim, millions, patch, HALF, "bilinear", norm=False)


def radio(size, dim, millions):
    return Encoder(
        f"naflexvit_{size}_patch16_radio_v3.c_radio", dim, millions, 16, CLIP, "bilinear", licence="nvidia-open"
    )


def webssl(size, dim, millions):
    return Encoder(f"facebook/webssl-{size}-224", dim, millions, 14, licence="cc-by-nc-4.0")


def dinov3(size, dim, millions):
    return Encoder(f"vit_{size}_dinov3.lvd1689m", dim, millions, 16, licence="dinov3 (gated at facebook/)")


def siglip(size, dim, millions, patch, version):
    # the released code normalises SigLIP with ImageNet's mean and std; the models were trained with 0.5 and 0.5
    return Encoder(f"vit_{size}.{version}webli", dim, millions, patch, HALF)


# The 27 encoders of the paper, then what the release has besides
ENCODERS = {
    "dinov2_vitb14": Encoder("vit_base_patch14_dinov2.lvd142m", 768, 86, 14),
    "dinov2_vitl14": Encoder("vit_large_patch14_dinov2.lvd142m", 1024, 303, 14),
    "dinov2_vitg14": Encoder("vit_giant_patch14_dinov2.lvd142m", 1536, 1135, 14),
    "dinov3_vitb16": dinov3("base_patch16", 768, 86),
    "dinov3_vitl16": dinov3("large_patch16", 1024, 303),
    "dinov3_vith16plus": dinov3("huge_plus_patch16", 1280, 841),
    "dinov3_vit7b16": dinov3("7b_patch16", 4096, 6716),
    "webssl_dino300m_full2b_224": webssl("dino300m-full2b", 1024, 304),
    "webssl_dino1b_full2b_224": webssl("dino1b-full2b", 1536, 1135),
    "webssl_dino2b_full2b_224": webssl("dino2b-full2b", 2688, 2084),
    "webssl_dino3b_full2b_224": webssl("dino3b-full2b", 3072, 2948),
    "pe_core_b16": pe("core_base_patch16_224", 768, 86, 16),
    "pe_core_l14": pe("core_large_patch14_336", 1024, 303, 14),
    "pe_core_g14": pe("core_gigantic_patch14_448", 1536, 1851, 14),
    "pe_lang_l14": pe("lang_large_patch14_448", 1024, 291, 14),
    "pe_lang_g14": pe("lang_gigantic_patch14_448", 1536, 1740, 14),
    "pe_spatial_b16": pe("spatial_base_patch16_512", 768, 86, 16),
    "pe_spatial_l14": pe("spatial_large_patch14_448", 1024, 303, 14),
    "pe_spatial_g14": pe("spatial_gigantic_patch14_448", 1536, 1851, 14),
    "cradio_v3_b": radio("base", 768, 98),
    "cradio_v3_l": radio("large", 1024, 320),
    "dino_vitb16": Encoder("vit_base_patch16_224.dino", 768, 86, 16),
    "clip_vitl14": Encoder("vit_large_patch14_clip_quickgelu_224.openai", 1024, 303, 14, CLIP, norm=False),
    "mocov3_vitb16": Encoder("facebookresearch/moco-v3", 768, 86, 16, licence="cc-by-nc-4.0"),
    "mocov3_vitl16": Encoder("LTH14/rcg", 1024, 303, 16, licence="not stated"),
    "ijepa_vith14": Encoder("vit_huge_patch14_gap_224.in1k_ijepa", 1280, 631, 14, licence="cc-by-nc-4.0"),
    "mae_vitl16": Encoder("vit_large_patch16_224.mae", 1024, 303, 16, norm=False, licence="cc-by-nc-4.0"),
    "dinov2_vitb14_reg": Encoder("vit_base_patch14_reg4_dinov2.lvd142m", 768, 86, 14),
    "dinov2_vitl14_reg": Encoder("vit_large_patch14_reg4_dinov2.lvd142m", 1024, 303, 14),
    "dinov2_vitg14_reg": Encoder("vit_giant_patch14_reg4_dinov2.lvd142m", 1536, 1135, 14),
    "siglip_b": siglip("base_patch16_siglip_256", 768, 86, 16, ""),
    "siglip_l": siglip("large_patch16_siglip_256", 1024, 303, 16, ""),
    "siglip_so400m": siglip("so400m_patch14_siglip_224", 1152, 412, 14, ""),
    "siglip2_b": siglip("base_patch16_siglip_256", 768, 86, 16, "v2_"),
    "siglip2_l": siglip("large_patch16_siglip_256", 1024, 303, 16, "v2_"),
    "siglip2_so400m": siglip("so400m_patch16_siglip_256", 1152, 413, 16, "v2_"),
    "siglip2_g": siglip("giantopt_patch16_siglip_256", 1536, 1135, 16, "v2_"),
}


def weights_file(name):
    """The file that --encoder-weights takes for the encoder `name`, in words."""
    source = ENCODERS[name].timm_id
    if name.startswith("webssl"):
        return f"model.safetensors of huggingface.co/{source}, or the folder of its shards"
    if name.startswith("mocov3"):
        return (
            f"the checkpoint that github.com/{source} links to ({'vit-b-300ep' if 'vitb' in name else 'mocov3_vitl'})"
        )
    if name.startswith("ijepa"):
        return "dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar"
    return f"model.safetensors of huggingface.co/timm/{source}"


def list_encoders():
    """A table of ENCODERS, for people."""
    rows = [("--encoder", "width", "params", "licence", "--encoder-weights (else timm downloads it, if it can)")]
    rows += [(name, "128", "none", "", "none") for name in DRAWN]
    for name, e in ENCODERS.items():
        rows.append((name, str(e.dim), f"{e.millions}M", e.licence, weights_file(name)))
    rows.append(("timm:<ViT id>", "", "", "timm's", "any file of that model"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def load_encoder(name, grid, weights=None, device="cpu"):
    """The teacher `name` for a grid x grid token map, in eval mode, without gradients.

    weights: a local file in timm's or the original layout, None to let timm download, or "random" (tests only).
    ValueError for an unknown name, a grid that the teacher cannot match, or weights that do not fit.
    """
    if name in DRAWN:
        if weights:
            raise ValueError(f"--encoder {name} has no weights: leave --encoder-weights out")
        return DRAWN[name](grid).to(device)
    if name not in ENCODERS and not name.startswith("timm:"):
        raise ValueError(
            f"unknown encoder {name!r}; there are hog, sift, {', '.join(ENCODERS)} and timm:<any ViT id of timm>"
        )
    if weights not in (None, "random") and not os.path.exists(weights):
        raise FileNotFoundError(f"--encoder-weights {weights}: there is no such file")
    return ViT(name, grid, weights, device)


def build(timm_id, grid, side, **more):
    """The network of a timm id for a grid x grid map of patches, side pixels wide. TypeError if it has no such size."""
    import timm  # late: 1.5 s that other teachers need not wait for

    if "naflexvit" in timm_id:  # any size as it is; NVIDIA's own code resizes its table without aligned corners
        corners = {} if "large" in timm_id else dict(pos_embed_align_corners=False)
        return timm.create_model(timm_id, **corners, **more)
    if "vit_pe_" not in timm_id:
        return timm.create_model(timm_id, img_size=side, **more)
    # Perception Encoder: rotary positions count the patches of the grid at hand, where timm stretches them to the
    # native grid, and the table is resized bilinearly without antialiasing
    model = timm.create_model(timm_id, ref_feat_shape=(grid, grid), **more)
    table = model.pos_embed
    if table is not None:
        table = timm.layers.resample_abs_pos_embed(
            table.detach(), (grid, grid), num_prefix_tokens=model.num_prefix_tokens, interpolation="bilinear",
            antialias=False,
        )  # fmt: skip
    model.set_input_size(img_size=(side, side))
    if table is not None:
        model.pos_embed = nn.Parameter(table)
    return model


def without_head(model):
    """The model without its classifier and, where it has one, its attention pool."""
    model.reset_classifier(0)
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool = None
    return model


class ViT(nn.Module):
    """A ViT of timm as a teacher: its patch tokens, without class token and registers, before or after the final norm.

    Images are normalised and resized, without antialiasing as in the released code, so that the token grid equals
    ours; position tables are resampled to that grid.
    """

    def __init__(self, name, grid, weights, device):
        super().__init__()
        import timm

        entry = ENCODERS.get(name)
        self.timm_id = timm_id = entry.timm_id if entry else name.removeprefix("timm:")
        own = "/" in timm_id  # not in timm's list: built and converted here
        if entry is None:
            if not timm.is_model(timm_id):
                near = ", ".join(timm.list_models(f"*{timm_id.split('.')[0]}*")[:5])
                raise ValueError(f"timm knows no model {timm_id!r}" + (f"; it has {near}" if near else ""))
            cfg = timm.get_pretrained_cfg(timm_id)
            with torch.device("meta"):
                probe = timm.create_model(timm_id)
            if not hasattr(probe, "num_prefix_tokens") or not hasattr(probe, "patch_embed"):
                raise ValueError(f"{timm_id} is not a ViT with patch tokens")
            stats = cfg.mean, cfg.std
            entry = Encoder(timm_id, probe.num_features, 0, probe.patch_embed.patch_size[0], stats, cfg.interpolation)
        self.dim, self.side, self.resize = entry.dim, grid * entry.patch, entry.resize
        self.device = torch.device(device)
        try:
            model = self.load_own(name, weights) if own else self.load_timm(timm_id, grid, weights)
        except TypeError as e:
            raise ValueError(f"{timm_id} takes no other image size ({e}); choose another ViT") from e
        except Exception as e:  # network, hub, pickle and shape errors have no common class
            why = one_line(e)[:300]
            if weights:
                raise ValueError(f"{name}: {weights} does not fit the model ({why})") from e
            file = (
                weights_file(name)
                if name in ENCODERS
                else f"huggingface.co/{timm.get_pretrained_cfg(timm_id).hf_hub_id}"
            )
            raise ValueError(f"{name} cannot be downloaded ({why}): fetch {file}, then --encoder-weights FILE") from e
        if not entry.norm:
            model.norm = nn.Identity()
        self.model = model.eval().requires_grad_(False).to(self.device)
        for module in self.model.modules() if fast_bf16(self.device) else []:
            if isinstance(module, (nn.Linear, nn.Conv2d)):  # not the tables of positions and angles
                module.to(torch.bfloat16)  # once, what autocast would do in each call
            if self.device.type == "cpu" and hasattr(module, "fused_attn"):
                module.fused_attn = False  # the slower kernel, in bf16
        for key, value in zip(("mean", "std"), entry.stats):
            self.register_buffer(key, torch.tensor(value, device=device).view(3, 1, 1), persistent=False)
        got = self(torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8, device=device))
        if not torch.isfinite(got).all():
            raise ValueError(f"{name} with {weights}: its tokens are not finite; the file is damaged")
        got = got.shape
        if got[1:] != (grid**2, self.dim):
            raise ValueError(f"{name} gives {list(got[1:])} at {self.side} px, the model needs [{grid**2}, {self.dim}]")

    def load_timm(self, timm_id, grid, weights):
        # num_classes stays as in the model's own config: with another, timm loads without strict, and a file
        # that fits nowhere would load nothing and say nothing
        make = dict(pretrained=weights != "random")
        if weights not in (None, "random"):
            read_weights(weights)  # refused in our words, where it would run code or is damaged
            make["pretrained_cfg_overlay"] = dict(file=weights, custom_load=False)
        return without_head(build(timm_id, grid, self.side, **make))

    def load_own(self, name, weights):
        import timm

        webssl = name.startswith("webssl")
        if weights is None:
            raise ValueError("timm does not carry it")
        if webssl:
            model = build_webssl(ENCODERS[name].dim)
        else:
            model = timm.create_model(f"vit_{'base' if 'vitb' in name else 'large'}_patch16_224", num_classes=0)
        if weights != "random":
            model.load_state_dict((webssl_names if webssl else mocov3_names)(read_weights(weights)))
        if model.patch_embed.img_size != (self.side, self.side):
            model.set_input_size(img_size=(self.side, self.side))  # resamples the table: bicubic, antialiased
        return model

    @torch.no_grad()
    def forward(self, images):
        x = (images.float() / 255 - self.mean) / self.std
        if x.shape[-1] != self.side:
            x = F.interpolate(x, (self.side, self.side), mode=self.resize, align_corners=False)  # (B, 3, g*p, g*p)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=fast_bf16(self.device)):
            tokens = self.model.forward_features(x)
        return tokens[:, self.model.num_prefix_tokens :].float()  # (B, T, dim)


if __name__ == "__main__":
    print(list_encoders())
