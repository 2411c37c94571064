"""experiments/spatial_structure.py: the metrics are their definitions, and the published correlations come out."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import spatial_structure as spatial
from experiments.spatial_correlations import ranks
from experiments.token_sources import pixels
from inputs.shapes import Shapes
from test_irepa import normal


def halves(side):
    """Tokens of two kinds at right angles, left and right: [1, T, 2], and the left half as a mask [1, T]."""
    left = torch.arange(side).repeat(side)[None] < side // 2
    return torch.stack([left, ~left], dim=2).float() * 3, left


def test_spatial_metrics_in_closed_form():
    tokens, left = halves(6)
    apart, same = torch.eye(36)[None] * 5, torch.ones(1, 36, 3)
    # 54 of 60 pairs at d = 1 lie in one half, and 20 of 140 at d >= 6
    assert spatial.lds(tokens).item() == pytest.approx(54 / 60 - 20 / 140, abs=1e-6)
    assert spatial.srss(tokens, left).item() == 1 and spatial.srss(tokens, ~left).item() == 1
    for metric, expected in ((spatial.lds, 0), (spatial.cds, 0), (spatial.rmsc, math.sqrt(35 / 36))):
        assert metric(apart).item() == pytest.approx(expected, abs=1e-6)
        assert metric(same).item() == pytest.approx(0, abs=1e-6)
    assert spatial.rmsc(tokens).item() == pytest.approx(math.sqrt(0.5))
    assert spatial.srss(tokens, torch.zeros(1, 36)).isnan().all()
    with pytest.raises(ValueError, match="at least 5 x 5 tokens, not 35"):
        spatial.lds(apart[:, :35])


def test_spatial_metrics_are_their_definitions():
    side, z = 7, normal(41, 2, 49, 5) + 0.3
    mask = torch.from_numpy(np.random.RandomState(42).rand(2, 49) < 0.5)
    for b in range(2):
        x = z[b].double().numpy()
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        place = np.stack(np.divmod(np.arange(side**2), side), axis=1)
        pairs = [(s, t, np.abs(place[s] - place[t]).sum(), x[s] @ x[t]) for s in range(49) for t in range(49)]

        def mean(keep):
            found = [k for s, t, d, k in pairs if keep(s, t, d)]
            return np.mean(found) if found else np.nan

        slope = np.polyfit(range(1, 9), [mean(lambda s, t, d, r=r: d == r) for r in range(1, 9)], 1)[0]
        m = mask[b].numpy()
        scores = [
            mean(lambda s, t, d: s == i and m[t] and d == 1) - mean(lambda s, t, d: s == i and not m[t] and d >= 6)
            for i in np.flatnonzero(m)
        ]
        expected = dict(
            lds=mean(lambda s, t, d: d == 1) - mean(lambda s, t, d: d >= 6), cds=-slope, srss=np.nanmean(scores),
            rmsc=math.sqrt(1 - np.square(x.mean(0)).sum()),
        )  # fmt: skip
        for name, value in expected.items():
            got = spatial.METRICS[name](z, *([mask] if name == "srss" else []))[b].item()
            assert got == pytest.approx(value, abs=1e-6), name


def test_published_correlations(tmp_path, capsys):
    spatial.main(["--correlate", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/results.json").read_text())["correlations"]
    r = {name: round(f["pearson"][0], 3) for name, f in found.items()}
    assert r == dict(accuracy=-0.260, lds=-0.852, cds=-0.847, srss=-0.886, rmsc=-0.889)
    assert all(f["pearson"][1] < f["pearson"][0] < f["pearson"][2] and len(f["x"]) == 27 for f in found.values())
    assert round(found["accuracy"]["spearman"][0], 2) == 0.03 and round(found["srss"]["spearman"][0], 2) == -0.91
    assert "RMSC             27  -0.889" in capsys.readouterr().out
    assert Image.open(tmp_path / "out/correlations.png").size > (1000, 300)


def test_ranks_of_equals_and_of_the_better():
    noise = np.random.RandomState(43).standard_normal((3, 200))
    assert ranks(noise + np.array([[0], [3], [3]]))[0].tolist() == [3, 3, 3]
    assert sorted(map(tuple, ranks(noise + np.array([[0], [3], [3]]))[1:].tolist())) == [(1, 1, 2), (2, 1, 2)]
    noise[:, :3] = np.nan  # images without a mask
    assert ranks(noise + np.array([[0], [9], [5]])).tolist() == [[3, 3, 3], [1, 1, 1], [2, 2, 2]]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Six drawn shapes in one folder, the mask of each but the last, and a table of FIDs."""
    root = tmp_path_factory.mktemp("drawn")
    (root / "images").mkdir(), (root / "masks").mkdir()
    images = Shapes(64, 6)[range(6)].images
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(root / f"images/{i}.png")
        if i < 5:
            Image.fromarray(image.max(2) > 140).save(root / f"masks/{i}.png")
    rows = "hog,9,70\nsift,8,60\npixels,7,\ntimm:vit_tiny_patch16_224 (random),6,50\nother,5,40\n"
    (root / "fid.csv").write_text(f"# a comment\nencoder,fid,accuracy\n{rows}")
    (root / "bad.csv").write_text("encoder,fid\nhog,nine\n")
    (root / "few.csv").write_text("encoder,fid\nhog,9\nsift,7\n")
    return root


