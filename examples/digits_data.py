"""Two real handwritten digits on one canvas, overlapping as in MultiMNIST, from scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 8
"""Width and height of one scikit-learn digit."""
CANVAS = 12
"""Width and height of the composed image: the digits share 4 to 6 of their 8 rows, and of their 8 columns."""
JITTER = 1
"""Each digit moves by 0 or 1 pixel from its corner towards the centre, down and across independently."""
TRAIN_SHARE = 0.75

TASKS = {"left digit": 10, "right digit": 10, "left > right": 2}
"""Name and number of classes of each task. The third needs both digits, the first two each ignore one."""


@dataclass(frozen=True)
class TwoDigits:
    """Images with the labels of their tasks.

    Attributes:
        images: ``[n, CANVAS, CANVAS]``, 0 to 1.
        labels: ``[n, tasks]`` int64, in the order of ``TASKS``.
        sources: ``[n, 2]``: which scikit-learn digits the left and the right one are.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor

    def __len__(self) -> int:
        return len(self.images)


def two_digits(train_size: int, test_size: int, seed: int) -> tuple[TwoDigits, TwoDigits]:
    """Compose a training and a test set. No digit that appears in one appears in the other."""
    generator = torch.Generator().manual_seed(seed)
    bunch = load_digits()
    digits = torch.as_tensor(bunch.images, dtype=torch.float32) / 16
    targets = torch.as_tensor(bunch.target, dtype=torch.int64)
    shuffled = torch.randperm(len(digits), generator=generator)
    cut = int(len(digits) * TRAIN_SHARE)
    train = _compose(digits, targets, shuffled[:cut], train_size, generator)
    test = _compose(digits, targets, shuffled[cut:], test_size, generator)
    return train, test


def _compose(digits: Tensor, targets: Tensor, pool: Tensor, size: int, generator: torch.Generator) -> TwoDigits:
    sources = pool[torch.randint(len(pool), (size, 2), generator=generator)]
    shifts = torch.randint(JITTER + 1, (2, size, 2), generator=generator)
    upper_left = _place(digits[sources[:, 0]], shifts[0])
    lower_right = _place(digits[sources[:, 1]], CANVAS - SIDE - shifts[1])
    left, right = targets[sources].unbind(1)
    labels = torch.stack([left, right, (left > right).long()], dim=1)
    return TwoDigits(torch.maximum(upper_left, lower_right), labels, sources)


def _place(digits: Tensor, corners: Tensor) -> Tensor:
    """Draw each digit on an empty canvas with its upper-left pixel at ``corners`` [n, 2] (row, column)."""
    canvas = torch.zeros(len(digits), CANVAS, CANVAS)
    image = torch.arange(len(digits))[:, None, None]
    rows = corners[:, 0, None, None] + torch.arange(SIDE)[:, None]
    columns = corners[:, 1, None, None] + torch.arange(SIDE)
    canvas[image, rows, columns] = digits
    return canvas
