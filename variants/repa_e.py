"""REPA-E with iREPA: the VAE and the SiT train together (arXiv 2504.10483, with the two changes of arXiv 2512.10794).

    python train.py --demo --method repa_e          minutes on one CPU core, a tiny VAE from random weights
    torchrun --nproc_per_node=8 train.py --method repa_e --encoder dinov2_vitb14 --lpips vgg16-397923af.pth

A VAE that follows the diffusion loss makes latents that are easy to denoise and say little. REPA-E stops that gradient
and lets the alignment through instead. One step, z being a sample of the VAE's posterior, of one forward:

    loss of                                    gradient to             pass through the SiT
    L1 + LPIPS + 1e-6 KL - 0.1 mean D(recon)   VAE                     none
    1.5 alignment                              VAE's encoder           1: blocks up to the alignment, frozen, eval mode
    denoising + proj_coeff alignment           SiT                     2: whole, train mode, on z without gradient
    hinge                                      discriminator D         none

Both passes see the same z, times and noise, and the same target, the teacher's tokens after the spatial norm. Gradients
are taken by torch.autograd.grad for the parameters of one network at a time: nothing needs freezing and thawing. The
latent is not scaled: `bn`, a batch norm without weights, comes before the SiT, in pass 1 by its running statistics
(constants for the VAE), in pass 2 by those of the batch, which move the running ones.

As released: all of that, the weights, AdamW with one learning rate for the three networks, norms clipped one by one,
the discriminator from the first step on, an EMA of the SiT and of bn's statistics alone. The paper writes a squared
error, the release has L1, and so has this. Ours, because no public code joins REPA-E and iREPA: the conv projector lies
in the SiT and is frozen in pass 1 with it; the SiT's coefficient is iREPA's 1.0 (REPA-E: 0.5), the VAE's stays 1.5.
Ours too: bn starts from the statistics of 256 images, not of a file, and is undone with its eps; the position table
stays fixed (thawing the SiT, the release trains it); LPIPS takes its images in [-1, 1] once (the first release scaled
them twice); the discriminator starts from random weights, so that --gan-coeff is a flag; its batch norm sees the images
of one process, while all else is the same on any number of processes.
"""

import atexit
import copy
import dataclasses
import functools
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import irepa
from inputs.images import line, workers_for
from inputs.latents import read_pt
from irepa import Config, draws, interpolate, irepa_loss, with_alignment
from sample import sampler, save_grid, seeded, start_ranks, to_uint8, versions

L1, LPIPS, KL = 1.0, 1.0, 1e-6  # weights in the VAE's loss, beside --gan-coeff and --vae-proj-coeff
VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"

# ---------------------------------------------------------------------------------------------------------------
# Networks


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


Config, model, sampler = Config, SiT, sampler  # three of the four names that the seam takes; the fourth is loss()


class Discriminator(nn.Module):
    """PatchGAN: images [B, 3, H, W] in [-1, 1] -> logits [B, 1, h, w] of patches 70 px wide; H from 24 (pix2pix)."""

    def __init__(self, width=64):
        super().__init__()
        layers, sizes = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)], [width, 2 * width, 4 * width, 8 * width]
        for before, after, stride in zip(sizes, sizes[1:], (2, 2, 1)):
            layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))  # the release's names
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)

    def forward(self, x):
        return self.main(x)


def load_lpips(weights, device):
    """LPIPS on VGG16 (arXiv 1801.03924): (images, images) in [-1, 1] -> [B, 1, 1, 1]; None for "none".

    weights: torchvision's file of VGG16; the layers on top come with the package. ValueError or FileNotFoundError,
    with what to do, where it cannot be had.
    """
    if weights == "none":
        return None
    hint = f"fetch {VGG16} and name the file after --lpips, or say --lpips none and do without"
    if weights is None:
        raise ValueError(f"--method repa_e takes --lpips: {hint}")
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
        raise ValueError(f"--lpips {weights} does not hold torchvision's VGG16 ({line(e)[:200]}): {hint}") from e
    return net.requires_grad_(False).to(device)


# ---------------------------------------------------------------------------------------------------------------
# Losses


def loss(model, z, y, target, config, generator=None, part=(0, 1)):
    """irepa_loss of the latents z [B, C, H, W], as the VAE makes them, after bn (REPA-E, section 3)."""
    return irepa_loss(model, model.bn(z), y, target, config, generator, part)


