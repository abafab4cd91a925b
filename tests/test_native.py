"""The loader of the compiled libraries: what it loads, and what it says of what it cannot load."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from fastpcgrad.backends import native

COMPILER = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ["g++", "clang++", "c++"]))[:1]
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler on this machine")


@pytest.fixture
def compile_library(tmp_path):
    def compile_(source):
        path = tmp_path / "libfastpcgrad_cpu.so"
        command = [*COMPILER, "-xc++", "-shared", "-fPIC", "-o", str(path), "-"]
        subprocess.run(command, input=source, text=True, check=True)
        return path

    return compile_


def test_a_library_that_was_never_built(tmp_path):
    path = tmp_path / "libfastpcgrad_cpu.so"
    loaded, error = native._open(path)
    assert loaded is None
    assert str(path) in error and "does not exist" in error and "build_ext --inplace" in error


def test_a_library_that_the_build_left_out(tmp_path):
    (tmp_path / "libfastpcgrad_cuda.missing").write_text("no nvcc was found\n")
    loaded, error = native._open(tmp_path / "libfastpcgrad_cuda.so")
    assert loaded is None
    assert error == "libfastpcgrad_cuda.so was not built: no nvcc was found"


def test_a_file_that_is_no_library(tmp_path):
    path = tmp_path / "libfastpcgrad_cpu.so"
    path.write_text("not a library")
    loaded, error = native._open(path)
    assert loaded is None
    assert str(path) in error and "cannot be loaded" in error


@needs_compiler
def test_a_library_of_another_abi_version(compile_library):
    path = compile_library('extern "C" int fpg_abi_version(void) { return 999; }')
    loaded, error = native._open(path)
    assert loaded is None
    assert str(path) in error and "999" in error and str(native.ABI_VERSION) in error


@needs_compiler
def test_a_library_without_an_abi_version(compile_library):
    loaded, error = native._open(compile_library('extern "C" int other(void) { return 1; }'))
    assert loaded is None
    assert "fpg_abi_version" in error


@needs_compiler
def test_a_library_of_this_abi_version(compile_library):
    source = f'extern "C" int fpg_abi_version(void) {{ return {native.ABI_VERSION}; }}'
    loaded, error = native._open(compile_library(source))
    assert error is None
    assert loaded.fpg_abi_version() == native.ABI_VERSION


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_each_library_loads_or_says_why_not(name):
    loaded, error = native.library(name), native.load_error(name)
    assert (loaded is None) != (error is None)
    assert native.library(name) is loaded


@needs_compiler
def test_the_cpu_library_is_built_where_there_is_a_compiler():
    assert native.load_error("cpu") is None


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc/self/maps")
def test_the_cpu_library_shares_the_openmp_runtime_of_torch():
    """A second copy would be a second thread pool, deaf to torch.set_num_threads."""
    if native.library("cpu") is None:
        pytest.skip(f"the CPU library is missing: {native.load_error('cpu')}")
    script = """
from fastpcgrad.backends import native
assert native.library("cpu") is not None
maps = [line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps")]
print(*sorted({path for path in maps if "libgomp" in path or "libomp" in path}), sep="\\n")
"""
    result = subprocess.run([sys.executable, "-c", script], text=True, check=True, capture_output=True)
    assert len(result.stdout.split()) == 1, result.stdout
