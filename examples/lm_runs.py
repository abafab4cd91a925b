"""The language model's training, with and without surgery: one task at a time, in micro-batches, resumable."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastpcgrad
from examples.lm_model import LanguageModel, ModelConfig
from examples.lm_text import Text

PLAIN, SURGERY = "plain sum", "gradient surgery"


@dataclass(frozen=True)
class Settings:
    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int = 160
    micro_batches: int = 2
    sequences: int = 4
    learning_rate: float = 2e-3
    warm_up_steps: int = 10
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    save_every: int = 25
    held_out_sequences: int = 64
    seed: int = 0
    threads: int = 2  # among the settings, for sums over threads round in their own way


class Run:
    """One training: model, optimizer, schedule, generators and what was measured, all of it in ``state``.

    Nothing else in it is random: a model with dropout would have to keep the state of torch's generator as well.

    Attributes:
        losses: of each step, for each task the mean over its micro-batches, in bits a byte.
        cosines: of each step of the run with surgery ``[T, T]``.
    """

    def __init__(self, name: str, settings: Settings, texts: dict[str, Text]) -> None:
        self.name = name
        self.settings = settings
        self.texts = texts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = LanguageModel(settings.model)
        self.optimizer = torch.optim.AdamW(_groups(self.model, settings), lr=settings.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.sampling = torch.Generator().manual_seed(settings.seed)
        self.orders = torch.Generator().manual_seed(settings.seed)
        self.surgery: fastpcgrad.GradientSurgery | None = None
        if name == SURGERY:
            method = fastpcgrad.methods.PCGrad(generator=self.orders)
            self.surgery = fastpcgrad.GradientSurgery(self.optimizer, len(texts), method, row_dtype=torch.bfloat16)
        self.losses: list[list[float]] = []
        self.cosines: list[Tensor] = []

    @property
    def done(self) -> int:
        return len(self.losses)

    def train(self, checkpoint: Path) -> Iterator[None]:
        """Run the steps that are left and yield after each; save every now and then, and at the end."""
        while self.done < self.settings.steps:
            self.step()
            if self.done % self.settings.save_every == 0 or self.done == self.settings.steps:
                self.save(checkpoint)
            yield

    def step(self) -> None:
        """Each task's micro-batches forward and backward, one graph at a time; merge; clip; step."""
        self.losses.append([self._accumulate(t, text) for t, text in enumerate(self.texts.values())])
        if self.surgery is not None:
            self.cosines.append(self.surgery.merge().cosines)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def _accumulate(self, t: int, text: Text) -> float:
        inside: AbstractContextManager[Any] = nullcontext() if self.surgery is None else self.surgery.task(t)
        total = 0.0
        with inside:
            for _ in range(self.settings.micro_batches):
                tokens = windows(text.train, self.settings.model.context, self.settings.sequences, self.sampling)
                loss = self._loss(tokens) / self.settings.micro_batches
                loss.backward()
                total += loss.item() / math.log(2)
        return total

    def _loss(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def _rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a tenth."""
        warm_up, steps = self.settings.warm_up_steps, self.settings.steps
        if step < warm_up:
            return (step + 1) / warm_up
        progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    @torch.no_grad()
    def held_out(self) -> list[float]:
        """For each task bits a byte on text that was not trained on; the same text in every run."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        self.model.eval()
        found = []
        for text in self.texts.values():
            count = self.settings.held_out_sequences
            tokens = windows(text.held_out, self.settings.model.context, count, generator)
            found.append(self._loss(tokens).item() / math.log(2))
        self.model.train()
        return found

    def state(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "method": {} if self.surgery is None else self.surgery.method.state_dict(),
            "sampling": self.sampling.get_state(),
            "orders": self.orders.get_state(),
            "losses": self.losses,
            "cosines": self.cosines,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, with the numbers of a training that was never interrupted.

        Raises:
            ValueError: it was taken with other settings; names them.
        """
        now = asdict(self.settings)
        other = {key: value for key, value in state["settings"].items() if now.get(key) != value}
        if other:
            raise ValueError(f"the checkpoint was made with {other}; now { ({key: now.get(key) for key in other}) }")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.surgery is not None:
            self.surgery.method.load_state_dict(state["method"])
        self.sampling.set_state(state["sampling"])
        self.orders.set_state(state["orders"])
        self.losses, self.cosines = state["losses"], state["cosines"]

    def save(self, path: Path) -> None:
        """Write ``state``; a checkpoint is there whole or is the one before, whenever the process ends."""
        partial = path.with_suffix(".partial")
        torch.save(self.state(), partial)
        os.replace(partial, path)


def windows(text: Tensor, context: int, count: int, generator: torch.Generator) -> Tensor:
    """Random stretches of the text, ``[count, context + 1]`` int64: inputs and, one further on, targets."""
    starts = torch.randint(len(text) - context, (count, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()


def _groups(model: LanguageModel, settings: Settings) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms and biases."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
