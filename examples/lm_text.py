"""Three texts that are on every machine where the examples run: code, English prose, and pictures of digits."""

from __future__ import annotations

import os
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

SHADES = " .:-=+*#%@"
HELD_OUT = 10
"""Every tenth document is kept for evaluation."""


@dataclass(frozen=True)
class Text:
    """One task's documents, joined.

    Attributes:
        train, held_out: bytes, 1-D uint8.
    """

    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, documents: list[str]) -> Text:
        held_out = documents[::HELD_OUT]
        train = [document for index, document in enumerate(documents) if index % HELD_OUT]
        return cls(_bytes(train), _bytes(held_out))


def load() -> dict[str, Text]:
    """The text of each task by its name."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    digits = load_digits()
    return {
        "Python": Text.of([source.read_text(encoding="utf-8") for source in sources]),
        "English": Text.of([text for _, text in sorted(pydoc_data.topics.topics.items())]),
        "digits": Text.of([drawn(*pair) for pair in zip(digits.images, digits.target, strict=True)]),
    }


def drawn(image: Tensor, label: int) -> str:
    """A handwritten digit as eight lines of eight characters, under a line that says which it is."""
    levels = (torch.as_tensor(image) / 16 * (len(SHADES) - 1)).round().int()
    lines = ["".join(SHADES[level] for level in row) for row in levels.tolist()]
    return "\n".join([str(label), *lines, ""])


def _bytes(documents: list[str]) -> Tensor:
    return torch.frombuffer(bytearray("\n".join(documents).encode()), dtype=torch.uint8)
