"""GradientSurgery: tasks, micro-batches, what exceptions leave, the life of .grad."""

import itertools
import random

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference
from tests.linear_problems import linear_loss, random_problem
from tests.surgery.setting import FIXED, Setting, assert_unchanged, snapshot


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_tasks_may_come_in_any_order(order):
    setting = Setting()
    setting.fill(*order)
    assert setting.surgery.merge().tasks == (0, 1, 2)
    setting.assert_grad(setting.oracle(0, 1, 2))


@pytest.mark.parametrize("present", [(0,), (2,), (0, 1), (1, 2), (2, 0)], ids=str)
def test_absent_tasks_take_no_part(present):
    setting = Setting(method=methods.PCGrad("pytorch-pcgrad", generator=random.Random(1)))
    setting.fill(*present)
    assert setting.surgery.merge().tasks == tuple(sorted(present))
    setting.assert_grad(setting.oracle(*present, variant="pytorch-pcgrad", generator=random.Random(1)))


def test_a_task_that_touches_nothing_is_present_with_a_zero_gradient():
    setting = Setting(method=methods.PCGrad(FIXED, "mean"))
    with setting.surgery.task(0):
        pass
    setting.fill(1)
    report = setting.surgery.merge()
    assert report.tasks == (0, 1)
    assert report.norms[0] == 0
    setting.assert_grad([None if g is None else g / 2 for g in setting.gradients[1]])


def test_a_round_in_which_no_task_touches_anything_leaves_no_gradient():
    setting = Setting()
    with setting.surgery.task(1):
        pass
    setting.surgery.merge()
    setting.assert_grad([None] * 3)


def test_micro_batches_add_up_and_may_alternate_between_tasks():
    setting = Setting()
    for share in (0.25, 0.5, 0.125, 0.125):
        for t in (2, 0, 1):
            with setting.surgery.task(t):
                (setting.loss(t) * share).backward()
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1, 2))


def test_several_backward_passes_inside_one_stay_add_up():
    setting = Setting()
    with setting.surgery.task(0):
        (setting.loss(0) * 0.25).backward()
        (setting.loss(0) * 0.75).backward()
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0))


def test_micro_batches_may_touch_different_parameters():
    setting = Setting()
    first, second, _ = setting.gradients[0]
    for partial in ([first, None, None], [None, second, None]):
        with setting.surgery.task(0):
            linear_loss(setting.parameters, partial).backward()
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0))


def test_rounds_leave_nothing_to_later_rounds():
    """Presence, order and size change from round to round on the same rows."""
    draw = random.Random(2)
    for seed in range(12):
        problem = random_problem(seed)
        parameters, count = problem.parameters(torch.float64), len(problem.gradients)
        rounds = fastpcgrad.GradientSurgery(parameters, count, methods.PCGrad(FIXED))
        for _ in range(4):
            tasks = draw.sample(range(count), draw.randint(1, count))
            # Some gradients are missing this time that were there the last.
            gradients = {t: [g if draw.random() < 0.7 else None for g in problem.gradients[t]] for t in tasks}
            for t in tasks:
                with rounds.task(t):
                    linear_loss(parameters, gradients[t]).backward()
            rounds.merge()
            expected = reference.merge([gradients[t] for t in sorted(tasks)], parameters, FIXED)
            for p, e in zip(parameters, expected, strict=True):
                torch.testing.assert_close(p.grad, e)


@pytest.mark.parametrize("failing", range(3))
def test_an_exception_inside_a_task_makes_it_absent_and_spares_the_others(failing):
    setting = Setting()
    others = [t for t in range(3) if t != failing]
    for t in range(3):
        setting.fails(t) if t == failing else setting.fill(t)
    assert setting.surgery.merge().tasks == tuple(others)
    setting.assert_grad(setting.oracle(*others))


@pytest.mark.parametrize("failing", range(3))
def test_an_exception_in_a_later_micro_batch_drops_the_whole_task(failing):
    setting = Setting()
    setting.fill(0, 1, 2)
    setting.fails(failing)
    others = [t for t in range(3) if t != failing]
    assert setting.surgery.merge().tasks == tuple(others)
    setting.assert_grad(setting.oracle(*others))


@pytest.mark.parametrize("failing", range(3))
def test_a_task_can_be_entered_again_after_an_exception(failing):
    setting = Setting()
    setting.fill(0, 1, 2)
    setting.fails(failing)
    setting.fill(failing)
    assert setting.surgery.merge().tasks == (0, 1, 2)
    setting.assert_grad(setting.oracle(0, 1, 2))


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("there", range(3))
def test_an_exception_leaves_grad_as_it_was_before_the_task(failing, there):
    setting = Setting()
    setting.parameters[there].grad = torch.randn_like(setting.parameters[there])
    before = snapshot(setting.parameters)
    setting.fails(failing)
    assert_unchanged(setting.parameters, before)


