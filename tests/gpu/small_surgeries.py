"""Small surgeries of each kind of kernel, for compute-sanitizer: ``small_surgeries.py rows|blocks|solvers``.

Everything comes from the CPU: the checkers would look at torch's kernels too, and take most of their time for those.
"""

import sys
from array import array

import torch

from fastpcgrad import methods
from fastpcgrad._blocks import Blocks
from fastpcgrad._ops import to_device
from fastpcgrad.backends import cuda
from fastpcgrad.variants import Guards

DEVICE = torch.device("cuda", 0)
TASKS = (2, 4, 8, 12, 20, 28, 40, 70)
"""Held by a thread (2, 4 or 8 rows), by tensor cores in 2, 3, 4 and 8 groups of rows, by several tiles."""
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SOLVED = (2, 9, 33, 64)


def solved_methods():
    return (
        methods.MGDA(),
        methods.MGDA(solver="exact"),
        methods.CAGrad(c=0.5),
        methods.FairGrad(alpha=1.0),
        methods.UPGrad(),
        methods.DualProj(),
        methods.AlignedMTL(),
        methods.IMTLG(),
        methods.ConFIG(),
        methods.GradVac(generator=torch.Generator()),
    )


def random_order(tasks):
    """In the host's memory: of few tasks it travels with the launch."""
    return torch.stack([torch.randperm(tasks) for _ in range(tasks)])


def rows(tasks, dtype):
    for width, start in ((3001, 1), (4096, 0)):
        storage = to_device(torch.randn(tasks, width + start).to(dtype), DEVICE)
        given, out = storage[:, start:], torch.empty(width, dtype=dtype, device=DEVICE)
        order, segments = random_order(tasks), to_device(torch.tensor([0, 7, 7, width]), DEVICE)
        for launches in (cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES):
            cuda.launches = launches
            cuda.pcgrad(given, to_device(order, DEVICE), Guards(), 1.0, None, out)
            cuda.pcgrad(given, order, Guards(), 1.0, None, out)
            cuda.pcgrad_(given, order, Guards(), segments)
        # What no fp32 number holds is multiplied in float64, by a kernel's rare part.
        cuda.mix_(given, to_device(torch.eye(tasks, dtype=torch.float64) * 2.0**-200, DEVICE), None)


def blocks(tasks, dtype):
    widths, order = array("q", (3001, 7, 1, 4096, 65)), random_order(tasks)
    grads = [[to_device(torch.randn(width).to(dtype), DEVICE) for width in widths] for _ in range(tasks)]
    absent = [[None if (t + b) % 3 == 0 else grad for b, grad in enumerate(row)] for t, row in enumerate(grads)]
    for given in (grads, absent):
        pointers = [[0 if grad is None else grad.data_ptr() for grad in row] for row in given]
        found = Blocks(given, pointers, widths, dtype, DEVICE)
        merged = [torch.empty(width, dtype=dtype, device=DEVICE) for width in widths]
        cuda.pcgrad_blocks(found, order, Guards(), 1.0, merged)
        cuda.gram_blocks(found, [1, 0, -1, 1, 0], 2)


def solvers():
    for tasks in SOLVED:
        J = torch.randn(tasks, 3 * tasks, dtype=torch.float64)
        J -= 0.9 * J.mean(dim=0)
        gram = to_device(J @ J.mT, DEVICE)
        for method in solved_methods():
            method.weights(gram)


if sys.argv[1] == "solvers":
    solvers()
else:
    surgery = {"rows": rows, "blocks": blocks}[sys.argv[1]]
    for tasks in TASKS:
        for dtype in DTYPES:
            surgery(tasks, dtype)
torch.cuda.synchronize()
