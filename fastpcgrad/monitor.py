"""ConflictMonitor: how task gradients conflict, over a whole training, whether or not there is surgery."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ._graph import check_kept, explain, run_grad
from ._losses import present_losses
from ._modes import not_compiled
from ._tasks import check_tasks, in_order, index_of
from .distributed.processes import check_graph
from .merging import conflict_maps
from .merging.report import ConflictReport, cosines_of, of_pairs
from .rows.layers import Layers
from .rows.parameters import HasGroups, parameter_source
from .rows.task_gradients import TaskGradients

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class ConflictMonitor:
    """Looks at the task gradients every now and then, and keeps running averages of how they conflict.

    Training does not change by it, not by a bit: ``observe`` takes gradients beside the training's own, draws nothing
    and touches no ``.grad``. Averages stay on the gradients' device until ``log``, ``plot`` or ``to_pandas`` asks. What
    is not finite is left out of them.

    Args:
        model_or_params: a model, parameters, or an optimizer. What is trainable at the time of a look counts.
        tasks: their names, or how many there are.
        granularity: ``layer``: also for each layer of the model (see ``GradientSurgery``) by itself, which is where
            conflicts show that cancel in the whole. ``parameter``: for each parameter. ``model``: over all alone. None:
            ``layer`` where a model is given, else ``model``.
        every: ``observe`` and ``note`` look at the first and then at each further ``every``-th call; the others cost
            nothing.
        decay: of the running averages: a look counts 1, and what was there before ``decay`` times what it counted.
        history: of how many looks the figure shows the course.
    Attributes:
        calls: of ``observe`` and ``note`` so far.
        looks: of these, those that looked, since the parameters or their layers last changed.
    Raises:
        TypeError, ValueError: wrong kinds of arguments; layers without a model.
    Memory: in a look T gradients of all parameters. Between looks 3·(S + 1)·T² numbers for S layers.
    Time: a look takes T backward passes; ``every=50`` makes that T / 50 a step.
    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> monitor = fastpcgrad.ConflictMonitor(model, tasks=["left", "right"], every=2)
        >>> for _ in range(4):
        ...     left, right = model(torch.randn(16, 4)).square().mean(dim=0)
        ...     looked = monitor.observe({"left": left, "right": right})
        ...     (left + right).backward()
        >>> monitor.looks, sorted(monitor.log())[:2]
        (2, ['conflicts/conflict/left-right', 'conflicts/conflict_rate'])
    """

    def __init__(
        self,
        model_or_params: nn.Module | HasGroups | Iterable[Any],
        tasks: Sequence[str] | int,
        *,
        granularity: Literal["model", "layer", "parameter"] | None = None,
        every: int = 50,
        decay: float = 0.9,
        history: int = 1000,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer >= 1; found {every!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1); found {decay!r}")
        is_model = isinstance(model_or_params, nn.Module)
        granularity = granularity or ("layer" if is_model else "model")
        if granularity not in ("model", "layer", "parameter"):
            raise ValueError(f"granularity must be 'model', 'layer' or 'parameter'; found {granularity!r}")
        if granularity != "model" and not is_model:
            raise ValueError(f"granularity={granularity!r} needs a model, whose names the layers have")
        self._layers: Layers | None = None
        self._source: nn.Module | HasGroups
        if isinstance(model_or_params, nn.Module):
            self._source = model_or_params
            if granularity != "model":
                self._layers = Layers(model_or_params, by_parameter=granularity == "parameter")
        else:
            self._source = parameter_source(model_or_params)
        self.num_tasks, self.tasks = check_tasks(None, tasks)
        self.every, self.decay, self.calls = every, decay, 0
        self._history: deque[tuple[int, Tensor]] = deque(maxlen=history)
        self.reset()

    def reset(self) -> None:
        """Forget all looks."""
        self.looks = 0
        self._names_of_layers: list[str] = []
        self._sums: Tensor | None = None  # of cosines, of conflicts, and what these count; [3, S + 1, T, T]
        self._norms: Tensor | None = None  # the same of norms; [2, T]
        self._history.clear()

    @property
    def is_time(self) -> bool:
        """Whether the next call of ``observe`` will look."""
        return self.calls % self.every == 0

    @not_compiled
    def observe(self, losses: Mapping[Any, Tensor | None] | Sequence[Tensor | None] | Tensor) -> bool:
        """Look at the gradients of these losses, if it is time to; before their own backward pass, whose graph is kept.

        Args:
            losses: a dict by the names of the tasks, or one for each; None, or not in it: absent. Scalars that may
                share a graph.
        Returns:
            whether it has looked.
        Raises:
            TypeError, ValueError: losses that are none, see ``PCGrad.pc_backward``.
            NotImplementedError: sharded parameters, of FSDP, fully_shard or tensor parallelism.
            RuntimeError: a graph that cannot be kept: a compiled model's, or one with reentrant checkpoints.
        """
        is_time, self.calls = self.is_time, self.calls + 1
        if not is_time:
            return False
        present = present_losses(in_order(losses, self.num_tasks, self.tasks))
        if max(present) >= self.num_tasks:
            raise ValueError(f"losses must hold at most one for each of {self.num_tasks} tasks; found {len(losses)}")
        parameters = self._parameters()
        check_graph(parameters, "local")
        check_kept(list(present.values()))
        grads = TaskGradients(parameters)
        try:
            for t, loss in present.items():
                grads.put(t, list(run_grad(loss, parameters, True)))
        except RuntimeError as error:
            explain(error)
            raise
        if self._layers is None:
            self._add(tuple(present), grads.columns().gram(None, 1), [])
        else:
            of, names = self._layers.of(parameters)
            grams = grads.columns().gram(of, len(names))
            self._add(tuple(present), torch.cat([grams.sum(dim=0, keepdim=True), grams]), names)
        return True

    @not_compiled
    def note(self, report: ConflictReport) -> bool:
        """As ``observe``, where there is a surgery: its report, with the layers that it names, is what is looked at.
        No backward pass runs for it.

        Raises:
            ValueError: it has tasks that are none of the monitor's: by their names, where both have some, else by
                their indices.
        """
        is_time, self.calls = self.is_time, self.calls + 1
        if not is_time:
            return False
        tasks = [self._place_of(report.names[t] if report.names and self.tasks else t) for t in report.tasks]
        grams = report.gram[None]
        if report.layers and report.segment_grams is not None:
            grams = torch.cat([grams, report.segment_grams])
        if tasks != sorted(tasks):
            order = torch.tensor(tasks, device=grams.device).argsort()
            grams = grams[:, order[:, None], order]
        self._add(tuple(sorted(tasks)), grams, list(report.layers))
        return True

    def _place_of(self, task: int | str) -> int:
        try:
            return index_of(task, self.num_tasks, self.tasks)
        except IndexError as error:
            raise ValueError(f"the report is of tasks that the monitor does not have: {error}") from error

    def log(self, prefix: str = "conflicts/") -> dict[str, float]:
        """The running averages for a logger, with one copy to the host; empty before the first look.

        Returns:
            ``conflict_rate``, the share of pairs that conflict, and for each layer ``conflict_rate/…``; for each pair
            ``cos/…-…`` and how often it conflicts, ``conflict/…-…``; for each task ``grad_norm/…``. Pairs that never
            were there together are left out.
        """
        if not self.looks:
            return {}
        names, (cosines, rates, norms) = self._names(), self._averages()
        pairs = conflict_maps.pairs_of(names)
        figures = {"conflict_rate": _mean(of_pairs(rates[0]))}
        of_layers = zip(self._names_of_layers, of_pairs(rates[1:]), strict=True)
        figures |= {f"conflict_rate/{layer}": _mean(own) for layer, own in of_layers}
        for kind, values in (("cos", of_pairs(cosines[0])), ("conflict", of_pairs(rates[0]))):
            figures |= {f"{kind}/{a}-{b}": float(value) for (a, b), value in zip(pairs, values, strict=True)}
        figures |= {f"grad_norm/{name}": float(norm) for name, norm in zip(names, norms, strict=True)}
        return {prefix + key: value for key, value in figures.items() if not math.isnan(value)}

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each pair of tasks, over all parameters (layer ``""``) and in each layer: the running averages of
        its cosine and of how often it conflicts. Needs pandas.

        Raises:
            RuntimeError: before the first look.
        """
        layers, cosines, rates = self._by_layer()
        values = {"cosine": of_pairs(cosines), "conflict_rate": of_pairs(rates)}
        return conflict_maps.table(self._names(), layers, values)

    def plot(self) -> Figure:
        """Three maps: task × task over all parameters, pair × layer, and the course of each pair. Needs matplotlib.

        Raises:
            RuntimeError: before the first look.
        """
        layers, cosines, rates = self._by_layer()
        history = {step: found.cpu() for step, found in self._history} if len(self._history) > 1 else None
        looks = f"{self.looks} looks at them" if self.looks > 1 else "one look at them"
        title = f"Do the tasks' gradients conflict? Running averages over {looks}"
        return conflict_maps.draw(self._names(), layers, cosines, rates, history, title=title)

    def _names(self) -> Sequence[str]:
        return self.tasks or [str(t) for t in range(self.num_tasks)]

    def _by_layer(self) -> tuple[list[str], Tensor, Tensor]:
        """Names of layers, all parameters first; cosines and rates ``[S + 1, T, T]`` on the host, 0 where there was
        none.
        """
        if not self.looks:
            raise RuntimeError("nothing has been looked at: call observe(losses) first")
        cosines, rates, _ = self._averages()
        return [conflict_maps.ALL, *self._names_of_layers], cosines.nan_to_num(0.0), rates.nan_to_num(0.0)

    def _averages(self) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines and rates ``[S + 1, T, T]``, norms ``[T]``, on the host; NaN where there was none."""
        assert self._sums is not None and self._norms is not None
        host = torch.cat([self._sums.flatten(), self._norms.flatten()]).cpu()
        sums, norms = host[: self._sums.numel()].view(self._sums.shape), host[self._sums.numel() :].view(2, -1)
        return sums[0] / sums[2], sums[1] / sums[2], norms[0] / norms[1]

    def _add(self, tasks: tuple[int, ...], grams: Tensor, layers: list[str]) -> None:
        """A look at some of the tasks.

        Args:
            grams: ``[S + 1, t, t]``, all parameters first; ``[1, t, t]`` without layers.
        """
        count = self.num_tasks
        if self._sums is None or layers != self._names_of_layers:
            self.reset()  # what was seen before is of other layers
            self._names_of_layers = layers
            self._sums = grams.new_zeros(3, len(grams), count, count)
            self._norms = grams.new_zeros(2, count)
        assert self._norms is not None
        cosines, norms = cosines_of(grams), grams[0].diagonal().sqrt()
        new = torch.stack([cosines, (cosines < 0).double(), cosines.isfinite().double()])
        of_tasks = torch.stack([norms, norms.isfinite().double()])
        if len(tasks) < count:
            at = torch.tensor(tasks, device=grams.device)
            few, new = new, new.new_zeros(3, len(grams), count, count)
            new[:, :, at[:, None], at] = few
            of_tasks = torch.zeros_like(self._norms).index_copy(1, at, of_tasks)
        self._sums = torch.where(new[2] > 0, self.decay * self._sums + new, self._sums)
        self._norms = torch.where(of_tasks[1] > 0, self.decay * self._norms + of_tasks, self._norms)
        self.looks += 1
        self._history.append((self.calls - 1, of_pairs(torch.where(new[2, 0] > 0, new[0, 0], torch.nan))))

    def _parameters(self) -> list[Tensor]:
        """What is trainable now, each once."""
        if isinstance(self._source, nn.Module):
            found: Iterable[Tensor] = self._source.parameters()
        else:
            found = (p for group in self._source.param_groups for p in group["params"])
        return list({id(p): p for p in found if p.requires_grad}.values())

    def __repr__(self) -> str:
        return f"ConflictMonitor(tasks={list(self._names())}, every={self.every}, looks={self.looks})"


def _mean(values: Tensor) -> float:
    """Of those that there are."""
    found = values[~values.isnan()]
    return float(found.mean()) if len(found) else math.nan
