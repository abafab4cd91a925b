"""``python -m benchmarks.gpu [--append] [--minutes 5]``: the kernels on a GPU, against the bytes they have to move.

Measured first: how fast this GPU copies and reads. Then gram, combine, mix_ and the whole surgery with both backends,
torch's products, TorchJD's PCGrad (or its algorithm, and the row says so) and the loop; then the same surgery on task
gradients that lie in blocks, one a parameter, against packed rows; then a training step of a transformer of 110 M
parameters with T=4 against its T plain backward passes, with peak memory.

Times are CUDA events around single calls, the median of many; ``pcgrad[graph]`` is a captured surgery, many replays
between two events. Needs torch, numpy and triton alone. Rows go to benchmarks/results/gpu.jsonl with ``--append``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastpcgrad
from benchmarks import models, rows
from benchmarks.peers import loop, torchjd_algorithm
from benchmarks.rows import Row
from fastpcgrad import backends, variants
from fastpcgrad._ops import Blocks
from fastpcgrad.backends import cuda
from fastpcgrad.backends.stacked import Stacked

RESULTS = rows.ROOT / "benchmarks" / "results" / "gpu.jsonl"
TASKS = (8, 4, 2, 16, 32, 64)
WIDTHS = (10_000, 100_000, 1_000_000)
BYTES_OF_J = (256 << 20, 1 << 30, 4 << 30)
DTYPES = (torch.float32, torch.bfloat16)
LARGE = 1 << 30
TASKS_IN_BLOCKS = (4, 2, 8, 16)
BACKENDS = ("cuda", "triton")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    p20: float
    p50: float
    p80: float
    rounds: int


def timed(call: Callable[[], object], seconds: float = 0.08, calls_of_one: int = 1) -> Timing:
    """Of one of the ``calls_of_one`` that ``call`` makes."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    rounds = max(7, min(100, int(seconds / max(time.perf_counter() - start, 1e-6))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    times = sorted(before.elapsed_time(after) / calls_of_one for before, after in events)
    quantiles = statistics.quantiles(times, n=5)
    return Timing(quantiles[0], statistics.median(times), quantiles[-1], rounds)


def environment() -> rows.Environment:
    triton = rows.version_of("triton") or "none"
    device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, triton {triton}"
    return dataclasses.replace(rows.environment(torch.get_num_threads()), device=device)


class Run:
    """One run: its rows, the bandwidths that they are compared with, and when it has to end."""

    def __init__(self, minutes: float) -> None:
        self.environment = environment()
        self.deadline = time.monotonic() + 60 * minutes
        self.rows: list[Row] = []
        self.copy_gbps = self.read_gbps = 0.0

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        return row

    def bandwidths(self) -> None:
        source = torch.randn(1 << 30, device="cuda")
        target = torch.empty_like(source)
        copy = timed(lambda: target.copy_(source), 0.5)
        reads = [timed(partial(reduce, source), 0.5) for reduce in (torch.sum, torch.amax)]
        read = min(reads, key=lambda timing: timing.p50)
        self.copy_gbps, self.read_gbps = 2 * source.nbytes / copy.p50 / 1e6, source.nbytes / read.p50 / 1e6
        for op, gbps, timing in (("copy", self.copy_gbps, copy), ("read", self.read_gbps, read)):
            note = "4 GiB fp32; bytes moved per second"
            self.add(Row("bandwidth", f"{op} bandwidth", op, "machine", self.environment, gbps=gbps, note=note))
            print(f"{op}: {gbps:.0f} GB/s (p20 {timing.p20:.3f} ms, p80 {timing.p80:.3f} ms)", flush=True)

    def kernel(self, op: str, subject: str, backend: str, grads: Tensor, timing: Timing, note: str = "") -> Row:
        tasks, width = grads.shape
        size, result = grads.nbytes, width * grads.element_size()
        once = {"gram": size, "combine": size + result, "mix_": 2 * size}
        moved = once.get(op.removesuffix("_blocks"), 2 * size + result)
        gbps = moved / timing.p50 / 1e6
        dtype = str(grads.dtype).removeprefix("torch.")
        return self.add(
            Row(
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
                rounds=timing.rounds,
                p20_ms=timing.p20,
                p50_ms=timing.p50,
                p80_ms=timing.p80,
                gbps=gbps,
                bandwidth_fraction=gbps / self.copy_gbps if size >= LARGE else None,
                note=note,
            )
        )


