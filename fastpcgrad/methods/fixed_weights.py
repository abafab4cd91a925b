"""Baselines whose weights do not depend on the task gradients.

They do not look at G, so NaN and inf stay in the columns of J where they arose: ``combine`` hides none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import to_device
from ._task_vector import TaskVector, check_length, task_vector
from .base import Method, Solution
from .solvers.problems import check_gram


class FixedWeights(Method):
    """A method whose weights are known before the gradients: its ``solve`` takes but the shape of G."""


class Mean(FixedWeights):
    """The mean of the task gradients: weights 1/T.

    Example:
        >>> fastpcgrad.methods.Mean().weights(torch.eye(4, dtype=torch.float64))
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        return Solution(gram.new_full(gram.shape[:-1], 1 / gram.shape[-1]), None)

    def __repr__(self) -> str:
        return "Mean()"


class Sum(FixedWeights):
    """The sum of the task gradients, which is the gradient of the summed losses: weights 1.

    Example:
        >>> fastpcgrad.methods.Sum().weights(torch.eye(2, dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)
    """

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        return Solution(gram.new_full(gram.shape[:-1], 1.0), None)

    def __repr__(self) -> str:
        return "Sum()"


class Constant(FixedWeights):
    """The task gradients with given weights.

    Args:
        weights: of each task, ``[T]``, finite.
    Raises:
        TypeError, ValueError: bad weights; when solving, a number of tasks that does not fit.
    Example:
        >>> fastpcgrad.methods.Constant([0.5, 2.0]).weights(torch.eye(2, dtype=torch.float64))
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """

    def __init__(self, weights: TaskVector) -> None:
        self.task_weights = task_vector("weights", weights)
        self._array = self.task_weights.numpy()
        self._gram_shape = (len(self._array), len(self._array))

    def solve(self, gram: Tensor) -> Solution:
        if getattr(gram, "shape", None) != self._gram_shape or gram.dtype != torch.float64:
            check_gram(gram)
            check_length("weights", self.task_weights, gram.shape[-1])
        # A copy: what the caller does with the answer must not change the next one. NumPy's takes half of torch's time.
        weights = torch.from_numpy(self._array.copy())
        if gram.dim() == 3:
            weights = weights.repeat(len(gram), 1)
        return Solution(weights if gram.is_cpu else to_device(weights, gram.device, constant=True), None)

    def __repr__(self) -> str:
        return f"Constant(weights={self.task_weights.tolist()})"


class RandomWeights(FixedWeights):
    """Random weights: the softmax of T independent standard normal numbers, drawn anew for each problem.

    Args:
        generator: where the numbers are drawn, float64, on its device; for S problems S times T numbers in turn.
            None: the global generator of the device of G.
    Raises:
        TypeError: a generator of another type.
    Source: Lin et al. 2022, Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning,
        arXiv:2111.10603 (RLW, normal distribution). Oracle: ``reference.random_weights``.
    Example:
        >>> method = fastpcgrad.methods.RandomWeights(torch.Generator().manual_seed(0))
        >>> method.weights(torch.eye(3, dtype=torch.float64)).sum()
        tensor(1., dtype=torch.float64)
    """

    generator: torch.Generator | None

    def __init__(self, generator: torch.Generator | None = None) -> None:
        check_generator(generator)
        self.generator = generator

    def solve(self, gram: Tensor) -> Solution:
        shape, generator = check_gram(gram), self.generator
        if generator is None and gram.is_cpu and len(shape) == 2:  # arguments that say nothing take their time
            return Solution(torch.randn(shape[0], dtype=torch.float64).softmax(-1), None)
        device = gram.device if generator is None else generator.device
        if gram.dim() == 2:
            normal = torch.randn(gram.shape[-1], generator=generator, dtype=torch.float64, device=device)
        else:  # one by one: a single draw of S × T numbers would give others than S draws of T
            normal = gram.new_empty(gram.shape[:-1], device=device)
            for problem in normal:
                problem.normal_(generator=generator)
        weights = torch.softmax(normal, -1)
        return Solution(weights if generator is None else to_device(weights, gram.device), None)

    def __repr__(self) -> str:
        return f"RandomWeights(generator={self.generator})"


def check_generator(generator: object) -> None:
    """TypeError unless ``generator`` is None or a ``torch.Generator``."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None; found {generator!r}")
