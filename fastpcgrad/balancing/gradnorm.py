"""GradNorm: weights that give the tasks gradients of like norm, larger for those that lag behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import isfinite

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .._tasks import index_of
from ..distributed.processes import check_graph
from .base import LearnedBalancer, Losses, OptimizerFactory, all_finite, task_values
from .refusals import Refusals

Layer = nn.Module | Tensor | Iterable[Tensor]


class GradNorm(LearnedBalancer):
    """Learns weights w such that n_i = ‖∇_W w_i L_i‖ comes near its target n̄ r_i^α.

    W is a layer that all tasks share, usually the last one; n̄ is the mean of the n_i and r_i the inverse training rate
    L_i / L_i(0) over its mean: a task that has learned less than others gets a larger gradient. The weights minimise
    Σ|n_i − target_i| with the targets held fixed. Its derivative has a closed form, sign(n_i − target_i) ‖∇_W L_i‖, so
    a step needs the T losses and the T norms and no second derivative. After each step the weights are scaled to sum
    to T, which leaves the learning rate of the network alone.

    A training step::

        losses = model(batch)
        balancer.note_gradients(losses, model.trunk[-1])
        optimizer.pc_backward(balancer(losses))  # or sum(balancer(losses)).backward()
        optimizer.step()
        balancer.update()

    With one task's graph at a time, ``note`` each task's loss and norm (of a row of gradients, say) and multiply by
    ``balancer.weights[t]``.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
        alpha: α ≥ 0, the strength of the restoring force: 0 asks for equal norms; larger suits tasks that differ more.
            The paper takes 0.12 for its toy problem and 1.5 for NYUv2, as LibMTL does.
        optimizer: makes the optimizer of w; None: Adam with a learning rate of 0.025.
        initial_losses: L(0), where a value from theory is better than the first one seen (log C for a cross-entropy
            over C classes); None: the losses of the first update in which all losses and norms were finite.
    Attributes:
        weights: w, ``[T]``; start at 1, sum to T.
        initial_losses: L(0), ``[T]``; NaN before the first update.
    Raises:
        TypeError: ``optimizer`` makes none.
        ValueError: ``alpha`` not ≥ 0 and finite, ``initial_losses`` not T finite numbers or, unless α is 0, not > 0.
    Numerics: r_i^α needs L_i(0) > 0 and L_i ≥ 0, and a smaller L_i has to be a better one; see ``update``. α = 0 takes
        losses of any sign. A norm whose square overflows counts as infinite. With a gradient scaler, which skips steps
        of its own, call ``update`` in every step.
    Source: Chen et al. 2018, arXiv:1711.02257, Alg. 1.
    Example:
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> balancer = fastpcgrad.balancing.GradNorm(2, alpha=0.5)
        >>> small, large = (layer.weight - 1).square().mean(), (10 * layer.weight - 10).square().mean()
        >>> balancer.note_gradients([small, large], layer)
        >>> sum(balancer([small, large])).backward()
        >>> balancer.update()
        >>> balancer.weights.data  # the second gradient is 100 times longer
        tensor([1.0250, 0.9750])
    """

    initial_losses: Tensor

    def __init__(
        self,
        num_tasks: int | None = None,
        alpha: float = 1.5,
        optimizer: OptimizerFactory | None = None,
        initial_losses: Iterable[float] | Tensor | None = None,
        *,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        self.alpha = check_alpha(alpha)
        initial = torch.full((self.num_tasks,), torch.nan)
        if initial_losses is not None:
            initial = task_values("initial_losses", initial_losses, self.num_tasks)
            if self.alpha > 0 and not (initial > 0).all():
                raise ValueError(f"initial_losses must be > 0 where alpha is; found {initial.tolist()}")
        self.register_buffer("initial_losses", initial)
        self.weights = self._learn(torch.ones_like(initial), optimizer or partial(torch.optim.Adam, lr=0.025))
        self._noted: list[tuple[Tensor, Tensor] | None] = [None] * self.num_tasks

    def weigh(self, losses: Tensor) -> Tensor:
        # A copy: update() changes the weights in place, maybe before a backward pass of what they weigh.
        return self.weights.detach().clone()

    def note(self, task: int | str, loss: Tensor, norm: Tensor) -> None:
        """Remember for the next update what one task has; a second note of the same task replaces the first.

        Args:
            task: its index or its name.
            loss: L_i, a scalar; only its value is kept.
            norm: ‖∇_W L_i‖, a scalar tensor: of the loss itself, without its weight; of the whole batch, where several
                processes have parts of it.
        Raises:
            IndexError: ``task`` is not in 0..T-1, and no name.
            TypeError, ValueError: see ``forward``.
        """
        self._noted[index_of(task, self.num_tasks, self.tasks)] = self._scalar("loss", loss), self._scalar("norm", norm)

    def note_gradients(self, losses: Losses, layer: Layer) -> None:
        """Note all tasks, with norms from T backward passes that go no further down than the layer.

        Where several processes have parts of the batch, the gradients are averaged over them first: T times W.

        Args:
            losses: see ``forward``; their graphs are kept.
            layer: W: a tensor or several, or a module, which stands for its first parameter (its weight).
        Raises:
            TypeError, ValueError: see ``forward``; a layer without a tensor that requires grad, or one that a loss does
                not depend on.
            NotImplementedError: W that DistributedDataParallel averages with ``static_graph``; a sharded one, of FSDP,
                fully_shard or tensor parallelism.
        """
        tensors = layer_tensors(layer)
        check_graph(tensors, "local")
        listed = self._listed(losses)
        values = self._vector("losses", listed)
        self._look_for_others(listed)
        norms = layer_norms(listed, tensors, mean=self._mean)
        self._noted = list(zip(values.unbind(), self._vector("norms", norms).unbind(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """One step of the weights' optimizer on what was noted, then the scaling to sum T.

        Raises:
            RuntimeError: a task was not noted since the last update. Nothing is changed.
            ValueError: with α > 0, an L_i(0) that is not > 0 or an L_i < 0; see ``Balancer`` for when. Nothing is
                changed.
        """
        self._refusals.raise_due()
        noted = [pair for pair in self._noted if pair is not None]
        if len(noted) < self.num_tasks:
            missing = [t for t, pair in enumerate(self._noted) if pair is None]
            raise RuntimeError(f"update() needs a loss and a norm of every task: note() is missing for tasks {missing}")
        losses, norms = self._mean(torch.stack([torch.stack(values) for values in zip(*noted, strict=True)]))
        rates, initial, sound = training_rates(losses, norms, self.initial_losses, self.alpha, self._refusals)
        self.initial_losses.copy_(initial)
        gradient = excess_signs(self.weights, norms, rates) * norms
        self._step(self.weights, torch.where(sound, gradient, torch.nan), scaled_to_count)
        self._noted = [None] * self.num_tasks

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"


def check_alpha(alpha: float) -> float:
    """``alpha``; ValueError where it is not finite and ≥ 0."""
    if not (isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number >= 0; found {alpha!r}")
    return alpha


def layer_tensors(layer: Layer) -> list[Tensor]:
    """W as a list of tensors that require grad; a module stands for its first parameter."""
    tensors: Iterable[Tensor]
    if isinstance(layer, nn.Module):
        tensors = list(layer.parameters())[:1]
    else:
        tensors = [layer] if isinstance(layer, Tensor) else layer
    found = list(tensors)
    for value in found:
        if not isinstance(value, Tensor):
            raise TypeError(f"layer must be a module, a tensor or tensors; found {type(value).__name__}")
        if not value.requires_grad:
            raise ValueError(f"layer must require grad; found a tensor {list(value.shape)} that does not")
    if not found:
        raise ValueError(f"layer must have a parameter; found none in {layer!r}")
    return found


def layer_norms(
    losses: Sequence[Tensor] | Tensor,
    layer: Sequence[Tensor],
    create_graph: bool = False,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """‖∇_W L_i‖ for each task, ``[T]``; the graphs of the losses are kept.

    Args:
        losses: T scalar losses, or one tensor ``[T]`` or ``[T, 1]``.
        layer: W.
        create_graph: make the norms differentiable.
        mean: what is made of each gradient first, the mean over processes; None: nothing.
    """
    norms = []
    for t, root in enumerate(_roots(losses)):
        one = torch.ones_like(losses[t])
        grads = torch.autograd.grad(root, layer, one, retain_graph=True, create_graph=create_graph, allow_unused=True)
        parts = [
            torch.linalg.vector_norm(
                grad if mean is None else mean(grad), dtype=torch.promote_types(grad.dtype, torch.float32)
            )
            for grad in grads
            if grad is not None
        ]
        if not parts:
            raise ValueError(f"losses[{t}] does not depend on the layer")
        norms.append(parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts)))
    return torch.stack(norms)


def _roots(losses: Sequence[Tensor] | Tensor) -> Sequence[Tensor | GradientEdge]:
    """Where each task's backward pass starts.

    A tensor that was stacked from T losses is entered below the stack: from above, the pass of one task would run
    through the heads of all others with zeros, T² heads in all.
    """
    if not isinstance(losses, Tensor):
        return losses
    stack = losses.grad_fn
    if stack is None or stack.name() != "StackBackward0" or len(stack.next_functions) != len(losses):
        return losses.unbind()
    return [
        loss if below is None else GradientEdge(below, index)
        for loss, (below, index) in zip(losses.unbind(), stack.next_functions, strict=True)
    ]


def training_rates(
    losses: Tensor, norms: Tensor, initial: Tensor, alpha: float, refusals: Refusals
) -> tuple[Tensor, Tensor, Tensor]:
    """r^α, L(0) after this step, and whether the step counts: all is finite, and nothing was refused.

    Args:
        losses, norms: ``[T]``, detached.
        initial: L(0), ``[T]``; NaN where no step has counted yet.
    """
    # The squares are what Adam keeps: one that overflows would stop it for good.
    finite = all_finite(losses, norms.square())
    first = torch.where(initial.isnan(), losses, initial)
    ratios = losses / first
    mean = ratios.mean()
    # Where all losses are 0, all tasks have learned alike.
    rates = torch.where(mean == 0, 1.0, ratios / mean) ** alpha
    sound = finite
    if alpha > 0:
        bad = finite & ~((first > 0) & (losses >= 0) & ratios.isfinite() & ~rates.isinf())
        refusals.refuse(bad, (losses, first), partial(_why_not, alpha))
        sound = finite & ~bad.any()
    return rates, torch.where(sound, first, initial), sound


def _why_not(alpha: float, task: int, values: list[float]) -> str:
    loss, first = values
    return (
        f"losses[{task}] is {loss:.6g} and its L(0) {first:.6g}: GradNorm takes powers ({alpha:g}) of L / L(0), which "
        "need L(0) > 0 and L >= 0 and have to stay in the range of the dtype; balancing.GradNorm takes another L(0) as "
        "initial_losses, alpha=0 asks for equal norms alone, and STCH takes losses of any sign"
    )


def excess_signs(weights: Tensor, norms: Tensor, rates: Tensor) -> Tensor:
    """∂ Σ_i |n_i − target_i| / ∂ w_i over ‖∇_W L_i‖, with n_i = |w_i| ‖∇_W L_i‖ and the targets held fixed.

    All ``[T]``; ``rates`` are r^α. It is sign(n_i − target_i), times the sign of w_i, which a large step can make
    negative.
    """
    weighted = weights.abs() * norms
    excess = weighted - weighted.mean() * rates
    # torch.sign(NaN) is 0, which would hide it.
    return torch.where(excess.isfinite(), torch.sign(excess) * torch.sign(weights), torch.nan)


def scaled_to_count(weights: Tensor) -> Tensor:
    """The weights ``[T]``, scaled to sum to T."""
    return weights / weights.sum() * len(weights)
