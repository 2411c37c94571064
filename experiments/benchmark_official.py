"""benchmark.py official: training and sampling side by side with a checkout of the official code."""

import copy
import functools
import sys
from pathlib import Path

import torch

from experiments.rivals import Step, apart, random_teacher, table, windows
from irepa import Sampling, irepa_loss
from plumbing.files import mistakes, one_line
from plumbing.processes import compile_blocks, fast_bf16
from sample import generate


class Theirs:
    """The official network in the loop that they train with, on the weights, the teacher and the batch of our Step."""

    def __init__(self, release, name, ours):
        sys.path.insert(0, str(Path(release) / "ldm"))  # their modules lie there, in no package
        try:
            from loss import SILoss
            from models.sit import SiT_models
            from samplers import euler_maruyama_sampler
            from utils import SpatialNormalization
        except ImportError as e:
            raise ValueError(f"--release {release} is no checkout of the official code ({e})") from e
        kinds = dict(projection_layer_type="conv", proj_kwargs_kernel_size=3, fused_attn=True, qk_norm=False)
        net = SiT_models[name](
            input_size=32, in_channels=4, num_classes=1000, use_cfg=True, z_dims=[ours.encoder.dim],
            encoder_depth=ours.config.encoder_depth, **kinds,
        )  # fmt: skip
        try:
            net.load_state_dict(ours.model.state_dict())
        except RuntimeError as e:  # its S sizes have a last layer of width 768, and cannot run
            raise ValueError(f"the release's {name} is another network: {one_line(e, 300)}") from e
        self.net, self.ours = net.to(ours.device).train(), ours
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.criterion = SILoss(projection_loss_type="cosine", proj_coeff="1.0")
        self.normal, self.solve = SpatialNormalization("zscore"), euler_maruyama_sampler
        # they keep its weights in float32, for autocast to cast; its attention is ours, on a CPU plain products
        self.teacher = copy.deepcopy(ours.encoder).float()

    def losses(self, net, x, y, tokens):
        denoise, align, _ = self.criterion(net, x, dict(y=y), zs=[self.normal(tokens, zscore_alpha=0.6)])
        return denoise.mean(), align.mean()

    def stepper(self, compiled):
        """-> their training step, to be called. compiled: network and optimiser, as they train by default."""
        net, opt = self.net, torch.optim.AdamW(self.net.parameters(), lr=1e-4, weight_decay=0.0)

        def optimise():
            opt.step()
            opt.zero_grad(set_to_none=True)

        if compiled:
            torch._dynamo.config.cache_size_limit = 64
            net, optimise = torch.compile(net), torch.compile(optimise)
        return functools.partial(self.step, net, optimise)

    def step(self, net, optimise):
        ours = self.ours
        with torch.autocast(ours.device.type, torch.bfloat16, enabled=fast_bf16(ours.device)):
            denoise, align = self.losses(net, ours.x, ours.y, self.teacher(ours.images))
            loss = denoise + align
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        optimise()
        with torch.no_grad():
            for slow, fast in zip(self.ema.parameters(), self.net.parameters()):
                slow.mul_(0.9999).add_(fast, alpha=1e-4)
        return loss.item()

    @torch.no_grad()
    def samples(self, noise, steps):
        return self.solve(self.ema.eval(), noise, self.ours.y, num_steps=steps).sum().item()


def same_losses(name, ours, theirs):
    """The same weights, draws and target give the same losses, on the CPU in float32."""
    x, y = ours.x.cpu()[:4], ours.y.cpu()[:4]
    tokens = ours.encoder(ours.images[:4]).cpu()
    torch.manual_seed(1)
    wanted = theirs.losses(copy.deepcopy(theirs.net).cpu(), x, y, tokens)
    found = irepa_loss(copy.deepcopy(ours.model).cpu(), x, y, tokens, ours.config, torch.Generator().manual_seed(1))
    pairs = [(a.item(), found[term].item()) for a, term in zip(wanted, ("denoise", "align"))]
    print(f"{name}: losses, theirs and ours: {pairs}")
    assert all(abs(a - b) < 1e-4 * max(1, abs(a)) for a, b in pairs)


