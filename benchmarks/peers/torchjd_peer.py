"""TorchJD: its PCGrad aggregator on J, and its autojac engine for a training step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer
from torchjd.aggregation import PCGrad
from torchjd.autojac import backward, jac_to_grad, mtl_backward

from benchmarks.models import Classifier, Forward, Problem


def kernel(rows: Tensor) -> Callable[[], Tensor]:
    aggregator = PCGrad()

    def call() -> Tensor:
        merged: Tensor = aggregator(rows)
        return merged

    return call


def step(problem: Problem, optimizer: Optimizer, chunk: int | None = None) -> Callable[[Forward], None]:
    """``mtl_backward`` where tasks share a representation (its documented use), else ``backward``.

    ``chunk=None`` differentiates all tasks at once through ``torch.vmap`` (TorchJD's default), 1 one by one.
    """
    aggregator = PCGrad()
    if isinstance(problem, Classifier):
        shared = list(problem.trunk.parameters())
        heads = [list(head.parameters()) for head in problem.heads]

        def with_features(forward: Forward) -> None:
            assert forward.features is not None
            mtl_backward(
                forward.losses,
                features=forward.features,
                tasks_params=heads,
                shared_params=shared,
                parallel_chunk_size=chunk,
            )
            jac_to_grad(shared, aggregator)

        return with_features

    parameters = problem.parameters_list()

    def without_features(forward: Forward) -> None:
        backward(forward.losses, inputs=parameters, parallel_chunk_size=chunk)
        jac_to_grad(parameters, aggregator)

    return without_features


def step_sequential(problem: Problem, optimizer: Optimizer) -> Callable[[Forward], None]:
    return step(problem, optimizer, chunk=1)
