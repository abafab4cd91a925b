"""Peak memory of a training step beyond model and activations, in a fresh process for every subject.

Definitions, all in bytes of resident memory of the whole process (so native allocations count):

- *base*: resident memory after the model, its batch, its optimizer (SGD without state) and a warm-up have
  been made. The warm-up runs the subject on a small model of the same kind and one plain forward and backward
  of the real one, so that code, thread stacks and the scratch of torch's matrix products are part of the
  base; its gradients are freed again.
- *model and activations*: (peak of forward + one plain backward of the first loss with ``retain_graph=True``
  - base) minus the bytes of the gradients which that backward leaves in ``.grad``. The graph is retained, as
  all but the last of T backward passes over it do.
- *peak of a subject*: (peak of forward + merge over ``STEPS`` steps - base) minus model and activations.
  Gradients are dropped before each step. The steps after the first catch buffers that live on next to new
  ones.

The result is reported as it is and as a multiple of T·N·itemsize, N being all parameters of the optimizer.
For ``pcgrad(J)`` alone the base includes J, and the multiple is of the same T·N·itemsize.

The peak is VmHWM of /proc/self/status, reset by writing 5 to /proc/self/clear_refs; where that is not
permitted, a thread samples /proc/self/statm. glibc keeps freed memory, and its threshold for giving it back
grows with use: the processes run with MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536, so that
what is freed is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import KernelCase, MemoryCase, StepCase, memory_cases

ACTIVATIONS = "activations"  # not a competitor: measures what all of them have in common
STEPS = 2
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Two such processes may share the cores: threads that wait must not spin.
_ENVIRONMENT = MALLOC | {"OMP_WAIT_POLICY": "PASSIVE"}
NOTE = "fresh process, " + ", ".join(f"{name}={value}" for name, value in MALLOC.items()) + f", {STEPS} steps"

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
def watch() -> Iterator[Peak]:
    """The peak of resident memory within the block, above that at its start."""
    release()
    peak = Peak()
    if not _reset_high_water():
        with _sampled(peak):
            yield peak
        return
    base = resident()
    yield peak
    peak.bytes = max(0, _high_water() - base)


def release() -> None:
    """Gives freed memory back to the system, as far as the C library lets us."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def step_peak(case: StepCase, subject: str) -> dict[str, int]:
    """In this process: bytes above the base, the gradients of one plain backward, and N."""
    from benchmarks import models, subjects

    name = subjects.PLAIN.name if subject == ACTIVATIONS else subject
    contender = next(c for c in subjects.step_contenders() if c.name == name and not isinstance(c, subjects.Missing))
    small = models.build_small(case)
    contender.build(small, subjects.new_optimizer(small)).merge(small())

    problem = models.build(case)
    parameters = problem.parameters_list()
    problem().losses[0].backward()
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    models.clear_gradients(parameters)
    optimizer = subjects.new_optimizer(problem)
    # What a competitor allocates when it is made is part of its peak.
    with watch() as peak:
        if subject == ACTIVATIONS:
            problem().losses[0].backward(retain_graph=True)
        else:
            calls = contender.build(problem, optimizer)
            for _ in range(STEPS):
                models.clear_gradients(parameters)
                calls.merge(problem())
    return {"peak": peak.bytes, "gradients": gradients, "width": sum(p.numel() for p in parameters)}


def kernel_peak(case: KernelCase, subject: str) -> dict[str, int]:
    """In this process: bytes that ``pcgrad(J)`` needs beside J, its result included."""
    import torch

    from benchmarks import subjects

    contender = next(
        c for c in subjects.kernel_contenders(case) if c.name == subject and not isinstance(c, subjects.Missing)
    )
    contender.build(subjects.kernel_inputs(torch.randn(2, 1000)))()
    rows = torch.randn(case.tasks, case.width)
    with watch() as peak:
        call = contender.build(subjects.KernelInputs(rows, rows[:0], rows[:0], rows[:0], lambda: rows))
        for _ in range(STEPS):
            call()
    return {"peak": peak.bytes, "gradients": 0, "width": case.width}


@dataclass(frozen=True)
class Measured:
    """What a subprocess answered, or why it has no answer."""

    peak: int = 0
    gradients: int = 0
    width: int = 0
    error: str = ""


def in_fresh_process(case: MemoryCase, subject: str, threads: int) -> Measured:
    return fresh_process("benchmarks.memory", case.label, subject, "--threads", str(threads))


def fresh_process(module: str, *arguments: str) -> Measured:
    """What a module answers as its last line, run by itself under ``MALLOC``."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Measured(error=f"failed: {lines[-1]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one subject in this process; answers one JSON line.")
    parser.add_argument("case")
    parser.add_argument("subject")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    case = next(c for c in memory_cases(quick=False) if c.label == arguments.case)
    if case.step is not None:
        print(json.dumps(step_peak(case.step, arguments.subject)))
    elif case.kernel is not None:
        print(json.dumps(kernel_peak(case.kernel, arguments.subject)))


if __name__ == "__main__":
    main()
