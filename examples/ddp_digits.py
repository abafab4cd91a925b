"""Two digits and three tasks under data parallelism: ``torchrun --nproc_per_node 2 -m examples.ddp_digits``.

The training loop is that of one process: the model is wrapped, each process has its part of every batch, and
``pc_backward`` does the rest. By NCCL where there is a GPU for each process, else by gloo.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad
from examples import command_line

NEEDED = ("sklearn",)
WIDTH, FEATURES = 64, 8
BATCH = 128
"""Of all processes together, as far as that many can share it evenly."""


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    command_line.exit_if_missing(NEEDED)
    on_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        train(options.steps, options.seed, device)
    finally:
        dist.destroy_process_group()


def train(steps: int, seed: int, device: torch.device) -> list[float]:
    """Train on this process' parts of the batches, and say how it goes in the first one.

    Returns:
        the accuracy of each task on the test set.
    """
    from examples.digits_data import TASKS, two_digits
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
        if rank == 0 and (step == 1 or step % 100 == 0):
            assert optimizer.report is not None
            conflicts = float(optimizer.report.conflict_rate)
            total = float(sum(loss.detach() for loss in losses))
            print(f"step {step}: loss {total:.3f}, {conflicts:.0%} of task pairs in conflict")
    with torch.no_grad():
        outputs = model.module(test_set.images.to(device))
    right = [(o.argmax(dim=1).cpu() == test_set.labels[:, t]).double().mean().item() for t, o in enumerate(outputs)]
    if rank == 0:
        listed = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in zip(TASKS, right, strict=True))
        print(f"{processes} processes, {steps} steps; accuracy: {listed}")
    return right


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="torchrun -m examples.ddp_digits", description="Two digits under DDP.")
    made.add_argument("--steps", type=command_line.positive, default=500, help="training steps (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of data, network and batches (%(default)s)")
    return made


if __name__ == "__main__":
    main()
