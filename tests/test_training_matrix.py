"""Whole training steps in every combination of mode, dtype, mixed precision, checkpointing, compilation, accumulation.

Every step is compared with the same task gradients by plain autograd, merged by the oracle in float64. The forward of
the oracle runs under the same autocast, so that only the surgery differs.
"""

from __future__ import annotations

import io
import itertools
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastpcgrad
from fastpcgrad import methods, reference

TASKS = 3
MICRO_BATCHES = (1, 3, 2)
"""How many micro-batches each task has where gradients are accumulated."""
VARIANT = "tensorflow"
"""Draws nothing and sums."""
LR = 0.05

Mode = Literal["streaming", "pc_backward", "backward"]
Checkpointing = Literal["no checkpoint", "non-reentrant", "reentrant"]


@dataclass(frozen=True)
class Dtypes:
    parameters: torch.dtype
    rows: torch.dtype | None = None

    def __str__(self) -> str:
        rows = "" if self.rows is None else f" {_short(self.rows)} rows"
        return _short(self.parameters) + rows

    @property
    def converted(self) -> bool:
        return self.rows is not None


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


@dataclass(frozen=True)
class Case:
    mode: Mode
    dtypes: Dtypes
    autocast: torch.dtype | None
    checkpointing: Checkpointing
    compiled: bool
    accumulated: bool

    def __str__(self) -> str:
        autocast = "no autocast" if self.autocast is None else f"autocast {str(self.autocast)[6:]}"
        flags = ["compiled"] * self.compiled + ["accumulated"] * self.accumulated
        return ", ".join([self.mode, str(self.dtypes), autocast, self.checkpointing, *flags])

    @property
    def tolerance(self) -> float:
        return 1e-6 if {self.dtypes.parameters, self.dtypes.rows} <= {torch.float32, None} else 4e-3

    def why_not(self) -> str | None:
        """Why this combination makes no sense; None where it does."""
        if self.mode == "backward" and self.dtypes.converted:
            return "backward has rows of the parameters' dtype"
        if self.mode == "backward" and self.checkpointing == "reentrant":
            return "backward refuses reentrant checkpoints"
        if self.mode == "pc_backward" and self.accumulated:
            return "pc_backward replaces .grad: micro-batches belong to task(t)"
        if self.dtypes.parameters == torch.bfloat16 and self.autocast == torch.float16:
            return "bfloat16 parameters need neither float16 nor a loss scale"
        if self.compiled and self.checkpointing == "reentrant":
            return "torch.compile does not trace reentrant checkpoints"
        return None


CASES = [
    Case(*choices)
    for choices in itertools.product(
        get_args(Mode),
        (
            Dtypes(torch.float32),
            Dtypes(torch.bfloat16),
            Dtypes(torch.float32, torch.bfloat16),
            Dtypes(torch.bfloat16, torch.float32),
        ),
        (None, torch.bfloat16, torch.float16),
        get_args(Checkpointing),
        (False, True),
        (False, True),
    )
]


class Model(nn.Module):
    """A trunk that may be checkpointed, and a linear head a task: TASKS times ``[batch]`` from ``[batch, 6]``."""

    def __init__(self, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 12), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(12, 1) for _ in range(TASKS))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.checkpointing == "no checkpoint":
            z = self.trunk(x)
        else:
            z = checkpoint(self.trunk, x, use_reentrant=self.checkpointing == "reentrant")
        return [head(z).squeeze(1) for head in self.heads]


