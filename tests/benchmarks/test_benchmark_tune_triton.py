"""How sizes of Triton's kernels are tried and taken, without a GPU: under Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import rows
from benchmarks.session import Run
from tests.conftest import why_not_interpreted

pytest.importorskip("triton")
from benchmarks import tune_triton
from benchmarks.triton_candidates import Tuned, all_tuned, sized
from fastpcgrad.backends.triton import choices, kernels, tuned
from fastpcgrad.backends.triton.tuned import Sizes

TWO = Tuned("combine", 2, torch.float32)
SMALL, SMALLER = Sizes(256, 4), Sizes(128, 4)


def test_candidates_keep_the_numerics_and_begin_with_what_is_in_force():
    keys = [each.key for each in all_tuned()]
    assert len(set(keys)) == len(keys)
    for each in all_tuned():
        found = each.candidates()
        assert found[0] == each.sizes and len(set(found)) == len(found) >= 2
        for sizes in found:
            assert sizes.columns & (sizes.columns - 1) == 0
            with sized(each.key, sizes):
                choice = each.choice
            assert choice.warps == sizes.warps and choice.constants.get("STAGES", 1) == sizes.stages
            if choice.kernel is kernels.gram_tiles:
                assert sizes.columns <= found[0].columns and choice.constants["WARPS"] == sizes.warps


def test_sizes_are_in_force_for_the_rows_that_they_are_of_and_for_blocks():
    before = {tasks: choices.combine_choice(tasks, torch.float32, 4, False) for tasks in (2, 3, 4, 5)}
    with sized(("combine", 4, 4), Sizes(128, 8)):
        for tasks, choice in before.items():
            now = choices.combine_choice(tasks, torch.float32, 4, False)
            assert now == choice if tasks in (2, 5) else (now.constants["BLOCK"], now.warps) == (128, 8)
            assert choices.of_blocks(now, torch.float32).warps == now.warps
        assert choices.combine_choice(4, torch.bfloat16, 8, False).warps == 4
    assert choices.combine_choice(4, torch.float32, 4, False) == before[4]


@pytest.fixture
def run(tmp_path, monkeypatch):
    if reason := why_not_interpreted():
        pytest.skip(reason)
    monkeypatch.setattr(tune_triton, "replays_of", lambda call, count: lambda: [call() for _ in range(count)])
    monkeypatch.setattr(tune_triton, "BYTES", 4096)
    monkeypatch.setattr(tune_triton, "CHECKED_WIDTH", 300)
    monkeypatch.setattr(tune_triton, "PLAN", tune_triton.Plan(0, least=2))
    monkeypatch.setattr(Tuned, "candidates", lambda each: [SMALL, SMALLER])
    return Run(rows.Environment("r", "2026-01-01", "c", "a GPU", 1, "2", "2", "0"), results=tmp_path / "rows.jsonl")


@pytest.mark.parametrize("op", ["gram", "combine", "mix_"])
def test_every_candidate_is_right_and_has_a_row(op, run):
    assert tune_triton.measure(run, Tuned(op, 2, torch.float32)) in (SMALL, SMALLER)
    assert [row.status for row in run.rows] == ["ok", "ok"] and all(row.p50_ms and row.op == op for row in run.rows)
    assert [row.note for row in rows.read(run.results)] == [
        "columns, warps, stages: (256, 4, 1)",
        "columns, warps, stages: (128, 4, 1)",
    ]


def test_what_is_wrong_is_not_taken_and_the_table_is_written(run, tmp_path, monkeypatch):
    def error(contender, op, make):
        return 1.0 if tuned.SIZES[TWO.key] == SMALL else 0.0

    monkeypatch.setattr(tune_triton.check, "error_on", error)
    file = tmp_path / "tuned.py"
    table = tune_triton.tune(run, [TWO], file)
    assert table == {TWO.key: SMALLER} and not tuned.SIZES
    assert run.rows[0].status.startswith("wrong: 1e+06 times") and run.rows[1].ok
    written = {}
    exec(compile(file.read_text(), file, "exec"), written)
    assert written["SIZES"] == {TWO.key: (128, 4, 1)}
    again = tune_triton.written(file.read_text(), {})
    assert again == tune_triton.TUNED.read_text()
    with pytest.raises(ValueError, match="no table"):
        tune_triton.written("SIZES = 1", {})


def test_after_the_deadline_nothing_is_tried(run, capsys):
    run.allow(minutes=-1)
    assert tune_triton.tune(run, [TWO], None) == {} and "the time was up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({"a": 1.0, "b": 0.97, "c": 2.0}, "b"),
        ({"a": 1.0, "b": 0.985}, "a"),
        ({"b": 3.0, "c": 2.0}, "c"),  # what is in force has failed
        ({}, "a"),
    ],
)
def test_what_gains_enough_is_taken(times, best):
    assert tune_triton.chosen(times, "a") == best


@pytest.mark.parametrize(
    ("spills", "shared", "fault"),
    [(0, 99 << 10, "ok"), (2, 0, "spills registers: 2"), (0, 100 << 10, "102400 bytes of shared memory")],
)
@pytest.mark.parametrize("op", ["gram", "combine", "mix_"])
def test_sizes_whose_kernels_spill_or_do_not_fit_every_gpu_are_not_taken(op, spills, shared, fault, run, monkeypatch):
    each = Tuned(op, 2, torch.float32)
    compiled = SimpleNamespace(n_spills=spills, metadata=SimpleNamespace(shared=shared))
    last = each.kernels(SMALLER)[-1]  # of blocks, where there is such a kernel
    monkeypatch.setitem(last._compiled, "any looks", (compiled, ()))
    taken = tune_triton.measure(run, each)
    assert run.rows[0].ok and run.rows[1].status.startswith(fault)
    assert fault == "ok" or taken == SMALL
