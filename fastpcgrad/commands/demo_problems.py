"""The two problems of ``python -m fastpcgrad demo``: losses of very different size, and losses of one kind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn


class Networks(nn.Module):
    """A small multilayer perceptron for each of S seeds, computed side by side: ``[S, n, inputs]`` to outputs.

    Each network has parameters of its own and sees its own rows of the input alone: they learn as S separate ones do.
    """

    def __init__(self, seeds: Sequence[int], widths: Sequence[int], activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.each = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed)
                self.each.append(nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths)))

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights ``[S, outputs, inputs]`` and biases ``[S, outputs]`` of each layer, of all networks."""
        for layers in zip(*self.each, strict=True):
            yield torch.stack([layer.weight for layer in layers]), torch.stack([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        for depth, (weights, biases) in enumerate(self.layers()):
            if depth:
                x = self.activation(x)
            x = torch.baddbmm(biases[:, None], x, weights.mT)
        return x


class Problem(ABC):
    """T losses of S networks, and how far from right each network is in the end.

    Attributes:
        title, error: of the figure and the table; ``error`` in per cent.
        weightings: T weights of the losses by the name of their sum, those that the demo tries by hand.
        networks: one for each seed.
    """

    title: ClassVar[str]
    error: ClassVar[str]
    weightings: ClassVar[Mapping[str, tuple[float, ...]]]
    steps: ClassVar[int]
    learning_rate: ClassVar[float]
    networks: Networks

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @abstractmethod
    def losses(self) -> Tensor:
        """``[T, S]`` of each network's next batch."""

    @abstractmethod
    def errors(self) -> Tensor:
        """``[S]``, 1 for 100 %."""


class Poisson(Problem):
    """u'' = f on [-1, 1] with given ends, learned from two losses, of which the equation's starts 3000 times larger."""

    title = "Physics-informed network: Poisson's equation and its boundary"
    error = "error of the solution"
    weightings: ClassVar = {"plain sum": (1, 1)} | {f"weights 1 : {w}": (1, w) for w in (10, 100, 1000)}
    steps, learning_rate = 1000, 5e-3
    points, frequency = 64, 2 * math.pi

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self.networks = Networks(seeds, (1, 32, 32, 1), nn.Tanh())
        self.ends = torch.tensor([[-1.0], [1.0]]).expand(len(seeds), -1, -1)

    def solution(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x) + x / 2

    def losses(self) -> Tensor:
        x = torch.stack([2 * torch.rand(self.points, 1, generator=generator) - 1 for generator in self.generators])
        x.requires_grad_()
        (slope,) = torch.autograd.grad(self.networks(x).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        equation = curvature + self.frequency**2 * torch.sin(self.frequency * x)
        boundary = self.networks(self.ends) - self.solution(self.ends)
        return torch.stack([equation.square().mean(dim=(1, 2)), boundary.square().mean(dim=(1, 2))])

    @torch.no_grad()
    def errors(self) -> Tensor:
        """‖u − solution‖ / ‖solution‖."""
        x = torch.linspace(-1, 1, 401)[:, None].expand(len(self.generators), -1, -1)
        solution = self.solution(x)
        return (self.networks(x) - solution).norm(dim=(1, 2)) / solution.norm(dim=(1, 2))


class Digits(Problem):
    """Scikit-learn's handwritten digits: which digit, is it odd, is it above 4; three cross-entropies."""

    title = "Handwritten digits: which one, is it odd, is it above 4"
    error = "wrong answers, mean of the three"
    weightings: ClassVar = {
        "plain sum": (1, 1, 1),
        "weights 3 : 1 : 1": (3, 1, 1),
        "weights 1 : 3 : 1": (1, 3, 1),
        "weights 1 : 1 : 3": (1, 1, 3),
    }
    steps, learning_rate = 300, 2e-3
    batch, training, classes = 64, 900, (10, 2, 2)

    def __init__(self, seeds: Sequence[int]) -> None:
        from sklearn.datasets import load_digits

        super().__init__(seeds)
        images, digits = load_digits(return_X_y=True)
        self.images, digit = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits)
        self.answers = torch.stack([digit, digit % 2, (digit > 4).long()])
        shuffled = torch.stack([torch.randperm(len(digit), generator=generator) for generator in self.generators])
        self.seen, self.unseen = shuffled[:, : self.training], shuffled[:, self.training :]
        self.networks = Networks(seeds, (64, 64, 16, sum(self.classes)), nn.ReLU())

    def _scores(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """Of each task ``[S, n, classes]``."""
        return self.networks(self.images[chosen]).split(self.classes, dim=2)

    def losses(self) -> Tensor:
        places = [torch.randint(self.training, (self.batch,), generator=generator) for generator in self.generators]
        chosen = self.seen.gather(1, torch.stack(places))
        return torch.stack(
            [
                nn.functional.cross_entropy(scores.mT, answers[chosen], reduction="none").mean(dim=1)
                for scores, answers in zip(self._scores(chosen), self.answers, strict=True)
            ]
        )

    @torch.no_grad()
    def errors(self) -> Tensor:
        """The share of wrong answers about unseen images, the mean of the three questions."""
        answers = zip(self._scores(self.unseen), self.answers, strict=True)
        return torch.stack(
            [(scores.argmax(dim=2) != right[self.unseen]).float().mean(dim=1) for scores, right in answers]
        ).mean(dim=0)


PROBLEMS: dict[str, type[Problem]] = {"poisson": Poisson, "digits": Digits}
