"""Small surgeries of each kind of kernel, for compute-sanitizer."""

import torch

from fastpcgrad.backends import cuda

for tasks in (2, 8, 12, 20):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for width, start in ((3001, 1), (4096, 0)):
            storage = torch.randn(tasks, width + start, device="cuda").to(dtype)
            rows, out = storage[:, start:], torch.empty(width, dtype=dtype, device="cuda")
            order = torch.stack([torch.randperm(tasks) for _ in range(tasks)]).cuda()
            for launches in (cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES):
                cuda.launches = launches
                cuda.pcgrad(rows, order, False, 0.0, 0.0, 1.0, None, out)
                cuda.pcgrad_(rows, order, False, 0.0, 0.0, torch.tensor([0, 7, 7, width]).cuda())
torch.cuda.synchronize()
