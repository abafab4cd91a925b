"""TorchJD's PCGrad written anew from its description, for machines where TorchJD cannot be installed.

The Gram matrix by one product, the T² projections on its copy on the CPU in orders of ``torch.randperm``, the weights
back to the device, one product with J. Rows of this peer say that it is not TorchJD itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def weights_of(gram: Tensor) -> Tensor:
    """[T] on the device of ``gram``: the column sums of the projections' coefficients."""
    on_cpu = gram.cpu()
    tasks = len(on_cpu)
    total = torch.zeros(tasks, dtype=gram.dtype)
    for i in range(tasks):
        current = torch.zeros(tasks, dtype=gram.dtype)
        current[i] = 1
        for j in torch.randperm(tasks).tolist():
            inner = on_cpu[j] @ current
            if j != i and inner < 0:
                current[j] -= inner / on_cpu[j, j]
        total += current
    return total.to(gram.device)


def kernel(rows: Tensor) -> Callable[[], Tensor]:
    return lambda: weights_of(rows @ rows.T) @ rows
