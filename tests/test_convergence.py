"""experiments/convergence.py: five arms that differ in what they say they do, and in nothing else."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import train
from experiments import convergence, convergence_report, learned
from inputs import teachers
from inputs.foreign import read_weights
from inputs.images import ImageSet
from inputs.shapes import Shapes
from inputs.teachers import load_encoder
from plumbing import jobs
from plumbing.settings import network_config, resolve
from tests.common import RUN, run, weights


def test_arms_are_the_published_settings_and_their_halves():
    found = {}
    for arm, flags in convergence.ARMS.items():
        asked, method, _ = resolve(["--out", "not/there", "--demo", *flags.split()])
        config = network_config(asked, method)
        found[arm] = config.projector, config.gamma, config.proj_coeff
    assert found.pop("sit")[0] is None  # without a projector, the others say nothing
    assert found == {
        "repa": ("mlp", None, 0.5),
        "irepa": ("conv", 0.6, 1.0),
        "conv-only": ("conv", None, 0.5),
        "norm-only": ("mlp", 0.6, 0.5),
    }


def test_knobs_change_one_thing_each():
    settings = {}
    for arm, flags in convergence.KNOBS.items():
        small = f"--model SiT-S/4 --depth 4 --encoder-depth 2 {flags}".split()
        asked, method, _ = resolve(["--out", "not/there", "--demo", *small])
        settings[arm] = vars(network_config(asked, method))
    base = settings.pop("irepa")
    assert (base["gamma"], base["kernel_size"], base["proj_coeff"], base["encoder_depth"]) == (0.6, 3, 1.0, 2)
    for arm, config in settings.items():
        knob, value = arm.rsplit("-", 1)
        knob = knob.replace("-", "_")
        assert {key for key in config if config[key] != base[key]} == {knob} and config[knob] == float(value)


def test_arms_of_a_seed_share_trunk_data_and_noise(photos, tmp_path):
    for arm, flags in convergence.ARMS.items():
        coefficient = () if arm == "sit" else ("--proj-coeff", 0)
        small = *RUN, "--projector-dim", 32, "--sample-every", 0
        run(*small, *flags.split(), *coefficient, "--data", photos, "--out", tmp_path / arm)
    sit = weights(tmp_path / "sit")
    for arm in convergence.ARMS:  # an alignment that counts for nothing changes nothing, from the first weights on
        trunk = {k: v for k, v in weights(tmp_path / arm).items() if not k.startswith("projectors")}
        assert trunk.keys() == sit.keys() and all(torch.equal(v, sit[k]) for k, v in trunk.items()), arm


@pytest.fixture
def few(monkeypatch):
    """convergence.py's smallest budget: 200 drawn shapes of 16 px, two legs of two steps."""
    for module in (convergence, jobs):
        monkeypatch.setattr(module, "Shapes", lambda size, count: Shapes(size, 200))
    monkeypatch.setattr(jobs, "ImageSet", ImageSet)  # which convergence.py replaces
    monkeypatch.setattr(train, "plot", lambda out: None)  # the curves of each run, half a second, which nobody reads
    flags = "--image-size 16 --model SiT-S/4 --hidden-size 32 --depth 2 --num-heads 2 --batch-size 8 --steps 4"
    budget = dict(flags=f"{flags} --encoder-depth 1 --log-every 2 --precision fp32", points=2, images=12, learn=3)
    monkeypatch.setitem(convergence.BUDGETS, "laptop", dict(budget, sampling="--sampler heun --steps 2"))


