"""gradvac: the compiled turns of GradVac against those in NumPy."""

import pytest
import torch

from fastpcgrad.backends import cpu, kernels
from fastpcgrad.methods import GradVac
from tests.methods.random_rows import gram, random_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _needs_the_library():
    if reason := cpu.why_unavailable("cpu"):
        pytest.skip(reason)


def steps(monkeypatch, backend, matrices, **options):
    """C and the targets after each of several steps."""
    monkeypatch.setenv("FASTPCGRAD_BACKEND", backend)
    method = GradVac(generator=torch.Generator().manual_seed(0), **options)
    return [(method.solve(matrix).coefficients, method.state_dict()["phi"]) for matrix in matrices]


def assert_same(found, expected):
    for (coefficients, phi), (wanted, targets) in zip(found, expected, strict=True):
        torch.testing.assert_close(phi, targets, rtol=0, atol=1e-13)
        torch.testing.assert_close(coefficients, wanted, rtol=1e-11, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("options", [{}, {"beta": 0.9, "eps": 0.0}], ids=str)
def test_equals_numpy(monkeypatch, options):
    for tasks in (1, 2, 3, 8, 33):
        # No duplicates: where two gradients are one, the sine is the root of rounding.
        kinds = ("plain", "common direction", "conflicting", "zero row", "mixed norms")
        matrices = [gram(random_rows(seed, tasks, tasks, kinds)) for seed in range(20)]
        assert_same(steps(monkeypatch, "cpu", matrices, **options), steps(monkeypatch, "eager", matrices, **options))


def test_many_problems_and_a_broken_one(monkeypatch):
    batches = []
    for seed in range(3):
        batch = torch.stack([gram(random_rows(9 * seed, 12, 12)) for seed in range(20 * seed, 20 * seed + 20)])
        batch[7, 3, 4] = batch[7, 4, 3] = (torch.nan, torch.inf, 0.5)[seed]
        batches.append(batch)
    found = steps(monkeypatch, "cpu", batches)
    assert found[0][0][7].isnan().all() and found[1][0][7].isnan().all() and found[2][0].isfinite().all()
    assert (found[1][1][7] == 0).all() and not (found[2][1][7] == 0).all()
    clean = [i for i in range(20) if i != 7]
    expected = steps(monkeypatch, "eager", batches)
    assert_same([(c[clean], phi[clean]) for c, phi in found], [(c[clean], phi[clean]) for c, phi in expected])


def test_the_number_of_threads_changes_no_bit(monkeypatch, with_threads):
    matrices = [torch.stack([gram(random_rows(seed, 12, 12)) for seed in range(40)])]
    one, two = (with_threads(count, lambda: steps(monkeypatch, "cpu", matrices)) for count in (1, 2))
    assert torch.equal(one[0][0], two[0][0]) and torch.equal(one[0][1], two[0][1])


def test_a_place_that_is_none_makes_its_row_nan():
    places, targets = torch.tensor([[0, 1], [1, 2]]), torch.zeros(2, 2, dtype=torch.float64)
    found = kernels.gradvac(torch.eye(2).double(), places, 0.5, 0.0, targets)
    assert found[0].tolist() == [1.0, 0.0] and found[1].isnan().all()


def test_no_library_no_answers(monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
    places, targets = torch.tensor([[0, 1], [1, 0]]), torch.zeros(2, 2, dtype=torch.float64)
    assert kernels.gradvac(torch.eye(2).double(), places, 0.5, 0.0, targets) is None
