"""Tasks on a small model, and what their merged gradient has to be."""

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference
from tests.linear_problems import Kind, linear_loss

FIXED = "tensorflow"


"""A variant that draws nothing, so that the order in which tasks come cannot change its numbers."""


class Weighted(methods.Method):
    """The given weights, whatever the gradients are; remembers the Gram matrices that it saw."""

    def __init__(self, *weights):
        self.given = torch.tensor(weights, dtype=torch.float64)
        self.seen = []

    def solve(self, gram):
        self.seen.append(gram)
        return methods.Solution(self.given, None)


class Setting:
    """Three parameters; task 0, 1 and 2 each conflict with both others; the last parameter is a head of task 2."""

    def __init__(self, dtype=torch.float64, **options):
        self.parameters = [Kind(shape).parameter(dtype) for shape in ((4, 3), (), (5,))]
        values = torch.Generator().manual_seed(7)
        common = [torch.randn(p.shape, generator=values, dtype=torch.float64) for p in self.parameters]
        scattered = [
            [torch.randn(c.shape, generator=values, dtype=torch.float64) - (1 - t) * c for c in common]
            for t in range(3)
        ]
        self.gradients = [[*task[:2], task[2] if t == 2 else None] for t, task in enumerate(scattered)]
        options.setdefault("method", methods.PCGrad(FIXED))
        self.surgery = fastpcgrad.GradientSurgery(options.pop("source", self.parameters), 3, **options)

    def fill(self, *tasks):
        for t in tasks:
            with self.surgery.task(t):
                self.loss(t).backward()

    def loss(self, task):
        return linear_loss(self.parameters, self.gradients[task])

    def oracle(self, *tasks, variant=FIXED, **options):
        chosen = [self.gradients[t] for t in sorted(tasks)]
        return reference.merge(chosen, self.parameters, variant, **options)

    def fails(self, task):
        """Enter a task, run its backward, and leave it by an exception."""
        with pytest.raises(ZeroDivisionError), self.surgery.task(task):
            self.loss(task).backward()
            raise ZeroDivisionError

    def assert_grad(self, expected):
        for p, e in zip(self.parameters, expected, strict=True):
            assert (p.grad is None) == (e is None)
            if e is not None:
                torch.testing.assert_close(p.grad, e.to(p.dtype))


def snapshot(parameters):
    return [(p.grad, None if p.grad is None else p.grad.clone()) for p in parameters]


def assert_unchanged(parameters, before):
    for p, (grad, values) in zip(parameters, before, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, values)
