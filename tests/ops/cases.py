"""Shared inputs of the op tests, and the one measure of their errors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from fastpcgrad import reference, variants
from tests.conftest import BACKENDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-14}
GRAM_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-13}

_SEGMENTS = {
    0: (0, 0, 0),
    1: (0, 0, 1),
    63: (0, 63),
    1000: (0, 0, 1, 1, 417, 1000, 1000),
    100_003: (0, 5, 40_000, 40_000, 100_003),
}
_LAYOUTS = {"dense": (0, 0), "padded": (16, 48), "unaligned": (1, 3)}
"""Name -> (elements before the first row, elements between two rows)."""


@dataclass(frozen=True)
class Case:
    tasks: int
    width: int
    dtype: torch.dtype
    values: str = "correlated"
    layout: str = "dense"
    segments: tuple[int, ...] | None = None

    def __str__(self) -> str:
        name = f"{self.tasks}x{self.width}-{str(self.dtype).removeprefix('torch.')}-{self.values}-{self.layout}"
        return name if self.segments is None else f"{name}-{len(self.segments) - 1}segments"

    @property
    def per_segment(self) -> tuple[int, ...]:
        return () if self.segments is None else (len(self.segments) - 1,)

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.tasks * 1_000_003 + self.width)


def _sizes():
    layouts = itertools.cycle(_LAYOUTS)
    for tasks, width, dtype in itertools.product((1, 2, 3, 8, 17, 33), (0, 1, 63, 1000), DTYPES):
        if dtype in (torch.float32, torch.bfloat16) or tasks in (3, 17):
            yield Case(tasks, width, dtype, layout=next(layouts))
    for tasks, dtype in ((1, torch.float64), (2, torch.float32), (3, torch.bfloat16), (8, torch.float16)):
        yield Case(tasks, 100_003, dtype, layout=next(layouts))
    yield Case(8, 100_003, torch.float32, layout=next(layouts))
    yield Case(33, 100_003, torch.float32, layout=next(layouts))


def _segmented():
    for (width, segments), dtype in itertools.product(_SEGMENTS.items(), DTYPES):
        if width < 100_000 or dtype == torch.bfloat16:
            yield Case(3, width, dtype, layout="unaligned", segments=segments)
    yield Case(17, 1000, torch.float32, segments=_SEGMENTS[1000])


def _degenerate():
    for values, dtype in itertools.product(("zero_rows", "all_zero", "duplicates", "opposites"), DTYPES):
        yield Case(8, 1000, dtype, values)
    yield Case(3, 63, torch.float32, "zero_rows", segments=(0, 20, 63))


def _scaled():
    for values, dtype in itertools.product(("tiny", "huge", "mixed"), (torch.float32, torch.bfloat16)):
        yield Case(8, 1000, dtype, values)
        yield Case(3, 1000, dtype, values, "unaligned", segments=_SEGMENTS[1000])
    yield Case(2, 100_003, torch.float32, "mixed")


ALL = (*_sizes(), *_segmented(), *_degenerate(), *_scaled())
SOME = (
    Case(2, 1, torch.float32),
    Case(8, 1000, torch.float32, layout="padded"),
    Case(8, 1000, torch.bfloat16, layout="unaligned"),
    Case(3, 1000, torch.float16, segments=_SEGMENTS[1000]),
    Case(17, 63, torch.float64),
)
TINY = (
    Case(3, 63, torch.float32, layout="unaligned"),
    Case(3, 63, torch.bfloat16, segments=(0, 20, 20, 63)),
)


SUBNORMAL_SQUARES = (3e-23, 1e-22, 3e-21, 1e-19)
"""Sizes of numbers whose squares fp32 holds with a few bits only: between those that are 0 and the normal ones."""

on_all_backends = pytest.mark.parametrize("backend", (*BACKENDS, "triton"), indirect=True)


def on_each_backend(some, triton=()):
    """Parametrise a test by (backend, case); under its interpreter Triton is slow and has cases of its own."""
    pairs = [*itertools.product(BACKENDS, some), *itertools.product(["triton"], triton)]
    ids = [f"{backend}-{case}" for backend, case in pairs]
    return pytest.mark.parametrize(("backend", "case"), pairs, indirect=["backend"], ids=ids)


def on_each_backend_by_tasks(some, triton=()):
    """As above, but with all cases of a number of tasks at once: hundreds of tests take longer than what they do."""
    given = dict.fromkeys(BACKENDS, some) | {"triton": triton}
    groups = [
        pytest.param(backend, list(group), id=f"{backend}-{tasks}")
        for backend, found in given.items()
        for tasks, group in itertools.groupby(sorted(found, key=_tasks), key=_tasks)
    ]
    return pytest.mark.parametrize(("backend", "group"), groups, indirect=["backend"])


def _tasks(case):
    return case.tasks


@cache
def _correlated(tasks: int, width: int) -> torch.Tensor:
    """Rows with common directions of either sign, so that many pairs conflict."""
    generator = torch.Generator().manual_seed(tasks * 1_000_003 + width)
    directions = torch.randn(3, width, generator=generator)
    loadings = torch.randn(tasks, 3, generator=generator)
    return (torch.randn(tasks, width, generator=generator) + loadings @ directions).double()


@cache
def rows_of(case: Case) -> torch.Tensor:
    """The values of J for a case; not to be written to."""
    rows = _correlated(case.tasks, case.width).clone()
    if case.values == "zero_rows":
        rows[::2] = 0
    elif case.values == "all_zero":
        rows.zero_()
    elif case.values == "duplicates":
        rows[1::2] = rows[:-1:2]
    elif case.values == "opposites":
        rows[1::2] = -rows[:-1:2]
    elif case.values == "mixed":
        rows[::2] *= 1e-30
        rows[1::2] *= 1e10
    else:
        rows *= {"tiny": 1e-30, "huge": 1e18, "correlated": 1.0}[case.values]
    return rows.to(case.dtype)


def rows_of_one_size(tasks: int, width: int, size: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """±size, so that all squares are rounded alike and their errors add up."""
    generator = torch.Generator().manual_seed(tasks * 1_000_003 + width)
    return (torch.randn(tasks, width, generator=generator).sign() * size).to(dtype)


class Packed:
    """A case's J in a larger storage of NaN: reading beyond a row shows in the result, writing in the storage."""

    def __init__(self, case: Case) -> None:
        before, gap = _LAYOUTS[case.layout]
        stride = case.width + gap
        self.storage = torch.full((before + case.tasks * stride + 64,), torch.nan, dtype=case.dtype)
        self.grads = self.storage.as_strided((case.tasks, case.width), (stride, 1), before)
        self.rows = rows_of(case)
        self.grads.copy_(self.rows)

    def padding_is_untouched(self) -> bool:
        outside = self.storage.clone()
        outside.as_strided(self.grads.shape, self.grads.stride(), self.grads.storage_offset()).fill_(torch.nan)
        return bool(outside.isnan().all())

    def is_untouched(self) -> bool:
        return torch.equal(self.grads, self.rows) and self.padding_is_untouched()


