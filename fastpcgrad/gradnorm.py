"""gradNorm: trains a network with GradNorm, called as the widely used PyTorch implementation is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._warnings import FastPCGradWarning
from .balancing import refusals
from .balancing.base import all_finite
from .balancing.gradnorm import (
    Layer,
    check_alpha,
    excess_signs,
    layer_norms,
    layer_tensors,
    scaled_to_count,
    training_rates,
)
from .distributed.processes import check_layer

VARIANTS = ("paper", "lucasbotang")


def gradNorm(
    net: nn.Module,
    layer: Layer,
    alpha: float,
    dataloader: Iterable[Sequence[Any]],
    num_epochs: int,
    lr1: float,
    lr2: float,
    log: bool = False,
    *,
    variant: str = "paper",
    process_group: object = "auto",
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Train ``net`` with Adam on its weighted task losses, and the weights with GradNorm.

    Each step: Adam(``lr1``) on the network with the gradient of Σ w_i L_i; a first Adam step (``lr2``, without
    momentum, so nearly ``lr2`` times the sign of the gradient) on the weights, which start at 1; then the weights are
    scaled to sum to T. L(0) is the loss of the first batch.

    A batch in which a loss, or the square of a gradient's norm at the layer, is NaN or infinite is skipped: neither the
    network nor the weights take a step, and L(0) is that of the first batch without. Such losses show in ``log_loss``,
    and a ``FastPCGradWarning`` at the end counts what was skipped.

    Args:
        net: ``net(*batch)`` gives the T task losses as one tensor ``[T]`` or ``[T, 1]``. It is put into training mode.
        layer: W, whose gradients are compared: a module, of which only the first parameter (its weight) is looked at,
            or tensors.
        alpha: α ≥ 0, the restoring force; see ``balancing.GradNorm``.
        dataloader: gives batches, each a sequence of arguments; their tensors are moved to the device of ``net``.
        num_epochs: passes over ``dataloader``, at least 1.
        lr1: learning rate of the network.
        lr2: learning rate of the weights; 0 keeps them at 1.
        log: keep the weights and normalised losses of every step.
        variant: ``paper`` differentiates the GradNorm loss with respect to the weights only, in closed form.
            ``lucasbotang`` follows the widely used implementation, whose second backward pass also adds the GradNorm
            loss' gradient to that of the network; it costs second derivatives.
        process_group: ``local``: where ``net`` is wrapped by DistributedDataParallel, or there are several processes
            without it, each has weights of its own, by its part of the data. ``auto``: the former is an error, and the
            latter a warning, once.
    Returns:
        ``(log_weights, log_loss)``, each ``[steps, T]``: the weights that each step used, and L_i / L_i(0). Without
        ``log`` both are empty, ``[0, T]``.
    Raises:
        TypeError: a net without a tensor of losses, batches that are no sequences.
        ValueError: unknown variant; bad ``alpha``, ``num_epochs``, learning rates, layer; losses of another shape;
            no batch; unless ``alpha`` is 0, a first loss that is not > 0 or a later one < 0. On a GPU such a batch is
            skipped and a later step raises, or the end, once the device has answered.
        NotImplementedError: a layer that DistributedDataParallel averages, see ``process_group``, or does so with
            ``static_graph``; a sharded one, of FSDP, fully_shard or tensor parallelism.
    Numerics: no step waits for a GPU, unless a parameter is complex. The network's Adam is torch's fused one, which
        rounds differently in the last place.
    Source: Chen et al. 2018, arXiv:1711.02257, Alg. 1.
    Example:
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.trunk, self.heads = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        ...     def forward(self, x, y):
        ...         return (self.heads(self.trunk(x)) - y).square().mean(dim=0)
        >>> net, data = Net(), [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(5)]
        >>> log_weights, log_loss = fastpcgrad.gradNorm(net, net.trunk, 0.12, data, 2, lr1=1e-3, lr2=1e-2, log=True)
        >>> log_weights.shape, log_loss[0].tolist()
        ((10, 2), [1.0, 1.0])
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; found {variant!r}")
    if isinstance(num_epochs, bool) or not isinstance(num_epochs, int) or num_epochs < 1:
        raise ValueError(f"num_epochs must be an integer >= 1; found {num_epochs!r}")
    for name, rate in (("lr1", lr1), ("lr2", lr2)):
        if not 0 <= rate < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0; found {rate!r}")
    check_alpha(alpha)
    shared = layer_tensors(layer)
    check_layer(shared, process_group)
    parameters = list(net.parameters())
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.Adam(parameters, lr=lr1, fused=fused)
    device = parameters[0].device
    leaks = variant == "lucasbotang"
    initial: Tensor | None = None
    logged: list[tuple[Tensor, Tensor]] = []
    steps = 0
    refused = refusals.Refusals()
    net.train()
    for _ in range(num_epochs):
        for batch in dataloader:
            given = net(*_on_device(batch, device))
            if initial is None:
                _check_task_losses(given)
            losses = given.flatten()
            if initial is None:
                weights = torch.ones_like(losses.detach())
                initial = torch.full_like(weights, torch.nan)
                counted = torch.zeros((), dtype=torch.int64, device=device)
            steps += 1
            refused.raise_due()
            optimizer.zero_grad()
            norms = layer_norms(given, shared, create_graph=leaks).to(weights.dtype)
            rates, initial, sound = training_rates(losses.detach(), norms.detach(), initial, alpha, refused)
            counted += sound
            if log:
                logged.append((weights, losses.detach() / initial))
            keep = refusals.known(sound) if fused else bool(sound)
            if keep is False:
                continue
            if keep is None:
                # The protocol between a gradient scaler and a fused optimizer, which takes no step where this is 1.
                optimizer.found_inf = (~sound).float()  # type: ignore[attr-defined]
            signs = excess_signs(weights, norms.detach(), rates)
            if leaks:
                # With respect to the norms, the GradNorm loss Σ|n_i − target_i| has the gradient signs · weights.
                torch.autograd.backward([losses, norms], [weights, signs * weights])
            else:
                torch.autograd.backward(losses, weights)
            optimizer.step()
            stepped = scaled_to_count(_first_adam_step(weights, signs * norms.detach(), lr2))
            weights = torch.where(sound & all_finite(stepped), stepped, weights)
    if initial is None:
        raise ValueError("dataloader gave no batch")
    refused.raise_due(wait=True)
    if skipped := steps - int(counted):
        warnings.warn(
            f"gradNorm skipped {skipped} of {steps} batches, with losses or gradient norms that were not finite",
            FastPCGradWarning,
            stacklevel=2,
        )
    if not log:
        empty = np.empty((0, len(initial)), dtype=weights.cpu().numpy().dtype)
        return empty, empty.copy()
    log_weights, log_loss = (torch.stack(kept).cpu().numpy() for kept in zip(*logged, strict=True))
    return log_weights, log_loss


def _first_adam_step(weights: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """What ``torch.optim.Adam([weights], lr)`` makes of its first gradient: both moments are those of g itself."""
    return weights - lr * gradient / (gradient.abs() + 1e-8)


def _on_device(batch: Sequence[Any], device: torch.device) -> list[Any]:
    if not isinstance(batch, tuple | list):
        raise TypeError(f"dataloader must give tuples or lists of net's arguments; found {type(batch).__name__}")
    return [value.to(device) if isinstance(value, Tensor) else value for value in batch]


def _check_task_losses(losses: Any) -> None:
    if not isinstance(losses, Tensor):
        raise TypeError(f"net must give its task losses as one tensor [T]; found {type(losses).__name__}")
    if losses.dim() not in (1, 2) or losses.shape[1:] not in ((), (1,)) or len(losses) == 0 or not losses.requires_grad:
        raise ValueError(
            "net must give its task losses as one tensor [T] that requires grad; "
            f"found {list(losses.shape)}, requires_grad={losses.requires_grad}"
        )
