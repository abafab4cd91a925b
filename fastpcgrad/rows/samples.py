"""Gradients of one loss a sample as factors: one backward pass gives the δ of all.

Where sample s has its own rows of the activations, its gradient of a weight is δ_sᵀ a_s, with δ_s what comes into these
rows from the sum of all losses: no other loss depends on them. That it is so is not believed. Where the graph alone
does not show it, or may hide a hook, a second pass has losses that are scaled by powers of two, another one for most.
It must give each δ_s scaled by that of its sample, to the bit but for sums in another order, and shows on the way which
rows are whose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._graph import run_grad
from .._ops import to_device
from ..backends import kernels
from . import hooks
from .apart import are_apart
from .factored import Multiplied, exact_dtypes, symmetric_if_exact
from .factors import Factors
from .products import Finder, Graph

_LARGEST_POWER = {torch.float16: 1}
_LARGEST_POWER_OF_WIDER = 15
_LEAST_SQUARE = 1e-20
"""From here up to its inverse ‖x‖² has lost nothing to the range of fp32 that would show in it."""
_AT_ONCE = 1 << 22
"""Elements of what G is summed from."""


class Deltas:
    """δ of some products, ``[B, S, out]``: S rows a sample."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._weights: Tensor | None = None

    def weighted(self, weights: Tensor) -> Tensor:
        """w_s δ_s; kept for the other parameter of the same products."""
        if self._weights is not weights:
            own = to_device(weights, self.tensor.device).to(self.tensor.dtype)
            self._weights, self._weighted = weights, self.tensor * own.view(-1, 1, 1)
        return self._weighted


def _pairs(matrices: Sequence[Tensor]) -> Sequence[Tensor]:
    """x xᵀ of each, float64: those that are alike at once, for with few samples calls are what takes time, and with
    many they are large."""
    samples, kinds = len(matrices[0]), {(x.dtype, x.device) for x in matrices}
    if len(kinds) > 1 or (len(matrices) > 1 and len(matrices) * samples**2 > _AT_ONCE):
        return [pairs for x in matrices for pairs in _pairs([x])]
    pairs = matrices[0].new_empty(len(matrices), samples, samples)
    with exact_dtypes(pairs.device):
        for x, out in zip(matrices, pairs, strict=True):
            torch.mm(x, x.T, out=out)
        least, most = map(float, torch.aminmax(pairs.diagonal(dim1=1, dim2=2)))
        if least >= _LEAST_SQUARE and most <= 1 / _LEAST_SQUARE:
            return pairs.double().unbind()
        return list(map(_scaled_pairs, matrices))


def _scaled_pairs(x: Tensor) -> Tensor:
    """The same where squares may leave the range of fp32."""
    largest = x.abs().amax(dim=1, keepdim=True)
    scaled = x / torch.where(largest == 0, 1, largest)
    return (scaled @ scaled.T).double().mul_(largest.double()).mul_(largest.T.double())