@cache
def weights_of(case: Case) -> torch.Tensor:
    """Weights of either sign, a zero among them."""
    weights = torch.randn(*case.per_segment, case.tasks, generator=case.generator, dtype=torch.float64)
    weights[..., case.tasks // 2] = 0
    return weights


@cache
def matrix_of(case: Case) -> torch.Tensor:
    """Coefficients for ``mix_``, a zero in each row."""
    shape = (*case.per_segment, case.tasks, case.tasks)
    matrix = torch.randn(shape, generator=case.generator, dtype=torch.float64)
    matrix[..., case.tasks // 2] = 0
    return matrix


@cache
def order_of(case: Case) -> torch.Tensor:
    """A random order for each segment."""
    draws = torch.rand(*case.per_segment, case.tasks, case.tasks, generator=case.generator)
    return draws.argsort(dim=-1)


@cache
def exact_coefficients(case: Case, variant: str = "paper") -> torch.Tensor:
    """C of the float64 oracle for the case's rows and order, one for each segment."""
    chosen = variants.get(variant)
    guards = chosen.guards
    grams, order = reference.gram(rows_of(case), case.segments), order_of(case)
    if case.segments is None:
        return reference.coefficients(grams, order, *guards)
    return torch.stack([reference.coefficients(g, o, *guards) for g, o in zip(grams, order, strict=True)])


def error(found, rows, weights, segments=None):
    """The largest ‖m − m₆₄‖ / Σ_j |w_j| ‖g_j‖: ``found`` as w J against the oracle, in each segment.

    With a matrix for ``weights`` (and ``found`` of many rows) the largest of the rows. 0 where both norms are
    zero, inf where only the denominator is.
    """
    if found.dim() == 1:
        return error(found[None], rows, weights[..., None, :], segments)
    exact = reference.mix(rows, weights, segments)
    assert found.shape == exact.shape
    errors = [torch.zeros(1, dtype=torch.float64)]
    per_segment = weights[None] if segments is None else weights
    ranges = itertools.pairwise((0, rows.shape[1]) if segments is None else segments)
    for w, (a, b) in zip(per_segment, ranges, strict=True):
        distance = (found[:, a:b].double() - exact[:, a:b]).norm(dim=1)
        bound = w.abs() @ rows[:, a:b].double().norm(dim=1)
        errors.append(torch.where(distance == 0, 0.0, distance / bound))
    return float(torch.cat(errors).amax())
