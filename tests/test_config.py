"""show_config: versions, backends and the reasons of those that are missing."""

import numpy
import pytest
import torch

import fastpcgrad
from fastpcgrad import _warnings, backends
from fastpcgrad.backends import config as config_module
from fastpcgrad.backends import cpu, native


@pytest.fixture
def config(capsys):
    """Calls show_config and holds it to printing exactly what it returns."""

    def call():
        text = fastpcgrad.show_config()
        assert capsys.readouterr().out == text + "\n"
        return text

    return call


def test_it_names_versions_and_threads(config):
    text = config()
    for part in (fastpcgrad.__version__, torch.__version__, numpy.__version__):
        assert part in text
    assert f"threads: {torch.get_num_threads()}" in text


def test_it_names_every_backend_and_why_one_is_missing(config):
    lines = config().splitlines()
    first = lines.index(next(line for line in lines if line.startswith("cpu tensors: "))) + 1
    reasons = [backends.why_unavailable(name, "cpu") for name in backends.NAMES]
    for name, line, reason in zip(backends.NAMES, lines[first:], reasons, strict=False):
        assert line.startswith(f"  {name}: {'available' if reason is None else reason}")


def test_it_names_the_instruction_set_of_the_cpu_library(config):
    if (reason := backends.why_unavailable("cpu", "cpu")) is not None:
        pytest.skip(reason)
    assert f"  cpu: available ({cpu.isa()})" in config()


def test_it_says_which_backend_is_chosen(config, monkeypatch):
    monkeypatch.delenv("FASTPCGRAD_BACKEND", raising=False)
    assert "FASTPCGRAD_BACKEND: not set" in config()
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
    text = config()
    assert "FASTPCGRAD_BACKEND: eager" in text and "cpu tensors: eager" in text


@pytest.mark.parametrize("name", ["fast", "cuda"])
def test_a_forced_backend_that_cannot_run_is_reported_with_its_reason(config, monkeypatch, name):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", name)
    (line,) = [line for line in config().splitlines() if line.startswith("cpu tensors: ")]
    assert "none" in line and name in line


def test_the_error_of_a_library_that_does_not_load_is_shown(config, monkeypatch, tmp_path):
    broken = tmp_path / "libfastpcgrad_cpu.so"
    broken.write_text("not a library")
    monkeypatch.delenv("FASTPCGRAD_BACKEND", raising=False)
    monkeypatch.setattr(native, "_load", lambda name: native._open(broken))
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(backends, "_chosen", {})
    text = config()
    assert str(broken) in text and "cannot be loaded" in text
    assert "cpu tensors: eager" in text


def test_the_backend_in_use_is_named_with_its_instruction_set(monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
    assert config_module.backend_in_use() == "eager"
    if backends.why_unavailable("cpu", "cpu") is None:
        monkeypatch.setenv("FASTPCGRAD_BACKEND", "cpu")
        assert config_module.backend_in_use() == f"cpu ({cpu.isa()})"
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "none such")
    assert config_module.backend_in_use().startswith("none: ")


def test_a_missing_library_is_said_once_and_a_forced_backend_says_nothing(monkeypatch):
    monkeypatch.setattr(_warnings, "_said", set())
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(cpu, "why_unavailable", lambda device_type: "it was not built")
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "eager")
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    expected = fastpcgrad.pcgrad(J)
    monkeypatch.delenv("FASTPCGRAD_BACKEND")
    with pytest.warns(fastpcgrad.FastPCGradWarning, match="eager runs instead of the compiled cpu .*it was not built"):
        assert torch.equal(fastpcgrad.pcgrad(J), expected)
    monkeypatch.setattr(backends, "_chosen", {})
    assert torch.equal(fastpcgrad.pcgrad(J), expected)


def test_without_a_device_it_says_whether_the_cuda_library_was_built(config, monkeypatch):
    """Else a build on a machine without a GPU could not be looked at there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "load_error", lambda name: f"the {name} library was not built: no nvcc")
    assert config().splitlines()[-1] == "  cuda: the cuda library was not built: no nvcc"
    monkeypatch.setattr(native, "load_error", lambda name: None)
    assert config().splitlines()[-1] == "  cuda: the library is here and can be loaded"
