"""Gradients of one loss a sample as factors: one backward pass gives the δ of all.

Where sample s has its own rows of the activations, its gradient of a weight is δ_sᵀ a_s, with δ_s what comes into these
rows from the sum of all losses: no other loss depends on them. That it is so is not believed. A second pass has losses
that are scaled by powers of two, another one for most. It must give each δ_s scaled by that of its sample, to the bit
but for sums in another order, and shows on the way which rows are whose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import kernels
from . import hooks
from .factors import Factored, Factors, exact_dtypes
from .products import Finder, Graph

_LARGEST_POWER = {torch.float16: 1}
_LARGEST_POWER_OF_WIDER = 15
_LEAST_PRODUCT = 1e-250
"""Below, what is summed in G may be too small for float64."""
_AT_ONCE = 1 << 22
"""Elements of what G is summed from."""


class Samples:
    """The gradients of one parameter, one a sample.

    Attributes:
        left: a, ``[B, S, in]``: S rows a sample.
        delta: δ, ``[B, S, out]``.
        whole: every sample has one.
    """

    whole = True

    def __init__(self, factored: Factored, left: Tensor, delta: Tensor) -> None:
        self.left, self.delta = left, delta
        self._product = factored.product

    def gram(self) -> Tensor:
        """G, ``[B, B]`` float64: of a aᵀ and δ δᵀ, or where these take longer or are not exact, of gradients."""
        samples, rows, inner = self.left.shape
        outer = self.delta.shape[2]
        by_pairs = (samples * rows) ** 2 * (inner + outer) if rows > 1 else 0
        if by_pairs <= samples * inner * outer * (rows + samples):
            gram, is_exact = self._gram_by_pairs()
            if is_exact:
                return gram
        return self._gram_by_rows()

    def _gram_by_pairs(self) -> tuple[Tensor, bool]:
        a, delta = self.left.double(), self.delta.double()
        samples, rows, _ = a.shape
        every_a, every_delta = a.flatten(0, 1), delta.flatten(0, 1)
        step = max(1, _AT_ONCE // (rows * rows * samples))
        parts = []
        with exact_dtypes(a.device):
            for first in range(0, samples, step):
                own_a, own_delta = (each[first : first + step].flatten(0, 1) for each in (a, delta))
                pairs = (own_a @ every_a.T).mul_(own_delta @ every_delta.T)
                parts.append(pairs if rows == 1 else pairs.view(-1, rows, samples, rows).sum(dim=(1, 3)))
        gram = torch.cat(parts)
        gram = (gram + gram.T) / 2
        bound = a.square().sum(dim=(1, 2)) * delta.square().sum(dim=(1, 2))
        error = torch.finfo(torch.float64).eps * bound
        largest = 1e-12 if self.delta.dtype == torch.float64 else 1e-8
        is_zero = (delta == 0).all(dim=2).all(dim=1) | (a == 0).all(dim=2).all(dim=1)
        is_exact = is_zero | ((error <= largest * gram.diagonal()) & (bound >= _LEAST_PRODUCT))
        return gram, bool((is_exact & gram.isfinite().all()).all())

    def _gram_by_rows(self) -> Tensor:
        samples, _, inner = self.left.shape
        left = self.left.to(self.delta.dtype)
        step = max(1, _AT_ONCE // (samples * inner))
        grams = []
        with exact_dtypes(left.device):
            for own in self.delta.split(step, dim=2):
                grams.append(kernels.gram(torch.bmm(own.transpose(1, 2), left).flatten(1)))
        return torch.stack(grams).sum(dim=0)

    def merged(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ_s w_s δ_sᵀ a_s, in memory of its own.

        Args:
            weights: w, ``[B]`` float64.
            dtype: of the gradient.
        """
        own = weights.to(self.delta.device, self.delta.dtype)
        return self._product((self.delta * own[:, None, None]).flatten(0, 1), self.left.flatten(0, 1)).to(dtype)


class _Bias(Factored):
    """Of what is added to products: its gradients are sums over rows, products with ones."""

    def of_input(self, node: Any) -> Tensor:
        meta = node._input_metadata[0]
        return torch.ones(meta.shape[0], 1, dtype=meta.dtype, device=meta.device)

    def product(self, delta: Tensor, left: Tensor | None = None) -> Tensor:
        return delta.sum(dim=0)


