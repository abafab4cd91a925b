"""NVIDIA's memory and race checkers on the compiled library.

They take longest; by its name this file comes first, so that other processes can run the other tests beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCRIPT = Path(__file__).with_name("small_surgeries.py")


def test_the_checkers_find_nothing():
    checker = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if checker is None:
        pytest.skip("there is no compute-sanitizer here")

    def run(tool):
        command = [checker, "--tool", tool, "--error-exitcode", "3", sys.executable, str(SCRIPT)]
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(run, ("memcheck", "racecheck")))
    for result in results:
        said = result.stdout[-4000:] + result.stderr[-2000:]
        if "Device not supported" in said:
            pytest.skip("compute-sanitizer cannot watch this device")
        assert result.returncode == 0, said
