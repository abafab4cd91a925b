"""Weights of hundreds of tasks beside TorchJD's: what is measured, what is skipped, and the table."""

import dataclasses

import pytest
import torch

from benchmarks import many_tasks
from benchmarks.many_tasks import Case
from benchmarks.method_cases import PEER
from benchmarks.rows import LIBRARY, environment
from benchmarks.session import Run
from fastpcgrad import methods


@pytest.fixture
def run():
    return Run(environment(threads=1), quick=True)


def test_gradients_of_samples_depend_on_each_other():
    grads = many_tasks.sample_gradients(80)
    assert grads.shape == (80, 49)
    assert torch.linalg.matrix_rank(grads.double()) <= 49


def test_every_method_of_g_takes_part():
    found = {case.method for case in many_tasks.cases(quick=True)}
    assert {"UPGrad", "DualProj", "MGDA", "CAGrad", "NashMTL", "AlignedMTL", "PCGrad", "GradVac", "PCD"} <= found
    assert not found & {"Mean", "Constant", "GradDrop", "CRMOGM"}
    assert all(hasattr(methods, name) for name in found)


def test_both_take_turns_and_the_largest_has_a_peak(run, monkeypatch):
    pytest.importorskip("torchjd")
    monkeypatch.setattr(many_tasks, "TASKS", (8, 16))
    seconds = {}
    for tasks in (8, 16):
        own, theirs = many_tasks.rows(run, Case("MGDA", tasks), seconds)
        assert (own.subject, theirs.subject, own.status, theirs.status) == (LIBRARY, PEER, "ok", "ok")
        assert own.ratios[PEER] == pytest.approx(1 / theirs.ratios[LIBRARY], rel=0.5)
        assert (own.peak_bytes is not None) == (tasks == 16) and theirs.peak_bytes is None
    assert seconds["MGDA"] > 0
    own, theirs = many_tasks.rows(run, Case("MGDA", 16), {"MGDA": many_tasks.ONE_CALL})
    assert own.ok and theirs.status.startswith("skipped: budget (one call: 160 s predicted")


def test_what_has_no_counterpart_is_missing(run, monkeypatch):
    monkeypatch.setattr(many_tasks, "TASKS", (8, 16))
    own, theirs = many_tasks.rows(run, Case("AGEM", 8), {})
    assert own.ok and theirs.status.startswith("missing")
    own, theirs = many_tasks.rows(run, Case("ConFIG", 8), {})  # TorchJD's has no weights of G
    assert own.ok and theirs.status.startswith("missing")


def test_the_table(run):
    row = run.row("method", "MGDA weights T=64, rank 49", many_tasks.OP, LIBRARY, T=64, N=49)
    large = dataclasses.replace(row, case="MGDA weights T=1024, rank 49", T=1024, p50_ms=8123.4, peak_ratio=2.34)
    skipped = dataclasses.replace(large, subject=PEER, status="skipped: budget (...)", p50_ms=None, peak_ratio=None)
    found = [dataclasses.replace(row, p50_ms=0.5, ratios={PEER: 0.25}), large, skipped]
    line = next(line for line in many_tasks.table(found).splitlines() if "MGDA" in line)
    assert line == "| `MGDA` | 0.5 (4×) | 8,123 (–) | 2.3 |"
    assert many_tasks.table([]) == "Not yet measured."
