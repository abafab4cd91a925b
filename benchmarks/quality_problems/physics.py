"""Physics-informed networks: the losses are an equation's and those of its initial and boundary values."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality_problems.base import Measure, Part, Problem, Vectors
from fastpcgrad.commands import demo_problems


class PhysicsInformed(Problem):
    """A network u of the coordinates, from the residual of an equation and from its initial and boundary values.

    None of the losses has a solution by itself, so that there is no learning one task alone. Judged by
    -log10(‖u − solution‖ / ‖solution‖): 2 are an error of 1 %. What is tuned is chosen by the error at 50 points, as if
    that much had been measured; the test is a grid.
    """

    alone = False
    measures = (Measure("right digits of u", True),)
    widths: ClassVar[tuple[int, ...]]
    lower: ClassVar[tuple[float, ...]]
    upper: ClassVar[tuple[float, ...]]
    size = 64

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds)
        self.shared = [Vectors(seeds, self.widths, nn.Tanh())]
        low, high = torch.tensor(self.lower), torch.tensor(self.upper)
        measured = low + (high - low) * torch.rand(50, len(low), generator=torch.Generator().manual_seed(0))
        self.points: dict[Part, Tensor] = {"validation": measured, "test": self.grid()}
        self.expected = {part: self.solution(points) for part, points in self.points.items()}

    @abstractmethod
    def grid(self) -> Tensor:
        """``[n, coordinates]``."""

    @abstractmethod
    def solution(self, x: Tensor) -> Tensor:
        """``[n, coordinates]`` to ``[n]``."""

    def u(self, x: Tensor) -> Tensor:
        """``[S, n, coordinates]`` to ``[S, n]``."""
        return self.shared[0](x)[..., 0]

    def at(self, x: Tensor) -> Tensor:
        """``[n, coordinates]`` for each of S networks."""
        return x.expand(len(self.generators), -1, -1)

    def random(self, coordinate: int) -> Tensor:
        """``[S, size]`` values of a coordinate."""
        low, high = self.lower[coordinate], self.upper[coordinate]
        drawn = torch.stack([torch.rand(self.size, generator=generator) for generator in self.generators])
        return low + (high - low) * drawn

    def judged(self, part: Part) -> Tensor:
        found, expected = self.u(self.at(self.points[part])), self.expected[part]
        return -((found - expected).norm(dim=1) / expected.norm()).log10()[None]


def derivative(values: Tensor, x: Tensor) -> Tensor:
    """Of ``[S, n]`` by the coordinates ``[S, n, coordinates]``, with a graph of its own."""
    (found,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    return found


class Poisson(PhysicsInformed):
    """The demo's: u'' = f on [-1, 1] with given ends; the equation's loss starts 3000 times larger."""

    title = "Poisson: equation, ends"
    tasks = ("equation", "ends")
    weightings: ClassVar = demo_problems.Poisson.weightings
    steps = 600
    widths, lower, upper = (1, 32, 32, 1), (-1.0,), (1.0,)
    frequency = demo_problems.Poisson.frequency

    def grid(self) -> Tensor:
        return torch.linspace(-1, 1, 401)[:, None]

    def solution(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x[:, 0]) + x[:, 0] / 2

    def batch(self) -> tuple[Tensor, ...]:
        return (self.random(0)[..., None],)

    def losses(self, batch: tuple[Tensor, ...]) -> Tensor:
        x = batch[0].detach().requires_grad_()
        curvature = derivative(derivative(self.u(x), x)[..., 0], x)[..., 0]
        equation = curvature + self.frequency**2 * torch.sin(self.frequency * x[..., 0])
        ends = torch.tensor([[-1.0], [1.0]])
        error = self.u(self.at(ends)) - self.solution(ends)
        return torch.stack([equation.square().mean(dim=1), error.square().mean(dim=1)])


class Burgers(PhysicsInformed):
    """u_t + u u_x = ν u_xx for x in [-1, 1], t in [0, 1] from -sin πx, with u = 0 at both ends: a front forms."""

    title = "Burgers: equation, start, ends"
    tasks = ("equation", "start", "ends")
    weightings: ClassVar = {
        "plain sum": (1, 1, 1),
        "weights 1 : 10 : 10": (1, 10, 10),
        "weights 1 : 100 : 100": (1, 100, 100),
        "weights 10 : 1 : 1": (10, 1, 1),
    }
    steps = 400
    widths, lower, upper = (2, 24, 24, 1), (-1.0, 0.0), (1.0, 1.0)
    viscosity = 0.1 / math.pi

    def grid(self) -> Tensor:
        return torch.cartesian_prod(torch.linspace(-1, 1, 41), torch.linspace(0, 1, 11))

    def solution(self, x: Tensor) -> Tensor:
        """By the formula of Cole and Hopf, its integrals over the heat kernel with Gauss and Hermite's weights."""
        nodes, weights = np.polynomial.hermite.hermgauss(80)
        place, time = x.double().numpy().T
        y = place[:, None] - np.sqrt(4 * self.viscosity * time)[:, None] * nodes
        exponent = -np.cos(math.pi * y) / (2 * math.pi * self.viscosity)
        kernel = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
        return torch.from_numpy(-(kernel * np.sin(math.pi * y)).sum(axis=1) / kernel.sum(axis=1)).float()

    def batch(self) -> tuple[Tensor, ...]:
        return self.random(0), self.random(1), self.random(0), self.random(1)

    def losses(self, batch: tuple[Tensor, ...]) -> Tensor:
        place, time, start, moment = batch
        x = torch.stack([place, time], dim=2).requires_grad_()
        u = self.u(x)
        slopes = derivative(u, x)
        curvature = derivative(slopes[..., 0], x)[..., 0]
        equation = slopes[..., 1] + u * slopes[..., 0] - self.viscosity * curvature
        first = self.u(torch.stack([start, torch.zeros_like(start)], dim=2)) + torch.sin(math.pi * start)
        sides = torch.ones_like(moment)
        ends = self.u(torch.cat([torch.stack([end * sides, moment], dim=2) for end in (-1, 1)], dim=1))
        return torch.stack([residual.square().mean(dim=1) for residual in (equation, first, ends)])
