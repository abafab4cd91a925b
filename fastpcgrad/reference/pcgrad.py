"""PCGrad in every published variant, by plain loops over vectors.

In the dtype that it is given; compare with float64 inputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Generator = torch.Generator | random.Random
_Item = TypeVar("_Item")


def coefficients(
    gram: Tensor,
    order: Tensor,
    self_projection: bool = False,
    eps: float = 0.0,
    min_squared_norm: float = 0.0,
) -> Tensor:
    """C such that the projected row i is Σ_k C_ik g_k, from G ``[T, T]`` and ``order`` ``[T, T]`` alone.

    The test of projection j on row i is ``g_i'·g_j = C_i G[:, j]``, computed afresh each time.
    """
    tasks = gram.shape[0]
    matrix = torch.eye(tasks, dtype=torch.float64)
    for i in range(tasks):
        for j in order[i].tolist():
            if j == i and not self_projection:
                continue
            dot = sum(float(matrix[i, k] * gram[k, j]) for k in range(tasks) if matrix[i, k] != 0)
            if dot < 0 and gram[j, j] > min_squared_norm:
                matrix[i, j] -= dot / (float(gram[j, j]) + eps)
    return matrix


def _shuffle(items: list[_Item], generator: Generator | None) -> list[_Item]:
    """A random permutation of ``items``: Python's shuffle, or ``torch.randperm`` for a torch generator."""
    if isinstance(generator, torch.Generator):
        return [items[k] for k in torch.randperm(len(items), generator=generator).tolist()]
    shuffled = list(items)
    shuffle = random.shuffle if generator is None else generator.shuffle
    shuffle(shuffled)
    return shuffled


def _permutation(count: int, generator: Generator | None) -> list[int]:
    """A random permutation of 0..count-1 from ``torch.randperm``, or from a Python generator's shuffle."""
    if isinstance(generator, random.Random):
        return _shuffle(list(range(count)), generator)
    return torch.randperm(count, generator=generator).tolist()


def _project_onto_normal_plane(row: Tensor, other: Tensor, eps: float = 0.0, floor: float = 0.0) -> Tensor:
    dot = torch.dot(row, other)
    squared_norm = torch.dot(other, other)
    if dot < 0 and squared_norm > floor:
        return row - dot / (squared_norm + eps) * other
    return row


def project_paper(rows: Sequence[Tensor], generator: Generator | None = None) -> list[Tensor]:
    """Algorithm 1 of arXiv:2001.06782: for each i, all j ≠ i in a fresh random order."""
    projected = []
    for i, row in enumerate(rows):
        for j in _permutation(len(rows), generator):
            if j != i:
                row = _project_onto_normal_plane(row, rows[j])
        projected.append(row)
    return projected


def project_pytorch_pcgrad(rows: Sequence[Tensor], generator: Generator | None = None) -> list[Tensor]:
    """The widely used PyTorch code: one list of the rows, shuffled again before each i; j = i is included."""
    others = list(rows)
    projected = []
    for row in rows:
        others = _shuffle(others, generator)
        for other in others:
            row = _project_onto_normal_plane(row, other)
        projected.append(row)
    return projected


def project_tensorflow(rows: Sequence[Tensor], generator: Generator | None = None) -> list[Tensor]:
    """The authors' TensorFlow code: tasks in their own order (its shuffle has no effect); j = i is included."""
    projected = []
    for row in rows:
        for other in rows:
            row = _project_onto_normal_plane(row, other)
        projected.append(row)
    return projected


def project_torchjd(rows: Sequence[Tensor], generator: Generator | None = None) -> list[Tensor]:
    """TorchJD: ``torch.randperm(T)`` for each i, j = i left out."""
    return project_paper(rows, generator)


def project_libmtl(rows: Sequence[Tensor], generator: Generator | None = None) -> list[Tensor]:
    """LibMTL: a shuffled ``range(T)`` for each i, j = i included, ‖g_j‖² + 1e-8 in the denominator."""
    projected = []
    for row in rows:
        for j in _shuffle(list(range(len(rows))), generator):
            row = _project_onto_normal_plane(row, rows[j], eps=1e-8)
        projected.append(row)
    return projected