def test_grad_is_set_aside_inside_tasks_and_comes_back_until_merge():
    setting = Setting()
    setting.loss(2).backward()
    before = snapshot(setting.parameters)
    for t in range(3):
        with setting.surgery.task(t):
            assert all(p.grad is None for p in setting.parameters)
            setting.loss(t).backward()
        assert_unchanged(setting.parameters, before)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1, 2))


def test_the_merged_gradient_stays_until_the_next_round_begins():
    setting = Setting()
    setting.fill(0, 1)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1))
    with setting.surgery.task(0):
        assert all(p.grad is None for p in setting.parameters)
    assert all(p.grad is None for p in setting.parameters)


def test_a_clone_of_the_merged_gradient_is_the_users_own():
    setting = Setting()
    setting.fill(0, 1)
    setting.surgery.merge()
    clones = [None if p.grad is None else p.grad.clone() for p in setting.parameters]
    for p, clone in zip(setting.parameters, clones, strict=True):
        p.grad = clone
    before = snapshot(setting.parameters)
    setting.fill(1, 2)
    assert_unchanged(setting.parameters, before)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(1, 2))
    for clone, (_, values) in zip(clones, before, strict=True):
        assert clone is None or torch.equal(clone, values)


def test_backward_outside_of_tasks_adds_to_the_merged_gradient():
    setting = Setting()
    setting.fill(0, 1)
    setting.surgery.merge()
    setting.loss(0).backward()
    expected = setting.oracle(0, 1)
    pairs = zip(expected, setting.gradients[0], strict=True)
    setting.assert_grad([None if e is None else e + g for e, g in pairs])


def test_merged_gradients_zeroed_in_place_do_not_disturb_the_next_round():
    setting = Setting()
    for _ in range(2):
        setting.fill(0, 1, 2)
        for p in setting.parameters:
            if p.grad is not None:
                p.grad.zero_()
        setting.surgery.merge()
        setting.assert_grad(setting.oracle(0, 1, 2))
        for p in setting.parameters:
            p.grad.zero_()


def test_tasks_do_not_nest_and_the_outer_one_survives_the_attempt():
    setting = Setting()
    setting.fill(1)
    with setting.surgery.task(0):
        with pytest.raises(RuntimeError, match=r"task\(1\) inside task\(0\)"), setting.surgery.task(1):
            raise AssertionError("the inner task was entered")
        setting.loss(0).backward()
    assert setting.surgery.merge().tasks == (0, 1)
    setting.assert_grad(setting.oracle(0, 1))


def test_merge_inside_a_task_raises_and_changes_nothing():
    setting = Setting()
    setting.fill(1)
    with setting.surgery.task(0):
        with pytest.raises(RuntimeError, match=r"merge\(\) inside task\(0\)"):
            setting.surgery.merge()
        setting.loss(0).backward()
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1))


def test_discard_inside_a_task_ends_it_with_the_round_and_says_so_where_it_is_left():
    setting = Setting()
    setting.loss(2).backward()
    before = snapshot(setting.parameters)
    setting.fill(1)
    with pytest.raises(RuntimeError, match=r"discard\(\) inside task\(0\)"), setting.surgery.task(0):
        setting.loss(0).backward()
        setting.surgery.discard()
        assert_unchanged(setting.parameters, before)
    setting.fill(0, 2)
    setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 2))


def test_merge_with_no_task_raises_and_keeps_grad():
    setting = Setting()
    setting.loss(2).backward()
    before = snapshot(setting.parameters)
    with pytest.raises(RuntimeError, match="no task"):
        setting.surgery.merge()
    setting.fails(0)
    with pytest.raises(RuntimeError, match="no task"):
        setting.surgery.merge()
    assert_unchanged(setting.parameters, before)


def test_a_second_merge_of_the_same_round_raises_and_keeps_the_merged_gradient():
    setting = Setting()
    setting.fill(0, 1)
    setting.surgery.merge()
    with pytest.raises(RuntimeError, match="no task"):
        setting.surgery.merge()
    setting.assert_grad(setting.oracle(0, 1))


def test_discard_forgets_the_round_and_keeps_grad():
    setting = Setting()
    setting.loss(2).backward()
    before = snapshot(setting.parameters)
    setting.fill(0, 1)
    setting.surgery.discard()
    assert_unchanged(setting.parameters, before)
    setting.fill(2)
    assert setting.surgery.merge().tasks == (2,)
    setting.assert_grad(setting.oracle(2))
