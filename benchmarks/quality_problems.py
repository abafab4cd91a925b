"""The problems of ``benchmarks.quality``: several losses of S small networks that learn side by side.

Their data comes with Python and scikit-learn alone. What is tuned is chosen by ``validation``; ``test`` is shown.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpcgrad.commands import demo_problems

Part = Literal["validation", "test"]
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
        self.each = nn.ParameterList(vectors)

    def layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = [size for outputs, inputs in self.shapes for size in (outputs * inputs, outputs)]
        parts = iter(torch.stack(list(self.each)).split(sizes, dim=1))
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
        shared, own: modules whose parameters undergo surgery, and the others, each with ``each`` of S networks.
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


def mean_cross_entropy(scores: Tensor, answers: Tensor) -> Tensor:
    """``[S, n, classes]`` and ``[S, n]`` to ``[S]``."""
    return F.cross_entropy(scores.mT, answers, reduction="none").mean(dim=1)


def accuracy(scores: Tensor, answers: Tensor) -> Tensor:
    """In per cent, ``[S]``."""
    return 100 * (scores.argmax(dim=2) == answers).float().mean(dim=1)


def relative_rmse(found: Tensor, expected: Tensor) -> Tensor:
    """Root of the mean square of the error by that of what is expected around its mean, in per cent, ``[S]``."""
    spread = expected - expected.mean(dim=1, keepdim=True)
    return 100 * (found - expected).square().mean(dim=1).sqrt() / spread.square().mean(dim=1).sqrt()


class Digits(Problem):
    """Noisy handwritten digits: which one (cross-entropy), and its sum of pixels of 0..16 (squared error in raw units)."""

    title = "digits: class, ink"
    tasks = ("class", "ink")
    measures = (Measure("class: accuracy, %", True), Measure("ink: relative RMSE, %", False))
    weightings: ClassVar = {
        "plain sum": (1, 1),
        "weights 100 : 1": (100, 1),
        "weights 1000 : 1": (1000, 1),
        "weights 10000 : 1": (10000, 1),
    }
    steps = 250
    size, noise, unit = 64, 4.0, 100.0

    def __init__(self, seeds: Sequence[int]) -> None:
        from sklearn.datasets import load_digits

        super().__init__(seeds)
        pixels, digits = load_digits(return_X_y=True)
        clean, self.digit = torch.tensor(pixels, dtype=torch.float32), torch.tensor(digits)
        self.ink = clean.sum(dim=1) - clean.sum(dim=1).mean()
        self.images = (clean + self.noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))) / 16
        shuffled = self.permutations(len(digits))
        self.training = shuffled[:, :600]
        self.parts = {"validation": shuffled[:, 600:1000], "test": shuffled[:, 1000:]}
        trunk = Vectors(seeds, (64, 64, 16), nn.ReLU())
        self.shared, self.own = [trunk], [Vectors(seeds, (16, 10), nn.ReLU()), Vectors(seeds, (16, 1), nn.ReLU())]

    def answers(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[S, n, 10]`` and ink ``[S, n]``."""
        features = self.shared[0](self.images[chosen]).relu()
        of_class, of_ink = (head(features) for head in self.own)
        return of_class, self.unit * of_ink[..., 0]

    def batch(self) -> tuple[Tensor, ...]:
        return (self.drawn(self.training, self.size),)

    def losses(self, batch: tuple[Tensor, ...]) -> Tensor:
        (chosen,) = batch
        scores, ink = self.answers(chosen)
        squares = (ink - self.ink[chosen]).square().mean(dim=1)
        return torch.stack([mean_cross_entropy(scores, self.digit[chosen]), squares])

    def judged(self, part: Part) -> Tensor:
        chosen = self.parts[part]
        scores, ink = self.answers(chosen)
        return torch.stack([accuracy(scores, self.digit[chosen]), relative_rmse(ink, self.ink[chosen])])


