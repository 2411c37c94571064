"""Checkpoints: files of others load strictly and mean what they meant, bad ones are named errors, none runs code."""

import argparse
import json
import os
import pickle
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sample
from inputs.latents import load_vae
from irepa import Config, Sampling, SiT
from plumbing.checkpoints import load_checkpoint, read_checkpoint
from plumbing.records import to_uint8
from test_irepa import TINY, drawn, fill, normal, strong
from tests.common import HERE, RUN, refused, rows_of, run, run_sample, same_weights, weights
from tests.processes import call
from variants import meanflow, repa_e

WIDE = {**TINY, "hidden_size": 384, "num_heads": 6, "encoder_depth": 3}  # a width whose number of heads is known
BATCH = normal(0, 3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 10, 7])  # x, t, y


def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def released(kind, path, legacy=False, **extra):
    """A file as REPA or iREPA publish it -> its weights under our names."""
    model = fill(SiT(Config(**WIDE, projector=kind)))
    state = under("module._orig_mod.", model.state_dict())
    if kind == "mlp":  # REPA's own name of it
        state = {k.replace("projection_layer.", ""): v for k, v in state.items()}
    if legacy:
        state = {k.replace("blocks.3.", "decoder_blocks.0."): v for k, v in state.items()}
    args = argparse.Namespace(encoder_depth=3, path_type="linear", lr=1e-4)
    torch.save(dict(model=state, ema=state, opt={}, args=args, steps=7, **extra), path)
    return model.state_dict()


@pytest.mark.parametrize(
    "kind,legacy", [("mlp", False), ("mlp", True), ("conv", False), ("linear", False), (None, False)]
)
def test_released_checkpoints_load_strictly(tmp_path, kind, legacy):
    state = released(kind, tmp_path / "0400000.pt", legacy)
    model, config = load_checkpoint(tmp_path / "0400000.pt")
    assert (config.projector, config.encoder_depth if kind else 3, config.num_heads) == (kind, 3, 6)
    assert (config.input_size, config.num_classes, config.qk_norm) == (8, 10, False)
    assert same_weights(model.state_dict(), state)


