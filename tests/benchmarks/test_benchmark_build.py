"""What is compiled before a GPU is at hand, with an nvcc that writes down what it was asked for."""

import re

import pytest

from benchmarks import gpu_build

STUB = """#!/bin/sh
echo "$@" >> "{log}"
while [ "$1" != -o ]; do shift; done
echo "$2" > "$2"
"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Reads and forgets what nvcc was asked for."""
    log, nvcc = tmp_path / "log", tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(STUB.format(log=log))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))

    def read():
        found = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    return read


def test_each_library_is_compiled_once_with_its_values(asked, tmp_path):
    folder = tmp_path / "libraries"
    gpu_build.compile_all(folder, 90, [None, 0, 7])
    assert sorted(path.name for path in folder.iterdir()) == ["candidate_0.so", "candidate_7.so", "library.so"]
    said = asked()
    sources = len(list((gpu_build.ROOT / "csrc" / "cuda").glob("*.cu")))
    assert len(said) == 3 * sources + 3
    for values, count in ((gpu_build.CANDIDATES[0], sources), (gpu_build.CANDIDATES[7], sources)):
        flags = " ".join(f"-D{name}={value}" for name, value in values.items())
        assert sum(flags in line for line in said) == count
    assert sum("-D" not in line and "code=sm_90" in line for line in said) == sources
    gpu_build.compile_all(folder, 90, [None, 0, 1])
    assert len(asked()) == sources + 1  # the new one alone


def test_a_library_that_was_not_finished_is_compiled_again(asked, tmp_path):
    (tmp_path / "candidate_0.part").touch()
    gpu_build.compile_all(tmp_path, 90, [0])
    assert asked() and gpu_build.path_of(tmp_path, 0).read_text().endswith("candidate_0.part\n")


def test_other_sources_have_another_folder(tmp_path, monkeypatch):
    before = gpu_build.folder_for(90)
    assert re.fullmatch(r"sm_90-[0-9a-f]{16}", before.name) and gpu_build.folder_for(90) == before
    copy = tmp_path / "csrc" / "cuda"
    copy.mkdir(parents=True)
    (copy / "a.cu").write_text("one")
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    one = gpu_build.folder_for(90)
    (copy / "a.cu").write_text("two")
    assert len({before.name, one.name, gpu_build.folder_for(90).name, gpu_build.folder_for(80).name}) == 4


def test_what_lies_there_is_put_in_place_and_asked_whether_it_runs(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(gpu_build, "architecture_here", lambda: 90)
    monkeypatch.setattr(gpu_build, "folder_for", lambda architecture: tmp_path / f"sm_{architecture}")
    monkeypatch.setattr(gpu_build, "LIBRARY", tmp_path / "in_place.so")
    monkeypatch.setattr(gpu_build.subprocess, "run", lambda command, **given: commands.append(" ".join(command)))
    gpu_build.install()
    assert "setup.py" in commands[0] and "why_unavailable" in commands[1] and not gpu_build.LIBRARY.exists()
    del commands[:]
    (tmp_path / "sm_90").mkdir()
    gpu_build.path_of(tmp_path / "sm_90", None).write_text("compiled")
    gpu_build.install()
    assert gpu_build.LIBRARY.read_text() == "compiled"
    assert len(commands) == 1 and "why_unavailable" in commands[0]
