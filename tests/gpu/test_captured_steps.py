"""Whole training steps in CUDA graphs: the numbers of steps that are not captured, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

import fastpcgrad
from fastpcgrad import backends, methods
from tests.gpu.waiting import no_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
TASKS = 3


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request, monkeypatch):
    reason = backends.why_unavailable(request.param, DEVICE)
    assert reason is None, reason
    monkeypatch.setenv("FASTPCGRAD_BACKEND", request.param)


class Training:
    """A trunk, and a head a task, which the others have no gradient of."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Tanh(), torch.nn.Linear(65, 64)).to(DEVICE)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(64, 1) for _ in range(TASKS)).to(DEVICE)
        self.parameters = [*self.trunk.parameters(), *self.heads.parameters()]
        self.optimizer = fastpcgrad.PCGrad(torch.optim.Adam(self.parameters, capturable=True), **options)
        self.batch = torch.zeros(16, 33, device=DEVICE)

    def step(self):
        self.optimizer.zero_grad()
        features = self.trunk(self.batch)
        self.optimizer.pc_backward([(head(features) - t).square().mean() for t, head in enumerate(self.heads)])
        self.optimizer.step()

    def warm_up(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "fixed"},
        {"variant": "tensorflow"},
        {"method": methods.MGDA(solver="exact")},
        {"method": methods.UPGrad(torch.tensor([0.5, 1.0, 2.0]))},
        {"method": methods.Constant([0.5, 0.25, 0.25])},
        {"method": methods.Mean()},
    ],
    ids=str,
)
def test_replays_train_as_steps_do(options, request):
    if "triton" in request.node.name and isinstance(options.get("method"), (methods.MGDA, methods.UPGrad)):
        pytest.skip("without the compiled library this method's problem is solved on the host, which is refused")
    captured, plain = Training(**copy.deepcopy(options)), Training(**copy.deepcopy(options))
    captured.warm_up()
    plain.warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for seed in range(4):
        batch = torch.randn(16, 33, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        captured.batch.copy_(batch)
        plain.batch.copy_(batch)
        graph.replay()
        plain.step()
        for own, other in zip(captured.parameters, plain.parameters, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    found, expected = captured.optimizer.report, plain.optimizer.report
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"method": methods.RandomWeights(torch.Generator())}], ids=["orders", "weights"]
)
def test_what_is_drawn_on_the_host_is_refused(options):
    training = Training(**options)
    training.warm_up()
    with (
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        training.step()
    training.optimizer.zero_grad()
    training.step()


def test_a_step_waits_for_nothing():
    training = Training(order="fixed")
    training.warm_up()
    with no_waiting():
        training.step()
