"""What a step with gradient surgery sends and keeps in each of many processes, and about how long that takes.

``python -m fastpcgrad.distributed.cost --tasks 8 --elements 1e9`` prints a table. Bytes are those that the collectives
are given; seconds are a model, of collectives at the bandwidths that are asked for.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from .buckets import Cut

MODES = {
    "data": "each process has its part of every task's batch, and gets shards of the means",
    "task": "each process has some of the tasks, or its part of one task's batch",
    "averaged": "each task's gradients averaged by DistributedDataParallel, whole rows in every process",
    "plain": "no surgery: one backward pass of the sum, averaged by DistributedDataParallel",
}


@dataclass(frozen=True)
class Step:
    """A step of T tasks in p processes, in one of ``MODES``.

    Args:
        mode: which.
        processes, tasks, elements: p, T and N, of one dtype.
        parameters: how many tensors these are.
        itemsize: bytes of an element.
    """

    mode: str
    processes: int
    tasks: int
    elements: int
    parameters: int = 1
    itemsize: int = 4

    @property
    def passes(self) -> int:
        """Rows that a process gives away, each after a backward pass: of all tasks, or of those that it has at most."""
        return {"task": -(-self.tasks // self.processes), "plain": 1}.get(self.mode, self.tasks)

    @property
    def cut(self) -> Cut:
        return Cut(self.elements, self.itemsize, self.processes, self.processes if self.mode == "task" else 1)

    @property
    def vector(self) -> int:
        """Bytes of a row that a process hands to the others, or of a merged gradient that it has from them."""
        return self.cut.count * self.cut.part * (self.processes - 1) * self.itemsize

    @property
    def messages(self) -> int:
        """Bytes of what goes round besides rows: where everybody is, G, C and w, and who has which gradients."""
        if self.mode in ("averaged", "plain") or self.processes == 1:
            return 0
        points = 1 if self.mode == "task" else 2 * self.tasks + 2
        counts = 8 * (1 + self.tasks) * (self.processes - 1) if self.mode == "task" else 0
        return 40 * points + 8 * (3 * self.tasks**2 + self.tasks) + self.tasks * self.parameters + counts

    @property
    def sent(self) -> int:
        """Bytes that a process sends."""
        if self.mode in ("averaged", "plain"):
            return 2 * self.passes * self.vector  # an all-reduce: both halves
        return (self.passes + 1) * self.vector + self.messages

    @property
    def memory(self) -> int:
        """Bytes for rows and the merged gradient, beyond what a plain step has, whose gradient counts here too."""
        whole, cut = self.elements * self.itemsize, self.cut
        if self.mode in ("averaged", "plain") or self.processes == 1:
            return self.passes * whole
        shard = cut.count * cut.part * self.itemsize
        begun = min(self.tasks, self.processes) * shard + self.passes * whole if self.mode == "task" else 0
        return max(begun, self.tasks * shard + whole) + cut.nbytes


@dataclass(frozen=True)
class Cluster:
    """Where the processes run, one a GPU.

    Attributes:
        node: GPUs of a node.
        link, network: bytes a second that a GPU sends within its node, and to others.
        latency: seconds of a collective whatever it carries, for each doubling of the processes.
    """

    node: int = 8
    link: float = 450e9
    network: float = 50e9
    latency: float = 5e-6

    def seconds(self, step: Step, sent: int, *, to_each: bool) -> float:
        """Of a row on its way.

        Args:
            sent: bytes that each process sends.
            to_each: whether it sends each of the others something else, most of which leaves the node; else all send
                to their neighbours, where a node's GPUs share what leaves it.
        """
        beyond = max(0, step.processes - self.node) / max(1, step.processes - 1)
        if to_each:
            carried = sent * max(beyond / self.network, (1 - beyond) / self.link)
        else:
            carried = sent / (min(self.link, self.node * self.network) if beyond else self.link)
        return carried + step.cut.count * self.latency * math.log2(step.processes)

    def step(self, step: Step, backward: float) -> tuple[float, float]:
        """Seconds of backward passes and collectives: one after the other, and with what has been averaged on its way
        while its backward pass still runs, but for the last bucket. Tasks that are shared out are sent in the merge.

        Args:
            backward: seconds of one backward pass on what a process has of a task's batch under data parallelism. The
                whole batch is the same in all modes.
        """
        row = self.seconds(step, step.vector, to_each=step.mode == "task")
        gather = self.seconds(step, step.vector, to_each=False)
        if step.mode in ("averaged", "plain"):
            row, gather = 2 * gather, 0.0
        if step.mode == "task":  # a task's batch is that of all processes, shared by those that have it
            backward *= step.processes / max(1, step.processes // step.tasks)
        elif step.mode == "plain":
            backward *= step.tasks
        in_turn = step.passes * (backward + row) + gather
        if step.mode == "task":
            return in_turn, in_turn
        last = row / max(1, step.cut.count) if step.mode == "data" else 0.0
        return in_turn, step.passes * (max(backward, row) + last) + gather


def table(options: argparse.Namespace) -> str:
    """A line for each number of processes and mode."""
    cluster = Cluster(options.node, options.link * 1e9, options.network * 1e9, options.latency * 1e-6)
    lines = [f"{'GPUs':>5} {'mode':<9}{'sent':>10}{'memory':>10}{'in turn':>10}{'overlapped':>12}{'plain steps':>13}"]
    for processes in options.processes:
        steps = [Step(m, processes, options.tasks, options.elements, options.tensors, options.itemsize) for m in MODES]
        times = [cluster.step(step, options.backward * 1e-3) for step in steps]
        for step, (in_turn, overlapped) in zip(steps, times, strict=True):
            lines.append(
                f"{processes:>5} {step.mode:<9}{step.sent / 1e9:>7.2f} GB{step.memory / 1e9:>7.2f} GB"
                f"{1e3 * in_turn:>7.0f} ms{1e3 * overlapped:>9.0f} ms{overlapped / times[-1][1]:>13.2f}"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    modes = "; ".join(f"{mode}: {what}" for mode, what in MODES.items())
    made = argparse.ArgumentParser(prog="python -m fastpcgrad.distributed.cost", description=modes)
    made.add_argument("--processes", type=int, nargs="+", default=[1 << k for k in range(1, 11)], help="p (2 to 1024)")
    made.add_argument("--tasks", type=int, default=8, help="T (%(default)s)")
    made.add_argument("--elements", type=lambda text: int(float(text)), default=10**9, help="N (1e9)")
    made.add_argument("--tensors", type=int, default=500, help="parameters that these are in (%(default)s)")
    made.add_argument("--itemsize", type=int, default=2, help="bytes of an element (%(default)s)")
    made.add_argument("--backward", type=float, default=50.0, help="ms of a task's backward pass (%(default)s)")
    made.add_argument("--node", type=int, default=Cluster.node, help="GPUs of a node (%(default)s)")
    made.add_argument("--link", type=float, default=Cluster.link / 1e9, help="GB/s within a node (%(default)s)")
    made.add_argument("--network", type=float, default=Cluster.network / 1e9, help="GB/s between nodes (%(default)s)")
    made.add_argument("--latency", type=float, default=Cluster.latency * 1e6, help="us of a collective (%(default)s)")
    print(table(made.parse_args(arguments)))


if __name__ == "__main__":
    main()
