"""Finite losses that a formula has no answer for: an error that says what was found and what can take them."""

import copy
import pickle
from functools import partial

import pytest
import torch

from fastpcgrad.balancing import DWA, FAMO, STCH, GradNorm, UncertaintyWeighting, refusals
from tests.balancing.test_not_finite import assert_same_bits, state


def gradnorm(balancer, losses, norms=None):
    for t, loss in enumerate(losses):
        balancer.note(t, torch.tensor(loss), torch.tensor(1.0 if norms is None else norms[t]))
    balancer.update()


def famo(balancer, losses, after=None):
    balancer(torch.tensor(losses))
    balancer.update(torch.tensor(losses if after is None else after))


def dwa(balancer, losses):
    balancer(torch.tensor(losses))
    balancer.end_epoch()


REFUSED = {
    "GradNorm, a first loss of 0": (lambda: GradNorm(2, 0.12), gradnorm, [], [1.0, 0.0], ["losses[1] is 0", "L(0) 0"]),
    "GradNorm, a first loss below 0": (lambda: GradNorm(2, 1.0), gradnorm, [], [-2.0, 1.0], ["losses[0] is -2"]),
    "GradNorm, another sign": (
        lambda: GradNorm(3, 0.5),
        gradnorm,
        [[1.0, 2.0, 4.0]],
        [1.0, 1.0, -0.25],
        ["losses[2] is -0.25", "L(0) 4"],
    ),
    "GradNorm, out of range": (lambda: GradNorm(2, 0.5), gradnorm, [[1.0, 1e-42]], [1.0, 1.0], ["losses[1] is 1"]),
    "GradNorm, a power out of range": (
        lambda: GradNorm(4, 70.0),
        gradnorm,
        [[1.0, 1.0, 1.0, 1.0]],
        [1e-3, 1e-3, 1.0, 1e-3],
        ["losses[2] is 1", "powers (70)"],
    ),
    "FAMO, below 0": (lambda: FAMO(2), famo, [], [1.0, -0.5], ["losses[1] is -0.5", "min_losses 0"]),
    "FAMO, below its least": (
        lambda: FAMO(3, [0.25, -1.0, 0.0]),
        famo,
        [[1.0, -0.5, 2.0]],
        [1.0, -1.5, 1.0],
        ["losses[1] is -1.5", "min_losses -1"],
    ),
    "DWA, a mean of 0": (lambda: DWA(2), dwa, [[1.0, 1.0]], [1.0, 0.0], ["task 1", "loss of 0 after one of 1"]),
    "DWA, a first mean below 0": (lambda: DWA(3), dwa, [], [1.0, 1.0, -3.0], ["task 2", "loss of -3:"]),
    "DWA, another sign": (lambda: DWA(2), dwa, [[1.0, 4.0], [1.0, 2.0]], [1.0, -1.0], ["loss of -1 after one of 2"]),
    "DWA, out of proportion": (lambda: DWA(2), dwa, [[1e-42, 1.0]], [1.0, 1.0], ["task 0", "loss of 1 after"]),
}

for_each_refused = pytest.mark.parametrize(
    ("make", "advance", "before", "losses", "words"), REFUSED.values(), ids=REFUSED
)


@for_each_refused
def test_what_a_formula_cannot_take_is_refused_and_changes_nothing(make, advance, before, losses, words):
    balancer = make()
    for earlier in before:
        advance(balancer, earlier)
    saved = state(balancer)
    with pytest.raises(ValueError) as caught:
        advance(balancer, losses)
    for word in (*words, type(balancer).__name__, "STCH"):
        assert word in str(caught.value)
    if isinstance(balancer, DWA):
        # The call itself was in order.
        assert torch.equal(balancer.loss_sum, torch.tensor(losses))
        balancer.loss_sum.zero_()
        balancer.counted.zero_()
    assert_same_bits(state(balancer), saved)


@for_each_refused
def test_where_looking_would_wait_the_step_is_skipped_and_a_later_call_raises(
    late_answers,
    make,
    advance,
    before,
    losses,
    words,
):
    balancer, alone = make(), make()
    for earlier in before:
        advance(balancer, earlier)
        advance(alone, earlier)
    weights = balancer.weights.clone()
    advance(balancer, losses)
    assert torch.equal(balancer.weights, weights)
    good = [1.0] * balancer.num_tasks
    for _ in range(2):
        advance(balancer, good)
        advance(alone, good)
        # No answer is there yet.
        assert_same_bits(state(balancer), state(alone))
    late_answers.arrive()
    with pytest.raises(ValueError) as caught:
        balancer(torch.tensor(good))
    for word in (*words, "STCH", "earlier call"):
        assert word in str(caught.value)
    assert_same_bits(state(balancer), state(alone))


@pytest.mark.parametrize(
    ("balancer", "advance", "move"),
    [
        (GradNorm(2, 0.5), gradnorm, GradNorm.update),
        (FAMO(2), partial(famo, after=[1.0, 1.0]), lambda balancer: balancer.update(torch.ones(2))),
        (DWA(2), dwa, DWA.end_epoch),
    ],
)
def test_what_is_due_comes_before_what_else_a_call_finds(late_answers, balancer, advance, move):
    advance(balancer, [-1.0, 1.0])
    late_answers.arrive()
    with pytest.raises(ValueError, match="earlier call"):
        move(balancer)
    with pytest.raises(RuntimeError):
        move(balancer)


