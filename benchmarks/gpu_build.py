"""``python -m benchmarks.gpu_build [90]``: compiles, on a machine without a GPU, what ``make gpu`` needs on one.

The CUDA library as it is and one for each candidate of ``benchmarks.tune``, for one architecture, into
build/gpu/sm_<architecture>-<hash of the sources>: from other sources they are not taken. ``--install`` puts the first
in place on the machine at hand, or builds it there as setup.py does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.rows import ROOT

Values = dict[str, int]

VECTORS = ({2: 1, 4: 1}, {2: 2, 4: 2}, {2: 4, 4: 2})
"""Rows held -> vectors of each in flight. More than 32 products a lane and step would break the numerics."""
SLOTS = ((256, 1024), (256, 2048), (256, 4096), (512, 2048), (1024, 4096))
VECTOR_CANDIDATES: list[Values] = [{f"FPG_VECTORS_OF_{held}": n for held, n in each.items()} for each in VECTORS]
SLOT_CANDIDATES: list[Values] = [{"FPG_FEW_SLOTS": few, "FPG_MANY_SLOTS": many} for few, many in SLOTS]
CANDIDATES = [*VECTOR_CANDIDATES, *SLOT_CANDIDATES]

FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc")
LIBRARY = ROOT / "fastpcgrad" / "libfastpcgrad_cuda.so"


def nvcc() -> str:
    """As setup.py finds it."""
    return shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc") or "nvcc"


def folder_for(architecture: int) -> Path:
    """Where the libraries of these very sources are or will be."""
    found = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*")):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return ROOT / "build" / "gpu" / f"sm_{architecture}-{found.hexdigest()[:16]}"


def path_of(folder: Path, number: int | None) -> Path:
    """The library with candidate ``number``'s values; None: with those of csrc/cuda/tuned.h."""
    return folder / ("library.so" if number is None else f"candidate_{number}.so")


def compile_all(folder: Path, architecture: int, numbers: Sequence[int | None]) -> None:
    """Those of the libraries that are not there. Under another name until it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in numbers if not path_of(folder, number).exists()]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

    def object_of(source: Path, number: int | None) -> Path:
        return path_of(folder, number).with_suffix(f".{source.stem}.o")

    def compile_one(job: tuple[Path, int | None]) -> None:
        source, number = job
        flags = [] if number is None else [f"-D{name}={value}" for name, value in CANDIDATES[number].items()]
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        subprocess.run([nvcc(), *FLAGS, code, *flags, "-c", source, "-o", object_of(*job)], cwd=ROOT, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, [(source, number) for source in sources for number in missing]))
    for number in missing:
        objects, library = [object_of(source, number) for source in sources], path_of(folder, number)
        unfinished = library.with_suffix(".part")
        subprocess.run([nvcc(), "-shared", "-cudart=static", *objects, "-o", unfinished], check=True)
        unfinished.rename(library)
        for each in objects:
            each.unlink()


def architecture_here() -> int:
    """Of the GPU at hand, 90 for compute capability 9.0."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def install() -> None:
    """The CUDA library in place: what was compiled before, if it is of these sources and this GPU, else a new build."""
    before = path_of(folder_for(architecture_here()), None)
    if before.exists():
        print(f"taken from {before}", flush=True)
        LIBRARY.unlink(missing_ok=True)  # not into a file that a process has loaded
        shutil.copy(before, LIBRARY)
    else:
        print(f"built here, since there is no {before}", flush=True)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"FASTPCGRAD_BUILD": "cuda"}, check=True)
    ask = "from fastpcgrad.backends import why_unavailable; raise SystemExit(why_unavailable('cuda', 'cuda'))"
    subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="?", type=int, default=90)
    parser.add_argument("--install", action="store_true", help="on a machine with a GPU")
    arguments = parser.parse_args()
    if arguments.install:
        install()
    else:
        folder = folder_for(arguments.architecture)
        compile_all(folder, arguments.architecture, [None, *range(len(CANDIDATES))])
        print(folder)


if __name__ == "__main__":
    main()
