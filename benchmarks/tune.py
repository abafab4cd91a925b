"""``python -m benchmarks.tune``: the lines of csrc/cuda/tuned.h, found on the GPU at hand.

Shapes: the CUDA library is built anew for each candidate (for this GPU alone, into a temporary folder) and gram,
combine and the surgery in several launches are timed on 1 GiB of rows; the smallest sum of times wins. Crossover: the
largest J for which the one cooperative launch is faster than several. Prints the lines; edits nothing.
"""

from __future__ import annotations

import ctypes
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

BYTES = 1 << 30
SHAPES = {2: (1, 2, 4), 4: (1, 2), 8: (1,)}
"""Rows held -> vectors of each in flight. More than 32 products a lane and step would break the numerics."""
SLOTS = ((256, 1024), (512, 1024), (512, 2048), (512, 4096), (1024, 4096))
SIZES = [1 << power for power in range(20, 33)]


def build(folder: Path, flags: list[str]) -> ctypes.CDLL:
    """The library with other values, for this GPU's architecture."""
    major, minor = torch.cuda.get_device_capability()
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-Xcompiler=-fPIC", "-Icsrc", *flags]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([*command, "-c", str(source), "-o", str(target)], cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(map(str, pool.map(compile_one, sources)))
    library = folder / "library.so"
    subprocess.run(["nvcc", "-shared", "-cudart=static", *objects, "-o", str(library)], check=True)
    return cuda.declare(ctypes.CDLL(str(library)))


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


def try_flags(flags: list[str], tasks: list[int]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        cuda._library = build(Path(folder), flags)
        found = milliseconds(tasks)
    print(f"  {' '.join(flags)}: {found:.3f} ms", flush=True)
    return found


def best_vectors(held: int) -> str:
    candidates = [[f"-DFPG_VECTORS_OF_{held}={count}"] for count in SHAPES[held]]
    return min(candidates, key=lambda flags: try_flags(flags, [held]))[0]


def best_slots() -> list[str]:
    candidates = [[f"-DFPG_FEW_SLOTS={few}", f"-DFPG_MANY_SLOTS={many}"] for few, many in SLOTS]
    return min(candidates, key=lambda flags: try_flags(flags, [2, 8, 16, 32]))


def crossover(tasks: int = 8, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the largest J up to which one launch was faster at each size."""
    largest = 0
    for size in SIZES:
        grads = torch.randn(tasks, size // (tasks * dtype.itemsize), device="cuda").to(dtype)
        call, times = surgery(grads, grads.new_empty(grads.shape[1])), []
        for launches in (cuda.ONE_LAUNCH, cuda.SEVERAL_LAUNCHES):
            cuda.launches = launches
            times.append(timed(call).p50)
        print(f"  {size >> 20} MiB: one launch {times[0]:.4f} ms, several {times[1]:.4f} ms", flush=True)
        if times[0] > times[1]:
            break
        largest = size
    return largest


def main() -> None:
    major, minor = torch.cuda.get_device_capability()
    built = cuda._library
    lines = [*map(best_vectors, SHAPES), *best_slots()]
    cuda._library = built
    size = crossover()
    print("\ncsrc/cuda/tuned.h:")
    for line in lines:
        name, value = line.removeprefix("-D").split("=")
        print(f"#define {name} {value}")
    print(f"    {{{10 * major + minor}, int64_t{{{size >> 20}}} << 20}},")


if __name__ == "__main__":
    main()
