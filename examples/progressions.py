"""Three tasks for a small language model: go on counting up, counting down, or repeating.

A row is a mark of its task, a start, and what follows. All three start alike, so that what one task teaches the layers
is wrong for the others until they have learned to look at the mark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TASKS = {"up": 1, "down": -1, "repeat": 0}
"""What each number is more than the one before."""

NUMBERS, LENGTH = 24, 8


def rows(task: str, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """``count`` rows of one task, for ``DataCollator`` or ``stack``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(NUMBERS, (count, 1), generator=generator)
    numbers = (starts + torch.arange(LENGTH) * TASKS[task]) % NUMBERS
    marks = torch.full((count, 1), NUMBERS + list(TASKS).index(task))
    return [{"input_ids": row, "labels": row} for row in torch.cat([marks, numbers], dim=1)]


def stack(chosen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length as a batch."""
    return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}


def language_model(seed: int = 0) -> LlamaForCausalLM:
    """Four layers, from a config: nothing is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUMBERS + len(TASKS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH + 1,
    )
    return LlamaForCausalLM(config)
