"""experiments/hidden_states.py: what the tokens behind each block know."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from experiments import hidden_states
from experiments.hidden_states import cknna, hidden, noisy
from irepa import Config, SiT
from tests.common import RUN, refused, run


def test_cknna_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(14, d, generator=generator) for d in (5, 7))
    b[:, :5] += a
    n, k = len(a), 3
    x, y = (F.normalize(v.double(), dim=1) for v in (a, b))

    def near(v, i):
        return sorted((j for j in range(n) if j != i), key=lambda j: -float(v[i] @ v[j]))[:k]

    def hsic(u, v):
        K, L = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in {*near(u, i)} & {*near(v, i)}:
                K[i, j], L[i, j] = u[i] @ u[j], v[i] @ v[j]
        trace = sum(K[i, j] * L[j, i] for i in range(n) for j in range(n))
        paths = sum(K[i, j] * L[j, q] for i in range(n) for j in range(n) for q in range(n))
        return float(trace + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * paths / (n - 2))

    assert cknna(a, b, k) == pytest.approx(hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y)), abs=1e-9)
    turned = a @ torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    assert cknna(a, 3 * turned, k) == pytest.approx(1, abs=1e-5)  # lengths and directions of the axes do not count
    assert 0 < cknna(a, torch.randn(14, 4, generator=generator), k) < cknna(a, b, k) < 1
    with pytest.raises(ValueError, match="more than 10"):
        cknna(a[:8], b[:8])


def test_hidden_tokens_are_those_behind_each_block():
    torch.manual_seed(0)
    config = Config.named("SiT-S/2", input_size=8, in_channels=3, depth=3, hidden_size=32, num_heads=2, num_classes=4)
    model = SiT(config).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)  # a new model's gates are shut
    x = noisy(torch.randn(2, 3, 8, 8), [5, 6], 0.3, "linear")
    kept, h = hidden(model, x, 0.3)
    assert len(kept) == 3 and kept[0].shape == (2, 16, 32) and not torch.equal(kept[0], kept[1])
    assert torch.equal(model.projectors[0](kept[config.encoder_depth - 1]), h)
    assert not model.blocks[0]._forward_hooks
    again = noisy(torch.zeros(1, 3, 8, 8), [6], 1.0, "linear")
    assert torch.equal(again[0], torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(6)))  # its own noise


@pytest.fixture(scope="module")
def models(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hidden")
    for method in ("sit", "irepa"):
        run(*RUN, "--sample-every", 0, "--data", photos, "--method", method, "--out", folder / method)
    return folder


def look(*flags):
    hidden_states.main([str(flag) for flag in flags])


def test_curves_table_and_maps(photos, models, tmp_path, capsys):
    ckpt = ["--ckpt", models / "sit/last.pt", f"own={models / 'irepa/last.pt'}"]
    look(*ckpt, "--data", photos, "--images", 22, "--levels", 0.1, 0.5, "--out", tmp_path / "out", "--device", "cpu")
    found = json.loads((tmp_path / "out/results.json").read_text())["models"]
    assert [*found] == ["sit", "own"] and found["sit"]["aligned"] is None and found["own"]["aligned"]
    for model in found.values():
        assert [*model["at"]] == ["0.1", "0.5"]
        for rows in model["at"].values():
            assert [row["block"] for row in rows] == [*range(1, len(rows) + 1)]
            assert all(0 <= row["accuracy"] <= 100 and -1 <= row["cknna"] <= 1.001 for row in rows)
            assert all(row["lds"] is None for row in rows)  # 4 x 4 tokens have no distant ones
    assert "| own | 0.5 | 1 |" in (tmp_path / "out/table.md").read_text()
    for picture in ("curves.png", "similarity.png"):
        assert np.array(Image.open(tmp_path / "out" / picture).convert("L")).std() > 10
    for flags, message in (
        ([*ckpt, "--out", tmp_path / "out"], "is there already"),
        ([*ckpt, ckpt[1], "--out", tmp_path / "x"], "sit is there already"),
        ([*ckpt, "--levels", 1.0, "--out", tmp_path / "x"], "--levels lie in [0, 1)"),
        ([*ckpt, "--latents", tmp_path, "--out", tmp_path / "x"], "models of pixels none"),
        (["--ckpt", tmp_path / "no.pt", "--out", tmp_path / "x"], "no.pt"),
    ):
        assert message in refused(capsys, look, *flags, "--data", photos, "--device", "cpu")
        assert not (tmp_path / "x").exists()
