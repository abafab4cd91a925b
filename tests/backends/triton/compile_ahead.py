"""Compile every Triton kernel ahead of time, as the launcher would, for GPUs that need not be there.

Prints registers, spills and shared memory of each; exits with 1 where one spills, or where a kernel that streams
aligned rows has no 16-byte loads. Run with ``TRITON_INTERPRET=0``. ``--candidates``: with each of the sizes that
``benchmarks.tune_triton`` tries instead of those in force.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
TYPES = {
    "partials": "*fp64", "gram": "*fp64", "coefficients": "*fp64", "weights": "*fp64", "flags": "*i32",
    "segments": "*i64", "order": "*i64", "eps": "fp64", "min_squared_norm": "fp64", "scale": "fp64",
    "self_projection": "i32", "rows": "*i64", "outs": "*i64", "widths": "*i64", "starts": "*i64", "owners": "*i64",
    "aligned": "*i64",
}  # fmt: skip
STREAMING = {
    *("gram_rows", "gram_tiles", "combine", "mix_rows", "mix_tiles"),
    *("gram_rows_of_blocks", "gram_tiles_of_blocks", "combine_of_blocks"),
}
WIDE_LOADS = re.compile(
    r"ld\.global\S*\.(v4\.b32|v2\.b64)|cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x10|16)\b"
)


class Case(NamedTuple):
    kernel: str
    tasks: int
    dtype: str
    segmented: bool
    arch: int
    constants: dict[str, Any]
    warps: int
    registers: int | None
    sizes: Any = None


class Outcome(NamedTuple):
    case: Case
    registers: int
    spilled: int
    shared: int
    wide_loads: int


def choices(tasks: int, dtype: torch.dtype, segmented: bool) -> list[Any]:
    from fastpcgrad.backends.triton import choices as of

    unit = 16 // dtype.itemsize
    gram = of.gram_choice(tasks, dtype, unit, segmented)
    block = of.block_of(gram)
    over_rows = [gram, of.combine_choice(tasks, dtype, unit, segmented)]
    over_grams = [of.reduce_choice(tasks, segmented, block, of.is_guarded(dtype), False)]
    if of.is_guarded(dtype):
        over_rows.append(of.rescue_choice(tasks, unit, segmented, block))
        over_grams.append(of.reduce_choice(tasks, segmented, block, False, True))
    found = [*over_rows, *over_grams, of.mix_choice(tasks, dtype, unit, segmented)]
    if not segmented:
        found += [of.of_blocks(choice, dtype) for choice in over_rows]
        found += [of.solve_choice(tasks), of.sums_choice(tasks)]
    return found


def pointer_type(name: str, dtype: str) -> str:
    if name in ("grads", "out"):
        return f"*{dtype}"
    if name == "narrow":
        return "*fp64" if dtype == "fp64" else "*fp32"
    return TYPES.get(name, "i64")


def said_by_ptxas(log: str) -> tuple[int, int]:
    """Registers a thread and bytes spilled."""
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    return int(registers[1]), sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", log))


def compile_case(case: Case) -> Outcome:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastpcgrad.backends.triton import kernels

    kernel = getattr(kernels, case.kernel)
    constants = dict(case.constants)
    if "segments" in kernel.arg_names and not case.segmented:
        constants["segments"] = None
    signature = {
        name: "constexpr" if name in constants else pointer_type(name, case.dtype) for name in kernel.arg_names
    }
    # What the launcher specialises on: pointers that are 16-byte aligned.
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", case.arch, 32),
            options={"num_warps": case.warps, "maxnreg": case.registers},
        )
    registers, spilled = said_by_ptxas(log.getvalue())
    return Outcome(case, registers, spilled, compiled.metadata.shared, len(WIDE_LOADS.findall(compiled.asm["ptx"])))


def all_cases(tasks: list[int], dtypes: list[str], archs: list[int]) -> list[Case]:
    """Rows kernels: every T, dtype and architecture. The T×T ones, which are far from spilling: the smallest and the
    largest T, on the last architecture. Segments: once."""
    cases: dict[str, Case] = {}
    for arch in archs:
        for dtype in dtypes:
            for count in tasks:
                for segmented in (False, True) if (arch, count) == (archs[-1], tasks[-1]) else (False,):
                    for choice in choices(count, DTYPES[dtype], segmented):
                        name = choice.kernel.__name__
                        over_rows = name in STREAMING or name.startswith("gram_rescue")
                        of_rows, constants = dtype if over_rows else "-", choice.constants
                        case = Case(name, count, of_rows, segmented, arch, constants, choice.warps, choice.registers)
                        # Reductions of one T differ in the rows' block alone, a divisor.
                        key = (name, count, segmented, arch, constants.get("AGAIN"), case.dtype)
                        if over_rows or (arch == archs[-1] and count in (tasks[0], tasks[-1])):
                            cases.setdefault(repr(key), case)
    return list(cases.values())


def candidate_cases(archs: list[int]) -> list[Case]:
    """Of all sizes that tuning tries, on packed rows and on blocks."""
    from benchmarks import triton_candidates

    cases = []
    names = {dtype: name for name, dtype in DTYPES.items()}
    for arch, each in itertools.product(archs, triton_candidates.all_tuned()):
        for sizes in each.candidates():
            for made in each.kernels(sizes):
                name, dtype = made.kernel.__name__, names[each.dtype]
                held = made.warps, made.registers
                cases.append(Case(name, each.tasks, dtype, False, arch, made.constants, *held, sizes))
    return cases


def faults(outcome: Outcome) -> list[str]:
    from benchmarks.triton_candidates import LEAST_SHARED

    found = []
    if outcome.spilled:
        found.append(f"spills {outcome.spilled} bytes")
    if outcome.shared > LEAST_SHARED:
        found.append("more shared memory than some GPUs have")
    if outcome.case.kernel in STREAMING and not outcome.wide_loads:
        found.append("no 16-byte loads")
    return found


def compile_all_and_log(folder: str) -> None:
    os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", default="2,3,6,8,12,16,32,64,128,256")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--archs", default="80,90,100")
    parser.add_argument("--candidates", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    archs = [int(arch) for arch in arguments.archs.split(",")]
    if arguments.candidates:
        cases = candidate_cases(archs)
    else:
        cases = all_cases([int(count) for count in arguments.tasks.split(",")], arguments.dtypes.split(","), archs)
    print(f"{'kernel':<22}{'T':>4} {'dtype':<6}{'segments':<9}{'sm':>4}{'registers':>10}{'spilled':>8}{'shared':>8}")
    failed = 0
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(arguments.processes, get_context("spawn"), compile_all_and_log, (cache,)) as pool,
    ):
        for outcome in pool.map(compile_case, cases):
            case, wrong = outcome.case, faults(outcome)
            remarks = "; ".join([*map(str, filter(None, [case.sizes])), *wrong])
            failed += bool(wrong)
            print(
                f"{case.kernel:<22}{case.tasks:>4} {case.dtype:<6}{'yes' if case.segmented else 'no':<9}{case.arch:>4}"
                f"{outcome.registers:>10}{outcome.spilled:>8}{outcome.shared:>8}  {remarks}",
                flush=True,
            )
    print(f"{len(cases)} kernels compiled, {failed} at fault")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
