"""GradNorm as the public PyTorch code does it, written here from its description.

The GradNorm loss Σ|n_i − target_i| is differentiated by autograd, through T layer gradients that were made
differentiable; the norms come from the losses in one stacked tensor; both Adams have torch's defaults, and the one of
the weights is made anew in every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def step(
    net: nn.Module,
    layer: nn.Module,
    alpha: float,
    lr1: float,
    lr2: float,
    *,
    weights_only: bool = False,
    fused: bool = False,
) -> Callable[..., Tensor]:
    """One training step as a function of a batch; gives the weights that it leaves behind.

    ``weights_only``: the GradNorm loss is differentiated with respect to the weights alone, as the paper has it; the
    public code adds its derivative to the network's gradient as well. ``fused``: the network's Adam.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr1, fused=fused)
    shared = next(layer.parameters())
    state: dict[str, Tensor] = {}

    def run(*batch: Tensor) -> Tensor:
        losses = net(*batch)
        if not state:
            state.update(initial=losses.detach(), weights=torch.ones_like(losses))
        weights = nn.Parameter(state["weights"])
        optimizer.zero_grad()
        (weights @ losses).backward(retain_graph=True)
        norms = torch.stack([_norm(weight * loss, shared) for weight, loss in zip(weights, losses, strict=True)])
        rates = losses.detach() / state["initial"]
        targets = (norms.mean() * (rates / rates.mean()) ** alpha).detach()
        weights.grad = None
        (norms - targets).abs().sum().backward(inputs=[weights] if weights_only else None)
        optimizer.step()
        torch.optim.Adam([weights], lr=lr2).step()
        state["weights"] = weights.detach() / weights.detach().sum() * len(losses)
        return state["weights"]

    return run


def _norm(weighted: Tensor, shared: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(weighted, shared, create_graph=True, retain_graph=True)
    return torch.linalg.vector_norm(gradient)
