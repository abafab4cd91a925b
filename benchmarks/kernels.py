"""Who competes in an op on a packed J: the library, torch and the peers, each prepared before the clock starts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

import fastpcgrad
from benchmarks.cases import DTYPES, SMALLEST_WIDTH, KernelCase, Op
from benchmarks.rows import LIBRARY, missing, version_of
from benchmarks.timing import Call
from fastpcgrad import backends


@dataclass(frozen=True)
class Inputs:
    """J, and what the ops take beside it. ``order``: of the projections; None: drawn in each call."""

    rows: Tensor
    weights: Tensor
    coefficients: Tensor
    out: Tensor
    order: Tensor | None = None


Build = Callable[[Inputs], Call]


@dataclass(frozen=True)
class Contender:
    """One competitor of an op.

    Attributes:
        build: prepares its call; or why it cannot be had here: it gets a row that says so.
        variant: which order of the projections its ``pcgrad`` draws and from where (a name of the library's).
        copies: how many T x N buffers it needs at its peak, so that a case that would not fit is skipped.
        slow: its cost grows with T² passes over N: it is predicted before it is called.
    """

    name: str
    distribution: str
    backend: str
    build: Build | str
    variant: str = "torchjd"
    copies: int = 0
    slow: bool = False

    @property
    def version(self) -> str:
        return "" if isinstance(self.build, str) else version(self.distribution)


def version(distribution: str) -> str:
    """Of who competes: the library's, a peer's, or that it is a peer written here."""
    if distribution == LIBRARY:
        return fastpcgrad.__version__
    return version_of(distribution) if distribution else "benchmarks/peers"


def library_backend(device: str = "cpu") -> str:
    """The name of the backend that the library picks for tensors of that device."""
    return backends.select(device).__name__.rsplit(".", 1)[-1]


def _pcgrad(x: Inputs) -> Call:
    if x.order is None:
        return lambda: fastpcgrad.pcgrad(x.rows, variant="torchjd")
    return lambda: fastpcgrad.pcgrad(x.rows, order=x.order)


LIBRARY_OPS: dict[Op, Build] = {
    "gram": lambda x: lambda: fastpcgrad.gram(x.rows),
    "combine": lambda x: lambda: fastpcgrad.combine(x.rows, x.weights, out=x.out),
    "pcgrad": _pcgrad,
    "mix_": lambda x: lambda: fastpcgrad.mix_(x.rows, x.coefficients),
}


def _torch_combine(x: Inputs) -> Call:
    # [1, T] @ [T, N] with a preallocated result is the fastest spelling of w @ J over fp32 and bf16.
    weights, out = x.weights.to(x.rows.dtype)[None], x.out[None]
    return lambda: torch.mm(weights, x.rows, out=out)


def _torch_mix(x: Inputs) -> Call:
    coefficients, buffer = x.coefficients.to(x.rows.dtype), torch.empty_like(x.rows)
    return lambda: x.rows.copy_(torch.matmul(coefficients, x.rows, out=buffer))


TORCH_OPS: dict[Op, Build] = {
    "gram": lambda x: lambda: x.rows @ x.rows.T,
    "combine": _torch_combine,
    "mix_": _torch_mix,
}


def _eager(build: Build) -> Build:
    def built(inputs: Inputs) -> Call:
        call = build(inputs)

        def forced() -> object:
            with backends.forcing("eager"):
                return call()

        return forced

    return built


@dataclass(frozen=True)
class Peer:
    """Somebody else's PCGrad, in a module of ``benchmarks.peers``."""

    name: str
    distribution: str
    file: str
    variant: str
    copies: int
    slow: bool

    def module(self) -> ModuleType | str:
        """Or why it cannot be imported: whatever its import raised ends up in the row."""
        try:
            return importlib.import_module(f"benchmarks.peers.{self.file}")
        except Exception as error:
            return missing(error)

    def contender(self) -> Contender:
        module = self.module()
        build: Build | str = module if isinstance(module, str) else lambda x: module.kernel(x.rows)
        return Contender(self.name, self.distribution, "torch", build, self.variant, self.copies, self.slow)


PEERS = (
    Peer("torchjd", "torchjd", "torchjd_peer", "torchjd", 0, False),
    Peer("loop", "", "loop", "pytorch-pcgrad", 2, True),
    Peer("pytorch_optimizer", "pytorch_optimizer", "pytorch_optimizer_peer", "pytorch-pcgrad", 5, True),
)


def contenders(case: KernelCase) -> list[Contender]:
    """The library first: the others are compared with it."""
    build = LIBRARY_OPS[case.op]
    found = [Contender(LIBRARY, LIBRARY, library_backend(), build)]
    # The fallback without compiled code: of interest, but not worth the time on wide rows.
    if case.peers and case.width <= SMALLEST_WIDTH and library_backend() != "eager":
        found.append(Contender(f"{LIBRARY}[eager]", LIBRARY, "eager", _eager(build), copies=1))
    if case.op != "pcgrad":
        found.append(Contender("torch", "torch", "torch", TORCH_OPS[case.op], copies=int(case.op == "mix_")))
    elif case.peers:
        found += [peer.contender() for peer in PEERS]
    return found


class Pool:
    """One block of normal random numbers from which every case of a dtype takes its rows.

    About half of the pairs of rows conflict, as for unrelated tasks. ``mix_`` changes rows in place: its
    coefficients are a rotation, so that rows stay normal however often it is called.
    """

    def __init__(self, elements: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._blocks = {"float32": torch.empty(elements).normal_(generator=generator)}

    def inputs(self, case: KernelCase) -> Inputs:
        if case.dtype not in self._blocks:
            self._blocks[case.dtype] = self._blocks["float32"].to(DTYPES[case.dtype])
        return inputs(self._blocks[case.dtype].as_strided((case.tasks, case.width), (case.row_stride, 1)))


def inputs(rows: Tensor, order: Tensor | None = None) -> Inputs:
    tasks, width = rows.shape
    generator = torch.Generator().manual_seed(tasks)
    rotation = torch.linalg.qr(torch.randn(tasks, tasks, generator=generator, dtype=torch.float64)).Q.contiguous()
    weights = 0.5 + torch.rand(tasks, generator=generator, dtype=torch.float64)
    return Inputs(rows, weights.to(rows.device), rotation.to(rows.device), rows.new_empty(width), order)