class Samples:
    """The gradients of one parameter, one a sample.

    Attributes:
        left: a, ``[B, S, in]``; None: ones, of what is added to products.
        delta: δ.
        reached: every sample has one.
    """

    def __init__(self, factored: Multiplied, left: Tensor | None, delta: Deltas) -> None:
        self.left, self.delta = left, delta
        self.reached = [True] * len(delta.tensor)
        self._factored = factored

    def of_bias(self) -> Samples:
        """Those of what is added to the same products."""
        return Samples(self._factored, None, self.delta)

    @property
    def rows(self) -> int:
        """S."""
        return self.delta.tensor.shape[1]

    def gram(self) -> Tensor:
        """G, ``[B, B]`` float64, of several rows a sample: of a aᵀ and δ δᵀ, or where these take longer or are not
        exact, of gradients."""
        samples, rows, outer = self.delta.tensor.shape
        if self.left is None:
            return kernels.gram(self.delta.tensor.sum(dim=1))
        inner = self.left.shape[2]
        if rows * samples * rows * (inner + outer) <= inner * outer * (rows + samples):
            gram, is_exact = self._gram_by_pairs(self.left)
            if is_exact:
                return gram
        return self._gram_by_rows(self.left)

    def _gram_by_pairs(self, left: Tensor) -> tuple[Tensor, bool]:
        a, delta = left.double(), self.delta.tensor.double()
        samples, rows, _ = a.shape
        every_a, every_delta = a.flatten(0, 1), delta.flatten(0, 1)
        step = max(1, _AT_ONCE // (rows * rows * samples))
        parts = []
        with exact_dtypes(a.device):
            for first in range(0, samples, step):
                own_a, own_delta = (each[first : first + step].flatten(0, 1) for each in (a, delta))
                pairs = (own_a @ every_a.T).mul_(own_delta @ every_delta.T)
                parts.append(pairs.view(-1, rows, samples, rows).sum(dim=(1, 3)))
        of_a, of_delta = a.square().sum(dim=(1, 2)), delta.square().sum(dim=(1, 2))
        is_zero = (delta == 0).all(dim=2).all(dim=1) | (a == 0).all(dim=2).all(dim=1)
        return symmetric_if_exact(torch.cat(parts), of_a, of_delta, is_zero, self.delta.tensor.dtype)

    def _gram_by_rows(self, left: Tensor) -> Tensor:
        samples, _, inner = left.shape
        left = left.to(self.delta.tensor.dtype)
        step = max(1, _AT_ONCE // (samples * inner))
        grams = []
        with exact_dtypes(left.device):
            for own in self.delta.tensor.split(step, dim=2):
                grams.append(kernels.gram(torch.bmm(own.transpose(1, 2), left).flatten(1)))
        return torch.stack(grams).sum(dim=0)

    def merged(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ_s w_s δ_sᵀ a_s, in memory of its own.

        Args:
            weights: w, ``[B]`` float64.
            dtype: of the gradient.
        """
        delta = self.delta.weighted(weights).flatten(0, 1)
        return (delta.sum(dim=0) if self.left is None else self._factored.product(delta, self.left.flatten(0, 1))).to(
            dtype
        )


def grams(found: Mapping[int, Samples]) -> dict[int, Tensor]:
    """G of each, ``[B, B]`` float64. Of one row a sample it is a aᵀ times δ δᵀ, element by element."""
    single = {index: samples for index, samples in found.items() if samples.rows == 1}
    others = {index: samples.gram() for index, samples in found.items() if index not in single}
    if not single:
        return others
    deltas = {samples.delta: samples.delta.tensor[:, 0] for samples in single.values()}
    lefts = {
        index: samples.left[:, 0].to(samples.delta.tensor.dtype)
        for index, samples in single.items()
        if samples.left is not None
    }
    pairs = dict(zip([*deltas, *lefts], _pairs([*deltas.values(), *lefts.values()]), strict=True))
    return others | {
        index: pairs[samples.delta] * pairs.pop(index) if index in lefts else pairs[samples.delta]
        for index, samples in single.items()
    }


class _Bias(Multiplied):
    """Of what is added to products: its gradients are sums over rows, products with ones."""

    def of_input(self, node: Any) -> Tensor:
        meta = node._input_metadata[0]
        return torch.ones(meta.shape[0], 1, dtype=meta.dtype, device=meta.device)

    def product(self, delta: Tensor, left: Tensor | None = None) -> Tensor:
        return delta.sum(dim=0)


def find_samples(graph: Graph, losses: Tensor, parameters: Sequence[Tensor], retain_graph: bool) -> dict[int, Samples]:
    """The gradients of those parameters that are weights of matrix products alone, or added to these alone.

    Args:
        graph: of the losses.
        losses: ``[B]``, one a sample.
        parameters: each once.
        retain_graph: keep the graph also where this finds all parameters.
    Returns:
        by the index of the parameter. Of the others the gradients have to be made.
    Raises:
        ValueError: a loss depends on rows of another's sample.
    """
    samples = len(losses)
    finder = Finder(graph, parameters, "factored", tables=False)
    known = hooks.known(hash((graph.signature, "samples", samples, *map(id, parameters))))
    unsure = finder.look_for_hooks(known)
    passes = [torch.ones_like(losses)]
    has_no_hooks = hooks.are_without_hooks(graph.order)
    if not (has_no_hooks and are_apart(graph, samples)):
        passes.append(_scales(losses))
    count = len(passes)
    how = finder.how
    weights = [Multiplied(index, nodes, count, how[index] == "as it is") for index, nodes in finder.found.items()]
    biases = finder.biases(known)
    along = _along(finder, biases, known.right - unsure)
    weights += [_Bias(index, nodes, count, False) for index, nodes in biases.items() if index not in along]
    weights = [weight for weight in weights if _have_rows_for(samples, weight)]
    if not weights:
        return {}
    kept = {weight.index for weight in weights}
    along = {index: weight for index, weight in along.items() if weight in kept}
    factors = Factors(weights, parameters, graph, [], known, unsure & kept, Counter())
    with nullcontext() if has_no_hooks else factors.noting():  # what comes in is what hooks would see
        for slot, scale in enumerate(passes):
            factors.begin(slot)
            # A parameter that was compared with its factors and is none of them needs rows after all.
            is_last = slot + 1 == count and len(weights) + len(along) == len(parameters) and not factors.unknown
            keep = retain_graph or not is_last or bool(factors.stopped)
            asked: Any = [*factors.edges, *(parameters[index] for index in factors.unknown)]
            found = run_grad(losses, asked, keep, scale)
            factors.note_captured(found[: len(factors.edges)])
            factors.compare(found[len(factors.edges) :])
    right = [weight for weight in weights if weight.index not in factors.stopped]
    by_index = _by_sample(right, samples, passes[1:], parameters)
    return by_index | {index: by_index[of].of_bias() for index, of in along.items()}


def _along(finder: Finder, biases: Mapping[int, Sequence[Node]], right: Set[int]) -> dict[int, int]:
    """Biases that need no δ of their own, each with the weight of the same products.

    Args:
        right: those whose factors were compared before, and need not be now.
    """
    weights = {tuple(nodes): index for index, nodes in finder.found.items() if index in right}
    found = {index: weights.get(tuple(nodes)) for index, nodes in biases.items() if index in right}
    return {index: weight for index, weight in found.items() if weight is not None}


def _have_rows_for(samples: int, weight: Multiplied) -> bool:
    return all(node._input_metadata[0].shape[0] % samples == 0 for node, _ in weight.nodes)


def _scales(losses: Tensor) -> Tensor:
    """Powers of two in a random order, each as often as any other: scaling by them rounds nothing."""
    count = len(losses)
    largest = _LARGEST_POWER.get(losses.dtype, _LARGEST_POWER_OF_WIDER)
    places = torch.randperm(count, generator=_random, device="cpu")
    return to_device(torch.exp2((places % (largest + 1)).to(losses.dtype)), losses.device)


_random = torch.Generator()


def _by_sample(
    weights: Sequence[Multiplied], samples: int, scales: Sequence[Tensor], parameters: Sequence[Tensor]
) -> dict[int, Samples]:
    """Each with its rows by sample; those of the same products, as a weight and its bias are, share δ."""
    seen: dict[tuple[Any, ...], tuple[Deltas, list[Callable[[Tensor], Tensor]]]] = {}
    found = {}
    for weight in weights:
        uses = tuple(weight.nodes)
        counts = [after - first for first, after in pairwise([*(first for _, first in uses), weight.delta.shape[1]])]
        if uses not in seen:
            views, deltas = [], []
            for own, *scaled in weight.delta.split(counts, dim=1):
                found_by = list(zip(scaled, scales, strict=True))
                views.append(_view_by_sample(samples, own, found_by, parameters[weight.index].shape))
                deltas.append(views[-1](own))
            seen[uses] = Deltas(torch.cat(deltas, dim=1) if len(deltas) > 1 else deltas[0]), views
        delta, views = seen[uses]
        left = None
        if not isinstance(weight, _Bias):
            lefts = [view(rows) for view, rows in zip(views, weight.left.split(counts), strict=True)]
            left = torch.cat(lefts, dim=1) if len(lefts) > 1 else lefts[0]
        found[weight.index] = Samples(weight, left, delta)
    return found


def _view_by_sample(
    samples: int, own: Tensor, scaled: Sequence[tuple[Tensor, Tensor]], shape: torch.Size
) -> Callable[[Tensor], Tensor]:
    """How rows are seen as ``[B, S, ...]``: those of a sample are neighbours, or the first ones of all come first.

    Args:
        scaled: what a pass gave whose losses were scaled, and by what; none where they are known to be neighbours.
    """

    def one_below_the_other(rows: Tensor) -> Tensor:
        return rows.view(samples, -1, rows.shape[1])

    def first_of_all(rows: Tensor) -> Tensor:
        return rows.view(-1, samples, rows.shape[1]).transpose(0, 1)

    for view in (one_below_the_other, first_of_all):
        if all(_are_alike(view(found), view(own) * by.to(own.dtype)[:, None, None]) for found, by in scaled):
            return view
    raise ValueError(
        "batch_dim=0 needs losses that depend on their own sample alone; found one that reaches rows of others, at a "
        f"parameter of shape {list(shape)}, as batch normalisation in training mode makes it. Leave batch_dim None: a "
        "backward pass for each loss assumes nothing"
    )


def _are_alike(found: Tensor, expected: Tensor) -> bool:
    """Whether a pass gave what was expected, where that is finite: a loss that is not shows in its own rows."""
    tolerance = 8 * torch.finfo(expected.dtype).eps
    if bool(torch.linalg.vector_norm(found - expected) <= tolerance * torch.linalg.vector_norm(expected)):
        return True
    are_finite = expected.isfinite() & found.isfinite()
    error, expected = (torch.where(are_finite, each, 0).double() for each in (found - expected, expected))
    return bool(error.norm() <= tolerance * expected.norm())
