"""GradVac: task gradients turned until their cosines reach running targets."""

import random
from functools import partial

import numpy as np
import pytest
import torch

from fastpcgrad import reference
from fastpcgrad.backends import cpu
from fastpcgrad.methods.gradvac import GradVac
from fastpcgrad.methods.solvers import problems
from tests.methods import contract
from tests.methods.matrices import difference, gram, jacobian, jacobians
from tests.methods.properties import given, integer_rows, prop, st
from tests.methods.random_rows import random_rows


def fixed(**options):
    """A method whose orders do not depend on what else was drawn."""
    return GradVac(generator=torch.Generator().manual_seed(4), **options)


def with_targets(phi, **options):
    method = GradVac(**options)
    method.load_state_dict({"phi": phi})
    return method


@pytest.mark.parametrize(("beta", "eps"), [(0.5, 1e-8), (0.1, 0.0)])
def test_it_is_torchjds_in_every_step(beta, eps):
    """From the same seed, in each of three calls, with targets from those before. Without eps TorchJD divides by zero
    where a gradient is zero. Left out are parallel gradients: what is left of a gradient that its opposite cancels is
    rounding, whose cosine is noise, and the target of 1 that duplicates reach makes both divide by eps alone."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    compared = 0
    kinds = ["independent", "conflicting", "dependent"] + (["zero row"] if eps else [])
    for name, rows in jacobians(kinds):
        if name.startswith("dependent, T=2"):  # of rank 1
            continue
        theirs, ours = torchjd.GradVacWeighting(beta, eps), GradVac(beta, eps)
        for call in range(3):
            J = rows + 0.3 * call * rows.roll(1, 0)
            torch.manual_seed(call)
            expected = theirs(gram(J))
            after = torch.get_rng_state()
            torch.manual_seed(call)
            found = ours.weights(gram(J))
            assert torch.equal(torch.get_rng_state(), after)
            assert difference(J, found, expected) <= 1e-6, name
        compared += 1
    assert compared >= 200


@pytest.fixture(params=["numpy", "torch", "compiled"])
def turned_by(request, monkeypatch):
    """What computes the turns: the compiled library; without it NumPy on a CPU, torch elsewhere."""
    if request.param == "compiled":
        if reason := cpu.why_unavailable("cpu"):
            pytest.skip(reason)
    else:
        monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
        monkeypatch.setattr(problems, "array_module", lambda gram: {"numpy": np, "torch": torch}[request.param])


def drawn_order(task, tasks, generator):
    """The others in the order that ``torch.randperm`` gives; nothing is drawn for one."""
    places = torch.randperm(tasks - 1, generator=generator).tolist() if tasks > 2 else range(tasks - 1)
    return [k + (k >= task) for k in places]


@pytest.mark.parametrize(("beta", "eps"), [(0.5, 1e-8), (0.9, 0.0)])
def test_it_is_the_oracles_in_every_step(beta, eps, turned_by):
    """The turned gradients to 1e-10 of what they are made of, the targets to 1e-12. Left out are duplicates and what
    depends on others: where gradients are parallel, the sine is the root of rounding."""
    kinds = ("plain", "common direction", "conflicting", "zero row", "mixed norms")
    for tasks in (1, 2, 3, 6, 10, 33):
        method = GradVac(beta, eps, generator=torch.Generator().manual_seed(tasks))
        same, targets = torch.Generator().manual_seed(tasks), torch.zeros(tasks, tasks, dtype=torch.float64)
        for seed in range(5 if tasks < 33 else 1):
            rows = random_rows(seed, tasks, tasks, kinds, powers=(-3, 3))
            orders = [drawn_order(i, tasks, same) for i in range(tasks)]
            expected, targets = reference.gradvac(rows, orders, targets, beta, eps)
            found = method.solve(gram(rows)).coefficients
            made_of = found.abs() @ rows.norm(dim=1)
            assert ((found @ rows - expected).norm(dim=1) <= 1e-10 * made_of).all()
            torch.testing.assert_close(method.state_dict()["phi"], targets, rtol=0, atol=1e-12)


@given(integer_rows(max_tasks=2), st.floats(-0.9, 0.9))
@prop
def test_a_turned_gradient_has_the_target_cosine(rows, target):
    """With two tasks: the cosine becomes the target where it was below, and stays as it is elsewhere."""
    if len(rows) == 1 or not rows.any(dim=1).all():
        return
    before = torch.cosine_similarity(*rows, dim=0)
    if abs(float(before)) > 1 - 1e-9:  # no plane to turn in
        return
    method = with_targets(torch.full((2, 2), target, dtype=torch.float64), eps=0.0)
    turned = method.solve(gram(rows)).coefficients @ rows
    expected = max(float(before), target)
    for i, other in ((0, 1), (1, 0)):
        assert float(torch.cosine_similarity(turned[i], rows[other], dim=0)) == pytest.approx(expected, abs=1e-9)


@given(integer_rows())
@prop
def test_targets_follow_the_cosines(rows):
    """φ̂ ← (1 − β) φ̂ + β φ, with φ before the turn; for a task's first turn that is the cosine of the gradients."""
    method = GradVac(beta=1.0, eps=0.0)
    method.weights(gram(rows))
    phi = method.state_dict()["phi"]
    assert bool((phi.abs() <= 1).all()) and not phi.diagonal().any()
    if len(rows) == 2 and rows.any(dim=1).all():
        cosine = torch.cosine_similarity(*rows, dim=0)
        torch.testing.assert_close(phi, cosine * (1 - torch.eye(2, dtype=torch.float64)))


