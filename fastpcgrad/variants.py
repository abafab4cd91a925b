"""Every published PCGrad as data: what its order, guard, reduction and scope are.

No maths: the projections themselves run on the Gram matrix in the backends. A variant draws its order from the
same generator, in the same calls, as its original does, so that the same seed gives the original's numbers and
leaves the generator in the original's state.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from . import _modes
from ._named import named

Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState


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
Order = Literal["fixed", "once", "fresh", "cumulative", "others"]


_PLAIN = Guards()


class Shuffler(Protocol):
    """What ``random``, ``random.Random`` and NumPy's generators have in common."""

    def shuffle(self, items: list[int], /) -> None: ...


def permutations(count: int, size: int, generator: torch.Generator | None) -> Tensor:
    """``count`` times ``torch.randperm(size)``, ``[count, size]`` int64 on the CPU."""
    drawn = [torch.randperm(size, generator=generator, device="cpu") for _ in range(count)]
    return torch.stack(drawn) if drawn else torch.empty(0, size, dtype=torch.int64, device="cpu")


Permute = Callable[[int, int, torch.Generator | None], Tensor]
"""What draws from a generator of torch's as ``permutations`` does."""


@cache
def _unseeded() -> Shuffler:
    """What originals draw from that have a NumPy generator of their own, without a seed."""
    return np.random.default_rng()


@dataclass(frozen=True)
class Variant:
    """One published PCGrad.

    Attributes:
        name: how users ask for it.
        order: ``fixed``: 0..T-1 for each i. ``once``: one permutation for all i and all problems. ``fresh``: a new one
            for each i. ``cumulative``: one list, shuffled again before each i. ``others``: a new permutation of the
            tasks but i for each i, from a list with the last one in the place of i.
        source: which generator the original draws from when none is given: a global one, or NumPy's of its own.
        guards: when one gradient is projected away from another.
        norm_eps: added to ‖g_j‖: the denominator is (‖g_j‖ + norm_eps)² + eps. See ``guarded`` for where it can be.
        reduction: how the projected rows become one gradient unless the caller chooses.
        partial_sum: under ``mean``, parameters that only some tasks touch are summed instead.
        scope: what one surgery spans. ``all``: the whole parameter vector. ``shared``: the parameters that every
            task touches, the others are summed. ``parameter``: each parameter by itself; one that any task
            lacks gets no gradient.
    """

    name: str
    order: Order
    source: Literal["none", "torch", "python", "numpy"]
    guards: Guards = _PLAIN
    norm_eps: float = 0.0
    reduction: Reduction = "sum"
    partial_sum: bool = False
    scope: Literal["all", "shared", "parameter"] = "all"

    def draw_order(self, tasks: int, generator: Generator | None = None) -> Tensor:
        """The order of j for each i, ``[T, T]`` int64 on the CPU; advances the generator as the original does."""
        return self.draw_orders(tasks, None, generator)

    def draw(
        self, tasks: int, generator: Generator | None = None, permute: Permute = permutations
    ) -> list[tuple[int, ...]]:
        """The same as numbers: without a tensor where no generator of torch's draws it. For ``permute`` see
        ``draw_orders``."""
        source = self._shuffler(generator)
        if source is not None:
            return self._shuffled(tasks, source)
        return list(map(tuple, self.draw_orders(tasks, None, generator, permute).tolist()))

    def ordered(self, order: Order) -> Variant:
        """The same with another order; where the original draws nothing, from Python's global generator.

        Raises:
            ValueError: no order, or one that leaves j = i out where it takes part.
        """
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))} or None; found {order!r}")
        if order == "others" and self.guards.self_projection:
            raise ValueError(f"order='others' leaves j = i out, which variant={self.name!r} has")
        source = "python" if self.source == "none" and order != "fixed" else self.source
        return replace(self, order=order, source=source)

    def guarded(self, eps: float | None, norm_eps: float | None) -> Variant:
        """The same with other numbers in the denominator, (‖g_j‖ + norm_eps)² + eps; None: its own.

        Raises:
            ValueError: not finite or negative; norm_eps where a row's own element of G or its size counts.
        """
        for name, value in (("eps", eps), ("norm_eps", norm_eps)):
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative; found {value!r}")
        if norm_eps and (self.guards.self_projection or self.guards.min_squared_norm):
            raise ValueError(
                f"norm_eps needs a variant that neither projects on j = i nor leaves short gradients out; found "
                f"norm_eps={norm_eps!r} with variant={self.name!r}: take eps, or variant='paper' or 'torchjd'"
            )
        guards = self.guards if eps is None else self.guards._replace(eps=float(eps))
        return replace(self, guards=guards, norm_eps=self.norm_eps if norm_eps is None else float(norm_eps))

    def denominators(self, gram: Tensor) -> Tensor:
        """G with what projections divide by on its diagonal.

        Without self-projection no projection reads its row's own element, and that of j not after the one on j.
        """
        if not self.norm_eps:
            return gram
        gram = gram.clone()
        gram.diagonal(dim1=-2, dim2=-1).sqrt_().add_(self.norm_eps).square_()
        return gram

    def _by_randperm(self, tasks: int, count: int, generator: torch.Generator | None, permute: Permute) -> Tensor:
        """``count`` orders, ``[count, T, T]``."""
        if self.order == "once":
            return permute(count, tasks, generator)[:, None].repeat(1, tasks, 1)
        if self.order == "others":
            drawn = permute(count * tasks, tasks - 1, generator).view(count, tasks, tasks - 1)
            others = torch.tensor([_others(tasks, i) for i in range(tasks)], dtype=torch.int64, device="cpu")
            own = torch.arange(tasks, device="cpu")[:, None]
            return torch.cat([others.expand_as(drawn).gather(2, drawn), own.expand(count, tasks, 1)], dim=2)
        orders = permute(count * tasks, tasks, generator).view(count, tasks, tasks)
        if self.order == "cumulative":
            for i in range(1, tasks):
                orders[:, i] = orders[:, i - 1].gather(1, orders[:, i])
        return orders

    def _shuffler(self, generator: Generator | None) -> Shuffler | None:
        """What shuffles lists; None where torch draws the order, or nobody."""
        if self.order == "fixed" or isinstance(generator, torch.Generator):
            return None
        if generator is not None:
            shuffler: Any = generator  # NumPy's shuffle whatever is a sequence
            return shuffler
        if self.source == "torch":
            return None
        return _unseeded() if self.source == "numpy" else random

    def _shuffled(self, tasks: int, source: Shuffler) -> list[tuple[int, ...]]:
        rows: list[tuple[int, ...]] = []
        items = list(range(tasks))
        for i in range(tasks):
            if self.order == "fresh":
                items = list(range(tasks))
            elif self.order == "others":
                items = _others(tasks, i)
            if i == 0 or self.order != "once":
                source.shuffle(items)
            rows.append((*items, i) if self.order == "others" else tuple(items))
        return rows

    def _by_shuffle(self, tasks: int, source: Shuffler) -> Tensor:
        rows = self._shuffled(tasks, source)
        if torch.compiler.is_compiling() or _modes.is_on():
            return torch.tensor(rows, dtype=torch.int64, device="cpu")
        # By NumPy in half of the time.
        return torch.from_numpy(np.array(rows, dtype=np.int64)) if tasks > 3 else _small_order(tuple(rows))

    @property
    def draws(self) -> bool:
        """Whether the order is another one each time."""
        return self.order != "fixed"

    def draw_orders(
        self, tasks: int, count: int | None, generator: Generator | None = None, permute: Permute = permutations
    ) -> Tensor:
        """One order ``[T, T]``, or for ``count`` independent problems one each: ``[count, T, T]``.

        Args:
            permute: ``permutations``, or what gives the same in less time.
        """
        if self.order == "fixed":
            return torch.arange(tasks, device="cpu").repeat(tasks, 1)
        if self.order == "once":
            count = None
        source = self._shuffler(generator)
        if source is None:
            drawn_from: Any = generator
            if count is None and self.order == "fresh":  # what most draw: without the views below
                return permute(tasks, tasks, drawn_from)
            orders = self._by_randperm(tasks, 1 if count is None else count, drawn_from, permute)
            return orders[0] if count is None else orders
        if count is None:
            return self._by_shuffle(tasks, source)
        drawn = [self._by_shuffle(tasks, source) for _ in range(count)]
        return torch.stack(drawn) if drawn else torch.empty(0, tasks, tasks, dtype=torch.int64, device="cpu")


