"""Training steps and their peaks, on models small enough to be measured here."""

import pytest
import torch

from benchmarks import cases, check, memory, steps, tables, targets
from benchmarks.cases import TINY_GPT, Batch, KernelCase, StepCase
from benchmarks.memory import Measured
from benchmarks.models import width_of
from benchmarks.modes import DENSE_ROWS, FACTORED_ROWS, HOST_ROWS, modes
from benchmarks.rows import SKIPPED_LATE, environment, from_json, to_json
from benchmarks.session import Run
from benchmarks.steps import WHOLE
from benchmarks.targets import verdicts
from benchmarks.timing import Plan

# A peer differentiates through torch.vmap, which has no rule for attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

TWICE = Plan(0.0, least=2, most=2)
TUTORIAL, LARGE = StepCase("tutorial", 2, Batch(8)), StepCase(TINY_GPT, 3, TINY_GPT.batch)


@pytest.fixture(scope="module")
def here():
    return environment(threads=torch.get_num_threads())


@pytest.fixture
def run(here):
    return Run(here, quick=True)


@pytest.fixture(scope="module")
def timed(here):
    return steps.rows(Run(here), LARGE, TWICE)


@pytest.fixture
def made_up(monkeypatch):
    """Peaks as if each mode's prediction came true."""

    def answer(case, mode, activations=False):
        if isinstance(case, KernelCase):
            return Measured(peak=8 * 400, width=100)
        beyond = 400 if activations else int(mode.beyond(case.tasks) * 100)
        return Measured(peak=600 + beyond, gradients=400, width=100)

    monkeypatch.setattr(memory, "in_fresh_process", lambda case, mode, threads, only: answer(case, mode, only))
    monkeypatch.setattr(memory, "peak_of", lambda case, mode, only, device: answer(case, mode, only))


def by_subject(rows):
    return {row.subject: row for row in rows}


@pytest.mark.parametrize("quick", [True, False])
def test_labels_tell_cases_apart(quick):
    of = (cases.kernel_cases, cases.step_cases, cases.memory_cases, cases.large_cases, cases.large_memory_cases)
    of += (cases.factored_cases, cases.factored_memory_cases, cases.floor_cases, cases.floor_memory_cases)
    for found in of:
        labels = [case.label for case in found(quick)]
        assert len(set(labels)) == len(labels) > 0


def test_step_rows_carry_merge_and_whole_step(run):
    measured = by_subject(steps.rows(run, TUTORIAL, TWICE))
    ours = measured["fastpcgrad"]
    assert ours.N == 601 and ours.ratios["plain"] > 0 and ours.whole_ratios["plain"] > 0 and "loop" in ours.ratios
    assert ours.whole_p50_ms > ours.p50_ms and ours.rounds == 2 and from_json(to_json(ours)) is not None
    assert "accumulate" not in measured, "only its memory is of interest"


def test_large_rows_carry_the_whole_step_and_the_share_of_merge(timed):
    found = by_subject(timed)
    ours = found["streaming"]
    assert ours.ok and ours.rounds == 2 and ours.whole_ratios["plain"] > 0
    assert 0 < ours.ratios[WHOLE] < 1 and ours.p50_ms < ours.whole_p50_ms
    assert found["plain"].p50_ms is None, "plain passes have no merge"


@pytest.mark.parametrize("case", cases.factored_cases(False), ids=lambda case: case.label)
def test_the_models_of_factored_rows_have_the_size_that_they_say(case):
    sizes = {"mlp": 13.6e6, "mlp 0.94M": 0.94e6, "mlp 0.17M": 0.17e6, "wide transformer": 6.8e6}
    assert width_of(case) == pytest.approx(sizes[case.model], rel=0.02)


def test_rows_of_factored_cases_are_compared_with_plain_passes_and_dense_rows(run):
    case = cases.FactoredCase("mlp 0.17M", 3, Batch(4))
    measured = by_subject(steps.rows(run, case, TWICE))
    assert set(measured) == {"plain", "fastpcgrad", DENSE_ROWS, FACTORED_ROWS}
    assert all(row.ok and row.ratios["plain"] > 0 for name, row in measured.items() if name != "plain")
    run.add(measured.values())
    assert "mlp 0.17M T=3 B=4" in tables.factored(run.rows)


def test_a_mode_that_is_wrong_gets_no_numbers(run, monkeypatch):
    monkeypatch.setattr(check, "step_error", lambda mode, case: 1e6 * (mode.name == "streaming"))
    found = by_subject(steps.rows(run, LARGE, TWICE))
    assert found["streaming"].status.startswith("wrong: 1e+06 times") and found["streaming"].whole_p50_ms is None
    assert found["plain"].ok


