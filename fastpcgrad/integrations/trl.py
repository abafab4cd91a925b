"""Gradient surgery in TRL's supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, concatenate_datasets
from trl import SFTTrainer

from .settings import Surgery as Surgery
from .transformers import GradientSurgeryMixin


class SFTSurgeryTrainer(GradientSurgeryMixin, SFTTrainer):
    """``SFTTrainer`` with gradient surgery on micro-batches of one task each.

    Args:
        train_dataset: a ``Dataset`` whose rows have their task in ``surgery.task_key``, or a dict with a ``Dataset`` of
            the same columns for each task.
        surgery: ``Surgery``.
        All others are the trainer's.
    Raises:
        NotImplementedError: ``packing``, which puts rows of several tasks into one.
        TypeError: a dict of what are no ``Dataset``.
        See ``GradientSurgeryMixin``.
    """

    def __init__(self, *args: Any, train_dataset: Any = None, surgery: Surgery | None = None, **kwargs: Any) -> None:
        surgery = Surgery() if surgery is None else surgery
        names: tuple[str, ...] = ()
        if isinstance(train_dataset, Mapping):
            names = tuple(train_dataset)
            train_dataset = _joined(train_dataset, surgery.task_key)
        super().__init__(*args, train_dataset=train_dataset, surgery=surgery, **kwargs)
        if names:
            self._name_tasks(names)


def _joined(datasets: Mapping[str, Any], key: str) -> Dataset:
    """One dataset, in whose rows the name of each one's own stands."""
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            raise TypeError(f"train_dataset[{name!r}] must be a datasets.Dataset; found {type(dataset).__name__}")
    return concatenate_datasets([own.add_column(key, [name] * len(own)) for name, own in datasets.items()])
