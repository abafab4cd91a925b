"""Rows for the Triton kernels, and what their passes have to give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpcgrad import reference
from fastpcgrad.backends import triton as backend
from tests.conftest import why_not_interpreted

DEVICE = "cpu" if backend.why_unavailable("cpu") is None else "cuda"
MARKS = [
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="needs a GPU, or TRITON_INTERPRET=1 before triton is imported",
    ),
    # The interpreter computes with NumPy, which warns where a kernel meets NaN, inf or an overflow.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted()),
    # With NumPy before 2.4 the interpreter of Triton 3.6 runs, and this is what NumPy says of it.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# A rounding of the result, in 16 bits; of the sums, in fp32.
TOLERANCE = {FP16: 5e-4, BF16: 4e-3, FP32: 1e-6, FP64: 1e-14}
GRAM_TOLERANCE = {FP16: 1e-6, BF16: 1e-6, FP32: 1e-6, FP64: 1e-13}


def random_rows(tasks: int, width: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * tasks + width)
    # A common part makes neighbours conflict or agree, not only noise.
    rows = torch.randn(tasks, width, generator=generator, dtype=FP64)
    signs = torch.tensor([(-1.0) ** t for t in range(tasks)], dtype=FP64)
    return (rows + 0.5 * signs[:, None] * rows[:1]).to(dtype).to(DEVICE)


def random_weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(DEVICE)


def random_order(tasks: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)]).to(DEVICE)


def combined(grads: Tensor, weights: Tensor, segments: Tensor | None = None) -> Tensor:
    out = torch.empty(grads.shape[1], dtype=grads.dtype, device=grads.device)
    backend.combine(grads, weights, segments, out)
    return out


def norms(grads: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grads.double(), dim=1)


def check_gram(gram: Tensor, grads: Tensor) -> None:
    expected, sizes = reference.gram(grads), norms(grads)
    assert gram.dtype == FP64 and gram.shape == expected.shape
    assert torch.equal(gram, gram.mT)
    bound = GRAM_TOLERANCE[grads.dtype] * sizes[:, None] * sizes
    assert ((gram - expected).abs() <= bound).all(), (gram - expected).abs().div(bound).nan_to_num().max()


def check_rows(found: Tensor, expected: Tensor, weights: Tensor, grads: Tensor) -> None:
    """‖m - m64‖ ≤ tol · Σ_j |w_j| ‖g_j‖, a bound for each row of weights."""
    assert found.dtype == grads.dtype
    error = torch.linalg.vector_norm(torch.atleast_2d(found.double() - expected), dim=1)
    bound = TOLERANCE[grads.dtype] * (torch.atleast_2d(weights.abs()) @ norms(grads))
    assert (error <= bound).all(), (error / bound).max()


def check_passes(grads: Tensor) -> None:
    tasks = grads.shape[0]
    check_gram(backend.gram(grads, None), grads)
    weights, coefficients = random_weights(tasks), random_weights(tasks, tasks)
    check_rows(combined(grads, weights), reference.combine(grads, weights), weights, grads)
    before = grads.clone()
    backend.mix_(grads, coefficients, None)
    check_rows(grads, reference.mix(before, coefficients), coefficients, before)