def test_bad_checkpoints_are_named_errors(tmp_path):
    state = released("conv", tmp_path / "good.pt")

    def refused(data, message):
        torch.save(data, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "bad.pt")

    lacking = {k: v for k, v in state.items() if k != "blocks.2.mlp.fc1.bias"}
    refused(dict(ema=lacking), "missing blocks.2.mlp.fc1.bias")
    refused(dict(ema={**state, "extra.weight": torch.ones(1)}), "surplus extra.weight")
    refused(dict(ema={**state, "blocks.0.attn.proj.bias": torch.ones(3)}), r"attn.proj.bias is \[3\]")
    refused(dict(model=state), "no ema weights")
    refused([1, 2], "holds a list")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:50_000])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for name in ("cut.pt", "text.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    refused(dict(ema=state, config=dict(asdict(Config(**TINY)), num_heads=0)), "num_heads must be positive")
    huge = dict(asdict(Config(**TINY)), input_size=2**80)
    refused(dict(ema=state, config=huge), "no config fits its tensors")
    odd = {**state, "projectors.1.projection_layer.weight": torch.ones(3)}
    refused(dict(ema=odd), "surplus projectors.1")
    assert load_checkpoint(tmp_path / "bad.pt", projector=None, path="cosine")[1].path == "cosine"
    torch.save(dict(ema=state), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pt")[1].projector == "conv"
    without = {k: v for k, v in state.items() if "projector" not in k}  # files for evaluation only
    torch.save(dict(ema=without), tmp_path / "eval.pt")
    assert load_checkpoint(tmp_path / "eval.pt")[1].projector is None
    torch.save(dict(ema=without, config=asdict(load_checkpoint(tmp_path / "good.pt")[1])), tmp_path / "ours.pt")
    assert load_checkpoint(tmp_path / "ours.pt")[1].projector is None


@pytest.mark.parametrize("method", ["irepa", "repa_e"])
def test_an_exported_average_is_what_samples_and_starts_a_run(tmp_path, method, capsys):
    own = ["--lpips", "none"] if method == "repa_e" else []
    size = {"irepa": 16, "repa_e": 32}[method]  # the discriminator's least is 24
    flags = [*RUN, "--demo", "--method", method, *own, "--image-size", size, "--sample-every", 0]
    run(*flags, "--ckpt-every", 100, "--keep", 0, "--out", tmp_path / "run")
    file, last = tmp_path / "small.safetensors", tmp_path / "run/last.pt"
    run_sample("--ckpt", last, "--export", file)
    assert not {"out", "data"} & read_checkpoint(file)["settings"].keys()  # nobody else's business
    assert file.stat().st_size < last.stat().st_size / 2.9
    for name, ckpt in (("a", last), ("b", file)):
        run_sample("--ckpt", ckpt, "--steps", 2, "--num", 2, "--labels", "circle", "--npz", tmp_path / f"{name}.npz")
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab"))
    a, b = (load_checkpoint(path) for path in (last, file))
    assert a[1] == b[1] and same_weights(a[0].state_dict(), b[0].state_dict())
    run(*flags, "--init", file, "--steps", 1, "--lr", 1e-12, "--ema", 0, "--no-ema-warmup", "--out", tmp_path / "next")
    for name, value in a[0].named_parameters():  # statistics move without a learning rate
        torch.testing.assert_close(weights(tmp_path / "next", "ema")[name], value)
    for target, message in ((file, "exists and is left as it is"), ("small.pt", "must end in .safetensors")):
        assert message in refused(capsys, run_sample, "--ckpt", last, "--export", target)
    assert "only averages: leave --no-ema out" in refused(capsys, run_sample, "--ckpt", file, "--no-ema")


# ---- Which weights ----


def three():
    """State dicts of one network, of tensors of another value each: live, first average, second average."""
    state = SiT(Config(**WIDE, projector=None)).state_dict()
    return [{k: torch.full_like(v, value) for k, v in state.items()} for value in (1.0, 2.0, 3.0)]


@pytest.mark.parametrize(
    "kind,takes",
    [
        ("two averages, as JiT's", {True: 2, 2: 3, False: 1}),
        ("one average", {True: 2, False: 1, 2: "no second ema weights; --ema 1 takes the one that there is"}),
        ("no average", {False: 1, True: "no ema weights; --no-ema takes the live ones", 2: "--no-ema takes"}),
        ("an average only", {True: 2, False: "only averages: leave --no-ema out"}),
        ("Lightning with an average", {True: 2, False: 1}),
        ("Lightning", {True: 1, False: 1, 2: "no second ema weights"}),
        ("compiled blocks", {True: 1, False: 1}),
        ("AveragedModel", {True: 2, False: 1}),
        ("safetensors, as accelerate's", {True: 1, False: 1}),
        ("two networks", {False: "2 networks: a., b."}),
        ("another network", {True: "no network that is known here"}),
    ],
)
def test_weights_are_found_whatever_holds_them(tmp_path, kind, takes):
    live, first, second = three()
    file = {
        "two averages, as JiT's": dict(
            model=under("net.", live), model_ema1=under("net.", first), model_ema2=under("net.", second), epoch=3
        ),
        "one average": dict(model=under("module.", live), ema=first, opt=dict(state={0: {}}), steps=3),
        "no average": dict(model=live),
        "an average only": dict(ema=first),
        "Lightning with an average": dict(
            state_dict={**under("ema_model.", first), **under("model.", live), "vae.encoder.weight": torch.ones(3)},
            global_step=3,
        ),
        "Lightning": dict(state_dict=under("model._orig_mod.", live)),
        "compiled blocks": {k.replace(".attn.", "._orig_mod.attn."): v for k, v in live.items()},
        "AveragedModel": dict(ema={"n_averaged": torch.tensor(3), **under("module.", first)}, model=live),
        "safetensors, as accelerate's": under("model.", live),
        "two networks": {**under("a.", live), **under("b.", first)},
        "another network": dict(ema={"conv.weight": torch.ones(3)}),
    }[kind]
    path = tmp_path / ("m.safetensors" if "safetensors" in kind else "m.pt")
    (save_file if "safetensors" in kind else torch.save)(file, path)
    for ema, expected in takes.items():
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                load_checkpoint(path, ema=ema)
        else:
            assert same_weights(load_checkpoint(path, ema=ema)[0].state_dict(), (live, first, second)[expected - 1])


def test_the_flag_for_an_average(tmp_path, capsys):
    states = [fill(SiT(Config(**{**WIDE, "in_channels": 3, "projector": None})), strong).state_dict()]
    states += [{k: v * scale for k, v in states[0].items()} for scale in (1.1, 1.2)]
    torch.save(dict(zip(("model", "model_ema1", "model_ema2"), states)), tmp_path / "m.pth")
    flags, wanted = ["--ckpt", tmp_path / "m.pth", "--sampler", "euler", "--steps", 2, "--num", 2], {}
    given = {"": 1, "--ema": 1, "--ema 1": 1, "--ema 2": 2, "--no-ema": 0, "--ema 2 --no-ema": 0, "--no-ema --ema": 1}
    for i, (ema, which) in enumerate(given.items()):
        run_sample(*flags, "--npz", tmp_path / f"{i}.npz", *ema.split())
        pixels = np.load(tmp_path / f"{i}.npz")["arr_0"]
        assert np.array_equal(wanted.setdefault(which, pixels), pixels), ema
        assert json.loads((tmp_path / f"{i}.json").read_text())["ema"] == which
    assert not np.array_equal(wanted[0], wanted[1]) and not np.array_equal(wanted[1], wanted[2])
    flags += ["--npz", tmp_path / "x.npz"]
    assert "no ema weights number 3: --ema is 1 or 2" in refused(capsys, run_sample, *flags, "--ema", 3)


# ---- What the weights mean ----


def doubled(state, channels=4):
    """A state dict as SiT's and DiT's own code has it: behind each pixel's channels as many more."""
    out = dict(state)
    for kind in ("weight", "bias"):
        half = state[f"final_layer.linear.{kind}"].unflatten(0, (-1, channels))
        more = torch.from_numpy(drawn(kind, half.shape)).float()
        out[f"final_layer.linear.{kind}"] = torch.cat([half, more], dim=1).flatten(0, 1)
    return out


@pytest.mark.parametrize("path,ours", [(None, "linear"), ("Linear", "linear"), ("GVP", "cosine")])
@pytest.mark.parametrize("twice", [True, False])
def test_sits_own_weights_are_turned(tmp_path, path, ours, twice):
    theirs = fill(SiT(Config(**WIDE, projector=None)), strong)
    state = doubled(theirs.state_dict()) if twice else theirs.state_dict()
    args = argparse.Namespace(path_type=path, prediction="velocity", model="SiT-S/2")
    torch.save(state if path is None else dict(model={}, ema=state, opt={}, args=args), tmp_path / "sit.pt")
    model, config = load_checkpoint(tmp_path / "sit.pt", released=None if path else "sit")
    x, t, y = BATCH
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y)[0], -theirs(x, 1 - t, y)[0], rtol=1e-5, atol=2e-5)
    assert (config.path, config.in_channels, config.num_heads) == (ours, 4, 6)


