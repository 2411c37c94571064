"""inputs/shapes.py: the data set that needs no download."""

import numpy as np
import torch

from inputs.shapes import Shapes


def test_shapes_are_drawn_from_index_and_seed():
    first, again, other = Shapes(16, 40), Shapes(16, 40), Shapes(16, 40, seed=1)
    i = np.arange(20)
    assert torch.equal(first[i][0], again[i][0]) and not torch.equal(first[i][0], other[i][0])
    assert first[i][1].tolist() == [*range(10)] * 2 and len(first.classes) == 10
