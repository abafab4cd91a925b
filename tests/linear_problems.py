"""Multi-task problems whose gradients are known exactly: each loss is linear in the parameters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Gradients = list[Tensor | None]
"""One task's gradient for each parameter; None where the task does not touch it."""


class Kind(NamedTuple):
    """What a parameter looks like."""

    shape: tuple[int, ...]
    layout: str = "plain"

    def parameter(self, dtype: torch.dtype) -> torch.nn.Parameter:
        if self.layout == "transposed":
            value = torch.zeros(self.shape[::-1], dtype=dtype).permute(*reversed(range(len(self.shape))))
        elif self.layout == "gappy":
            value = torch.zeros((*self.shape[:-1], 2 * self.shape[-1]), dtype=dtype)[..., ::2]
        elif self.layout == "channels_last":
            value = torch.zeros(self.shape, dtype=dtype).to(memory_format=torch.channels_last)
        else:
            value = torch.zeros(self.shape, dtype=dtype)
        return torch.nn.Parameter(value)


KINDS = (
    Kind(()),
    Kind((0,)),
    Kind((3, 0)),
    Kind((1,)),
    Kind((7,)),
    Kind((32,)),
    Kind((9,), "gappy"),
    Kind((4, 4)),
    Kind((5, 3), "transposed"),
    Kind((3, 5), "gappy"),
    Kind((2, 3, 4), "transposed"),
    Kind((4, 3, 2, 2)),
    Kind((4, 3, 2, 2), "channels_last"),
)


@dataclass(frozen=True)
class Problem:
    kinds: list[Kind]
    gradients: list[Gradients]
    """For each task, in float64, of values that float32 holds exactly."""

    def parameters(self, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        return [kind.parameter(dtype) for kind in self.kinds]

    def losses(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [linear_loss(parameters, gradients) for gradients in self.gradients]


def linear_loss(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """A loss with these gradients. Every second parameter is used twice, as tied weights are."""
    loss = torch.zeros((), requires_grad=True).sum()  # so that a loss which touches no parameter has a graph too
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if gradient is None:
            continue
        weight = gradient.to(parameter.dtype)
        if index % 2:
            loss = loss + (parameter * (weight / 4)).sum() + (parameter * (weight * 0.75)).sum()
        else:
            loss = loss + (parameter * weight).sum()
    return loss


def random_problem(seed: int, max_tasks: int = 12, kinds: Sequence[Kind] = KINDS) -> Problem:
    """Trunk, heads, parameters that some or no tasks touch; zero, repeated and opposite gradients; any scale."""
    draw = random.Random(seed)
    values = torch.Generator().manual_seed(seed)
    (tasks,) = draw.choices(range(1, max_tasks + 1), [1 / t for t in range(1, max_tasks + 1)])
    chosen = draw.choices(kinds, k=draw.randint(1, 6))
    scale = 10.0 ** draw.uniform(-5, 3)
    base = [[(scale * torch.randn(kind.shape, generator=values)).double() for kind in chosen] for _ in range(tasks)]
    for t in range(tasks):
        special = draw.random()
        if special < 0.1:
            base[t] = [torch.zeros_like(g) for g in base[t]]
        elif special < 0.2:
            sign = draw.choice((1.0, -1.0))
            base[t] = [sign * g for g in base[draw.randrange(tasks)]]
    owners = [_owners(draw, tasks) for _ in chosen]
    gradients = [[g if t in who else None for g, who in zip(task, owners, strict=True)] for t, task in enumerate(base)]
    return Problem(chosen, gradients)


def _owners(draw: random.Random, tasks: int) -> set[int]:
    """The tasks that touch a parameter."""
    kind = draw.choices(("trunk", "head", "some", "nobody"), (60, 15, 20, 5))[0]
    if kind == "trunk":
        return set(range(tasks))
    if kind == "head":
        return {draw.randrange(tasks)}
    return {t for t in range(tasks) if kind == "some" and draw.random() < 0.5}
