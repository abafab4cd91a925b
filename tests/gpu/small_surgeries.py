"""Small surgeries of each kind of kernel, for compute-sanitizer.

Everything comes from the CPU: the checkers would look at torch's kernels too, and take most of their time for those.
"""

from array import array

import torch

from fastpcgrad._blocks import Blocks
from fastpcgrad.backends import cuda
from fastpcgrad.variants import Guards

for tasks in (2, 8, 12, 20):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for width, start in ((3001, 1), (4096, 0)):
            storage = torch.randn(tasks, width + start).to(dtype).cuda()
            rows, out = storage[:, start:], torch.empty(width, dtype=dtype, device="cuda")
            order = torch.stack([torch.randperm(tasks) for _ in range(tasks)]).cuda()
            for launches in (cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES):
                cuda.launches = launches
                cuda.pcgrad(rows, order, Guards(), 1.0, None, out)
                cuda.pcgrad_(rows, order, Guards(), torch.tensor([0, 7, 7, width]).cuda())
        widths = array("q", (3001, 7, 1, 4096, 65))
        grads = [[torch.randn(width).to(dtype).cuda() for width in widths] for _ in range(tasks)]
        absent = [[None if (t + b) % 3 == 0 else grad for b, grad in enumerate(row)] for t, row in enumerate(grads)]
        for given in (grads, absent):
            pointers = [[0 if grad is None else grad.data_ptr() for grad in row] for row in given]
            blocks = Blocks(given, pointers, widths, dtype, torch.device("cuda"))
            merged = [torch.empty(width, dtype=dtype, device="cuda") for width in widths]
            cuda.pcgrad_blocks(blocks, order, Guards(), 1.0, merged)
            cuda.gram_blocks(blocks, [1, 0, -1, 1, 0], 2)
torch.cuda.synchronize()