def test_the_papers_budget_is_its_protocol_and_the_others_are_ours(tmp_path, monkeypatch):
    asked = []

    def call(module, flags, processes):
        asked.append(flags)
        np.savez(flags[flags.index("--npz") + 1], arr_0=np.zeros((2, 2, 2, 3), np.uint8))

    monkeypatch.setattr(convergence, "call", call)
    for budget, warms_up, labels in (
        ("paper", False, "random"),
        ("short", True, "balanced"),
        ("laptop", True, "balanced"),
        ("gpu", True, "balanced"),
    ):
        args, (run, _) = convergence.prepare(["--data", "data", "--budget", budget])
        assert run.ema_warmup == warms_up
        (tmp_path / budget).mkdir()
        convergence.measure(args, tmp_path / budget, 1, {"FID": lambda batches: 0.0})
        assert asked[-1][asked[-1].index("--labels") + 1] == labels
    args, (run, _) = convergence.prepare(["--data", "data", "--budget", "paper"])
    assert (run.ema, run.batch_size, run.steps, run.lr, run.lr_schedule) == (0.9999, 256, 400_000, 1e-4, "constant")
    assert {*"--num 50000 --sampler sde --steps 250".split()} <= {*asked[0]} and "--cfg" not in asked[0]


def test_a_reference_with_images_counts_by_its_stored_statistics(tmp_path, monkeypatch):
    rng, against = np.random.RandomState(0), []
    stored = dict(mu=rng.standard_normal(2048), sigma=rng.standard_normal((2048, 2048)))
    images = rng.randint(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=images, **stored)  # as ADM's
    np.savez(tmp_path / "images.npz", arr_0=images)
    (tmp_path / "broken.npz").write_text("no zip")
    monkeypatch.setattr(fid, "load_inception", lambda *_: (lambda x: (x.float().mean((2, 3)),), "digest"))
    monkeypatch.setattr(fid, "frechet_distance", lambda *args: against.append(args) or 0.0)

    def meters(name):
        flags = ["--data", "data", "--budget", "paper", "--inception", "weights", "--reference", str(tmp_path / name)]
        return convergence.meters(convergence.prepare(flags)[0], Shapes(16, 60), torch.device("cpu"))

    distances, facts = meters("VIRTUAL.npz")
    distances["FID"]([torch.zeros(2, 3, 16, 16)])
    assert [*facts["of_real"]] == ["FID"] and len(against) == 2  # of real images, and of samples
    for _, _, mu, sigma in against:
        assert np.array_equal(mu, stored["mu"]) and np.array_equal(sigma, stored["sigma"])
    np.savez(tmp_path / "other.npz", inception="another", **stored)
    for name, message in (
        ("images.npz", "has no mu and sigma"),
        ("broken.npz", "broken.npz cannot be used"),
        ("other.npz", "made with other Inception weights"),
    ):
        with pytest.raises(ValueError, match=message):
            meters(name)


