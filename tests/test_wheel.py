"""The wheel that is published, installed where there is nothing but torch: ``.ci/wheel``.

``FASTPCGRAD_WHEEL`` names a wheel to test, as ``make wheel`` does; else one is built here, of the CPU library alone and
unoptimised, to be quick.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastpcgrad import __version__

ROOT = Path(__file__).parents[1]
GIVEN = os.environ.get("FASTPCGRAD_WHEEL")
BUILT = any(map(shutil.which, ["g++", "clang++", "c++"])) and shutil.which("ldd")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="manylinux is of Linux"),
    pytest.mark.skipif(not (GIVEN or BUILT), reason="there is no C++ compiler on this machine"),
]


def run(*command, **env):
    done = subprocess.run(command, cwd="/", env=os.environ | env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if GIVEN:
        return Path(GIVEN).resolve()
    pytest.importorskip("auditwheel", reason="auditwheel is not installed: pip install 'fastpcgrad[wheel]'")
    folder = tmp_path_factory.mktemp("project")
    names = ("fastpcgrad", "csrc", ".ci", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    run(folder / ".ci" / "wheel", sys.executable, folder / "dist", FASTPCGRAD_BUILD="cpu", CXXFLAGS="-O0")
    (path,) = (folder / "dist").glob("*.whl")
    return path


def installed_for(*names):
    """These distributions and all that they require, as they are installed here."""
    found, left = {}, set(names)
    while left:
        name = left.pop()
        distribution = found[name] = metadata.distribution(name)
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left |= {requirement.name} - found.keys()
    return found.values()


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Of an environment with the wheel and what it requires.

    What pip would take long to unpack it finds beside the environment, in a folder of links: it writes nothing there.
    """
    folder, found = map(tmp_path_factory.mktemp, ("environment", "found"))
    venv.create(folder)
    for distribution in installed_for("torch", "numpy"):
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (found / name).exists():  # which several distributions may share
                (found / name).symlink_to(distribution.locate_file(name))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "found.pth").write_text(f"{found}\n", encoding="utf-8")
    pip, options = (sys.executable, "-m", "pip", "--python", folder), ("--quiet", "--no-compile")
    run(*pip, "install", *options, "--constraint", ROOT / "constraints.txt", wheel, PYTHONPATH="")
    return folder / "bin" / "python"


def test_one_wheel_for_all_pythons_and_many_systems(wheel):
    """How old a system may be is told by the C library that it was linked with."""
    name, version, python, abi, systems = wheel.stem.split("-")
    assert (name, version, python, abi) == ("fastpcgrad", __version__, "py3", "none")
    assert all(re.match(r"manylinux(_2_)?\d+_", system) for system in systems.split(".")), systems


def test_the_wheel_brings_no_library_but_ours(wheel):
    with zipfile.ZipFile(wheel) as archive:
        libraries = {name for name in archive.namelist() if ".so" in name}
    assert {"fastpcgrad/libfastpcgrad_cpu.so"} <= libraries
    assert libraries <= {"fastpcgrad/libfastpcgrad_cpu.so", "fastpcgrad/libfastpcgrad_cuda.so"}


def test_the_sdist_lies_beside_the_wheel(wheel):
    (sdist,) = wheel.parent.glob("fastpcgrad-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "csrc/fastpcgrad.h", "csrc/cpu/library.cpp", "csrc/cuda/library.cu"} <= names


def test_the_doctor_finds_the_installed_wheel_in_order(python):
    assert "verdict: all is well" in run(python, "-m", "fastpcgrad", "doctor", PYTHONPATH="")


def test_a_process_has_one_openmp_runtime(python):
    """torch's. A second would be a second pool of threads, deaf to torch.set_num_threads."""
    script = """
import torch
import fastpcgrad
from fastpcgrad.backends import native

assert native.library("cpu") is not None, native.load_error("cpu")
rows = torch.randn(4, 1 << 20)
fastpcgrad.pcgrad(rows)
torch.mm(rows, rows.T)
maps = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps")}
print(*sorted(path for path in maps if "libgomp" in path or "libomp" in path or "libiomp" in path), sep="\\n")
"""
    (runtime,) = run(python, "-c", script, PYTHONPATH="").splitlines()
    assert "/torch/lib/" in runtime
