"""A plugin for pytest (``-p``): the package as it is with a torch that has none of the names in ``_torch``."""

import contextlib
import importlib.util
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import torch._subclasses.fake_tensor  # what the stand-ins ask for
import torch.fx.experimental.proxy_tensor
import torch.utils._python_dispatch

NAMES = (
    "_C.DispatchKey",
    "_C.DispatchKeySet",
    "_C.DispatchKey.AutocastCUDA",
    "_C.DispatchKey.ADInplaceOrView",
    "_C._AutoDispatchBelowAutograd",
    "_C._TorchDispatchModeKey",
    "_C._TorchDispatchModeKey.FAKE",
    "_C._TorchDispatchModeKey.PROXY",
    "_C._after_autograd_keyset",
    "_C._are_functorch_transforms_active",
    "_C._autograd._profiler_enabled",
    "_C._cuda_getCurrentRawStream",
    "_C._dispatch_keys",
    "_C._functorch.is_batchedtensor",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._get_dispatch_mode",
    "_C._get_tracing_state",
    "_C._len_torch_dispatch_stack",
    "_C._storage_Use_Count",
    "autograd.Variable._execution_engine",
    "autograd.forward_ad._current_level",
)
SECOND_CHOICES = ("_C._functorch.peek_interpreter_stack", "utils._python_dispatch.is_in_torch_dispatch_mode")
"""What stands in for others of them."""


@contextlib.contextmanager
def removed(names):
    """Within, torch has none of these names."""
    homes = [(attrgetter(path.rpartition(".")[0])(torch), path.rpartition(".")[2]) for path in names]
    before = [(home, name, getattr(home, name)) for home, name in homes if hasattr(home, name)]
    try:
        for home, name, _ in before:
            delattr(home, name)
        yield
    finally:
        for home, name, value in before:
            setattr(home, name, value)


def load(names=NAMES):
    """A copy of ``_torch`` that was imported while torch had none of the names."""
    path = Path(__file__).parents[1] / "fastpcgrad" / "_torch.py"
    spec = importlib.util.spec_from_file_location("fastpcgrad._torch", path)
    module = importlib.util.module_from_spec(spec)
    with removed(names):
        spec.loader.exec_module(module)
    return module


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    assert "fastpcgrad" not in sys.modules, "it has to be loaded first"
    sys.modules["fastpcgrad._torch"] = load()
