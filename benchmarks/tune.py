"""``python -m benchmarks.tune [--write]``: the values of csrc/cuda/tuned.h, found on the GPU at hand.

Shapes: the CUDA library is built anew for each candidate (for this GPU alone, into a temporary folder) and gram,
combine and the surgery in several launches are timed on 1 GiB of rows; the smallest sum of times wins. Crossover: the
largest J up to which the one cooperative launch is faster than several, by the sum of times over a few T and row types.
Prints the lines; ``--write`` puts them into the file, the crossover in the line of this GPU's architecture.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import timed
from benchmarks.rows import ROOT
from fastpcgrad import variants
from fastpcgrad.backends import cuda

TUNED = ROOT / "csrc" / "cuda" / "tuned.h"
BYTES = 1 << 30
VECTORS = ({2: 1, 4: 1}, {2: 2, 4: 2}, {2: 4, 4: 2})
"""Rows held -> vectors of each in flight. More than 32 products a lane and step would break the numerics."""
SLOTS = ((256, 1024), (512, 1024), (512, 2048), (512, 4096), (1024, 4096))
SIZES = [1 << power for power in range(20, 32)]
CROSSOVER_ROWS = ((2, torch.float32), (8, torch.float32), (8, torch.bfloat16), (16, torch.float32))


Values = dict[str, int]


def build_all(folder: Path, candidates: list[Values]) -> list[ctypes.CDLL]:
    """The library with each candidate's values, for this GPU's architecture."""
    major, minor = torch.cuda.get_device_capability()
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-Xcompiler=-fPIC", "-Icsrc"]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, number) for source in sources for number in range(len(candidates))]

    def compile_one(job: tuple[Path, int]) -> None:
        source, number = job
        flags = [f"-D{name}={value}" for name, value in candidates[number].items()]
        target = folder / f"{number}_{source.stem}.o"
        subprocess.run([*command, *flags, "-c", str(source), "-o", str(target)], cwd=ROOT, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    libraries = []
    for number in range(len(candidates)):
        objects, library = map(str, sorted(folder.glob(f"{number}_*.o"))), folder / f"{number}.so"
        subprocess.run(["nvcc", "-shared", "-cudart=static", *objects, "-o", str(library)], check=True)
        libraries.append(cuda.declare(ctypes.CDLL(str(library))))
    return libraries


def calls(tasks: int, dtype: torch.dtype, size: int) -> list[Callable[[], object]]:
    grads = torch.randn(tasks, size // (tasks * dtype.itemsize) // 64 * 64, device="cuda").to(dtype)
    out, weights = grads.new_empty(grads.shape[1]), torch.rand(tasks, dtype=torch.float64).to("cuda")
    return [
        lambda: cuda.gram(grads, None),
        lambda: cuda.combine(grads, weights, None, out),
        surgery(grads, out),
    ]


def surgery(grads: Tensor, out: Tensor) -> Callable[[], object]:
    order = variants.get("paper").draw_orders(grads.shape[0], None, None).to("cuda")
    return lambda: cuda.pcgrad(grads, order, False, 0.0, 0.0, 1.0, None, out)


def milliseconds(tasks: list[int]) -> float:
    cuda.launches = cuda.SEVERAL_LAUNCHES
    dtypes = (torch.float32, torch.bfloat16)
    return sum(timed(call).p50 for t in tasks for dtype in dtypes for call in calls(t, dtype, BYTES))


def fastest(candidates: list[Values], libraries: list[ctypes.CDLL], tasks: list[int]) -> Values:
    times = []
    for values, library in zip(candidates, libraries, strict=True):
        cuda._library = library
        times.append(milliseconds(tasks))
        print(f"  T={tasks}, {values}: {times[-1]:.3f} ms", flush=True)
    return candidates[times.index(min(times))]


def best_shapes() -> Values:
    vectors: list[Values] = [{f"FPG_VECTORS_OF_{held}": n for held, n in each.items()} for each in VECTORS]
    slots: list[Values] = [{"FPG_FEW_SLOTS": few, "FPG_MANY_SLOTS": many} for few, many in SLOTS]
    with tempfile.TemporaryDirectory() as folder:
        libraries = build_all(Path(folder), vectors + slots)
        best = fastest(slots, libraries[len(vectors) :], [2, 8, 16, 32])
        for held in VECTORS[0]:
            name = f"FPG_VECTORS_OF_{held}"
            best[name] = fastest(vectors, libraries[: len(vectors)], [held])[name]
    return best


def crossover() -> int:
    """Bytes of the largest J up to which one launch was faster at each size."""
    largest = 0
    for size in SIZES:
        calls_of_size = []
        for tasks, dtype in CROSSOVER_ROWS:
            grads = torch.randn(tasks, size // (tasks * dtype.itemsize), device="cuda").to(dtype)
            calls_of_size.append(surgery(grads, grads.new_empty(grads.shape[1])))
        times = []
        for launches in (cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES):
            cuda.launches = launches
            times.append(sum(timed(call).p50 for call in calls_of_size))
        print(f"  {size >> 20} MiB: one launch {times[0]:.4f} ms, several {times[1]:.4f} ms", flush=True)
        if times[0] > times[1]:
            break
        largest = size
    return largest


def written(text: str, values: Values, architecture: int, one_launch_bytes: int) -> str:
    """tuned.h with other values; ValueError where it lacks one of them. A new architecture gets a line of its own."""
    for name, value in values.items():
        text, found = re.subn(rf"(#define {name}) \d+", rf"\1 {value}", text)
        if not found:
            raise ValueError(f"{TUNED} defines no {name}")
    start, table, rest = re.split(r"(?<=kCrossovers\[\] = \{\n)((?:    \{.*\},\n)+)", text)
    lines = {int(line.split(",")[0].strip(" {")): line for line in table.splitlines()}
    lines[architecture] = f"    {{{architecture}, int64_t{{{one_launch_bytes >> 20}}} << 20}},"
    return start + "".join(lines[key] + "\n" for key in sorted(lines, reverse=True)) + rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put what was found into {TUNED}")
    arguments = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    built = cuda._library
    values = best_shapes()
    cuda._library = built
    text = written(TUNED.read_text(encoding="utf-8"), values, 10 * major + minor, crossover())
    if arguments.write:
        TUNED.write_text(text, encoding="utf-8")
    else:
        print(f"\n{TUNED.name}:\n{text}")


if __name__ == "__main__":
    main()
