"""How well a linear classifier tells the classes from an encoder's tokens, beside how much spatial structure they have.

Multinomial logistic regression, each feature standardised on the training images, the mean cross-entropy plus
PENALTY / 2 times the squared weights, minimised by L-BFGS; five folds, each class spread evenly over them. It learns
from the mean token of each image, or from PATCHES of its tokens, each with the image's label. An image is put into the
class of the largest mean of its tokens' logits: as these are linear, the logits of the mean token. So neither sees what
cancels in the mean; they differ in what the weights were learned from.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

FOLDS = 5
PATCHES = 16  # tokens of each image that the probe of patches learns from
PENALTY = 0.01
PROBES = "accuracy", "accuracy_patches"  # of mean tokens, of patches


def check_labels(labels, classes):
    """ValueError where int [N] of these images cannot be cross-validated. classes: their names."""
    counts = np.bincount(labels, minlength=len(classes))
    if np.count_nonzero(counts) < 2:
        raise ValueError("--probe needs two classes at least, and all images are of one: give --data class folders")
    few = np.flatnonzero((counts > 0) & (counts < FOLDS))
    if len(few):
        name, count = classes[few[0]], counts[few[0]]
        raise ValueError(
            f"--probe needs {FOLDS} images of each class, one a fold, and of those measured {count} are of {name}:"
            " raise --images, or leave the class out"
        )


def split_folds(labels):
    """int [N] -> the fold of each image, int [N], always the same: each class is spread evenly, remainders too."""
    random, fold, start = np.random.default_rng(0), np.empty(len(labels), int), 0
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        fold[members] = (start + np.arange(len(members))) % FOLDS
        start += len(members)
    return fold


def draw_patches(count, tokens):
    """Which of its tokens the probe of patches learns from, of each image -> int [count, PATCHES], always the same."""
    order = np.random.default_rng(0).random((count, tokens)).argsort(1)
    return torch.from_numpy(order[:, :PATCHES])


def fit(x, y, classes):
    """x float32 [N, D], y int64 [N] in [0, classes) -> a function from [M, D] to logits [M, classes]."""
    mean, std = x.mean(0), x.std(0, unbiased=False)
    std = torch.where(std > 1e-6 * mean.abs(), std, math.inf)  # a feature that is constant says nothing
    x = (x - mean) / std
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-8, line_search_fn="strong_wolfe"
    )

    def loss():
        search.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + PENALTY / 2 * weight.square().sum()
        value.backward()
        return value

    search.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return lambda z: (z - mean) / std @ weight + bias


def cross_validate(learned, mean, labels):
    """The share of images, in percent, that are put into their class, of each fold left out -> float64 [FOLDS].

    learned: float [N, P, D], the tokens of each image that are learned from; mean: [N, D], the mean of all of its
    tokens; labels: int [N], as check_labels allows.
    """
    _, labels = np.unique(labels, return_inverse=True)  # classes without images are none
    fold, y, right = split_folds(labels), torch.from_numpy(labels).to(mean.device), []
    for left_out in range(FOLDS):
        test = torch.from_numpy(fold == left_out).to(mean.device)
        x = learned[~test].float()  # (N', P, D)
        logits = fit(x.flatten(0, 1), y[~test].repeat_interleave(x.shape[1]), int(y.max()) + 1)
        right.append((logits(mean[test].float()).argmax(1) == y[test]).double().mean().item() * 100)
    return np.array(right)


def probe(mean, patches, labels):
    """Mean tokens [N, D] and some tokens of each image [N, P, D] -> {of PROBES: float64 [FOLDS], in percent}."""
    return {name: cross_validate(x, mean, labels) for name, x in zip(PROBES, (mean[:, None], patches))}


def chance(labels):
    """The accuracy, in percent, of always saying the largest class."""
    return np.bincount(labels).max() / len(labels) * 100