def project_tensorlogic(rows: Sequence[Tensor], generator: Generator | None = None) -> list[Tensor]:
    """TensorLogic: tasks in their own order, j = i left out, only where ‖g_j‖² > 1e-8."""
    projected = []
    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            if j != i:
                row = _project_onto_normal_plane(row, other, floor=1e-8)
        projected.append(row)
    return projected


PROJECT: dict[str, Callable[[Sequence[Tensor], Generator | None], list[Tensor]]] = {
    "paper": project_paper,
    "pytorch-pcgrad": project_pytorch_pcgrad,
    "tensorflow": project_tensorflow,
    "torchjd": project_torchjd,
    "libmtl": project_libmtl,
    "tensorlogic": project_tensorlogic,
}


TaskGradient = Sequence[Tensor | None]
"""One task's gradients, one entry a parameter; None where the task does not touch the parameter."""


def _present(tasks: Sequence[TaskGradient], p: int) -> list[Tensor]:
    return [task[p] for task in tasks if task[p] is not None]  # type: ignore[misc]


def _flatten(task: TaskGradient, like: Sequence[Tensor]) -> Tensor:
    pieces = [torch.zeros_like(x) if g is None else g for g, x in zip(task, like, strict=True)]
    return torch.cat([piece.reshape(-1) for piece in pieces]) if pieces else torch.zeros(0)


def _unflatten(vector: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    pieces = vector.split([x.numel() for x in like])
    return (piece.reshape(x.shape) for piece, x in zip(pieces, like, strict=True))


def merge(
    tasks: Sequence[TaskGradient],
    parameters: Sequence[Tensor],
    variant: str,
    generator: Generator | None = None,
    reduction: str | None = None,
    shared: Sequence[int] | None = None,
) -> list[Tensor | None]:
    """The merged gradient of each parameter, None for a parameter that no task touches.

    Args:
        tasks: for each task, its gradient for each parameter, or None.
        parameters: tensors with the shapes of the gradients.
        reduction: "sum" or "mean"; None: the variant's own.
        shared: indices of the parameters that undergo surgery; the others are summed. None: the variant's own
            (``libmtl``: the parameters that every task touches; the others: all).
    """
    if variant == "tensorlogic":
        return _merge_each_parameter(tasks, parameters, reduction or "mean", shared)
    count = len(parameters)
    everywhere = [p for p in range(count) if len(_present(tasks, p)) == len(tasks)]
    scope = everywhere if variant == "libmtl" and shared is None else shared
    inside = list(range(count)) if scope is None else sorted(scope)

    like = [parameters[p] for p in inside]
    rows = [_flatten([task[p] for p in inside], like) for task in tasks]
    total = torch.stack(PROJECT[variant](rows, generator)).sum(dim=0)
    reduction = reduction or ("mean" if variant == "pytorch-pcgrad" else "sum")

    merged: list[Tensor | None] = [None] * count
    for p, piece in zip(inside, _unflatten(total, like), strict=True):
        if _present(tasks, p):
            # The PyTorch original averages only what every task touches; elsewhere it adds.
            averaged = reduction == "mean" and (variant != "pytorch-pcgrad" or p in everywhere)
            merged[p] = piece / len(tasks) if averaged else piece
    for p in set(range(count)) - set(inside):
        if present := _present(tasks, p):
            merged[p] = torch.stack(present).sum(dim=0)
    return merged


def _merge_each_parameter(
    tasks: Sequence[TaskGradient],
    parameters: Sequence[Tensor],
    reduction: str,
    shared: Sequence[int] | None,
) -> list[Tensor | None]:
    """TensorLogic's scope: each parameter is a problem of its own; one that any task lacks is left out."""
    merged: list[Tensor | None] = [None] * len(parameters)
    for p, like in enumerate(parameters):
        present = _present(tasks, p)
        if shared is not None and p not in shared:
            merged[p] = torch.stack(present).sum(dim=0) if present else None
        elif len(present) == len(tasks):
            total = torch.stack(project_tensorlogic([g.reshape(-1) for g in present])).sum(dim=0)
            merged[p] = (total / len(tasks) if reduction == "mean" else total).reshape(like.shape)
    return merged
