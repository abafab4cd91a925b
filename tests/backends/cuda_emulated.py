"""Compiles csrc/cuda with the emulation of a GPU's threads: the kernels and launches as they are, on CPU tensors."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from fastpcgrad.backends import cuda

GPU = cuda.why_unavailable("cuda") is None
"""Whether the tests of the backend run on a GPU, and need no emulation."""
DEVICE = "cuda" if GPU else "cpu"

CSRC = Path(__file__).parents[2] / "csrc"
CXX = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ["g++", "clang++", "c++"]))[:1]

_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
_WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# Few slots, so that a slot has many steps at the sizes that fibers can do.
_SLOTS = ["-DFPG_FEW_SLOTS=6", "-DFPG_MANY_SLOTS=6"]
_OWN = """
extern "C" FPG_EXPORT void emulated_multiprocessors(int count) { fpg::multiprocessors = count; }
extern "C" FPG_EXPORT void emulated_green_context(int count) { fpg::part_of_device = count; }
extern "C" FPG_EXPORT void emulated_shared_memory(int kilobytes) {
  fpg::shared_of_block = kilobytes * 1024;
  fpg::device = kilobytes;  // another one: what is known of a device is asked for once
}
"""


def compile_library(path: Path) -> None:
    """One translation unit of all sources; ``emulated_multiprocessors`` sets how many blocks run at a time,
    ``emulated_green_context`` how many of these multiprocessors a stream has (0: all), ``emulated_shared_memory`` the
    kilobytes that a block may have."""
    source = "".join(f'#include "cuda/{file.name}"\n' for file in sorted((CSRC / "cuda").glob("*.cu"))) + _OWN
    emulation = ['-DFPG_EMULATION="cuda_emulation.h"', f"-I{Path(__file__).parent}", f"-I{CSRC}"]
    command = [*CXX, *_FLAGS, *_WARNINGS, *_SLOTS, *emulation, "-xc++", "-", "-o", str(path)]
    compiled = subprocess.run(command, input=source, text=True, capture_output=True)
    assert compiled.returncode == 0, compiled.stderr
