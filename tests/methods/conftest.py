"""What the tests of methods share: one thread, and what runs a T×T problem."""

import pytest
import torch

from fastpcgrad.backends import cpu


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that share T×T problems wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["numpy", "compiled"])
def solver(request, monkeypatch):
    """The compiled library, or NumPy (torch) as where there is none."""
    if request.param == "compiled" and (reason := cpu.why_unavailable("cpu")):
        pytest.skip(reason)
    monkeypatch.setenv("FASTPCGRAD_BACKEND", {"numpy": "eager", "compiled": "cpu"}[request.param])
    return request.param
