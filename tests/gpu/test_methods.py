"""Methods on a GPU: the weights of the CPU, and which of them wait for nothing."""

import pytest
import torch

from fastpcgrad import backends, methods
from tests.gpu.waiting import no_waiting
from tests.methods.random_rows import error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"

WITHOUT_WAITING = {
    "MGDA": lambda tasks: methods.MGDA(),
    "MGDA, exact": lambda tasks: methods.MGDA(solver="exact"),
    "CAGrad": lambda tasks: methods.CAGrad(c=0.5),
    "FairGrad": lambda tasks: methods.FairGrad(alpha=1.0),
    "UPGrad": lambda tasks: methods.UPGrad(),
    "UPGrad, preferred": lambda tasks: methods.UPGrad(torch.linspace(0.5, 2.0, tasks)),
    "DualProj": lambda tasks: methods.DualProj(),
    "AlignedMTL": lambda tasks: methods.AlignedMTL(),
    "IMTLG": lambda tasks: methods.IMTLG(),
    "ConFIG": lambda tasks: methods.ConFIG(),
    "Krum": lambda tasks: methods.Krum(n_byzantine=max(0, (tasks - 3) // 2)),
    "Mean": lambda tasks: methods.Mean(),
    "Sum": lambda tasks: methods.Sum(),
    "PCGrad": lambda tasks: methods.PCGrad(generator=torch.Generator().manual_seed(0)),
    "GradVac": lambda tasks: methods.GradVac(generator=torch.Generator().manual_seed(0)),
    "Constant": lambda tasks: methods.Constant(torch.linspace(0.5, 2.0, tasks)),
}
WAITING = {"NashMTL": lambda tasks: methods.NashMTL()}
"""Its state is on the host."""


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch):
    reason = backends.why_unavailable(request.param, DEVICE)
    assert reason is None, reason
    monkeypatch.setenv("FASTPCGRAD_BACKEND", request.param)
    return request.param


def conflicting(tasks):
    rows = torch.randn(tasks, 3 * tasks, generator=torch.Generator().manual_seed(tasks), dtype=torch.float64)
    return rows - 0.9 * rows.mean(dim=0)


@pytest.mark.parametrize("tasks", [3, 8, 32, 70])
@pytest.mark.parametrize("name", [*WITHOUT_WAITING, *WAITING])
def test_the_weights_are_those_of_the_cpu(name, tasks, backend, monkeypatch):
    make, rows = (WITHOUT_WAITING | WAITING)[name], conflicting(tasks)
    gram = rows @ rows.mT
    found = make(tasks).weights(gram.to(DEVICE))
    assert found.device.type == DEVICE
    monkeypatch.delenv("FASTPCGRAD_BACKEND")
    expected = make(tasks).weights(gram)
    assert error(found.cpu() @ rows, expected @ rows, expected, rows) <= 1e-11


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_nothing_waits_with_the_cuda_library(name, monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    rows = conflicting(8).to(DEVICE)
    method, gram = WITHOUT_WAITING[name](8), rows @ rows.mT
    method.weights(gram)  # loads what is loaded at first use, moves the preferences
    with no_waiting():
        method.weights(gram)


@pytest.mark.parametrize("name", ["MGDA, exact", "CAGrad", "FairGrad", "UPGrad, preferred", "AlignedMTL", "ConFIG"])
def test_captured_weights_replay_with_another_gram_matrix(name, monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    rows = conflicting(8).to(DEVICE)
    method, gram = WITHOUT_WAITING[name](8), rows @ rows.mT
    method.weights(gram)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights = method.weights(gram)
    for seed in range(3):
        other = torch.randn(8, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)
        gram.copy_(other @ other.mT)
        graph.replay()
        assert torch.equal(weights, method.weights(gram))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tasks", [2, 9])
def test_methods_on_columns(tasks, dtype):
    rows = torch.randn(tasks, 100_003).to(dtype)
    trimmed = methods.TrimmedMean((tasks - 1) // 2)
    torch.testing.assert_close(trimmed.aggregate(rows.to(DEVICE)).cpu(), trimmed.aggregate(rows))
    for leak in (None, [0.25] * tasks):
        found, expected = (
            methods.GradDrop(leak=leak, generator=torch.Generator().manual_seed(1)).aggregate(given).cpu()
            for given in (rows.to(DEVICE), rows)
        )
        # A column whose sign is drawn by a hair's breadth may have the other one.
        near = torch.isclose(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert (~near).sum() <= 2