def test_good_answers_raise_nothing_and_are_let_go(late_answers):
    balancer = FAMO(2)
    for _ in range(3):
        famo(balancer, [1.0, 2.0])
    assert len(balancer._refusals._on_their_way) == 6
    late_answers.arrive()
    balancer(torch.ones(2))
    assert len(balancer._refusals._on_their_way) == 1


def test_a_captured_graph_skips_the_step_and_owes_no_answer(monkeypatch):
    monkeypatch.setattr(refusals, "known", lambda flag: None)
    monkeypatch.setattr(refusals, "is_captured", lambda device: True)
    balancer = FAMO(2)
    famo(balancer, [1.0, 2.0], [0.5, 2.0])
    saved = state(balancer)
    famo(balancer, [-1.0, 1.0])
    balancer(torch.ones(2))
    assert_same_bits(state(balancer), saved)


def test_a_copy_owes_no_answers(late_answers):
    balancer = FAMO(2)
    famo(balancer, [-1.0, 1.0])
    copies = [copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))]
    late_answers.arrive()
    for each in copies:
        famo(each, [1.0, 1.0])
    with pytest.raises(ValueError, match="earlier call"):
        famo(balancer, [1.0, 1.0])


def test_a_mean_that_overflows_is_refused():
    balancer = DWA(2)
    for _ in range(2):
        balancer(torch.tensor([2e38, 1.0]))
    with pytest.raises(ValueError, match="task 0 ends the epoch with a mean loss of inf"):
        balancer.end_epoch()


def test_famo_refuses_the_losses_after_the_step_too():
    balancer = FAMO(2)
    balancer(torch.ones(2))
    saved = state(balancer)
    with pytest.raises(ValueError, match=r"losses\[1\] is -2"):
        balancer.update(torch.tensor([1.0, -2.0]))
    assert_same_bits(state(balancer), saved)
    balancer.update(torch.tensor([0.5, 1.0]))
    assert balancer.logits[0] < 0 < balancer.logits[1]


def test_a_step_that_is_not_finite_is_skipped_whatever_else_is_in_it():
    nan = float("nan")
    for balancer, advance in ((GradNorm(2, 0.5), gradnorm), (FAMO(2), famo)):
        advance(balancer, [1.0, 1.0])
        saved = state(balancer)
        advance(balancer, [nan, -1.0])
        assert_same_bits(state(balancer), saved)


@pytest.mark.parametrize("given", [[1.0, 0.0], [-1.0, 1.0]])
def test_initial_losses_that_no_power_takes_are_refused_at_once(given):
    with pytest.raises(ValueError, match="initial_losses must be > 0"):
        GradNorm(2, 0.5, initial_losses=given)
    assert GradNorm(2, 0.0, initial_losses=given).initial_losses.tolist() == given


def test_zeros_that_gradnorm_takes(looks):
    """A first loss of 0 with L(0) given; a loss of 0 later: its target is 0; all at 0: all have learned alike."""
    balancer = GradNorm(2, 1.0, initial_losses=[1.0, 1.0])
    gradnorm(balancer, [0.0, 1.0], [1.0, 1.0])
    torch.testing.assert_close(balancer.weights.data, torch.tensor([0.975, 1.025]))
    gradnorm(balancer, [0.0, 0.0], [1.0, 3.0])
    assert balancer.weights[0] > 0.975, "the longer gradient is pulled to the mean"
    balancer(torch.ones(2))


def test_without_a_restoring_force_gradnorm_takes_any_sign(looks):
    signed, positive = GradNorm(2, 0.0), GradNorm(2, 0.0)
    for losses in ([0.0, -1.0], [-2.0, 1.0], [3.0, 0.0]):
        gradnorm(signed, losses, [1.0, 2.0])
        gradnorm(positive, [1.0, 1.0], [1.0, 2.0])
        assert torch.equal(signed.weights, positive.weights)
    assert signed.weights[0] > 1.01


def test_famo_takes_losses_at_their_least(looks):
    balancer = FAMO(2, [0.0, -1.0])
    famo(balancer, [0.0, 1.0], [0.0, -1.0])
    torch.testing.assert_close(balancer.weights, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-7)
    assert balancer.logits[0] > 0 > balancer.logits[1]


def test_stch_does_not_care_where_zero_is():
    losses = torch.tensor([0.5, -0.25, 0.0])
    here, there = STCH(3, mu=0.5), STCH(3, mu=0.5)
    here(losses)
    there(losses - 2)
    torch.testing.assert_close(here.weights, there.weights)


def test_uncertainty_weighting_takes_a_loss_that_changes_sign():
    balancer = UncertaintyWeighting(2)
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.1)
    for losses in ([1.0, 0.0], [-1.0, 2.0], [1.0, -2.0]):
        s = balancer.log_variance.detach().clone()
        optimizer.zero_grad()
        balancer(torch.tensor(losses)).sum().backward()
        optimizer.step()
        expected = s - 0.1 * (1 - (-s).exp() * torch.tensor(losses)) / 2
        torch.testing.assert_close(balancer.log_variance.data, expected)
