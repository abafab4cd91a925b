"""Who competes: the library, torch and the peers, each prepared before the clock starts."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

import fastpcgrad
from benchmarks.cases import DTYPES, SMALLEST_WIDTH, KernelCase, Op
from benchmarks.models import Classifier, Forward, Problem, clear_gradients
from benchmarks.rows import version_of

LIBRARY = "fastpcgrad"
MISSING = "missing: "


@dataclass(frozen=True)
class KernelInputs:
    """J, and what the ops take beside it. ``buffer`` [T, N] is for those that cannot work in place."""

    rows: Tensor
    weights: Tensor
    coefficients: Tensor
    out: Tensor
    buffer: Callable[[], Tensor]


KernelBuild = Callable[[KernelInputs], Callable[[], object]]


@dataclass(frozen=True)
class KernelContender:
    """One competitor of an op.

    Attributes:
        variant: which order of the projections its ``pcgrad`` draws and from where (a name of the library's).
        copies: how many T x N buffers it needs at its peak, so that a case that would not fit is skipped.
        slow: its cost grows with T² passes over N: it is predicted before it is called.
    """

    name: str
    distribution: str
    backend: str
    build: KernelBuild
    variant: str = "torchjd"
    copies: int = 0
    slow: bool = False


StepBuild = Callable[[Problem, Optimizer], "StepCalls"]


@dataclass(frozen=True)
class StepCalls:
    """``merge``: from the losses to the merged gradient in ``.grad``; ``step``: the optimizer's."""

    merge: Callable[[Forward], object]
    step: Callable[[], object]


@dataclass(frozen=True)
class StepContender:
    """One competitor of a training step.

    Attributes:
        variant: which order of the projections it draws and from where (a name of the library's); without any
            surgery ``none`` (the gradients are summed) or ``last`` (the last task's stay).
        shared_only: heads stay out of its surgery.
        timed: False where only its memory is of interest.
    """

    name: str
    distribution: str
    backend: str
    build: StepBuild
    variant: str
    shared_only: bool = False
    timed: bool = True


@dataclass(frozen=True)
class Missing:
    """A competitor that cannot be imported here, and why: it gets a row that says so."""

    name: str
    reason: str
    backend: str = ""


def library_backend(device_type: str = "cpu") -> str:
    """The name of the backend that the library picks for tensors of that device."""
    from fastpcgrad import backends

    return backends.select(device_type).__name__.rsplit(".", 1)[-1]


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    before = os.environ.get("FASTPCGRAD_BACKEND")
    os.environ["FASTPCGRAD_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTPCGRAD_BACKEND"]
        else:
            os.environ["FASTPCGRAD_BACKEND"] = before


_LIBRARY_OPS: dict[Op, KernelBuild] = {
    "pcgrad": lambda x: lambda: fastpcgrad.pcgrad(x.rows, variant="torchjd"),
    "gram": lambda x: lambda: fastpcgrad.gram(x.rows),
    "combine": lambda x: lambda: fastpcgrad.combine(x.rows, x.weights, out=x.out),
    "mix_": lambda x: lambda: fastpcgrad.mix_(x.rows, x.coefficients),
}


def _eager(build: KernelBuild) -> KernelBuild:
    def built(inputs: KernelInputs) -> Callable[[], object]:
        call = build(inputs)

        def forced() -> object:
            with forced_backend("eager"):
                return call()

        return forced

    return built


def _drop_in(problem: Problem, optimizer: Optimizer, row_dtype: torch.dtype | None = None) -> StepCalls:
    wrapped = fastpcgrad.PCGrad(optimizer, row_dtype=row_dtype)
    return StepCalls(lambda forward: wrapped.pc_backward(forward.losses), wrapped.step)


def _surgery(problem: Problem, optimizer: Optimizer) -> StepCalls:
    tasks = len(problem().losses)
    surgery = fastpcgrad.GradientSurgery(optimizer, num_tasks=tasks, method=fastpcgrad.methods.PCGrad())

    def merge(forward: Forward) -> None:
        for t, loss in enumerate(forward.losses):
            with surgery.task(t):
                loss.backward(retain_graph=t < tasks - 1)
        surgery.merge()

    return StepCalls(merge, optimizer.step)


def _functional(problem: Problem, optimizer: Optimizer) -> StepCalls:
    parameters = problem.parameters_list()
    method = fastpcgrad.methods.PCGrad()
    return StepCalls(lambda forward: fastpcgrad.backward(forward.losses, parameters, method=method), optimizer.step)


def _torch_gram(x: KernelInputs) -> Callable[[], object]:
    return lambda: x.rows @ x.rows.T


def _torch_combine(x: KernelInputs) -> Callable[[], object]:
    weights = x.weights.to(x.rows.dtype)
    # [1, T] @ [T, N] with a preallocated result is the fastest spelling of w @ J over fp32 and bf16.
    row, out = weights[None], x.out[None]
    return lambda: torch.mm(row, x.rows, out=out)


def _torch_mix(x: KernelInputs) -> Callable[[], object]:
    coefficients, buffer = x.coefficients.to(x.rows.dtype), x.buffer()
    return lambda: x.rows.copy_(torch.matmul(coefficients, x.rows, out=buffer))


def _plain(problem: Problem, optimizer: Optimizer) -> StepCalls:
    """T backward passes and no surgery: the floor of every multi-task step that looks at task gradients."""
    parameters = problem.parameters_list()

    def merge(forward: Forward) -> None:
        last = len(forward.losses) - 1
        for t, loss in enumerate(forward.losses):
            clear_gradients(parameters)
            loss.backward(retain_graph=t < last)

    return StepCalls(merge, optimizer.step)


def _accumulate(problem: Problem, optimizer: Optimizer) -> StepCalls:
    """T backward passes that add up in ``.grad``: what the sum of the losses costs, and its memory.

    From the second pass on, the fresh gradient of one parameter exists beside the sum that it is added to.
    """

    def merge(forward: Forward) -> None:
        last = len(forward.losses) - 1
        for t, loss in enumerate(forward.losses):
            loss.backward(retain_graph=t < last)

    return StepCalls(merge, optimizer.step)


PLAIN = StepContender("plain", "torch", "torch", _plain, variant="last")
ACCUMULATE = StepContender("accumulate", "torch", "torch", _accumulate, variant="none", timed=False)


_PEERS = (
    # name, distribution, module, variant, T x N buffers of its kernel, projections one by one
    ("torchjd", "torchjd", "torchjd_peer", "torchjd", 0, False),
    ("loop", "", "loop", "pytorch-pcgrad", 2, True),
    ("pytorch_optimizer", "pytorch_optimizer", "pytorch_optimizer_peer", "pytorch-pcgrad", 5, True),
)


def _peer_module(module: str) -> ModuleType | str:
    """The peer's module, or why it cannot be imported: whatever its import raised ends up in the row."""
    try:
        return importlib.import_module(f"benchmarks.peers.{module}")
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def kernel_contenders(case: KernelCase) -> list[KernelContender | Missing]:
    build = _LIBRARY_OPS[case.op]
    found: list[KernelContender | Missing] = [
        KernelContender(LIBRARY, LIBRARY, library_backend(), build),
    ]
    # The fallback without compiled code: of interest, but not worth the time on wide rows.
    if case.peers and case.width <= SMALLEST_WIDTH and library_backend() != "eager":
        found.append(KernelContender(f"{LIBRARY}[eager]", LIBRARY, "eager", _eager(build), copies=1))
    if case.op != "pcgrad":
        torch_builds = {"gram": _torch_gram, "combine": _torch_combine, "mix_": _torch_mix}
        found.append(KernelContender("torch", "torch", "torch", torch_builds[case.op], copies=int(case.op == "mix_")))
    elif case.peers:
        found += [_kernel_peer(*peer) for peer in _PEERS]
    return found


def _kernel_peer(
    name: str, distribution: str, module: str, variant: str, copies: int, slow: bool
) -> KernelContender | Missing:
    peer = _peer_module(module)
    if isinstance(peer, str):
        return Missing(name, peer)
    return KernelContender(name, distribution, "torch", lambda x: peer.kernel(x.rows), variant, copies, slow)


def step_contenders() -> list[StepContender | Missing]:
    backend = library_backend()
    found: list[StepContender | Missing] = [
        PLAIN,
        ACCUMULATE,
        StepContender(LIBRARY, LIBRARY, backend, _drop_in, "pytorch-pcgrad"),
        StepContender(f"{LIBRARY}.GradientSurgery", LIBRARY, backend, _surgery, "paper"),
        StepContender(f"{LIBRARY}.backward", LIBRARY, backend, _functional, "paper"),
        StepContender(
            f"{LIBRARY}[bf16 rows]",
            LIBRARY,
            backend,
            lambda problem, optimizer: _drop_in(problem, optimizer, torch.bfloat16),
            "pytorch-pcgrad",
            timed=False,
        ),
    ]
    for name, distribution, module, variant, _, _ in _PEERS:
        peer = _peer_module(module)
        if isinstance(peer, str):
            found.append(Missing(name, peer))
            continue
        found.append(_step_peer(name, distribution, peer.step, variant))
        if hasattr(peer, "step_sequential"):
            found.append(_step_peer(f"{name}[one by one]", distribution, peer.step_sequential, variant))
    return found


def _step_peer(
    name: str,
    distribution: str,
    build: Callable[[Problem, Optimizer], Callable[[Forward], None]],
    variant: str,
) -> StepContender:
    def calls(problem: Problem, optimizer: Optimizer) -> StepCalls:
        return StepCalls(build(problem, optimizer), optimizer.step)

    return StepContender(name, distribution, "torch", calls, variant, shared_only=variant == "torchjd")


def version(contender: KernelContender | StepContender | Missing) -> str:
    if isinstance(contender, Missing):
        return ""
    if contender.distribution == LIBRARY:
        return fastpcgrad.__version__
    return version_of(contender.distribution) if contender.distribution else "benchmarks/peers"


class Pool:
    """One block of normal random numbers from which every case of a dtype takes its rows.

    About half of the pairs of rows conflict, as for unrelated tasks. ``mix_`` changes rows in place: its
    coefficients are a rotation, so that rows stay normal however often it is called.
    """

    def __init__(self, elements: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._blocks = {"float32": torch.empty(elements).normal_(generator=generator)}
        self._elements = elements

    def inputs(self, case: KernelCase) -> KernelInputs:
        rows = self._block(case).as_strided((case.tasks, case.width), (case.row_stride, 1))
        return kernel_inputs(rows)

    def _block(self, case: KernelCase) -> Tensor:
        if case.dtype not in self._blocks:
            self._blocks[case.dtype] = self._blocks["float32"].to(DTYPES[case.dtype])
        return self._blocks[case.dtype]


def kernel_inputs(rows: Tensor) -> KernelInputs:
    tasks, width = rows.shape
    generator = torch.Generator().manual_seed(tasks)
    rotation = torch.linalg.qr(torch.randn(tasks, tasks, generator=generator, dtype=torch.float64)).Q.contiguous()
    weights = 0.5 + torch.rand(tasks, generator=generator, dtype=torch.float64)
    return KernelInputs(rows, weights, rotation, rows.new_empty(width), lambda: torch.empty_like(rows))


def new_optimizer(problem: Problem) -> Optimizer:
    return SGD(problem.parameters(), lr=1e-4)


def shared_parameters(problem: Problem) -> list[int]:
    """Indices of the parameters that belong to no single task."""
    heads = {id(p) for p in problem.heads.parameters()} if isinstance(problem, Classifier) else set()
    return [i for i, p in enumerate(problem.parameters_list()) if id(p) not in heads]
