"""The arithmetic of the measurements; no speed is asserted."""

import itertools
import time

import pytest

from benchmarks import timing
from benchmarks.bandwidth import Probe, fastest
from benchmarks.rows import Environment, Row
from benchmarks.timing import Plan, Samples, alone, in_turn, paired_ratio, ratios, spread_rounds, total, with_times

ENVIRONMENT = Environment("r", "2026-01-01", "c", "a CPU", 1, "2", "2", "0")


def calls(**named):
    return {name: lambda call=call: {"call": call} for name, call in named.items()}


def test_percentiles_interpolate_between_order_statistics():
    row = with_times(Row("kernel", "x", "gram", "y", ENVIRONMENT), Samples.of([4.0, 1.0, 3.0, 2.0]))
    assert (row.p20_ms, row.p50_ms, row.p80_ms, row.rounds) == (pytest.approx(1.6), 2.5, pytest.approx(3.4), 4)


def test_ratio_is_the_median_of_paired_rounds_and_not_the_ratio_of_medians():
    # Round 2 ran while the machine was slow for both.
    ours = Samples({0: 1.0, 1: 2.0, 2: 30.0})
    peer = Samples({0: 2.0, 1: 2.0, 2: 10.0, 3: 1.0})
    assert paired_ratio(ours, peer) == paired_ratio(peer, ours) == 1.0
    assert ratios("ours", {"ours": ours, "peer": peer}) == {"peer": 1.0}


def test_ratio_with_few_common_rounds_is_that_of_the_medians():
    assert paired_ratio(Samples({-1: 8.0}, cold=True), Samples({0: 1.0, 1: 2.0, 2: 3.0})) == 4.0
    # The fast one was held up in the only round of the slow one.
    assert paired_ratio(Samples({0: 8.0}), Samples({0: 4.0, 1: 2.0, 2: 2.0})) == 4.0


def test_total_adds_phases_round_by_round():
    whole = total([Samples({0: 1.0, 1: 2.0}), Samples({1: 10.0, 0: 20.0})])
    assert whole.by_round == {0: 21.0, 1: 12.0}
    assert whole.over(2).by_round == {0: 10.5, 1: 6.0}


@pytest.mark.parametrize("of", [1, 5, 7, 40, 2000])
def test_any_two_subjects_share_all_rounds_of_the_slower(of):
    counts = [rounds for rounds in (0, 1, 2, 3, 5, 7, 31, 40, 1999, 2000) if rounds <= of]
    taken = [spread_rounds(rounds, of) for rounds in counts]
    assert [len(indices) for indices in taken] == counts
    for slower, faster in itertools.combinations(taken, 2):
        assert slower <= faster <= set(range(of))
    half = spread_rounds(of // 2, of)
    assert all(index % 2 == 0 for index in half), "spread evenly"


def test_plan_gives_rounds_for_its_seconds_within_bounds():
    plan = Plan(1.0, least=5, most=50, slow=0.5, slow_least=2, cold=8.0)
    assert [plan.rounds(seconds) for seconds in (1e-6, 0.1, 0.4, 0.6, 9.0)] == [50, 10, 5, 2, 0]


def test_subjects_take_turns_and_phases_are_told_apart():
    made = []
    subjects = {
        "a": lambda: {"first": lambda: made.append("a1"), "second": lambda: made.append("a2")},
        "b": lambda: {"first": lambda: made.append("b")},
    }
    samples, failures = in_turn(subjects, Plan(1.0, least=3, most=4))
    assert {name: set(phases) for name, phases in samples.items()} == {"a": {"first", "second"}, "b": {"first"}}
    assert all(s.rounds == 4 and not s.cold for phases in samples.values() for s in phases.values())
    warm_up, timed = made[:9], made[9:]
    assert warm_up == ["a1", "a2"] * 3 + ["b"] * 3 and not failures
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert all(sorted(one) == ["a1", "a2", "b"] for one in rounds)


def test_the_first_call_is_the_sample_of_who_is_too_slow_for_a_second():
    made = []

    def slow():
        made.append("slow")
        time.sleep(0.02)

    plan = Plan(0.001, least=2, most=2, slow=0.01, cold=0.015)
    samples, _ = in_turn(calls(slow=slow, fast=lambda: None), plan)
    assert made == ["slow"]
    assert samples["slow"]["call"].cold and samples["slow"]["call"].rounds == 1
    assert not samples["fast"]["call"].cold and samples["fast"]["call"].rounds == 2


def test_who_raises_is_named_and_the_others_are_timed():
    samples, failures = in_turn(calls(broken=lambda: 1 // 0, fine=lambda: None), Plan(0.0, least=2, most=2))
    assert failures == {"broken": "failed: ZeroDivisionError: integer division or modulo by zero"}
    assert list(samples) == ["fine"] and samples["fine"]["call"].rounds == 2


def test_a_slow_call_is_made_three_times_alone(monkeypatch):
    made = []
    monkeypatch.setattr(timing, "SLOW", -1.0)
    assert alone(lambda: made.append(1), "cpu").rounds == 2 and len(made) == 3


def test_the_rounds_of_a_call_alone_are_bounded_and_its_time_is_of_one(monkeypatch):
    monkeypatch.setattr(timing, "_queued", lambda call, device, rounds: [4.0] * rounds)
    found = alone(lambda: None, "cpu", seconds=0.08, calls_of_one=2)
    assert found.values == [2.0] * 20
    assert alone(lambda: None, "cpu", seconds=0.001).rounds == timing.LEAST
    assert alone(lambda: None, "cpu", seconds=10.0).rounds == timing.MOST


def test_the_probe_copies_and_reads_in_every_way():
    probe = Probe(threads=2, elements=1 << 12)
    for way, copy in probe.ways["copy"].items():
        source, target = probe.arrays
        target.zero_()
        copy()
        assert source.equal(target), way
    for way, read in probe.ways["read"].items():
        found = read()
        assert found is None or float(found) in (1 << 12, 1 << 11), way
    assert probe.bytes == {"read": 1 << 14, "copy": 1 << 15} and probe.fastest("read") in probe.ways["read"].values()


def test_the_fastest_way_is_taken():
    name, _ = fastest({"slow": lambda: time.sleep(0.01), "fast": lambda: None})
    assert name == "fast"
