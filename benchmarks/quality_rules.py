"""The rules that ``benchmarks.quality`` compares: how the losses of a step become gradients.

Methods and balancers are those of the library that need no arguments: a new one takes part by itself.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_problems import Problem
from fastpcgrad import GradientSurgery, balancing, methods
from fastpcgrad.balancing.base import LearnedBalancer

PLAIN, MEAN, FIRST, SEARCHED, ALONE = "plain sum", "mean", "losses / first values", "best weights of 4", "single task: "
EPOCH = 20
"""Steps that DWA takes for one."""


class Rule(ABC):
    """Makes gradients of the losses of S networks, each by itself.

    Attributes:
        parameters: of each network, those that the rule learns itself.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.networks = len(problem.generators)
        self.parameters: list[list[Tensor]] = [[] for _ in range(self.networks)]

    @abstractmethod
    def backward(self, losses: Tensor) -> None:
        """From ``[T, S]`` into ``.grad``."""

    def after(self, batch: tuple[Tensor, ...]) -> None:  # noqa: B027 (most rules have nothing to do then)
        """After the optimizer's step on a batch."""


class Weighted(Rule):
    """A weighted sum. ``weights``: ``[T, S]``; None: one over the losses of the first step."""

    def __init__(self, problem: Problem, weights: Tensor | None) -> None:
        super().__init__(problem)
        self.weights = weights

    def backward(self, losses: Tensor) -> None:
        if self.weights is None:
            self.weights = 1 / losses.detach()
        (self.weights * losses).sum().backward()


class Surgery(Rule):
    """A method on the shared parameters of each network; the others get the gradients of the sum."""

    def __init__(self, problem: Problem, method: methods.Method) -> None:
        super().__init__(problem)
        shared = [[module.vectors[s] for module in problem.shared] for s in range(self.networks)]
        own = [[module.vectors[s] for module in problem.own] for s in range(self.networks)]
        self.surgery = GradientSurgery(
            [p for network in (*shared, *own) for p in network], len(problem.tasks), method,
            granularity=shared if len(shared) > 1 else "model", shared=[p for network in shared for p in network],
            process_group="local",
        )  # fmt: skip

    def backward(self, losses: Tensor) -> None:
        self.surgery.backward(losses.sum(dim=1))


class Balanced(Rule):
    """The sum of what a balancer, one for each network, makes of the losses.

    STCH, whose μ is in the unit of the losses, has the logarithms of losses over first values, as LibMTL has it.
    """

    def __init__(self, problem: Problem, make: Callable[[int], balancing.Balancer]) -> None:
        super().__init__(problem)
        self.balancers = [make(len(problem.tasks)) for _ in range(self.networks)]
        self.first: Tensor | None = None
        self.steps = 0
        if not isinstance(self.balancers[0], LearnedBalancer):  # which has an optimizer of its own
            self.parameters = [list(balancer.parameters()) for balancer in self.balancers]

    def seen(self, losses: Tensor) -> Tensor:
        if not isinstance(self.balancers[0], balancing.STCH):
            return losses
        if self.first is None:
            self.first = losses.detach()
        return (losses / self.first).log()

    def backward(self, losses: Tensor) -> None:
        if isinstance(self.balancers[0], balancing.GradNorm):
            self.note(losses)
        seen = self.seen(losses)
        torch.stack([balancer(seen[:, s]) for s, balancer in enumerate(self.balancers)]).sum().backward()

    def note(self, losses: Tensor) -> None:
        """Norms of the gradients of the last shared layer's weights, of all networks from T passes."""
        network = self.problem.shared[-1]
        outputs, inputs = network.shapes[-1]
        for task, loss in enumerate(losses):
            found = torch.autograd.grad(loss.sum(), list(network.vectors), retain_graph=True)
            for s, (balancer, gradient) in enumerate(zip(self.balancers, found, strict=True)):
                assert isinstance(balancer, balancing.GradNorm)
                balancer.note(task, loss[s], gradient[-outputs * (inputs + 1) : -outputs].norm())

    def after(self, batch: tuple[Tensor, ...]) -> None:
        self.steps += 1
        losses = self.problem.losses(batch).detach() if isinstance(self.balancers[0], balancing.FAMO) else None
        for s, balancer in enumerate(self.balancers):
            if isinstance(balancer, balancing.FAMO) and losses is not None:
                balancer.update(losses[:, s])
            elif isinstance(balancer, balancing.GradNorm):
                balancer.update()
            elif isinstance(balancer, balancing.DWA) and self.steps % EPOCH == 0:
                balancer.end_epoch()


def _public(package: Any, base: type) -> dict[str, type]:
    """The subclasses of a package that need no arguments but a number of tasks, by name."""
    found = {name: getattr(package, name) for name in package.__all__}
    kinds = {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, base)}
    return {name: kind for name, kind in sorted(kinds.items()) if not inspect.isabstract(kind) and _ready(kind)}


def _ready(kind: type) -> bool:
    parameters = inspect.signature(kind).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


LEFT_OUT = "Mean", "Sum", "AGEM", "Bloop", "MetaBalance", "PCD"
"""The baselines under other names, and what puts one task before the others, which no measure asks for."""
METHODS = {name: kind for name, kind in _public(methods, methods.Method).items() if name not in LEFT_OUT}
"""With their defaults, and a generator of seed 0 where they draw."""
BALANCERS = _public(balancing, balancing.Balancer)


def method(name: str) -> methods.Method:
    kind = METHODS[name]
    draws = "generator" in inspect.signature(kind).parameters
    made: methods.Method = kind(generator=torch.Generator().manual_seed(0)) if draws else kind()
    return made


def alone(problem: type[Problem]) -> list[str]:
    """The rules by which a network learns one task by itself."""
    return [ALONE + task for task in problem.tasks] if problem.alone else []


def names(problem: type[Problem]) -> list[str]:
    """All rules of a problem: the sums, single tasks, balancers, methods."""
    return [*problem.weightings, MEAN, FIRST, *alone(problem), *BALANCERS, *METHODS]


def rule(name: str, problem: Problem) -> Rule:
    if name in METHODS:
        return Surgery(problem, method(name))
    if name in BALANCERS:
        return Balanced(problem, BALANCERS[name])
    if name == FIRST:
        return Weighted(problem, None)
    tasks = len(problem.tasks)
    if name == MEAN:
        weights: Sequence[float] = [1 / tasks] * tasks
    elif name in problem.weightings:
        weights = problem.weightings[name]
    else:
        weights = [float(ALONE + task == name) for task in problem.tasks]
    return Weighted(problem, torch.tensor(weights, dtype=torch.float32)[:, None])