def posterior(vae, x, generator, part=(0, 1)):
    """Images [B, 3, H, W] in [-1, 1] -> (z [B, C, h, w], KL to the normal, summed per image, mean over images)."""
    found = vae.encode(x).latent_dist
    mean, logvar = found.mean.float(), found.logvar.float()
    z = mean + (logvar / 2).exp() * draws(x, generator, part)(torch.randn, *mean.shape[1:])
    return z, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def frozen_alignment(model, z, y, target, config, generator, part=(0, 1)):
    """Pass 1: the alignment of z [B, C, h, w] by the model as it is, at the times and noise that loss() will draw.

    Call it in eval mode and with a generator in the state that loss() finds: no label is dropped, bn stays put.
    """
    draw = draws(z, generator, part)
    t, noise = draw(torch.rand), draw(torch.randn, *z.shape[1:])
    x_t, _ = interpolate(model.bn(z), noise, t, config.path)
    return with_alignment(z.new_zeros(()), model.tokens(x_t, t, y), target, config)["align"]


def vae_loss(model, vae, disc, x, y, target, config, coeffs, perceptual, noise, twin, part=(0, 1)):
    """-> (dict of scalars: loss, l1, lpips, kl, gan, vae_align; z; the reconstruction of x) (REPA-E, section 3).

    x [B, 3, H, W] in [-1, 1]; target as in irepa_loss. coeffs weigh alignment and GAN, perceptual is load_lpips's.
    noise draws the posterior's sample, twin what frozen_alignment takes.
    """
    z, kl = posterior(vae, x, noise, part)
    recon = vae.decode(z).sample.float()
    zero = torch.zeros((), device=x.device)
    model.eval()
    align = frozen_alignment(model, z, y, target, config, twin, part) if config.projector else zero
    with torch.autocast(x.device.type, enabled=False):
        l1 = (x - recon).abs().mean()
        lpips = perceptual(x, recon).mean() if perceptual else zero
        gan = -disc(recon).mean()
    total = L1 * l1 + LPIPS * lpips + KL * kl + coeffs[0] * align + coeffs[1] * gan
    return dict(loss=total, l1=l1, lpips=lpips, kl=kl, gan=gan, vae_align=align), z, recon


def hinge_loss(disc, x, recon):
    """The discriminator's loss: images x to above 1, reconstructions to below -1."""
    with torch.autocast(x.device.type, enabled=False):
        return 0.5 * (F.relu(1 - disc(x)).mean() + F.relu(1 + disc(recon.detach())).mean())


def set_gradients(loss, params):
    """p.grad of these parameters, and of no others, is the loss's gradient, averaged over the processes."""
    grads = torch.autograd.grad(loss, params)
    if dist.is_initialized():
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat = flat.div_(dist.get_world_size()).split([g.numel() for g in grads])
        grads = [part.view_as(g) for part, g in zip(flat, grads)]
    for p, g in zip(params, grads):
        # some come channels last, and a fused step reads them in the order of memory
        p.grad = torch.empty_like(p, requires_grad=False).copy_(g)


# ---------------------------------------------------------------------------------------------------------------
# The VAE out of a checkpoint


def latent_spec(model, spec):
    """The spec (see inputs/latents.py) by which decode() undoes the bn of `model`, exactly: with its eps."""
    bn = model.bn
    scale = (bn.running_var + bn.eps).rsqrt().tolist()
    return {**spec, "vae": "trained with the model", "scale": scale, "bias": bn.running_mean.tolist()}