def test_a_comparison_that_was_stopped_goes_on(few, tmp_path, monkeypatch):
    def compare(out, *flags):
        convergence.main(["--out", str(tmp_path / out), "--device", "cpu", "--seeds", "0", *flags])
        return json.loads((tmp_path / out / "results.json").read_text())

    straight = compare("straight", "--arms", "sit", "irepa")
    assert [run["arm"] for run in straight["runs"]] == ["sit", "irepa"]
    for one in straight["runs"]:
        assert [*one["held_out"]] == [*one["distance"]["FD-classifier"]] == ["2", "4"]
    assert 0 <= straight["distance"]["accuracy"] <= 1
    text = (tmp_path / "straight/table.md").read_text()
    gap = straight["runs"][1]["held_out"]["4"] - straight["runs"][0]["held_out"]["4"]
    assert gap != 0  # the arms are not one
    assert f"| irepa | 1 | {straight['runs'][1]['held_out']['4']:.4f} | {gap:.4f} |" in text
    assert Image.open(tmp_path / "straight/curves.png").width > 1000
    assert Image.open(tmp_path / "straight/samples.png").height == 2 * (16 * 6 + 4)  # a row an arm

    monkeypatch.setattr(convergence_report, "plot", lambda *args: None)  # seen above, and slow
    compare("stopped", "--arms", "sit")
    whole, calls = convergence.measure, []

    def stop(args, folder, step, distance):
        calls.append((folder.name, step))
        if step == 4:
            raise KeyboardInterrupt  # trained, not yet measured
        return whole(args, folder, step, distance)

    monkeypatch.setattr(convergence, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        compare("stopped", "--arms", "sit", "irepa")
    assert calls == [("irepa-seed0", 2), ("irepa-seed0", 4)]
    monkeypatch.setattr(convergence, "measure", whole)
    resumed = compare("stopped", "--arms", "sit", "irepa")
    for a, b in zip(straight["runs"], resumed["runs"]):
        assert {**a, "images_per_s": 0} == {**b, "images_per_s": 0}
    with pytest.raises(SystemExit) as exit:  # another comparison
        compare("stopped", "--arms", "sit", "--", "--lr", "1e-3")
    assert exit.value.code == 2
    shutil.rmtree(tmp_path / "stopped/irepa-seed0")  # what is in results.json is not made again
    assert compare("stopped", "--arms", "sit", "irepa")["runs"] == resumed["runs"]
    assert not (tmp_path / "stopped/irepa-seed0").exists()

    file = tmp_path / "stopped/results.json"  # a run whose folder went between its legs is made again, and measured on
    found = json.loads(file.read_text())
    del found["runs"][1]["distance"]["FD-classifier"]["4"], found["runs"][1]["held_out"]["4"]
    found["runs"][1]["distance"]["FD-classifier"]["2"] = 77.0
    file.write_text(json.dumps(found))
    again = compare("stopped", "--arms", "sit", "irepa")["runs"][1]["distance"]["FD-classifier"]
    assert again == {"2": 77.0, "4": resumed["runs"][1]["distance"]["FD-classifier"]["4"]}
    assert compare("stopped", "--arms", "sit", "irepa")["runs"][1]["distance"]["FD-classifier"] == again
    file.unlink()
    (tmp_path / "stopped/irepa-seed0/distance.jsonl").unlink()
    with pytest.raises(SystemExit, match="is at step 4, and was not measured at 2: delete it"):
        compare("stopped", "--arms", "sit", "irepa")


def test_the_distance_of_equal_sets_is_zero(few, tmp_path):
    args, _ = convergence.prepare(["--out", str(tmp_path), "--also", "hog"])
    data = convergence.Shapes(16, 10_000)
    distances, _ = convergence.meters(args, data, torch.device("cpu"))
    training, held = train.split(len(data))
    distance, also = distances["FD-classifier"], distances["FD-hog"]
    assert also([data[training][0]]) == pytest.approx(0, abs=1e-6) and also([data[held.flatten()][0]]) > 0
    kept = sorted(tmp_path.glob("reference-*.npz"))
    np.savez(kept[0], mu=np.zeros(1), sigma=np.zeros((1, 1)))
    with pytest.raises(ValueError):  # read again, not made again
        convergence.meters(args, data, torch.device("cpu"))
    assert len(kept) == 2
    assert distance([data[training][0]]) == pytest.approx(0, abs=1e-6)
    assert distance([data[training[:50]][0], data[training[50:]][0]]) == pytest.approx(0, abs=1e-6)
    assert distance([255 - data[training][0]]) > 1.5 * distance([data[held.flatten()][0]]) > 0
    seen, unseen = learned.parts_of(data)
    assert sorted([*seen, *unseen, *held.flatten()]) == list(range(200))
    first = learned.parts_of(range(50_000))[1][:500]  # files lie class by class: the first must not be of one class
    assert len(np.unique(first // 5000)) == 10


def test_each_image_is_shifted_by_its_own_place():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    moved = learned.shifted(images, torch.tensor([[2, 0, 4], [2, 2, 3]]))
    assert moved.shape == images.shape and torch.equal(moved[0], images[0].float())
    assert torch.equal(moved[1, :, 2:], images[1, :, :-2].float())  # down by two, over the mirrored edge
    assert torch.equal(moved[1, :, 0], images[1, :, 2].float())
    assert torch.equal(moved[2, :, :30, :31], images[2, :, 2:, 1:].float())


def test_a_teacher_is_learned_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "fast_bf16", lambda device: False)
    monkeypatch.setattr(learned, "fast_bf16", lambda device: False)
    data, file = Shapes(16, 60), tmp_path / "new/vit.pt"
    accuracy = learned.learn_teacher("timm:test_vit", file, data, 2, 4, torch.device("cpu"))
    assert 0 <= accuracy <= 1
    teacher = load_encoder("timm:test_vit", 4, file)
    saved, random = read_weights(file), load_encoder("timm:test_vit", 4, "random")
    assert all(torch.equal(v, saved[k]) for k, v in teacher.model.state_dict().items())
    images = data[np.arange(2)][0]
    assert teacher(images).shape == (2, 16, 64) and not torch.allclose(teacher(images), random(images))
    assert learned.learn_teacher("timm:test_vit", file, data, 2, 4, torch.device("cpu")) == accuracy
    with pytest.raises(ValueError, match="is not timm:test_vit after 3 steps on these classes"):
        learned.learn_teacher("timm:test_vit", file, data, 3, 4, torch.device("cpu"))
    assert not learned.learns("timm:resnet18") and not learned.learns("hog")


def test_speedups_and_intervals_of_known_curves():
    sit = {100: 16.0, 200: 8.0, 400: 4.0}
    speedup = convergence_report.speedup
    assert speedup({100: 8.0, 200: 2.0, 400: 1.0}, sit) == pytest.approx(400 / 150)  # 4 lies half way from 8 to 2
    assert speedup({100: 4.0, 200: 2.0, 400: 1.0}, sit) == 4 and speedup(sit, sit) == 1
    assert speedup({100: 9.0, 200: 9.0, 400: 9.0}, sit) is None
    early = {100: 10.0, 200: 4.0, 300: 3.0, 400: 5.0}  # it has been where it ends before
    assert speedup(early, early) == 1
    assert convergence_report.against({0: {100: 8.0, 400: 1.0}, 9: {100: 1.0}}, {0: sit}) == {0: {100: -8, 400: -3}}

    values = np.random.default_rng(0).normal(3, 2, (1000, 4))
    held = [low < 3 < high for low, high in map(convergence_report.interval, values)]
    assert 0.93 < np.mean(held) < 0.97 and convergence_report.interval([0, 1]) is None
    assert convergence_report.interval([1, 2, 3, 4]) == pytest.approx((2.5 - 2.0542, 2.5 + 2.0542), abs=1e-3)


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--data nowhere", "nowhere does not exist"),
        ("--encoder nothing", "unknown encoder 'nothing'"),
        ("--reference stats.npz", "goes with --inception"),
        ("--learn-teacher 15", "--encoder-weights: name it"),
        ("--learn-teacher 15 --encoder-weights nowhere", "hog does not learn"),
        ("--learn-teacher 5 --encoder-weights nowhere", "--learn-teacher, at least 10"),
        ("--images 1", "--images is at least 2"),
        ("-- --out elsewhere", "--out after --"),
        ("-- --lr-schedule cosine", "need --lr-schedule constant"),
        ("-- --steps 1", "need --lr-schedule constant, and as many --steps"),
        ("-- --lr", "expected one argument"),
        ("-- --gamma 0.3", "--gamma after --"),
        ("-- --init here", "--init after --"),
        ("--seeds -1", "--seeds are 0 or more"),
        ("--sweep -- --depth 1", "--encoder-depth 3 is not in 1..1"),
        ("-- --patch 3", "unrecognized arguments"),
    ],
)
def test_a_mistake_in_a_comparison_is_one_sentence(few, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        convergence.main(["--out", str(tmp_path / "out"), "--device", "cpu", *flags.split()])
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
