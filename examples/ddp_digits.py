"""Two digits and three tasks under data parallelism: ``torchrun --nproc_per_node 2 -m examples.ddp_digits``.

The training loop is that of one process: the model is wrapped, each process has its part of every batch, and
``pc_backward`` does the rest. By NCCL where there is a GPU for each process, else by gloo.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad
from examples.processes import run, say

NEEDED = ("sklearn",)
WIDTH, FEATURES = 64, 8
BATCH = 128
"""Of all processes together, as far as that many can share it evenly."""


def main(arguments: list[str] | None = None) -> None:
    run(train, "ddp_digits", "Two digits under DDP.", 500, NEEDED, arguments)


def train(steps: int, seed: int, device: torch.device) -> list[float]:
    """Train on this process' parts of the batches, and say how it goes in the first one.

    Returns:
        the accuracy of each task on the test set.
    """
    from examples.digits_data import two_digits
    from examples.digits_runs import Network

    rank, processes = dist.get_rank(), dist.get_world_size()
    train_set, test_set = two_digits(train_size=4000, test_size=1000, seed=seed)
    images, labels = train_set.images.to(device), train_set.labels.to(device)
    torch.manual_seed(seed)  # the first process' model counts: DistributedDataParallel sends it to all
    network = Network(WIDTH, FEATURES).to(device)
    model = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = fastpcgrad.PCGrad(torch.optim.Adam(model.parameters(), lr=3e-3))
    generator = torch.Generator().manual_seed(seed)  # the same batches in all, of which each takes its part
    for step in range(1, steps + 1):
        own = torch.randint(len(images), (processes, BATCH // processes), generator=generator)[rank].to(device)
        optimizer.zero_grad()
        outputs = model(images[own])
        losses = [torch.nn.functional.cross_entropy(o, labels[own, t]) for t, o in enumerate(outputs)]
        optimizer.pc_backward(losses)
        optimizer.step()
        if step == 1 or step % 100 == 0:
            say_progress(step, losses, optimizer)
    return tested(model.module, test_set, device)


def say_progress(step: int, losses: list[Tensor], optimizer: fastpcgrad.PCGrad) -> None:
    assert optimizer.report is not None
    listed = " ".join(f"{float(loss.detach()):.3f}" for loss in losses)
    say(f"step {step}: losses {listed}, {float(optimizer.report.conflict_rate):.0%} of task pairs in conflict")


@torch.no_grad()
def tested(network: torch.nn.Module, test_set: Any, device: torch.device) -> list[float]:
    """The accuracy of each task on the test set, which the first process says."""
    from examples.digits_data import TASKS

    outputs = network(test_set.images.to(device))
    right = [(o.argmax(dim=1).cpu() == test_set.labels[:, t]).double().mean().item() for t, o in enumerate(outputs)]
    listed = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in zip(TASKS, right, strict=True))
    say(f"{dist.get_world_size()} processes; accuracy: {listed}")
    return right


if __name__ == "__main__":
    main()
