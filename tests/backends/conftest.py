"""The CUDA library for the tests of its backend: the real one on a GPU, else its sources on a CPU."""

import ctypes
import fcntl
import os

import pytest

from fastpcgrad.backends import cuda
from tests.backends import cuda_emulated


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Compiled once for all processes that share the tests: it takes half a minute."""
    if cuda_emulated.GPU:
        return None
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    path = folder / "libfastpcgrad_cuda.so"
    with (folder / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            cuda_emulated.compile_library(path)
    return cuda.declare(ctypes.CDLL(str(path)))


@pytest.fixture
def library(emulated, monkeypatch):
    if emulated is not None:
        monkeypatch.setattr(cuda, "_library", emulated)
        emulated.emulated_multiprocessors(2)
        emulated.emulated_green_context(0)
        emulated.emulated_shared_memory(227)
    return emulated
