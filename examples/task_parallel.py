"""Two digits, and a process for each task: ``torchrun --nproc_per_node 3 -m examples.task_parallel``.

Each process runs the backward passes of its own tasks alone, and gives None for the others; ``pc_backward`` exchanges
the task gradients. With fewer processes one has several tasks; with more several share one, each with batches of its
own. By NCCL where there is a GPU for each process, else by gloo.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import fastpcgrad
from examples.ddp_digits import BATCH, FEATURES, NEEDED, WIDTH, say_progress, tested
from examples.processes import run


def main(arguments: list[str] | None = None) -> None:
    run(train, "task_parallel", "Two digits, tasks shared out.", 500, NEEDED, arguments)


def train(steps: int, seed: int, device: torch.device) -> list[float]:
    """Train on this process' tasks, and say how it goes in the first one.

    Returns:
        the accuracy of each task on the test set.
    """
    from examples.digits_data import TASKS, two_digits
    from examples.digits_runs import Network

    rank, processes = dist.get_rank(), dist.get_world_size()
    train_set, test_set = two_digits(train_size=4000, test_size=1000, seed=seed)
    images, labels = train_set.images.to(device), train_set.labels.to(device)
    torch.manual_seed(seed)  # the same parameters in all
    network = Network(WIDTH, FEATURES).to(device)
    optimizer = fastpcgrad.PCGrad(torch.optim.Adam(network.parameters(), lr=3e-3), parallel="task")
    generator = torch.Generator().manual_seed(seed + rank)  # other batches in each
    for step in range(1, steps + 1):
        own = torch.randint(len(images), (BATCH,), generator=generator).to(device)
        optimizer.zero_grad()
        outputs = network(images[own])
        losses = [
            torch.nn.functional.cross_entropy(o, labels[own, t]) if t % processes == rank % len(TASKS) else None
            for t, o in enumerate(outputs)
        ]
        optimizer.pc_backward(losses)
        optimizer.step()
        if step == 1 or step % 100 == 0:
            say_progress(step, [loss for loss in losses if loss is not None], optimizer)
    return tested(network, test_set, device)


if __name__ == "__main__":
    main()
