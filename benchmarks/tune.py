"""``python -m benchmarks.tune [--write [FILE]]``: the values of csrc/cuda/tuned.h, found on the GPU at hand.

Shapes: each candidate has a library, for this GPU alone, compiled here or before (``gpu_build``); gram, combine and the
surgery in several launches are timed on 1 GiB of rows, and the surgery in one launch on a million columns; the
smallest sum of times wins. Crossovers: both forms of the surgery are timed by graph replay over sizes of J, and the
size that loses least of the faster form's time, over all sizes, is taken; once for rows that a thread holds, once for
more. Prints the lines; ``--write`` puts them into the file or another, the crossovers in the line of this GPU's
architecture.
"""

from __future__ import annotations

import argparse
import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import gpu_build
from benchmarks.gpu_build import CANDIDATES, SLOT_CANDIDATES, VECTOR_CANDIDATES, VECTORS, Values
from benchmarks.rows import ROOT
from benchmarks.timing import Call, alone, replays_of
from fastpcgrad import variants
from fastpcgrad.backends import cuda
from fastpcgrad.variants import Guards

TUNED = ROOT / "csrc" / "cuda" / "tuned.h"
BYTES = 1 << 30
SIZES = [1 << power for power in range(20, 31)]
HELD_ROWS = ((2, torch.float32), (4, torch.bfloat16), (8, torch.float32), (8, torch.bfloat16))
MORE_ROWS = ((16, torch.float32), (16, torch.bfloat16), (32, torch.float32))
REPLAYS = 10
SMALL_WIDTH, SMALL_WEIGHT = 10**6, 10
"""A small surgery counts as often as that beside the large ones."""


def libraries() -> list[ctypes.CDLL]:
    """The library with each candidate's values, for this GPU's architecture, compiled unless it was before."""
    architecture, numbers = gpu_build.architecture_here(), range(len(CANDIDATES))
    folder = gpu_build.folder_for(architecture)
    gpu_build.compile_all(folder, architecture, numbers)
    return [cuda.declare(ctypes.CDLL(str(gpu_build.path_of(folder, number)))) for number in numbers]


def calls(tasks: int, dtype: torch.dtype, size: int) -> list[Call]:
    grads = torch.randn(tasks, size // (tasks * dtype.itemsize) // 64 * 64, device="cuda").to(dtype)
    out, weights = grads.new_empty(grads.shape[1]), torch.rand(tasks, dtype=torch.float64).to("cuda")
    return [
        lambda: cuda.gram(grads, None),
        lambda: cuda.combine(grads, weights, None, out),
        surgery(grads, out),
    ]


def surgery(grads: Tensor, out: Tensor) -> Call:
    order = variants.get("paper").draw_orders(grads.shape[0], None, None).to("cuda")
    return lambda: cuda.pcgrad(grads, order, Guards(), 1.0, None, out)


def replayed(call: Call) -> float:
    """Milliseconds of a call in a graph."""
    return alone(replays_of(call, REPLAYS), "cuda", calls_of_one=REPLAYS).median


def milliseconds(tasks: list[int]) -> float:
    total = 0.0
    for t in tasks:
        for dtype in (torch.float32, torch.bfloat16):
            cuda.launches = cuda.SEVERAL_LAUNCHES
            total += sum(alone(call, "cuda").median for call in calls(t, dtype, BYTES))
            cuda.launches = cuda.ONE_LAUNCH
            grads = torch.randn(t, SMALL_WIDTH, device="cuda").to(dtype)
            total += SMALL_WEIGHT * replayed(surgery(grads, grads.new_empty(SMALL_WIDTH)))
    return total


def fastest(candidates: Sequence[Values], libraries: Sequence[ctypes.CDLL], tasks: list[int]) -> Values:
    times = []
    for values, library in zip(candidates, libraries, strict=True):
        cuda._library = library
        times.append(milliseconds(tasks))
        print(f"  T={tasks}, {values}: {times[-1]:.3f} ms", flush=True)
    return candidates[times.index(min(times))]


def best_shapes() -> Values:
    found = libraries()
    best = fastest(SLOT_CANDIDATES, found[len(VECTOR_CANDIDATES) :], [2, 8, 16, 32])
    for held in VECTORS[0]:
        name = f"FPG_VECTORS_OF_{held}"
        best = best | {name: fastest(VECTOR_CANDIDATES, found[: len(VECTOR_CANDIDATES)], [held])[name]}
    return best


def crossover(chosen: Sequence[tuple[int, torch.dtype]]) -> int:
    """Bytes of J up to which one launch should be used: what loses least where the other form is faster."""
    times = []
    for size in SIZES:
        both = [0.0, 0.0]
        for tasks, dtype in chosen:
            grads = torch.randn(tasks, size // (tasks * dtype.itemsize) // 64 * 64, device="cuda").to(dtype)
            call = surgery(grads, grads.new_empty(grads.shape[1]))
            for k, launches in enumerate((cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES)):
                cuda.launches = launches
                both[k] += replayed(call)
        print(f"  {size >> 20} MiB: one launch {both[0]:.4f} ms, several {both[1]:.4f} ms", flush=True)
        times.append((both[0], both[1]))
    return best_crossover(SIZES, times)


def best_crossover(sizes: Sequence[int], times: Sequence[tuple[float, float]]) -> int:
    """The size, or 0, up to which to take the first of two times so that the least is lost, relative to the smaller."""
    losses = {
        limit: sum(
            (one if size <= limit else other) / min(one, other) for size, (one, other) in zip(sizes, times, strict=True)
        )
        for limit in (0, *sizes)
    }
    return min(losses, key=lambda limit: losses[limit])


def written(text: str, values: Values, architecture: int, crossovers: tuple[int, int]) -> str:
    """tuned.h with other values; ValueError where it lacks one of them. A new architecture gets a line of its own."""
    for name, value in values.items():
        text, found = re.subn(rf"(#define {name}) \d+", rf"\1 {value}", text)
        if not found:
            raise ValueError(f"{TUNED} defines no {name}")
    start, table, rest = re.split(r"(?<=kCrossovers\[\] = \{\n)((?:    \{.*\},\n)+)", text)
    lines = {int(line.split(",")[0].strip(" {")): line for line in table.splitlines()}
    held, more = (f"int64_t{{{size >> 20}}} << 20" for size in crossovers)
    lines[architecture] = f"    {{{architecture}, {held}, {more}}},"
    return start + "".join(lines[key] + "\n" for key in sorted(lines, reverse=True)) + rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="?", type=Path, const=TUNED, help=f"the file to write, by default {TUNED}")
    arguments = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    built = cuda._library
    values = best_shapes()
    cuda._library = built
    found = crossover(HELD_ROWS), crossover(MORE_ROWS)
    text = written(TUNED.read_text(encoding="utf-8"), values, 10 * major + minor, found)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    else:
        print(f"\n{TUNED.name}:\n{text}")


if __name__ == "__main__":
    main()
