"""inputs/descriptors.py: HOG and SIFT are their definitions."""

import numpy as np
import pytest
import torch

from inputs.teachers import load_encoder


def test_hog():
    hog = load_encoder("hog", grid=4)
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32)).astype(np.uint8))
    tokens = hog(images)
    assert tokens.shape == (2, 16, hog.dim)
    some = torch.stack([tokens[0, 0, 0], tokens[0, 5, 17], tokens[1, 10, 64], tokens[1, 15, 127]])
    expected = torch.tensor([0.015196, 0.148627, 0.119787, 0.009257])  # scikit-image's, on these pixels
    torch.testing.assert_close(some, expected, rtol=1e-4, atol=1e-6)
    ramp = torch.arange(32, dtype=torch.uint8).mul(8)
    across = hog(ramp.expand(1, 3, 32, 32))  # a horizontal gradient votes for direction 0 alone
    down = hog(ramp[:, None].expand(1, 3, 32, 32))  # a vertical one for 90 degrees
    assert across.view(16, 16, 8)[..., 1:].abs().max() == 0 < across.view(16, 16, 8)[..., 0].min()
    assert down.view(16, 16, 8).sum((0, 1)).argmax() == 4
    with pytest.raises(ValueError, match="at least 8 px"):
        hog(images[..., :6, :6])


def test_sift():
    sift = load_encoder("sift", grid=4)
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32)).astype(np.uint8))
    tokens = sift(images)
    assert tokens.shape == (2, 16, sift.dim)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 16))
    ramp = torch.arange(32, dtype=torch.uint8).mul(8)
    for image, only in ((ramp.expand(1, 3, 32, 32), 0), (ramp[:, None].expand(1, 3, 32, 32), 2)):
        for direction, picture in ((only, image), (only + 4, 255 - image)):  # unlike HOG's, directions have a sign
            by_bin = sift(picture).view(16, 16, 8).sum((0, 1))
            assert by_bin.argmax() == direction and by_bin[direction] > 0.999 * by_bin.sum()
    shifted = sift(torch.roll(images, 8, dims=3))  # by one place of the grid; the border aside
    torch.testing.assert_close(shifted.view(2, 4, 4, -1)[:, :, 2], tokens.view(2, 4, 4, -1)[:, :, 1])
    with pytest.raises(ValueError, match="two pixels for each token"):
        load_encoder("sift", 16)(images[..., :24, :24])