def test_spatial_structure_of_drawn_shapes(drawn, tmp_path, capsys):
    vit, out = "timm:vit_tiny_patch16_224", tmp_path / "out"
    flags = f"--data {drawn}/images --image-size 64 --images 5 --encoders hog sift pixels {vit} --weights {vit}=random"
    flags += f" --masks {drawn}/masks --correlate {drawn}/fid.csv --show 2.png:9,7 --device cpu --out {out}"
    spatial.main(flags.split())
    said = " ".join(capsys.readouterr().out.split())
    record = json.loads((out / "results.json").read_text())
    assert sorted(f.name for f in out.iterdir()) == [
        "correlations.png",
        "pca.png",
        "results.json",
        "similarity.png",
        "table.csv",
    ]
    assert "5 of the 6 images" in said and "pixels" in said and "no forecast of a FID" in said
    assert len(record["images"]) == 5 and list(record["encoders"]) == ["hog", "sift", "pixels", f"{vit} (random)"]
    images = torch.stack([torch.from_numpy(np.array(Image.open(drawn / "images" / f))) for f in record["images"]])
    tokens, result = pixels(images.permute(0, 3, 1, 2)), record["encoders"]["pixels"]
    assert tokens.shape == (5, 256, 48) and torch.equal(tokens[0, 17, 0], images[0, 4, 4, 0] / 127.5 - 1)
    values = spatial.lds(tokens)
    assert result["lds"]["per_image"] == pytest.approx(values.tolist(), abs=1e-5)
    assert result["lds"]["mean"] == pytest.approx(values.mean().item(), abs=1e-5)
    assert result["lds"]["standard_error"] == pytest.approx(values.std().item() / math.sqrt(5), abs=1e-5)
    masked = sum(score is not None for score in result["srss"]["per_image"])
    assert 2 <= masked <= 5 and f"SRSS: over {masked} of them" in said
    assert record["encoders"][f"{vit} (random)"]["parameters"] > 5e6 and result["parameters"] == 0
    found = record["correlations"]
    assert found["lds"]["x"] == [e["lds"]["mean"] for e in record["encoders"].values()] and found["lds"]["fid"][0] == 9
    assert found["accuracy"]["x"] == [70, 60, 50, 40]
    assert found["accuracy"]["pearson"][0] == pytest.approx(7 / math.sqrt(50))


@pytest.mark.parametrize(
    "flags,message",
    [
        ("", "name images with --data, or ask for --correlate"),
        ("--data absent", "--data absent does not exist"),
        ("--data {0}/masks --images 1", "--images 2 at least"),
        ("--data {0}/images --image-size 60", "a multiple of 16"),
        ("--data {0}/images --encoders hog resnet", "unknown encoder 'resnet'"),
        ("--data {0}/images --encoders hog hog", "name each once"),
        ("--data {0}/images --encoders hog --weights hog=random", "hog has no weights"),
        ("--data {0}/images --encoders hog --weights sift=x", "NAME=FILE"),
        (
            "--data {0}/images --encoders dino_vitb16 --weights dino_vitb16=x.pt",
            "--weights dino_vitb16=x.pt: there is no",
        ),
        ("--data {0}/images --show png", "(6 have it)"),
        ("--data {0}/images --show 0.png:16,0", "from 0,0 to 15,15"),
        ("--data {0}/images --masks {0}", "need a mask"),
        ("--data {0}/fid.csv", "fid.csv"),
        ("--data {0}/images --correlate {0}/few.csv", "needs four rows"),
        ("--correlate {0}/bad.csv", "could not convert string to float: 'nine'"),
        ("--correlate {0}/absent.csv", "No such file"),
        ("--correlate --out {0}/images", "exists; another one leaves it as it is"),
    ],
)
def test_spatial_structure_says_what_is_wrong(drawn, tmp_path, capsys, flags, message):
    flags = flags.format(drawn)
    with pytest.raises(SystemExit) as stop:
        spatial.main((flags if "--out" in flags else f"{flags} --out {tmp_path / 'out'}").split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() and len(list((drawn / "images").iterdir())) == 6
