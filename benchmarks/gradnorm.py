"""``python -m benchmarks.gradnorm [--quick] [--threads 2] [--append]``

One training step of GradNorm on the toy problem of its paper (a trunk of four layers of 100, a head of 100 outputs a
task, batches of 100) and on one with a trunk of 1024: forward, norms, backward, Adam on the network, the weights' step.
Subjects, each with its own equal network, take turns (``benchmarks.measure``):

- ``fastpcgrad`` and ``fastpcgrad[lucasbotang]``: ``gradNorm`` in its two variants, a call of 20 steps a round.
- ``double backward``: the public way (``benchmarks.peers.gradnorm_double_backward``).
- ``double backward[tuned]``: the best that can be made of it by two arguments: differentiated with respect to the
  weights alone, as the paper has it, and with the fused Adam that fastpcgrad takes.
- ``equal weights``: forward, one backward and the fused Adam, without any balancing: the floor.

Each variant is first compared with its double backward in float64. A case begins only in the first two minutes; what
comes too late on a busy machine gets a row that says so. Rows are appended to benchmarks/results/gradnorm.jsonl with
``--append`` alone; without it they are only shown.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.measure import Plan, Samples, Subject, in_turn, paired_ratio, percentile
from benchmarks.peers import gradnorm_double_backward
from benchmarks.rows import SKIPPED_LATE, Environment, Row
from benchmarks.session import Session, command
from fastpcgrad.gradnorm import gradNorm

RESULTS = rows.ROOT / "benchmarks" / "results" / "gradnorm.jsonl"
TARGET = 1.5
MINUTES = 2.0
STEPS = 20
ALPHA, NETWORK_LR, WEIGHTS_LR = 0.12, 1e-5, 1e-4
FEATURES, LABELS, BATCH = 250, 100, 100
OURS, LEAKING, DOUBLE, TUNED, EQUAL = (
    "fastpcgrad",
    "fastpcgrad[lucasbotang]",
    "double backward",
    "double backward[tuned]",
    "equal weights",
)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    tasks: int
    width: int = 100

    @property
    def label(self) -> str:
        return f"gradnorm T={self.tasks} width={self.width}"


CASES = (Case(2), Case(10), Case(2, 1024), Case(10, 1024))


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


def _gradnorm(net: ToyNet, batch: Batch, variant: str) -> Callable[[], object]:
    batches = [batch] * STEPS
    return lambda: gradNorm(net, net.last_shared, ALPHA, batches, 1, NETWORK_LR, WEIGHTS_LR, variant=variant)


def _double_backward(net: ToyNet, batch: Batch, tuned: bool) -> Callable[[], object]:
    settings = (net.last_shared, ALPHA, NETWORK_LR, WEIGHTS_LR)
    step = gradnorm_double_backward.step(net, *settings, weights_only=tuned, fused=tuned)

    def steps() -> None:
        for _ in range(STEPS):
            step(*batch)

    return steps


def _equal_weights(net: ToyNet, batch: Batch) -> Callable[[], object]:
    optimizer = torch.optim.Adam(net.parameters(), lr=NETWORK_LR, fused=True)

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            net(*batch).sum().backward()
            optimizer.step()

    return steps


SUBJECTS: dict[str, Callable[[ToyNet, Batch], Callable[[], object]]] = {
    OURS: lambda net, batch: _gradnorm(net, batch, "paper"),
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


def measure(case: Case, session: Session, plan: Plan) -> list[Row]:
    """A row a subject; times are of one step, the mean of the ``STEPS`` of a round."""
    if session.late:
        return [_row(case, session.environment, name, SKIPPED_LATE) for name in SUBJECTS]
    if (found := disagreement(case)) > 1e-9:
        raise RuntimeError(f"{case.label}: the weights are off those of the double backward by {found:.1e}")
    competitors = []
    for name, build in SUBJECTS.items():
        net, batch = problem(case)
        competitors.append(Subject(name, {"steps": build(net, batch)}))
    samples = {
        name: Samples({r: ms / STEPS for r, ms in phases["steps"].by_round.items()}, phases["steps"].cold)
        for name, phases in in_turn(competitors, plan).items()
    }
    return [_timed(_row(case, session.environment, name), samples) for name in samples]


def _row(case: Case, environment: Environment, name: str, status: str = "ok") -> Row:
    return Row(
        kind="step",
        case=case.label,
        op="gradnorm",
        subject=name,
        environment=environment,
        subject_version=environment.fastpcgrad if name in (OURS, LEAKING) else "benchmarks/peers",
        backend="torch",
        T=case.tasks,
        N=sum(p.numel() for p in ToyNet(case).parameters()),
        dtype="float32",
        status=status,
        note=f"whole step; mean of {STEPS} consecutive steps",
    )


def _timed(row: Row, samples: dict[str, Samples]) -> Row:
    own = samples[row.subject]
    p20, p50, p80 = (percentile(own.values, p) for p in (20, 50, 80))
    ratios = {other: paired_ratio(own, samples[other]) for other in samples if other != row.subject}
    return dataclasses.replace(row, rounds=own.rounds, cold=own.cold, p20_ms=p20, p50_ms=p50, p80_ms=p80, ratios=ratios)


def show(console: Console, measured: Sequence[Row]) -> None:
    table = Table("case", "subject", title="GradNorm: one training step")
    for title in ("p20 ms", "p50 ms", "p80 ms", f"{DOUBLE} takes", f"over {EQUAL}"):
        table.add_column(title, justify="right")
    for row in (row for row in measured if row.ok):
        against = {DOUBLE: 1.0, EQUAL: 1.0} | row.ratios
        times = (f"{ms:.3f}" for ms in (row.p20_ms, row.p50_ms, row.p80_ms) if ms is not None)
        last = row.subject == EQUAL
        table.add_row(
            row.case,
            escape(row.subject),
            *times,
            f"{1 / against[DOUBLE]:.2f}x",
            f"{against[EQUAL]:.2f}x",
            end_section=last,
        )
    console.print(table)
    for row in measured:
        if row.subject == OURS and not row.ok:
            console.print(f"{row.case}: {row.status}")
        elif row.subject == OURS:
            speed = 1 / row.ratios[DOUBLE]
            word = "met" if speed >= TARGET else "MISSED"
            console.print(f"{row.case}: {speed:.2f}x the double backward's speed, target {TARGET}x: {word}")


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = command(
        "gradnorm", "Time GradNorm's training step.", "the toy problem's own width alone, few rounds", RESULTS
    )
    options = parser.parse_args(arguments)

    session = Session.begin(options, columns=140)
    console = session.console
    session.allow(MINUTES)
    plan = Plan(2.0, least=5, most=20) if options.quick else Plan(3.0, least=5, most=60, slow=1.0, slow_least=2)
    cases = CASES[:2] if options.quick else CASES
    measured: list[Row] = []
    with session.progress("gradnorm", len(cases)) as starts:
        for case in cases:
            starts(case.label)
            measured += measure(case, session, plan)
    show(console, measured)
    session.keep(measured, options)
    return measured


if __name__ == "__main__":
    main()
