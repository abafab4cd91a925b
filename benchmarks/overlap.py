"""``torchrun --nproc_per_node 2 -m benchmarks.overlap``: reductions within backward passes, beside such that wait.

Rounds of surgery under DistributedDataParallel, on gloo: those of one surgery are overlapped, those of another, on the
same model, in turn. They take turns in an order shuffled anew for each, and are first compared: they give the same
bits. Without a network between the processes what is gained is the time in which one waits for the other; reductions
then take CPU time that backward passes would have.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad

CHOICES = {"overlapped": True, "in turn": False}


def measure(options: argparse.Namespace) -> str:
    """A line of Markdown for each choice, and the ratio of both, from the first process' clock."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(options.width, options.width) for _ in range(options.layers)))
    wrapped = DistributedDataParallel(net)
    x = torch.randn(options.batch, options.width) + dist.get_rank()
    surgeries = {
        name: fastpcgrad.GradientSurgery(net.parameters(), options.tasks, overlap=overlap)
        for name, overlap in CHOICES.items()
    }

    def rounds(surgery: fastpcgrad.GradientSurgery) -> list[torch.Tensor]:
        output = wrapped(x)
        torch.manual_seed(0)  # of the order of projections
        surgery.backward([(output - t).square().mean() for t in range(options.tasks)])
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    found = [rounds(surgery) for _ in range(2) for surgery in surgeries.values()][-2:]
    if not all(map(torch.equal, *found)):
        raise RuntimeError("the two do not give the same bits")
    seconds: dict[str, list[float]] = {name: [] for name in CHOICES}
    turns = random.Random(0)  # alike in all processes
    for _ in range(options.rounds):
        for name in turns.sample(list(CHOICES), len(CHOICES)):
            dist.barrier()
            begin = time.perf_counter()
            rounds(surgeries[name])
            seconds[name].append(time.perf_counter() - begin)
    lines = [f"| {name} | {1e3 * statistics.median(found):.0f} ms |" for name, found in seconds.items()]
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    elements = sum(p.numel() for p in net.parameters())
    head = f"{dist.get_world_size()} processes, {options.tasks} tasks, {elements / 1e6:.1f} M elements"
    return "\n".join([f"| {head} | a round |", "| --- | --- |", *lines, f"| ratio | {ratio:.2f} |"])


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m benchmarks.overlap")
    made.add_argument("--width", type=int, default=2048)
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--tasks", type=int, default=3)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--threads", type=int, default=1)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    shown = measure(options)
    if dist.get_rank() == 0:
        print(shown)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
