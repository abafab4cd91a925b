"""The CUDA library as nvcc builds it, on a machine with or without a GPU: registers, entry points, loading, errors."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch

from fastpcgrad import backends
from fastpcgrad.backends import cuda

ROOT = Path(__file__).parents[2]
NVCC = shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc") or shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(
    not (NVCC and shutil.which("g++")), reason="there is no nvcc with a C++ compiler on this machine"
)

ARCHS = os.environ.get("FASTPCGRAD_CUDA_ARCHS", "90")
"""One unless told otherwise: each takes minutes. ``FASTPCGRAD_CUDA_ARCHS="80 90 100 120"`` is what setup.py builds."""
# Of a kernel, or of a function that it calls.
_FUNCTION = re.compile(r"Function properties for (\w+)\n\s+\d+ bytes stack frame, (\d+) bytes spill stores")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the library, what ptxas said of each kernel) of one build of the real sources, as setup.py does it.

    The host's side is left unoptimised, and the library for the CPU, which comes with it, is an empty one.
    """
    folder = tmp_path_factory.mktemp("cuda")
    for name in ("csrc", "fastpcgrad"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "cpu"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc/cpu/kernels").mkdir(parents=True)
    (folder / "csrc/cpu/kernels/kernels.cpp").touch()
    environment = os.environ | {"FASTPCGRAD_BUILD": "cuda", "FASTPCGRAD_CUDA_ARCHS": ARCHS}
    environment["NVCC_APPEND_FLAGS"] = "-Xptxas=-v -Xcompiler=-O0"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "fastpcgrad" / "libfastpcgrad_cuda.so", result.stdout + result.stderr


@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills(built):
    said = built[1]
    assert set(re.findall(r"Compiling entry function '\w+' for '(sm_\d+)'", said)) == {
        f"sm_{arch}" for arch in ARCHS.split()
    }
    functions = _FUNCTION.findall(said)
    stems = {
        "gram_columns",
        "gram_tiles",
        "finish",
        "combine",
        "combine_many",
        "mix",
        "mix_tensor",
        "mix_tiles",
        "pcgrad",
        "pcgrad_tiles",
        "solve",
        "table",
        "weights",
        "gradvac",
    }
    assert stems <= {re.sub(r".*?\d([a-z_]+)_kernel.*", r"\1", name) for name, _ in functions}
    assert said.count("bytes spill stores") == len(functions)
    assert not [name for name, spilled in functions if int(spilled)]


@needs_nvcc
@pytest.mark.slow
def test_the_library_loads_and_answers_without_a_gpu(built):
    assert built[0].stat().st_size < 20 << 20
    library = cuda.declare(ctypes.CDLL(str(built[0])))
    assert library.fpg_abi_version() == cuda.native.ABI_VERSION
    assert library.fpg_cuda_error(0) == b"no error" and library.fpg_cuda_error(1) == b"bad argument"
    assert library.fpg_cuda_error(1000 + 2) == library.fpg_cuda_error(2) == b"out of memory"
    # Of 8 rows by a million columns: 245 items of 36 float64 sums, and 8 flags.
    assert library.fpg_cuda_workspace(8, 10**6, 1, 0) == 245 * 36 * 8 + 8 * 4
    assert library.fpg_cuda_workspace(257, 100, 1, 0) == 0
    # In two blocks of that width: at most 978 items and one for each block, 8 flags; tables of 12 numbers a block, 3.
    widths = array("q", [500_000, 500_000])
    found = library.fpg_cuda_workspace_blocks(widths.buffer_info()[0], 2, 8, 0, 1)
    assert found == (978 + 2) * 36 * 8 + 8 * 4 + (2 * 12 + 3) * 8
    assert library.fpg_cuda_workspace_blocks(widths.buffer_info()[0], 2, 257, 0, 1) == 0
    assert library.fpg_cuda_combine_workspace_blocks(2, 8, 1) == (2 * 12 + 3) * 8
    # UPGrad of 3 problems of 8 tasks: 24 warps with two matrices and 8 vectors each. There is no solver 99.
    assert library.fpg_cuda_method_workspace(4, 8, 3) == 24 * (2 * 64 + 8 * 8) * 8
    assert library.fpg_cuda_method_workspace(99, 8, 3) == -1


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_each_call_returns_the_runtimes_error(built):
    library = cuda.declare(ctypes.CDLL(str(built[0])))
    status = library.fpg_cuda_probe()
    assert status > 1000 and b"CUDA" in library.fpg_cuda_error(status)
    rows = (None, 2, 10, 10, 0, None, 1)
    assert library.fpg_cuda_gram(*rows, None, None, None) > 1000
    assert library.fpg_cuda_combine(*rows, None, None, None) > 1000
    assert library.fpg_cuda_mix(*rows, None, None) > 1000
    assert library.fpg_cuda_pcgrad_coefficients(None, 2, 1, None, 0, 0, 0.0, 0.0, None, None) > 1000
    call = cuda._SURGERY.pack(0, *rows[1:5], 0, 1, 0, 0, 0, 0.0, 0.0, 1.0, *[0] * 6)
    assert library.fpg_cuda_pcgrad(call, None) > 1000
    parameters = array("d", [0.0, 0.0])
    problem = (0, None, 2, 1, parameters.buffer_info()[0])
    assert library.fpg_cuda_method_weights(*problem, *[None] * 4) > 1000
    assert library.fpg_cuda_gradvac(None, None, 2, 1, 0.5, 0.0, None, None, None) > 1000
    blocks = (None, None, 0, 2, 0)
    assert library.fpg_cuda_gram_blocks(*blocks, None, 1, None, None, None) > 1000
    assert library.fpg_cuda_combine_blocks(*blocks, None, 1, None, None, None, None) > 1000
    assert library.fpg_cuda_pcgrad_blocks(*blocks, None, 0, 0, 0.0, 0.0, 1.0, *[None] * 6) > 1000


def test_each_entry_point_of_the_header_is_declared_in_python():
    header = (ROOT / "csrc" / "fastpcgrad.h").read_text()
    assert set(re.findall(r"FPG_EXPORT [\w *]*?(fpg_cuda_\w+)\(", header)) == set(cuda._ARGUMENTS)


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="CUDA library takes CUDA tensors only"):
        backends.select("cpu")


@pytest.mark.parametrize(
    ("library", "has_device", "reason"),
    [
        (None, True, "was not built"),
        (object(), False, "sees no CUDA device"),
    ],
)
def test_cuda_tensors_fall_back_or_are_told_why_the_library_cannot_run(monkeypatch, library, has_device, reason):
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(cuda, "_library", library)
    monkeypatch.setattr(cuda.native, "load_error", lambda name: "libfastpcgrad_cuda.so was not built: no nvcc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_device)
    monkeypatch.delenv("FASTPCGRAD_BACKEND", raising=False)
    assert backends.select("cuda").__name__ != cuda.__name__
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=f"device type 'cuda': .*{reason}"):
        backends.select("cuda")
