"""MoDo and SDMGrad: TorchJD's numbers, their oracles, products of different batches, tasks that are absent."""

from functools import partial

import pytest
import torch

import fastpcgrad
from fastpcgrad import reference
from fastpcgrad.methods import MoDo, SDMGrad
from tests.methods.properties import given, integer_rows, prop
from tests.methods.random_rows import KINDS, error, gram, random_rows

PREFERRED = [0.5, 1.0, 0.25, 2.0, 0.75, 1.5]
CASES = {
    "MoDo": (MoDo, reference.modo, {}),
    "MoDo, three": (partial(MoDo, batches=3), reference.modo, {}),
    "MoDo, far": (MoDo, reference.modo, {"gamma": 3.0, "rho": 0.0}),
    "SDMGrad": (SDMGrad, reference.sdmgrad, {}),
    "SDMGrad, slow": (SDMGrad, reference.sdmgrad, {"lr": 0.05, "momentum": 0.0, "n_iter": 5, "lambda_": 1.0}),
}


def batches_of(seed, batches, scale=1.0):
    """For each batch J of the same tasks, which differ a little from batch to batch."""
    rows = random_rows(seed, 1, 6, KINDS, powers=(-1, 1)) * scale
    noise = torch.randn(batches, *rows.shape, generator=torch.Generator().manual_seed(seed), dtype=rows.dtype)
    return list(rows + 0.3 * rows.norm(dim=1)[:, None] / rows.shape[1] ** 0.5 * noise)


def merged(method, batches, tasks=None):
    rows = torch.cat(batches)
    weights = method.solve_for(gram(rows), range(len(rows)) if tasks is None else tasks).weights
    return weights, weights @ rows, rows


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_oracles_from_step_to_step(name):
    """From the same shares each time: SDMGrad's steps of 10 make rounding errors grow from one to the next."""
    make, oracle, options = CASES[name]
    for seed in range(40):
        method = make(len(batches_of(seed, 2)[0]), **options)
        shares = torch.full((method.num_tasks,), 1 / method.num_tasks, dtype=torch.float64)
        for step in range(3):
            batches = batches_of(seed, method.batches, scale=1 + step)
            weights, found, rows = merged(method, batches)
            expected, after = oracle(batches, shares, **options)
            assert error(found, expected, weights, rows) <= 1e-9, (seed, step)
            shares = method.state_dict()["weights"] / method.num_tasks
            torch.testing.assert_close(shares, after, rtol=0, atol=1e-9)


def their_weights(theirs, batches):
    return theirs(batches[0] @ batches[1].mT)


def test_modo_equals_torchjd():
    """Their weights of J₁ J₂ᵀ, as their documentation uses them: on the mean of two batches, or on a third."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(100):
        count = 2 + seed % 2
        batches = batches_of(seed, count)
        method, theirs = MoDo(len(batches[0]), batches=count), aggregation.MoDoWeighting(gamma=0.1, rho=0.1)
        for _ in range(2):
            weights, found, rows = merged(method, batches)
            own = their_weights(theirs, batches)
            expected = own @ (sum(batches) / 2 if count == 2 else batches[2])
            assert error(found, expected, weights, rows) <= 1e-10, seed


@pytest.mark.parametrize(("lr", "calls"), [(10.0, 1), (0.5, 2)])
def test_sdmgrad_equals_torchjd(lr, calls):
    """One call with steps of 10, which make rounding errors grow; several with smaller ones."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(100):
        batches = batches_of(seed, 3)
        tasks = len(batches[0])
        pref = torch.tensor(PREFERRED[:tasks], dtype=torch.float64) if seed % 2 else None
        method, theirs = SDMGrad(tasks, lr, pref_vector=pref), aggregation.SDMGradWeighting(lr, pref_vector=pref)
        for _ in range(calls):
            weights, found, rows = merged(method, batches)
            assert error(found, their_weights(theirs, batches) @ batches[2], weights, rows) <= 1e-9, seed


