"""The baselines: weights that do not depend on the task gradients."""

import pytest
import torch

import fastpcgrad
from fastpcgrad.methods.fixed_weights import Constant, Mean, RandomWeights, Sum
from tests.methods.random_rows import error, gram, random_rows


def test_equal_torchjd():
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(200):
        rows = random_rows(seed)
        given = torch.randn(len(rows), dtype=torch.float64)
        for ours, theirs in (
            (Mean(), aggregation.MeanWeighting()),
            (Sum(), aggregation.SumWeighting()),
            (Constant(given), aggregation.ConstantWeighting(given)),
            (RandomWeights(), aggregation.RandomWeighting()),
        ):
            torch.manual_seed(seed)
            weights = ours.weights(gram(rows))
            torch.manual_seed(seed)
            expected = theirs(rows)
            assert error(weights @ rows, expected @ rows, weights, rows) <= 1e-14, (seed, ours)


def test_by_hand():
    eye = torch.eye(4, dtype=torch.float64)
    assert Mean().weights(eye).tolist() == [0.25] * 4
    assert Sum().weights(eye).tolist() == [1.0] * 4
    assert Constant([1, -2, 0, 4]).weights(eye).tolist() == [1.0, -2.0, 0.0, 4.0]


@pytest.mark.parametrize("make", [Mean, Sum, lambda: Constant([1.0, 2.0, 3.0])])
def test_a_batch_has_the_same_weights_for_each_problem(make):
    weights = make().weights(torch.randn(4, 3, 3, dtype=torch.float64))
    single = make().weights(torch.eye(3, dtype=torch.float64))
    assert weights.shape == (4, 3) and weights.dtype == torch.float64
    assert all(torch.equal(weights[s], single) for s in range(4))


def test_random_weights_are_a_softmax_of_normals():
    """The log of a ratio of two is a difference of two standard normals: mean 0, variance 2; 4 standard errors."""
    weights = RandomWeights(torch.Generator().manual_seed(0)).weights(torch.zeros(20_000, 2, 2, dtype=torch.float64))
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(20_000, dtype=torch.float64))
    ratio = (weights[:, 0] / weights[:, 1]).log()
    assert abs(ratio.mean()) < 4 * (2 / 20_000) ** 0.5
    assert abs(ratio.var() - 2) < 4 * 2 * (2 / 20_000) ** 0.5


@pytest.mark.parametrize("tasks", [3, 20])
def test_random_weights_of_a_batch_are_those_of_single_draws(tasks):
    together, single = (RandomWeights(torch.Generator().manual_seed(5)) for _ in "ab")
    gram = torch.eye(tasks, dtype=torch.float64)
    weights = together.weights(gram.repeat(4, 1, 1))
    assert torch.equal(weights, torch.stack([single.weights(gram) for _ in range(4)]))
    assert torch.equal(together.generator.get_state(), single.generator.get_state())


def test_a_given_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    RandomWeights(torch.Generator()).weights(torch.eye(3, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", [Mean(), Sum(), Constant([0.0, 1.0]), RandomWeights()])
def test_what_is_not_finite_reaches_the_merged_gradient_at_its_place(method):
    rows = torch.tensor([[1.0, torch.nan, 2.0], [3.0, 4.0, 5.0]])
    merged = fastpcgrad.combine(rows, method.weights(fastpcgrad.gram(rows)))
    assert merged.isnan().tolist() == [False, True, False]


def test_weights_are_the_callers_own():
    method = Constant([1.0, 2.0])
    eye = torch.eye(2, dtype=torch.float64)
    method.weights(eye).zero_()
    assert method.weights(eye).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("method", "argument", "error", "words"),
    [
        (Constant, [[1.0]], ValueError, ["weights", "[1, 1]"]),
        (Constant, [1.0, float("inf")], ValueError, ["weights", "inf"]),
        (Constant, None, TypeError, ["weights", "None"]),
        (RandomWeights, 3, TypeError, ["generator", "3"]),
    ],
)
def test_bad_arguments(method, argument, error, words):
    with pytest.raises(error) as caught:
        method(argument)
    assert all(word in str(caught.value) for word in words)


def test_weights_of_another_number_of_tasks():
    with pytest.raises(ValueError, match=r"weights has 2 .* found 3"):
        Constant([1.0, 1.0]).weights(torch.eye(3, dtype=torch.float64))


def test_repr():
    assert [repr(m) for m in (Mean(), Sum(), Constant([1]))] == ["Mean()", "Sum()", "Constant(weights=[1.0])"]
    assert repr(RandomWeights()) == "RandomWeights(generator=None)"
