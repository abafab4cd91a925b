"""Peak memory of a training step beyond model and activations, on a CPU in a fresh process for every subject.

Definitions, all in bytes of resident memory of the whole process (so native allocations count):

- *base*: resident memory after the model, its batch, its optimizer (SGD without state) and a warm-up have
  been made. The warm-up runs the subject on a small model of the same kind and one plain forward and backward
  of the real one, so that code, thread stacks and the scratch of torch's matrix products are part of the
  base; its gradients are freed again.
- *model and activations*: (peak of forward + one plain backward of the first loss with ``retain_graph=True``
  - base) minus the bytes of the gradients which that backward leaves in ``.grad``. The graph is retained, as
  all but the last of T backward passes over it do. The forward is a task's own or that of all, as the subject has it.
- *peak of a subject*: (peak over ``STEPS`` steps - base) minus model and activations.
  Gradients are dropped before each step. The steps after the first catch buffers that live on next to new
  ones.

The result is reported as it is and as a multiple of T·N·itemsize, N being all parameters of the optimizer.
For ``pcgrad(J)`` alone the base includes J, and the multiple is of the same T·N·itemsize. On a GPU the memory is what
torch's allocator has given out there, and all subjects are measured in one process.

The peak is VmHWM of /proc/self/status, reset by writing 5 to /proc/self/clear_refs; where that is not
permitted, a thread samples /proc/self/statm. glibc keeps freed memory, and its threshold for giving it back
grows with use: the processes run with MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536, so that
what is freed is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases, kernels, models
from benchmarks.cases import MEMORY_BATCH, PARAMETER_BYTES, KernelCase, StepCase
from benchmarks.kernels import Contender
from benchmarks.modes import Mode, modes
from benchmarks.rows import ROOT, SKIPPED_LATE, Row, failed
from benchmarks.session import Run

STEPS = 2
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Two such processes may share the cores: threads that wait must not spin.
_ENVIRONMENT = MALLOC | {"OMP_WAIT_POLICY": "PASSIVE"}
NOTE = "fresh process, " + ", ".join(f"{name}={value}" for name, value in MALLOC.items()) + f", {STEPS} steps"
FITS = 0.8
"""Of the available memory: more is not asked for."""
SIDE_BY_SIDE = 200e6
"""Parameters up to which two processes run at a time."""
SLOW_PEERS = ("loop", "pytorch_optimizer")
"""They need most of a minute at T=8: last, so that a run that is late still has all others."""

Case = StepCase | KernelCase
Subject = Mode | Contender

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Peak:
    """Filled when the ``with`` block ends: bytes above the resident memory at its start."""

    bytes: int = 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def available_bytes() -> float:
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float("inf")


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def _reset_high_water() -> bool:
    """Whether the kernel let us: some containers do not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _high_water() - resident() < 64 * _PAGE
    except OSError:
        return False


@contextmanager
def _sampled(peak: Peak) -> Iterator[None]:
    base, done = resident(), threading.Event()

    def sample() -> None:
        while not done.is_set():
            peak.bytes = max(peak.bytes, resident() - base)
            time.sleep(0.0005)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield
    finally:
        done.set()
        sampler.join()


