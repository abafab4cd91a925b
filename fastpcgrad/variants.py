"""Every published PCGrad as data: what its order, guard, reduction and scope are.

No maths: the projections themselves run on the Gram matrix in the backends. A variant draws its order from the
same generator, in the same calls, as its original does, so that the same seed gives the original's numbers and
leaves the generator in the original's state.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _modes
from ._named import named

Generator = torch.Generator | random.Random


class Guards(NamedTuple):
    """When a task gradient j is projected away from i.

    Attributes:
        self_projection: whether j = i takes part.
        eps: added to ‖g_j‖² in the denominator.
        min_squared_norm: j takes part only where ‖g_j‖² exceeds it.
    """

    self_projection: bool = False
    eps: float = 0.0
    min_squared_norm: float = 0.0


Reduction = Literal["sum", "mean"]


_PLAIN = Guards()


class Shuffler(Protocol):
    """What ``random`` and ``random.Random`` have in common."""

    def shuffle(self, items: list[int], /) -> None: ...


@dataclass(frozen=True)
class Variant:
    """One published PCGrad.

    Attributes:
        name: how users ask for it.
        order: ``fixed``: 0..T-1 for each i. ``fresh``: a new permutation for each i. ``cumulative``: one list,
            shuffled again before each i.
        source: which global generator the original draws from when none is given.
        guards: when one gradient is projected away from another.
        reduction: how the projected rows become one gradient unless the caller chooses.
        partial_sum: under ``mean``, parameters that only some tasks touch are summed instead.
        scope: what one surgery spans. ``all``: the whole parameter vector. ``shared``: the parameters that every
            task touches, the others are summed. ``parameter``: each parameter by itself; one that any task
            lacks gets no gradient.
    """

    name: str
    order: Literal["fixed", "fresh", "cumulative"]
    source: Literal["none", "torch", "python"]
    guards: Guards = _PLAIN
    reduction: Reduction = "sum"
    partial_sum: bool = False
    scope: Literal["all", "shared", "parameter"] = "all"

    def draw_order(self, tasks: int, generator: Generator | None = None) -> Tensor:
        """The order of j for each i, ``[T, T]`` int64 on the CPU; advances the generator as the original does."""
        if self.order == "fixed":
            return torch.arange(tasks, device="cpu").repeat(tasks, 1)
        if isinstance(generator, torch.Generator) or (generator is None and self.source == "torch"):
            return self._draw_with_randperm(tasks, generator)
        return self._draw_with_shuffle(tasks, random if generator is None else generator)

    def _draw_with_randperm(self, tasks: int, generator: torch.Generator | None) -> Tensor:
        rows = [torch.randperm(tasks, generator=generator, device="cpu") for _ in range(tasks)]
        if self.order == "cumulative":
            for i in range(1, tasks):
                rows[i] = rows[i - 1][rows[i]]
        return torch.stack(rows)

    def _draw_with_shuffle(self, tasks: int, source: Shuffler) -> Tensor:
        rows: list[tuple[int, ...]] = []
        items = list(range(tasks))
        for _ in range(tasks):
            if self.order == "fresh":
                items = list(range(tasks))
            source.shuffle(items)
            rows.append(tuple(items))
        if tasks > 3 or torch.compiler.is_compiling() or _modes.is_on():
            return torch.tensor(rows, dtype=torch.int64, device="cpu")
        return _small_order(tuple(rows))

    def draw_orders(self, tasks: int, count: int | None, generator: Generator | None = None) -> Tensor:
        """One order ``[T, T]``, or for ``count`` independent problems one each: ``[count, T, T]``."""
        if count is None or self.order == "fixed":
            return self.draw_order(tasks, generator)
        orders = [self.draw_order(tasks, generator) for _ in range(count)]
        return torch.stack(orders) if orders else torch.empty(0, tasks, tasks, dtype=torch.int64, device="cpu")


@cache
def _small_order(rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """The few orders of up to three tasks, made once: for a small model a new tensor is a cost.

    They are for every later call: a mode or a tracer would put tensors of its own here.
    """
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64, device="cpu")


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("paper", order="fresh", source="torch"),
        Variant(
            "pytorch-pcgrad",
            order="cumulative",
            source="python",
            guards=Guards(self_projection=True),
            reduction="mean",
            partial_sum=True,
        ),
        Variant("tensorflow", order="fixed", source="none", guards=Guards(self_projection=True)),
        Variant("torchjd", order="fresh", source="torch"),
        Variant(
            "libmtl", order="fresh", source="python", guards=Guards(self_projection=True, eps=1e-8), scope="shared"
        ),
        Variant(
            "tensorlogic",
            order="fixed",
            source="none",
            guards=Guards(min_squared_norm=1e-8),
            reduction="mean",
            scope="parameter",
        ),
    )
}


def get(name: str) -> Variant:
    """The variant of that name; ValueError shows what was asked for and what there is."""
    return named("variant", name, VARIANTS)


def check_generator(generator: object) -> None:
    """TypeError unless ``generator`` is None, a torch CPU generator or a ``random.Random``."""
    if generator is None or isinstance(generator, random.Random):
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, a random.Random or None; found {generator!r}")
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be a CPU generator: orders are drawn there; found {generator.device}")
