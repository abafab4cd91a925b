"""Batches of one task: in the sampler's order, every row once an epoch."""

import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler, WeightedRandomSampler

from fastpcgrad.integrations.task_batches import (
    TaskBatchSampler,
    TaskCollator,
    TaskDatasets,
    names_in,
    one_task,
    tasks_of_rows,
)


def test_batches_of_a_sampler_that_keeps_tasks_apart_are_its_own():
    tasks = [0, 0, 1, 1, 0, 0, 2, 2]
    assert list(TaskBatchSampler(SequentialSampler(tasks), tasks, 2, False)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("drop_last", [True, False])
def test_every_row_comes_once_in_batches_of_one_task(drop_last):
    tasks = torch.randint(0, 4, (61,)).tolist()
    sampler = TaskBatchSampler(RandomSampler(tasks), tasks, 4, drop_last)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(len({tasks[i] for i in batch}) == 1 for batch in batches)
    rows = [i for batch in batches for i in batch]
    assert len(rows) == len(set(rows))
    if drop_last:
        assert {len(batch) for batch in batches} == {4}
    else:
        assert sorted(rows) == list(range(61))
    assert batches != list(sampler), "the sampler draws anew"


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_have_the_parts_of_larger_batches(processes):
    """Of one task and one size in each turn; every row comes, few twice."""
    tasks = torch.randint(0, 4, (61,)).tolist()
    for drop_last in (False, True):
        several = TaskBatchSampler(SequentialSampler(tasks), tasks, 4, drop_last, processes)
        one = TaskBatchSampler(SequentialSampler(tasks), tasks, 4 * processes, drop_last)
        batches, larger = list(several), list(one)
        assert len(batches) == len(several) == processes * len(one)
        for group, start in zip(larger, range(0, len(batches), processes), strict=True):
            parts = batches[start : start + processes]
            rows = [i for part in parts for i in part]
            assert len({len(part) for part in parts}) == 1
            assert rows[: len(group)] == group and len(rows) - len(group) < processes
            assert set(rows) == set(group)
    assert list(TaskBatchSampler(SequentialSampler([5]), [0], 4, False, processes)) == [[0]] * processes
    drawn = TaskBatchSampler(WeightedRandomSampler([1.0] * 61, 120), tasks, 4, False, processes)
    assert len(list(drawn)) == len(drawn) and all(len(batch) == 4 for batch in drawn)


def test_a_sampler_that_draws_with_replacement_makes_as_many_full_batches():
    tasks = [0] * 5 + [1] * 5
    sampler = TaskBatchSampler(WeightedRandomSampler([1.0] * 10, 10), tasks, 3, False)
    for _ in range(5):
        batches = list(sampler)
        assert len(batches) == len(sampler) == 3
        assert all(len(batch) == 3 and len({tasks[i] for i in batch}) == 1 for batch in batches)


def test_tasks_of_rows_are_found_where_they_are():
    rows = [{"x": 1, "task": "a"}, {"x": 2, "task": "b"}]
    assert tasks_of_rows(rows, "task") == ["a", "b"]
    assert tasks_of_rows([{"t": torch.tensor(1)}, {"t": 0}], "t") == [1, 0]
    assert tasks_of_rows(rows, "other") is None
    assert tasks_of_rows(iter(rows), "task") is None
    assert tasks_of_rows([1, 2], "task") is None
    both = TaskDatasets({"a": rows[:1], "b": rows[1:] * 2}, "id")
    assert tasks_of_rows(both, "id") == ["a", "b", "b"] and both[2] == {"x": 2, "task": "b", "id": "b"}
    with pytest.raises(TypeError, match=r"train_dataset\['a'\] has no length.*column 'id'"):
        TaskDatasets({"a": iter(rows)}, "id")


def test_names_and_numbers_of_tasks():
    assert names_in(["b", "a", "b"]) == ["a", "b"] and names_in([0, 2]) == 3
    with pytest.raises(TypeError, match="all names or all indices"):
        names_in(["a", 1])


def test_a_collator_does_not_see_the_task():
    def collated(rows):
        assert all(set(row) == {"x"} for row in rows)
        return {"x": [row["x"] for row in rows]}

    rows = [{"x": 1, "task": "b"}, {"x": 2, "task": "b"}]
    collator = TaskCollator(collated, "task", ["a", "b"].index, as_tensor=False)
    assert collator(rows) == {"x": [1, 2], "task": 1}
    assert TaskCollator(collated, "task", ["a", "b"].index, as_tensor=True)(rows)["task"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="one task"):
        collator([*rows, {"x": 3, "task": "a"}])


def test_the_task_of_a_batch_in_every_form():
    forms = (torch.tensor([2, 2]), torch.tensor(2), [2, 2], 2, (torch.tensor(2), 2))
    assert [one_task(form, "t") for form in forms] == [2] * len(forms)
    assert one_task(["a", "a"], "t") == one_task("a", "t") == "a"
    for wrong in (torch.tensor([0, 1]), ["a", "b"], []):
        with pytest.raises(ValueError, match="one task"):
            one_task(wrong, "t")