def test_the_simplex_point_is_the_nearest():
    """p is on the simplex, and (y − p)·(e_t − p) ≤ 0 for each corner e_t."""
    for seed in range(50):
        y = 10.0 ** (seed % 5) * torch.randn(1 + seed % 7, generator=torch.Generator().manual_seed(seed)).double()
        p = reference.simplex_point(y)
        assert p.min() >= 0 and float(p.sum()) == pytest.approx(1)
        assert ((y - p) - (y - p) @ p <= 1e-10 * y.abs().max()).all()


@pytest.mark.parametrize("make", [MoDo, SDMGrad])
def test_products_within_a_batch_do_not_matter(make):
    """Of G only the block of the first two batches is looked at."""
    method = make(2)
    rows = torch.randn(2 * method.batches, 9, generator=torch.Generator().manual_seed(0)).double()
    full = gram(rows)
    blank = torch.zeros_like(full)
    blank[:2, 2:4] = full[:2, 2:4]
    torch.testing.assert_close(make(2).weights(full), make(2).weights(blank), rtol=0, atol=0)


@pytest.mark.parametrize("make", [MoDo, SDMGrad])
def test_the_shares_of_absent_tasks_stay(make):
    method, alone = make(3), make(2)
    batches = batches_of(20, method.batches)
    batches = [batch[:3] if len(batch) >= 3 else torch.eye(3, 5).double() * (1 + k) for k, batch in enumerate(batches)]
    rows = [batch * torch.tensor([1.0, 0.2, 3.0]).double()[:, None] for batch in batches]
    first = merged(method, rows)[0]
    before = method.state_dict()["weights"]
    some = [0, 2]
    present = [3 * batch + task for batch in range(method.batches) for task in some]
    alone.load_state_dict({"weights": before[some]})
    found = merged(method, [batch[some] for batch in rows], present)[0]
    torch.testing.assert_close(found, merged(alone, [batch[some] for batch in rows])[0])
    after = method.state_dict()["weights"]
    assert after[1] == before[1] and float(after.sum()) == pytest.approx(3)
    assert float(first.sum()) == pytest.approx(1) == float(found.sum())


@pytest.mark.parametrize("make", [MoDo, SDMGrad])
def test_what_does_not_divide_is_refused(make):
    method = make(2)
    for rows in (1, 3, 2 * method.batches - 1, 2 * method.batches + 2):
        with pytest.raises(ValueError, match=rf"needs the 2 losses of a batch.*{2 * method.batches} in all"):
            method.weights(torch.eye(rows, dtype=torch.float64))
    count = 2 * method.batches
    for tasks in ([0] * (count - 1), [0, 1, 2], [0, 3], [1, 2]):
        with pytest.raises(ValueError, match="the same tasks in each of them"):
            method.solve_for(torch.eye(len(tasks), dtype=torch.float64), tasks)
    assert method.state_dict()["weights"] is None


@pytest.mark.parametrize("make", [MoDo, SDMGrad])
def test_not_finite_stays_in_its_problem_and_out_of_the_state(make):
    method, clean = make(2), make(2)
    count = 2 * method.batches
    grams = torch.stack([gram(random_rows(seed, count, count, powers=(0, 0))) for seed in (0, 1, 2)])
    clean.weights(grams)
    method.weights(grams)
    broken = grams.clone()
    broken[1, 0, -1] = torch.nan
    found, expected = method.weights(broken), clean.weights(grams)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], expected[[0, 2]])
    state = method.state_dict()["weights"]
    assert state.isfinite().all() and torch.equal(state[[0, 2]], clean.state_dict()["weights"][[0, 2]])
    for s in range(3):
        lone = make(2)
        lone.weights(grams[s])
        torch.testing.assert_close(lone.weights(grams[s]), expected[s], rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"what is kept for each task of each problem is \[3, 2\]; call reset"):
        method.weights(grams[0])
    method.reset()
    method.weights(grams[0])