class Tables(Problem):
    """Four small data sets of scikit-learn: each with a first and a last layer, and batches, of its own; one trunk."""

    title = "tables: four data sets"
    tasks = ("diabetes", "wine", "breast cancer", "iris")
    measures = (
        Measure("diabetes: relative RMSE, %", False),
        *(Measure(f"{name}: accuracy, %", True) for name in ("wine", "breast cancer", "iris")),
    )
    weightings: ClassVar = {
        "plain sum": (1, 1, 1, 1),
        "weights 1 : 3 : 3 : 3": (1, 3, 3, 3),
        "weights 3 : 1 : 1 : 1": (3, 1, 1, 1),
        "weights 1 : 10 : 10 : 10": (1, 10, 10, 10),
    }
    steps = 120
    size, width = 32, 16

    def __init__(self, seeds: Sequence[int]) -> None:
        from sklearn import datasets

        super().__init__(seeds)
        self.inputs, self.targets, self.places = [], [], []
        encoders, heads = [], []
        for name in self.tasks:
            inputs, targets = getattr(datasets, f"load_{name.replace(' ', '_')}")(return_X_y=True)
            regression = name == "diabetes"
            scaled = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
            targets = (targets - targets.mean()) / targets.std() if regression else targets
            self.inputs.append(torch.tensor(scaled, dtype=torch.float32))
            self.targets.append(torch.tensor(targets, dtype=torch.float32 if regression else torch.int64))
            shuffled = self.permutations(len(targets))
            self.places.append(dict(zip(("training", "validation", "test"), shuffled.tensor_split(3, 1), strict=True)))
            encoders.append(Vectors(seeds, (inputs.shape[1], self.width), nn.ReLU()))
            heads.append(Vectors(seeds, (self.width, 1 if regression else int(targets.max()) + 1), nn.ReLU()))
        self.shared = [Vectors(seeds, (self.width, 32, self.width), nn.ReLU())]
        self.own = [*encoders, *heads]

    def answers(self, chosen: Sequence[Tensor]) -> list[Tensor]:
        """Of each task ``[S, n, outputs]``."""
        encoders, heads = self.own[: len(self.tasks)], self.own[len(self.tasks) :]
        inputs = zip(encoders, self.inputs, chosen, strict=True)
        encoded = torch.cat([encoder(rows[places]).relu() for encoder, rows, places in inputs], dim=1)
        features = self.shared[0](encoded).relu().split([places.shape[1] for places in chosen], dim=1)
        return [head(of_task) for head, of_task in zip(heads, features, strict=True)]

    def batch(self) -> tuple[Tensor, ...]:
        return tuple(self.drawn(places["training"], self.size) for places in self.places)

    def losses(self, batch: tuple[Tensor, ...]) -> Tensor:
        answers = zip(self.answers(batch), self.targets, batch, strict=True)
        return torch.stack(
            [
                mean_cross_entropy(found, targets[chosen])
                if found.shape[2] > 1
                else (found[..., 0] - targets[chosen]).square().mean(dim=1)
                for found, targets, chosen in answers
            ]
        )

    def judged(self, part: Part) -> Tensor:
        chosen = [places[part] for places in self.places]
        answers = zip(self.answers(chosen), self.targets, chosen, strict=True)
        return torch.stack(
            [
                accuracy(found, targets[places])
                if found.shape[2] > 1
                else relative_rmse(found[..., 0], targets[places])
                for found, targets, places in answers
            ]
        )


class Texts(Problem):
    """The next character of documentation or of source code, from the eight before it; all parameters are shared."""

    title = "texts: prose, code"
    tasks = ("prose", "code")
    measures = (Measure("prose: bits a character", False), Measure("code: bits a character", False))
    weightings: ClassVar = {
        "plain sum": (1, 1),
        "weights 3 : 1": (3, 1),
        "weights 1 : 3": (1, 3),
        "weights 1 : 10": (1, 10),
    }
    steps = 200
    size, context, judged_characters = 64, 8, 1000
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;'\"()[]{}=+-*/_#<>@`"

    def __init__(self, seeds: Sequence[int]) -> None:
        import argparse
        import inspect
        from pydoc_data.topics import topics

        super().__init__(seeds)
        prose = "\n".join(topics[name] for name in sorted(topics))
        self.texts = [self.read(text) for text in (prose, inspect.getsource(argparse))]
        # The last tenths: text that was not seen, of the same kind.
        cuts = [torch.tensor([8, 9, 10]) * (len(text) - self.context) // 10 for text in self.texts]
        self.places = [
            {"training": torch.arange(int(first)), "validation": torch.arange(int(first), int(second)),
             "test": torch.arange(int(second), int(third))}
            for first, second, third in cuts
        ]  # fmt: skip
        self.letters = len(self.alphabet) + 1
        embedding = Vectors(seeds, (self.letters, 8), nn.ReLU())
        self.shared = [embedding, Vectors(seeds, (8 * self.context, 64, self.letters), nn.ReLU())]

    def read(self, text: str) -> Tensor:
        """Numbers of its characters, without case; all that the alphabet lacks is one more."""
        number = {character: place for place, character in enumerate(self.alphabet)}
        return torch.tensor([number.get(character, len(number)) for character in text.lower()])

    def windows(self, task: int, starts: Tensor) -> Tensor:
        """``[..., context + 1]`` characters from each start on."""
        return self.texts[task][starts[..., None] + torch.arange(self.context + 1)]

    def cross_entropy(self, windows: Sequence[Tensor]) -> Tensor:
        """``[T, S]`` nats a character, of ``[S, n, context + 1]`` of each text."""
        count = windows[0].shape[1]
        both = torch.cat(list(windows), dim=1)
        letters = F.one_hot(both[..., :-1], self.letters).float().flatten(1, 2)
        embedding, network = self.shared
        embedded = embedding(letters).unflatten(1, (-1, self.context)).flatten(2)
        pairs = zip(network(embedded).split(count, dim=1), both[..., -1].split(count, dim=1), strict=True)
        return torch.stack([mean_cross_entropy(scores, answers) for scores, answers in pairs])

    def batch(self) -> tuple[Tensor, ...]:
        every = [places["training"].expand(len(self.generators), -1) for places in self.places]
        return tuple(self.windows(task, self.drawn(starts, self.size)) for task, starts in enumerate(every))

    def losses(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.cross_entropy(batch)

    def judged(self, part: Part) -> Tensor:
        found = []
        for task, places in enumerate(self.places):
            starts = places[part][:: max(1, len(places[part]) // self.judged_characters)][: self.judged_characters]
            found.append(self.windows(task, starts).expand(len(self.generators), -1, -1))
        return self.cross_entropy(found) / math.log(2)


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


PROBLEMS: dict[str, type[Problem]] = {
    "digits": Digits,
    "tables": Tables,
    "texts": Texts,
    "poisson": Poisson,
    "burgers": Burgers,
}
