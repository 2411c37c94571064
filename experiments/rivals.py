"""What benchmarks share: rivals that take turns, and a training step of train.py on a batch in memory."""

import copy
import multiprocessing
import statistics
import time
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from inputs.teachers import DRAWN, load_encoder
from irepa import Config, SiT, irepa_loss, stream
from plumbing.processes import compile_blocks, fast_bf16, mixed
from train import average, update


def windows(rivals, count, device="cpu"):
    """{name: callable} -> {name: median seconds of a call}, the callables taking turns."""
    seconds = {name: [] for name in rivals}
    for i in range(count + 1):  # the first is the warm-up
        for name, call in rivals.items():
            start = time.perf_counter()
            call()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


@contextmanager
def apart(serve, *args):
    """-> ask(what): what is received of serve(connection, *args), which answers in a process of its own, and first says
    that it is ready: how we use memory (pick_device) would help a rival in ours. SystemExit where it fails."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, *args), daemon=True)
    process.start()
    there.close()  # so that a process that fails is no end of waiting

    def ask(what):
        here.send(what)
        return here.recv()

    try:
        here.recv()
        yield ask
    except EOFError:  # it has said why
        raise SystemExit(2) from None
    finally:
        process.kill()


def table(title, rows):
    """Print dicts of the same keys, one a line."""
    print(f"\n{title}")
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


class Step:
    """One training step of train.py on a batch in memory: call it; .teacher() and .update() are its parts.

    teacher: None, or images uint8 -> tokens, with the width `dim` of these.
    """

    def __init__(self, name, args, device, teacher, dim, compiled):
        torch.manual_seed(0)
        self.config = Config.named(name, **(dict(encoder_dim=dim) if teacher else dict(projector=None)))
        self.model = SiT(self.config).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)
        compile_blocks(self.model, compiled)
        rs, n = np.random.RandomState(0), args.batch_size
        self.images = torch.from_numpy(rs.randint(0, 256, (n, 3, 256, 256)).astype(np.uint8)).to(device)
        self.x = torch.from_numpy(rs.standard_normal((n, 4, 32, 32)).astype(np.float32)).to(device)
        self.y = torch.from_numpy(rs.randint(0, 1000, n)).to(device)
        self.encoder, self.device, self.n = teacher, device, 0
        self.autocast = lambda: mixed(device, fast_bf16(device))

    def teacher(self):
        return self.encoder(self.images) if self.encoder else None

    def update(self):
        update({"model": self.model}, {"model": self.opt}, statistics_before=[], clip=1.0, rate=1e-4)
        average(self.ema, self.model, 0.9999)

    def loss(self, target):
        generator = stream("step", 0, self.n, self.device)
        with self.autocast():
            return irepa_loss(self.model, self.x, self.y, target, self.config, generator)["loss"]

    def __call__(self):
        loss = self.loss(self.teacher())
        loss.backward()
        self.update()
        self.n += 1
        return loss.item()

    def flops(self):
        """Of a forward pass of an image."""
        with FlopCounterMode(display=False) as counted, self.autocast():  # the average is not compiled
            self.ema(self.x[:1], torch.zeros(1, device=self.device), self.y[:1])
        return counted.get_total_flops()


def random_teacher(name, device):
    return load_encoder(name, 16, None if name in DRAWN else "random", device)
