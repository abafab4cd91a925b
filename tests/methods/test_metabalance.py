"""MetaBalance: the authors' loop over parameters, and what is kept for each task of each."""

import pytest
import torch

import fastpcgrad
from fastpcgrad import reference
from fastpcgrad.methods import MetaBalance
from tests.methods import contract
from tests.methods.properties import given, integer_rows, prop, st
from tests.methods.random_rows import gram, random_rows


def published(parameters, gradients, norms, relax_factor, beta):
    """The authors' optimizer: for each loss and each parameter its moving norm, and the sum of what is scaled by it."""
    sums = [torch.zeros_like(p) for p in parameters]
    for t, row in enumerate(gradients):
        for k, grad in enumerate(row):
            norms[k][t] = norms[k][t] * beta + (1 - beta) * grad.norm()
            sums[k] += (norms[k][0] * grad / norms[k][t]) * relax_factor + grad * (1.0 - relax_factor)
    return sums


@pytest.mark.parametrize("choice", [(0.7, 0.9), (1.0, 0.0), (0.2, 0.5)])
def test_by_parameter_it_is_the_authors_optimizer(choice):
    """Of 24 parameters three steps each: 72 problems a choice."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.zeros(1 + k % 5, 2, dtype=torch.float64, requires_grad=True) for k in range(24)]
    norms = [[torch.zeros(()) for _ in range(3)] for _ in parameters]
    surgery = fastpcgrad.GradientSurgery(parameters, 3, MetaBalance(*choice), granularity="parameter")
    for step in range(3):
        gradients = [
            [10**step * (t + 1) * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
            for t in range(3)
        ]
        for t, row in enumerate(gradients):
            with surgery.task(t):
                sum((p * g).sum() for p, g in zip(parameters, row, strict=True)).backward()
        surgery.merge()
        expected = published(parameters, gradients, norms, *choice)
        torch.testing.assert_close([p.grad for p in parameters], expected)


def test_over_steps_it_is_the_oracle():
    for run in range(50):
        method, known = MetaBalance(0.6, 0.8), torch.zeros(4, dtype=torch.float64)
        for step in range(4):
            rows = random_rows(20 * run + step, 4, 4)
            expected, known = reference.metabalance(rows, known, 0.6, 0.8)
            torch.testing.assert_close(method.weights(gram(rows)), expected, rtol=1e-9, atol=0)


@prop
@given(rows=integer_rows(), relax_factor=st.floats(0, 1), scale=st.sampled_from([1e-8, 1.0, 1e8]))
def test_lengths_are_between_their_own_and_the_main_one(rows, relax_factor, scale):
    weights = MetaBalance(relax_factor).weights(gram(scale * rows))
    before, after = rows.norm(dim=1), weights * rows.norm(dim=1)
    expected = relax_factor * before[0] * (before > 0) + (1 - relax_factor) * before
    torch.testing.assert_close(after, expected)


def test_heads_are_summed():
    trunk, head = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (6, 3))
    surgery = fastpcgrad.GradientSurgery([trunk, head], 2, MetaBalance(1.0))
    rows = torch.randn(2, 6, dtype=torch.float64)
    for t, row in enumerate(rows):
        with surgery.task(t):
            (trunk @ row + (head.sum() if t else 0)).backward()
    surgery.merge()
    torch.testing.assert_close(trunk.grad, rows[0] + rows[0].norm() / rows[1].norm() * rows[1])
    assert head.grad.tolist() == [1.0] * 3


def test_absent_tasks_keep_their_lengths_and_new_ones_begin_with_theirs():
    rows = torch.eye(3, 12, dtype=torch.float64)
    surgery = contract.Surgery(MetaBalance(1.0, 0.5), 3)
    lengths = {0: [], 1: [], 2: []}
    for step, present in enumerate(([0, 1], [0, 2], [0, 1, 2], [0, 1])):
        scales = {t: 2.0**step * (t + 1) for t in present}
        report = surgery.merge({t: scales[t] * rows[t] for t in present})
        means = {}
        for t in present:
            lengths[t].append(scales[t])
            parts = [0.5 ** (len(lengths[t]) - n) for n in range(len(lengths[t]))]
            means[t] = sum(p * x for p, x in zip(parts, lengths[t], strict=True)) / sum(parts)
        expected = torch.tensor([means[0] / means[t] for t in present], dtype=torch.float64)
        torch.testing.assert_close(report.weights, expected)
    with pytest.raises(ValueError, match="MetaBalance has task 0 as its main task, which is absent"):
        surgery.merge({1: rows[1], 2: rows[2]})


def test_a_resumed_run_goes_on_with_the_same_numbers():
    method, resumed = MetaBalance(), MetaBalance()
    for seed in range(3):
        method.weights(gram(random_rows(seed, 4, 4)))
    resumed.load_state_dict(method.state_dict())
    for seed in range(3, 6):
        matrix = gram(random_rows(seed, 4, 4))
        assert torch.equal(resumed.weights(matrix), method.weights(matrix))
    assert method.known_tasks == 4
    method.reset()
    assert method.state_dict() == {"averages": None, "steps": None}


def test_the_contract():
    contract.check_batch_is_a_loop(MetaBalance)
    contract.check_not_finite_stays_in_its_problem(MetaBalance)
    contract.check_scaled_gradients_give_the_same_weights(MetaBalance)
    contract.check_surgery(MetaBalance)
    contract.check_bad_grams_are_refused(MetaBalance)


def test_what_is_not_finite_is_not_kept():
    method, alone = MetaBalance(), MetaBalance()
    good, bad = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, torch.nan], [torch.nan, 4.0]]).double()
    for each in (method, alone):
        each.weights(good)
    assert method.weights(bad).isnan().all()
    assert torch.equal(method.weights(4 * good), alone.weights(4 * good))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"averages": None}, ["averages and steps", "['averages']"]),
        ({"averages": torch.ones(2), "steps": None}, ["averages", "float64", "float32"]),
        ({"averages": torch.ones(2).double(), "steps": None}, ["same tasks"]),
        ({"averages": torch.ones(2).double(), "steps": torch.ones(3).double()}, ["same tasks"]),
    ],
)
def test_bad_states_are_refused(state, words):
    with pytest.raises(ValueError) as caught:
        MetaBalance().load_state_dict(state)
    assert all(word in str(caught.value) for word in words)


def test_bad_arguments():
    for arguments, words in (((1.5,), "relax_factor.*1.5"), ((0.7, 1.0), "beta.*1.0")):
        with pytest.raises(ValueError, match=words):
            MetaBalance(*arguments)
    with pytest.raises(ValueError, match="call reset"):
        method = MetaBalance()
        method.weights(torch.eye(2, dtype=torch.float64))
        method.weights(torch.eye(3, dtype=torch.float64))
    assert repr(MetaBalance()) == "MetaBalance(relax_factor=0.7, beta=0.9)"
