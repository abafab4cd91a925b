"""CR-MOGM: TorchJD's averages of the weights, around methods of every kind."""

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference
from fastpcgrad.methods import CRMOGM
from tests.methods import contract
from tests.methods.matrices import gram, jacobian
from tests.methods.properties import given, integer_rows, prop, st
from tests.methods.random_rows import random_rows

T = 4
WRAPPED = {
    "MGDA": methods.MGDA,
    "UPGrad": methods.UPGrad,
    "NashMTL": lambda: methods.NashMTL(update_weights_every=2),
    "GradVac": lambda: methods.GradVac(generator=torch.Generator().manual_seed(0)),
    "PCGrad": lambda: methods.PCGrad("tensorflow", "mean"),
    "RandomWeights": lambda: methods.RandomWeights(torch.Generator().manual_seed(0)),
    "CRMOGM": lambda: CRMOGM(methods.MGDA(), 0.5),
}
for_each = pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)


def steps(count, seed=0):
    return [gram(jacobian("conflicting", T, 100 * seed + step)) for step in range(count)]


@for_each
def test_it_averages_what_the_method_gives(make):
    method, alone, known = CRMOGM(make(), 0.7), make(), None
    for matrix in steps(6):
        known = reference.averaged_weights(alone.weights(matrix), known, 0.7)
        torch.testing.assert_close(method.weights(matrix), known)


