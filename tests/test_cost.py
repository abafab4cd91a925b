"""The model of bytes and time for many processes. That its bytes are those sent is tested where they are counted."""

import itertools

import pytest

from fastpcgrad.distributed import cost
from fastpcgrad.distributed.cost import MODES, Cluster, Step


@pytest.mark.parametrize(("processes", "tasks"), list(itertools.product((1, 2, 8, 1024), (1, 3, 8))))
def test_what_is_sent_is_within_the_bounds_that_are_promised(processes, tasks):
    elements = 10**8
    steps = {mode: Step(mode, processes, tasks, elements, 100) for mode in MODES}
    row = 4 * elements * (processes - 1) / processes
    passes = -(-tasks // processes)
    for mode, rows in {"data": tasks + 1, "task": passes + 1, "averaged": 2 * tasks, "plain": 2}.items():
        assert rows * row <= steps[mode].sent <= 1.001 * rows * row + (1 << 20)
    assert steps["data"].memory <= 4 * elements * (tasks / processes + 1) * 1.001 + (3 * 25 << 20)
    assert steps["task"].memory <= 4 * elements * (min(tasks, processes) / processes + passes) * 1.001 + (4 * 25 << 20)
    assert steps["averaged"].memory == 4 * elements * tasks


def test_seconds_by_hand():
    """Four processes of one node: a row takes 0.75 s in its 39 buckets, and the merged gradient as long."""
    cluster = Cluster(node=4, link=1e9, network=1e8, latency=0.0)
    data, plain = Step("data", 4, 2, 25 * 10**7), Step("plain", 4, 2, 25 * 10**7)
    assert cluster.step(data, 1.0) == pytest.approx((2 * 1.75 + 0.75, 2 * (1 + 0.75 / 39) + 0.75), rel=1e-3)
    assert cluster.step(plain, 1.0) == pytest.approx((2 + 1.5, 2.0), rel=1e-3)
    task = Step("task", 4, 2, 25 * 10**7)
    assert cluster.step(task, 1.0) == pytest.approx((2 + 1.5, 2 + 1.5), rel=1e-3)
    apart = Cluster(node=1, link=1e9, network=1e8, latency=0.0)
    assert apart.step(task, 1.0) == pytest.approx((2 + 15, 2 + 15), rel=1e-3)


def test_the_command_prints_a_line_for_each_number_of_processes_and_mode(capsys):
    cost.main(["--processes", "2", "16", "--tasks", "3", "--elements", "1e7"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[p, mode] for p in ("2", "16") for mode in MODES]
