"""Gradient surgery in the Trainer of transformers, and in trainers that are made from it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import seed_worker

from .._tasks import check_tasks, index_of
from .._warnings import warn
from ..merging.report import ConflictReport
from ..monitor import ConflictMonitor
from ..surgery import GradientSurgery
from .accelerate import refuse_strategies
from .probes import probe
from .settings import Surgery as Surgery
from .settings import as_run_by, factor_of, total_of
from .task_batches import TaskBatchSampler, TaskCollator, TaskDatasets, indices_of, names_in, one_task, tasks_of_rows

_STATE = "surgery.pt"
_STEP_IN_BACKWARD = ("lomo", "adalomo")
"""Besides these all optimizers whose name ends in ``_layerwise``."""


class GradientSurgeryMixin:
    """Gradient surgery in front of a ``Trainer`` class: ``class MyTrainer(GradientSurgeryMixin, Trainer)``.

    Either each micro-batch is of one task: the rows of ``train_dataset`` have it in ``surgery.task_key``, by name or by
    index, or ``train_dataset`` is a dict with a dataset for each task. The trainer then makes batches of one task, in
    the order of its sampler; with ``surgery.normalize="task"`` means over tokens and micro-batches are those of each
    task. ``current_task`` says which it is. Or each micro-batch has several losses: ``compute_loss`` returns
    ``self.task_losses({"seg": ..., "depth": ...})``.

    On several processes, with DistributedDataParallel, rows are means over these, and a micro-batch is of the same task
    in all: they have the parts of what one process has in batches as many times as large.

    Where the accumulation ends, the rows are merged into ``.grad``; clipping, the step, schedules, loss scales and
    checkpoints stay the Trainer's. Checkpoints have the surgery's state beside the optimizer's, and logs have
    ``surgery/...``: the figures of the last step's report, and the mean loss of each task since the last log.

    Args:
        surgery: ``Surgery``; None: ``Surgery()``.
        All others are the Trainer's.
    Attributes:
        surgery_report: the ``ConflictReport`` of the last step.
        current_task: the name, or the index, of the micro-batch's task; None where it has several losses.
    Raises:
        NotImplementedError: DeepSpeed, the first FSDP, DataParallel, optimizers that step within the backward pass
            (LOMO, those by layers), packing, which mixes tasks in a row; on several processes ``split_batches``, and
            batches of one task that one process dispatches; the second FSDP with accumulation that does not reduce each
            micro-batch.
        In training: KeyError where a micro-batch has no task and no losses of several; ValueError for one of several
            tasks; RuntimeError for a loss with more in it than ``task_losses`` gave; TypeError for ``PCGrad``.
    Warns:
        FastPCGradWarning: a checkpoint without the surgery's state; fewer micro-batches an accumulation than tasks.
    """

    def __init__(self, *args: Any, surgery: Surgery | None = None, **kwargs: Any) -> None:
        self.surgery = Surgery() if surgery is None else surgery
        self.surgery_report: ConflictReport | None = None
        self.current_task: str | int | None = None
        self._rounds: GradientSurgery | None = None
        self._optimizer_of_rounds: Any = None
        self._tasks: Sequence[str] | int | None = self.surgery.tasks
        self._state_to_load: dict[str, Any] | None = None
        self._micro_batches: Counter[int] = Counter()
        self._items: dict[int, Any] = {}
        self._step: _Step | None = None
        self._means = _MeanLosses()
        super().__init__(*args, **kwargs)
        self._refuse()
        self._take_datasets()

    # What a trainer is made of, as far as it is used here.
    args: Any
    accelerator: Any
    model: Any
    optimizer: Any
    data_collator: Any
    current_gradient_accumulation_steps: int
    _signature_columns: Any

    def _take_datasets(self) -> None:
        """One dataset of a dict of them, and the names of the tasks."""
        if isinstance(self.train_dataset, Mapping):
            self.train_dataset: Any = TaskDatasets(self.train_dataset, self.surgery.task_key)
            self._name_tasks(self.train_dataset.names)

    def _name_tasks(self, names: Sequence[str]) -> None:
        """What the datasets are called, where the tasks have no names of their own."""
        if self._tasks is None or self._tasks == len(names):
            self._tasks = names

    def task_losses(self, losses: Mapping[str, Tensor | None]) -> Tensor:
        """The losses of several tasks on one micro-batch, for ``compute_loss`` to return: their sum, which knows them.

        Args:
            losses: by the names of the tasks; None, or not in it: absent.
        """
        (total, edge), step = total_of(losses), self._step
        if step is None:  # in evaluation
            return total
        if step.task is not None:
            raise RuntimeError(
                f"task_losses on a micro-batch that is of one task, {self.current_task!r} in "
                f"{self.surgery.task_key!r}: give the one or the other"
            )
        self._tasks = self._tasks or list(losses)
        count, names = check_tasks(None, self._tasks)
        step.losses = {index_of(key, count, names): loss for key, loss in losses.items() if loss is not None}
        step.total = edge
        return total

    # Batches of one task

    def get_train_dataloader(self) -> DataLoader[Any]:
        dataset, key = self.train_dataset, self.surgery.task_key
        found = None if isinstance(dataset, IterableDataset) else tasks_of_rows(dataset, key)
        if found is None:
            with self._keeping(key):
                loader: DataLoader[Any] = super().get_train_dataloader()  # type: ignore[misc]
            return loader
        if getattr(self.args, "train_sampling_strategy", "") == "batch_rebalance":
            raise NotImplementedError("train_sampling_strategy='batch_rebalance' puts several tasks into a batch")
        self._tasks = self._tasks or names_in(found)
        count, names = check_tasks(None, self._tasks)
        tasks = indices_of(found, count, names)
        if self.accelerator.num_processes > 1 and (self.accelerator.split_batches or self.accelerator.dispatch_batches):
            raise NotImplementedError(
                "batches of one task on several processes with split_batches or dispatch_batches: leave both at their "
                "defaults, by which each process takes batches of its own"
            )
        self._warn_of_few_micro_batches(len(set(tasks)))
        with self._keeping(key):
            collator = self.data_collator
            if hasattr(dataset, "column_names"):
                dataset = self._remove_unused_columns(dataset, description="training")  # type: ignore[attr-defined]
            else:
                collator = self._get_collator_with_removed_columns(collator, description="training")  # type: ignore[attr-defined]
        args = self.args
        loader = DataLoader(
            dataset,
            batch_sampler=TaskBatchSampler(
                self._get_train_sampler(self.train_dataset),  # type: ignore[attr-defined]
                tasks,
                self._train_batch_size,  # type: ignore[attr-defined]
                args.dataloader_drop_last,
                self.accelerator.num_processes,
            ),
            collate_fn=TaskCollator(
                collator,
                key,
                partial(index_of, count=count, names=names),
                as_tensor=key in self._signature_columns,
            ),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        return self.accelerator.prepare(loader)

    def _warn_of_few_micro_batches(self, tasks: int) -> None:
        if tasks > self.args.gradient_accumulation_steps:
            warn(
                f"gradient_accumulation_steps={self.args.gradient_accumulation_steps} micro-batches for {tasks} tasks: "
                "in no step are all of them there to be merged"
            )

    @contextmanager
    def _keeping(self, key: str) -> Iterator[None]:
        """A column more that the Trainer leaves in the data."""
        self._set_signature_columns_if_needed()  # type: ignore[attr-defined]
        before = self._signature_columns
        self._signature_columns = [*before, key]
        try:
            yield
        finally:
            self._signature_columns = before

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        groups: dict[int, list[Any]] = {}
        for sample in samples:
            if (task := self._task_of(sample)) is not None:
                groups.setdefault(task, []).append(sample)
        self._micro_batches = Counter({task: len(own) for task, own in groups.items()})
        self._check_alike(device)
        self._items = {}
        if items is not None:
            self._items = {task: self._get_num_items_in_batch(own, device) for task, own in groups.items()}  # type: ignore[attr-defined]
        return samples, items

    def _check_alike(self, device: torch.device) -> None:
        """RuntimeError, in all processes, where they have micro-batches of other tasks each."""
        if self.accelerator.num_processes == 1 or self._tasks is None:
            return
        own = [self._micro_batches[task] for task in range(check_tasks(None, self._tasks)[0])]
        found = self.accelerator.gather(torch.tensor([own], device=device)).tolist()
        if any(other != own for other in found):
            raise RuntimeError(
                f"processes must have the same tasks in the same micro-batches; the numbers of micro-batches by task "
                f"are {found}, a list for each process: leave the batches to the trainer, which shares them out so"
            )

    def _task_of(self, inputs: Any) -> int | None:
        """The index of a micro-batch's task; None where it has none."""
        key = self.surgery.task_key
        if key not in inputs:
            return None
        task = one_task(inputs[key], key)
        if self._tasks is None:
            raise ValueError(
                f"batches have tasks in {key!r}, and it is not known how many there are: give Surgery(tasks=[...])"
            )
        return index_of(task, *check_tasks(None, self._tasks))

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Without the task, unless the model takes it: in training as in evaluation."""
        self._set_signature_columns_if_needed()  # type: ignore[attr-defined]
        key = self.surgery.task_key
        if key in inputs and key not in self._signature_columns:
            inputs = {name: value for name, value in inputs.items() if name != key}
        return super()._prepare_inputs(inputs)  # type: ignore[misc]

    # Surgery

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        task, whole = self._task_of(inputs), self.current_gradient_accumulation_steps
        is_by_task = task is not None and self.surgery.normalize == "task"
        if task is not None and is_by_task:
            self.current_gradient_accumulation_steps = self._micro_batches[task]
            num_items_in_batch = self._items.get(task)
        self._step, self.current_task = _Step(task, sorted(inputs)), self._name_of(task)
        plain = self.accelerator.backward
        self.accelerator.backward = partial(self._backward, plain)
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
            if self.accelerator.sync_gradients:
                self.surgery_report = self.surgery.merged(self._built())
                self._means.end_round()
        except BaseException:
            if self._rounds is not None:
                self._rounds.discard()
            raise
        finally:
            self.accelerator.backward = plain
            self.current_gradient_accumulation_steps, self._step = whole, None
        return loss / len(self._micro_batches) if is_by_task else loss

    def _backward(self, plain: Any, loss: Tensor, **kwargs: Any) -> None:
        """In the place of ``accelerator.backward``."""
        step, surgery = self._step, self._built()
        assert step is not None
        if step.losses:
            factor = factor_of(loss, step.total)
            of_tasks = {task: own * factor for task, own in step.losses.items()}
        elif step.task is not None:
            of_tasks = {step.task: loss}
        else:
            raise KeyError(
                f"no {self.surgery.task_key!r} in a micro-batch of {step.columns}, and compute_loss returned no "
                "self.task_losses({...}): it is not known which task its loss is of"
            )
        surgery._add(as_run_by(partial(plain, **kwargs), of_tasks), retain_graph=False)
        for task, own in of_tasks.items():
            self._means.add(task, own.detach())

    def _built(self) -> GradientSurgery:
        """The surgery on the optimizer as it is prepared now."""
        if self._rounds is None or self._optimizer_of_rounds is not self.optimizer:
            self._rounds = self.surgery.on(self.optimizer, self.model, self._tasks)
            self._optimizer_of_rounds = self.optimizer
        if self._state_to_load is not None:
            self._rounds.load_state_dict(self._state_to_load)
            self._state_to_load = None
        return self._rounds

    def _name_of(self, task: int | None) -> str | int | None:
        return task if task is None or self._tasks is None or isinstance(self._tasks, int) else self._tasks[task]

    # Logs and checkpoints

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.surgery_report is not None:
            means = {
                f"surgery/loss/{self._name_of(task)}": mean
                for task, mean in self._means.taken(self.accelerator.reduce).items()
            }
            logs.update(self.surgery.figures(self.surgery_report) | means)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save and self._rounds is not None:
            torch.save(self._rounds.state_dict(), os.path.join(output_dir, _STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, _STATE)
        if os.path.exists(path):
            self._state_to_load = torch.load(path, map_location="cpu", weights_only=True)
        else:
            warn(f"{checkpoint} has no {_STATE}: the state of the surgery's method begins anew")

    def _refuse(self) -> None:
        """NotImplementedError for what is not covered."""
        args = self.args
        refuse_strategies(self.accelerator, args.gradient_accumulation_steps)
        optimizer = str(getattr(args.optim, "value", args.optim))
        found = {
            f"optim={optimizer!r}, which steps within the backward pass": optimizer in _STEP_IN_BACKWARD
            or optimizer.endswith("_layerwise"),
            "packing, which puts several tasks into a row": getattr(args, "packing", False),
            f"DataParallel on {args.n_gpu} GPUs": args.n_gpu > 1,
            "a model that was sharded when it was loaded": getattr(
                self, "is_distributed_loading_by_transformers", False
            ),
        }
        for what in (what for what, is_there in found.items() if is_there):
            raise NotImplementedError(f"gradient surgery does not cover {what}")


@dataclass
class _Step:
    """What is known of a micro-batch while its loss is computed.

    Attributes:
        task: whose it is; None: of several, or not known.
        columns: what it has.
        losses, total: of several tasks, by index, and the edge of their sum.
    """

    task: int | None
    columns: list[str]
    losses: dict[int, Tensor] = field(default_factory=dict)
    total: GradientEdge | None = None


class _MeanLosses:
    """The mean loss of each task since they were last taken: of its sum in each accumulation that it was in."""

    def __init__(self) -> None:
        self._now: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._counts: Counter[int] = Counter()

    def add(self, task: int, loss: Tensor) -> None:
        self._now[task] = self._now[task] + loss if task in self._now else loss

    def end_round(self) -> None:
        for task, loss in self._now.items():
            self._sums[task] = self._sums[task] + loss if task in self._sums else loss
            self._counts[task] += 1
        self._now = {}

    def taken(self, reduce: Callable[..., Tensor]) -> dict[int, float]:
        """With one copy to the host.

        Args:
            reduce: ``accelerator.reduce``; called by all processes.
        """
        tasks = list(self._sums)
        sums = [self._sums[task].float() for task in tasks]
        values = reduce(torch.stack(sums), "mean").tolist() if tasks else []
        means = {task: value / self._counts[task] for task, value in zip(tasks, values, strict=True)}
        self._sums, self._counts = {}, Counter()
        return means


class GradientSurgeryTrainer(GradientSurgeryMixin, Trainer):
    """``Trainer`` with gradient surgery: ``GradientSurgeryTrainer(..., surgery=Surgery(tasks=["qa", "nli"]))``; see
    ``GradientSurgeryMixin``.
    """


class ConflictCallback(TrainerCallback):
    """Watches how task gradients conflict: a ``ConflictMonitor``'s averages are in the Trainer's logs.

    Callbacks that come after it see them, too. A trainer puts those that report to TensorBoard and the like first:
    ``trainer.callback_handler.callbacks.insert(0, ConflictCallback(...))`` comes before them.

    Args:
        monitor: is given the losses by ``monitor.observe(...)`` in ``compute_loss``, or by this callback. Where there
            is surgery, ``Surgery(monitor=...)`` does without either.
        losses: takes the model and gives the losses by task, of a batch that it knows; run before the steps at which it
            is time to look, in evaluation mode. Weights and generators do not notice it.
    """

    def __init__(
        self, monitor: ConflictMonitor, losses: Callable[[Any], Mapping[Any, Tensor | None]] | None = None
    ) -> None:
        self.monitor = monitor
        self._losses, self._logged = losses, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._losses is not None:
            probe(self.monitor, model, lambda: self._losses(model))  # type: ignore[misc]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or self.monitor.looks == self._logged:
            return
        self._logged = self.monitor.looks
        figures = self.monitor.log()
        logs.update(figures)
        state.log_history[-1].update(figures)
