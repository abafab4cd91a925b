"""``torchrun --nproc_per_node 2 -m benchmarks.overlap``: reductions within backward passes, beside such that wait.

Rounds of surgery under DistributedDataParallel, on gloo: those of one surgery are overlapped, those of another, on the
same model, in turn. They take turns in an order shuffled anew for each, and are first compared: they give the same
bits. On one machine reductions take CPU time that backward passes would have. ``--link 0.2`` shows what a network does:
a bucket then takes at least as long as its bytes do at 0.2 GB/s, one after the other.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastpcgrad
from benchmarks.tables import markdown
from benchmarks.timing import Plan, in_turn, paired_ratio

CHOICES = {"overlapped": True, "in turn": False}


class Slow:
    """What is on its way until a time at least."""

    def __init__(self, work: Any, until: float) -> None:
        self._work, self._until = work, until

    def is_completed(self) -> bool:
        return time.perf_counter() >= self._until and self._work.is_completed()

    def wait(self) -> None:
        self._work.wait()
        time.sleep(max(0.0, self._until - time.perf_counter()))


def slow_down(rate: float) -> None:
    """Reductions that nobody waits for at once take their bytes by ``rate`` a second, one after the other."""
    reduced: Any = dist.all_reduce
    until = [0.0]

    def all_reduce(tensor: torch.Tensor, *arguments: Any, async_op: bool = False, **options: Any) -> Any:
        work = reduced(tensor, *arguments, async_op=async_op, **options)
        if not async_op:
            return work
        sent = tensor.nbytes * (dist.get_world_size() - 1) / dist.get_world_size()
        until[0] = max(until[0], time.perf_counter()) + sent / rate
        return Slow(work, until[0])

    dist.all_reduce = all_reduce


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
    every = Plan(0.0, least=options.rounds, most=options.rounds, slow=math.inf, cold=math.inf)
    phases = {name: {"wait": dist.barrier, "round": partial(rounds, surgery)} for name, surgery in surgeries.items()}
    times, failures = in_turn({name: partial(dict, of) for name, of in phases.items()}, every)  # alike in all processes
    if failures:
        raise RuntimeError(f"a round failed: {failures}")
    taken = {name: found["round"] for name, found in times.items()}
    lines = [(name, f"{found.median:.0f} ms") for name, found in taken.items()]
    elements = sum(p.numel() for p in net.parameters())
    head = f"{dist.get_world_size()} processes, {options.tasks} tasks, {elements / 1e6:.1f} M elements"
    return markdown((head, "a round"), [*lines, ("ratio", f"{paired_ratio(*taken.values()):.2f}")])


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m benchmarks.overlap")
    made.add_argument("--width", type=int, default=2048)
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--tasks", type=int, default=3)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--link", type=float, default=None, help="GB/s between the processes at most")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    if options.link is not None:
        slow_down(options.link * 1e9)
    shown = measure(options)
    if dist.get_rank() == 0:
        print(shown)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