def test_two_tasks_by_hand():
    """cos = −0.6, targets 0: a = 1·(0·0.8 + 0.6·1)/(1·1) = 0.6; then φ̂ = −0.3."""
    method = GradVac(eps=0.0)
    grams = torch.tensor([[1.0, -0.6], [-0.6, 1.0]], dtype=torch.float64)
    solution = method.solve(grams)
    torch.testing.assert_close(solution.coefficients, torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(solution.weights, torch.tensor([1.6, 1.6], dtype=torch.float64))
    torch.testing.assert_close(
        method.state_dict()["phi"], torch.tensor([[0.0, -0.3], [-0.3, 0.0]], dtype=torch.float64)
    )


def test_gradients_that_agree_are_summed_at_first():
    grams = gram(jacobian("independent", 4, seed=0).abs())
    solution = GradVac().solve(grams)
    assert torch.equal(solution.coefficients, torch.eye(4, dtype=torch.float64))


def test_zero_gradients_and_a_target_of_one_change_nothing_without_eps():
    rows = jacobian("zero row", 3, seed=0)
    method = with_targets(torch.ones(3, 3, dtype=torch.float64), eps=0.0)
    assert torch.equal(method.solve(gram(rows)).coefficients, torch.eye(3, dtype=torch.float64))


def test_a_batch_is_a_loop():
    """Orders are drawn problem by problem."""
    rows = [jacobian(kind, 4, seed=11) for kind in ("independent", "conflicting", "opposite", "zero row")]
    method, generator = fixed(eps=0.0), torch.Generator().manual_seed(4)
    single = [GradVac(eps=0.0, generator=generator) for _ in rows]
    for _ in range(3):
        together = method.solve(torch.stack([gram(matrix) for matrix in rows]))
        for s, matrix in enumerate(rows):
            alone = single[s].solve(gram(matrix))
            torch.testing.assert_close(together.weights[s], alone.weights)
            torch.testing.assert_close(together.coefficients[s], alone.coefficients)
    phis = torch.stack([one.state_dict()["phi"] for one in single])
    torch.testing.assert_close(method.state_dict()["phi"], phis)


def test_not_finite(turned_by):
    contract.check_not_finite_stays_in_its_problem(fixed)


@pytest.mark.parametrize("backend", ["eager", "cpu-baseline"], indirect=True)
def test_a_gradient_that_is_not_finite_leaves_the_targets_of_its_problem(backend):
    grams = torch.stack([gram(jacobian("conflicting", 3, seed)) for seed in range(3)])
    method = fixed()
    method.weights(grams)
    before = method.state_dict()["phi"]
    grams[1, 0, 0] = torch.nan
    assert method.weights(grams)[1].isnan().all()
    after = method.state_dict()["phi"]
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])


def test_scaled_gradients_give_the_same_weights_without_eps():
    contract.check_scaled_gradients_give_the_same_weights(partial(fixed, eps=0.0))


def test_it_resumes_from_its_state():
    grams = [gram(jacobian("conflicting", 4, seed)) for seed in range(6)]
    whole, first = fixed(), fixed()
    expected = [whole.weights(matrix) for matrix in grams]
    for matrix in grams[:3]:
        first.weights(matrix)
    second = GradVac(generator=first.generator)
    second.load_state_dict(first.state_dict())
    for matrix, weights in zip(grams[3:], expected[3:], strict=True):
        assert torch.equal(second.weights(matrix), weights)


def test_the_state_is_a_copy_and_reset_forgets_it():
    method, matrix = GradVac(), gram(jacobian("conflicting", 3, seed=0))
    method.weights(matrix)
    state = method.state_dict()
    kept = state["phi"].clone()
    state["phi"].zero_()
    assert torch.equal(method.state_dict()["phi"], kept)
    method.weights(matrix)
    other, given = GradVac(), kept.clone()
    other.load_state_dict({"phi": given})
    given.zero_()
    assert torch.equal(other.state_dict()["phi"], kept)
    method.reset()
    assert method.state_dict() == {"phi": None}
    method.load_state_dict({"phi": None})


