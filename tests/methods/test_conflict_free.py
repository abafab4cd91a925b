"""ConFIG: TorchJD's numbers, equal cosines, hand-worked cases."""

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad.methods.conflict_free import ConFIG
from tests.methods import contract
from tests.methods.random_rows import check_batch, check_broken, check_scales, error, gram, random_rows


def units(rows):
    return torch.nan_to_num(rows / rows.norm(dim=1, keepdim=True))


def relative_singular_values(rows):
    values = torch.linalg.svdvals(units(rows))
    return values / values.max() if values.any() else values


@pytest.mark.parametrize("with_preferences", [False, True])
def test_equals_torchjd(with_preferences):
    """Left out: singular values between dependent and independent, where the two draw the line at different places, and
    preferences without a part in the span of the gradients, where TorchJD normalises rounding."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    compared = 0
    for seed in range(300):
        rows = random_rows(seed)
        preferences = 0.1 + torch.rand(len(rows), dtype=torch.float64) if with_preferences else None
        wanted = torch.ones(len(rows), dtype=torch.float64) if preferences is None else preferences
        values = relative_singular_values(rows)
        between = (values > 1e-12) & (values < 1e-3)
        part = units(rows) @ (torch.linalg.pinv(units(rows)) @ wanted)
        if between.any() or 0 < part.norm() < 1e-9:
            continue
        weights = ConFIG(preferences).weights(gram(rows))
        expected = aggregation.ConFIG(preferences)(rows)
        assert error(weights @ rows, expected, weights, rows) <= 1e-9, seed
        compared += 1
    assert compared >= 200


def test_by_hand():
    """(3, 0) and (0, 1): direction (1, 1)/√2, length 4/√2."""
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(ConFIG().weights(gram(rows)) @ rows, torch.tensor([2.0, 2.0], dtype=torch.float64))


def test_one_task_is_left_as_it_is():
    assert ConFIG().weights(torch.full((1, 1), 9.0, dtype=torch.float64)).tolist() == [1.0]


def test_exact_opposites_cancel():
    rows = torch.tensor([[1.0, 2.0], [-3.0, -6.0]], dtype=torch.float64)
    assert ConFIG().weights(gram(rows)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("tasks", [3, 5, 7])
@pytest.mark.parametrize("turn", [0.0, 0.1, 1.0])
def test_where_the_preferences_have_no_part_in_the_span_rounding_is_no_direction(tasks, turn, solver):
    """Directions around a circle, of any length: their units add up to zero, so that all cosines cannot be equal."""
    angles = turn + 2 * torch.pi * torch.arange(tasks, dtype=torch.float64) / tasks
    rows = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1.0, tasks + 1, dtype=torch.float64)[:, None]
    assert not ConFIG().weights(gram(rows)).any()


def test_a_zero_gradient_has_no_weight_and_changes_nothing():
    rows = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    weights = ConFIG().weights(gram(rows))
    assert weights[1] == 0
    torch.testing.assert_close(weights @ rows, torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert ConFIG().weights(torch.zeros(2, 2, dtype=torch.float64)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_batch(tasks):
    check_batch(ConFIG(), tasks)


@pytest.mark.parametrize("tasks", [1, 4])
def test_what_is_not_finite_stays_in_its_problem(tasks):
    check_broken(ConFIG(), tasks)


def test_scales():
    check_scales(ConFIG(), 5)


@pytest.mark.parametrize(
    ("preferences", "error", "words"),
    [
        ([[1.0, 2.0]], ValueError, ["pref_vector", "[1, 2]"]),
        ([float("nan")], ValueError, ["pref_vector", "nan"]),
        ("ones", TypeError, ["pref_vector", "ones"]),
    ],
)
def test_bad_arguments(preferences, error, words):
    with pytest.raises(error) as caught:
        ConFIG(preferences)
    assert all(word in str(caught.value) for word in words)


def test_preferences_of_another_number_of_tasks():
    with pytest.raises(ValueError, match=r"pref_vector has 2 .* found 3"):
        ConFIG([1.0, 1.0]).weights(torch.eye(3, dtype=torch.float64))


LENGTHS = ["min", "max", "mean", "geometric", "harmonic", 0]
for_each_length = pytest.mark.parametrize("length", LENGTHS)


@for_each_length
@pytest.mark.parametrize("preferred", [False, True])
def test_every_length_is_the_oracles(length, preferred):
    compared = 0
    for seed in range(60):
        rows = random_rows(seed, 1, 6)
        values = relative_singular_values(rows)
        if ((values > 1e-12) & (values < 1e-3)).any():
            continue
        preferences = [1.0 + t % 3 for t in range(len(rows))] if preferred else None
        expected = reference.conflict_free(rows, preferences, length=length)
        found = ConFIG(preferences, length).weights(gram(rows))
        assert error(found @ rows, expected @ rows, expected, rows) <= 1e-9, seed
        compared += 1
    assert compared >= 40


@for_each_length
def test_the_direction_is_the_same_for_every_length(length):
    for seed in range(20):
        rows = random_rows(seed, 2, 5, ("plain", "common direction", "mixed norms"))
        merged, paper = (ConFIG(length=one).weights(gram(rows)) @ rows for one in (length, "projection"))
        torch.testing.assert_close(merged / merged.norm(), paper / paper.norm(), rtol=1e-6, atol=1e-9)


def test_lengths_by_hand():
    """(3, 0) and (0, 1): direction (1, 1)/√2, length 2 ℓ/√2."""
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for length, common in (("min", 1), ("max", 3), ("mean", 2), ("geometric", 3**0.5), ("harmonic", 1.5), (1, 1)):
        expected = torch.full((2,), float(common), dtype=torch.float64)
        torch.testing.assert_close(ConFIG(length=length).weights(gram(rows)) @ rows, expected)


@for_each_length
def test_with_every_length_a_problem_is_alone(length):
    check_broken(ConFIG(length=length), 4)
    check_scales(ConFIG(length=length), 5)
    assert ConFIG(length=length).weights(torch.zeros(2, 2, dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_the_length_of_a_task_is_found_by_its_index():
    rows = random_rows(1, 3, 3)
    surgery = contract.Surgery(ConFIG(length=2), 3)
    surgery.merge({0: rows[0].new_ones(12), 2: torch.arange(12.0, dtype=torch.float64)})
    both = torch.stack([torch.ones(12), torch.arange(12.0)]).double()
    torch.testing.assert_close(surgery.parameter.grad, reference.conflict_free(both, length=1) @ both)
    with pytest.raises(ValueError, match=r"length is that of task 2, which is absent; found tasks \[0, 1\]"):
        surgery.merge({0: both[0], 1: both[1]})


def test_bad_lengths():
    with pytest.raises(ValueError, match=r"length must be projection, min.*found 'least'"):
        ConFIG(length="least")
    with pytest.raises(ValueError, match="length must be at least 0; found -1"):
        ConFIG(length=-1)
    with pytest.raises(TypeError, match=r"length must be an integer; found 1\.5"):
        ConFIG(length=1.5)


def test_repr():
    assert repr(ConFIG([1, 2])) == "ConFIG(pref_vector=[1.0, 2.0], length='projection')"