def test_what_is_no_velocity_of_sit_is_refused_in_words(tmp_path, capsys):
    state = doubled(fill(SiT(Config(**WIDE, projector=None))).state_dict())
    args = argparse.Namespace(path_type="Linear", prediction="velocity")
    for entries, flags, message in (
        ({}, "", "cannot be told apart: say --released sit if it is SiT's"),
        (dict(args=argparse.Namespace(model="DiT-XL/2")), "", "say --released sit if it is SiT's"),  # DiT's train.py
        ({}, "--released dit", "DiT predicts the noise of DDPM's 1,000 steps, not a velocity"),
        ({}, "--released repa", "--released is sit or dit, not repa"),
        (dict(args=argparse.Namespace(path_type="VP", prediction="velocity")), "", "velocity on the path VP"),
        (
            dict(args=argparse.Namespace(path_type="GVP", prediction="noise")),
            "",
            "predicts SiT's noise on the path GVP",
        ),
        (dict(args=args, config=asdict(Config())), "--released sit", "it is train.py's own: leave --released sit out"),
        (dict(args=argparse.Namespace(path_type="linear")), "--released sit", "leave --released sit out"),
    ):
        torch.save(dict(ema=state, **entries) if entries else state, tmp_path / "x.pt")
        assert message in refused(capsys, run_sample, "--ckpt", tmp_path / "x.pt", *flags.split())