def test_what_does_not_fit_is_skipped_with_the_prediction(run, monkeypatch, made_up):
    monkeypatch.setattr(memory, "available_bytes", lambda: 20e9)
    giant = [case for case in cases.large_memory_cases(False) if case.model is cases.GPTS[-1]]
    memory.measure(run, giant)
    found = {(row.T, row.subject): row.status for row in run.rows}
    assert found[2, "streaming"] == "ok"
    assert found[4, "streaming"] == "skipped: memory (18 GiB predicted, 19 GiB available)"
    assert (4, "loop") not in found, "nobody waits for that one"
    monkeypatch.setattr(steps, "available_bytes", lambda: 0.0)
    assert {row.status.partition(" (")[0] for row in steps.rows(run, LARGE, TWICE)} == {"skipped: memory"}


def test_when_the_time_is_up_rows_say_so(run):
    run.allow(minutes=-1)
    steps.measure(run, [TUTORIAL])
    memory.measure(run, [LARGE, KernelCase("pcgrad", 8, 1 << 22)])
    assert {row.status for row in run.rows if "missing" not in row.status} == {SKIPPED_LATE}
    assert {row.case for row in run.rows} == {
        "tutorial T=2",
        "gpt tiny T=3",
        "memory pcgrad T=8 N=2^22 float32 contiguous",
    }


def test_peaks_are_beyond_model_and_activations(run, made_up):
    memory.measure(run, [StepCase(TINY_GPT, tasks, Batch(1, 8)) for tasks in (2, 4)] + [KernelCase("pcgrad", 8, 64)])
    found = {(row.T, row.subject): row for row in run.rows}
    assert found[4, "streaming"].peak_bytes == 4 * 400 and found[4, "streaming"].peak_ratio == 1
    assert found[2, "plain"].peak_ratio == 0.5
    assert found[8, "torchjd"].peak_ratio == 1 and found[8, "torchjd"].case.startswith("memory pcgrad")


def test_the_slow_peers_peaks_come_last(run, made_up):
    memory.measure(run, [StepCase("mlp", tasks, Batch(32)) for tasks in (4, 8)])
    subjects = [row.subject for row in run.rows]
    assert subjects[-4:] == [*memory.SLOW_PEERS] * 2 and subjects.count("accumulate") == 2


def test_targets_read_the_rows(run, timed, made_up):
    memory.measure(run, [LARGE])
    step, share, peak, narrow, two_phase = verdicts([*timed, *run.rows], targets.LARGE)
    assert step.worst == by_subject(timed)["streaming"].whole_ratios["plain"]
    assert share.worst == by_subject(timed)["streaming"].ratios[WHOLE]
    assert peak.worst == 1 and narrow.worst == 0.5
    assert two_phase.worst == 2 and two_phase.met


def test_the_modes_of_a_gpu_are_measured_in_one_process(run, made_up):
    chosen, precision = modes(LARGE, on_gpu=True), torch.get_float32_matmul_precision()
    memory.measure_here(run, LARGE, chosen)
    run.add(steps.rows_on_gpu(run, LARGE, chosen))
    assert torch.get_float32_matmul_precision() == precision
    assert [row.subject for row in run.rows] == 2 * [mode.name for mode in chosen] and all(r.ok for r in run.rows)
    timed = {row.subject: row for row in run.rows if row.kind == "step"}
    for name in ("streaming", "streaming[bf16 rows]", HOST_ROWS):
        assert timed[name].rounds == 8 and timed[name].whole_ratios["plain"] > 0 and 0 < timed[name].ratios[WHOLE] < 1
    assert "TF32" in timed["plain"].note and "batch" in timed["plain"].note
    found = verdicts(run.rows, targets.GPU)
    assert len(found) == 6 and all(verdict.worst is not None for verdict in found)
    assert found[-1].worst == 2 and found[-1].met


@pytest.mark.slow
def test_a_mode_that_fails_says_why_and_the_others_are_measured(run, monkeypatch):
    def fail(*_):
        raise ValueError("not with this torch\nand more")

    chosen = [m if m.name != "two_phase" else type(m)("two_phase", fail, "paper") for m in modes(LARGE, on_gpu=True)]
    memory.measure_here(run, LARGE, chosen)
    run.add(steps.rows_on_gpu(run, LARGE, chosen))
    for kind in ("step", "memory"):
        status = {row.subject: row.status for row in run.rows if row.kind == kind}
        assert status.pop("two_phase") == "failed: ValueError: not with this torch"
        assert set(status.values()) == {"ok"}


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
    monkeypatch.setattr(memory.sys, "executable", "false")
    found = memory.in_fresh_process(LARGE, modes(LARGE)[0], threads=1)
    assert found.error == "failed: exit status 1"


@pytest.mark.slow
def test_a_peak_in_a_fresh_process():
    model = cases.GPTS[1]
    case = cases.StepCase(model, 2, model.batch).for_peaks
    streaming = next(mode for mode in modes(case) if mode.name == "streaming")
    common, found = (memory.in_fresh_process(case, streaming, 1, only) for only in (True, False))
    assert not common.error and not found.error
    beyond = found.peak - (common.peak - common.gradients)
    assert 0.8 < beyond / (case.tasks * found.width * 4) < 1.2
