"""The benchmark of large models, on models small enough to be run here."""

import io

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console

from benchmarks import check
from benchmarks.large import __main__ as main
from benchmarks.large import cases, memory, models, steps, targets
from benchmarks.large.cases import SMALL, Batch, Case
from benchmarks.large.modes import WHOLE, modes
from benchmarks.measure import Plan
from benchmarks.rows import SKIPPED_LATE, environment, from_json, to_json
from benchmarks.targets import verdicts

# A peer differentiates through torch.vmap, which has no rule for attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

TWICE = Plan(0.0, least=2, most=2)


@pytest.fixture(scope="module")
def here():
    return environment(threads=torch.get_num_threads())


@pytest.fixture(scope="module")
def timed(here):
    return steps.rows(Case(SMALL, 3), here, TWICE, late=lambda: False)


@pytest.fixture
def peaks(here, monkeypatch):
    """Rows of memory, of made-up measurements: each mode's prediction comes true."""

    def answer(case, mode, threads, only):
        base = memory.Measured(peak=1_000, gradients=400, width=100)
        beyond = int(mode.beyond(case.tasks) * 100)
        return base if only else memory.Measured(peak=600 + beyond, gradients=400, width=100)

    monkeypatch.setattr(memory, "_in_fresh_process", answer)
    return memory.rows(SMALL, (2, 4), here, late=lambda: False)


def by_subject(rows):
    return {row.subject: row for row in rows}


@pytest.mark.parametrize("quick", [True, False])
def test_labels_tell_cases_apart(quick):
    for found in (cases.timed_cases(quick), cases.memory_cases(quick)):
        assert len({case.label for case in found}) == len(found) > 0


@pytest.mark.parametrize("size", cases.SIZES, ids=lambda size: size.name)
def test_sizes_have_the_parameters_that_they_are_named_for(size):
    model = models.build(size, 2, Batch(1, 4), "meta")
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(size.parameters, rel=0.02)
    assert count == pytest.approx(float(size.name[:-1]) * {"M": 1e6, "G": 1e9}[size.name[-1]], rel=0.1)


def test_a_tasks_own_forward_gives_the_loss_of_the_shared_one():
    model = models.build(SMALL, 3, Batch(2, 8))
    torch.testing.assert_close([model.loss(t) for t in range(3)], model().losses)


@pytest.mark.parametrize("mode", [mode for mode in modes() if mode.ours and callable(mode.build)], ids=lambda m: m.name)
def test_our_modes_give_the_oracles_gradient(mode):
    assert steps.error_of(mode) <= check.TOLERANCE["bfloat16" if "bf16" in mode.name else "float32"]


def test_step_rows_carry_the_whole_step_and_the_share_of_merge(timed):
    found = by_subject(timed)
    ours = found["streaming"]
    assert ours.ok and ours.rounds == 2 and ours.whole_ratios["plain"] > 0
    assert 0 < ours.ratios[WHOLE] < 1 and ours.p50_ms < ours.whole_p50_ms
    assert found["plain"].p50_ms is None, "plain passes have no merge"
    assert from_json(to_json(ours)) is not None


def test_a_mode_that_is_wrong_gets_no_numbers(here, monkeypatch):
    monkeypatch.setattr(steps, "error_of", lambda mode: 1.0)
    found = by_subject(steps.rows(Case(SMALL, 2), here, TWICE, late=lambda: False))
    assert found["streaming"].status.startswith("wrong: 1e+06 times") and found["streaming"].whole_p50_ms is None
    assert found["plain"].ok


def test_what_does_not_fit_is_skipped_with_the_prediction(here, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 20e9)
    monkeypatch.setattr(memory, "_in_fresh_process", lambda *_: memory.Measured(1000, 400, 100))
    giant = cases.SIZES[-1]
    found = {(row.T, row.subject): row.status for row in memory.rows(giant, (2, 4), here, late=lambda: False)}
    assert found[2, "streaming"] == "ok"
    assert found[4, "streaming"] == "skipped: memory (18 GiB predicted, 19 GiB available)"
    assert (4, "loop") not in found, "nobody waits for that one"


def test_after_the_deadline_rows_say_so(here):
    late = by_subject(steps.rows(Case(SMALL, 2), here, TWICE, late=lambda: True))
    assert {row.status for row in late.values()} == {SKIPPED_LATE}
    late = by_subject(memory.rows(SMALL, (2,), here, late=lambda: True))
    assert late["streaming"].status == SKIPPED_LATE


def test_peaks_are_beyond_model_and_activations(peaks):
    found = {(row.T, row.subject): row for row in peaks}
    assert found[4, "streaming"].peak_bytes == 4 * 400 and found[4, "streaming"].peak_ratio == 1
    assert found[2, "plain"].peak_ratio == 0.5


def test_targets_read_the_rows(timed, peaks):
    found = {verdict.target.text: verdict for verdict in verdicts([*timed, *peaks], targets.TARGETS)}
    step, share, peak, narrow, two_phase = found.values()
    assert step.worst.value == by_subject(timed)["streaming"].whole_ratios["plain"]
    assert share.worst.value == by_subject(timed)["streaming"].ratios[WHOLE]
    assert peak.worst.value == 1 and narrow.worst.value == 0.5
    assert two_phase.worst.value == 2 and two_phase.met


def test_everything_is_shown_and_drawn(timed, peaks, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.large import plot

    console = Console(record=True, width=160, file=io.StringIO())
    main.show(console, [*timed, *peaks])
    shown = console.export_text()
    assert all(mode.name in shown for mode in modes())
    plot.draw([*timed, *peaks], tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_peak_in_a_fresh_process(here):
    case = cases.memory_cases(quick=True)[0]
    streaming = next(mode for mode in modes() if mode.name == "streaming")
    common = memory._in_fresh_process(case, streaming, 1, memory.ACTIVATIONS)
    found = memory._in_fresh_process(case, streaming, 1, "")
    assert not common.error and not found.error
    beyond = found.peak - (common.peak - common.gradients)
    assert 0.8 < beyond / (case.tasks * found.width * 4) < 1.2
