"""Problems with data that comes with Python and scikit-learn alone: images, tables, texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality_problems.base import Measure, Part, Problem, Vectors


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
    """Noisy handwritten digits: which one (cross-entropy), and the sum of its pixels (squared error, in raw units)."""

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