def _others(tasks: int, i: int) -> list[int]:
    """0..tasks-1 without i, in whose place the last one stands."""
    items = list(range(tasks))
    items[i] = items[-1]
    return items[:-1]


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


RELATIVES: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("cagrad", order="others", source="numpy", norm_eps=1e-8, reduction="mean"),
        Variant(
            "tensor2robot",
            order="once",
            source="python",
            guards=Guards(self_projection=True, eps=1e-5),
            scope="parameter",
        ),
        Variant(
            "samsunglabs", order="once", source="torch", guards=Guards(self_projection=True, eps=1e-5), scope="shared"
        ),
        Variant("libmtl-1.1.5", order="fresh", source="python", guards=Guards(self_projection=True), scope="shared"),
    )
}
"""Codes that differ from one of ``VARIANTS`` in their order, guard or scope alone."""
_ALL = {**VARIANTS, **RELATIVES}


def get(name: str) -> Variant:
    """The variant of that name; ValueError shows what was asked for and what there is."""
    return named("variant", name, _ALL)


def check_generator(generator: object) -> None:
    """TypeError unless ``generator`` is None, a torch CPU generator, a ``random.Random`` or one of NumPy."""
    if generator is None or isinstance(generator, random.Random | np.random.Generator | np.random.RandomState):
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            "generator must be a torch.Generator, a random.Random, a numpy.random.Generator or RandomState, "
            f"or None; found {generator!r}"
        )
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be a CPU generator: orders are drawn there; found {generator.device}")
