"""``python -m benchmarks.gpu [--append] [--minutes 3]``: the library on a GPU, against the bytes it has to move.

The Triton kernels are compiled first, in parallel. Then is measured, what matters most first:

- how fast this GPU copies and reads;
- gram, combine, the whole surgery and mix_ on J of 1 GiB with both backends, torch's products, TorchJD's PCGrad (or its
  algorithm, and the row says so) and the loop;
- the same on small J, where a call is bound by the host: ``pcgrad[graph]`` is a captured surgery, many replays between
  two events;
- training steps and peaks of a transformer of 98 M parameters with T=4 tasks in each of the library's modes;
- every method against TorchJD's: the whole aggregation of a packed fp32 J of N = 2²²;
- the surgery on task gradients that lie in blocks, one a parameter, against packed rows;
- J of 4 GiB and of 256 MiB.

Times are CUDA events around single calls, the median of many. Needs torch, numpy and triton alone, and no
pytest-benchmark. Rows go to benchmarks/results/gpu.jsonl with ``--append``, as soon as they are there.
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

from benchmarks import bandwidth, gpu_compile, kernels, memory, method_cases, models, rows, steps, tables
from benchmarks.cases import Batch, Gpt, Op, StepCase, bytes_moved
from benchmarks.kernels import Contender, Inputs
from benchmarks.modes import modes
from benchmarks.peers import torchjd_algorithm
from benchmarks.rows import LIBRARY, MACHINE, RESULTS, Environment, Row, failed, missing, version_of
from benchmarks.session import Run
from benchmarks.targets import GPU, verdicts
from benchmarks.timing import Call, alone, replays_of, with_times
from fastpcgrad import backends, variants
from fastpcgrad._blocks import Blocks
from fastpcgrad.backends import cuda, triton
from fastpcgrad.backends.stacked import Stacked
from fastpcgrad.variants import Guards

TASKS = (8, 4, 2, 16, 32, 64)
WIDTHS = (10_000, 100_000, 1_000_000)
BYTES_OF_J = (1 << 30, 4 << 30, 256 << 20)
DTYPES = (torch.float32, torch.bfloat16)
LARGE = 1 << 30
"""Bytes of J from which on a cache holds too little of it to matter."""
TASKS_IN_BLOCKS = (4, 2, 8, 16)
METHODS_WIDTH = 1 << 22
BACKENDS = ("cuda", "triton")
REPLAYS = 20
STEPS = StepCase(Gpt("100M", 16384, 768, 12, context=512), 4, Batch(8, 512))

Shape = tuple[int, int, torch.dtype]


def environment() -> Environment:
    triton = rows.version_of("triton") or "none"
    device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, triton {triton}"
    return dataclasses.replace(rows.environment(torch.get_num_threads()), device=device)


def measure_bandwidths(run: Run, elements: int | None = None) -> None:
    probe = bandwidth.Probe(device=run.device, elements=elements)
    for op in ("copy", "read"):
        samples = {way: alone(call, run.device, 0.2) for way, call in probe.ways[op].items()}
        way = min(samples, key=lambda name: samples[name].median)
        gbps, note = probe.bytes[op] / samples[way].median / 1e6, f"{probe.size}; bytes moved per second"
        run.add([run.row("bandwidth", f"{op} bandwidth", op, MACHINE, backend=way, dtype=None, gbps=gbps, note=note)])
        print(f"{op}: {gbps:.0f} GB/s by {way}", flush=True)


def timed(run: Run, row: Row, build: Callable[[], Call], replayed: bool = False) -> Row:
    """The row with the times of a call, or with why there are none. ``replayed``: of its replays in a CUDA graph."""
    try:
        call = build()
        if replayed:
            return with_times(row, alone(replays_of(call, REPLAYS), run.device, calls_of_one=REPLAYS))
        return with_times(row, alone(call, run.device))
    except Exception as error:
        absent = row.kind == "method" and isinstance(error, (ImportError, AttributeError))
        return dataclasses.replace(row, status=missing(error) if absent else failed(error))


def time_op(
    run: Run, op: str, who: Contender, x: Inputs, *, note: str = "", against: Mapping[str, float | None] | None = None
) -> Row:
    """Times an op on J, its replays where it is named so, and adds its row.

    ``against``: milliseconds that its ratios are to, where there are any.
    """
    assert not isinstance(who.build, str)
    tasks, width = x.rows.shape
    dtype = str(x.rows.dtype).removeprefix("torch.")
    row = run.row(
        "kernel", f"{op} T={tasks} N={width} {dtype}", op, who.name, subject_version=version_of(who.distribution),
        backend=who.backend, T=tasks, N=width, dtype=dtype, note=note,
    )  # fmt: skip
    row = timed(run, row, partial(who.build, x), replayed=op.endswith("[graph]"))
    if row.p50_ms is not None:
        gbps = bytes_moved(op, x.rows.nbytes, width * x.rows.element_size()) / row.p50_ms / 1e6
        copy = next((r.gbps for r in run.rows if (r.kind, r.op) == ("bandwidth", "copy")), None)
        share = gbps / copy if copy and x.rows.nbytes >= LARGE else None
        ratios = {name: row.p50_ms / other for name, other in (against or {}).items() if other}
        row = dataclasses.replace(row, ratios=ratios, gbps=gbps, bandwidth_fraction=share)
    return run.add([row])[0]


def available(run: Run) -> list[str]:
    """The backends that run here; the others get a row that says why they do not."""
    reasons = {backend: backends.why_unavailable(backend, run.device) for backend in BACKENDS}
    for backend, reason in reasons.items():
        if reason is not None:
            run.add([run.row("kernel", backend, "pcgrad", LIBRARY, dtype=None, status=f"missing: {reason}")])
    return [backend for backend, reason in reasons.items() if reason is None]


def large_shapes(sizes: Iterable[int]) -> Iterator[Shape]:
    for size, tasks, dtype in itertools.product(sizes, TASKS, DTYPES):
        yield tasks, size // (tasks * dtype.itemsize) // 64 * 64, dtype


def small_shapes() -> Iterator[Shape]:
    yield from itertools.product(TASKS, WIDTHS, DTYPES)


def _in_time(run: Run, cases: Iterable[Any]) -> Iterator[Any]:
    """The cases until the time is up."""
    for case in cases:
        if run.late:
            print("the time was up", flush=True)
            return
        yield case


def measure_kernels(run: Run, shapes: Iterable[Shape], names: Iterable[str]) -> None:
    for tasks, width, dtype in _in_time(run, shapes):
        measure_shape(run, torch.randn(tasks, width, dtype=dtype, device=run.device), names)


def order_of(grads: Tensor) -> Tensor:
    return variants.get("paper").draw_orders(grads.shape[0], None, None).to(grads.device)


def ours(op: Op, backend: str) -> Contender:
    return Contender(LIBRARY, "", backend, kernels.LIBRARY_OPS[op])


def measure_shape(run: Run, grads: Tensor, names: Iterable[str]) -> None:
    """Backends, torch and peers on one J; the peers' ratios are to the faster backend's call and graph replay."""
    x, best = kernels.inputs(grads, order_of(grads)), dict[str, float]()
    for backend, op in itertools.product(names, kernels.LIBRARY_OPS):
        graph = ["pcgrad[graph]"] if op == "pcgrad" and grads.nbytes < min(BYTES_OF_J) else []
        for timed_op in (op, *graph):
            with backends.forcing(backend):
                row = time_op(run, timed_op, ours(op, backend), x)
            if op == "pcgrad" and row.p50_ms:
                name = timed_op.replace(op, LIBRARY)
                best[name] = min(row.p50_ms, best.get(name, row.p50_ms))
    for op, build in kernels.TORCH_OPS.items():
        time_op(run, op, Contender("torch", "", "torch", build), x)
    for peer, note in peers(grads):
        time_op(run, "pcgrad", peer, x, note=note, against=best)


def peers(grads: Tensor) -> Iterator[tuple[Contender, str]]:
    """Whose pcgrad, and a note."""
    torchjd, loop = (peer.contender() for peer in kernels.PEERS if peer.name in ("torchjd", "loop"))
    if isinstance(torchjd.build, str):
        note = "TorchJD's algorithm written anew (benchmarks/peers/torchjd_algorithm.py)"
        yield dataclasses.replace(torchjd, build=lambda x: torchjd_algorithm.kernel(x.rows)), note
    else:
        yield torchjd, ""
    if grads.shape[0] <= 8 or grads.shape[1] <= WIDTHS[-1]:  # T² passes over long rows: nobody waits for that
        yield loop, ""


def measure_methods(run: Run) -> None:
    """Rows of both for each method and T; the events hold a wait for the host, where weights are found there."""
    for tasks in method_cases.TASKS:
        grads = method_cases.task_gradients(tasks, METHODS_WIDTH).to(run.device)
        for name in _in_time(run, method_cases.names(tasks)):
            pair = []
            for who, call in ((LIBRARY, method_cases.library_call), (method_cases.PEER, method_cases.peer_call)):
                row = run.row(
                    "method", f"{name} aggregation T={tasks} N={METHODS_WIDTH}", f"{name}.aggregation", who,
                    subject_version=version_of(who), T=tasks, N=METHODS_WIDTH,
                    backend=kernels.library_backend(run.device) if who == LIBRARY else "torch",
                )  # fmt: skip
                pair.append(timed(run, row, partial(call, name, "aggregation", grads)))
            run.add(_with_ratios(*pair))


def _with_ratios(own: Row, their: Row) -> list[Row]:
    if not own.p50_ms or not their.p50_ms:
        return [own, their]
    ratio = own.p50_ms / their.p50_ms
    own = dataclasses.replace(own, ratios={their.subject: ratio})
    return [own, dataclasses.replace(their, ratios={own.subject: 1 / ratio})]


def block_lists(device: str) -> dict[str, list[int]]:
    """The widths of parameters: of a transformer of 110 M, and of many tiny ones."""
    with torch.device(device):
        transformer = models.MeanPooledEncoder(32_000, 768, 12)
    return {
        "transformer": [parameter.numel() for parameter in transformer.parameters()],
        "300 tiny blocks": [64, 8, 4096] * 100,
    }


def _made(call: Call, _: Inputs) -> Call:
    return call


@dataclasses.dataclass(frozen=True)
class Scattered:
    """The same task gradients packed and in blocks."""

    grads: Tensor
    blocks: Blocks
    order: Tensor

    @staticmethod
    def of(widths: list[int], tasks: int, dtype: torch.dtype, device: str) -> Scattered:
        grads = torch.randn(tasks, sum(widths), dtype=dtype, device=device)
        tensors = [[part.clone() for part in row.split(widths)] for row in grads]
        pointers = [[part.data_ptr() for part in row] for row in tensors]
        return Scattered(grads, Blocks(tensors, pointers, array("q", widths), dtype, grads.device), order_of(grads))

    def packed(self) -> Contender:
        merged = self.grads.new_empty(self.grads.shape[1])
        call = partial(cuda.pcgrad, self.grads, self.order, Guards(), 1.0, None, merged)
        return Contender(LIBRARY, "", "cuda", partial(_made, call))

    def in_blocks(self, backend: str, functions: Any) -> Iterator[tuple[str, Contender]]:
        """Each of the three block functions of a backend, by op."""
        blocks, out = self.blocks, [self.grads.new_empty(width) for width in self.blocks.widths]
        weights = torch.rand(1, len(self.grads), dtype=torch.float64).to(self.grads.device)
        calls: dict[str, Call] = {
            "gram_blocks": lambda: functions.gram_blocks(blocks, None, 1),
            "combine_blocks": lambda: functions.combine_blocks(blocks, weights, None, out),
            "pcgrad_blocks": lambda: functions.pcgrad_blocks(blocks, self.order, Guards(), 1.0, out),
        }
        for op, call in calls.items():
            yield op, Contender(LIBRARY, "", backend, partial(_made, call))


def measure_blocks(run: Run, by_triton: bool = False) -> None:
    """Blocks against packed rows of the same size by the CUDA library, and against packing them before each pass.

    Args:
        by_triton: also those of Triton's kernels, which is what a user without the compiled library has.
    """
    packing = Stacked(cuda.gram, cuda.pcgrad_coefficients, cuda.combine)
    contenders: list[tuple[str, Any]] = [("cuda", cuda), ("cuda, packing", packing)]
    if by_triton:
        contenders.append(("triton", triton))
    lists = {} if run.late else block_lists(run.device)
    for (name, widths), tasks, dtype in _in_time(run, itertools.product(lists.items(), TASKS_IN_BLOCKS, DTYPES)):
        given = Scattered.of(widths, tasks, dtype, run.device)
        x = kernels.inputs(given.grads, given.order)
        packed = time_op(run, "pcgrad", given.packed(), x, note=f"{name}, packed")
        for backend, functions in contenders:
            for op, contender in given.in_blocks(backend, functions):
                against = {"packed": packed.p50_ms} if op == "pcgrad_blocks" else None
                time_op(run, op, contender, x, note=name, against=against)
                if op == "pcgrad_blocks" and functions is cuda and given.grads.nbytes < min(BYTES_OF_J):
                    time_op(run, f"{op}[graph]", contender, x, note=name)


def measure_steps(run: Run, case: StepCase = STEPS) -> None:
    chosen = modes(case, on_gpu=True)
    memory.measure_here(run, case.for_peaks, chosen)
    run.add(steps.rows_on_gpu(run, case, chosen))


def show(run: Run) -> None:
    """What docs/kernels.md would say of this run; what was promised; what failed."""
    print(f"\n{tables.gpu(run.rows)}\n\n{tables.methods([row for row in run.rows if row.kind == 'method'])}\n")
    for verdict in verdicts(run.rows, GPU):
        print(f"{verdict.word}: {verdict.target.text}, {verdict.limit}: {verdict.value}")
    run.show_failures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = RESULTS / "gpu.jsonl"
    parser.add_argument(
        "--append", nargs="?", type=Path, const=results, help=f"the file for rows, by default {results}"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="after these, kernels that are left are left out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: this torch sees no CUDA device")
    torch.manual_seed(0)
    run = Run(environment(), "cuda", results=arguments.append)
    gpu_compile.compile_all(list(itertools.product(TASKS, DTYPES)), run.device)
    run.allow(arguments.minutes)
    names = available(run)
    parts: dict[str, Callable[[], None]] = {
        "bandwidth": lambda: measure_bandwidths(run),
        "large J": lambda: measure_kernels(run, large_shapes(BYTES_OF_J[:1]), names),
        "small J": lambda: measure_kernels(run, small_shapes(), names),
        "steps": lambda: measure_steps(run),
        "methods": lambda: measure_methods(run),
        "blocks": lambda: measure_blocks(run, "triton" in names) if "cuda" in names else None,
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
