"""gradvac: what is particular to the compiled turns of GradVac; tests/methods compares them with the oracle."""

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
