"""Gradient surgery in the trainer of sentence-transformers: a task for each dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from torch.utils.data import DataLoader

from .settings import Surgery as Surgery
from .transformers import GradientSurgeryMixin


class SentenceTransformerSurgeryTrainer(GradientSurgeryMixin, SentenceTransformerTrainer):
    """``SentenceTransformerTrainer`` with gradient surgery on a ``DatasetDict``, whose keys are the tasks.

    Batches are the trainer's own, of one dataset each, by ``multi_dataset_batch_sampler``; the loss may be one for all
    datasets or a dict. Losses with a backward pass of their own (``Cached...``) are covered. What is merged when, and
    what ``surgery.normalize`` does, is the same as in ``GradientSurgeryMixin``.

    Args:
        surgery: ``Surgery``; its ``task_key`` has no meaning here.
        All others are the trainer's.
    Raises:
        TypeError: ``train_dataset`` is no dict of datasets.
        NotImplementedError: several processes.
        See ``GradientSurgeryMixin``.
    Warns:
        FastPCGradWarning: fewer micro-batches an accumulation than datasets.
    """

    def __init__(self, *args: Any, surgery: Surgery | None = None, **kwargs: Any) -> None:
        surgery = replace(Surgery() if surgery is None else surgery, task_key="dataset_name")
        super().__init__(*args, surgery=surgery, **kwargs)

    def should_dataset_name_column_be_added(self, dataset: Any, args: Any, loss: Any) -> bool:
        """Wherever there are several datasets."""
        return isinstance(dataset, Mapping)

    def _take_datasets(self) -> None:
        if not isinstance(self.train_dataset, Mapping):
            raise TypeError(
                f"train_dataset must be a DatasetDict with a dataset for each task; found {type(self.train_dataset)}"
            )
        self._name_tasks(tuple(self.train_dataset))

    def _refuse(self) -> None:
        super()._refuse()
        if self.accelerator.num_processes > 1:
            raise NotImplementedError(
                f"found {self.accelerator.num_processes} processes, among which the trainer deals out batches of "
                "several datasets at once, and surgery needs those of one: train in one process"
            )

    def get_train_dataloader(self) -> DataLoader[Any]:
        self._warn_of_few_micro_batches(len(self.train_dataset))
        loader: DataLoader[Any] = SentenceTransformerTrainer.get_train_dataloader(self)
        return loader

    def _prepare_inputs(self, inputs: Any) -> Any:
        """With the name of the dataset, which ``compute_loss`` takes out."""
        return SentenceTransformerTrainer._prepare_inputs(self, inputs)