@contextmanager
def shared_graphs() -> Iterator[None]:
    """Models that are compiled here may run several backward passes on one graph."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    with functorch.patch(donated_buffer=False), inductor.patch(fx_graph_cache=False, compile_threads=1):
        yield


@cache
def compiled_model(case: Case, backend: str) -> Model:
    """A compiled model, shared by what needs the same one: its parameters are set anew by each test."""
    model = Model(case.checkpointing).to(case.dtypes.parameters)
    model.compile(backend=backend)
    return model


class Training:
    """A model, its data, and the plain gradients of its tasks."""

    def __init__(self, case: Case, backend: str = "aot_eager") -> None:
        self.case = case
        values = torch.Generator().manual_seed(3)
        dtype = case.dtypes.parameters
        self.plain = Model("no checkpoint").to(dtype)
        with torch.no_grad():
            for p in self.plain.parameters():
                p.copy_(torch.randn(p.shape, generator=values) / math.sqrt(max(p.shape[-1], 2)))
        self.model = Model(case.checkpointing).to(dtype)
        if case.compiled:
            # One compilation serves the rows' dtypes and both ways to accumulate, but not both ways to free graphs.
            key = Case(case.mode, Dtypes(dtype), case.autocast, case.checkpointing, True, False)
            self.model = compiled_model(key, backend)
        self.model.load_state_dict(self.plain.state_dict())
        self.parameters = list(self.model.parameters())
        for p in self.parameters:
            p.grad = None
        # Reentrant checkpoints want an input that requires grad.
        self.batches = [
            torch.randn(8, 6, generator=values).to(dtype).requires_grad_(case.checkpointing == "reentrant")
            for _ in range(max(MICRO_BATCHES))
        ]
        # Opposite targets on the same inputs: the tasks conflict.
        target = torch.randn(8, generator=values).to(dtype)
        self.targets = [target, -target, target / 2]
        self.counts = MICRO_BATCHES if case.accumulated else (1,) * TASKS
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=case.autocast == torch.float16)

    def losses(self, batch: int, model: Model | None = None) -> list[Tensor]:
        """The scaled losses of all tasks on one micro-batch, from one forward."""
        dtype = self.case.autocast
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            outputs = (model or self.model)(self.batches[batch])
            losses = [(o - target).square().mean() for o, target in zip(outputs, self.targets, strict=True)]
        return [self.scaler.scale(loss) for loss in losses]

    def plain_gradients(self, task: int, batch: int) -> list[Tensor | None]:
        """By plain autograd, in float64 from then on and without the loss scale."""
        self.plain.load_state_dict(self.model.state_dict())
        loss = self.losses(batch, self.plain)[task]
        grads = torch.autograd.grad(loss, list(self.plain.parameters()), allow_unused=True)
        return [None if g is None else g.double() / self.scaler.get_scale() for g in grads]

    def expected(self) -> tuple[list[Tensor | None], float]:
        """The merged gradient in float64, and the Σ_j ‖g_j‖ of its rows: no more than Σ_j |w_j|‖g_j‖, as w_j ≥ 1."""
        if self.case.mode != "backward":
            rows = [_added([self.plain_gradients(t, k) for k in range(n)]) for t, n in enumerate(self.counts)]
            return self._merged(rows)
        # Each call adds its merged gradient.
        parts, scale = [], 0.0
        for k in range(max(self.counts)):
            merged, norms = self._merged([self.plain_gradients(t, k) for t in self._present(k)])
            parts.append(merged)
            scale += norms
        return _added(parts), scale

    def _merged(self, rows: list[list[Tensor | None]]) -> tuple[list[Tensor | None], float]:
        return reference.merge(rows, self.parameters, VARIANT), sum(map(_norm, rows))

    def _present(self, batch: int) -> list[int]:
        return [t for t, count in enumerate(self.counts) if batch < count]

    def assert_close(self, expected: list[Tensor | None], scale: float) -> None:
        found: list[Any] = [p.grad for p in self.parameters]
        assert all(g.dtype == self.case.dtypes.parameters for g in found)
        apart = [g.double() - e for g, e in zip(found, expected, strict=True)]
        assert _norm(apart) <= self.case.tolerance * scale


def _norm(gradients) -> float:
    return math.hypot(*(float(g.norm()) for g in gradients if g is not None))


def _added(parts: list[list[Tensor | None]]) -> list[Tensor | None]:
    sums = []
    for column in zip(*parts, strict=True):
        there = [g for g in column if g is not None]
        sums.append(torch.stack(there).sum(dim=0) if there else None)
    return sums


class Surgery:
    """One mode's way from the losses of all micro-batches to the merged gradient in ``.grad``."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.optimizer: Any = torch.optim.SGD(training.parameters, lr=LR)
        rows = training.case.dtypes.rows
        self.method = methods.PCGrad(VARIANT)
        self.merge = {"streaming": self._streaming, "pc_backward": self._pc_backward, "backward": self._backward}[
            training.case.mode
        ]
        if training.case.mode == "streaming":
            self.surgery = fastpcgrad.GradientSurgery(self.optimizer, TASKS, self.method, row_dtype=rows)
        elif training.case.mode == "pc_backward":
            self.optimizer = fastpcgrad.PCGrad(self.optimizer, method=self.method, row_dtype=rows)

    def _streaming(self) -> None:
        """The first two micro-batches of a task in one stay, the third in another, after the other tasks'."""
        for stay in ((0, 1), (2,)):
            for t, count in enumerate(self.training.counts):
                if stay[0] < count:
                    with self.surgery.task(t):
                        for k in stay[:count]:
                            self.training.losses(k)[t].backward()
        self.surgery.merge()

    def _pc_backward(self):
        self.optimizer.pc_backward(self.training.losses(0))

    def _backward(self) -> None:
        self.optimizer.zero_grad()
        for k in range(max(self.training.counts)):
            losses = self.training.losses(k)
            fastpcgrad.backward([losses[t] for t in self.training._present(k)], method=self.method)

    def step(self):
        """Scale, surgery, unscale, clip, step; the merged gradient is compared before it is clipped."""
        training = self.training
        expected, scale = training.expected()
        self.merge()
        training.scaler.unscale_(self.optimizer)
        training.assert_close(expected, scale)
        limit = _norm(expected) / 2
        nn.utils.clip_grad_norm_(training.parameters, limit)
        grads: list[Any] = [p.grad for p in training.parameters]
        clipped = _norm([grad.double() for grad in grads])
        assert clipped == pytest.approx(limit, rel=0.02)
        before = [p.detach().clone() for p in training.parameters]
        training.scaler.step(self.optimizer)
        training.scaler.update()
        for p, b, grad in zip(training.parameters, before, grads, strict=True):
            torch.testing.assert_close(p, b.add(grad, alpha=-LR))


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in CASES if case.why_not() is None])
def test_a_step_gives_the_oracles_gradient(case):
    # Streaming frees each graph in its only backward pass, and needs nothing of the compiler.
    with shared_graphs() if case.compiled and case.mode != "streaming" else nullcontext():
        surgery = Surgery(Training(case))
        for _ in range(2):  # on rows that were used before, at other parameters
            surgery.step()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own, from importing inductor
