"""REPA-E with iREPA: the VAE and the SiT train together (arXiv 2504.10483, with the two changes of arXiv 2512.10794).

    python train.py --demo --method repa_e          minutes on one CPU core, a tiny VAE from random weights
    torchrun --nproc_per_node=8 train.py --method repa_e --encoder dinov2_vitb14 --no-ema-warmup --lpips FILE

A VAE that follows the diffusion loss makes latents that are easy to denoise and say little. REPA-E stops that gradient
and lets the alignment through instead. One step:

    loss of                                    gradient to             pass through the SiT
    L1 + LPIPS + 1e-6 KL - 0.1 mean D(recon)   VAE                     none
    1.5 alignment                              VAE's encoder           1: blocks up to the alignment, frozen, eval mode
    denoising + proj_coeff alignment           SiT                     2: whole, train mode, no gradient to the latent
    hinge                                      discriminator D         none

Both passes see the same latents, times, noise and target. Gradients are taken by torch.autograd.grad for one network at
a time: nothing needs freezing. The latent is not scaled: `bn`, a batch norm without weights, comes before the SiT, in
pass 1 by its running statistics (constants for the VAE), in pass 2 by the batch's, which move the running ones.

As released: all of that, the weights, AdamW with one learning rate for the three networks, norms clipped one by one,
the discriminator from the first step on, an EMA of the SiT and of bn's statistics alone, L1 where the paper writes a
squared error. Ours, because no public code joins REPA-E and iREPA: the conv projector lies in the SiT and is frozen in
pass 1 with it; the SiT's coefficient is iREPA's 1.0 (REPA-E: 0.5), the VAE's stays 1.5. Ours too: bn starts from the
statistics of 256 images, spread over the set, and is undone with its eps; the position table stays fixed (the release
trains it); LPIPS takes its images in [-1, 1] once (the first release scaled them twice); the discriminator starts from
random weights, and its batch norm sees the images of one process; all else is the same on any number of processes.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import irepa
from inputs.foreign import load_lpips
from inputs.vae import Latents
from irepa import draws, interpolate, irepa_loss, stream, training_draws, with_alignment
from plumbing.files import one_line

# what it changes in train.py's --demo: the tiny VAE is trained from random weights, hence no latents of a file
DEMO = dict(
    model="SiT-S/1", vae="tiny", lpips="none", vae_proj_coeff=0.5, gan_coeff=0.01, disc_width=16, hidden_size=128,
    num_heads=4, batch_size=16, steps=1200, sample_every=600,
)  # fmt: skip

L1, LPIPS, KL = 1.0, 1.0, 1e-6  # weights in the VAE's loss, beside --gan-coeff and --vae-proj-coeff


@dataclass
class Config(irepa.Config):
    """irepa.Config, and what the VAE's training adds."""

    lpips: str = "vgg16-397923af.pth"  # torchvision's VGG16 weights for the perceptual loss, or none: without it
    vae_proj_coeff: float = 1.5  # weight of the alignment in the VAE's loss
    gan_coeff: float = 0.1  # weight of the discriminator in the VAE's loss
    disc_width: int = 64  # channels of the discriminator's first layer

    def __post_init__(self):
        super().__post_init__()
        irepa.check(self.disc_width > 0, f"--disc-width must be positive, not {self.disc_width}")


# ---- Networks ----


class LatentNorm(nn.BatchNorm2d):
    """[B, C, H, W] -> the same with mean 0 and variance 1 per channel; the batch is that of all processes."""

    def forward(self, z):
        if not (self.training and dist.is_initialized()):
            return super().forward(z)
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())  # carries no gradient, and z has none in training mode
        return super().forward(torch.cat(parts)).chunk(len(parts))[dist.get_rank()]


class SiT(irepa.SiT):
    """irepa.SiT with bn, the normaliser of its input. forward() takes normalised latents, as sampling does."""

    def __init__(self, config):
        super().__init__(config)
        self.bn = LatentNorm(config.in_channels, eps=1e-4, momentum=0.1, affine=False)

    def tokens(self, x, t, y):
        """The projected tokens [B, T, encoder_dim] alone: no block after the alignment's runs."""
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks[: self.config.encoder_depth]:
            x = block(x, c)  # (B, T, D)
        return self.projectors[0](x)  # (B, T, encoder_dim)


model = SiT


