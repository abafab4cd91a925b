"""Whether Triton can be chosen: a launch says it, once a device. Stands in for a GPU by what Triton's launch raises."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastpcgrad import _warnings, backends
from fastpcgrad.backends import cuda
from fastpcgrad.backends import triton as backend

launch = pytest.importorskip("fastpcgrad.backends.triton.launch", exc_type=ImportError)


@pytest.fixture
def launches(monkeypatch):
    """Of a machine with a GPU but no C compiler; its tensors lie on the CPU."""
    made, ones = [], torch.ones

    def fail(*given):
        made.append(given)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "pcgrad_coefficients", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: ones(*shape, **options))
    backend._why_nothing_runs.cache_clear()
    yield made
    backend._why_nothing_runs.cache_clear()


def test_without_a_compiler_the_reason_is_said_and_asked_for_once(launches):
    for _ in range(3):
        reason = backend.why_unavailable("cuda")
        assert "RuntimeError: Failed to find C compiler" in reason
    assert len(launches) == 1


@pytest.mark.parametrize("library", [True, False])
def test_without_a_compiler_the_choice_is_another(launches, library, monkeypatch):
    monkeypatch.delenv("FASTPCGRAD_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(_warnings, "_said", set())
    monkeypatch.setattr(cuda, "why_unavailable", lambda device_type: None if library else "it was not built")
    if library:
        assert backends.select("cuda") is cuda
    else:
        with pytest.warns(match="eager runs instead of the compiled cuda library, and slower: it was not built"):
            assert backends.select("cuda") is importlib.import_module("fastpcgrad.backends.eager")
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        backends.select("cuda", "triton")


def test_without_a_device_there_is_nothing_to_ask(launches, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_unavailable("cuda") == "this torch sees no CUDA device" and not launches
