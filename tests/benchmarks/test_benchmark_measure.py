"""The arithmetic of the measurements; no speed is asserted."""

import itertools
import time

import pytest

pytest.importorskip("numpy")

from benchmarks.measure import (
    Bandwidth,
    BandwidthProbe,
    Plan,
    Rate,
    Samples,
    Subject,
    in_turn,
    paired_ratio,
    percentile,
    spread_rounds,
    total,
)


def test_percentile_interpolates_between_order_statistics():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([5.0], 20) == percentile([5.0], 80) == 5.0


def test_ratio_is_the_median_of_paired_rounds_and_not_the_ratio_of_medians():
    # Round 2 ran while the machine was slow for both.
    ours = Samples({0: 1.0, 1: 2.0, 2: 30.0})
    peer = Samples({0: 2.0, 1: 2.0, 2: 10.0, 3: 1.0})
    assert paired_ratio(ours, peer) == 1.0
    assert paired_ratio(peer, ours) == 1.0


def test_ratio_with_few_common_rounds_is_that_of_the_medians():
    assert paired_ratio(Samples({-1: 8.0}, cold=True), Samples({0: 1.0, 1: 2.0, 2: 3.0})) == 4.0
    # The fast one was held up in the only round of the slow one.
    assert paired_ratio(Samples({0: 8.0}), Samples({0: 4.0, 1: 2.0, 2: 2.0})) == 4.0


def test_total_adds_phases_round_by_round():
    whole = total([Samples({0: 1.0, 1: 2.0}), Samples({1: 10.0, 0: 20.0})])
    assert whole.by_round == {0: 21.0, 1: 12.0}


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
    assert plan.rounds(1e-6) == 50
    assert plan.rounds(0.1) == 10
    assert plan.rounds(0.4) == 5
    assert plan.rounds(0.6) == 2
    assert plan.rounds(9.0) == 0


def test_subjects_take_turns_and_phases_are_told_apart():
    calls = []
    subjects = [
        Subject("a", {"first": lambda: calls.append("a1"), "second": lambda: calls.append("a2")}),
        Subject("b", {"first": lambda: calls.append("b")}),
    ]
    samples = in_turn(subjects, Plan(1.0, least=3, most=4))
    assert {name: set(phases) for name, phases in samples.items()} == {
        "a": {"first", "second"},
        "b": {"first"},
    }
    assert all(s.rounds == 4 and not s.cold for phases in samples.values() for s in phases.values())
    warm_up, timed = calls[:9], calls[9:]
    assert warm_up == ["a1", "a2"] * 3 + ["b"] * 3
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert all(sorted(one) == ["a1", "a2", "b"] for one in rounds)


def test_the_first_call_is_the_sample_of_who_is_too_slow_for_a_second():
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.02)

    plan = Plan(0.001, least=2, most=2, slow=0.01, cold=0.015)
    samples = in_turn([Subject("slow", {"call": slow}), Subject("fast", {"call": lambda: None})], plan)
    assert calls == ["slow"]
    assert samples["slow"]["call"].cold and samples["slow"]["call"].rounds == 1
    assert not samples["fast"]["call"].cold and samples["fast"]["call"].rounds == 2


def test_bandwidth_is_that_of_the_fastest_candidate():
    bandwidth = BandwidthProbe(threads=2, elements=1 << 12).measure(Plan(0.01, least=2, most=3))
    assert bandwidth.read.gigabytes_per_second > 0 and "torch" in bandwidth.read.candidate
    assert bandwidth.copy.gigabytes_per_second > 0 and "cop" in bandwidth.copy.candidate
    better = bandwidth.best_of(Bandwidth(Rate(1e9, "x"), Rate(0.0, "y")))
    assert (better.read.candidate, better.copy) == ("x", bandwidth.copy)