def latents_of(flags, folder):
    """-> the images of sample.py and the labels, [n, H, W, 3] and [n], and the JSON beside them."""
    run_sample(*flags, "--steps", 2, "--num", 3, "--npz", folder / "s.npz")
    made = np.load(folder / "s.npz")
    return made["arr_0"], torch.from_numpy(made["labels"]), json.loads((folder / "s.json").read_text())


def decoded(vae, z):
    with torch.no_grad():
        return to_uint8(load_vae(str(vae)).vae.decode(z).sample).permute(0, 2, 3, 1).numpy()


def test_meanflows_pytorch_files(tmp_path, vae):
    theirs = fill(meanflow.MeanFlow(meanflow.Config(**WIDE, projector=None)), strong)
    state = theirs.state_dict()
    args = argparse.Namespace(cfg_omega=0.2, cfg_kappa=0.92, cfg_min_t=0.0, cfg_max_t=0.8, path_type="linear")
    torch.save(dict(model=state, ema=state, opt={}, args=args, steps=3), tmp_path / "mf.pt")
    model, config = load_checkpoint(tmp_path / "mf.pt")
    assert (config.omega, config.kappa, config.guidance_interval, config.num_heads) == (0.2, 0.92, (0.0, 0.8), 6)
    plain = SiT(Config(**WIDE, projector=None)).eval()
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("r_embedder.")})
    (x, t, y), r, embed = BATCH, torch.tensor([0.1, 0.2, 0.0]), plain.t_embedder.forward
    plain.t_embedder.forward = lambda t: embed(t) + theirs.r_embedder(t - r)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y, r)[0], plain(x, t, y)[0], rtol=1e-5, atol=2e-5)
    images, labels, record = latents_of(["--ckpt", tmp_path / "mf.pt", "--vae", vae], tmp_path)
    assert record["latent"]["scale"] == [0.18125] * 4  # of that code, not the VAE's 0.18215
    z = sample.generate(model, labels, range(3), solve=meanflow.solve, how=meanflow.Sampling(2))
    assert np.abs(images.astype(int) - decoded(vae, z / 0.18125)).max() <= 1
    old = {k: v for k, v in state.items() if not k.startswith("r_embedder.")}
    torch.save(dict(ema=old, args=argparse.Namespace(ratio_r_not_equal_t=0.25)), tmp_path / "old.pt")
    with pytest.raises(ValueError, match="before r_embedder"):
        load_checkpoint(tmp_path / "old.pt")


def test_repa_es_files_take_their_statistics_from_bn_and_the_vae_from_another(tmp_path, vae, capsys):
    theirs = fill(SiT(Config(**WIDE, projector="mlp")), strong)
    mean, var = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([4.0, 0.3, 1.0, 9.0])
    bn = {"bn.running_mean": mean, "bn.running_var": var, "bn.num_batches_tracked": torch.tensor(400_000)}
    state = {k.replace("projection_layer.", ""): v for k, v in theirs.state_dict().items()}
    args = argparse.Namespace(encoder_depth=3, path_type="linear", vae="f8d4")
    torch.save(dict(model=state, ema={**state, **bn}, vae={}, args=args, steps=3), tmp_path / "0400000.pt")
    model, config = load_checkpoint(tmp_path / "0400000.pt")
    assert isinstance(model, repa_e.SiT) and (config.projector, config.encoder_depth) == ("mlp", 3)
    assert model.bn.num_batches_tracked == 400_000
    with torch.no_grad():
        assert torch.equal(model(*BATCH)[0], theirs(*BATCH)[0])
    flags = ["--ckpt", tmp_path / "0400000.pt", "--sampler", "euler"]
    images, labels, record = latents_of([*flags, "--vae", vae], tmp_path)
    z = sample.generate(model, labels, range(3), how=Sampling("euler", 2))
    z = z * (var + 1e-4).sqrt().view(4, 1, 1) + mean.view(4, 1, 1)
    assert np.abs(images.astype(int) - decoded(vae, z)).max() <= 1
    assert record["latent"]["bias"] == mean.tolist()
    flags += ["--num", 2, "--npz", tmp_path / "x.npz"]
    for more, message in (
        ([], "holds no VAE: name the one it was trained with after --vae"),
        (["--vae", "none"], "leave --vae none and --latent-scale out"),
        (["--vae", vae, "--latent-scale", "x"], "leave --vae none and --latent-scale out"),
    ):
        assert message in refused(capsys, run_sample, *flags, *more)


