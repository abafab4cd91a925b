"""Gradient surgery in a loop of Accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .._losses import present_losses
from .._tasks import in_order
from ..merging.report import ConflictReport
from ..methods import Method
from ..monitor import ConflictMonitor
from .settings import Surgery as Surgery
from .settings import as_run_by, refuse_wrapper

if TYPE_CHECKING:
    from accelerate import Accelerator


class GradientSurgery:
    """``surgery.backward(losses)`` in the place of ``accelerator.backward(loss)``.

    Each loss runs backward inside its task, with the share of an accumulation and the loss scale that
    ``accelerator.backward`` gives it. Where gradients are synchronized, on the last micro-batch of an accumulation, the
    rows are merged into ``.grad``: clip, step and zero as ever. A micro-batch may have the losses of some tasks only.
    With DistributedDataParallel and with the second FSDP, whose parameters are those of ``fully_shard``, rows are means
    over the processes, and all have the same tasks in the same micro-batch.

    Args:
        accelerator: the ``Accelerator``.
        optimizer: as ``accelerator.prepare`` gave it.
        tasks: their names, or how many there are.
        method, options: see ``fastpcgrad.GradientSurgery``.
        model: whose layers are meant by ``granularity="layer"``; also one with adapters.
        monitor: notes the report of each merge.
    Attributes:
        report: of the last merge; None before the first.
    Raises:
        TypeError: the optimizer is a ``fastpcgrad.PCGrad``.
        NotImplementedError: DeepSpeed, Megatron-LM, the first FSDP, and what else is neither DistributedDataParallel
            nor the second FSDP; the latter with accumulation that does not reduce each micro-batch.
    Example:
        surgery = GradientSurgery(accelerator, optimizer, tasks=["seg", "depth"])
        accelerator.register_for_checkpointing(surgery)
        for batch in loader:
            with accelerator.accumulate(model):
                surgery.backward({"seg": seg_loss, "depth": depth_loss})
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Any,
        tasks: Sequence[str] | int,
        method: Method | None = None,
        *,
        model: nn.Module | None = None,
        monitor: ConflictMonitor | None = None,
        **options: Any,
    ) -> None:
        refuse_strategies(accelerator, accelerator.gradient_accumulation_steps)
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer must be what accelerator.prepare gave; found {type(optimizer).__name__}")
        refuse_wrapper(optimizer)
        self._accelerator = accelerator
        self._settings = Surgery(tasks=tasks, method=method, options=options, monitor=monitor)
        self._surgery = self._settings.on(optimizer, model)
        self.report: ConflictReport | None = None

    @property
    def tasks(self) -> Sequence[str]:
        """The names of the tasks; empty where they have none."""
        return self._surgery.tasks

    def backward(
        self, losses: Mapping[Any, Tensor | None] | Sequence[Tensor | None] | Tensor, *, retain_graph: bool = False
    ) -> ConflictReport | None:
        """Each loss backward inside its task; the merge, where gradients are synchronized.

        Args:
            losses: a dict by names, or one for each task; None, or not in the dict: absent in this micro-batch. They
                may share a graph.
            retain_graph: keep the graphs after the last pass, too.
        Returns:
            the report, where rows were merged; else None.
        Raises:
            TypeError, ValueError: see ``fastpcgrad.GradientSurgery.backward``.
            Whatever a backward pass raises; the rows of this accumulation are then discarded.
        """
        surgery = self._surgery
        present = present_losses(in_order(losses, surgery.num_tasks, surgery.tasks))
        if max(present) >= surgery.num_tasks:
            raise ValueError(f"losses must hold at most one for each of the {surgery.num_tasks} tasks")
        try:
            surgery._add(as_run_by(self._accelerator.backward, present), retain_graph)
            if not self._accelerator.sync_gradients:
                return None
            self.report = self._settings.merged(surgery)
        except BaseException:
            surgery.discard()
            raise
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """For ``accelerator.register_for_checkpointing``; see ``fastpcgrad.GradientSurgery.state_dict``."""
        return self._surgery.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._surgery.load_state_dict(state_dict)


def refuse_strategies(accelerator: Accelerator, accumulation: int) -> None:
    """NotImplementedError for what owns the gradients itself, or has parts of them elsewhere.

    Args:
        accumulation: micro-batches of a step.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    shards_parameters = kind == "FSDP" and accelerator.is_fsdp2
    is_alone = kind == "NO" and accelerator.num_processes == 1
    if not (is_alone or shards_parameters or kind.startswith("MULTI_")):
        raise NotImplementedError(
            f"found an Accelerator of {accelerator.num_processes} processes, distributed_type {kind}: the integrations "
            "cover one process, DistributedDataParallel, and fully_shard, which is FSDP with fsdp_version=2. "
            "DeepSpeed, Megatron-LM and the first FSDP keep gradients of their own, on which no surgery is possible"
        )
    if (parallelism := getattr(accelerator, "parallelism_config", None)) is not None:
        raise NotImplementedError(
            f"found an Accelerator with {parallelism}: the integrations cover data parallelism; with tensors that are "
            "sharded in other ways use fastpcgrad.GradientSurgery in a loop of your own (docs/distributed.md)"
        )
    if shards_parameters and accumulation > 1 and not accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"):
        raise NotImplementedError(
            f"found {accumulation} micro-batches a step, whose gradients Accelerate leaves unreduced but for the last: "
            "with fully_shard each task's have to be reduced. Pass GradientAccumulationPlugin(num_steps="
            f"{accumulation}, sync_each_batch=True), or to a Trainer "
            "accelerator_config={'gradient_accumulation_kwargs': {'sync_each_batch': True}}"
        )
