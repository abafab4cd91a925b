"""The runner's own decisions, on cases small enough to be timed here; and the peak of a known allocation."""

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console

from benchmarks import memory, run, subjects
from benchmarks.cases import KernelCase, StepCase, kernel_cases, memory_cases, step_cases
from benchmarks.measure import BandwidthProbe, Plan, Samples
from benchmarks.rows import environment, from_json, to_json
from benchmarks.session import Session


@pytest.fixture
def session():
    return Session(environment(threads=torch.get_num_threads()), quick=True, console=Console(quiet=True))


@pytest.mark.parametrize("quick", [True, False])
def test_labels_tell_cases_apart(quick):
    for cases in (kernel_cases(quick), step_cases(quick), memory_cases(quick)):
        labels = [case.label for case in cases]
        assert len(set(labels)) == len(labels)


def test_a_slow_subject_is_skipped_only_where_its_predicted_cost_is_too_high():
    budget = run.Budget(one_call=10.0, all_calls=30.0)
    assert budget.refuses("loop", work=1e12) == "", "nothing is known yet"
    budget.spent("loop", 1e6, Samples({0: 2000.0}))
    assert budget.refuses("loop", 4e6) == ""
    assert budget.refuses("loop", 6e6).startswith("skipped: budget (one call: 12 s predicted")
    budget.spent("loop", 1e6, Samples({-1: 14_000.0}, cold=True))
    assert budget.refuses("loop", 5e5).startswith("skipped: budget")


def test_kernel_rows_carry_ratios_to_every_peer(session):
    part = run.KernelPart(session)
    part._plan = Plan(0.0, least=2, most=2)
    case = KernelCase("pcgrad", 3, 1000)
    probe = BandwidthProbe(threads=1, elements=64)
    measured = part._case(case, subjects.Pool(3000), probe, probe.measure(Plan(0.0, least=1, most=1)))
    ours = next(row for row in measured if row.subject == "fastpcgrad")
    assert ours.ok and ours.rounds == 2 and ours.p20_ms <= ours.p50_ms <= ours.p80_ms
    assert {row.subject for row in measured if row.ok} == {"fastpcgrad", *ours.ratios}
    assert "loop" in ours.ratios
    assert ours.gbps is None, "what fits a cache has no share of the bandwidth"
    assert from_json(to_json(ours)).T == 3
    run.show_kernels(session.console, measured)


def test_step_rows_carry_merge_and_whole_step(session, monkeypatch):
    monkeypatch.setattr(run.StepPart, "_plan", lambda self, case: Plan(0.0, least=2, most=2))
    measured = run.StepPart(session)._case(StepCase("tutorial", 2, 8))
    ours = next(row for row in measured if row.subject == "fastpcgrad")
    assert ours.N == 601 and ours.ratios["plain"] > 0 and ours.whole_ratios["plain"] > 0
    assert ours.whole_p50_ms > ours.p50_ms
    run.show_steps(session.console, measured)
    run.show_targets(session.console, measured)


def test_who_raises_or_is_wrong_gets_a_row_without_numbers():
    def broken():
        raise TypeError("no such call")

    assert run._objection(broken) == "failed: TypeError: no such call"
    assert run._objection(lambda: 3.0).startswith("wrong: 3 times the tolerance")
    assert run._objection(lambda: float("nan")).startswith("wrong: ")
    assert run._objection(lambda: 1.0) == ""


def test_when_the_time_is_up_rows_say_so(session):
    part = run.StepPart(session)
    session.allow(minutes=-1)
    statuses = {row.status for row in part._case(StepCase("tutorial", 2, 8)) if "missing" not in row.status}
    assert statuses == {run.SKIPPED_LATE}


def test_the_peak_of_a_known_allocation_is_seen():
    size, slack = 32 << 20, 2 << 20
    with memory.watch() as peak:
        block = torch.ones(size // 4)
        del block
    assert size - slack < peak.bytes < size + 4 * slack


def test_the_peak_is_sampled_where_the_kernel_forbids_the_reset(monkeypatch):
    monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    size, slack = 64 << 20, 2 << 20
    with memory.watch() as peak:
        block = torch.ones(size // 4)
        memory.time.sleep(0.1)
        del block
    assert size - slack < peak.bytes < size + 4 * slack


def test_what_is_wrong_in_the_process_is_in_the_answer(monkeypatch):
    case = memory_cases(quick=True)[0]
    monkeypatch.setattr(memory.sys, "executable", "false")
    assert memory.in_fresh_process(case, "fastpcgrad", threads=1).error == "failed: exit status 1"
