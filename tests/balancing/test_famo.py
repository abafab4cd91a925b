"""FAMO against its formulas, differentiated by autograd as the authors' code does."""

from functools import partial

import pytest
import torch

from fastpcgrad.balancing import FAMO


class Formula:
    """Losses in, the scalar to be differentiated out; then the losses after the step."""

    def __init__(self, tasks, least, optimizer):
        self.logits = torch.zeros(tasks, dtype=torch.float64, requires_grad=True)
        self.least = least
        self.optimizer = optimizer([self.logits])

    def scalar(self, losses):
        self.before = losses.detach()
        z = self.logits.detach().softmax(0)
        excess = losses - self.least + 1e-8
        return (z * excess.log()).sum() / (z / excess).sum().detach()

    def update(self, losses):
        fall = (self.before - self.least + 1e-8).log() - (losses - self.least + 1e-8).log()
        with torch.enable_grad():
            (self.logits.grad,) = torch.autograd.grad(self.logits.softmax(0), self.logits, fall)
        self.optimizer.step()


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.025, weight_decay=1e-3)


@pytest.mark.parametrize("optimizer", [None, partial(torch.optim.SGD, lr=0.5, weight_decay=0.01)])
@pytest.mark.parametrize("least", [[0.0, 0.0, 0.0], [0.125, 0.0, -1.0]])
def test_training_follows_the_formula(optimizer, least):
    matrix = torch.randn(3, 5, dtype=torch.float64)
    targets = torch.tensor([1.0, 5.0, 30.0], dtype=torch.float64)
    balancer = FAMO(3, least, optimizer).double()
    formula = Formula(3, torch.tensor(least, dtype=torch.float64), optimizer or adam)

    def losses(x):
        return (matrix @ x - targets).square() + 0.2

    x, y = (torch.zeros(5, dtype=torch.float64, requires_grad=True) for _ in "xy")
    for _ in range(100):
        (by_balancer,) = torch.autograd.grad(balancer(losses(x)).sum(), x)
        (by_formula,) = torch.autograd.grad(formula.scalar(losses(y)), y)
        torch.testing.assert_close(by_balancer, by_formula, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            x -= 1e-3 * by_balancer
            y -= 1e-3 * by_formula
            balancer.update(list(losses(x)))
            formula.update(losses(y))
        torch.testing.assert_close(balancer.logits.data, formula.logits.data, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(balancer.weights.sum().item(), 1.0)
    assert balancer.logits.abs().max() > 0.05


def test_a_step_worked_by_hand():
    """z = (½, ½), losses 1 and 3: z/D = (½, ⅙), so w = (¾, ¼). The logs fall by ln 4 and 0: δ = ¼ (ln 4, −ln 4)."""
    balancer = FAMO(2, optimizer=partial(torch.optim.SGD, lr=1.0)).double()
    balancer(torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(balancer.weights, torch.tensor([0.75, 0.25], dtype=torch.float64))
    balancer.update(torch.tensor([0.25, 3.0], dtype=torch.float64))
    fall = torch.tensor(4.0, dtype=torch.float64).log() / 4
    # 1e-8 beside losses of 0.25 and more
    torch.testing.assert_close(balancer.logits.data, torch.stack([-fall, fall]), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("variant", "gamma"), [(None, 1e-3), ("libmtl", 1e-3), ("famo", 1e-2), ("famo-experiments", 1e-5)]
)
def test_variants_decay_as_published(variant, gamma):
    """Against the rule of Cranial-XIX/FAMO (commit 250873e), famo.py, in 200 steps."""
    balancer = FAMO(3, variant=variant).double()
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.025, weight_decay=gamma)
    for before, after in torch.rand(200, 2, 3, dtype=torch.float64) + 0.1:
        shares = torch.softmax(w, -1) / (before + 1e-8)
        balancer(before)
        torch.testing.assert_close(balancer.weights, (shares / shares.sum()).detach())
        delta = (before + 1e-8).log() - (after + 1e-8).log()
        (w.grad,) = torch.autograd.grad(torch.softmax(w, -1), w, grad_outputs=delta)
        optimizer.step()
        balancer.update(after)
    torch.testing.assert_close(balancer.logits.data, w.detach(), rtol=1e-9, atol=1e-12)
    assert w.detach().abs().max() > 0.1


def test_a_resumed_run_gives_the_same_numbers(tmp_path):
    losses = torch.rand(20, 2, 3) + 0.1

    def advance(balancer, steps):
        for before, after in steps:
            balancer(before)
            balancer.update(after)

    straight, resumed = FAMO(3), FAMO(3)
    advance(straight, losses[:10])
    torch.save(straight.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for balancer in (straight, resumed):
        advance(balancer, losses[10:])
    assert torch.equal(straight.logits, resumed.logits)
    assert straight.logits.abs().max() > 0.01


def test_an_update_needs_the_losses_before_it():
    balancer = FAMO(2)
    with pytest.raises(RuntimeError, match="before the step"):
        balancer.update(torch.ones(2))
    balancer(torch.ones(2))
    balancer.update(torch.ones(2))
    with pytest.raises(RuntimeError, match="before the step"):
        balancer.update(torch.ones(2))


def test_a_loss_that_is_not_finite_shows_and_moves_nothing():
    assert FAMO(2)(torch.tensor([torch.nan, 1.0])).isnan().tolist() == [True, False]
    for before, after in ([1.0, torch.nan], [1.0, torch.inf], [torch.nan, 1.0], [torch.inf, torch.inf]):
        balancer = FAMO(2)
        balancer(torch.tensor([before, 1.0]))
        balancer.update(torch.tensor([after, 1.0]))
        assert balancer.logits.tolist() == [0.0, 0.0], (before, after)
        with pytest.raises(RuntimeError, match="before the step"):
            balancer.update(torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"min_losses": [0.0]}, ValueError, ["min_losses", "2", "[0.0]"]),
        ({"min_losses": [0.0, float("inf")]}, ValueError, ["min_losses", "inf"]),
        ({"variant": "paper"}, ValueError, ["variant", "paper", "famo-experiments"]),
        ({"variant": "famo", "optimizer": torch.optim.Adam}, ValueError, ["variant", "famo", "optimizer"]),
        ({"optimizer": "adam"}, TypeError, ["optimizer", "adam"]),
        ({"optimizer": lambda parameters: None}, TypeError, ["optimizer", "None"]),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error) as caught:
        FAMO(2, **arguments)
    assert all(word in str(caught.value) for word in words)