@contextmanager
def watch(device: str = "cpu") -> Iterator[Peak]:
    """The peak of memory within the block, above that at its start."""
    release()
    peak = Peak()
    if device == "cuda":
        base = torch.cuda.memory_stats()["active_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        yield peak
        torch.cuda.synchronize()  # what another stream still copies counts until that is done
        peak.bytes = torch.cuda.memory_stats()["active_bytes.all.peak"] - base
    elif _reset_high_water():
        base = resident()
        yield peak
        peak.bytes = max(0, _high_water() - base)
    else:
        with _sampled(peak):
            yield peak


def release() -> None:
    """Gives freed memory back to the system, as far as the C library lets us."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True)
class Measured:
    """Bytes above the base, the gradients of one plain backward, and N; or why there is no answer."""

    peak: int = 0
    gradients: int = 0
    width: int = 0
    error: str = ""


def peak_of(case: Case, subject: Subject, activations: bool = False, device: str = "cpu") -> Measured:
    """In this process. ``activations``: what all subjects with such graphs have in common."""
    if isinstance(subject, Contender):
        assert isinstance(case, KernelCase)
        return _kernel_peak(case, subject)
    assert isinstance(case, StepCase)
    for call in subject.phases(models.build_small(case, device)).values():
        call()

    problem = models.build(case, device)
    parameters = problem.parameters_list()
    problem.loss(0).backward()
    gradients = sum(_nbytes(p.grad) for p in parameters if p.grad is not None)
    models.clear_gradients(parameters)
    # What a subject allocates when it is made is part of its peak.
    with watch(device) as found:
        if activations:
            loss = problem.loss(0) if subject.own_graphs else problem().losses[0]
            loss.backward(retain_graph=True)
        else:
            phases = subject.phases(problem)
            for _ in range(STEPS):
                models.clear_gradients(parameters)
                for call in phases.values():
                    call()
    return Measured(found.bytes, gradients, sum(p.numel() for p in parameters))


def _nbytes(gradient: torch.Tensor) -> int:
    return gradient._indices().nbytes + gradient._values().nbytes if gradient.is_sparse else gradient.nbytes


def _kernel_peak(case: KernelCase, contender: Contender) -> Measured:
    """What ``pcgrad(J)`` needs beside J, its result included."""
    assert not isinstance(contender.build, str)
    contender.build(kernels.inputs(torch.randn(2, 1000)))()
    rows = torch.randn(case.tasks, case.width)
    with watch() as found:
        call = contender.build(kernels.Inputs(rows, rows[:0], rows[:0], rows[:0]))
        for _ in range(STEPS):
            call()
    return Measured(found.bytes, 0, case.width)


def in_fresh_process(case: Case, subject: Subject, threads: int, activations: bool = False) -> Measured:
    """The answer of this module, run by itself under ``MALLOC``."""
    arguments = [case.label, subject.name, "--threads", str(threads), *(["--activations"] if activations else [])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments],
        cwd=ROOT,
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Measured(error=f"failed: {lines[-1]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def subjects_of(case: Case) -> Sequence[Subject]:
    """Those whose peak is of interest."""
    if isinstance(case, KernelCase):
        return kernels.contenders(case)
    return [m for m in modes(case) if case.parameters <= min(m.up_to, m.measured_up_to)]


def measure(run: Run, of: Sequence[Case]) -> None:
    """Rows of all peaks in fresh processes, two at a time where they are small; the slow peers last."""
    for small in (True, False):
        jobs = [
            (case, subject) for case in of for subject in subjects_of(case) if (_size(case) < SIDE_BY_SIDE) == small
        ]
        jobs.sort(key=lambda job: job[1].name in SLOW_PEERS)

        def peak(case: Case, subject: Subject, activations: bool = False) -> Measured:
            if run.late:
                return Measured(error=SKIPPED_LATE)
            run.starts(f"peak of {case.label}: {'activations' if activations else subject.name}")
            return in_fresh_process(case, subject, run.environment.threads, activations)

        refused = [_refusal(*job) for job in jobs]
        # One of each model and kind of graph: the heads, of which there are as many as tasks, weigh nothing.
        graphs = {_graph(*job): job for job, why in zip(jobs, refused, strict=True) if not why and _graph(*job)}
        with ThreadPoolExecutor(2 if small else 1) as pool:
            common = {graph: pool.submit(peak, *job, activations=True) for graph, job in graphs.items()}
            peaks = [pool.submit(peak, *job) if not why else None for job, why in zip(jobs, refused, strict=True)]
            for job, why, found in zip(jobs, refused, peaks, strict=True):
                base = common[_graph(*job)].result() if _graph(*job) in common else Measured()
                run.add([row(run, *job, base, found.result() if found else Measured(error=why))])


def measure_here(run: Run, case: StepCase, of: Sequence[Mode]) -> None:
    """Rows of the peaks of modes, one after the other in this process."""

    def peak(mode: Mode, activations: bool) -> Measured:
        try:
            return peak_of(case, mode, activations, run.device)
        except Exception as error:
            return Measured(error=failed(error))

    common: dict[bool, Measured] = {}
    for mode in of:
        if mode.own_graphs not in common:
            common[mode.own_graphs] = peak(mode, True)
        run.add([row(run, case, mode, common[mode.own_graphs], peak(mode, False), f"{STEPS} steps")])


def _size(case: Case) -> float:
    return 0 if isinstance(case, KernelCase) else case.parameters


def _graph(case: Case, subject: Subject) -> tuple[object, bool] | None:
    return (case.model, subject.own_graphs) if isinstance(case, StepCase) and isinstance(subject, Mode) else None


def _refusal(case: Case, subject: Subject) -> str:
    """Why a subject is not run; empty where it is."""
    if isinstance(subject.build, str):
        return subject.build
    beyond = subject.beyond(case.tasks) if isinstance(subject, Mode) else 0.0
    needed, there = (PARAMETER_BYTES + beyond) * _size(case), available_bytes()
    if needed > FITS * there:
        return f"skipped: memory ({needed / 2**30:.0f} GiB predicted, {there / 2**30:.0f} GiB available)"
    return ""


def row(run: Run, case: Case, subject: Subject, common: Measured, found: Measured, note: str = NOTE) -> Row:
    """What ``found`` has beyond model and activations, which ``common`` is; or an error of either.

    ``note``: how they are measured.
    """
    large = case.op == "large"
    template = run.row(
        "memory", case.label if large else f"memory {case.label}", case.op, subject.name, T=case.tasks,
        subject_version=subject.version, note=f"{note}, batch {MEMORY_BATCH}" if large else note,
        backend=subject.backend(run.device) if isinstance(subject, Mode) else subject.backend,
        status=found.error or common.error or "ok",
    )  # fmt: skip
    if not template.ok:
        return template
    beyond = found.peak - (common.peak - common.gradients)
    ratio = beyond / (case.tasks * found.width * PARAMETER_BYTES)
    return dataclasses.replace(template, N=found.width, peak_bytes=beyond, peak_ratio=ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one subject in this process; answers one JSON line.")
    parser.add_argument("case")
    parser.add_argument("subject")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--activations", action="store_true", help="what subjects with such graphs have in common")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    of = (cases.memory_cases, cases.large_memory_cases, cases.factored_memory_cases, cases.floor_memory_cases)
    every: list[Case] = [case for quick in (True, False) for find in of for case in find(quick)]
    case = next(case for case in every if case.label == options.case)
    subject = next(subject for subject in subjects_of(case) if subject.name == options.subject)
    print(json.dumps(dataclasses.asdict(peak_of(case, subject, options.activations))))


if __name__ == "__main__":
    main()