# ---- Ours, later: settings that have gone, and weights to start from ----

STILL = [
    *RUN,
    *"--sample-every 0 --steps 1 --lr 1e-12 --no-ema-warmup".split(),
]  # a run whose weights stay where they start


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The folder of a run on two classes, whose average is not its live weights."""
    out = tmp_path_factory.mktemp("ours") / "run"
    run(*RUN, "--data", photos, "--sample-every", 0, "--ema", 0.5, "--out", out)
    return out


def test_settings_that_have_gone(trained, photos, tmp_path, capsys):
    whole = torch.load(trained / "last.pt", weights_only=True)

    def older(out, settings, config):
        (tmp_path / out).mkdir()
        file = dict(whole, settings={**whole["settings"], **settings}, config={**whole["config"], **config})
        torch.save(file, tmp_path / out / "last.pt")
        return tmp_path / out

    out = older("gone", dict(old_knob=3, old_flag=False, old_name=None), dict(old_field=0.5))
    resume = "--resume", "--steps", 5, "--out"
    error = refused(capsys, run, *resume, out)
    assert f"{out} was started with old_knob 3, old_field 0.5, of which this version knows nothing" in error
    assert f"--init {out}/last.pt" in error and "old_flag" not in error
    run_sample("--ckpt", out / "last.pt", "--steps", 2, "--num", 2, "--npz", tmp_path / "s.npz")
    assert f"{out}/last.pt was trained with old_field 0.5, which this version does not know" in capsys.readouterr().out
    model = load_checkpoint(out / "last.pt")[0]
    assert same_weights(model.state_dict(), whole["ema"])
    run(*resume, older("off", dict(old_flag=False, old_name=None), dict(old_field=None)))
    assert rows_of(tmp_path / "off")[-1]["step"] == 5
    (tmp_path / "new").mkdir()  # stopped before its first checkpoint
    record = json.loads((trained / "config.json").read_text())
    (tmp_path / "new/config.json").write_text(json.dumps(dict(record, old_knob=3)))
    assert "started with old_knob 3" in refused(capsys, run, *resume, tmp_path / "new")
    shutil.copy(trained / "config.json", tmp_path / "new")
    run("--resume", "--out", tmp_path / "new", "--steps", 1)


def same_but(states, other, *anew):
    """Whether state dicts have the tensors of another, to a step of 1e-12, but for the parts that begin anew."""
    kept = {k: v for k, v in other.items() if not k.startswith(anew) and "bn." not in k}
    return all(torch.allclose(state[k], v, rtol=0, atol=1e-9) for state in states for k, v in kept.items())


def test_a_run_starts_from_our_weights_on_other_data(trained, photos, tmp_path, capsys):
    was, init = weights(trained, "ema"), ["--init", trained / "last.pt"]
    assert not same_but([was], weights(trained))  # the live ones are others
    for name, flags, anew in (
        ("same", ["--data", photos], []),
        ("shapes", ["--demo"], ["the label table"]),
        ("repa", ["--demo", "--method", "repa"], ["the label table", "the projector"]),
        ("sit", ["--data", photos, "--method", "sit"], []),
    ):
        capsys.readouterr()
        run(*STILL, *flags, *init, "--out", tmp_path / name)
        said = f"starts from the weights of {trained}/last.pt, step 4" + (f"; anew: {', '.join(anew)}" if anew else "")
        assert said in capsys.readouterr().out.splitlines()
        parts = [part for part in ("y_embedder.", "projectors.") if name in ("shapes", "repa", "sit")[part[0] == "p" :]]
        states = [weights(tmp_path / name, which) for which in ("model", "ema")]
        assert same_but(states, was, *parts) and same_but(states[:1], states[1])
    table = "y_embedder.embedding_table.weight"
    assert weights(tmp_path / "repa")[table].shape == (11, 32) and was[table].shape == (3, 32)
    run("--resume", "--out", tmp_path / "shapes", "--steps", 2)  # goes on from its own weights
    assert json.loads((tmp_path / "shapes/config-from-step-1.json").read_text())["init"] == str(trained / "last.pt")
    for flags, message in (
        (["--resume", "--out", tmp_path / "shapes", *init], "leave one of them out"),
        ([*STILL, "--data", photos, *init, "--depth", 3], "does not fit the model: missing blocks.2."),
        ([*STILL, "--data", photos, *init, "--num-heads", 4], "last.pt has num_heads 2, not 4"),
        ([*STILL, "--data", photos, *init, "--path", "cosine"], "last.pt has path linear, not cosine"),
        ([*STILL, "--data", photos, *init, "--released", "sit"], "train.py's own: leave --released sit out"),
        ([*STILL, "--data", photos, "--released", "sit"], "--released says whose file --init is"),
        ([*STILL, "--data", photos, "--init", "nowhere.pt"], "nowhere.pt: there is no such checkpoint"),
    ):
        flags = [*flags] if "--resume" in flags else [*flags, "--out", tmp_path / "x"]
        assert message in refused(capsys, run, *flags)
    assert not (tmp_path / "x").exists()


def test_a_run_starts_from_sits_own_weights_on_two_processes_as_on_one(photos, tmp_path, capsys):
    config = Config(
        input_size=16, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=7, projector=None
    )
    theirs = fill(SiT(config), strong)
    torch.save(doubled(theirs.state_dict(), channels=3), tmp_path / "sit.pt")
    flags = ["--data", photos, "--init", tmp_path / "sit.pt", "--out", tmp_path / "still"]
    assert "say --released sit if it is SiT's" in refused(capsys, run, *STILL, *flags)
    run(*STILL, *flags, "--released", "sit")
    assert "step unknown; anew: the label table, the projector" in capsys.readouterr().out
    model = load_checkpoint(tmp_path / "still/last.pt")[0]
    x, t, y = normal(0, 3, 3, 16, 16), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        theirs.y_embedder.embedding_table.weight[:3] = model.y_embedder.embedding_table.weight  # which started anew
        torch.testing.assert_close(model(x, t, y)[0], -theirs(x, 1 - t, y)[0], rtol=1e-4, atol=1e-4)
    flags = [*RUN, *flags[:-1], tmp_path / "one", "--released", "sit", "--sample-every", 0]
    run(*flags)
    flags[flags.index(tmp_path / "one")] = tmp_path / "two"
    codes, said = call(HERE, tmp_path, "train", *flags, world=2)
    assert codes == [0, 0] and said.count("starts from the weights") == 1, said
    for a, b in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["held_out"] == pytest.approx(
            b["held_out"], rel=1e-4
        )


@pytest.mark.parametrize(
    "method,flags",
    [
        ("jit", "--model JiT-S/4"),
        ("meanflow", ""),
        ("repa_e", "--image-size 32 --model SiT-S/2 --vae tiny --lpips none --disc-width 4"),
    ],
)
def test_any_method_starts_from_its_own_weights(photos, tmp_path, method, flags):
    flags = ["--method", method, *flags.split()]
    run(*RUN, *flags, "--data", photos, "--sample-every", 0, "--ema", 0.5, "--steps", 3, "--out", tmp_path / "first")
    run(*STILL, *flags, "--demo", "--init", tmp_path / "first/last.pt", "--out", tmp_path / "second")
    states = [weights(tmp_path / "second", which) for which in ("model", "ema")]
    assert same_but(states, weights(tmp_path / "first", "ema"), "y_embedder.")
    if method == "repa_e":  # with the VAE that was trained along
        assert same_but([weights(tmp_path / "second", "vae")], weights(tmp_path / "first", "vae"))
        statistics = [weights(tmp_path / name, "ema")["bn.running_mean"] for name in ("first", "second")]
        torch.testing.assert_close(*statistics, rtol=1e-3, atol=1e-3)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("save", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data))])
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save(dict(ema=Evil()), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()
