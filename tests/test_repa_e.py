"""REPA-E: which network learns from what, the losses by their formulas, and runs of three networks at once."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import irepa
import sample
import train
from inputs.vae import load_vae, per_channel
from irepa import Sampling, alignment_loss, interpolate, spatial_norm
from plumbing.checkpoints import load_checkpoint
from plumbing.jobs import open_job
from plumbing.processes import Ranks
from plumbing.records import to_uint8
from test_irepa import TINY, fill, normal, strong
from tests.common import (
    RUN,
    black_and_white,
    refused,
    rows_of,
    run,
    run_sample,
    same_weights,
    save_images,
    settings,
    torchrun,
)
from variants import repa_e

JOINT = [*RUN, *"--method repa_e --image-size 32 --model SiT-S/2 --vae tiny --lpips none --disc-width 4".split()]
TERMS = "loss denoise align l1 lpips kl gan vae_align disc grad_norm grad_norm_vae grad_norm_disc".split()


def latent_normal(model):
    """Statistics for bn that are neither 0 nor 1."""
    model.bn.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    model.bn.running_var.copy_(torch.tensor([4.0, 0.3, 1.0, 9.0]))
    return model


@pytest.fixture
def joint():
    """What a step takes: config, networks, a batch, and vae_loss(coefficient, perceptual) of it."""
    config = repa_e.Config(**TINY)
    model = latent_normal(repa_e.SiT(config))
    model.load_state_dict({**model.state_dict(), **fill(irepa.SiT(config), strong).state_dict()})
    torch.manual_seed(0)
    vae, disc = load_vae("tiny").vae.requires_grad_(True), repa_e.Discriminator(4)
    batch = normal(0, 4, 3, 32, 32).clamp(-1, 1), torch.tensor([1, 2, 3, 4]), normal(1, 4, 16, 24)

    def vae_loss(coeff=1.5, perceptual=None):
        noise, twin = (torch.Generator().manual_seed(i) for i in (5, 6))
        weighed = replace(config, vae_proj_coeff=coeff)
        return repa_e.vae_loss(model, vae, disc, *batch, weighed, perceptual, noise, twin)

    return config, model, vae, disc, batch, vae_loss


# ---- A step ----


def test_which_networks_learn_from_which_loss(joint):
    config, model, vae, disc, (x, y, target), vae_loss = joint
    losses, latent, recon = vae_loss()
    assert latent.shape == (4, 4, 8, 8) and recon.shape == x.shape
    inner = {"encoder", "quant_conv"}
    names = {p: "sit" for p in model.parameters()} | {p: "disc" for p in disc.parameters()}
    names = {p: name for p, name in names.items() if p.requires_grad}
    names |= {p: key.split(".")[0] for key, p in vae.named_parameters()}

    def reached(loss):
        grads = torch.autograd.grad(loss, [*names], retain_graph=True, allow_unused=True)
        return {name for name, grad in zip(names.values(), grads) if grad is not None and grad.any()}

    assert reached(losses["l1"]) == inner | {"decoder", "post_quant_conv"} and reached(losses["kl"]) == inner
    assert reached(losses["gan"]) == inner | {"decoder", "post_quant_conv", "disc"}
    assert reached(losses["vae_align"]) == inner | {"sit"} and reached(repa_e.hinge_loss(disc, x, recon)) == {"disc"}


def test_a_step_sets_the_gradients_of_one_network_at_a_time(joint):
    config, model, vae, disc, (x, y, target), vae_loss = joint
    losses, latent, recon = vae_loss()

    def gradients(net):
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    learn = {net: [p for p in net.parameters() if p.requires_grad] for net in (vae, disc, model)}
    repa_e.set_gradients(losses["loss"], vae)
    assert len(gradients(vae)) == len(learn[vae]) and not gradients(disc) and not gradients(model)
    assert all(p.grad.stride() == p.stride() for p in learn[vae])  # the fused optimiser takes them to be alike
    repa_e.set_gradients(repa_e.hinge_loss(disc, x, recon), disc)
    before = gradients(vae)
    assert len(gradients(disc)) == len(learn[disc]) and not gradients(model)
    sit = repa_e.loss(model.train(), latent.detach(), y, target, config, torch.Generator().manual_seed(6))
    repa_e.set_gradients(sit["loss"], model)
    assert len(gradients(model)) == len(learn[model]) == len([*model.parameters()]) - 1  # not the position table
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(vae)))


def test_alignment_adds_its_share_to_the_encoder_and_nothing_to_the_decoder(joint):
    _, _, vae, _, _, vae_loss = joint
    with_it, without = (torch.autograd.grad(vae_loss(c)[0]["loss"], [*vae.parameters()]) for c in (1.5, 0.0))
    for (name, _), a, b in zip(vae.named_parameters(), with_it, without):
        assert torch.equal(a, b) == name.startswith(("decoder.", "post_quant_conv.")), name
    alone = torch.autograd.grad(vae_loss()[0]["vae_align"], [*vae.encoder.parameters()])
    for g, a, b in zip(alone, with_it, without):
        torch.testing.assert_close(a - b, 1.5 * g, rtol=1e-3, atol=1e-5)


def test_losses_are_their_formulas(joint):
    config, model, vae, disc, (x, y, target), vae_loss = joint
    losses, latent, recon = vae_loss(2.0, lambda a, b: (a - b).square().mean((1, 2, 3), keepdim=True))
    with torch.no_grad():
        found = vae.encode(x).latent_dist
        std = (found.logvar / 2).exp()
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(latent, found.mean + std * noise)
        posteriors = torch.distributions.Normal(found.mean, std)
        kl = torch.distributions.kl_divergence(posteriors, torch.distributions.Normal(0, 1)).sum() / 4
        torch.testing.assert_close(losses["kl"], kl, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(recon, vae.decode(latent).sample)
        g = torch.Generator().manual_seed(6)
        t, eps = torch.rand(4, generator=g), torch.randn(latent.shape, generator=g)
        mean, var = (v.view(4, 1, 1) for v in (model.bn.running_mean, model.bn.running_var))
        w = t.view(4, 1, 1, 1)
        model.eval()
        _, h = model((1 - w) * (latent - mean) / (var + 1e-4).sqrt() + w * eps, t, y)  # no label is dropped
        align = alignment_loss(h, spatial_norm(target, config.gamma))
        torch.testing.assert_close(losses["vae_align"], align, rtol=1e-5, atol=1e-5)
        total = (x - recon).abs().mean() + (x - recon).square().mean() + 1e-6 * kl + 2 * align
        torch.testing.assert_close(losses["loss"], total - 0.1 * disc(recon).mean(), rtol=1e-5, atol=1e-5)
    real, false = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])  # patch by patch
    assert repa_e.hinge_loss(lambda v: v, real, false).item() == pytest.approx(0.5 * (2 / 2 + 1.5 / 2))


def test_bn_starts_from_images_of_all_classes(tmp_path):
    few = black_and_white(tmp_path / "few", 290, 24)  # 256 and more of each are trained on
    job = open_job([*JOINT, "--image-size", "24", "--data", str(few), "--out", str(tmp_path / "run")], None, None)
    indices, _ = train.split(len(job.data))
    bn, other = (repa_e.Learner(job, Ranks(rank, 2), indices).networks["model"].bn for rank in range(2))
    assert torch.equal(bn.running_mean, other.running_mean) and torch.equal(bn.running_var, other.running_var)
    with torch.no_grad():
        colours = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 24, 24)
        black, white = job.latent.vae.encode(colours).latent_dist.mean
    apart, middle = (white - black).mean((1, 2)), (white + black).mean((1, 2)) / 2
    most = apart.abs().argmax()  # the channel that tells them apart; the posterior's noise moves each mean a little
    assert (bn.running_mean - middle)[most].abs() < apart[most].abs() / 10 and apart[most].abs() > 0.05


def test_the_discriminator_is_pix2pixs():
    with torch.device("meta"):
        disc = repa_e.Discriminator()
        assert disc(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert sum(p.numel() for p in disc.parameters()) == 2_765_633 and disc.main[11].out_channels == 1


def test_latents_are_normalised_by_running_and_batch_statistics(joint, monkeypatch):
    config, model, _, _, (_, y, target), vae_loss = joint
    drawn, blocks = [], []
    for module in (repa_e, irepa):
        monkeypatch.setattr(module, "interpolate", lambda *args: drawn.append(args) or interpolate(*args))
    handles = [block.register_forward_hook(lambda *_, i=i: blocks.append(i)) for i, block in enumerate(model.blocks)]
    mean, var = model.bn.running_mean.clone(), model.bn.running_var.clone()
    z = vae_loss()[1].detach()
    assert blocks == [0, 1]  # no block after the alignment's
    assert torch.equal(model.bn.running_mean, mean) and torch.equal(model.bn.running_var, var)
    repa_e.loss(model.train(), z, y, target, config, torch.Generator().manual_seed(6))
    for handle in handles:
        handle.remove()
    per_image = z.transpose(0, 1).flatten(1)  # by channel
    torch.testing.assert_close(model.bn.running_mean, 0.9 * mean + 0.1 * per_image.mean(1))
    torch.testing.assert_close(model.bn.running_var, 0.9 * var + 0.1 * per_image.var(1))
    (first, noise, t, _), (second, *again) = drawn
    assert torch.equal(noise, again[0]) and torch.equal(t, again[1])  # both passes draw the same
    torch.testing.assert_close(first, (z - mean.view(4, 1, 1)) / (var + 1e-4).sqrt().view(4, 1, 1))
    second = second.transpose(0, 1).flatten(1)
    torch.testing.assert_close(second.mean(1), torch.zeros(4), rtol=0, atol=1e-4)
    variance = per_image.var(1, unbiased=False)
    torch.testing.assert_close(second.var(1, unbiased=False), variance / (variance + 1e-4))
    model.eval()
    spec = repa_e.latent_spec(latent_normal(model), dict(channels=4))
    scale, bias = per_channel(spec, z)
    torch.testing.assert_close(model.bn(z) / scale + bias, z)  # what decode() does


def test_lpips_is_torchvisions_vgg_or_an_error(tmp_path, monkeypatch):
    class Package(torch.nn.Module):  # as lpips.LPIPS: VGG's layers in slices, under their numbers
        def __init__(self, **asked):
            super().__init__()
            assert asked == dict(net="vgg", pnet_rand=True, verbose=False)
            slices = {"slice1": {"0": torch.nn.Conv2d(3, 4, 3)}, "slice2": {"5": torch.nn.Conv2d(4, 4, 3)}}
            self.net = torch.nn.ModuleDict({k: torch.nn.ModuleDict(v) for k, v in slices.items()})

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Package))
    state = Package(net="vgg", pnet_rand=True, verbose=False).state_dict()
    state = {k.replace("net.slice1", "features").replace("net.slice2", "features"): v + 1 for k, v in state.items()}
    torch.save({**state, "classifier.0.weight": torch.ones(2)}, tmp_path / "vgg.pth")
    net = repa_e.load_lpips(str(tmp_path / "vgg.pth"), "cpu")
    assert torch.equal(net.net["slice2"]["5"].weight, state["features.5.weight"])
    assert not any(p.requires_grad for p in net.parameters()) and repa_e.load_lpips("none", "cpu") is None
    torch.save({"features.0.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold torchvision's VGG16"):
        repa_e.load_lpips(tmp_path / "other.pth", "cpu")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        repa_e.load_lpips(tmp_path / "vgg.pth", "cpu")


# ---- Runs ----


@pytest.fixture(scope="module")
def stopped(photos, tmp_path_factory):
    """A folder of runs, `straight` of 3 steps and `stopped` after 2 and resumed; what 2 steps left; what was drawn."""
    root, drawn, save_grid = tmp_path_factory.mktemp("repa_e"), {}, train.save_grid
    flags = [*JOINT, "--data", photos, "--ema", 0.5, "--no-ema-warmup", "--warmup", 2, "--sample-every"]
    run(*flags, 0, "--steps", 3, "--out", root / "straight")

    def watched(images, names, path):
        drawn[path.name] = images
        save_grid(images, names, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_grid", watched)
        run(*flags, 2, "--steps", 2, "--out", root / "stopped")
    early = torch.load(root / "stopped/last.pt", weights_only=True)
    run("--resume", "--out", root / "stopped", "--steps", 3, "--sample-every", 0)
    return root, early, drawn


def test_a_resumed_run_is_the_same_run(stopped, capsys):
    root, early, _ = stopped
    a, b = (torch.load(root / name / "last.pt", weights_only=True) for name in ("straight", "stopped"))
    for which in ("model", "ema", "vae", "discriminator"):
        assert same_weights(a[which], b[which])
    for which in ("opt", "opt_vae", "opt_disc"):
        assert len(a[which]["state"]) > 10
        for i, state in a[which]["state"].items():
            assert all(torch.equal(v, b[which]["state"][i][k]) for k, v in state.items())
    assert all((a["vae"][k] != v).any() for k, v in load_vae("tiny").vae.state_dict().items())
    for key in ("bn.running_mean", "bn.running_var"):
        assert (a["ema"][key] != a["model"][key]).all() and (a["ema"][key] - a["model"][key]).abs().max() < 1
    for key, value in b["ema"].items():  # bn's statistics too
        if value.is_floating_point():
            torch.testing.assert_close(value, (early["ema"][key] + b["model"][key]) / 2)
    rows = [rows_of(root / name)[-1] for name in ("straight", "stopped")]
    assert rows[0].keys() >= {*TERMS, "held_out", "step", "lr"} and rows[0]["held_out"] == rows[1]["held_out"]
    error = refused(capsys, run, "--resume", "--out", root / "stopped", "--steps", 4, "--align", "repa")
    assert "was started with" in error  # another network


def test_samples_and_reconstructions_are_drawn(stopped):
    root, _, drawn = stopped
    shapes = {name: images.shape for name, images in drawn.items()}
    samples, held = (16, 3, 32, 32), (2, 3, 32, 32)  # of two classes; of one unseen image, and below it as decoded
    assert shapes == {"step-0000002.png": samples, "reconstructions-0000002.png": held}
    for name in shapes:
        assert (root / "stopped/samples" / name).stat().st_size > 1000


def test_a_checkpoint_is_sampled_with_its_own_vae(stopped, tmp_path, capsys):
    last = stopped[0] / "stopped/last.pt"
    data, flags = torch.load(last, weights_only=True), ["--sampler", "euler", "--steps", 3, "--num", 4]
    for which, more in (("ema", []), ("model", ["--no-ema"])):
        run_sample("--ckpt", last, *flags, *more, "--npz", tmp_path / f"{which}.npz")
        got, (model, _) = np.load(tmp_path / f"{which}.npz"), load_checkpoint(last, ema=which == "ema")
        x = sample.generate(model, torch.from_numpy(got["labels"]), range(4), how=Sampling("euler", 3))
        mean, var = (data[which][f"bn.running_{k}"].view(4, 1, 1) for k in ("mean", "var"))
        vae = load_vae("tiny").vae
        vae.load_state_dict(data["vae"])
        with torch.no_grad():
            images = to_uint8(vae.decode(x * (var + 1e-4).sqrt() + mean).sample).permute(0, 2, 3, 1)
        assert np.abs(got["arr_0"].astype(int) - images.numpy()).max() <= 1
    record = json.loads((tmp_path / "ema.json").read_text())
    assert record["latent"]["bias"] == pytest.approx(data["ema"]["bn.running_mean"].tolist(), rel=1e-6)
    flags += ["--npz", tmp_path / "x.npz"]
    for more, message in ((["--vae", "tiny"], "holds its own VAE"), (["--labels", 9], "classes are 0 to 1")):
        assert message in refused(capsys, run_sample, "--ckpt", last, *flags, *more)
    torch.save({**data, "vae": {}}, tmp_path / "bad.pt")
    assert "the checkpoint's VAE cannot be used" in refused(capsys, run_sample, "--ckpt", tmp_path / "bad.pt", *flags)


def test_two_ranks_equal_one_process(photos, tmp_path):
    # the discriminator alone sees a process's own share: without it nothing but rounding may differ
    flags = [*JOINT, "--data", photos, "--gan-coeff", 0, "--lr", 1e-4, "--log-every", 1, "--sample-every", 0, "--out"]
    run(*flags, tmp_path / "one", "--steps", 3)
    done = torchrun("train.py", *flags, tmp_path / "two", "--steps", 3)
    assert done.returncode == 0, done.stderr[-3000:]
    for row, other in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        for key in "l1 kl vae_align loss denoise align grad_norm grad_norm_vae held_out".split():
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), (row["step"], key)


def test_a_run_overfits(tmp_path, monkeypatch):
    for name in ("black", "white"):
        image = Image.new("RGB", (32, 32), name)
        image.paste("grey", (6, 12, 14, 20))  # for the teacher to see
        save_images(tmp_path / "few" / name, 2, image)
    first, second, free = [], [], []  # the streams of both passes of each step; what loss() may reach
    loss, frozen_alignment = repa_e.loss, repa_e.frozen_alignment

    def watched(model, latent, y, target, config, generator, part):
        second.extend([generator.initial_seed()] if model.training else [])
        free.append(latent.requires_grad)
        return loss(model, latent, y, target, config, generator, part)

    def watched_first(model, latent, y, target, config, generator, part):
        first.append(generator.initial_seed())
        return frozen_alignment(model, latent, y, target, config, generator, part)

    monkeypatch.setattr(repa_e, "loss", watched)
    monkeypatch.setattr(repa_e, "frozen_alignment", watched_first)
    flags = "--image-size 24 --hidden-size 64 --batch-size 4 --steps 70 --lr 5e-3 --ema 0.9 --log-every 10"
    flags += " --gan-coeff 0.01 --vae-proj-coeff 0.5 --sample-every 0"
    run(*JOINT, "--data", tmp_path / "few", "--out", tmp_path / "run", *flags.split())
    rows = rows_of(tmp_path / "run")
    assert len(free) > 70 and not any(free)  # the denoising loss never reaches the VAE
    assert first == second and len({*first}) == 70  # both passes of a step draw the same, each step anew
    assert rows[-1]["l1"] < 0.2 < 0.5 < rows[0]["l1"] and rows[-1]["denoise"] < 0.75 * rows[0]["denoise"]
    flags = "--num 8 --sampler heun --steps 20 --cfg 4 --labels 0,1 --ckpt"
    run_sample(*flags.split(), tmp_path / "run/last.pt", "--npz", tmp_path / "s.npz")
    x = np.load(tmp_path / "s.npz")["arr_0"].mean((1, 2, 3))
    assert x[0::2].max() < 150 < x[1::2].min()


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--vae none", "trains a VAE"),
        ("--accumulate 2", "leave --accumulate out"),
        ("--image-size 16", "takes 24 px"),
        ("--latent-scale x.pt", "leave --latent-scale out"),
        ("--latents x", "leave --latents out"),
        ("--vae-precision bf16", "leave --vae-precision out"),
        ("--lpips nowhere.pth", "nowhere.pth: there is no such file: fetch https"),
        ("--disc-width 0", "--disc-width must be positive"),
        ("--gan-coeff inf", "must be finite"),
        ("--method irepa", "unrecognized arguments: --lpips none --disc-width 4"),
        ("--demo --method jitter", "repa_e, not jitter"),
    ],
)
def test_what_does_not_fit_is_one_sentence(photos, tmp_path, capsys, flags, message):
    assert message in refused(capsys, run, *JOINT, "--data", photos, "--out", tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


def test_presets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no VGG16 lies
    with pytest.raises(FileNotFoundError, match="--lpips vgg16-397923af.pth: there is no such file: fetch https"):
        settings("--method", "repa_e")
    asked = settings("--method", "repa_e", "--lpips", "none")
    assert (asked.model, asked.vae, asked.image_size) == ("SiT-XL/2", "sd-vae-ft-mse", 256)
    config = repa_e.Config()
    assert (config.vae_proj_coeff, config.gan_coeff, config.disc_width) == (1.5, 0.1, 64)
    demo = settings("--demo", "--method", "repa_e", "--gan-coeff", "0.2")
    assert (demo.vae, demo.model, demo.network["lpips"], demo.network["gan_coeff"]) == ("tiny", "SiT-S/1", "none", 0.2)
