"""inputs/shapes.py: the data set that needs no download."""

import numpy as np
import torch

from inputs.shapes import Shapes, draw_shape


def test_shapes_are_drawn_from_index_and_seed():
    first, again, other = Shapes(16, 40), Shapes(16, 40), Shapes(16, 40, seed=1)
    i = np.arange(20)
    assert torch.equal(first[i][0], again[i][0]) and not torch.equal(first[i][0], other[i][0])
    assert first[i][1].tolist() == [*range(10)] * 2 and len(first.classes) == 10
    one_of_each = [draw_shape(label, 16, (0, 13)) for label in range(10)]
    assert len({image.tobytes() for image in one_of_each}) == 10  # on the same ground, in the same colours
    assert np.array_equal(first[[13]][0][0].permute(1, 2, 0), one_of_each[3])
