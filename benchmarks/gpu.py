"""``python -m benchmarks.gpu [--append] [--minutes 3]``: the library on a GPU, against the bytes it has to move.

The Triton kernels are compiled first, in parallel. Then is measured, what matters most first:

- how fast this GPU copies and reads;
- gram, combine, the whole surgery and mix_ on J of 1 GiB with both backends, torch's products, TorchJD's PCGrad (or its
  algorithm, and the row says so) and the loop;
- the same on small J, where a call is bound by the host: ``pcgrad[graph]`` is a captured surgery, many replays between
  two events;
- training steps of a large model in each of the library's modes (``benchmarks.gpu_steps``);
- every method against TorchJD's (``benchmarks.gpu_methods``);
- the surgery on task gradients that lie in blocks, one a parameter, against packed rows;
- J of 4 GiB and of 256 MiB.

Times are CUDA events around single calls, the median of many (``benchmarks.gpu_timing``). Needs torch, numpy and triton
alone. Rows go to benchmarks/results/gpu.jsonl with ``--append``, as soon as they are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpcgrad
from benchmarks import gpu_compile, gpu_methods, gpu_steps, gpu_table, models, rows
from benchmarks.gpu_table import RESULTS
from benchmarks.gpu_timing import DEVICE, Timing, replays_of, timed
from benchmarks.peers import loop, torchjd_algorithm
from benchmarks.rows import Environment, Row
from benchmarks.subjects import forced_backend
from benchmarks.targets import verdicts
from fastpcgrad import backends, variants
from fastpcgrad._blocks import Blocks
from fastpcgrad.backends import cuda
from fastpcgrad.backends.stacked import Stacked
from fastpcgrad.variants import Guards

TASKS = (8, 4, 2, 16, 32, 64)
WIDTHS = (10_000, 100_000, 1_000_000)
BYTES_OF_J = (1 << 30, 4 << 30, 256 << 20)
DTYPES = (torch.float32, torch.bfloat16)
LARGE = 1 << 30
"""Bytes of J from which on a cache holds too little of it to matter."""
TASKS_IN_BLOCKS = (4, 2, 8, 16)
BACKENDS = ("cuda", "triton")
REPLAYS = 20

Shape = tuple[int, int, torch.dtype]


def environment() -> Environment:
    triton = rows.version_of("triton") or "none"
    device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, triton {triton}"
    return dataclasses.replace(rows.environment(torch.get_num_threads()), device=device)


class Run:
    """One run: its rows, the bandwidths that they are compared with, and when it has to end."""

    def __init__(self, environment: Environment, minutes: float, results: Path | None = None) -> None:
        self.environment, self._results = environment, results
        self._deadline = time.monotonic() + 60 * minutes
        self.rows: list[Row] = []
        self.copy_gbps = self.read_gbps = 0.0

    @property
    def late(self) -> bool:
        return time.monotonic() > self._deadline

    def add(self, row: Row) -> Row:
        """Keeps the row, at once: a run that is cut off has measured what it has measured."""
        self.rows.append(row)
        if self._results is not None:
            rows.append([row], self._results)
        return row

    def bandwidths(self, elements: int = 1 << 30) -> None:
        source = torch.randn(elements, device=DEVICE)
        target = torch.empty_like(source)
        copy = timed(lambda: target.copy_(source), 0.2)
        reads = [timed(partial(reduce, source), 0.2) for reduce in (torch.sum, torch.amax)]
        read = min(reads, key=lambda timing: timing.p50)
        self.copy_gbps, self.read_gbps = 2 * source.nbytes / copy.p50 / 1e6, source.nbytes / read.p50 / 1e6
        for op, gbps, timing in (("copy", self.copy_gbps, copy), ("read", self.read_gbps, read)):
            note = f"{source.nbytes >> 20} MiB fp32; bytes moved per second"
            self.add(Row("bandwidth", f"{op} bandwidth", op, "machine", self.environment, gbps=gbps, note=note))
            print(f"{op}: {gbps:.0f} GB/s (p20 {timing.p20:.3f} ms, p80 {timing.p80:.3f} ms)", flush=True)

    def time(
        self,
        op: str,
        subject: str,
        backend: str,
        grads: Tensor,
        call: Callable[[], object],
        *,
        replayed: bool = False,
        note: str = "",
        against: Mapping[str, float | None] | None = None,
    ) -> Row:
        """Times a call and adds its row, which says so where the call fails.

        Args:
            replayed: time replays of the call in a CUDA graph.
            against: milliseconds that its ratios are to, where there are any.
        """
        tasks, width = grads.shape
        dtype = str(grads.dtype).removeprefix("torch.")
        row = Row(
            "kernel",
            f"{op} T={tasks} N={width} {dtype}",
            op,
            subject,
            self.environment,
            subject_version=rows.version_of("torchjd") if subject == "torchjd" else "",
            backend=backend,
            T=tasks,
            N=width,
            dtype=dtype,
            note=note,
        )
        try:
            timing = timed(replays_of(call, REPLAYS), calls_of_one=REPLAYS) if replayed else timed(call)
        except Exception as error:
            return self.add(dataclasses.replace(row, status=rows.failed(error)))
        return self.add(self._with_times(row, grads, timing, against or {}))

    def _with_times(self, row: Row, grads: Tensor, timing: Timing, against: Mapping[str, float | None]) -> Row:
        size, result = grads.nbytes, grads.shape[1] * grads.element_size()
        once = {"gram": size, "combine": size + result, "mix_": 2 * size}
        gbps = once.get(row.op.removesuffix("_blocks"), 2 * size + result) / timing.p50 / 1e6
        return dataclasses.replace(
            row,
            rounds=timing.rounds,
            p20_ms=timing.p20,
            p50_ms=timing.p50,
            p80_ms=timing.p80,
            ratios={name: timing.p50 / other for name, other in against.items() if other},
            gbps=gbps,
            bandwidth_fraction=gbps / self.copy_gbps if size >= LARGE else None,
        )


def available(run: Run) -> list[str]:
    """The backends that run here; the others get a row that says why they do not."""
    reasons = {backend: backends.why_unavailable(backend, DEVICE) for backend in BACKENDS}
    for backend, reason in reasons.items():
        if reason is not None:
            run.add(Row("kernel", backend, "pcgrad", "fastpcgrad", run.environment, status=f"missing: {reason}"))
    return [backend for backend, reason in reasons.items() if reason is None]


def large_shapes(sizes: Iterable[int]) -> Iterator[Shape]:
    for size, tasks, dtype in itertools.product(sizes, TASKS, DTYPES):
        yield tasks, size // (tasks * dtype.itemsize) // 64 * 64, dtype


def small_shapes() -> Iterator[Shape]:
    yield from itertools.product(TASKS, WIDTHS, DTYPES)


def library_calls(grads: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """(op, a call), for the backend that is forced."""
    tasks, width = grads.shape
    weights = torch.rand(tasks, dtype=torch.float64).to(DEVICE)
    # A rotation: applied again and again, the rows keep their size.
    coefficients = torch.linalg.qr(torch.randn(tasks, tasks, dtype=torch.float64)).Q.contiguous().to(DEVICE)
    out = grads.new_empty(width)
    order = variants.get("paper").draw_orders(tasks, None, None).to(DEVICE)
    yield "gram", lambda: fastpcgrad.gram(grads)
    yield "combine", lambda: fastpcgrad.combine(grads, weights, out=out)
    yield "pcgrad", lambda: fastpcgrad.pcgrad(grads, order=order)
    yield "mix_", lambda: fastpcgrad.mix_(grads, coefficients)


def torch_calls(grads: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    weights, coefficients = torch.rand(1, len(grads)).to(grads), torch.eye(len(grads)).to(grads)
    yield "gram", lambda: grads @ grads.T
    yield "combine", lambda: weights @ grads
    yield "mix_", lambda: grads.copy_(coefficients @ grads)


def peer_calls(grads: Tensor) -> Iterator[tuple[str, Callable[[], object], str]]:
    """(whose pcgrad, a call, a note)."""
    try:
        from benchmarks.peers import torchjd_peer
    except ImportError:
        note = "TorchJD's algorithm written anew (benchmarks/peers/torchjd_algorithm.py)"
        yield "torchjd", torchjd_algorithm.kernel(grads), note
    else:
        yield "torchjd", torchjd_peer.kernel(grads), ""
    if grads.shape[0] <= 8 or grads.shape[1] <= WIDTHS[-1]:  # T² passes over long rows: nobody waits for that
        yield "loop", loop.kernel(grads), ""


def measure_kernels(run: Run, shapes: Iterable[Shape], names: Iterable[str]) -> None:
    for tasks, width, dtype in shapes:
        if run.late:
            print("the time was up", flush=True)
            return
        measure_shape(run, torch.randn(tasks, width, dtype=dtype, device=DEVICE), names)


def measure_shape(run: Run, grads: Tensor, names: Iterable[str]) -> None:
    """Backends, torch and peers on one J; the peers' ratios are to the faster backend's call and graph replay."""
    ours: list[Row] = []
    for backend in names:
        with forced_backend(backend):
            for op, call in library_calls(grads):
                ours.append(run.time(op, "fastpcgrad", backend, grads, call))
                if op == "pcgrad" and grads.nbytes < min(BYTES_OF_J):
                    ours.append(run.time("pcgrad[graph]", "fastpcgrad", backend, grads, call, replayed=True))
    for op, call in torch_calls(grads):
        run.time(op, "torch", "torch", grads, call)
    ways = {"pcgrad": "fastpcgrad", "pcgrad[graph]": "fastpcgrad[graph]"}
    best = {
        name: min((row.p50_ms for row in ours if row.op == op and row.p50_ms), default=None)
        for op, name in ways.items()
    }
    for name, call, note in peer_calls(grads):
        run.time("pcgrad", name, "torch", grads, call, note=note, against=best)


def block_lists() -> dict[str, list[int]]:
    """The widths of parameters: of a transformer of 110 M, and of many tiny ones."""
    with torch.device(DEVICE):
        transformer = models.MeanPooledEncoder(32_000, 768, 12)
    return {
        "transformer": [parameter.numel() for parameter in transformer.parameters()],
        "300 tiny blocks": [64, 8, 4096] * 100,
    }


@dataclasses.dataclass(frozen=True)
class Scattered:
    """The same task gradients packed and in blocks."""

    grads: Tensor
    blocks: Blocks
    order: Tensor

    @staticmethod
    def of(widths: list[int], tasks: int, dtype: torch.dtype) -> Scattered:
        grads = torch.randn(tasks, sum(widths), dtype=dtype, device=DEVICE)
        tensors = [[part.clone() for part in row.split(widths)] for row in grads]
        pointers = [[part.data_ptr() for part in row] for row in tensors]
        order = variants.get("paper").draw_orders(tasks, None, None).to(DEVICE)
        return Scattered(grads, Blocks(tensors, pointers, array("q", widths), dtype, grads.device), order)

    def packed_call(self) -> Callable[[], object]:
        merged = self.grads.new_empty(self.grads.shape[1])
        return lambda: cuda.pcgrad(self.grads, self.order, Guards(), 1.0, None, merged)

    def calls(self, functions: Any) -> Iterator[tuple[str, Callable[[], object]]]:
        """(op, a call) of each of the three block functions of a backend."""
        blocks, out = self.blocks, [self.grads.new_empty(width) for width in self.blocks.widths]
        weights = torch.rand(1, len(self.grads), dtype=torch.float64).to(DEVICE)
        yield "gram_blocks", lambda: functions.gram_blocks(blocks, None, 1)
        yield "combine_blocks", lambda: functions.combine_blocks(blocks, weights, None, out)
        yield "pcgrad_blocks", lambda: functions.pcgrad_blocks(blocks, self.order, False, 0.0, 0.0, 1.0, out)


def measure_blocks(run: Run) -> None:
    """Blocks against packed rows of the same size by the CUDA library, and against packing them before each pass."""
    packing = Stacked(cuda.gram, cuda.pcgrad_coefficients, cuda.combine)
    for (name, widths), tasks, dtype in itertools.product(block_lists().items(), TASKS_IN_BLOCKS, DTYPES):
        if run.late:
            print("the time was up", flush=True)
            return
        given = Scattered.of(widths, tasks, dtype)
        packed = run.time("pcgrad", "fastpcgrad", "cuda", given.grads, given.packed_call(), note=f"{name}, packed")
        for backend, functions in (("cuda", cuda), ("cuda, packing", packing)):
            for op, call in given.calls(functions):
                against = {"packed": packed.p50_ms} if op == "pcgrad_blocks" else None
                run.time(op, "fastpcgrad", backend, given.grads, call, note=name, against=against)
                if op == "pcgrad_blocks" and functions is cuda and given.grads.nbytes < min(BYTES_OF_J):
                    run.time(f"{op}[graph]", "fastpcgrad", backend, given.grads, call, replayed=True, note=name)


def measure_steps(run: Run) -> None:
    chosen = gpu_steps.modes()
    for row in gpu_steps.memory_rows(gpu_steps.CASE, run.environment, chosen):
        run.add(row)
    for row in gpu_steps.step_rows(gpu_steps.CASE, run.environment, chosen):
        run.add(row)


def show(run: Run) -> None:
    """What docs/kernels.md would say of this run; what was promised; what failed."""
    print(f"\n{gpu_table.table(run.rows)}\n")
    for verdict in verdicts(run.rows, gpu_steps.TARGETS):
        print(f"{verdict.word}: {verdict.target.text}, {verdict.limit}: {verdict.value}")
    for line in gpu_methods.summary(run.rows):
        print(line)
    for row in run.rows:
        if not row.ok:
            print(f"{row.kind} {row.case} {row.subject} {row.backend}: {row.status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", action="store_true", help=f"append the rows to {RESULTS}")
    parser.add_argument("--minutes", type=float, default=3.0, help="after these, kernels that are left are left out")
    arguments = parser.parse_args()
    if DEVICE != "cuda":
        sys.exit("benchmarks.gpu: this torch sees no CUDA device")
    torch.manual_seed(0)
    run = Run(environment(), arguments.minutes, RESULTS if arguments.append else None)
    gpu_compile.compile_all(itertools.product(TASKS, DTYPES))
    names = available(run)
    parts: dict[str, Callable[[], None]] = {
        "bandwidth": run.bandwidths,
        "large J": lambda: measure_kernels(run, large_shapes(BYTES_OF_J[:1]), names),
        "small J": lambda: measure_kernels(run, small_shapes(), names),
        "steps": lambda: measure_steps(run),
        "methods": lambda: gpu_methods.measure(run),
        "blocks": lambda: measure_blocks(run) if "cuda" in names else None,
        "other large J": lambda: measure_kernels(run, large_shapes(BYTES_OF_J[1:]), names),
    }
    for name, part in parts.items():
        start = time.monotonic()
        part()
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    show(run)


if __name__ == "__main__":
    main()