@pytest.mark.parametrize("mode", ["streaming", "pc_backward"])
def test_a_step_of_a_model_that_inductor_compiled(mode):
    case = Case(mode, Dtypes(torch.float32), None, "no checkpoint", True, False)
    with shared_graphs():
        Surgery(Training(case, "inductor")).step()


FP16 = Case("streaming", Dtypes(torch.float32), torch.float16, "no checkpoint", False, True)


@pytest.mark.parametrize("task", range(TASKS))
def test_an_overflow_in_one_task_skips_the_step_and_halves_the_scale(task):
    training = Training(FP16)
    surgery = Surgery(training)
    before = [p.detach().clone() for p in training.parameters]
    for t in range(TASKS):
        with surgery.surgery.task(t):
            (training.losses(0)[t] * (torch.inf if t == task else 1.0)).backward()
    surgery.surgery.merge()
    training.scaler.unscale_(surgery.optimizer)
    training.scaler.step(surgery.optimizer)
    training.scaler.update()
    assert training.scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, b) for p, b in zip(training.parameters, before, strict=True))
    surgery.step()
    assert training.scaler.get_scale() == 2.0**9
    assert all((p != b).any() for p, b in zip(training.parameters, before, strict=True))


def test_a_schedule_sets_the_rate_of_each_step():
    training = Training(Case("streaming", Dtypes(torch.float32), None, "no checkpoint", False, False))
    surgery = Surgery(training)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(surgery.optimizer, gamma=0.5)
    for step in range(3):
        before = [p.detach().clone() for p in training.parameters]
        surgery.merge()
        surgery.optimizer.step()
        scheduler.step()
        for p, b in zip(training.parameters, before, strict=True):
            torch.testing.assert_close(p, b.add(p.grad, alpha=-LR * 0.5**step))


class Run:
    """A training run with state everywhere: momentum, loss scale, a generator, the method's own."""

    def __init__(self, method: Literal["PCGrad", "GradVac"]) -> None:
        self.training = Training(FP16)
        self.training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        self.generator = torch.Generator().manual_seed(11)
        self.method = getattr(methods, method)(generator=self.generator)
        self.optimizer = torch.optim.AdamW(self.training.parameters, lr=LR)
        self.surgery = fastpcgrad.GradientSurgery(self.optimizer, TASKS, self.method)

    def steps(self, count: int) -> None:
        scaler = self.training.scaler
        for _ in range(count):
            for t in range(TASKS):
                with self.surgery.task(t):
                    self.training.losses(0)[t].backward()
            self.surgery.merge()
            scaler.unscale_(self.optimizer)
            scaler.step(self.optimizer)
            scaler.update()

    def saved(self) -> bytes:
        file = io.BytesIO()
        state = {part: self._part(part).state_dict() for part in ("model", "optimizer", "scaler", "method")}
        torch.save({**state, "generator": self.generator.get_state()}, file)
        return file.getvalue()

    def resume(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved))
        self.generator.set_state(state.pop("generator"))
        for part, values in state.items():
            self._part(part).load_state_dict(values)

    def _part(self, name):
        return {
            "model": self.training.model,
            "optimizer": self.optimizer,
            "scaler": self.training.scaler,
            "method": self.method,
        }[name]


@pytest.mark.parametrize("method", ["PCGrad", "GradVac"])
def test_a_killed_run_goes_on_with_the_same_numbers(method):
    whole = Run(method)
    whole.steps(4)
    saved = whole.saved()
    whole.steps(4)

    resumed = Run(method)
    with torch.no_grad():  # a new process begins elsewhere
        for p in resumed.training.parameters:
            p.zero_()
    resumed.resume(saved)
    resumed.steps(4)
    assert resumed.training.scaler.get_scale() == whole.training.scaler.get_scale() > 2.0**10
    for found, expected in zip(resumed.training.parameters, whole.training.parameters, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(resumed.generator.get_state(), whole.generator.get_state())
