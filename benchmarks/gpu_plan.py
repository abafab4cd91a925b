"""``make gpu``, or ``python -m benchmarks.gpu_plan [PART ...]``: what to do on a machine with a GPU that is at hand for
a quarter of an hour.

The parts run in the order of worth, each with a limit of its own; none that fails or hangs stops the next, and the plan
is printed first. What they say goes to ``gpu_plan.txt`` as they say it, and what must be kept beside it: rows of
measurements to ``gpu.jsonl`` and ``triton_sizes.jsonl``, the values that tuning found to ``tuned.h`` and
``triton_tuned.py``. The folder is ``OUT``, by default benchmarks/results. What ``python -m benchmarks.gpu_build``
compiled elsewhere is taken, not compiled again. Needs torch, triton, numpy, pytest alone; with pytest-xdist tests share
the cores, as they should: Triton compiles in them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from benchmarks.rows import RESULTS, ROOT

TAIL = 2000
"""Bytes of what a part said last that are shown when it ends."""


class Part(NamedTuple):
    """A step of the plan.

    Attributes:
        seconds: that it is expected to take, with 16 cores.
        limit: seconds after which it is ended.
        what: it is for.
    """

    name: str
    command: Sequence[str]
    seconds: int
    limit: int
    what: str


def parts(out: Path) -> list[Part]:
    """All of them, those first whose loss would be worst."""
    python = sys.executable
    shared = ["-p", "xdist.plugin", "--dist", "worksteal", "-n", str(min(16, os.cpu_count() or 1))]
    in_parallel = shared if importlib.util.find_spec("xdist") else []
    pytest = [python, "-m", "pytest", "-q", *in_parallel, "-m", "not slow"]
    first = ["tests/gpu/test_methods.py", "tests/gpu/test_waits.py"]
    others = ["tests/gpu", "tests/backends", *(f"--ignore={path}" for path in (*first, "tests/gpu/test_checkers.py"))]
    measured = [python, "-m", "benchmarks.gpu", "--minutes", "3.5", "--append", str(out / "gpu.jsonl")]
    tuned = [python, "-m", "benchmarks.tune", "--write", str(out / "tuned.h")]
    sizes = [python, "-m", "benchmarks.tune_triton", "--write", str(out / "triton_tuned.py")]
    sizes += ["--append", str(out / "triton_sizes.jsonl")]
    return [
        Part("library", [python, "-m", "benchmarks.gpu_build", "--install"], 10, 200, "the compiled library, in place"),
        Part("solvers", [*pytest, *first], 40, 120, "weights of methods against the CPU's; what waits for the stream"),
        Part("checkers", [*pytest, "tests/gpu/test_checkers.py"], 100, 250, "compute-sanitizer's four tools"),
        Part("tests", [*pytest, *others], 100, 200, "all other tests that a GPU runs"),
        Part("figures", measured, 270, 330, "docs/kernels.md's table"),
        Part("tune", tuned, 90, 150, "the values of csrc/cuda/tuned.h"),
        Part("sizes", sizes, 90, 150, "Triton's sizes, backends/triton/tuned.py"),
    ]


def run(plan: Sequence[Part], out: Path, minutes: float) -> bool:
    """Whether all of them succeeded. What is left of the minutes limits a part as its own limit does."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    with (out / "gpu_plan.txt").open("w+b") as lines:

        def say(text: str) -> None:
            print(text, flush=True)
            lines.write(f"{text}\n".encode())
            lines.flush()

        for part in plan:
            say(f"{part.name:10} about {part.seconds:3} s, {part.limit:3} at most: {part.what}")
        succeeded = True
        for part in plan:
            start, left = time.monotonic(), end - time.monotonic()
            result = run_part(part, lines, min(part.limit, left)) if left > 0 else "no time was left"
            say(f"=== {part.name}: {result}, {time.monotonic() - start:.0f} s")
            succeeded &= result == "done"
    return succeeded


def run_part(part: Part, lines: BinaryIO, limit: float) -> str:
    """What became of it. It has a process group of its own, which ends with it: tests and checkers start processes."""
    first = lines.tell()
    # Only the plug-in that is named: others would measure, or need what is not there.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=lines, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return f"not begun: {error}"
    try:
        code = process.wait(limit)
        result = "done" if code == 0 else f"failed with status {code}"
    except subprocess.TimeoutExpired:
        result = f"ended after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):  # none of the group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines.seek(max(first, lines.seek(0, os.SEEK_END) - TAIL))
    print(lines.read().decode(errors="replace"), flush=True)
    return result


def main() -> None:
    out = Path(os.environ.get("OUT") or RESULTS).resolve()
    plan = parts(out)
    names = [part.name for part in plan]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"these alone: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=15.0, help="after these nothing runs any more")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [part for part in plan if part.name in (arguments.parts or names)]
    sys.exit(not run(chosen, out, arguments.minutes))


if __name__ == "__main__":
    main()
