"""Aligned-MTL: task gradients made orthogonal and equally long, then summed by preference."""

import pytest
import torch

from fastpcgrad.methods.aligned_mtl import AlignedMTL
from tests.methods import contract
from tests.methods.matrices import difference, gram, jacobians

MODES = ("min", "median", "rmse")
for_every_mode = pytest.mark.parametrize("mode", MODES)


def settled_rank(rows, least=1e-17, most=1e-13):
    """Whether no eigenvalue lies where rounding decides if it counts: near λ_max·T·2⁻⁵²."""
    values = torch.linalg.eigvalsh(gram(rows))
    relative = values.abs() / values[-1]
    return not bool(((relative > least) & (relative < most)).any())


@for_every_mode
@pytest.mark.parametrize("preferred", [False, True])
def test_it_is_torchjds(mode, preferred):
    torchjd = pytest.importorskip("torchjd.aggregation")
    compared = 0
    for name, rows in jacobians():
        if not settled_rank(rows):
            continue
        preference = torch.linspace(0.1, 2.0, len(rows), dtype=torch.float64) if preferred else None
        expected = torchjd.AlignedMTLWeighting(preference, scale_mode=mode)(gram(rows))
        found = AlignedMTL(preference, mode).weights(gram(rows))
        assert difference(rows, found, expected) <= 1e-9, name
        compared += 1
    assert compared >= 200


def samsunglabs(grads, mode):
    """The rule of SamsungLabs/MTL (commit 3f577f1), code/optim/aligned/solver.py, on J [T, N]: its weights."""
    values, basis = torch.linalg.eigh(grads @ grads.mT)
    rank = sum(values > values.max() * len(grads) * torch.finfo(torch.float32).eps)
    order = torch.argsort(values, descending=True)
    values, basis = values[order][:rank], basis[:, order][:, :rank]
    scale = {"min": lambda: values[-1], "median": lambda: torch.median(values), "rmse": lambda: values.mean()}[mode]()
    return (basis * scale.sqrt() / values.sqrt() @ basis.mT).sum(dim=-1)


@for_every_mode
def test_it_is_the_authors(mode):
    compared = 0
    for name, rows in jacobians():
        if rows.any() and settled_rank(rows, 1e-9, 1e-5):
            found = AlignedMTL(scale_mode=mode, variant="samsunglabs").weights(gram(rows))
            assert difference(rows, found, samsunglabs(rows, mode)) <= 1e-9, name
            compared += 1
    assert compared >= 200


def test_it_is_torchjds_with_fp32_rows():
    """Of a Gram matrix in fp32, whose eigenvalues have its rounding errors."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    compared = 0
    for name, rows in jacobians(scales=(1.0, 100.0)):
        if settled_rank(rows, 1e-9, 1e-4):
            expected = torchjd.AlignedMTLWeighting()(gram(rows).float()).double()
            found = AlignedMTL(variant="torchjd-fp32").weights(gram(rows))
            assert difference(rows, found, expected) <= 1e-2, name
            compared += 1
    assert compared >= 200


@pytest.mark.parametrize("variant", ["torchjd-fp32", "samsunglabs"])
def test_a_direction_that_is_rounding_in_fp32_is_left_out(variant, solver):
    """Eigenvalues 2 and 2e-8 of two tasks, and 1 of another: without the small one there are two of nearly one size."""
    rows = torch.tensor([[1.0, 0.0, 1e-4], [1.0, 0.0, -1e-4], [0.0, 1.0, 0.0]], dtype=torch.float64)
    total = 3.0 if variant == "samsunglabs" else 1.0
    kept = total / 3 * torch.tensor([0.5**0.5, 0.5**0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(AlignedMTL(variant=variant).weights(gram(rows)), kept)
    assert AlignedMTL().weights(gram(rows)).abs().max() < 1e-3


@for_every_mode
def test_two_tasks_by_hand(mode):
    """G = diag(1, 4): w = √s (1, ½)·½ with s = 1, 1 (the lower of two) and 2.5."""
    found = AlignedMTL(scale_mode=mode).weights(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)))
    root = {"min": 1.0, "median": 1.0, "rmse": 2.5**0.5}[mode]
    torch.testing.assert_close(found, root * torch.tensor([0.5, 0.25], dtype=torch.float64))


@for_every_mode
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_what_is_orthogonal_and_equally_long_is_aligned_already(mode, tasks, solver):
    """All eigenvalues are equal to the bit: one of them is the scale, not their sum, and not none."""
    preference = torch.linspace(0.1, 2.0, tasks, dtype=torch.float64)
    weights = AlignedMTL(preference, scale_mode=mode).weights(4.0 * torch.eye(tasks, dtype=torch.float64))
    torch.testing.assert_close(weights, preference)


@for_every_mode
def test_no_gradients_at_all_give_the_preference(mode):
    nothing = torch.zeros(2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(AlignedMTL(scale_mode=mode).weights(nothing), torch.full_like(nothing[0, :2], 1 / 3))


@for_every_mode
def test_a_batch_is_a_loop(mode):
    contract.check_batch_is_a_loop(lambda: AlignedMTL(scale_mode=mode))


def test_not_finite():
    contract.check_not_finite_stays_in_its_problem(AlignedMTL)


def test_scaled_gradients_give_the_same_weights():
    contract.check_scaled_gradients_give_the_same_weights(AlignedMTL)


def test_bad_grams_are_refused():
    contract.check_bad_grams_are_refused(AlignedMTL)


def test_in_a_surgery():
    contract.check_surgery(AlignedMTL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale_mode": "max"}, ["scale_mode", "max", "rmse"]),
        ({"variant": "paper"}, ["variant", "paper", "samsunglabs"]),
        ({"pref_vector": torch.ones(2, 2)}, ["pref_vector"]),
        ({"pref_vector": torch.tensor([1.0, torch.nan])}, ["pref_vector", "nan"]),
    ],
)
def test_bad_arguments_name_what_was_found(arguments, words):
    with pytest.raises(ValueError) as caught:
        AlignedMTL(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_a_preference_for_other_tasks_is_refused():
    with pytest.raises(ValueError, match=r"pref_vector has 3 .* found 2"):
        AlignedMTL(torch.ones(3)).weights(torch.eye(2, dtype=torch.float64))


def test_it_has_no_state_and_says_what_it_is():
    method = AlignedMTL(torch.tensor([1.0, 3.0]), "rmse")
    assert method.state_dict() == {}
    assert repr(method) == "AlignedMTL(pref_vector=[1.0, 3.0], scale_mode='rmse', variant='torchjd')"