def force(backend: str) -> None:
    os.environ["FASTPCGRAD_BACKEND"] = backend


def replays_of(call: Callable[[], object], count: int) -> Callable[[], None]:
    """Captures the call in a CUDA graph; what is returned replays it ``count`` times."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replays() -> None:
        for _ in range(count):
            graph.replay()

    return replays


def torchjd_kernel(grads: Tensor) -> tuple[Callable[[], Tensor], str]:
    try:
        from benchmarks.peers import torchjd_peer
    except ImportError:
        return torchjd_algorithm.kernel(
            grads
        ), "TorchJD's algorithm written anew (benchmarks/peers/torchjd_algorithm.py)"
    return torchjd_peer.kernel(grads), ""


def library_calls(grads: Tensor) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(op, a call, how many of the op it makes), for the backend that is forced."""
    tasks, width = grads.shape
    weights = torch.rand(tasks, dtype=torch.float64).to("cuda")
    # A rotation: applied again and again, the rows keep their size.
    coefficients = torch.linalg.qr(torch.randn(tasks, tasks, dtype=torch.float64)).Q.contiguous().to("cuda")
    out = grads.new_empty(width)
    order = variants.get("paper").draw_orders(tasks, None, None).to("cuda")
    yield "gram", lambda: fastpcgrad.gram(grads), 1
    yield "combine", lambda: fastpcgrad.combine(grads, weights, out=out), 1
    yield "mix_", lambda: fastpcgrad.mix_(grads, coefficients), 1
    yield "pcgrad", lambda: fastpcgrad.pcgrad(grads, order=order), 1
    if grads.nbytes < 256 << 20:
        yield "pcgrad[graph]", replays_of(lambda: fastpcgrad.pcgrad(grads, order=order), 20), 20


