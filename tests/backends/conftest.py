"""The CUDA library for the tests of its backend: the real one on a GPU, else its sources on a CPU."""

import pytest

from fastpcgrad.backends import cuda
from tests.backends import cuda_emulated


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "libfastpcgrad_cuda.so"
    return None if cuda_emulated.GPU else cuda.declare(cuda_emulated.compile_library(path))


@pytest.fixture
def library(emulated, monkeypatch):
    if emulated is not None:
        monkeypatch.setattr(cuda, "_library", emulated)
        emulated.emulated_multiprocessors(2)
        emulated.emulated_green_context(0)
        emulated.emulated_shared_memory(227)
    return emulated