def test_a_state_may_have_any_strides():
    matrix, phi = gram(jacobian("conflicting", 4, seed=0)), torch.rand(4, 4, dtype=torch.float64)
    found = [with_targets(given, generator=torch.Generator().manual_seed(4)) for given in (phi, phi.T.contiguous().T)]
    assert torch.equal(*(method.weights(matrix) for method in found))
    assert torch.equal(*(method.state_dict()["phi"] for method in found))


@pytest.mark.parametrize("module", [np, torch], ids=["numpy", "torch"])
def test_in_a_surgery_each_pair_of_tasks_has_a_target_of_its_own(module, monkeypatch):
    """Two of four tasks at a time, so that no order is drawn; the first steps do not know the last task."""
    monkeypatch.setattr(problems, "array_module", lambda gram: module)
    method = GradVac(beta=0.3, eps=0.0)
    surgery, targets = contract.Surgery(method, 4), {}
    for call, (a, b) in enumerate([(0, 1), (1, 2), (0, 2), (0, 1), (1, 3), (1, 2), (0, 3), (2, 3), (0, 1)]):
        rows = jacobian("conflicting" if call % 3 else "independent", 2, seed=call)
        report = surgery.merge({b: rows[1], a: rows[0]})
        target = targets.get((a, b), 0.0)
        cosine = float(torch.cosine_similarity(*rows, dim=0))
        alone = with_targets(torch.full((2, 2), target, dtype=torch.float64), eps=0.0)
        torch.testing.assert_close(report.weights, alone.weights(gram(rows)))
        targets[a, b] = 0.7 * target + 0.3 * cosine
        phi = method.state_dict()["phi"]
        found = {(i, j): float(phi[i, j]) for i, j in targets}
        assert found == pytest.approx(targets, abs=1e-12)
        assert torch.equal(phi, phi.mT) and int((phi != 0).sum()) == 2 * len(targets)
    assert len(targets) == 6


def test_absent_tasks_keep_their_targets_in_every_problem():
    first, pair = (torch.stack([gram(jacobian("conflicting", n, seed)) for seed in range(3)]) for n in (3, 2))
    method = fixed()
    method.weights(first)
    before = method.state_dict()["phi"]
    pair[1, 0, 0] = torch.nan
    method.solve_for(pair, (0, 2))
    after = method.state_dict()["phi"]
    moved = torch.zeros(3, 3, 3, dtype=torch.bool)
    moved[:, [0, 2], [2, 0]] = torch.tensor([True, False, True])[:, None]
    assert torch.equal(before != after, moved)


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 3)])
def test_the_state_is_not_used_for_other_tasks(shape):
    method = GradVac()
    method.weights(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"state is for \[3, 3\].*reset"):
        method.weights(torch.eye(shape[-1], dtype=torch.float64).expand(shape))


def test_the_state_is_not_used_for_other_problems_in_a_surgery():
    method = GradVac()
    method.weights(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"gram is \[2, 3, 3\], the state is for \[3, 3\].*reset"):
        method.solve_for(torch.eye(3, dtype=torch.float64).repeat(2, 1, 1), range(3))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, ["phi"]),
        ({"phi": None, "beta": 1}, ["phi", "beta"]),
        ({"phi": torch.zeros(2, 3).double()}, ["phi", "[2, 3]"]),
        ({"phi": torch.zeros(2, 2)}, ["phi", "float32"]),
        ({"phi": [0.0]}, ["phi", "[0.0]"]),
        ({"phi": torch.full((2, 2), 1.5).double()}, ["phi", "1.5"]),
    ],
)
def test_a_bad_state_is_refused(state, words):
    with pytest.raises(ValueError) as caught:
        GradVac().load_state_dict(state)
    assert all(word in str(caught.value) for word in words)


def test_a_python_generator_orders_the_turns_too():
    matrix = gram(jacobian("conflicting", 5, seed=0))
    before = random.getstate(), torch.get_rng_state()
    found = {tuple(GradVac(generator=random.Random(seed)).weights(matrix).tolist()) for seed in (1, 1, 2)}
    assert len(found) == 2
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_bad_grams_are_refused():
    contract.check_bad_grams_are_refused(GradVac)


def test_in_a_surgery():
    contract.check_surgery(fixed)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"beta": 1.5}, ValueError, ["beta", "1.5"]),
        ({"beta": float("nan")}, ValueError, ["beta", "nan"]),
        ({"eps": -1e-8}, ValueError, ["eps", "-1e-08"]),
        ({"eps": float("inf")}, ValueError, ["eps", "inf"]),
        ({"generator": 3}, TypeError, ["generator", "3"]),
    ],
)
def test_bad_arguments_name_what_was_found(arguments, error, words):
    with pytest.raises(error) as caught:
        GradVac(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_repr_says_what_was_chosen():
    assert repr(GradVac(beta=0.2)) == "GradVac(beta=0.2, eps=1e-08)"
