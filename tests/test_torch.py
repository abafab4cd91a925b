"""What stands in for private names of torch: with each of them missing, and with all."""

import ast
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastpcgrad
from fastpcgrad import _derivatives, _graph, _memory, _modes, _torch
from fastpcgrad.backends import kernels
from tests.without_private_names import NAMES, SECOND_CHOICES, load

ROOT = Path(__file__).parents[1]


def test_every_name_that_is_looked_for_is_taken_away_somewhere():
    tree = ast.parse(Path(_torch.__file__).read_text())
    looked_for = {
        ast.unparse(node.args[0]).strip("'\"")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_private"
    }
    covered = {*NAMES, *SECOND_CHOICES, "jit.is_tracing"}
    covered |= {f"{name}.run_backward" for name in NAMES if name.endswith("_engine")}
    assert {name for name in looked_for if not name.startswith("f")} <= covered
    assert {name for name in looked_for if name.startswith("f")} == {
        "f'_C.DispatchKey.{name}",
        "f'_C._TorchDispatchModeKey.{name}",
    }


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def in_vmap(call):
    found = []
    torch.func.vmap(lambda x: found.append(call(x)) or x)(torch.zeros(2, 3))
    return found[0]


def in_forward_mode(call):
    with forward_ad.dual_level():
        return call(torch.zeros(3))


def in_mode(mode):
    def run(call):
        with mode():
            return call(torch.zeros(3))

    return run


def in_make_fx(call):
    found = []
    make_fx(lambda x: found.append(call(x)) or x + 1)(torch.zeros(3))
    return found[0]


def in_jit_trace(call):
    found = []
    torch.jit.trace(lambda x: found.append(call(x)) or x + 1, torch.zeros(3), check_trace=False)
    return found[0]


WITHIN = {
    "nothing": in_mode(nullcontext),
    "vmap": in_vmap,
    "forward mode": in_forward_mode,
    "fake": in_mode(FakeTensorMode),
    "mode": in_mode(Silent),
    "make_fx": in_make_fx,
}


def stand_in(monkeypatch, names):
    """The modules that look at calls, as they would be without the names."""
    other = load(names)
    for name in vars(other).keys() & vars(_modes).keys():
        if getattr(_modes, name) is getattr(_torch, name) and not name.startswith("__"):
            monkeypatch.setattr(_modes, name, getattr(other, name))
    monkeypatch.setattr(_modes, "_torch", other)


ELSEWHERE = (
    "Use_Count",
    "TorchDispatchMode",
    "_get_sequence_nr",
    "next_id",
    "_execution_engine",
    "RawStream",
    "BelowAutograd",
    "after_autograd",
    "DispatchKey.",
    "ModeKey.",
)
"""Names that say nothing of who looks at a call, or are parts of others."""


@pytest.fixture(params=[*(x for x in NAMES if not any(y in x for y in ELSEWHERE)), *SECOND_CHOICES, "all"])
def missing(request):
    if request.param == "all":
        return NAMES
    # A second choice is asked only where there is no first.
    return (*NAMES, request.param) if request.param in SECOND_CHOICES else (request.param,)


def looks(x):
    """What decides about a call, of the tensor of a context and of others."""
    plain = torch.zeros(3)
    return {
        "is_on": _modes.is_on(),
        "is_watched": _modes.is_watched((x, None)),
        "is_watched_plain": _modes.is_watched((plain, None)),
        "is_faking": _modes.is_faking(),
        "is_fake": _modes.is_fake(x),
        "is_batched": _modes.is_batched(x),
        "refused": _is_refused(x),
    }


def _is_refused(x):
    try:
        _modes.refuse_tracers(x)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("context", WITHIN)
def test_what_is_seen_of_a_call_is_the_same_or_more(monkeypatch, missing, context):
    """More: the answer that is slower, or refuses. What has no memory or is batched must be known as such."""
    right = WITHIN[context](looks)
    stand_in(monkeypatch, missing)
    found = WITHIN[context](looks)
    for name, value in right.items():
        if name == "is_on" and context == "vmap" and "_C._functorch.peek_interpreter_stack" in missing:
            continue  # then the wrapped tensors themselves are watched
        assert found[name] or not value, name
    if context == "nothing" and SECOND_CHOICES[1] not in missing:
        assert found == right, "plain calls stay plain"


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torch_jit_is_seen_without_its_state(monkeypatch):
    stand_in(monkeypatch, ["_C._get_tracing_state"])
    assert in_jit_trace(lambda x: _modes.is_watched((x,)))
    assert not _modes.is_watched((torch.zeros(3),))


