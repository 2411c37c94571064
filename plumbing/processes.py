"""The machine: devices, processes of one run, precision, signals."""

import atexit
import multiprocessing
import os
import signal
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, get_worker_info

import fid
from plumbing.files import one_line

STOPPED = 75  # exit code after a signal: saved, start it again (EX_TEMPFAIL)


def pick_device(name):
    """torch.device for --device: 'auto' is this process's GPU, else MPS, else the CPU. ValueError if it is absent, or
    if the environment speaks of several processes without saying how they meet."""
    needed = "RANK WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    absent = [name for name in needed if name not in os.environ]
    several = "RANK" if "RANK" in os.environ else "WORLD_SIZE" if os.environ.get("WORLD_SIZE", "1") != "1" else None
    if several and absent:
        why = f"{several} is set, but not {', '.join(absent)}"
        raise ValueError(f"{why}: start it with torchrun, or unset {several}")
    device = fid.pick_device(name)  # on CPUs it also keeps memory: an eighth of a step, a sixth of one not compiled
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---- Ranks ----


def is_first():
    """Whether this is the process that speaks and writes, also before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


class Ranks(NamedTuple):
    """The processes of one run: this one's number, how many there are, and their group for tensors on the CPU."""

    rank: int = 0
    world: int = 1
    cpu_group: object = None

    def any(self, flag):
        """Whether `flag` is true in any of them; each waits for the others' answer."""
        found = torch.tensor(int(bool(flag)))
        if self.world > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(found)

    def gather(self, tensor):
        """The tensors of all, of one shape, one after the other."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous(), group=self.cpu_group if tensor.device.type == "cpu" else None)
        return torch.cat(parts)

    def meet(self):
        if self.world > 1:
            dist.barrier()

    def part(self):
        if self.world > 1:  # together: one that ends while gloo's thread lets go of the last tensor is aborted
            dist.barrier(self.cpu_group)
            dist.destroy_process_group()


def start_ranks(device, minutes):
    """-> Ranks; joins the process group when torchrun started us: nccl on GPUs, else gloo.

    A process that waits for another longer than `minutes` gives up: torchrun sees one that dies, not one that hangs.
    """
    if "RANK" not in os.environ:
        return Ranks()
    nccl = device.type == "cuda" and dist.is_nccl_available()
    dist.init_process_group("nccl" if nccl else "gloo", timeout=timedelta(minutes=minutes))
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo") if nccl else None)


# ---- Precision ----


def fast_bf16(device):
    """Whether bf16 is worth having: on GPUs, and on CPUs with instructions for it (others are 100 times slower)."""
    if torch.device(device).type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def mixed(device, bf16):
    """Autocast to bf16, not to be nested. On a CPU attention is then plain matrix products, which round the scores to
    bf16: forward and backward of the fused kernel take twice as long on 256 tokens, three times on 64."""
    plain = bf16 and device.type == "cpu"
    kernel = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # not only of CUDA, in spite of its name
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), kernel:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain or before)
        try:
            yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


COMPILED_FROM = 1000  # steps on a CPU: compiling takes 10 to 20 s there, and saves a quarter of each step


def settle_compile(wanted, device, steps=0):
    """Whether blocks are compiled: as `wanted`, else on GPUs, and on CPUs from so many steps of training on.

    ValueError, before anything slow, where they should be and torch.compile cannot; a CPU where nobody asked goes on
    without it, which is said.
    """
    default = device.type == "cuda" or device.type == "cpu" and steps >= COMPILED_FROM
    if not (default if wanted is None else wanted):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as e:  # compilers, their headers and drivers fail in any way
        why = one_line(str(e).strip().partition("\n\n")[0], 300)  # advice comes after it
        if wanted is None and device.type == "cpu":
            if is_first():
                print(f"note: blocks are not compiled, which would save a quarter of the time: {why}")
            return False
        raise ValueError(f"torch.compile does not work here ({why}): --no-compile goes without it") from e
    return True


def recompute_blocks(model, context=None):
    """Keep of each block its input alone, and compute the rest again in the backward pass, under context()."""
    how = dict(use_reentrant=False, preserve_rng_state=False)
    if context:
        how.update(context_fn=lambda: (nullcontext(), context()))

    def recomputed(block):
        plain = block.forward
        return lambda *inputs: checkpoint(plain, *inputs, **how) if torch.is_grad_enabled() else plain(*inputs)

    for block in model.blocks:
        block.forward = recomputed(block)


def compile_blocks(model, compiled, again=None):
    """torch.compile the blocks of a transformer: one compilation serves all; with recompute_blocks(model, again)."""
    if again:
        recompute_blocks(model, None if compiled else again)  # compiled, they keep the context that they were traced in
    if compiled:
        for block in model.blocks:
            block.compile()


# ---- Signals ----


class Noted(list):
    """Signals that have come."""

    waiting = False  # a signal is to end by Stopped what is waited for

    def until_stopped(self, work, *inputs):
        """work(*inputs), which may never end -> its result; None where a signal ends it, or comes before it."""
        try:
            self.waiting = True
            try:
                return None if self else work(*inputs)
            finally:
                self.waiting = False
        except Stopped:  # also of a signal between the lines above
            return None


class Stopped(BaseException):  # no Exception, of which a loader would make something else
    """A signal has come while somebody was waiting."""


@contextmanager
def noted_signals():
    """-> a Noted to which the first SIGTERM or SIGINT is added; the same again ends the process at once."""
    noted = Noted()

    def note(number, _):
        noted.append(number)
        # who starts it with & in a script has it ignore SIGINT
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default if before[number] == signal.SIG_IGN else before[number])
        if is_first():  # by os: print() may be at work at this moment
            os.write(2, b"\nstopping after this step and saving; once more, and it ends at once without saving\n")
        if noted.waiting:
            noted.waiting = False
            raise Stopped

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def spared(compiled):
    """Ctrl-C in a terminal goes to each process of the program: compilers that are started within do not get it, and
    this process gets it afterwards, or by another of its threads."""
    if not compiled:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which children inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- Workers ----


def read_ahead(data, parts, workers, **more):
    """data[part] for each of `parts`, in order, read by so many processes ahead of the one that they serve."""
    atexit.register(kill_workers)
    how = dict(collate_fn=in_shared_memory, worker_init_fn=ignore_signals, **more)
    return DataLoader(data, batch_size=None, sampler=parts, num_workers=workers, **how)


def in_shared_memory(batch):
    """What a worker has read, moved to where the process that it serves looks for it.

    OSError where there is no room: found out later, the batch would be lost, and that process wait for ever.
    """
    if get_worker_info():
        try:
            for tensor in filter(torch.is_tensor, batch):
                tensor.share_memory_()
        except RuntimeError as e:
            more = "give more of it (docker run --shm-size 8g), or, in train.py, decode without them (--workers 0)"
            raise OSError(f"no room in shared memory for the images that workers decode: {more}") from e
    return batch


def ignore_signals(worker):
    """Workers leave signals to the process that they serve: it still wants their batches."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """When a run ends early: multiprocessing would ask them by a signal that they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()
