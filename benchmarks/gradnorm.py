"""One training step of GradNorm: forward, norms, backward, Adam on the network, the weights' step.

On the toy problem of its paper (a trunk of four layers of 100, a head of 100 outputs a task, batches of 100) and on one
with a trunk of 1024.

Subjects, each with its own equal network, take turns:

- ``fastpcgrad`` and ``fastpcgrad[lucasbotang]``: ``gradNorm`` in its two variants, a call of 20 steps a round.
- ``double backward``: the public way (``benchmarks.peers.gradnorm_double_backward``).
- ``double backward[tuned]``: the best that can be made of it by two arguments: differentiated with respect to the
  weights alone, as the paper has it, and with the fused Adam that fastpcgrad takes.
- ``equal weights``: forward, one backward and the fused Adam, without any balancing: the floor.

Each variant is first compared with its double backward in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.peers import gradnorm_double_backward
from benchmarks.rows import LIBRARY, SKIPPED_LATE, Row
from benchmarks.session import Run
from benchmarks.timing import Call, Phases, Plan, in_turn, ratios, with_times
from fastpcgrad.gradnorm import gradNorm

STEPS = 20
ALPHA, NETWORK_LR, WEIGHTS_LR = 0.12, 1e-5, 1e-4
FEATURES, LABELS, BATCH = 250, 100, 100
LEAKING, DOUBLE, TUNED, EQUAL = (
    f"{LIBRARY}[lucasbotang]", "double backward", "double backward[tuned]", "equal weights"
)  # fmt: skip

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    tasks: int
    width: int = 100

    @property
    def label(self) -> str:
        return f"gradnorm T={self.tasks} width={self.width}"


CASES = (Case(2), Case(10), Case(2, 1024), Case(10, 1024))


def cases(quick: bool) -> tuple[Case, ...]:
    """Quick: the toy problem's own width alone."""
    return CASES[:2] if quick else CASES


QUICK, FULL = Plan(2.0, least=5, most=20), Plan(3.0, least=5, most=60, slow=1.0, slow_least=2)


class ToyNet(nn.Module):
    """Four ReLU layers and a linear head a task; gives the T mean squared errors as one tensor."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        layers = [nn.Linear(case.width if i else FEATURES, case.width) for i in range(4)]
        self.last_shared = layers[-1]
        self.trunk = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))
        self.heads = nn.ModuleList(nn.Linear(case.width, LABELS) for _ in range(case.tasks))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shared = self.trunk(x)
        return torch.stack([nn.functional.mse_loss(head(shared), y[:, t]) for t, head in enumerate(self.heads)])


def problem(case: Case) -> tuple[ToyNet, Batch]:
    """The same network and batch for every subject."""
    torch.manual_seed(0)
    net = ToyNet(case)
    scales = torch.logspace(0, 2, case.tasks)[:, None]
    return net, (torch.rand(BATCH, FEATURES), scales * torch.randn(BATCH, case.tasks, LABELS).sign())


def _gradnorm(net: ToyNet, batch: Batch, variant: str) -> Call:
    batches = [batch] * STEPS
    return lambda: gradNorm(net, net.last_shared, ALPHA, batches, 1, NETWORK_LR, WEIGHTS_LR, variant=variant)


def _repeated(step: Callable[..., object], batch: Batch) -> Call:
    return lambda: [step(*batch) for _ in range(STEPS)]


def _double_backward(net: ToyNet, batch: Batch, tuned: bool) -> Call:
    settings = (net.last_shared, ALPHA, NETWORK_LR, WEIGHTS_LR)
    return _repeated(gradnorm_double_backward.step(net, *settings, weights_only=tuned, fused=tuned), batch)


def _equal_weights(net: ToyNet, batch: Batch) -> Call:
    optimizer = torch.optim.Adam(net.parameters(), lr=NETWORK_LR, fused=True)

    def step(*given: Tensor) -> None:
        optimizer.zero_grad()
        net(*given).sum().backward()
        optimizer.step()

    return _repeated(step, batch)


SUBJECTS: dict[str, Callable[[ToyNet, Batch], Call]] = {
    LIBRARY: lambda net, batch: _gradnorm(net, batch, "paper"),
    LEAKING: lambda net, batch: _gradnorm(net, batch, "lucasbotang"),
    DOUBLE: lambda net, batch: _double_backward(net, batch, tuned=False),
    TUNED: lambda net, batch: _double_backward(net, batch, tuned=True),
    EQUAL: _equal_weights,
}


def disagreement(case: Case, steps: int = 5) -> float:
    """How far the weights of either variant are from those of its double backward in float64, relatively."""
    start, (x, y) = problem(case)
    start, batch = start.double(), (x.double(), y.double())
    worst = 0.0
    for variant in ("paper", "lucasbotang"):
        net, peer = copy.deepcopy(start), copy.deepcopy(start)
        log, _ = gradNorm(
            net, net.last_shared, ALPHA, [batch] * steps, 1, NETWORK_LR, WEIGHTS_LR, log=True, variant=variant
        )
        settings = (peer.last_shared, ALPHA, NETWORK_LR, WEIGHTS_LR)
        step = gradnorm_double_backward.step(peer, *settings, weights_only=variant == "paper")
        for found in log[1:]:
            worst = max(worst, float((torch.from_numpy(found) / step(*batch) - 1).abs().max()))
    return worst


def measure(run: Run, of: Iterable[Case]) -> None:
    for case in of:
        run.starts(case.label)
        run.add(rows(run, case, QUICK if run.quick else FULL))


def rows(run: Run, case: Case, plan: Plan) -> list[Row]:
    """A row a subject; times are of one step, the mean of the ``STEPS`` of a round."""
    if run.late:
        return [_template(run, case, name, SKIPPED_LATE) for name in SUBJECTS]
    if (found := disagreement(case)) > 1e-9:
        raise RuntimeError(f"{case.label}: the weights are off those of the double backward by {found:.1e}")

    def phases_of(name: str) -> Phases:
        return {"steps": SUBJECTS[name](*problem(case))}

    times, failures = in_turn({name: functools.partial(phases_of, name) for name in SUBJECTS}, plan)
    samples = {name: phases["steps"].over(STEPS) for name, phases in times.items()}
    templates = [_template(run, case, name, failures.get(name, "ok")) for name in SUBJECTS]
    return [
        dataclasses.replace(with_times(r, samples[r.subject]), ratios=ratios(r.subject, samples)) if r.ok else r
        for r in templates
    ]


def _template(run: Run, case: Case, name: str, status: str) -> Row:
    width = sum(p.numel() for p in ToyNet(case).parameters())
    version = run.environment.fastpcgrad if name in (LIBRARY, LEAKING) else "benchmarks/peers"
    note = f"whole step; mean of {STEPS} consecutive steps"
    return run.row(
        "step", case.label, "gradnorm", name, subject_version=version, backend="torch", T=case.tasks, N=width,
        status=status, note=note,
    )  # fmt: skip
