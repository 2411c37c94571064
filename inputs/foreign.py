"""Weights as their authors publish them: encoders', renamed to timm's names, and VGG16's for LPIPS."""

from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file

from plumbing.files import one_line, read_pt

VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"


def read_weights(path):
    """The state dict in a .pt or .safetensors file, or in a folder of .safetensors shards."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} is a folder without .safetensors files")
    if files[0].suffix == ".safetensors":
        return {k: v for file in files for k, v in load_file(file).items()}
    state = read_pt(path)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a state dict")
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    return state


def build_webssl(dim):
    """DINOv2's ViT of this width with a SwiGLU in every size, as timm's VisionTransformer."""
    from timm.models.vision_transformer import SwiGLUPacked, VisionTransformer  # late: timm takes 1.5 s

    depth, heads = {1024: (24, 16), 1536: (40, 24), 2688: (24, 21), 3072: (26, 24)}[dim]
    hidden = (4 * dim * 2 // 3 + 7) // 8 * 8
    ratio = next(r for r in (2 * hidden / dim, 2 * hidden / dim + 1e-6) if int(dim * r) == 2 * hidden)
    return VisionTransformer(
        img_size=224, patch_size=14, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=ratio, init_values=1e-5,
        mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, num_classes=0,
    )  # fmt: skip


def webssl_names(state):
    """Hugging Face's Dinov2Model, or the original file, to timm's names."""
    out, parts = {}, {}
    for key, value in state.items():
        key = key.removeprefix("dinov2.").removeprefix("embeddings.").removeprefix("encoder.")
        if key.endswith("mask_token"):
            continue  # of the training objective only
        words = key.split(".")
        if words[0] == "blocks" and len(words) > 3 and words[1].isdigit() and words[2].isdigit():
            key = ".".join(["blocks", *words[2:]])  # the original file keeps its blocks in chunks
        for old, new in (
            ("position_embeddings", "pos_embed"), ("patch_embeddings.projection", "patch_embed.proj"),
            ("attention.output.dense", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"), ("weights_in", "fc1"), ("weights_out", "fc2"), ("layernorm", "norm"),
            ("mlp.w12.", "mlp.fc1."), ("mlp.w3.", "mlp.fc2."),
        ):  # fmt: skip
            key = key.replace(old, new)
        key = key.replace("layer.", "blocks.", 1) if key.startswith("layer.") else key
        if ".attention.attention." in key:
            block, rest = key.split(".attention.attention.")
            which, kind = rest.split(".")
            parts.setdefault(f"{block}.attn.qkv.{kind}", {})[which] = value
        else:
            out[key] = value
    return {**out, **{key: torch.cat([p["query"], p["key"], p["value"]]) for key, p in parts.items()}}


def mocov3_names(state):
    """MoCo v3's checkpoint to timm's names: the base encoder without its head. The ViT-L file has four odd names."""
    odd = {"norm13": "norm1", "mlp.fc13": "mlp.fc1", "norm14": "norm2", "mlp.fc14": "mlp.fc2"}
    out = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        if key.startswith(("momentum_encoder.", "predictor.")):
            continue
        key = key.removeprefix("base_encoder.")
        if "head" in key or key.startswith("fc"):
            continue
        for wrong, right in odd.items():
            key = key.replace(f".{wrong}.", f".{right}.")
        out[key] = value
    return out


def load_lpips(weights, device):
    """LPIPS on VGG16 (arXiv 1801.03924): (images, images) in [-1, 1] -> [B, 1, 1, 1]; None for "none".

    weights: torchvision's file; the layers on top come with the package. ValueError or OSError where it cannot be had.
    """
    if weights == "none":
        return None
    hint = f"fetch {VGG16} and name the file after --lpips, or say --lpips none and do without"
    if not Path(weights).is_file():
        raise FileNotFoundError(f"--lpips {weights}: there is no such file: {hint}")
    try:
        import lpips
    except ImportError as e:
        raise ValueError(f"--lpips takes the package: pip install lpips, or --lpips none ({e})") from e
    try:
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        state = read_pt(weights)
        net.net.load_state_dict({k: state[f"features.{k.split('.', 1)[1]}"] for k in net.net.state_dict()})
    except Exception as e:  # pickle, key and shape errors have no common class
        raise ValueError(f"--lpips {weights} does not hold torchvision's VGG16 ({one_line(e)[:200]}): {hint}") from e
    return net.requires_grad_(False).to(device)
