"""The backend of last resort: vectorised torch, any device. Accurate (float64 throughout), not fast."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _ops
from ..variants import Guards
from .sorting_network import sorting_network
from .stacked import Stacked, batch_columns

_CHUNK = 1 << 16
"""Columns a step: bounds the float64 copies, and is fixed, so that the sums have one order."""
_PART = 1 << 10
"""Columns of one matrix product: a longer one may be cut by the number of threads, and then rounds differently."""

_ENTRIES = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Of J that are sorted at a time: few enough for a CPU's cache, many enough to fill a GPU."""


LARGEST_TASKS = sys.maxsize


def why_unavailable(device_type: str) -> str | None:
    return None


def _chunks(grads: Tensor, segments: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """(segment, first column, last column) of each step."""
    offsets = [0, grads.shape[1]] if segments is None else segments.tolist()
    for s, (first, last) in enumerate(pairwise(offsets)):
        for a in range(first, last, _CHUNK):
            yield s, a, min(a + _CHUNK, last)


def _batched(matrix: Tensor, segments: Tensor | None) -> Tensor:
    return matrix[None] if segments is None else matrix


def gram(grads: Tensor, segments: Tensor | None) -> Tensor:
    result = _ops.new_gram(grads, segments).zero_()
    for s, a, b in _chunks(grads, segments):
        _batched(result, segments)[s] += _products(grads[:, a:b])
    return result.tril() + result.tril(-1).mT  # to the bit symmetric, which a matrix product need not be


def _products(rows: Tensor) -> Tensor:
    parts = pad(rows.double(), (0, -rows.shape[1] % _PART)).unflatten(1, (-1, _PART)).movedim(1, 0)
    return (parts @ parts.mT).sum(dim=0)


def pcgrad_coefficients(gram: Tensor, order: Tensor, guards: Guards) -> Tensor:
    """All rows i of all matrices at once: a step for each place in the order."""
    tasks, order = gram.shape[-1], _ops.beside(order, gram)
    g = gram.reshape(-1, tasks, tasks)
    batch, device = g.shape[0], gram.device
    diagonal = g.diagonal(dim1=1, dim2=2)
    valid = ((order >= 0) & (order < tasks)).all(dim=-1).expand(batch, tasks)
    places = order.clamp(0, max(tasks - 1, 0)).expand(batch, tasks, tasks)
    matrices = torch.arange(batch, device=device)[:, None]
    rows = torch.arange(tasks, device=device)
    coefficients = torch.eye(tasks, dtype=torch.float64, device=device).repeat(batch, 1, 1)
    v = g.clone()
    for step in range(tasks):
        j = places[:, :, step]
        dot = v.gather(2, j[:, :, None])[:, :, 0]
        squared_norm = diagonal.gather(1, j)
        project = (dot < 0) & (dot > -torch.inf)
        project &= (squared_norm > guards.min_squared_norm) & (squared_norm < torch.inf)
        if not guards.self_projection:
            project &= j != rows
        c = torch.where(project, -dot / (squared_norm + guards.eps), 0.0)
        coefficients[matrices, rows, j] += c
        # where, not a product: 0·NaN of a row that takes no part must not enter.
        v = torch.where(project[:, :, None], v + c[:, :, None] * g[matrices, j], v)
    coefficients.masked_fill_(~valid[:, :, None], torch.nan)
    return coefficients.reshape(gram.shape)


def combine(grads: Tensor, weights: Tensor, segments: Tensor | None, out: Tensor) -> None:
    rows = _batched(weights, segments)
    for s, a, b in _chunks(grads, segments):
        out[a:b] = rows[s] @ grads[:, a:b].double()


def mix_(grads: Tensor, coefficients: Tensor, segments: Tensor | None) -> None:
    matrices = _batched(coefficients, segments)
    for s, a, b in _chunks(grads, segments):
        grads[:, a:b] = matrices[s] @ grads[:, a:b].double()


def pcgrad(
    grads: Tensor,
    order: Tensor,
    guards: Guards,
    scale: float,
    segments: Tensor | None,
    out: Tensor,
    figures: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    matrix = gram(grads, segments)
    coefficients = pcgrad_coefficients(matrix, order, guards)
    weights = scale * coefficients.sum(dim=-2)
    combine(grads, weights, segments, out)
    return matrix, coefficients, weights


def pcgrad_(
    grads: Tensor,
    order: Tensor,
    guards: Guards,
    segments: Tensor | None,
    figures: bool = True,
) -> tuple[Tensor, Tensor]:
    matrix = gram(grads, segments)
    coefficients = pcgrad_coefficients(matrix, order, guards)
    mix_(grads, coefficients, segments)
    return matrix, coefficients


def sign_sums(rows: Sequence[Tensor | None], weights: Sequence[float] | None, sums: Tensor) -> None:
    positive, negative = sums.zero_()
    for row, weight in zip(rows, [1.0] * len(rows) if weights is None else weights, strict=True):
        if row is not None:
            entries = row.to(sums.dtype)
            positive.add_(entries.clamp_min(0), alpha=weight)
            negative.add_(entries.clamp_max(0), alpha=weight)


def trimmed_mean(rows: Sequence[Tensor | None], trim: int, out: Tensor) -> None:
    dtype = torch.promote_types(out.dtype, torch.float32)
    network = sorting_network(len(rows)) if trim else ()
    step = max(1, _ENTRIES.get(out.device.type, _ENTRIES["cuda"]) // len(rows))
    for start in range(0, len(out), step):
        place = out[start : start + step]
        entries = [place.new_zeros(len(place), dtype=dtype) if r is None else r[start : start + step] for r in rows]
        columns = torch.stack([part.to(dtype) for part in entries])
        place.copy_(_trimmed_mean(columns, trim, network))


def _trimmed_mean(columns: Tensor, trim: int, network: Sequence[tuple[int, int]]) -> Tensor:
    entries = list(columns)
    for low, high in network:
        small = torch.minimum(entries[low], entries[high])
        entries[high] = torch.maximum(entries[low], entries[high])
        entries[low] = small
    merged = torch.stack(entries[trim : len(entries) - trim]).mean(dim=0)
    return merged.add_((columns * 0).sum(dim=0))  # zero, or NaN where an entry is not finite


def method_weights(name: str, gram: Tensor, parameters: Sequence[float], preference: Tensor | None) -> None:
    """None: methods have NumPy, which takes less time than torch."""


def gradvac(gram: Tensor, places: Tensor, beta: float, eps: float, targets: Tensor) -> None:
    """None, see ``method_weights``."""


def workspace_nbytes(tasks: int, widths: Sequence[int], dtype: torch.dtype, problems: int) -> int:
    """A batch of blocks with float64 copies of a step, one padded, or one and its products; or what a solve copies."""
    columns = batch_columns(tasks, sum(widths), dtype)
    parts, square = -(-min(columns, _CHUNK) // _PART), tasks * tasks
    step = tasks * parts * _PART
    passes = tasks * columns * dtype.itemsize + 8 * (step + max(step, (parts + 4) * square))
    return max(passes, 8 * 5 * problems * square)


_stacked = Stacked(gram, pcgrad_coefficients, combine)
gram_blocks, combine_blocks, pcgrad_blocks = _stacked.gram_blocks, _stacked.combine_blocks, _stacked.pcgrad_blocks
