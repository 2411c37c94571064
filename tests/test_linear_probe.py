"""experiments/linear_probe.py: the classifier is the one that it says, and its accuracy is that of images left out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from experiments import linear_probe
from experiments.linear_probe import FOLDS, PATCHES, PENALTY, cross_validate, fit, probe, split_folds
from test_irepa import normal


def tokens_of(labels, centres, spread, count=20):
    """Tokens [N, count, D] around the centre of each label, and their means [N, D]."""
    tokens = centres[labels][:, None] + normal(51, len(labels), count, centres.shape[1]) * spread
    return tokens, tokens.mean(1)


def test_separable_tokens_are_told_apart_and_shuffled_labels_are_not():
    labels = np.arange(200) % 4
    tokens, mean = tokens_of(labels, torch.eye(4, 6) * 5, spread=0.3)
    right = probe(mean, tokens[:, :PATCHES], labels)
    assert all(accuracy.tolist() == [100] * FOLDS for accuracy in right.values()) and len(right) == 2
    shuffled = np.random.RandomState(52).permutation(labels)
    error = 100 * (0.25 * 0.75 / 200) ** 0.5  # of the share of 200 guesses that are right
    for accuracy in probe(mean, tokens[:, :PATCHES], shuffled).values():
        assert abs(accuracy.mean() - 25) < 3 * error
    assert linear_probe.chance(shuffled) == 25 and linear_probe.chance(np.array([0, 0, 2, 0])) == 75


def test_what_cancels_in_the_mean_is_seen_by_no_linear_probe():
    labels = np.arange(200) % 2
    half = torch.eye(2, 3)[labels][:, None] * 5 + normal(53, 200, 8, 3)  # classes differ in the axis of their tokens
    tokens = torch.cat([half, -half], dim=1)
    for accuracy in probe(tokens.mean(1) + normal(54, 200, 3), tokens, labels).values():
        assert abs(accuracy.mean() - 50) < 3 * 100 * (0.25 / 200) ** 0.5


def test_patches_teach_other_weights_than_the_mean():
    labels = np.arange(400) % 2
    sign = torch.from_numpy(labels * 2.0 - 1)[:, None].float()
    noise = normal(55, 400, 8, 1) * 30
    told = sign[:, None] + torch.cat(
        [noise, -noise], dim=1
    )  # the first feature is drowned in each patch, not in the mean
    vague = (sign + normal(56, 400, 1) * 2)[:, None].expand(-1, 16, -1)  # the second one is equally vague in both
    tokens = torch.cat([told, vague], dim=2)
    right = probe(tokens.mean(1), tokens, labels)
    assert right["accuracy"].min() == 100 and 60 < right["accuracy_patches"].mean() < 80


def test_an_image_is_put_where_the_mean_of_its_tokens_logits_is_largest():
    labels = np.arange(60) % 3
    tokens, mean = tokens_of(labels, torch.eye(3, 5), spread=3.0)
    learned, fold = tokens[:, :4], split_folds(labels)
    right = cross_validate(learned, mean, labels)
    for left_out in range(FOLDS):
        test = torch.from_numpy(fold == left_out)
        y = torch.from_numpy(labels)
        logits = fit(learned[~test].flatten(0, 1), y[~test].repeat_interleave(4), 3)
        voted = torch.stack([logits(image).mean(0) for image in tokens[test]]).argmax(1)
        assert right[left_out] == pytest.approx((voted == y[test]).double().mean().item() * 100)
    assert right.min() < 100  # not so easy that all would be right


def test_the_fit_is_the_optimum_that_scipy_finds():
    x, y = normal(57, 80, 4) * torch.tensor([1.0, 10, 0.1, 1]) + 3, torch.arange(80) % 3
    x[:, 0] += y
    z = ((x - x.mean(0)) / x.std(0, unbiased=False)).double()

    def loss(w):
        w = torch.tensor(w.reshape(5, 3), requires_grad=True)
        value = F.cross_entropy(z @ w[:4] + w[4], y) + PENALTY / 2 * w[:4].square().sum()
        value.backward()
        return value.item(), w.grad.numpy().flatten()

    w = torch.tensor(minimize(loss, np.zeros(15), jac=True, options=dict(gtol=1e-9)).x.reshape(5, 3))
    expected = (z @ w[:4] + w[4]).softmax(1)
    constant = torch.cat([x, torch.full((80, 1), 7.3)], dim=1)  # a feature that says nothing
    for features in (x, constant):
        got = fit(features, y, 3)(features).double().softmax(1)
        assert torch.allclose(got, expected, atol=1e-3)


def test_folds_hold_as_many_of_each_class():
    labels = np.repeat([0, 1, 4], [13, 5, 11])
    fold = split_folds(labels)
    counts = np.array([np.bincount(fold[labels == label], minlength=FOLDS) for label in (0, 1, 4)])
    assert np.ptp(counts, axis=1).max() <= 1 and np.ptp(counts.sum(0)) <= 1
    assert np.array_equal(fold, split_folds(labels)) and not np.array_equal(np.sort(fold[:13]), fold[:13])


def test_patches_are_drawn_once_and_for_all():
    drawn = linear_probe.draw_patches(7, 256)
    assert drawn.shape == (7, PATCHES) and all(len(set(row)) == PATCHES for row in drawn.tolist())
    assert torch.equal(drawn, linear_probe.draw_patches(7, 256)) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    "labels,message",
    [([0] * 9, "two classes at least"), ([0] * 9 + [2] * 4, "needs 5 images of each class, .* 4 are of c:")],
)
def test_labels_that_cannot_be_cross_validated(labels, message):
    with pytest.raises(ValueError, match=message):
        linear_probe.check_labels(np.array(labels), ["a", "b", "c"])
    linear_probe.check_labels(np.array([*labels, 2, *[1] * 5, *[2] * 5]), ["a", "b", "c", "without images"])