def theirs_apart(connection, name, args, device):
    """What a process of theirs does: make the rivals, say so, and call the one that it is asked for."""
    ours = our_step(name, args, device, compiled=False)
    with mistakes("experiments.benchmark"):
        theirs = Theirs(args.release, name, ours)
    same_losses(name, ours, theirs)
    noise = torch.randn(args.batch_size, 4, 32, 32, device=device)
    calls = {"theirs": theirs.stepper(False), "theirs, compiled": theirs.stepper(True)}
    calls["sampling"] = functools.partial(theirs.samples, noise, args.steps)
    connection.send(None)
    while True:
        asked = connection.recv()
        torch.set_float32_matmul_precision("high" if asked == "sampling" else "highest")  # as both do
        connection.send(calls[asked]())


def our_step(name, args, device, compiled):
    """A Step of ours, the same weights in each process. A new model's gates are 0: nothing to compare."""
    teacher = random_teacher(args.encoders[0], device)
    ours = Step(name, args, device, teacher, teacher.dim, compiled)
    with torch.no_grad():
        for p in ours.opt.param_groups[0]["params"]:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(device), alpha=0.02)
    return ours


def eager(call):
    """The same without anything compiled."""

    def called():
        with torch.compiler.set_stance("force_eager"):
            return call()

    return called


def cached(ours):
    """The same with the teacher's tokens at hand: to read a cache takes 0.2 % of a step (see benchmark.py train)."""
    tokens, step = ours.teacher(), copy.copy(ours)
    step.encoder = lambda images: tokens
    return step


def add_rows(rows, name, what, seconds, pairs, args):
    """A row for each pair of names (theirs, ours) that were measured, in `seconds`."""
    for theirs, ours in pairs:
        if ours in seconds:
            rates = [args.batch_size / seconds[rival] for rival in (theirs, ours)]
            rows.append({"model": name, "what": what, "theirs": theirs, "ours": ours})
            rows[-1].update({"theirs, images/s": rates[0], "ours, images/s": rates[1], "times": rates[1] / rates[0]})


def official(args, device):
    """Their network, loss, spatial norm and sampler in the loop that they train with, on our weights and teacher."""
    rows = []
    for name in args.models:
        with apart(theirs_apart, name, args, device) as ask:
            rows += rivalry(name, ask, args, device)
    table(f"the official release, batch {args.batch_size}, {args.encoders[0]}, sampling in {args.steps} steps", rows)
    return rows


def rivalry(name, ask, args, device):
    """The rows of one model."""
    rows, ours = [], our_step(name, args, device, args.compile)
    theirs = {what: functools.partial(ask, what) for what in ("theirs", "theirs, compiled", "sampling")}
    rivals = {what: theirs[what] for what in ("theirs", "theirs, compiled")} | {"ours": eager(ours)}
    if args.compile:
        rivals["ours, compiled"], rivals["ours, compiled, tokens cached"] = ours, cached(ours)
    pairs = [("theirs", "ours"), ("theirs, compiled", "ours"), ("theirs, compiled", "ours, compiled")]
    pairs.append(("theirs, compiled", "ours, compiled, tokens cached"))
    add_rows(rows, name, "training step", windows(rivals, args.windows, device), pairs, args)

    sampled = copy.deepcopy(ours.ema)
    sampled.projectors = torch.nn.ModuleList()  # sample.py loads none
    compile_blocks(sampled, args.compile)
    torch.set_float32_matmul_precision("high")  # as sample.py does

    def our_samples(bf16):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = generate(sampled, ours.y.cpu(), range(len(ours.y)), how=Sampling(steps=args.steps))
        return x.sum().item()

    default, bf16 = (functools.partial(our_samples, bf16) for bf16 in (False, True))
    rivals = {"theirs": theirs["sampling"], "ours": eager(default), "ours, bf16": eager(bf16)}
    if args.compile:
        rivals.update({"ours, compiled": default, "ours, compiled, bf16": bf16})
    pairs = [("theirs", what) for what in rivals if what != "theirs"]
    add_rows(rows, name, "sampling, SDE", windows(rivals, args.windows, device), pairs, args)
    torch.set_float32_matmul_precision("highest")
    return rows
