"""Gradient surgery in Lightning, of either package: ``lightning`` or ``pytorch_lightning``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._tasks import index_of
from .._warnings import warn
from ..merging.report import ConflictReport
from ..monitor import ConflictMonitor
from ..surgery import GradientSurgery
from .probes import probe
from .settings import Surgery as Surgery
from .settings import as_run_by, factor_of, total_of

if find_spec("lightning") is not None:
    from lightning.pytorch import Callback
else:
    from pytorch_lightning import Callback

_STATE = "fastpcgrad"


class GradientSurgeryMixin:
    """Gradient surgery in front of a ``LightningModule``: ``class Model(GradientSurgeryMixin, LightningModule)``.

    In automatic optimization ``training_step`` returns ``self.surgery({"seg": ..., "depth": ...})``, of all tasks or of
    those that this batch has. Each loss runs backward inside its task, with the scale that the precision gives it;
    where the accumulation ends, the rows are merged into ``.grad``, before clipping and the step. On several processes,
    with ``strategy="ddp"`` or ``fully_shard`` under ``ModelParallelStrategy``, rows are means over these, and all have
    losses of the same tasks in the same batch.
    Checkpoints have the surgery's state. Logged are ``surgery/...``: the figures of each merge, and each task's loss.

    Attributes:
        surgery_report: the ``ConflictReport`` of the last merge; None before the first.
    Raises:
        In training: RuntimeError for a loss that is no multiple of what ``self.surgery`` gave, and in manual
            optimization; TypeError where ``configure_optimizers`` gives a ``fastpcgrad.PCGrad``; NotImplementedError
            for several optimizers, and for strategies other than these on several processes.
    Warns:
        FastPCGradWarning: a checkpoint without the surgery's state.
    """

    surgery_report: ConflictReport | None = None
    trainer: Any
    automatic_optimization: bool
    _settings: Surgery
    _rounds: GradientSurgery | None = None
    _optimizers_of_rounds: Any = None
    _losses: Mapping[Any, Tensor | None] | None = None
    _total: GradientEdge | None = None
    _state_to_load: dict[str, Any] | None = None

    def configure_surgery(self) -> Surgery:
        """What to override: how task gradients are merged."""
        return Surgery()

    def surgery(self, losses: Mapping[Any, Tensor | None]) -> Tensor:
        """The losses of this batch, for ``training_step`` to return: their sum, which knows them.

        Args:
            losses: by the names of the tasks; None, or not in it: absent.
        """
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._surgery, reason="it keeps the losses for the backward pass")(losses)
        return self._surgery(losses)

    def _surgery(self, losses: Mapping[Any, Tensor | None]) -> Tensor:
        if not self.automatic_optimization:
            raise RuntimeError(
                "self.surgery is of automatic optimization; in manual optimization use fastpcgrad.GradientSurgery("
                "self.optimizers(), tasks=[...]) and 'with surgery.task(name): self.manual_backward(loss)'"
            )
        total, self._total = total_of(losses)
        self._losses = dict(losses)
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self.automatic_optimization:  # manual_backward
            super().backward(loss, *args, **kwargs)  # type: ignore[misc]
            return
        losses, total = self._losses, self._total
        self._losses = self._total = None
        if losses is None:
            raise RuntimeError(
                "training_step returned a loss that knows no tasks: return self.surgery({'seg': ..., 'depth': ...})"
            )
        surgery = self._built(losses)
        factor = factor_of(loss, total)
        present = {
            index_of(task, surgery.num_tasks, surgery.tasks): own for task, own in losses.items() if own is not None
        }
        plain = partial(super().backward, *args, **kwargs)  # type: ignore[misc]
        try:
            scaled = {t: own * factor for t, own in as_run_by(plain, present).items()}
            surgery._add(scaled, retain_graph=kwargs.get("retain_graph", False))
            of_tasks = {f"surgery/loss/{name}": own.detach() for name, own in losses.items() if own is not None}
            self._log(of_tasks, sync_dist=True)
            if not self.trainer.fit_loop._should_accumulate():
                self._merge(surgery)
        except BaseException:
            surgery.discard()
            raise

    def _merge(self, surgery: GradientSurgery) -> None:
        self.surgery_report = self._settings.merged(surgery)
        self._log(self._settings.figures(self.surgery_report))

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        def closure() -> Any:
            result = None if optimizer_closure is None else optimizer_closure()
            # The last batch of an accumulation was skipped, for which training_step returned None.
            if result is None and self._rounds is not None and not self._rounds._stays.is_clear:
                self._merge(self._rounds)
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)  # type: ignore[misc]

    def _log(self, figures: Mapping[str, Any], *, sync_dist: bool = False) -> None:
        if self.trainer.logger is not None or self.trainer.callbacks:
            self.log_dict(figures, sync_dist=sync_dist)  # type: ignore[attr-defined]

    def _built(self, losses: Mapping[Any, Any]) -> GradientSurgery:
        """The surgery, in the first backward pass: by then the optimizer is what the strategy has made of it."""
        trainer = self.trainer
        if self._rounds is None or self._optimizers_of_rounds is not trainer.optimizers:
            strategy = type(trainer.strategy).__name__
            is_alone = trainer.world_size == 1 and not any(name in strategy for name in ("DeepSpeed", "FSDP"))
            if not is_alone and not strategy.startswith(("DDP", "ModelParallel")):
                raise NotImplementedError(
                    f"found {strategy} on {trainer.world_size} processes: the integration covers one process, "
                    "DistributedDataParallel, strategy='ddp', and fully_shard, strategy=ModelParallelStrategy(). "
                    "DeepSpeed and FullyShardedDataParallel keep gradients of their own"
                )
            if len(trainer.optimizers) != 1:
                raise NotImplementedError(f"gradient surgery needs one optimizer; found {len(trainer.optimizers)}")
            self._settings = self.configure_surgery()
            self._rounds = self._settings.on(trainer.optimizers[0], self, list(losses))  # type: ignore[arg-type]
            self._optimizers_of_rounds = trainer.optimizers
        if self._state_to_load is not None:
            self._rounds.load_state_dict(self._state_to_load)
            self._state_to_load = None
        return self._rounds

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if self._rounds is not None:
            checkpoint[_STATE] = self._rounds.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self._state_to_load = checkpoint.get(_STATE)
        if self._state_to_load is None:
            warn("the checkpoint has no state of a surgery: that of its method begins anew")


class ConflictCallback(Callback):
    """Watches how task gradients conflict: logs a ``ConflictMonitor``'s averages whenever it has looked.

    Args:
        monitor: is given the losses by ``monitor.observe(...)`` in ``training_step``, or by this callback. Where there
            is surgery, ``Surgery(monitor=...)`` does without either.
        losses: takes the module and a batch, and gives the losses by task; run for the batches at which it is time to
            look, in evaluation mode, before the batch is trained on. Weights and generators do not notice it.
    """

    def __init__(
        self, monitor: ConflictMonitor, losses: Callable[[Any, Any], Mapping[Any, Tensor | None]] | None = None
    ) -> None:
        self.monitor = monitor
        self._losses, self._logged = losses, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._losses is not None:
            probe(self.monitor, pl_module, lambda: self._losses(pl_module, batch))  # type: ignore[misc]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.monitor.looks != self._logged:
            self._logged = self.monitor.looks
            pl_module.log_dict(self.monitor.log())
