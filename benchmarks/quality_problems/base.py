"""What a problem of ``benchmarks.quality`` is: several losses of S small networks that learn side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastpcgrad.commands import demo_problems

Part = Literal["validation", "test"]
"""What is tuned is chosen by the first; the second is shown."""
PARTS: tuple[Part, ...] = get_args(Part)


class Budget(NamedTuple):
    """Of each training: networks of seeds 0..S-1, and steps."""

    seeds: int
    steps: int


class Measure(NamedTuple):
    """What a network is judged by: its name with the unit, and whether a larger value is the better one."""

    name: str
    larger_is_better: bool


class Vectors(demo_problems.Networks):
    """``Networks`` of which each has its parameters in one vector: as many tensors as networks, not layers."""

    def __init__(self, seeds: Sequence[int], widths: Sequence[int], activation: nn.Module) -> None:
        super().__init__(seeds, widths, activation)
        self.shapes = [(after, before) for before, after in pairwise(widths)]
        vectors = [nn.utils.parameters_to_vector(network.parameters()).detach() for network in self.each]
        del self.each
        self.vectors = nn.ParameterList(vectors)

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = [size for outputs, inputs in self.shapes for size in (outputs * inputs, outputs)]
        parts = iter(torch.stack(list(self.vectors)).split(sizes, dim=1))
        for outputs, inputs in self.shapes:
            yield next(parts).unflatten(1, (outputs, inputs)), next(parts)


class Problem(ABC):
    """T losses of S networks, of which number s has seed ``seeds[s]``: its first values, data and batches.

    Attributes:
        title: of the figure and the page.
        tasks: the names of the losses.
        measures: what the networks are judged by; where ``alone``, one for each task.
        alone: whether a network that learns one task by itself can be judged by that task's measure.
        weightings: T weights of the losses by the name of their sum: four to choose from, the plain sum among them.
        steps: of Adam, whose learning rate falls to 0 as a cosine.
        shared, own: those parts of the networks whose parameters undergo surgery, and the others.
    """

    title: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    measures: ClassVar[tuple[Measure, ...]]
    alone: ClassVar[bool] = True
    weightings: ClassVar[Mapping[str, tuple[float, ...]]]
    steps: ClassVar[int]
    shared: Sequence[Vectors]
    own: Sequence[Vectors] = ()

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @classmethod
    def budget(cls, quick: bool) -> Budget:
        """``quick``: whether it runs, not who wins."""
        return Budget(2, 3) if quick else Budget(5, cls.steps)

    def permutations(self, count: int) -> Tensor:
        """``[S, count]``: of each network its own order of the samples."""
        return torch.stack([torch.randperm(count, generator=generator) for generator in self.generators])

    def drawn(self, places: Tensor, count: int) -> Tensor:
        """``[S, count]``: of each network samples of its own ``[S, n]``, with replacement."""
        draws = [torch.randint(places.shape[1], (count,), generator=generator) for generator in self.generators]
        return places.gather(1, torch.stack(draws))

    @abstractmethod
    def batch(self) -> tuple[Tensor, ...]:
        """The next one of all networks."""

    @abstractmethod
    def losses(self, batch: tuple[Tensor, ...]) -> Tensor:
        """``[T, S]``."""

    @abstractmethod
    def judged(self, part: Part) -> Tensor:
        """``[M, S]``: by each measure."""
