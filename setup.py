"""Builds the native libraries without Python's or torch's headers: one wheel serves all versions.

FASTPCGRAD_BUILD: auto = those with a compiler here that works, for the CPU with OpenMP (else the package says at run
time why); cpu = the CPU library, or fail; cuda = both libraries, or fail; none. CXX, CXXFLAGS and CUDA_HOME are obeyed.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.modified import newer_group

SOURCES = {"cpu": sorted(Path("csrc/cpu").rglob("*.cpp")), "cuda": sorted(Path("csrc/cuda").glob("*.cu"))}
INPUTS = ["setup.py", *(str(path) for path in Path("csrc").rglob("*"))]  # folders too: they show a removal
EXCLUDED = {("none", "cpu"), ("none", "cuda"), ("cpu", "cuda")}
REQUIRED = {"auto": [], "cpu": ["cpu"], "cuda": ["cpu", "cuda"], "none": []}
CPU_FLAGS = "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -Icsrc".split()
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
CUDA_FLAGS = "-O3 -std=c++17 --threads=3 -Xfatbin=-compress-all -Xcompiler=-fPIC,-fvisibility=hidden -Icsrc".split()

MODE = os.environ.get("FASTPCGRAD_BUILD", "auto")
CXX = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, ["g++", "clang++", "c++"]))[:1]
NVCC = shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc") or shutil.which("nvcc")


def cpu_command():
    return [*CXX, *CPU_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def said_by(command, source):
    """What a compiler says that cannot make a library of a source file; empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "probe.cu")
        file.write_text(source)
        result = subprocess.run([*command, str(file), "-o", f"{folder}/probe.so"], text=True, stderr=subprocess.PIPE)
    return (result.stderr.strip() or f"exit status {result.returncode}") if result.returncode else ""


def why_no_openmp():
    """Why the compiler cannot build a library with OpenMP; empty if it can."""
    said = said_by(
        [*cpu_command(), "-shared", "-xc++"], "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    )
    return f"{shlex.join(CXX)} cannot build with OpenMP (install it, or set CXX): {said}" if said else ""


def why_no_cuda():
    """Why nvcc cannot build a library, most often for want of a C++ compiler that it takes; empty if it can."""
    said = said_by([NVCC, "-shared", "-Xcompiler=-fPIC"], "#include <cuda_runtime.h>\n__global__ void empty() {}\n")
    return f"{NVCC} cannot build (set CUDA_HOME, or NVCC_CCBIN to a C++ compiler that it takes): {said}" if said else ""


def why_missing(name):
    """Why a library is not built; empty if it is. nvcc needs the C++ compiler for its host code."""
    reasons = {
        f"it was left out by FASTPCGRAD_BUILD={MODE} at build time": (MODE, name) in EXCLUDED,
        f"this version of the package has no sources for it (csrc/{name})": not SOURCES[name],
        "no C++ compiler was found at build time (CXX, PATH)": not (CXX and shutil.which(CXX[0])),
        "no nvcc was found at build time (CUDA_HOME, PATH)": name == "cuda" and not NVCC,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), ""):
        return reason
    return {"cpu": why_no_openmp, "cuda": why_no_cuda}[name]() if MODE == "auto" else ""


if MODE not in REQUIRED:
    sys.exit(f"FASTPCGRAD_BUILD={MODE!r} is not one of {', '.join(REQUIRED)}")
MISSING = {name: why_missing(name) for name in SOURCES}
for name in filter(MISSING.get, REQUIRED[MODE]):
    sys.exit(f"FASTPCGRAD_BUILD={MODE} needs the {name} library, but {MISSING[name]}")


def write_notes(folder):
    """Put the reason where a library is missing, and remove what a build with other settings left there."""
    for name, reason in MISSING.items():
        library, note = (Path(folder, f"libfastpcgrad_{name}.{suffix}") for suffix in ("so", "missing"))
        (library if reason else note).unlink(missing_ok=True)
        if reason:
            note.write_text(f"{reason}\n", encoding="utf-8")


def cpu_commands():
    """{object file: compiler command} in link order, and the linker's command."""
    if reason := why_no_openmp():
        sys.exit(reason)
    command = cpu_command()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = {file.stem: [str(file)] for file in SOURCES["cpu"] if file.stem != "kernels"}
    # Baseline first: of an inline function that several objects hold, the linker keeps the first copy.
    for isa, flags in {"baseline": "", **({"avx2": AVX2, "avx512": AVX512} if x86 else {})}.items():
        objects[f"kernels_{isa}"] = [*flags.split(), f"-DFPG_ISA={isa}", "csrc/cpu/kernels/kernels.cpp"]
    command += ["-DFPG_HAVE_X86_ISAS=1"] if x86 else []
    return {stem: command + rest for stem, rest in objects.items()}, [*command, "-shared"]


def cuda_commands():
    """As cpu_commands: code for those of our architectures that this nvcc knows, and PTX of the oldest for all others.

    Code of 80 runs on 86 to 89 too, that of 100 on 103, that of 120 on 121. Older GPUs lack cp.async, bf16 and tf32.
    FASTPCGRAD_CUDA_ARCHS may name others: "90" for one kind of GPU alone, in a fraction of the time.
    """
    listed = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True).split()
    wanted = os.environ.get("FASTPCGRAD_CUDA_ARCHS", "80 90 100 120").split()
    known = [arch for arch in wanted if f"compute_{arch}" in listed]
    if not known:
        sys.exit(f"FASTPCGRAD_CUDA_ARCHS is {' '.join(wanted)!r}; {NVCC} knows {', '.join(listed)}")
    pairs = [*((arch, f"sm_{arch}") for arch in known), (oldest := min(known, key=int), f"compute_{oldest}")]
    command = [NVCC, *CUDA_FLAGS, *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in pairs)]
    return {file.stem: [*command, str(file)] for file in SOURCES["cuda"]}, [NVCC, "-shared", "-cudart=static"]


class BuildExt(build_ext):
    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext):
        target, in_source = self.get_ext_fullpath(ext.name), self.get_ext_filename(ext.name)
        list(map(self.mkpath, (os.path.dirname(target), self.build_temp)))
        if not self.force and not newer_group(INPUTS, in_source if self.editable_mode else target):
            return self.editable_mode and self.copy_file(in_source, target)
        commands, link = cpu_commands() if ext.name.endswith("cpu") else cuda_commands()
        objects = {f"{self.build_temp}/{ext.name}.{stem}.o": command for stem, command in commands.items()}
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the kernels, which take longest, first
            list(pool.map(lambda file: self.spawn([*objects[file], "-c", "-o", file]), reversed(objects)))
        self.spawn([*link, *objects, "-o", target])

    def copy_extensions_to_source(self):
        list(map(Path.unlink, Path("fastpcgrad").glob("*.so")))  # a process may have it mapped: not overwritten
        super().copy_extensions_to_source()
        write_notes("fastpcgrad")


class BuildPy(build_py):
    def run(self):
        super().run()
        write_notes("fastpcgrad" if self.editable_mode else Path(self.build_lib, "fastpcgrad"))


class BdistWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


BUILT = [Extension(f"fastpcgrad.libfastpcgrad_{name}", []) for name in SOURCES if not MISSING[name]]
setup(ext_modules=BUILT, cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": BdistWheel})
