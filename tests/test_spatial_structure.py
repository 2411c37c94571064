"""experiments/spatial_structure.py: the metrics are their definitions, and the published correlations come out."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import spatial_structure as spatial
from experiments.spatial_correlations import ranks, read_table, write_table
from experiments.token_sources import pixels
from inputs.images import ImageSet
from inputs.shapes import Shapes
from inputs.teachers import load_encoder
from inputs.tokens import write_tokens
from plumbing.processes import Ranks
from test_irepa import normal
from tests.common import refused


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


# ---- The probe, files of features, caches, tables ----


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """Two classes of six images in folders, and their hog tokens in a cache, a .pt of the release, a dict, cut."""
    root = tmp_path_factory.mktemp("rooms")
    for k, name in enumerate(("bright", "dark")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(6):
            image = np.random.RandomState(10 * k + i).randint(0, 100, (64, 64, 3)) + 150 * (1 - k)
            Image.fromarray(image.astype(np.uint8)).save(root / f"images/{name}/{i}.png")
    files = sorted((root / "images").rglob("*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    tokens = load_encoder("hog", 16)(images)
    data = ImageSet(root / "images", 64, progress=False)
    write_tokens(data, load_encoder("hog", 16), "hog", root / "tokens", torch.device("cpu"), Ranks())
    torch.save(tokens, root / "hog-saved.pt")
    torch.save(dict(names=["a"], features=tokens), root / "dict.pt")
    torch.save(dict(a=tokens, b=tokens), root / "two.pt")
    torch.save(tokens[:, 1:], root / "fewer.pt")
    torch.save(tokens[:9], root / "nine.pt")
    torch.save((tokens * 9).long(), root / "whole.pt")
    torch.save([1, 2], root / "list.pt")
    (root / "flat").mkdir()
    (root / "few/a").mkdir(parents=True), (root / "few/b").mkdir()
    for i in range(6):
        Image.open(files[i]).save(root / f"flat/{i}.png")
        Image.open(files[i]).save(root / f"few/{'ab'[i > 3]}/{i}.png")
    return root


def measured(out, *flags):
    """-> {encoder: what results.json says of it}"""
    spatial.main([str(flag) for flag in (*flags, "--image-size", 64, "--device", "cpu", "--out", out)])
    return json.loads((out / "results.json").read_text())["encoders"]


def test_accuracy_stands_beside_structure(rooms, tmp_path, capsys):
    found = measured(tmp_path / "out", "--data", rooms / "images", "--encoders", "pixels", "hog", "--probe")
    said = " ".join(capsys.readouterr().out.split())
    assert "LDS CDS RMSC linear probe, % probe of patches, % seconds" in said and "right on 50.0 %" in said
    assert "2 classes, mean ± standard error over 5 folds" in said
    accuracy = found["pixels"]["accuracy"]
    assert accuracy == dict(mean=100, standard_error=0, per_fold=[100] * 5) and found["pixels"]["accuracy_patches"]
    per_fold = found["hog"]["accuracy"]["per_fold"]  # hog does not see how bright an image is
    assert min(per_fold) < 100
    assert found["hog"]["accuracy"]["standard_error"] == pytest.approx(np.std(per_fold, ddof=1) / math.sqrt(5))


def without_how(found):
    return {k: v for k, v in found.items() if k not in ("seconds", "weights", "tokens", "parameters", "ranks")}


def test_features_and_caches_give_the_numbers_of_the_encoder_itself(rooms, tmp_path, capsys):
    data, images = ("--data", rooms / "images"), ("--images", 11)
    live = measured(tmp_path / "live", *data, *images, "--encoders", "hog", "--probe")["hog"]
    features = (rooms / "hog-saved.pt", f"mine={rooms / 'dict.pt'}")
    found = measured(tmp_path / "features", *data, *images, "--features", *features, "--probe", "--show", "bright/2")
    assert list(found) == ["hog-saved", "mine"] and (tmp_path / "features/pca.png").exists()
    assert all(without_how(f) == without_how(live) for f in found.values()) and found["mine"]["tokens"].endswith("t.pt")
    assert "row i is taken for the i-th image by name" in capsys.readouterr().out
    alone = measured(tmp_path / "alone", *images, "--features", *features)
    assert alone["mine"]["lds"] == live["lds"] and not (tmp_path / "alone/pca.png").exists()
    assert "No pictures: no --data" in capsys.readouterr().out
    names = json.loads((tmp_path / "live/results.json").read_text())["images"]
    for flags in ((), data):
        out = tmp_path / f"cache{len(flags)}"
        found = measured(out, *flags, *images, "--tokens", rooms / "tokens", "--encoders", "hog", "--probe")["hog"]
        assert json.loads((out / "results.json").read_text())["images"] == names
        assert found["lds"]["per_image"] == pytest.approx(live["lds"]["per_image"], abs=1e-3)  # of float16
        assert found["accuracy"]["per_fold"] == live["accuracy"]["per_fold"] and found["parameters"] is None


def test_masks_of_features_are_paired_as_the_release_pairs_them_or_not_at_all(rooms, tmp_path, capsys):
    folder, tokens = tmp_path / "masks", torch.load(rooms / "hog-saved.pt")
    folder.mkdir()
    masks = torch.zeros(14, 16, 16, dtype=torch.bool)
    for i in range(14):
        masks[i, :, : 16 if i in (2, 10) else 5 + i % 4] = True  # two are all object
        pixels = np.kron(masks[i], np.ones((16, 16))).astype(np.uint8)  # 1 is not black
        Image.fromarray(pixels).resize((512, 256), Image.NEAREST).save(folder / f"{i}.png")  # 10.png comes before 2.png
    order = sorted(range(14), key=str)
    kept = [i for i in order if i not in (2, 10)]
    flags = ("--masks", folder, "--features", rooms / "hog-saved.pt")
    found = measured(tmp_path / "out", *flags)["hog-saved"]["srss"]["per_image"]
    assert found == pytest.approx(spatial.srss(tokens, masks[kept].flatten(1)).tolist(), abs=1e-5)
    (folder / "7.png").unlink()
    capsys.readouterr()
    error = refused(capsys, lambda: measured(tmp_path / "no", *flags))
    assert "of its 13 PNGs 11 have a quarter" in error and "--features 12 images" in error
    (folder / "6.png").unlink()  # as many masks as images: one by one, and two images have no score
    order = [i for i in order if i not in (6, 7)]
    found = measured(tmp_path / "all", *flags)["hog-saved"]["srss"]["per_image"]
    expected = spatial.srss(tokens, masks[order].flatten(1)).tolist()
    assert found == [None if i in (2, 10) else pytest.approx(e, abs=1e-5) for i, e in zip(order, expected)]
    assert "SRSS: over 10 of them, by the masks in the order of their names" in capsys.readouterr().out


def test_measured_rows_are_a_table_that_correlates(rooms, tmp_path):
    data, out = ("--data", rooms / "images"), [tmp_path / name for name in "abcd"]
    fids = tmp_path / "fids.csv"
    fids.write_text("encoder,fid,lds\nhog,9,\nsift,8,\npixels,7,\nhog-saved,6,0.25\nabsent,5,\n")
    first = measured(out[0], *data, "--encoders", "hog", "sift", "--probe")
    second = measured(out[1], *data, "--encoders", "pixels", "--features", rooms / "hog-saved.pt", "--probe")
    head, *rows = (out[0] / "table.csv").read_text().splitlines()
    assert head == "encoder,fid,accuracy,accuracy_patches,lds,cds,rmsc" and rows[1].startswith("sift,,")
    tables = [out[0] / "table.csv", out[1] / "table.csv"]
    spatial.main(["--correlate", str(fids), *map(str, tables), "--out", str(out[2])])
    found = json.loads((out[2] / "results.json").read_text())["correlations"]
    every = {**first, **second}
    assert found["lds"]["fid"] == [9, 8, 7, 6] and "srss" not in found and "accuracy" in found
    lds = [every[name]["lds"]["mean"] for name in ("hog", "sift", "pixels")]
    assert found["lds"]["x"] == pytest.approx([*lds, 0.25])  # a number of its own stays
    assert found["rmsc"]["x"] == pytest.approx([e["rmsc"]["mean"] for e in every.values()], rel=1e-5)
    measured(
        out[3], *data, "--encoders", "pixels", "--correlate", fids, tables[0], "--features", rooms / "hog-saved.pt"
    )
    assert json.loads((out[3] / "results.json").read_text())["correlations"]["rmsc"]["x"] == found["rmsc"]["x"]
    filled = read_table([out[3] / "table.csv"])
    assert [(row["encoder"], row["fid"]) for row in filled] == [("pixels", 7), ("hog-saved", 6)]
    assert filled[1]["lds"] == pytest.approx(second["hog-saved"]["lds"]["mean"], rel=1e-5)


def test_any_name_comes_back_from_a_table(tmp_path):
    rows = {'timm:a,b "c"': dict(lds=0.125, srss=float("nan")), "d": dict(lds=1e-7, srss=0.5)}
    write_table(tmp_path / "table.csv", rows, {"d": 2.5})
    first, second = read_table([tmp_path / "table.csv"])
    assert first.pop("fid") != first.get("fid") and first == {"encoder": 'timm:a,b "c"', "lds": 0.125}
    assert second == {"encoder": "d", "fid": 2.5, "lds": 1e-7, "srss": 0.5}


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--features {0}/hog-saved.pt --probe", "--probe needs labels: those of the class folders of --data"),
        ("--data {0}/flat --encoders hog --probe", "--probe needs two classes at least"),
        ("--data {0}/images/dark --encoders hog --probe", "--probe needs two classes at least"),
        ("--data {0}/few --encoders hog --probe", "needs 5 images of each class, one a fold, and of those measured 4"),
        ("--features {0}/absent.pt", "absent.pt: there is no such file"),
        ("--features {0}/two.pt", "needs one tensor of [images, tokens, width], and holds a, b"),
        ("--features {0}/fewer.pt", "has 255 tokens of width 128 an image: the metrics compare encoders at 16 x 16"),
        ("--features {0}/whole.pt", "holds torch.int64 [12, 256, 128]"),
        ("--features {0}/list.pt", "holds list"),
        ("--features {0}/images/dark/0.png", "dark/0.png is refused: it is no file of tensors"),
        ("--features {0}/hog-saved.pt {0}/hog-saved.pt", "or is already: give another NAME=FILE"),
        ("--data {0}/images --encoders hog --features hog={0}/dict.pt", "or is already: give another NAME=FILE"),
        ("--features #={0}/dict.pt", "a row cannot be called '#'"),
        ("--features {0}/hog-saved.pt {0}/nine.pt", "(hog-saved 12, nine 9): one at a time"),
        ("--data {0}/images --features {0}/nine.pt", "nine.pt has 9 images, and"),
        ("--features {0}/hog-saved.pt --encoders hog", "--encoders hog: name images with --data"),
        ("--features {0}/hog-saved.pt --show 0", "no images to draw without --data"),
        ("--tokens {0}/tokens", "name those of its encoders that are to be measured with --encoders"),
        ("--tokens {0}/tokens --encoders hog --weights hog=x", "with --tokens no encoder is run; leave it out"),
        ("--tokens {0}/tokens --encoders hog pixels", "--encoders pixels: name images with --data"),
        ("--data {0}/images --tokens {0}/tokens --encoders hog --image-size 32", "of crops of 64 px: --image-size 64"),
        ("--data {0}/images/dark --tokens {0}/tokens --encoders hog", "/tokens is of other images: it has no 0.png"),
        ("--tokens {0}/tokens --encoders hog --features {0}/nine.pt", "nine.pt has 9 images, and {0}/tokens 12"),
        ("--correlate {0}/t.csv {0}/t.csv {0}/t.csv", "hog is measured twice, here and before"),
        ("--correlate {0}/no.csv", "fid is missing"),
        ("--correlate {0}/empty.csv", "has no rows"),
    ],
)
def test_probe_and_sources_say_what_is_wrong(rooms, tmp_path, capsys, flags, message):
    (rooms / "t.csv").write_text("encoder,fid,lds\nhog,9,1\n")
    (rooms / "no.csv").write_text("encoder,lds\nhog,9\n")
    (rooms / "empty.csv").write_text("# nothing\n")
    more = [] if "--image-size" in flags else ["--image-size", "64"]
    flags = [*flags.format(rooms).split(), *more, "--device", "cpu", "--out", str(tmp_path / "out")]
    assert message.format(rooms) in refused(capsys, lambda: spatial.main(flags)) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags,message",
    [
        ("", "name images with --data, or ask for --correlate"),
        ("--data absent", "--data absent does not exist"),
        ("--data {0}/masks --images 1", "--images 2 at least"),
        ("--data {0}/images --image-size 60", "a multiple of 16"),
        ("--data {0}/images --encoders hog resnet", "unknown encoder 'resnet'"),
        ("--data {0}/images --encoders hog hog", "name each once"),
        ("--data {0}/images --encoders hog --weights hog=random", "hog has no weights: leave --weights hog=random out"),
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
