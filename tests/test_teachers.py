"""inputs/teachers.py and inputs/foreign.py: each encoder's patch tokens at the grid at hand, whoever wrote its file."""

import pytest
import timm
import torch

from inputs import teachers
from inputs.foreign import build_webssl, mocov3_names, webssl_names
from inputs.teachers import load_encoder
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
    with pytest.raises(ValueError, match="not a ViT"):
        load_encoder("timm:resnet18", 4, "random")
    with pytest.raises(ValueError, match="unknown encoder"):
        load_encoder("dino", 4)


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


@pytest.mark.parametrize("name", teachers.ENCODERS)
def test_every_teacher_has_its_grid_and_width(name):
    entry = teachers.ENCODERS[name]
    side = 16 * entry.patch
    with torch.device("meta"):
        if name.startswith("webssl"):
            model = build_webssl(entry.dim)
        elif name.startswith("mocov3"):
            model = timm.create_model(f"vit_{'base' if 'vitb' in name else 'large'}_patch16_224", img_size=side)
            model.reset_classifier(0)
        else:
            model = teachers.without_head(teachers.build(entry.timm_id, 16, side))
        tokens = model.forward_features(torch.zeros(1, 3, side, side))[:, model.num_prefix_tokens :]
    assert tokens.shape == (1, 256, entry.dim)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(entry.millions, abs=0.6)
    assert name in teachers.list_encoders() and len(teachers.weights_file(name)) > 10


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
    qkv = teacher.model.blocks[3].attn.qkv.weight
    assert torch.equal(qkv, native.blocks[3].attn.qkv.weight.to(qkv.dtype))  # bf16 where it is fast
    torch.save({f"module.base_encoder.{k}": v for k, v in native.state_dict().items()}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="foreign.pth does not fit"):
        load_encoder("pe_core_b16", 6, tmp_path / "foreign.pth")


def test_traps_of_the_other_teachers():
    radio = load_encoder("cradio_v3_b", 16, "random")
    assert radio.model.embeds.pos_embed_align_corners is False
    assert radio.mean.flatten().tolist() == pytest.approx(teachers.CLIP[0])
    images = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    assert radio(images).shape == (1, 256, 768)
    with torch.device("meta"):
        clip = teachers.build(teachers.ENCODERS["clip_vitl14"].timm_id, 16, 224)
    assert "QuickGELU" in type(clip.blocks[0].mlp.act).__name__ and not isinstance(clip.norm_pre, torch.nn.Identity)
    assert not teachers.ENCODERS["clip_vitl14"].norm and not teachers.ENCODERS["mae_vitl16"].norm
    assert teachers.ENCODERS["siglip_b"].stats == teachers.HALF  # the released code takes ImageNet's
    with pytest.raises(ValueError, match=r"cannot be downloaded.*huggingface.co/facebook/webssl.*--encoder-weights"):
        load_encoder("webssl_dino300m_full2b_224", 16)


def test_foreign_names_become_timms():
    with torch.device("meta"):
        webssl = build_webssl(teachers.ENCODERS["webssl_dino300m_full2b_224"].dim).state_dict()
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