@pytest.mark.parametrize(
    "change",
    [torch._neg_view, lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x.requires_grad_()],
    ids=["negative", "meta", "sparse", "requires grad"],
)
def test_tensors_that_are_not_plain_are_watched_without_their_keys(monkeypatch, change):
    stand_in(monkeypatch, ["_C._dispatch_keys"])
    assert _modes.is_watched((change(torch.zeros(3)),))
    assert not _modes.is_watched((torch.zeros(3),))


def test_a_torch_that_knows_a_key_by_another_name_is_asked_by_looks():
    other = load(["_C.DispatchKey.AutocastCUDA"])
    assert other.dispatch_keys is other._KeysByLooks and other.PLAIN_KEYS == 0


def test_without_counts_of_references_every_gradient_is_copied(monkeypatch):
    assert load(["_C._storage_Use_Count"]).storage_use_count is None
    monkeypatch.setattr(_memory, "storage_use_count", None)
    assert _memory._counts_of_one_alone() is None
    monkeypatch.setattr(_memory, "_ALONE", None)
    monkeypatch.setattr(_memory, "_VIEWS_ALONE", None)
    grad = torch.ones(3)
    assert not _memory.are_alone([grad], [grad.untyped_storage()])
    p = torch.ones(3, requires_grad=True)
    surgery = fastpcgrad.GradientSurgery([p], 2, fastpcgrad.methods.PCGrad("tensorflow"))
    with surgery.task(0):
        p[0].backward()
    with surgery.task(1):
        (p[1] - p[0]).backward()
    surgery.merge()
    torch.testing.assert_close(p.grad, torch.tensor([0.5, 1.5, 0.0]))


def test_without_the_engine_losses_run_themselves_backward(monkeypatch):
    assert load(["autograd.Variable._execution_engine"]).engine_backward is None
    monkeypatch.setattr(_graph, "engine_backward", None)
    x = torch.ones(2, requires_grad=True)
    loss = x.square().sum()
    _graph.run_backward(loss, retain_graph=True)
    _graph.run_backward(loss, retain_graph=False)
    torch.testing.assert_close(x.grad, torch.full((2,), 4.0))
    with pytest.raises(RuntimeError, match="second time"):
        _graph.run_backward(loss, retain_graph=False)


@pytest.mark.parametrize("module", ["torch._functorch.config", "torch._inductor.config"])
def test_settings_that_are_not_known_count_as_unsafe(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert _torch.may_write_kept_graphs()


def test_without_a_raw_stream_the_current_one_is_asked(monkeypatch):
    other = load(["_C._cuda_getCurrentRawStream"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=40 + index))
    assert other.raw_stream(2) == 42


@pytest.mark.parametrize("missing", ["below_autograd", "keys_below_autograd"])
def test_without_a_way_below_autograd_derivatives_are_right_and_modes_refused(monkeypatch, missing):
    monkeypatch.setattr(_derivatives, missing, None)
    j = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda j, w: fastpcgrad.combine(j, w) + fastpcgrad.gram(j).sum(), (j, w))
    order = torch.arange(3).repeat(3, 1)
    arguments = (order, False, 0.0, 0.0)
    found = torch.ops.fastpcgrad.pcgrad(j.detach(), *arguments, 1.0)
    assert len(found) == 4 and len(torch.ops.fastpcgrad.pcgrad_(j.detach().clone(), *arguments)) == 2
    torch.testing.assert_close(found[0], kernels.pcgrad(j.detach(), *arguments, 1.0)[0])
    with pytest.raises(RuntimeError, match="no derivative"):
        fastpcgrad.pcgrad(j, order=order).sum().backward()
    before = (rows := j.detach().clone())._version
    torch.ops.fastpcgrad.mix_(rows, torch.eye(3, dtype=torch.float64))
    assert rows._version > before
    with pytest.raises(ValueError, match="coefficients"):
        torch.ops.fastpcgrad.mix_(rows, torch.eye(2, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match=r"gram takes plain tensors alone"):
        make_fx(lambda j: fastpcgrad.gram(j))(j)
    with pytest.raises(NotImplementedError, match=r"gram takes plain tensors alone"):
        fastpcgrad.gram(torch._neg_view(j.detach()))


@pytest.mark.slow
def test_with_none_of_the_names_what_the_package_gives_is_right():
    """Other tests, in a process where none was found. They leave out what is only faster, compiled code, and numbers
    that no name has a part in: those of the eager backend, and of the published PCGrads."""
    files = ["test_autograd.py", "surgery", "optimizer", "ops/test_gram.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.without_private_names", "-p", "no:cacheprovider"]
    apart = "not triton and not avx and not (test_gram and eager) and not float64_gradients_and_generator_states"
    only = ["-k", apart, "-m", "not slow"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, *only, *(f"tests/{file}" for file in files)],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