class Discriminator(nn.Module):
    """PatchGAN: images [B, 3, H, W] in [-1, 1] -> logits [B, 1, h, w] of patches 70 px wide; H from 24 (pix2pix)."""

    def __init__(self, width=64):
        super().__init__()
        layers, sizes = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)], [width, 2 * width, 4 * width, 8 * width]
        for before, after, stride in zip(sizes, sizes[1:], (2, 2, 1)):
            layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))  # the release's names
        for module in self.main:
            if hasattr(module, "weight"):
                nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)

    def forward(self, x):
        return self.main(x)


# ---- Losses ----


def loss(model, latent, y, target, config, generator=None, part=(0, 1)):
    """irepa_loss of latents [B, C, H, W], as the VAE makes them, after bn (REPA-E, section 3)."""
    return irepa_loss(model, model.bn(latent), y, target, config, generator, part)


def posterior(vae, x, generator, part=(0, 1)):
    """Images [B, 3, H, W] in [-1, 1] -> (latent [B, C, h, w], KL to the normal, a sum per image, mean over images)."""
    found = vae.encode(x).latent_dist
    mean, logvar = found.mean.float(), found.logvar.float()
    latent = mean + (logvar / 2).exp() * draws(x, generator, part)(torch.randn, *mean.shape[1:])
    return latent, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def frozen_alignment(model, latent, y, target, config, generator, part=(0, 1)):
    """Pass 1: the alignment of latents [B, C, h, w] by the model as it is, at the times and noise that loss() draws.

    Call it in eval mode and with a generator in the state that loss() finds: no label is dropped, bn stays put.
    """
    t, noise, y = training_draws(model, latent, y, config, generator, part)
    x_t, _ = interpolate(model.bn(latent), noise, t, config.path)
    return with_alignment(latent.new_zeros(()), model.tokens(x_t, t, y), target, config)["align"]


def vae_loss(model, vae, disc, x, y, target, config, perceptual, noise, twin, part=(0, 1)):
    """-> (dict of scalars: loss, l1, lpips, kl, gan, vae_align; latent; the reconstruction of x) (REPA-E, section 3).

    x [B, 3, H, W] in [-1, 1]; the generators: noise of the posterior's sample, twin of frozen_alignment.
    """
    latent, kl = posterior(vae, x, noise, part)
    recon = vae.decode(latent).sample.float()
    zero = torch.zeros((), device=x.device)
    model.eval()
    align = frozen_alignment(model, latent, y, target, config, twin, part) if config.projector else zero
    with torch.autocast(x.device.type, enabled=False):
        l1 = (x - recon).abs().mean()
        lpips = perceptual(x, recon).mean() if perceptual else zero
        gan = -disc(recon).mean()
    total = L1 * l1 + LPIPS * lpips + KL * kl + config.vae_proj_coeff * align + config.gan_coeff * gan
    return dict(loss=total, l1=l1, lpips=lpips, kl=kl, gan=gan, vae_align=align), latent, recon


def hinge_loss(disc, x, recon):
    """The discriminator's loss: images x to above 1, reconstructions to below -1."""
    with torch.autocast(x.device.type, enabled=False):
        return 0.5 * (F.relu(1 - disc(x)).mean() + F.relu(1 + disc(recon.detach())).mean())


def set_gradients(loss, net):
    """p.grad of this network's parameters, and of no others, is the loss's gradient, averaged over the processes."""
    params = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params)
    if dist.is_initialized():
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat = flat.div_(dist.get_world_size()).split([g.numel() for g in grads])
        grads = [part.view_as(g) for part, g in zip(flat, grads)]
    for p, g in zip(params, grads):
        # some come channels last, and a fused step reads them in the order of memory
        p.grad = torch.empty_like(p, requires_grad=False).copy_(g)


def latent_spec(model, spec):
    """The spec (see inputs/vae.py) by which decode() undoes the bn of `model`, exactly: with its eps."""
    scale = (model.bn.running_var + model.bn.eps).rsqrt().tolist()
    return {**spec, "vae": "trained with the model", "scale": scale, "bias": model.bn.running_mean.tolist()}


def released(weights, args=None):
    """No Config fields beyond irepa.SiT's for a released SiT with bn; None for others."""
    return {} if "bn.running_mean" in weights and "r_embedder.mlp.0.weight" not in weights else None


