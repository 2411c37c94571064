"""Fixtures of several test files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.common import toy_vae

torch.set_num_threads(1)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers are those of CPUs, and a forked process cannot use a GPU


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two classes of twelve 20x18 images each."""
    root = tmp_path_factory.mktemp("photos")
    for k, folder in enumerate(("cats", "dogs")):
        (root / folder).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.RandomState(100 * k + i).randint(0, 256, (18, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.{'PNG' if i % 2 else 'png'}")
    return root


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """The folder of a small VAE that halves images."""
    return toy_vae(tmp_path_factory.mktemp("vae"), 0)
