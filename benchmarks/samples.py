"""One loss a sample: the Gram matrix of all samples' gradients, and a whole step with it.

Subjects, each with its own equal MLP and batch, take turns; each begins with a forward pass:

- ``plain``: the backward pass of the mean loss and SGD's step, as training without surgery has it.
- ``gramian``: ``fastpcgrad.gramian(losses, batch_dim=0)``.
- ``backward``: ``fastpcgrad.backward(losses, batch_dim=0)`` with PCGrad, and SGD's step.
- ``torchjd``: the Gram matrix by TorchJD's autogram ``Engine``.

``p50_ms`` and ``ratios`` are of what follows the forward pass, ``whole_p50_ms`` and ``whole_ratios`` of both. Both Gram
matrices are first compared with that of the samples' gradients, one backward pass each, in float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastpcgrad
from benchmarks import check, kernels, steps
from benchmarks.modes import BACKWARDS, FORWARD
from benchmarks.rows import LIBRARY, SKIPPED_LATE, Row
from benchmarks.session import Run
from benchmarks.timing import Clock, Phases, Plan, in_turn

PLAIN, GRAM, WHOLE, ENGINE = "plain", "gramian", "backward", "torchjd"

Merge = Callable[[Tensor], object]
"""What a subject does with the losses."""


@dataclass(frozen=True)
class Case:
    """``widths``: of the layers of the MLP."""

    widths: tuple[int, ...]
    batch: int

    @property
    def label(self) -> str:
        return f"per sample {'-'.join(map(str, self.widths))} B={self.batch}"


NARROW, WIDE = (64, 256, 256, 10), (512, 2048, 2048, 2048, 10)


def cases(quick: bool) -> list[Case]:
    found = [Case(NARROW, 32), Case(NARROW, 64), Case(NARROW, 256), Case(WIDE, 32), Case(WIDE, 128)]
    return found[:1] if quick else found


QUICK, FULL = Plan(1.0, least=5, most=20), Plan(3.0, least=5, most=200, slow=0.2, slow_least=4)


class Setting:
    """The same net and batch for every subject."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(case.widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1]).to(dtype)
        self.parameters = list(self.net.parameters())
        self.inputs = torch.randn(case.batch, case.widths[0]).to(dtype)
        self.labels = torch.randint(0, case.widths[-1], (case.batch,))
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-4)

    def losses(self) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.inputs), self.labels, reduction="none")


def _plain(own: Setting) -> Merge:
    def step(losses: Tensor) -> None:
        own.optimizer.zero_grad()
        losses.mean().backward()
        own.optimizer.step()

    return step


def _gramian(own: Setting) -> Merge:
    return lambda losses: fastpcgrad.gramian(losses, own.parameters, batch_dim=0)


def _backward(own: Setting) -> Merge:
    method = fastpcgrad.methods.PCGrad()

    def step(losses: Tensor) -> None:
        own.optimizer.zero_grad()
        fastpcgrad.backward(losses, own.parameters, batch_dim=0, method=method)
        own.optimizer.step()

    return step


def _engine(own: Setting) -> Merge:
    from torchjd.autogram import Engine

    return Engine(own.net, batch_dim=0).compute_gramian


SUBJECTS: dict[str, Callable[[Setting], Merge]] = {PLAIN: _plain, GRAM: _gramian, WHOLE: _backward, ENGINE: _engine}
GRAMS = (GRAM, ENGINE)


def phases(case: Case, name: str) -> Phases:
    own = Setting(case)
    merge = SUBJECTS[name](own)
    losses: list[Tensor] = []

    def forward() -> None:
        losses[:] = [own.losses()]

    return {FORWARD: forward, BACKWARDS: lambda: merge(losses.pop())}


def gram_error(name: str) -> float:
    """How far a subject's Gram matrix is off that of the gradients, in units of the tolerance."""
    case = Case((12, 16, 5), 7)
    exact, own = Setting(case, torch.float64), Setting(case)
    rows = []
    for loss in exact.losses():
        found = torch.autograd.grad(loss, exact.parameters, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in found]))
    J = torch.stack(rows)
    lengths = J.norm(dim=1)
    gram = SUBJECTS[name](own)(own.losses())
    assert isinstance(gram, Tensor)
    error = (gram - J @ J.T).abs() / torch.outer(lengths, lengths)
    return float(error.max()) / check.TOLERANCE["float32"]


def measure(run: Run, of: Iterable[Case]) -> None:
    for case in of:
        run.starts(case.label)
        run.add(rows(run, case, QUICK if run.quick else FULL))


def rows(run: Run, case: Case, plan: Plan) -> list[Row]:
    """A row a subject."""
    refused = dict.fromkeys(SUBJECTS, SKIPPED_LATE if run.late else "")
    if not run.late:
        refused |= {name: check.objection(functools.partial(gram_error, name)) for name in GRAMS}
    builders = {name: functools.partial(phases, case, name) for name in SUBJECTS if not refused[name]}
    times, failures = in_turn(builders, plan)
    width = sum(p.numel() for p in Setting(case).parameters)
    found = []
    for name in SUBJECTS:
        distribution = {PLAIN: "torch", ENGINE: "torchjd"}.get(name, LIBRARY)
        status = (refused | failures)[name] or "ok"
        row = run.row(
            "step", case.label, "samples", name, subject_version=kernels.version(distribution), T=case.batch, N=width,
            status=status, note=Clock.note,
        )  # fmt: skip
        found.append(steps.with_numbers(row, times) if row.ok else row)
    return found