def stored_vae(data, model, device, given=None):
    """The Latents for samples of `model`: with the VAE of its checkpoint's dict, or with `given` where that holds none.

    ValueError where neither is there, or the VAE is damaged.
    """
    if "vae_config" not in data:
        irepa.check(given, "the checkpoint holds no VAE: name the one it was trained with after --vae")
        found, channels = given.spec["channels"], model.config.in_channels
        irepa.check(found == channels, f"the checkpoint makes {channels} channels, --vae takes {found}")
        return given._replace(spec=latent_spec(model, given.spec))
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL(**data["vae_config"])
        vae.load_state_dict(data["vae"])
        spec = latent_spec(model, data["latent"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as e:
        raise ValueError(f"the checkpoint's VAE cannot be used: {one_line(e, 300)}") from e
    return Latents(vae.eval().requires_grad_(False).to(device), spec)


# ---- Train ----


def check_run(run):
    """ValueError where flags do not fit."""
    for fits, why in (
        (run.vae is not None, "trains a VAE: name one with --vae (tiny: a small one with random weights)"),
        (not run.latents, "changes its latents all the time: leave --latents out"),
        (run.latent_scale in ("", "vae"), "measures its latents' statistics: leave --latent-scale out"),
        (run.vae_precision == "fp32", "keeps its VAE's weights in fp32: leave --vae-precision out"),
        (run.accumulate == 1, "normalises whole batches: leave --accumulate out"),
        (run.image_size >= 24, f"has a discriminator that takes 24 px, not {run.image_size}"),
    ):
        irepa.check(fits, f"--method {run.method} {why}")
    load_lpips(run.network.get("lpips", Config.lpips), "cpu")


@torch.no_grad()
def measure(bn, vae, images):
    """Set bn's running statistics to those of the latents of images, uint8 [B, 3, H, W]."""
    z = torch.cat([posterior(vae, x.float() / 127.5 - 1, stream("bn", 0, 0, x.device))[0] for x in images.split(16)])
    var, mean = torch.var_mean(z, dim=(0, 2, 3))
    bn.running_var.copy_(var)
    bn.running_mean.copy_(mean)


class Learner:
    """Three networks that learn from three losses, as train.Learner is one: see there for what each name gives."""

    def __init__(self, job, ranks, indices):
        self.job, self.part, self.images = job, (ranks.rank, ranks.world), None
        self.perceptual = load_lpips(job.config.lpips, job.device)
        vae = job.latent.vae.requires_grad_(True)
        model, disc = SiT(job.config).to(job.device), Discriminator(job.config.disc_width).to(job.device)
        if not job.checkpoint:
            few = sorted({i * len(indices) // 256 for i in range(256)})  # sets lie class by class
            measure(model.bn, vae, job.data[indices[few]].images.to(job.device))
        self.networks = dict(model=model, vae=vae, disc=disc)

    def held_out(self, images, moments, part):
        x = images.float() / 127.5 - 1
        self.images = x if self.images is None else self.images
        return lambda: posterior(self.networks["vae"], x, stream("held-out latents", 0, 0, x.device), part)[0]

    def gradients(self, step, parts):
        job, config = self.job, self.job.config
        model, vae, disc = nets = [*self.networks.values()]
        [(_, batch)] = parts
        x, labels, target = batch.images.float() / 127.5 - 1, batch.labels, batch.tokens
        noise, twin, again = (stream(k, job.run.seed, step, job.device) for k in ("posterior", "step", "step"))
        with job.autocast():
            terms, latent, recon = vae_loss(*nets, x, labels, target, config, self.perceptual, noise, twin, self.part)
        set_gradients(terms.pop("loss"), vae)
        terms["disc"] = hinge_loss(disc, x, recon)
        set_gradients(terms["disc"], disc)
        model.train()
        with job.autocast():
            terms.update(loss(model, latent.detach(), labels, target, config, again, self.part))
        set_gradients(terms["loss"], model)
        return terms

    def decoder(self, ema):
        return Latents(self.networks["vae"], latent_spec(ema, self.job.latent.spec))

    def stored(self, optimisers):
        vae, disc = self.networks["vae"], self.networks["disc"]
        return dict(vae=vae, discriminator=disc, opt_vae=optimisers["vae"], opt_disc=optimisers["disc"])

    def facts(self):
        config = {k: v for k, v in self.networks["vae"].config.items() if not k.startswith("_")}
        return dict(vae_config=config, latent=self.job.latent.spec)

    @torch.no_grad()
    def pictures(self):
        """Rows of eight held-out images, and below each row what the VAE makes of it."""
        vae, columns = self.networks["vae"], min(8, len(self.images))
        images = self.images[: len(self.images) // columns * columns]
        made = vae.decode(vae.encode(images).latent_dist.mean).sample
        rows = [row for pair in zip(images.split(columns), made.split(columns)) for row in pair]
        return dict(reconstructions=(torch.cat(rows), ["images", "reconstructed"] * (len(rows) // 2)))
