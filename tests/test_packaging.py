"""What a build gives: with and without compilers, for each FASTPCGRAD_BUILD, as wheel, as sdist and in place.

Each test builds a copy of the project. Most replace csrc with a few lines, which compile in a moment.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from itertools import chain
from pathlib import Path

import pytest

from fastpcgrad import _version
from fastpcgrad.backends import native

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which(CUDA / "bin" / "nvcc") or shutil.which("nvcc")
COMPILER = os.environ.get("CXX") or any(map(shutil.which, ["g++", "clang++", "c++"]))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler on this machine")
needs_nvcc = pytest.mark.skipif(not (NVCC and COMPILER), reason="there is no nvcc on this machine")

SMALL_CSRC = {
    "version.h": f"#define VERSION {native.ABI_VERSION}\n",
    "cpu/kernels/kernels.cpp": "namespace FPG_ISA { int lanes() { return 1; } }\n",
    "cpu/library.cpp": """#include <omp.h>
#include "version.h"
namespace baseline { int lanes(); }
#ifdef FPG_HAVE_X86_ISAS
namespace avx2 { int lanes(); }
namespace avx512 { int lanes(); }
int wide() { return avx2::lanes() + avx512::lanes(); }
#endif
extern "C" __attribute__((visibility("default"))) int fpg_abi_version(void) {
    return omp_get_max_threads() > 0 ? VERSION * baseline::lanes() : 0;
}
""",
}
SMALL_CUDA = f"""#include <cuda_runtime.h>
__global__ void zero(float* x) {{ x[threadIdx.x] = 0; }}
extern "C" __attribute__((visibility("default"))) int fpg_abi_version(void) {{ return {native.ABI_VERSION}; }}
"""


class Project:
    """A copy of the project, and the environment in which it is built."""

    def __init__(self, folder):
        ignored = shutil.ignore_patterns("*.so", "*.missing", "__pycache__")
        for name in ("fastpcgrad", "csrc"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(ROOT / name, folder)
        self.folder = folder
        self.package = folder / "fastpcgrad"
        build_variables = ("CXXFLAGS", "CUDA_HOME", "FASTPCGRAD_BUILD", "FASTPCGRAD_CUDA_ARCHS", "PYTHONPATH")
        self.env = {name: value for name, value in os.environ.items() if name not in build_variables}

    def use_small_csrc(self):
        shutil.rmtree(self.folder / "csrc")
        for name, text in SMALL_CSRC.items():
            self.write(f"csrc/{name}", text)

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def hide_compilers(self):
        (self.folder / "empty").mkdir()
        self.env |= {"PATH": str(self.folder / "empty"), "CUDA_HOME": str(self.folder / "empty"), "CXX": ""}

    def run(self, *arguments, **env):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.env | env, text=True, capture_output=True)

    def run_ok(self, *arguments, **env):
        result = self.run(*arguments, **env)
        assert result.returncode == 0, result.stdout + result.stderr

    def run_bad(self, *arguments, **env):
        result = self.run(*arguments, **env)
        assert result.returncode != 0, result.stdout
        return result.stdout + result.stderr

    def wheel(self, *options, **env):
        self.run_ok("-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", "out", *options, **env)
        (path,) = (self.folder / "out").glob("*.whl")
        return path

    def build_in_place(self, **env):
        self.run_ok("setup.py", "--quiet", "build_ext", "--inplace", **env)
        return self.package / "libfastpcgrad_cpu.so"


@pytest.fixture
def project(tmp_path):
    copied = Project(tmp_path)
    copied.use_small_csrc()
    return copied


WHEEL = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation")


def native_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name).name for name in archive.namelist() if "libfastpcgrad" in name}


@needs_compiler
def test_an_isolated_build(project, tmp_path):
    """As `pip install .` does it, in an environment without torch. `test_wheel` builds the real sources."""
    wheel = project.wheel(FASTPCGRAD_BUILD="cpu")
    assert re.fullmatch(rf"fastpcgrad-{re.escape(_version.__version__)}-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "unpacked")
    python_files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastpcgrad").rglob("*.py")}
    assert python_files | {"fastpcgrad/py.typed", "fastpcgrad/libfastpcgrad_cpu.so"} <= names
    folders = {name.split("/")[0] for name in names}
    assert folders == {"fastpcgrad", f"fastpcgrad-{_version.__version__}.dist-info"}
    loaded, error = native._open(tmp_path / "unpacked" / "fastpcgrad" / "libfastpcgrad_cpu.so")
    assert loaded is not None, error


def test_without_compilers_the_package_is_built_and_says_what_is_missing(project):
    project.hide_compilers()
    wheel = project.wheel("--no-build-isolation", FASTPCGRAD_BUILD="auto")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert native_files(wheel) == {"libfastpcgrad_cpu.missing", "libfastpcgrad_cuda.missing"}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(project.folder / "unpacked")
    _, error = native._open(project.folder / "unpacked" / "fastpcgrad" / "libfastpcgrad_cpu.so")
    assert "no C++ compiler was found" in error


def test_none_builds_no_library_and_ships_none_that_lies_in_the_tree(project):
    (project.package / "libfastpcgrad_cpu.so").write_text("left by another build")
    wheel = project.wheel("--no-build-isolation", FASTPCGRAD_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert native_files(wheel) == {"libfastpcgrad_cpu.missing", "libfastpcgrad_cuda.missing"}


@needs_compiler
def test_cpu_builds_the_cpu_library_alone(project):
    project.write("csrc/cuda/gram.cu", "this must not be compiled")
    wheel = project.wheel("--no-build-isolation", FASTPCGRAD_BUILD="cpu")
    assert native_files(wheel) == {"libfastpcgrad_cpu.so", "libfastpcgrad_cuda.missing"}


@needs_nvcc
def test_cuda_sources_are_compiled_for_every_architecture(project):
    project.write("csrc/cuda/gram.cu", SMALL_CUDA)
    result = project.run("setup.py", "build_ext", "--inplace", FASTPCGRAD_BUILD="cuda")
    assert result.returncode == 0, result.stdout + result.stderr
    commands = result.stdout + result.stderr
    for code in ("80,code=sm_80", "90,code=sm_90", "100,code=sm_100", "120,code=sm_120", "80,code=compute_80"):
        assert f"-gencode=arch=compute_{code} " in commands
    loaded, error = native._open(project.package / "libfastpcgrad_cuda.so")
    assert loaded is not None, error  # without a GPU as well: the driver is looked for at the first call


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know_is_an_error(project):
    project.write("csrc/cuda/gram.cu", SMALL_CUDA)
    assert "FASTPCGRAD_CUDA_ARCHS is '1'" in project.run_bad(*WHEEL, FASTPCGRAD_BUILD="cuda", FASTPCGRAD_CUDA_ARCHS="1")


NO_CXX = "but no C++ compiler was found"
# A program that exists stands for the compiler: it is not started.
ANY_PROGRAM = sys.executable


@pytest.mark.parametrize(
    ("mode", "cuda_source", "cxx", "words"),
    [
        pytest.param("cpu", None, "", f"FASTPCGRAD_BUILD=cpu needs the cpu library, {NO_CXX}", id="cpu-nothing"),
        pytest.param("cpu", None, "no-such-compiler", NO_CXX, id="cpu-absent-CXX"),
        pytest.param("cuda", SMALL_CUDA, "", f"needs the cpu library, {NO_CXX}", id="cuda-nothing"),
        pytest.param("cuda", SMALL_CUDA, ANY_PROGRAM, "cuda library, but no nvcc was found", id="cuda-no-nvcc"),
        pytest.param("cuda", None, ANY_PROGRAM, "cuda library, but this version", id="cuda-no-sources"),
        pytest.param("gpu", None, "", "'gpu' is not one of auto, cpu, cuda, none", id="unknown"),
    ],
)
def test_what_was_asked_for_and_cannot_be_built_is_an_error(project, mode, cuda_source, cxx, words):
    if cuda_source:
        project.write("csrc/cuda/gram.cu", cuda_source)
    project.hide_compilers()
    assert words in project.run_bad(*WHEEL, CXX=cxx, FASTPCGRAD_BUILD=mode)


@needs_compiler
def test_a_compile_error_is_never_skipped(project):
    project.write("csrc/cpu/broken.cpp", "int broken( { return 1; }")
    assert "broken.cpp:1" in project.run_bad(*WHEEL, FASTPCGRAD_BUILD="auto")


def without_openmp(project):
    compiler = project.folder / "compiler"
    compiler.write_text("#!/bin/sh\necho \"unsupported option '-fopenmp'\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_a_compiler_without_openmp_leaves_the_library_out_and_the_package_says_so(project):
    compiler = without_openmp(project)
    wheel = project.wheel("--no-build-isolation", CXX=compiler, FASTPCGRAD_BUILD="auto")
    assert {"libfastpcgrad_cpu.missing"} == {name for name in native_files(wheel) if "cpu" in name}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(project.folder / "unpacked")
    _, error = native._open(project.folder / "unpacked" / "fastpcgrad" / "libfastpcgrad_cpu.so")
    assert f"{compiler} cannot build with OpenMP" in error and "unsupported option '-fopenmp'" in error


def test_a_compiler_without_openmp_is_an_error_where_the_library_was_asked_for(project):
    compiler = without_openmp(project)
    said = project.run_bad(*WHEEL, CXX=compiler, FASTPCGRAD_BUILD="cpu")
    assert f"{compiler} cannot build with OpenMP" in said and "unsupported option '-fopenmp'" in said


@needs_compiler
def test_an_nvcc_that_cannot_build_leaves_the_cuda_library_out_and_the_package_says_so(project):
    """As one that is older than the machine's C++ compiler: nobody who wants the CPU library is to be stopped by it."""
    project.write("csrc/cuda/gram.cu", SMALL_CUDA)
    project.write("toolkit/bin/nvcc", "#!/bin/sh\necho '#error -- unsupported GNU version!' >&2\nexit 1\n")
    nvcc = project.folder / "toolkit" / "bin" / "nvcc"
    nvcc.chmod(0o755)
    toolkit = {"CUDA_HOME": str(project.folder / "toolkit")}
    wheel = project.wheel("--no-build-isolation", FASTPCGRAD_BUILD="auto", **toolkit)
    assert native_files(wheel) == {"libfastpcgrad_cpu.so", "libfastpcgrad_cuda.missing"}
    with zipfile.ZipFile(wheel) as archive:
        note = archive.read("fastpcgrad/libfastpcgrad_cuda.missing").decode()
    assert f"{nvcc} cannot build" in note and "unsupported GNU version" in note and "NVCC_CCBIN" in note
    assert "unsupported GNU version" in project.run_bad(*WHEEL, FASTPCGRAD_BUILD="cuda", **toolkit)


