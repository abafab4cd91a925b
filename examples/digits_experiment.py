"""The three trainings side by side: same start, same batches, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.digits_data import TASKS, TwoDigits, two_digits
from examples.digits_runs import EXACT, FAST, LOOP, PLAIN, Network, Run, Settings


@dataclass
class Experiment:
    """The three runs and what was measured beside them.

    Attributes:
        runs: by name, in the order in which they are shown.
        exact: the slow loop without its rounding, for the first ``checked_steps`` steps.
        untrained: the weights that every run starts from.
        floor_seconds: time of one plain backward pass a task: what any surgery needs before it can begin.
    """

    settings: Settings
    train: TwoDigits
    test: TwoDigits
    runs: dict[str, Run]
    exact: Run
    untrained: Network
    floor_seconds: list[float]

    @classmethod
    def prepare(cls, settings: Settings) -> Experiment:
        train, test = two_digits(settings.train_size, settings.test_size, settings.seed)
        torch.manual_seed(settings.seed)
        network = Network(settings.width, settings.features)
        runs = {name: Run(name, network, settings) for name in (PLAIN, LOOP, FAST)}
        exact = Run(EXACT, network, settings)
        return cls(settings, train, test, runs, exact, untrained=network, floor_seconds=[])

    def train_all(self, advance: Callable[[Run], None]) -> None:
        """Train the runs epoch by epoch in turn; ``advance`` is called after every step.

        Whoever starts an epoch changes, so that a machine that slows down for a while slows all three alike.
        """
        generator = torch.Generator().manual_seed(self.settings.seed)
        runs = list(self.runs.values())
        for epoch in range(self.settings.epochs):
            batches = self._batches(generator)
            turn = epoch % len(runs)
            for run in runs[turn:] + runs[:turn]:
                if epoch == 0:
                    run.warm_up(*batches[0])
                for _ in run.epoch(batches):
                    advance(run)
                self._measure_floor(batches[: self.settings.floor_steps + 1])
            for _ in self.exact.epoch(batches[: self.settings.checked_steps - len(self.exact.losses)]):
                advance(self.exact)
        for run in runs:
            run.evaluate(self.test)

    def _batches(self, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.train), generator=generator)
        complete = order.split(self.settings.batch)[: self.settings.batches]
        return [(self.train.images[chunk], self.train.labels[chunk]) for chunk in complete]

    def _measure_floor(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Time the plain backward passes; the first time is discarded, as the caches hold another run's data."""
        network = self.untrained
        for position, (images, labels) in enumerate(batches):
            losses = network.losses(images, labels)
            start = time.perf_counter()
            for t, loss in enumerate(losses):
                network.zero_grad()
                loss.backward(retain_graph=t < len(losses) - 1)
            if position > 0:
                self.floor_seconds.append(time.perf_counter() - start)

    def step_median(self, name: str) -> float:
        return statistics.median(self.runs[name].step_seconds)

    def backward_median(self, name: str) -> float:
        return statistics.median(self.runs[name].backward_seconds)

    def floor_median(self) -> float:
        return statistics.median(self.floor_seconds)

    def gap(self, one: Run, other: Run) -> Tensor:
        """Absolute loss difference of two runs, the largest of the tasks, for each step that both made."""
        steps = min(len(one.losses), len(other.losses))
        first, second = (torch.tensor(run.losses[:steps], dtype=torch.float64) for run in (one, other))
        return (first - second).abs().amax(1)

    def cosines(self) -> Tensor:
        """``[steps, T, T]``: the cosines of the task gradients in the fastpcgrad run."""
        return torch.stack(self.runs[FAST].cosines)

    def pair_conflicts(self) -> Tensor:
        """``[steps, pairs]``: whether the gradients of two tasks opposed each other."""
        first, second = torch.triu_indices(len(TASKS), len(TASKS), offset=1)
        return self.cosines()[:, first, second] < 0

    def removed_fractions(self) -> list[float]:
        """How much shorter surgery made each task's gradient, on average over the steps."""
        fractions: list[float] = torch.stack(self.runs[FAST].removed_fractions).mean(0).tolist()
        return fractions
