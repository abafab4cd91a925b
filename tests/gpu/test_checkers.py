"""NVIDIA's checkers on the compiled library: of memory, races, uninitialized memory and barriers.

They take longest; by its name this file comes first, so that other processes can run the other tests beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCRIPT = Path(__file__).with_name("small_surgeries.py")
LIMIT = 240
"""Seconds: a kernel that hangs under a checker must not cost the other tests."""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
@pytest.mark.parametrize("part", ["solvers", "rows", "blocks"])
def test_the_checkers_find_nothing(part, tool):
    checker = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if checker is None:
        pytest.skip("there is no compute-sanitizer here")
    command = [checker, "--tool", tool, "--error-exitcode", "3", sys.executable, str(SCRIPT), part]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    said = result.stdout[-4000:] + result.stderr[-2000:]
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer cannot watch this device")
    assert result.returncode == 0, said
