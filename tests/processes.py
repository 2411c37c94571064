"""Programs in processes of their own, forked by a server that has the slow libraries: a start costs no seconds.

The server never runs a program, so that each process begins as a fresh one does; our own modules it reads itself.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

HERE = str(Path(__file__).parent.parent)
FORKED = multiprocessing.get_context("forkserver")
# where one cannot be had, the program says so when it imports it
FORKED.set_forkserver_preload(
    "torch.nn.parallel torch.utils.data safetensors.torch matplotlib.pyplot PIL.ImageOps tqdm diffusers.models".split()
)


def act(root, module, flags, said, settings):
    """In the new process: module.main(flags), of the tree at root, what it says into a file."""
    multiprocessing.set_start_method(None, force=True)  # it loads data in processes of the system's usual kind
    os.environ.update(OMP_NUM_THREADS="1", **settings)
    os.chdir(root)
    sys.path[:] = [str(root), *(path for path in sys.path if path != HERE)]
    with open(said, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    importlib.import_module("torch").set_num_threads(1)
    importlib.import_module(module).main(flags)


def start(root, module, flags, said, **settings):
    process = FORKED.Process(target=act, args=(root, module, [str(flag) for flag in flags], said, settings))
    process.start()
    return process


def call(root, folder, module, *flags, world=1):
    """module.main(flags) in `world` processes, as torchrun would start them -> (exit code of each, what all said)."""
    settings = [{}]
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(world))
        settings = [dict(meet, RANK=str(i), LOCAL_RANK=str(i), LOCAL_WORLD_SIZE=str(world)) for i in range(world)]
    files = [folder / f"said-{i}.txt" for i in range(world)]
    processes = [start(root, module, flags, file, **more) for file, more in zip(files, settings)]
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes], "".join(file.read_text() for file in files)
