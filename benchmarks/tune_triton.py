"""``python -m benchmarks.tune_triton [--write [FILE]] [--append FILE]``: sizes of Triton's kernels, by the GPU at hand.

For each kernel that streams J, T and dtype, the candidates of ``triton_candidates`` are compared with the oracle on a
small J, then timed in turn, by replays of a CUDA graph on rows of 512 MiB: a call by itself is bound by the host. What
is 2 % faster than the sizes in force replaces them. All are compiled before, in parallel. ``--write`` puts the table
into backends/triton/tuned.py or another file, as soon as each kernel is done; ``cp`` takes it from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import check, gpu, gpu_compile, kernels, triton_candidates
from benchmarks.kernels import Contender
from benchmarks.rows import LIBRARY, ROOT
from benchmarks.session import Run
from benchmarks.timing import Phases, Plan, in_turn, ratios, replays_of, with_times
from benchmarks.triton_candidates import Tuned, fault, sized
from fastpcgrad import backends
from fastpcgrad.backends import triton
from fastpcgrad.backends.triton import tuned
from fastpcgrad.backends.triton.tuned import Key, Sizes

TUNED = ROOT / "fastpcgrad" / "backends" / "triton" / "tuned.py"
BYTES = 512 << 20
REPLAYS = 3
PLAN = Plan(seconds=0.02, least=7, most=15)
ENOUGH = 0.98
"""Of the time of the sizes in force: what is faster than that replaces them."""
CHECKED_WIDTH = 20_003
"""Columns that are compared with the oracle: whole pieces of every candidate, and a rest."""


def compile_candidates(each: Tuned, device: str) -> None:
    """Those of one kernel."""
    for sizes in each.candidates():
        compile_one(each, sizes, device)


def compile_one(each: Tuned, sizes: Sizes, device: str) -> None:
    """By small calls, on packed rows and on blocks."""
    rows = new_rows(each, gpu_compile.WIDTH, device)
    x = kernels.inputs(rows)
    with sized(each.key, sizes), backends.forcing("triton"):
        kernels.LIBRARY_OPS[each.op](x)()
        if each.op == "gram":
            triton.gram_blocks(gpu_compile.one_block(rows), None, 1)
        elif each.op == "combine":
            triton.combine_blocks(gpu_compile.one_block(rows), x.weights[None], None, [x.out])


def new_rows(each: Tuned, width: int, device: str) -> Tensor:
    """The same at each call."""
    generator = torch.Generator(device).manual_seed(each.tasks)
    return torch.randn(each.tasks, width, dtype=each.dtype, device=device, generator=generator)


def objection(each: Tuned, sizes: Sizes, device: str) -> str:
    """Why these sizes cannot be taken; empty where the numbers are right and the kernels compiled as they should be."""
    contender = Contender(LIBRARY, LIBRARY, "triton", kernels.LIBRARY_OPS[each.op])
    tolerance = check.TOLERANCE["float32" if each.op == "gram" else name_of(each.dtype)]
    make = partial(new_rows, each, CHECKED_WIDTH, device)

    def error() -> float:
        compile_one(each, sizes, device)
        with sized(each.key, sizes), backends.forcing("triton"):
            return check.error_on(contender, each.op, make) / tolerance

    return check.objection(error) or next(filter(None, map(fault, each.kernels(sizes))), "")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(run: Run, each: Tuned) -> Sizes:
    """The sizes to be taken; each candidate gets a row."""
    candidates, failures = each.candidates(), dict[Sizes, str]()
    for sizes in candidates:
        if wrong := objection(each, sizes, run.device):
            failures[sizes] = wrong
    x = kernels.inputs(new_rows(each, BYTES // (each.tasks * each.dtype.itemsize) // 64 * 64, run.device))

    def captured(sizes: Sizes) -> Phases:
        with sized(each.key, sizes), backends.forcing("triton"):
            return {each.op: replays_of(kernels.LIBRARY_OPS[each.op](x), REPLAYS)}

    names = {str(tuple(sizes)): sizes for sizes in candidates}
    right = {name: partial(captured, sizes) for name, sizes in names.items() if sizes not in failures}
    times, failed = in_turn(right, PLAN, run.device)
    found = {name: phases[each.op].over(REPLAYS) for name, phases in times.items()}
    case, dtype = f"{each.key[0]} T={each.tasks} {name_of(each.dtype)}", name_of(each.dtype)
    for name, sizes in names.items():
        row = run.row(
            "sizes", case, each.op, LIBRARY, backend="triton", T=each.tasks, N=x.rows.shape[1], dtype=dtype,
            note=f"columns, warps, stages: {name}", status=failures.get(sizes) or failed.get(name, "ok"),
        )  # fmt: skip
        if name in found:
            row = dataclasses.replace(with_times(row, found[name]), ratios=ratios(name, found))
        run.add([row])
    return names[chosen({name: samples.median for name, samples in found.items()}, next(iter(names)))]


def chosen(times: dict[str, float], in_force: str) -> str:
    """The fastest, if it gains enough; what is in force may have failed."""
    fastest = min(times, key=lambda name: times[name], default=in_force)
    if in_force in times and times[fastest] > ENOUGH * times[in_force]:
        return in_force
    return fastest


def tune(run: Run, kernels_to_tune: Iterable[Tuned], write: Path | None) -> dict[Key, Sizes]:
    """The table with what was found, written after each kernel: a run may be cut off."""
    table = dict(tuned.SIZES)
    for each in kernels_to_tune:
        if run.late:
            print("the time was up", flush=True)
            break
        best, before = measure(run, each), each.sizes
        print(f"{each.key}: {tuple(before)} -> {tuple(best)}", flush=True)
        if best != before:
            table[each.key] = best
        if write is not None:
            write.write_text(written(TUNED.read_text(encoding="utf-8"), table), encoding="utf-8")
    return table


def written(text: str, table: dict[Key, Sizes]) -> str:
    """tuned.py with another table."""
    lines = [f'    ("{key[0]}", {key[1]}, {key[2]}): Sizes{tuple(table[key])},\n' for key in sorted(table)]
    head, found = re.subn(r"^SIZES: dict\[Key, Sizes\] = \{.*\}\n", "", text, flags=re.DOTALL | re.MULTILINE)
    if found != 1:
        raise ValueError(f"{TUNED} has no table SIZES")
    body = "".join(["{\n", *lines, "}\n"]) if lines else "{}\n"
    return f"{head}SIZES: dict[Key, Sizes] = {body}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="?", type=Path, const=TUNED, help=f"the file to write, by default {TUNED}")
    parser.add_argument("--append", type=Path, help="the file for rows")
    parser.add_argument("--minutes", type=float, default=1.5, help="after these, kernels that are left are left out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune_triton: this torch sees no CUDA device")
    every = list(triton_candidates.all_tuned())
    run = Run(gpu.environment(), "cuda", results=arguments.append)
    gpu_compile.in_processes(compile_candidates, [(each,) for each in every], "cuda")
    run.allow(arguments.minutes)
    tune(run, every, arguments.write)
    run.show_failures()


if __name__ == "__main__":
    main()
