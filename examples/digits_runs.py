"""The same training three times: plain sum, PCGrad as a Python loop, and fastpcgrad in its place."""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fastpcgrad
from benchmarks.peers.loop import LoopPCGrad
from examples.digits_data import CANVAS, TASKS, TwoDigits

PLAIN, LOOP, FAST, EXACT = "plain sum", "slow loop", "fastpcgrad", "float64 loop"


@dataclass(frozen=True)
class Settings:
    epochs: int = 10
    train_size: int = 6400
    test_size: int = 2000
    batch: int = 128
    width: int = 1024
    features: int = 16
    learning_rate: float = 1e-3
    warm_up_steps: int = 3
    floor_steps: int = 3
    checked_steps: int = 50
    seed: int = 0

    @property
    def batches(self) -> int:
        return self.train_size // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.batches


class Network(nn.Module):
    """A shared trunk with few features at its end, for which the tasks compete, and a linear head each."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        sizes = (CANVAS * CANVAS, width, width, width, features)
        layers = [(nn.Linear(before, after), nn.ReLU()) for before, after in itertools.pairwise(sizes)]
        self.trunk = nn.Sequential(nn.Flatten(), *itertools.chain(*layers))
        self.heads = nn.ModuleList(nn.Linear(features, classes) for classes in TASKS.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.trunk(images)
        return [head(features) for head in self.heads]

    def losses(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        return [nn.functional.cross_entropy(out, labels[:, t]) for t, out in enumerate(self(images))]


class Surgeon(Protocol):
    """What the training loop calls: the interface of the widely used PyTorch PCGrad."""

    def zero_grad(self) -> Any: ...

    def pc_backward(self, objectives: list[Tensor]) -> Any: ...

    def step(self) -> Any: ...


class PlainSum:
    """No surgery: one backward pass of the summed losses, behind the calls of the other two."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def pc_backward(self, objectives: list[Tensor]) -> None:
        torch.stack(objectives).sum().backward()

    def step(self) -> None:
        self.optimizer.step()


class LoopInFloat64(LoopPCGrad):
    """The slow loop on the same float32 gradients with float64 arithmetic: what both are without their rounding."""

    def _flatten(self) -> tuple[Tensor, Tensor]:
        gradient, touched = super()._flatten()
        return gradient.double(), touched.double()

    def _unflatten(self, merged: Tensor) -> None:
        super()._unflatten(merged.float())


SURGEONS: dict[str, Callable[[torch.optim.Optimizer], Surgeon]] = {
    PLAIN: PlainSum,
    LOOP: LoopPCGrad,
    FAST: fastpcgrad.PCGrad,
    EXACT: LoopInFloat64,
}


class Run:
    """One training: its own copy of the network, its own optimizer, its own state of Python's ``random``."""

    def __init__(self, name: str, network: Network, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self.network = copy.deepcopy(network)
        self.surgeon = self._surgeon(self.network)
        self.random_state = random.Random(settings.seed).getstate()
        self.losses: list[list[float]] = []
        self.step_seconds: list[float] = []
        self.backward_seconds: list[float] = []
        self.cosines: list[Tensor] = []
        self.removed_fractions: list[Tensor] = []
        self.accuracy: list[float] = []

    def _surgeon(self, network: Network) -> Surgeon:
        optimizer = torch.optim.Adam(network.parameters(), lr=self.settings.learning_rate)
        return SURGEONS[self.name](optimizer)

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        """Run discarded steps on a copy, so that no run pays for first allocations and library start-up."""
        network = copy.deepcopy(self.network)
        surgeon = self._surgeon(network)
        for _ in range(self.settings.warm_up_steps):
            surgeon.zero_grad()
            surgeon.pc_backward(network.losses(images, labels))
            surgeon.step()

    def epoch(self, batches: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Train on ``batches`` and yield after each step; both surgeries draw the same task orders."""
        random.setstate(self.random_state)
        for images, labels in batches:
            start = time.perf_counter()
            self.surgeon.zero_grad()
            losses = self.network.losses(images, labels)
            forward_end = time.perf_counter()
            self.surgeon.pc_backward(losses)
            backward_end = time.perf_counter()
            self.surgeon.step()
            self.step_seconds.append(time.perf_counter() - start)
            self.backward_seconds.append(backward_end - forward_end)
            self.losses.append([loss.item() for loss in losses])
            if isinstance(self.surgeon, fastpcgrad.PCGrad):
                report = self.surgeon.report
                assert report is not None
                self.cosines.append(report.cosines)
                self.removed_fractions.append(report.removed_fraction)
            yield
        self.random_state = random.getstate()

    @torch.no_grad()
    def evaluate(self, data: TwoDigits) -> None:
        predictions = torch.stack([out.argmax(1) for out in self.network(data.images)], dim=1)
        self.accuracy = (predictions == data.labels).float().mean(0).tolist()