@needs_compiler
def test_headers_of_openmp_without_its_library_are_not_enough(project):
    """As where libgomp is not installed beside the compiler: it compiles, and cannot link."""
    wheel = project.wheel("--no-build-isolation", CXXFLAGS="-L/nowhere -lno_such_openmp", FASTPCGRAD_BUILD="auto")
    assert "libfastpcgrad_cpu.missing" in native_files(wheel)


@needs_compiler
def test_in_place_only_changed_sources_are_compiled_again(project):
    library = project.build_in_place()
    first = library.stat().st_mtime_ns
    assert project.build_in_place().stat().st_mtime_ns == first
    project.write("csrc/version.h", "#define VERSION 99\n")
    project.build_in_place()
    assert ctypes.CDLL(str(library)).fpg_abi_version() == 99


@needs_compiler
def test_an_editable_build_puts_the_library_into_the_source_tree(project):
    build = ("-c", "import setuptools.build_meta as b; b.build_editable('out')")
    project.run_ok(*build)
    library, note = (project.package / f"libfastpcgrad_cpu.{suffix}" for suffix in ("so", "missing"))
    assert native._open(library)[1] is None and not note.exists()
    project.run_ok(*build, FASTPCGRAD_BUILD="none")
    assert "FASTPCGRAD_BUILD=none" in native._open(library)[1] and note.exists()


def test_the_sdist_holds_what_a_build_needs(project):
    project.run_ok("-c", "import setuptools.build_meta as b; b.build_sdist('out')")
    (path,) = (project.folder / "out").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert {f"csrc/{name}" for name in SMALL_CSRC} <= names
    assert not [name for name in names if name.endswith((".so", ".missing", ".pyc"))]


def test_every_requirement_has_a_constraint():
    """Else a target of the Makefile installs whatever is newest that day; for torch that means gigabytes."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = chain(project["dependencies"], *project["optional-dependencies"].values())
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {re.match(r"[\w-]+", line).group() for line in required} - {"fastpcgrad"} <= set(pins)
