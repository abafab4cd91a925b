"""Every method of the library, made for T tasks, its counterpart in TorchJD, and what both merge."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import fastpcgrad
from benchmarks.timing import Call
from fastpcgrad import methods
from fastpcgrad.methods._batches import BatchesMethod
from fastpcgrad.methods.base import Method
from fastpcgrad.methods.elementwise import Elementwise
from fastpcgrad.methods.fixed_weights import FixedWeights

TASKS = (2, 8, 32)
PEER = "torchjd"
FLOOR = "read twice"
"""The op of the rows that say what reading J twice takes: less no method can that looks at G."""
Arguments = Mapping[str, Any]


def _weights(tasks: int) -> Tensor:
    return torch.linspace(0.5, 1.5, tasks)


def _byzantine(tasks: int) -> Arguments:
    return {"n_byzantine": max(0, (tasks - 3) // 2)}


def _trim(tasks: int) -> Arguments:
    return {"trim_number": (tasks + 1) // 4}


# Where the defaults do not do. TorchJD takes the same but for what _THEIRS says.
_OURS: dict[str, Callable[[int], Arguments]] = {
    "PCGrad": lambda tasks: {"variant": "torchjd"},
    "CAGrad": lambda tasks: {"c": 0.5},
    "CRMOGM": lambda tasks: {"method": methods.MGDA()},
    "FairGrad": lambda tasks: {"alpha": 1.0},
    "Constant": lambda tasks: {"weights": _weights(tasks)},
    "Krum": _byzantine,
    "TrimmedMean": _trim,
}
_THEIRS: dict[str, Callable[[int], Arguments]] = {
    "PCGrad": lambda tasks: {},
    "NashMTL": lambda tasks: {"n_tasks": tasks},
}
_THEIR_NAMES = {"RandomWeights": "Random"}
_WEIGH_ROWS = ("NashMTL",)
"""TorchJD's that make weights of J, not of G."""
OF_MORE_THAN_ONE_J = (BatchesMethod, methods.Tracking)
"""Kinds of methods for which one J is not enough."""
_FEWEST_TASKS = {"Krum": 3}


def task_gradients(tasks: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """J ``[T, N]`` whose rows conflict pairwise: random ones from which most of their mean was taken."""
    found = torch.randn(tasks, width, generator=torch.Generator().manual_seed(tasks), dtype=dtype)
    # In place, a row at a time: at T=32 a second J of this size may not fit.
    mean = found.mean(dim=0) * 0.9
    for row in found:
        row -= mean
    return found


def names(tasks: int = 32) -> list[str]:
    """The methods that can merge that many task gradients, by their names in ``fastpcgrad.methods``.

    Those of ``OF_MORE_THAN_ONE_J`` are left out.
    """
    found = []
    for name in sorted(methods.__all__):
        method = getattr(methods, name)
        is_method = inspect.isclass(method) and issubclass(method, Method) and not inspect.isabstract(method)
        if is_method and not issubclass(method, OF_MORE_THAN_ONE_J) and tasks >= _FEWEST_TASKS.get(name, 1):
            found.append(name)
    return found


def ours(name: str, tasks: int) -> Method:
    """A new instance of the library's."""
    made: Method = getattr(methods, name)(**_arguments(_OURS, name, tasks))
    return made


def theirs(name: str, tasks: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A new TorchJD aggregator for task gradients of that dtype on that device.

    Raises:
        ImportError: TorchJD or what this aggregator needs besides is not installed.
        AttributeError: TorchJD has no such method.
    """
    aggregation = importlib.import_module("torchjd.aggregation")
    arguments = _arguments({**_OURS, **_THEIRS}, name, tasks)
    cast = {key: value.to(device, dtype) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    return getattr(aggregation, _THEIR_NAMES.get(name, name))(**cast)


def aggregate(method: Method, grads: Tensor) -> Tensor:
    """The merged gradient, by the library's public functions."""
    if isinstance(method, Elementwise):
        return method.aggregate(grads)
    tasks = len(grads)
    known = isinstance(method, FixedWeights)  # which takes but the shape of G
    gram = grads.new_empty(tasks, tasks, dtype=torch.float64) if known else fastpcgrad.gram(grads)
    return fastpcgrad.combine(grads, method.weights(gram))


def library_call(name: str, op: str, grads: Tensor) -> Call:
    """``aggregation`` of J, or the ``weights`` of its Gram matrix."""
    method = ours(name, len(grads))
    if op == "aggregation":
        return lambda: aggregate(method, grads)
    gram = fastpcgrad.gram(grads)
    return lambda: method.weights(gram)


def peer_call(name: str, op: str, grads: Tensor) -> Call:
    """TorchJD's, by what it has: weights of its own Gram matrix, or of the shape of J alone.

    Raises:
        ImportError, AttributeError: as ``theirs``; also where TorchJD finds no weights for this method.
    """
    aggregator = theirs(name, len(grads), grads.dtype, grads.device)
    if op == "aggregation":
        return lambda: aggregator(grads)
    if name in _WEIGH_ROWS:
        rows = torch.linalg.qr(grads.mT, mode="r").R.mT  # as few columns as have the same products
        return lambda: aggregator.weighting(rows)
    gram = grads @ grads.mT
    # Others that have a ``weighting`` have that of their preferences.
    of_shape = issubclass(getattr(methods, name), FixedWeights)
    weighting = aggregator.weighting if of_shape else aggregator.gramian_weighting
    return lambda: weighting(gram)


def apart(name: str, tasks: int) -> float:
    """How far the two results are from each other, as a part of Σ_j |w_j| ‖g_j‖ (without weights: of Σ_j ‖g_j‖)."""
    grads = task_gradients(tasks, 64, torch.float64)
    results: list[Any] = []
    for call in (library_call, peer_call):
        torch.manual_seed(0)
        results.append(call(name, "aggregation", grads)())
    norms, method = grads.norm(dim=1), ours(name, tasks)
    if not isinstance(method, Elementwise):
        torch.manual_seed(0)
        norms = norms * method.weights(fastpcgrad.gram(grads)).abs()
    return float((results[0] - results[1]).norm() / norms.sum())


def _arguments(table: Mapping[str, Callable[[int], Arguments]], name: str, tasks: int) -> Arguments:
    return table[name](tasks) if name in table else {}
