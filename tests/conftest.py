"""What all tests share: the Triton interpreter, seeds, and the choice of a backend."""

import gc
import importlib
import importlib.metadata
import os
import random
from functools import cache

# The cores may be shared: a thread that waits for another must sleep, not spin. Read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():
    # The Triton kernels run on CPU tensors under the interpreter, which has to be chosen before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from fastpcgrad import backends
from fastpcgrad.backends import cpu

BACKENDS = ("eager", "cpu-baseline", "cpu-avx2", "cpu-avx512")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: processes that share the files, in this order, end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What was imported until now is there to stay, and garbage, which many ask for, is looked for in the rest."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds():
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes milliseconds: it records a stack for CUDA
    random.seed(0)


@cache
def why_not_interpreted():
    """Why Triton's interpreter cannot run the kernels with what is installed; empty if it can, or need not.

    That of Triton 3.6, the one of torch 2.11, makes integers of one-element arrays, which NumPy refuses since 2.4.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or backends.why_unavailable("triton", "cpu"):
        return ""
    _patch_language_once_a_launch()
    from fastpcgrad.backends import triton

    try:
        triton.gram(torch.ones(2, 8), None)
    except Exception as error:
        if "only 0-dimensional arrays can be converted to Python scalars" not in str(error):
            return ""  # nothing that is known: the tests are to show it
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("triton", "numpy")]
        return f"the interpreter of {versions[0]} runs no loops with {versions[1]}: {error}"
    return ""


def _patch_language_once_a_launch():
    """The interpreter patches triton.language at each call of a function within a kernel: a quarter of its time.

    What it patches stays until the launch ends, so that once for each module with kernels is enough. Another third goes
    into types, which are made anew for each tensor.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    def launch_anew(*arguments, **options):
        patched.clear()
        return launch(*arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew

    core, look_up = interpreter.tl.core, interpreter._get_np_dtype
    interpreter._get_np_dtype = _known(look_up, lambda dtype: dtype.name)
    _make_alike(core.block_type, lambda dtype, shape: (dtype.name, *(getattr(size, "value", size) for size in shape)))
    _make_alike(core.tensor, lambda handle, dtype: dtype.name, handle=0)


def _known(function, key_of):
    known = {}

    def answer(argument):
        key = key_of(argument)
        if key not in known:
            known[key] = function(argument)
        return known[key]

    return answer


def _make_alike(kind, key_of, **own):
    """New objects have the attributes of the first one with the same key, but for their own: these arguments."""
    make, known = kind.__init__, {}

    def init(self, *arguments):
        key = key_of(*arguments)
        if key not in known:
            make(self, *arguments)
            known[key] = vars(self).copy()
        vars(self).update(known[key], **{name: arguments[place] for name, place in own.items()})

    kind.__init__ = init


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Forces each backend that runs CPU tensors, the compiled one with each instruction set.

    ``parametrize("backend", ["triton"], indirect=True)`` chooses others: the interpreter is too slow for all cases.
    """
    name, _, isa = request.param.partition("-")
    if reason := backends.why_unavailable(name, "cpu") or (name == "triton" and why_not_interpreted()):
        pytest.skip(reason)
    monkeypatch.setenv("FASTPCGRAD_BACKEND", name)
    if not isa:
        yield request.param
        return
    before = cpu.isa()
    try:
        cpu.use_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.use_isa(before)


@pytest.fixture
def poisoned_memory():
    """New memory holds NaN: a result that a kernel forgot to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def with_threads():
    """Calls a function with a number of threads."""
    before = torch.get_num_threads()

    def call(threads, function):
        torch.set_num_threads(threads)
        return function()

    yield call
    torch.set_num_threads(before)