def torch_calls(grads: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    weights, coefficients = torch.rand(1, len(grads)).to(grads), torch.eye(len(grads)).to(grads)
    yield "gram", lambda: grads @ grads.T
    yield "combine", lambda: weights @ grads
    yield "mix_", lambda: grads.copy_(coefficients @ grads)


def measure_kernels(run: Run) -> None:
    shapes = [
        (tasks, width, dtype)
        for tasks in TASKS
        for dtype in DTYPES
        for width in (*WIDTHS, *(size // (tasks * dtype.itemsize) // 64 * 64 for size in BYTES_OF_J))
    ]
    for tasks, width, dtype in shapes:
        if run.late:
            print("the time for kernels was up", flush=True)
            return
        grads = torch.randn(tasks, width, device="cuda").to(dtype)
        for backend in BACKENDS:
            if (reason := backends.why_unavailable(backend, "cuda")) is not None:
                run.add(Row("kernel", backend, "pcgrad", "fastpcgrad", run.environment, status=f"missing: {reason}"))
                continue
            force(backend)
            for op, call, count in library_calls(grads):
                run.kernel(op, "fastpcgrad", backend, grads, timed(call, calls_of_one=count))
        for op, call in torch_calls(grads):
            run.kernel(op, "torch", "torch", grads, timed(call))
        measure_peers(run, grads)


def measure_peers(run: Run, grads: Tensor) -> None:
    """TorchJD and the loop on the J that was measured last, with ratios to the library's faster backend."""
    call, note = torchjd_kernel(grads)
    peers = [("torchjd", call, note)]
    if grads.shape[0] <= 8 or grads.shape[1] <= WIDTHS[-1]:
        peers.append(("loop", loop.kernel(grads), ""))
    for name, call, note in peers:
        peer = run.kernel("pcgrad", name, "torch", grads, timed(call), note)
        ours = [row.p50_ms for row in run.rows if row.case == peer.case and row.subject == "fastpcgrad" and row.p50_ms]
        if ours and peer.p50_ms:
            run.rows[-1] = dataclasses.replace(peer, ratios={"fastpcgrad": peer.p50_ms / min(ours)})


def block_lists() -> dict[str, list[int]]:
    """The widths of parameters: of a transformer of 110 M, and of many tiny ones."""
    with torch.device("meta"):
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
        grads = torch.randn(tasks, sum(widths), device="cuda").to(dtype)
        tensors = [[part.clone() for part in row.split(widths)] for row in grads]
        pointers = [[part.data_ptr() for part in row] for row in tensors]
        order = variants.get("paper").draw_orders(tasks, None, None).to("cuda")
        return Scattered(grads, Blocks(tensors, pointers, array("q", widths), dtype, grads.device), order)

    def packed_call(self) -> Callable[[], object]:
        merged = self.grads.new_empty(self.grads.shape[1])
        return lambda: cuda.pcgrad(self.grads, self.order, False, 0.0, 0.0, 1.0, None, merged)

    def calls(self, functions: Any) -> Iterator[tuple[str, Callable[[], object]]]:
        """(op, a call) of each of the three block functions of a backend."""
        blocks, out = self.blocks, [self.grads.new_empty(width) for width in self.blocks.widths]
        weights = torch.rand(1, len(self.grads), dtype=torch.float64).to("cuda")
        yield "gram_blocks", lambda: functions.gram_blocks(blocks, None, 1)
        yield "combine_blocks", lambda: functions.combine_blocks(blocks, weights, None, out)
        yield "pcgrad_blocks", lambda: functions.pcgrad_blocks(blocks, self.order, False, 0.0, 0.0, 1.0, out)


def measure_blocks(run: Run) -> None:
    """Blocks against packed rows of the same size by the CUDA library, and against packing them before each pass."""
    if backends.why_unavailable("cuda", "cuda") is not None:
        return
    packing = Stacked(cuda.gram, cuda.pcgrad_coefficients, cuda.combine)
    lists = block_lists().items()
    for name, widths, tasks, dtype in ((n, w, t, d) for n, w in lists for t in TASKS_IN_BLOCKS for d in DTYPES):
        given = Scattered.of(widths, tasks, dtype)
        packed = timed(given.packed_call())
        run.kernel("pcgrad", "fastpcgrad", "cuda", given.grads, packed, f"{name}, packed")
        for backend, functions in (("cuda", cuda), ("cuda, packing", packing)):
            for op, call in given.calls(functions):
                row = run.kernel(op, "fastpcgrad", backend, given.grads, timed(call), name)
                if op == "pcgrad_blocks" and row.p50_ms:
                    run.rows[-1] = dataclasses.replace(row, ratios={"packed": row.p50_ms / packed.p50})
                if op == "pcgrad_blocks" and functions is cuda and given.grads.nbytes < 256 << 20:
                    replayed = timed(replays_of(call, 20), calls_of_one=20)
                    run.kernel("pcgrad_blocks[graph]", "fastpcgrad", backend, given.grads, replayed, name)


def measure_step(run: Run, tasks: int = 4) -> None:
    """Forward apart: T plain backward passes against the same with surgery; peak memory beyond the model."""
    force("cuda" if backends.why_unavailable("cuda", "cuda") is None else "triton")

    def problem() -> models.Classifier:
        torch.manual_seed(0)
        trunk = models.MeanPooledEncoder(32_000, 768, 12)
        return models.Classifier(trunk, torch.randint(0, 32_000, (8, 128)), 768, tasks).cuda()

    def plain(model: models.Classifier) -> Callable[[list[Tensor]], None]:
        def merge(losses: list[Tensor]) -> None:
            for t, loss in enumerate(losses):
                models.clear_gradients(model.parameters_list())
                loss.backward(retain_graph=t < len(losses) - 1)

        return merge

    def ours(model: models.Classifier) -> Callable[[list[Tensor]], None]:
        return fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.0)).pc_backward

    found: dict[str, tuple[float, int, int]] = {}
    for name, build in (("plain", plain), ("fastpcgrad", ours)):
        torch.cuda.empty_cache()
        model = problem()
        merge, times = build(model), []
        size = sum(p.numel() for p in model.parameters())
        for step in range(13):
            model.zero_grad(set_to_none=True)
            losses = model().losses
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if step == 3:
                torch.cuda.reset_peak_memory_stats()
            before.record()
            merge(losses)
            after.record()
            torch.cuda.synchronize()
            if step >= 3:
                times.append(before.elapsed_time(after))
        found[name] = statistics.median(times), torch.cuda.max_memory_allocated(), size
        del model, merge, losses
    for name, (milliseconds, peak, size) in found.items():
        run.add(
            Row(
                "step",
                f"transformer T={tasks}",
                "step",
                name,
                run.environment,
                T=tasks,
                N=size,
                dtype="float32",
                p50_ms=milliseconds,
                ratios={"plain": milliseconds / found["plain"][0]},
                peak_bytes=peak - found["plain"][1],
                peak_ratio=(peak - found["plain"][1]) / (tasks * size * 4),
                note="T backward passes and surgery, without the forward; peak_bytes: beyond the plain passes' peak",
            )
        )


def summary(run: Run) -> None:
    """A short table: what is large against the copy bandwidth, what is small in microseconds, the peers."""
    print(f"\n{run.environment.device}: copy {run.copy_gbps:.0f} GB/s, read {run.read_gbps:.0f} GB/s")
    print(f"{'op':<21}{'backend':<14}{'T':>3}{'N':>12} {'dtype':<9}{'median':>12}{'of copy':>9}")
    for row in run.rows:
        if row.kind != "kernel" or row.subject != "fastpcgrad" or row.p50_ms is None or "packed" in row.ratios:
            continue
        if row.bandwidth_fraction is None and not (row.op.endswith("[graph]") and row.T == 8):
            continue
        share = f"{row.bandwidth_fraction:.0%}" if row.bandwidth_fraction else ""
        what = f"{row.op:<21}{row.backend:<14}{row.T:>3}{row.N:>12} {row.dtype:<9}"
        print(f"{what}{1000 * row.p50_ms:>9.1f} us{share:>9}")
    for row in run.rows:
        if row.subject in ("torchjd", "loop") and row.T == 8 and "fastpcgrad" in row.ratios:
            print(f"{row.subject} T=8 N={row.N} {row.dtype}: {row.ratios['fastpcgrad']:.1f} times as long")
        if "packed" in row.ratios:
            what = f"{row.note}, T={row.T} {row.dtype}, in blocks, {row.backend}"
            print(f"{what}: {1000 * (row.p50_ms or 0):.1f} us, {row.ratios['packed']:.2f} of packed rows")
        if row.kind == "step" and row.subject != "plain":
            print(f"{row.case}: {row.ratios['plain']:.3f} of plain, {(row.peak_bytes or 0) / 2**20:.0f} MiB more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", action="store_true", help=f"append the rows to {RESULTS}")
    parser.add_argument("--minutes", type=float, default=4.0, help="for the kernels; the training step comes after")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    run = Run(arguments.minutes)
    run.bandwidths()
    measure_kernels(run)
    measure_blocks(run)
    measure_step(run)
    if arguments.append:
        rows.append(run.rows, RESULTS)
    summary(run)


if __name__ == "__main__":
    main()