def test_it_is_torchjds():
    """Forty runs of six steps, half of them from initial weights, and α changes on the way."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(40):
        initial = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) if seed % 2 else None
        theirs = aggregation.CRMOGMWeighting(aggregation.IMTLGWeighting(), 0.9, initial)
        ours = CRMOGM(methods.IMTLG(), 0.9, initial)
        for step, matrix in enumerate(steps(6, seed)):
            theirs.alpha = ours.alpha = 0.9 if step < 3 else 0.2 * seed / 40
            torch.testing.assert_close(ours.weights(matrix), theirs(matrix), rtol=1e-9, atol=1e-12)


@prop
@given(rows=integer_rows(), alpha=st.floats(0, 1))
def test_averages_of_convex_combinations_are_convex_combinations(rows, alpha):
    method = CRMOGM(methods.MGDA(), alpha)
    for scale in (1.0, 1e-3, 1e5):
        weights = method.weights(gram(scale * rows + torch.eye(len(rows), 6, dtype=torch.float64)))
        assert weights.min() >= 0 and float(weights.sum()) == pytest.approx(1)


def test_the_ends_of_alpha():
    kept, free, alone = CRMOGM(methods.MGDA(), 1.0), CRMOGM(methods.MGDA(), 0.0), methods.MGDA()
    first, *others = steps(4)
    for matrix in (first, *others):
        assert torch.equal(kept.weights(matrix), alone.weights(first))
        assert torch.equal(free.weights(matrix), alone.weights(matrix))


@for_each
def test_a_resumed_run_goes_on_with_the_same_numbers(make):
    method, resumed = CRMOGM(make(), 0.8), CRMOGM(make(), 0.8)
    for matrix in steps(3):
        method.weights(matrix)
    resumed.load_state_dict(method.state_dict())
    if method.generator is not None:
        resumed.generator.set_state(method.generator.get_state())
    for matrix in steps(3, seed=1):
        assert torch.equal(resumed.weights(matrix), method.weights(matrix))
    method.reset()
    assert method.state_dict()["average"] is None and method.known_tasks == 0


def test_the_average_of_an_absent_task_stays_and_a_new_one_begins_with_its_own():
    rows = [jacobian("conflicting", 3, seed) for seed in range(4)]
    surgery = contract.Surgery(CRMOGM(methods.MGDA(), 0.5), 3)
    known = {}
    for step, present in enumerate(([0, 2], [0, 1, 2], [1, 2], [0, 1])):
        report = surgery.merge({t: rows[step][t] for t in present})
        new = methods.MGDA().weights(gram(rows[step][present]))
        for t, weight, own in zip(present, report.weights, new, strict=True):
            known[t] = 0.5 * known.get(t, own) + 0.5 * own
            torch.testing.assert_close(weight, known[t])
        torch.testing.assert_close(surgery.parameter.grad, report.weights @ rows[step][present])


def test_initial_weights_belong_to_tasks_by_their_index():
    method = CRMOGM(methods.Sum(), 0.5, [3.0, 5.0, 7.0])
    matrix = torch.eye(2, dtype=torch.float64)
    assert method.solve_for(matrix, [0, 2]).weights.tolist() == [2.0, 4.0]
    assert method.solve_for(matrix, [1, 2]).weights.tolist() == [3.0, 2.5]
    with pytest.raises(ValueError, match=r"initial_weights has 3 numbers.* task 3"):
        method.solve_for(matrix, [0, 3])
    with pytest.raises(ValueError, match=r"initial_weights has 3 .* found 2"):
        CRMOGM(methods.Sum(), 0.5, [3.0, 5.0, 7.0]).weights(matrix)


def test_problems_keep_averages_of_their_own():
    first, second = (torch.stack([gram(random_rows(seed + s, T, T)) for s in range(3)]) for seed in (0, 3))
    together = CRMOGM(methods.MGDA(), 0.6)
    together.weights(first)
    found = together.weights(second)
    for s in range(3):
        alone = CRMOGM(methods.MGDA(), 0.6)
        alone.weights(first[s])
        torch.testing.assert_close(found[s], alone.weights(second[s]))


def test_what_is_not_finite_stays_in_its_step_and_its_problem():
    healthy = torch.stack(steps(2))
    broken = healthy.clone()
    broken[1, 0, 0] = torch.nan
    method, alone = CRMOGM(methods.MGDA(), 0.6), CRMOGM(methods.MGDA(), 0.6)
    for each in (method, alone):
        each.weights(healthy)
    found = method.weights(broken)
    assert found[1].isnan().all() and found[0].isfinite().all()
    assert torch.equal(method.state_dict()["average"][1], alone.state_dict()["average"][1])
    never = CRMOGM(methods.MGDA(), 0.6)
    assert never.weights(broken[1]).isnan().all()
    assert torch.equal(never.weights(healthy[0]), methods.MGDA().weights(healthy[0]))


def test_in_a_surgery():
    contract.check_surgery(lambda: CRMOGM(methods.MGDA()))


def test_it_takes_the_scope_and_the_partial_sums_of_its_method():
    assert CRMOGM(methods.PCGrad("tensorlogic")).scope == "parameter"
    weights = torch.ones(3, dtype=torch.float64)
    inner = methods.PCGrad("pytorch-pcgrad")
    assert torch.equal(CRMOGM(inner).partial_weights(weights), inner.partial_weights(weights))


@pytest.mark.parametrize("method", [methods.GradDrop(), methods.TrimmedMean(1), methods.MoCo()])
def test_methods_without_weights_are_refused_by_name(method):
    with pytest.raises(TypeError, match=f"found {type(method).__name__}.*works on the rows"):
        CRMOGM(method)


def test_other_tasks_and_problems_are_refused():
    method = CRMOGM(methods.MGDA())
    method.weights(torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"gram is \[3, 3\].* is \[2\]; call reset"):
        method.weights(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"gram is \[2, 2, 2\]"):
        method.solve_for(torch.ones(2, 2, 2, dtype=torch.float64), [0, 1])


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, ["average", "[]"]),
        ({"average": None, "phi": None}, ["phi"]),
        ({"average": torch.ones(2)}, ["float64", "float32"]),
        ({"average": torch.ones(1, 2, 2).double()}, ["[1, 2, 2]"]),
        ({"average": 1.0}, ["average", "1.0"]),
        ({"average": None, "method.phi": None}, ["no state", "phi"]),
    ],
)
def test_bad_states_are_refused_and_change_nothing(state, words):
    method = CRMOGM(methods.MGDA())
    method.weights(torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError) as caught:
        method.load_state_dict(state)
    assert all(word in str(caught.value) for word in words)
    assert method.state_dict()["average"].tolist() == [0.5, 0.5]


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"method must be .*found 'MGDA'"):
        CRMOGM("MGDA")
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            CRMOGM(methods.MGDA(), bad)
    assert repr(CRMOGM(methods.Sum(), 0.5, [1, 2])) == "CRMOGM(Sum(), alpha=0.5, initial_weights=[1.0, 2.0])"


def test_a_surgery_resumes():
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def surgery():
        return fastpcgrad.GradientSurgery([x], 3, CRMOGM(methods.MGDA(), 0.5))

    def step(one, seed):
        for t, row in enumerate(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)):
            with one.task(t):
                (x @ row).backward()
        one.merge()
        return x.grad.clone()

    first, second = surgery(), surgery()
    step(first, 0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(step(first, 1), step(second, 1))
