"""Krum: TorchJD's numbers, robustness, hand-worked cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpcgrad import reference
from fastpcgrad.methods.krum import Krum
from tests.methods.random_rows import check_batch, check_broken, check_scales, error, gram, random_rows

KINDS = ("plain", "common direction", "conflicting", "low rank", "zero row", "mixed norms")


def scores(rows, n_byzantine, squared=False):
    return torch.tensor(reference.krum_scores(rows, n_byzantine, squared), dtype=torch.float64)


def tied(found, n_selected):
    """Whether the last that is selected and the first that is not have the same score but for rounding."""
    ordered = found.sort().values
    return n_selected < len(found) and ordered[n_selected] - ordered[n_selected - 1] <= 1e-6 * ordered[-1]


def choices(seed, tasks):
    n_byzantine = seed % (tasks - 2)
    return n_byzantine, 1 + seed % tasks


def test_equals_torchjd():
    """Left out: equal scores, of which either may be selected. Duplicates and opposites of others have them often."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    compared = 0
    for seed in range(400):
        rows = random_rows(seed, min_tasks=3)
        n_byzantine, n_selected = choices(seed, len(rows))
        if tied(scores(rows, n_byzantine), n_selected):
            continue
        weights = Krum(n_byzantine, n_selected).weights(gram(rows))
        expected = aggregation.KrumWeighting(n_byzantine, n_selected)(gram(rows))
        assert error(weights @ rows, expected @ rows, weights, rows) <= 1e-12, seed
        compared += 1
    assert compared >= 200


@pytest.mark.parametrize("squared", [False, True])
def test_the_selected_have_the_lowest_scores(squared):
    """With ties and duplicates too."""
    for seed in range(200):
        rows = random_rows(seed, min_tasks=3)
        n_byzantine, n_selected = choices(seed, len(rows))
        weights = Krum(n_byzantine, n_selected, squared).weights(gram(rows))
        assert int((weights > 0).sum()) == n_selected
        torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
        found = scores(rows, n_byzantine, squared)
        rounding = 1e-6 * float(rows.norm(dim=1).max()) ** (2 if squared else 1)
        assert found[weights > 0].max() <= found.sort().values[n_selected - 1] + rounding


@given(seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_permuted_tasks_give_permuted_weights(seed):
    rows = random_rows(seed, min_tasks=3, kinds=KINDS)
    n_byzantine, n_selected = choices(seed, len(rows))
    if tied(scores(rows, n_byzantine), n_selected):
        return
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    method = Krum(n_byzantine, n_selected)
    assert torch.equal(method.weights(gram(rows[order])), method.weights(gram(rows))[order])


@given(seed=st.integers(0, 10**6), squared=st.booleans())
@settings(max_examples=100, deadline=None)
def test_far_outliers_are_not_selected(seed, squared):
    """T = 2 f + 3 with f arbitrary task gradients far from the honest ones, and from each other or together."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    rows[:3] = 1e3 * torch.randn(3, 20, generator=generator, dtype=torch.float64)
    if seed % 2:
        rows[1] = rows[0]
    weights = Krum(n_byzantine=3, n_selected=2, squared=squared).weights(gram(rows))
    assert (weights[:3] == 0).all()


def test_by_hand():
    """On a line 0, 1, 3, 10 with f = 1 each has one nearest: scores 1, 1, 2, 7. The first of the equal is selected."""
    rows = torch.tensor([[0.0], [1.0], [3.0], [10.0]], dtype=torch.float64)
    assert Krum(1).weights(gram(rows)).tolist() == [1, 0, 0, 0]
    assert Krum(1, 2).weights(gram(rows)).tolist() == [0.5, 0.5, 0, 0]


def test_squared_distances_can_select_another():
    """0, 1, 2, 3, 7, 8 with f = 0: the four nearest are 9 away from 2 and 10 from 3; with squares 31 and 30."""
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [7.0], [8.0]], dtype=torch.float64)
    assert Krum(0).weights(gram(rows)).tolist() == [0, 0, 1, 0, 0, 0]
    assert Krum(0, squared=True).weights(gram(rows)).tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("squared", [False, True])
def test_batch(squared):
    check_batch(Krum(1, 2, squared), 5)


def test_what_is_not_finite_stays_in_its_problem():
    check_broken(Krum(1), 5)


def test_scales():
    check_scales(Krum(1, 3), 6)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n_byzantine": -1}, ValueError, ["n_byzantine", "-1"]),
        ({"n_byzantine": 0.5}, TypeError, ["n_byzantine", "0.5"]),
        ({"n_byzantine": 1, "n_selected": 0}, ValueError, ["n_selected", "0"]),
        ({"n_byzantine": 1, "squared": 1}, TypeError, ["squared", "1"]),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        Krum(**arguments)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(("n_byzantine", "n_selected", "needed"), [(2, 1, 5), (0, 6, 6)])
def test_too_few_tasks(n_byzantine, n_selected, needed):
    with pytest.raises(ValueError, match=rf"at least {needed} .* found 4"):
        Krum(n_byzantine, n_selected).weights(torch.eye(4, dtype=torch.float64))


def test_repr():
    assert repr(Krum(1, 2)) == "Krum(n_byzantine=1, n_selected=2, squared=False)"