def stored_vae(data, model, device):
    """(VAE, spec) of a checkpoint's dict for latents of `model`. ValueError where the VAE is damaged."""
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL(**data["vae_config"])
        vae.load_state_dict(data["vae"])
        spec = latent_spec(model, data["latent"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as e:
        raise ValueError(f"the checkpoint's VAE cannot be used: {line(e)[:300]}") from e
    return vae.eval().requires_grad_(False).to(device), spec


# ---------------------------------------------------------------------------------------------------------------
# Train


def loop(args, device):
    """train() for these flags, with the signature of train.train. ValueError where the flags do not fit."""
    if args.vae == "none":
        raise ValueError("--method repa_e trains a VAE: name one with --vae (tiny: a small one with random weights)")
    if args.cache_latents or args.latents:
        raise ValueError("--method repa_e changes its latents all the time: leave --latents and --cache-latents out")
    if args.latent_stats:
        raise ValueError("--method repa_e measures its latents' statistics: leave --latent-stats out")
    if args.vae_precision != "fp32":
        raise ValueError("--method repa_e keeps its VAE's weights in fp32: leave --vae-precision out (see --precision)")
    if args.accumulate > 1:
        raise ValueError("--method repa_e normalises whole batches: leave --accumulate out")
    if args.image_size < 24:
        raise ValueError(f"--image-size {args.image_size} is too small for the discriminator, which takes 24 px")
    return functools.partial(train, perceptual=load_lpips(args.lpips, device))


MEANS = "loss denoise align l1 lpips kl gan vae_align disc grad_norm grad_norm_vae grad_norm_disc".split()


@torch.no_grad()
def measure(bn, vae, images):
    """Set bn's running statistics to those of the latents of images, uint8 [B, 3, H, W]."""
    z = torch.cat([posterior(vae, x.float() / 127.5 - 1, seeded(0, 0, x.device))[0] for x in images.split(16)])
    var, mean = torch.var_mean(z, dim=(0, 2, 3))
    bn.running_var.copy_(var)
    bn.running_mean.copy_(mean)


@torch.no_grad()
def draw_reconstructions(vae, x, path):
    """Rows of eight images x [B, 3, H, W] in [-1, 1], and below each row what the VAE makes of it."""
    columns = min(8, len(x))
    count = len(x) // columns
    pairs = zip(x[: count * columns].split(columns), vae.decode(vae.encode(x).latent_dist.mean).sample.split(columns))
    save_grid(to_uint8(torch.cat([row for pair in pairs for row in pair])), ["images", "reconstructed"] * count, path)


def train(args, config, data, teacher, latent, device, checkpoint=None, *, perceptual):
    import train as base  # which loads this file

    rank, world = start_ranks(device, 30)
    atexit.register(base.kill_workers)
    out, part, coeffs = Path(args.out), (rank, world), (args.vae_proj_coeff, args.gan_coeff)
    bf16 = base.uses_bf16(args, device)
    autocast = functools.partial(base.mixed, device, bf16)
    indices, chunks = base.split(len(data))

    torch.manual_seed(args.seed)
    vae, spec = latent[0].requires_grad_(True), latent[1]
    model, disc = SiT(config).to(device), Discriminator(args.disc_width).to(device)
    if not checkpoint:
        measure(model.bn, vae, data[indices[:256]][0].to(device))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    nets = dict(model=model, vae=vae, disc=disc)
    params = {name: [p for p in net.parameters() if p.requires_grad] for name, net in nets.items()}
    opts = {
        name: torch.optim.AdamW(ps, lr=args.lr, betas=(0.9, args.beta2), weight_decay=0.0, fused=True)
        for name, ps in params.items()
    }
    parts = dict(model=model, ema=ema, vae=vae, discriminator=disc)
    parts.update(opt=opts["model"], opt_vae=opts["vae"], opt_disc=opts["disc"])
    start, seconds = 0, 0.0
    if checkpoint:
        for name, part_of in parts.items():
            part_of.load_state_dict(checkpoint[name])
        start, seconds = checkpoint["step"], checkpoint["seconds"]
    if device.type == "cuda" if args.compile is None else args.compile:
        for block in model.blocks:
            block.compile()
    # what a step moves without an optimiser, and must not move where its numbers are not finite
    buffers = [b for net in (model, disc) for b in net.buffers() if b.is_floating_point()]

    held = []
    for i, chunk in enumerate(chunks):
        if i % world == rank:
            images, labels, _ = base.on(device, data[chunk])
            held.append((i, len(chunks), images.float() / 127.5 - 1, labels))
    workers = workers_for(data) if args.workers is None else args.workers
    feed = iter(
        torch.utils.data.DataLoader(
            data, batch_size=None, sampler=base.batches(indices, args, start, rank, world), num_workers=workers,
            pin_memory=device.type == "cuda", worker_init_fn=base.deaf,
        )
    )  # fmt: skip

    if rank == 0:
        record = dict(vars(args), **versions(), config=dataclasses.asdict(config), classes=data.classes)
        record.update(hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
        record.update({f"parameters_{name}": sum(p.numel() for p in ps) for name, ps in params.items()})
        record.update(world_size=world, bf16=bf16, images=len(data))
        log = base.open_log(out, record, start if checkpoint else None)
        sizes = ", ".join(f"{name} {record[f'parameters_{name}'] / 1e6:.1f}M" for name in nets)
        print(
            f"repa_e on {device}: {sizes} parameters, {'LPIPS' if perceptual else 'no LPIPS'}, {len(indices)} images in"
            f" {len(data.classes)} classes, step {start} of {args.steps}"
        )

    def save(step):
        state = {name: part_of.state_dict() for name, part_of in parts.items()}
        state.update(vae_config={k: v for k, v in vae.config.items() if not k.startswith("_")}, latent=spec)
        state.update(config=dataclasses.asdict(config), settings=vars(args), classes=data.classes, images=len(data))
        base.save_checkpoint(out, dict(state, step=step, seconds=seconds, processes=world), args.keep)

    def draw_all(step):
        samples = out / "samples"
        base.draw_samples(ema, data, args, (vae, latent_spec(ema, spec)), samples / f"step-{step:07d}.png")
        draw_reconstructions(vae, held[0][2], samples / f"reconstructions-{step:07d}.png")

    cpu_group = dist.new_group(backend="gloo") if device.type == "cuda" and world > 1 else None
    sums, since, clock, run, saved = torch.zeros(len(MEANS), device=device), start, time.time(), 0, True
    skips = torch.zeros(args.log_every, device=device)  # 1 for each step since the last log that was not applied
    bar = tqdm(
        total=args.steps, initial=start, disable=rank > 0, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30
    )
    for step in range(start, args.steps):
        images, labels, _ = base.on(device, next(feed))
        x, target = images.float() / 127.5 - 1, teacher(images) if teacher else None
        noise, twin, again = (seeded(args.seed, 2 * step + k, device) for k in (0, 1, 1))
        before = [b.clone() for b in buffers]
        with autocast():
            losses, z, recon = vae_loss(
                model, vae, disc, x, labels, target, config, coeffs, perceptual, noise, twin, part
            )
        set_gradients(losses.pop("loss"), params["vae"])
        losses["disc"] = hinge_loss(disc, x, recon)
        set_gradients(losses["disc"], params["disc"])
        model.train()
        with autocast():
            losses.update(loss(model, z.detach(), labels, target, config, again, part))
        set_gradients(losses["loss"], params["model"])

        norms = {
            name: torch.nn.utils.clip_grad_norm_(ps, math.inf if args.clip is None else args.clip)
            for name, ps in params.items()
        }
        losses.update(grad_norm=norms["model"], grad_norm_vae=norms["vae"], grad_norm_disc=norms["disc"])
        skips[step - since] = skip = (
            ~torch.isfinite(sum(norms.values()))
        ).float()  # then all networks stay as they are
        ramp = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
        if args.lr_schedule == "cosine":
            ramp *= 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        for opt in opts.values():
            opt.param_groups[0]["lr"] = args.lr * ramp
            opt.found_inf = skip
            opt.step()
            opt.zero_grad()
        for b, old in zip(buffers, before):
            b.copy_(torch.where(skip > 0, old, b))
        sums += torch.where(skip > 0, 0, torch.stack([losses[name].detach() for name in MEANS]))
        decay = min(args.ema, (1 + step) / (10 + step)) if args.ema_warmup else args.ema
        moving = [[*net.parameters(), net.bn.running_mean, net.bn.running_var] for net in (ema, model)]
        with torch.no_grad():  # or each step would hang its history on the average
            torch._foreach_lerp_(*moving, 1 - decay)
        ema.bn.num_batches_tracked.copy_(model.bn.num_batches_tracked)
        bar.update()

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            if world > 1:
                dist.all_reduce(sums)
            flags = skips[: done - since].bool().tolist()
            run = base.refuse_streak(run, since, flags, indices, args, data)
            means = (sums / max(1, done - since - sum(flags)) / world).tolist()
            elapsed = time.time() - clock
            seconds += elapsed
            with autocast(), torch.no_grad():
                latents = [(i, n, posterior(vae, x, seeded(0, 1, device), (i, n))[0], y) for i, n, x, y in held]
            row = dict(step=done, **dict(zip(MEANS, means)), lr=args.lr * ramp, seconds=seconds, skipped=sum(flags))
            row.update(held_out=base.held_out_loss(model, loss, latents, config, autocast, device))
            row.update(images_per_s=(done - since) * args.batch_size / elapsed)
            if rank == 0:
                base.warned(lambda: base.append(log, row))
            bar.set_postfix_str("L1 {l1:.4f} denoise {denoise:.4f} align {align:.4f}".format(**row))
            sums.zero_()
            skips.zero_()
            since, clock = done, time.time()
        stop = torch.tensor(len(base.caught))
        if world > 1:  # all stop after the same step
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=cpu_group)
        stop = bool(stop) and done < args.steps
        if stop:
            seconds += time.time() - clock
        pause = time.time()
        if rank == 0 and (done % args.ckpt_every == 0 or done == args.steps or stop):
            saved = base.warned(lambda: save(done))
        if stop:
            break
        if rank == 0 and args.sample_every and (done % args.sample_every == 0 or done == args.steps):
            base.warned(lambda: draw_all(done))
        if rank == 0 and (done % args.ckpt_every == 0 or done == args.steps):
            base.warned(lambda: base.plot(out))
        clock += time.time() - pause
    bar.close()
    del feed
    if world > 1:
        dist.destroy_process_group()
    if not saved:
        raise SystemExit(f"train.py: step {done} could not be saved; {out}/last.pt, if there, is of an earlier step")
    if stop:
        if rank == 0:
            print(f"stopped by a signal after step {done}, saved in {out}/last.pt; --resume --out {out} goes on")
        raise SystemExit(base.STOPPED)
    if rank == 0:
        cfg = f" --cfg {args.sample_cfg:g}" if args.sample_cfg != 1 else ""
        shown = f"{out}/samples and {out}/curves.png show" if args.sample_every else f"{out}/curves.png shows"
        print(f"{shown} the run; next: python sample.py --ckpt {out}/last.pt{cfg}")