def find_samples(losses: Tensor, parameters: Sequence[Tensor]) -> dict[int, Samples]:
    """The gradients of those parameters that are weights of matrix products alone, or added to these alone.

    Args:
        losses: ``[B]``, one a sample. Their graph is kept.
        parameters: each once.
    Returns:
        by the index of the parameter. Of the others the gradients have to be made.
    Raises:
        ValueError: a loss depends on rows of another's sample.
    """
    graph = Graph([losses])
    finder = Finder(graph, parameters, "factored")
    known = hooks.known(hash((graph.signature, "samples", len(losses), *map(id, parameters))))
    unsure = finder.look_for_hooks(known, "factored")
    weights = [Factored(index, nodes, 2, finder.transposed[index]) for index, nodes in finder.found.items()]
    weights += [_Bias(index, nodes, 2, False) for index, nodes in finder.biases().items()]
    weights = [weight for weight in weights if _have_rows_for(len(losses), weight)]
    if not weights:
        return {}
    factors = Factors(weights, parameters, graph, [], known, unsure.intersection(w.index for w in weights), Counter())
    scales = _scales(losses)
    with factors.noting():
        for slot, scale in enumerate((torch.ones_like(losses), scales)):
            factors.begin(slot)
            asked: Any = [*factors.edges, *(parameters[index] for index in factors.unknown)]
            found = torch.autograd.grad(losses, asked, scale, retain_graph=True, allow_unused=True)
            factors.note_captured(found[: len(factors.edges)])
            factors.compare(found[len(factors.edges) :])
    return {
        weight.index: _by_sample(weight, scales, parameters[weight.index])
        for weight in weights
        if weight.index not in factors.stopped
    }


def _have_rows_for(samples: int, weight: Factored) -> bool:
    return all(node._input_metadata[0].shape[0] % samples == 0 for node, _ in weight.nodes)


def _scales(losses: Tensor) -> Tensor:
    """Powers of two in a random order, each as often as any other: scaling by them rounds nothing."""
    count = len(losses)
    largest = _LARGEST_POWER.get(losses.dtype, _LARGEST_POWER_OF_WIDER)
    places = torch.randperm(count, generator=_random, device="cpu")
    return torch.exp2((places % (largest + 1)).to(losses.dtype)).to(losses.device)


_random = torch.Generator()


def _by_sample(weight: Factored, scales: Tensor, parameter: Tensor) -> Samples:
    lefts, deltas = [], []
    ends = [first for _, first in weight.nodes[1:]] + [weight.left.shape[0]]
    for (_, first), end in zip(weight.nodes, ends, strict=True):
        own, scaled = weight.delta[0, first:end], weight.delta[1, first:end]
        view = _view_by_sample(own, scaled, scales.to(own.dtype), parameter)
        lefts.append(view(weight.left[first:end]))
        deltas.append(view(own))
    if len(lefts) == 1:
        return Samples(weight, lefts[0], deltas[0])
    return Samples(weight, torch.cat(lefts, dim=1), torch.cat(deltas, dim=1))


def _view_by_sample(own: Tensor, scaled: Tensor, scales: Tensor, parameter: Tensor) -> Callable[[Tensor], Tensor]:
    """How rows are seen as ``[B, S, ...]``: those of a sample are neighbours, or the first ones of all come first."""
    samples = len(scales)

    def one_below_the_other(rows: Tensor) -> Tensor:
        return rows.view(samples, -1, rows.shape[1])

    def first_of_all(rows: Tensor) -> Tensor:
        return rows.view(-1, samples, rows.shape[1]).transpose(0, 1)

    for view in (one_below_the_other, first_of_all):
        expected = view(own) * scales[:, None, None]
        is_finite = expected.isfinite() & view(scaled).isfinite()  # a loss that is not shows in its own rows
        error = torch.where(is_finite, view(scaled) - expected, 0).double()
        length = torch.where(is_finite, expected, 0).double()
        if bool(error.norm() <= 8 * torch.finfo(own.dtype).eps * length.norm()):
            return view
    raise ValueError(
        "batch_dim=0 needs losses that depend on their own sample alone; found one that reaches rows of others, at a "
        f"parameter of shape {list(parameter.shape)}, as batch normalisation in training mode makes it. Leave "
        "batch_dim None: a backward pass for each loss assumes nothing"
    )
