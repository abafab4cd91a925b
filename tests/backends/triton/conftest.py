"""What every test of the Triton kernels runs under."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.backends.triton.rows import DEVICE


@pytest.fixture(autouse=True)
def poisoned_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel reads before it is written shows."""

    def poison(create: Any) -> Any:
        def created(*arguments: Any, **options: Any) -> Tensor:
            tensor: Tensor = create(*arguments, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

        return created

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies by NumPy in fp32; this is what Triton makes of "tf32x3" on a GPU.

    The products of eight columns are added before they are rounded: one that leaves fp32's range is no inf by itself,
    and a tile's sum may become an inf of either sign.
    """
    if DEVICE == "cuda":
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    plain = interpreter.InterpreterBuilder.create_dot

    def cut(x: Any) -> Any:
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    def nearest(x: Any) -> Any:
        return cut((x.view(np.uint32) + np.uint32(0x1000)).view(np.float32))

    def add_products(total: Any, a: Any, b: Any) -> Any:
        for k in range(0, a.shape[-1], 8):
            products = a[..., k : k + 8].astype(np.float64) @ b[..., k : k + 8, :].astype(np.float64)
            total = (total + products).astype(np.float32)
        return total

    def create_dot(builder: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        if "TF32x3" not in str(precision) or a.data.dtype != np.float32:
            return plain(builder, a, b, total, precision, imprecise)
        high_a, high_b = nearest(a.data), nearest(b.data)
        small = add_products(np.zeros_like(total.data), cut(a.data - high_a), high_b)
        small = add_products(small, high_a, cut(b.data - high_b))
        products = add_products(np.where(np.isnan(small), np.float32(0), small), high_a, high_b)
        return interpreter.TensorHandle(total.data + products, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
