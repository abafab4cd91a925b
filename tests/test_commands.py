"""``python -m fastpcgrad``: what its commands find and print."""

import re

import pytest
import torch

import fastpcgrad
from fastpcgrad import __main__, backends, functional
from fastpcgrad.backends import cpu
from fastpcgrad.commands import bench, doctor

needs_library = pytest.mark.skipif(cpu.why_unavailable("cpu") is not None, reason="needs the CPU library")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.delenv("FASTPCGRAD_BACKEND", raising=False)
    monkeypatch.setattr(doctor, "COLUMNS", 1000)
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "SECONDS", 0.0)


def test_config(capsys):
    assert __main__.main(["config"]) == 0
    assert f"fastpcgrad {fastpcgrad.__version__}" in capsys.readouterr().out


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit):
        __main__.main([])
    assert "config" in capsys.readouterr().err


@needs_library
def test_where_all_is_well_the_doctor_says_so(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "openmp_runtimes", list)
    assert __main__.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("verdict: all is well\n")
    assert "cpu on cpu tensors: right" in said and "eager on cpu tensors: right" in said
    assert re.search(r"gram [\d.]+ GB/s, combine [\d.]+ GB/s, copy [\d.]+ GB/s", said)
    assert re.search(r"a Python loop [\d.]+ times as long", said)


def test_what_is_slow_is_said_with_its_reason(capsys, monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
    monkeypatch.setattr(doctor, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert doctor.examine() == 0
    said = capsys.readouterr().out
    assert said.endswith("verdict: right, but slow\n")
    assert "/a/libgomp.so.1, /b/libiomp5.so" in said and "compete for the cores" in said
    assert "the compiled cpu library does not run cpu tensors" in said


@pytest.mark.parametrize("factor", [1 + 1e-5, torch.nan])
def test_a_wrong_result_is_found_whatever_it_is(capsys, monkeypatch, factor):
    right = functional.pcgrad
    monkeypatch.setattr(functional, "pcgrad", lambda rows, **options: right(rows, **options) * factor)
    assert __main__.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "WRONG: eager on cpu, torch.float32" in said and said.endswith("verdict: not to be used as it is\n")


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
    with backends.forcing("cpu"):
        assert doctor.os.environ["FASTPCGRAD_BACKEND"] == "cpu"
    assert doctor.os.environ["FASTPCGRAD_BACKEND"] == "eager"


def test_the_openmp_runtime_of_torch_is_found():
    torch.ones(1 << 16).sum()
    found = doctor.openmp_runtimes()
    assert len(found) == len(set(found)) and all(path.name.startswith(doctor.OPENMP) for path in found)


def test_the_comparison_has_a_row_for_each_number_of_tasks(capsys):
    assert __main__.main(["bench", "--columns", "1000"]) == 0
    said = capsys.readouterr().out
    assert [int(line.split()[0]) for line in said.splitlines() if re.match(r" +\d", line)] == list(bench.TASKS)
    assert "Python loop" in said and "TorchJD" in said


def test_no_columns_cannot_be_measured():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        bench.compare(0)


def test_the_loop_is_pcgrad():
    """Of two tasks, whose order has no part in it."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    torch.testing.assert_close(bench.loop(rows), fastpcgrad.pcgrad(rows))