@pytest.mark.parametrize("make", [MoDo, SDMGrad])
def test_a_resumed_run_is_equal_to_the_bit(make):
    method, resumed = make(3), make(3)
    rows = torch.randn(3 * method.batches, 8, generator=torch.Generator().manual_seed(1)).double()
    method.weights(gram(rows))
    state = method.state_dict()
    resumed.load_state_dict(state)
    assert torch.equal(method.weights(gram(rows)), resumed.weights(gram(rows)))
    assert state["weights"] is not resumed.state_dict()["weights"]
    for bad in ({}, {"weights": [1.0]}, {"weights": torch.ones(3)}, {"weights": -torch.ones(1, 3).double()}):
        with pytest.raises(ValueError, match="weights"):
            resumed.load_state_dict(bad)


def test_bad_arguments_are_refused():
    for make in (
        lambda: MoDo(0),
        lambda: MoDo(2, gamma=0.0),
        lambda: MoDo(2, rho=-1.0),
        lambda: MoDo(2, batches=4),
        lambda: MoDo(2, batches=1),
        lambda: SDMGrad(2, lr=-1.0),
        lambda: SDMGrad(2, momentum=1.0),
        lambda: SDMGrad(2, n_iter=0),
        lambda: SDMGrad(2, lambda_=-0.1),
        lambda: SDMGrad(2, norm_eps=-1.0),
        lambda: SDMGrad(2, pref_vector=[1.0]),
    ):
        with pytest.raises(ValueError, match=r"(must (be|not)|has 1 numbers).*found"):
            make()


def test_gradients_that_scale_keep_the_weights_without_norm_eps():
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)).double()
    weights = SDMGrad(2, norm_eps=0.0).weights(gram(rows))
    torch.testing.assert_close(SDMGrad(2, norm_eps=0.0).weights(gram(1e-8 * rows)), weights)
    assert SDMGrad(2, norm_eps=0.0).weights(torch.zeros(6, 6).double())[4:].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("make", [MoDo, SDMGrad])
def test_in_training_losses_are_those_of_one_batch_after_the_other(make):
    """Two steps of the drop-in against the oracle, the second without task 1."""
    method = make(2)
    oracle = reference.modo if make is MoDo else reference.sdmgrad
    x = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD([x], lr=1.0), method=method)
    rows = torch.randn(method.batches, 2, 7, generator=torch.Generator().manual_seed(4)).double()
    shares = torch.full((2,), 0.5, dtype=torch.float64)
    optimizer.pc_backward([row @ x for batch in rows for row in batch])
    expected, shares = oracle(list(rows), shares)
    torch.testing.assert_close(x.grad, expected)
    optimizer.zero_grad()
    optimizer.pc_backward([loss for batch in rows for loss in (batch[0] @ x, None)])
    expected, _ = oracle([batch[:1] for batch in rows], torch.ones(1))
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(method.state_dict()["weights"] / 2, shares)


@prop
@given(rows=integer_rows())
@pytest.mark.parametrize("kind", [MoDo, SDMGrad])
def test_no_task_has_a_place_and_shares_are_of_the_simplex(kind, rows):
    count = kind(1).batches
    batches = [rows.roll(k, dims=1) for k in range(count)]
    options = {"rho": 0.2} if kind is MoDo else {"lr": 0.1}
    method = kind(len(rows), **options)
    weights, _, _ = merged(method, batches)
    turned, _, _ = merged(kind(len(rows), **options), [batch.flip(0) for batch in batches])
    torch.testing.assert_close(turned.view(count, -1).flip(1), weights.view(count, -1), rtol=1e-9, atol=1e-9)
    shares = method.state_dict()["weights"] / len(rows)
    assert shares.min() >= 0 and float(shares.sum()) == pytest.approx(1)
