"""``python -m benchmarks.methods [--quick] [--only METHOD] [--threads 2] [--append]``

Every method of ``fastpcgrad.methods`` against TorchJD's, at T = 2, 8 and 32:

- *weights*: G to weights, on a Gram matrix that exists: float64 for the library, for TorchJD its own of the same J.
  Methods that are no function of G have no such row.
- *aggregation*: the merged gradient of a packed fp32 J [T, N]: Gram matrix, weights and combination. What it takes to
  read J twice, by the faster of torch's dot and sum, says how far it can go for a method that looks at G.

The task gradients conflict pairwise. The two take turns in one process (``benchmarks.measure``); the ratio is library /
TorchJD, so below 1 is faster. ``apart`` says how far the two results are from each other on a small float64 J, as a
part of Σ_j |w_j| ‖g_j‖ (of Σ_j ‖g_j‖ for methods without weights). What has not begun after seven minutes on a busy
machine is left out, and a line says what. Rows go to benchmarks/results/methods.jsonl with ``--append`` alone.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import fastpcgrad
from benchmarks import method_cases, rows, subjects
from benchmarks.measure import Plan, Samples, Subject, in_turn, paired_ratio, percentile
from benchmarks.method_cases import FLOOR, PEER, TASKS, task_gradients
from benchmarks.rows import Row
from benchmarks.session import Session, command
from fastpcgrad.methods.elementwise import Elementwise

RESULTS = rows.ROOT / "benchmarks" / "results" / "methods.jsonl"
MINUTES = 7.0


def their_weighting(aggregator: Any) -> Callable[[Tensor], Tensor] | None:
    """What gives TorchJD's weights: of G where it has that, or of the shape of J alone."""
    from torchjd.aggregation import GramianWeightedAggregator, WeightedAggregator

    found: Callable[[Tensor], Tensor] | None = None
    if isinstance(aggregator, GramianWeightedAggregator):
        found = aggregator.gramian_weighting
    elif isinstance(aggregator, WeightedAggregator):
        found = aggregator.weighting
    return found


def apart(name: str, tasks: int) -> float:
    """How far the two results are from each other."""
    grads = task_gradients(tasks, 64, torch.float64)
    method, aggregator = method_cases.ours(name, tasks), method_cases.theirs(name, tasks, grads.dtype)
    torch.manual_seed(0)
    found = method_cases.aggregate(method, grads)
    torch.manual_seed(0)
    expected = aggregator(grads)
    norms = grads.norm(dim=1)
    if not isinstance(method, Elementwise):
        torch.manual_seed(0)
        norms = norms * method_cases.ours(name, tasks).weights(fastpcgrad.gram(grads)).abs()
    return float((found - expected).norm() / norms.sum())


def measure(name: str, grads: Tensor, session: Session, plan: Plan) -> list[Row]:
    """The rows of one method on one J: of the library and of TorchJD, for the weights and for the aggregation."""
    tasks = len(grads)
    method = method_cases.ours(name, tasks)
    try:
        distance = apart(name, tasks)
        aggregator = method_cases.theirs(name, tasks, grads.dtype)
        missing, note = "", f"{distance:.1e} apart"
    except (ImportError, AttributeError) as problem:
        aggregator, missing, note = None, subjects.MISSING + str(problem).partition("\n")[0], ""

    calls: dict[str, dict[str, Callable[[], object]]] = {
        "aggregation": {subjects.LIBRARY: lambda: method_cases.aggregate(method, grads)}
    }
    if aggregator is not None:
        calls["aggregation"][PEER] = lambda: aggregator(grads)
    if not isinstance(method, Elementwise):
        gram = fastpcgrad.gram(grads)
        calls["weights"] = {subjects.LIBRARY: lambda: method.weights(gram)}
        weighting = None if aggregator is None else their_weighting(aggregator)
        if weighting is not None:
            their_gram = grads @ grads.mT
            calls["weights"][PEER] = lambda: weighting(their_gram)

    measured = []
    for op, competitors in calls.items():
        timings = in_turn([Subject(subject, {"call": call}) for subject, call in competitors.items()], plan)
        samples = {subject: phases["call"] for subject, phases in timings.items()}
        template = Row(
            kind="method",
            case=f"{name} {op} T={tasks} N={grads.shape[1]}",
            op=f"{name}.{op}",
            subject="",
            environment=session.environment,
            T=tasks,
            N=grads.shape[1],
            dtype="float32",
            layout="contiguous",
            note=note,
        )
        measured += [_timed(template, subject, samples) for subject in samples]
        if missing:
            measured.append(dataclasses.replace(template, subject=PEER, status=missing))
    return measured


def floor(grads: Tensor, session: Session, plan: Plan) -> Row:
    """Two times the fastest of the ways to read J."""
    flat = grads.view(-1)
    reads: dict[str, Callable[[], object]] = {"torch dot": lambda: torch.dot(flat, flat), "torch sum": flat.sum}
    timings = in_turn([Subject(name, {"call": call}) for name, call in reads.items()], plan)
    samples = {name: phases["call"] for name, phases in timings.items()}
    name = min(samples, key=lambda key: percentile(samples[key].values, 50))
    p20, p50, p80 = (2 * percentile(samples[name].values, p) for p in (20, 50, 80))
    tasks, width = grads.shape
    return Row(
        "method",
        f"{FLOOR} T={tasks} N={width}",
        FLOOR,
        "machine",
        session.environment,
        T=tasks,
        N=width,
        dtype="float32",
        rounds=samples[name].rounds,
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        note=f"2 x {name}",
    )


def _timed(template: Row, subject: str, samples: dict[str, Samples]) -> Row:
    own = samples[subject]
    p20, p50, p80 = (percentile(own.values, p) for p in (20, 50, 80))
    return dataclasses.replace(
        template,
        subject=subject,
        subject_version=rows.version_of(subject),
        backend=subjects.library_backend() if subject == subjects.LIBRARY else "",
        rounds=own.rounds,
        cold=own.cold,
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        ratios={other: paired_ratio(own, samples[other]) for other in samples if other != subject},
    )


def show(console: Console, measured: Sequence[Row]) -> None:
    table = Table(
        "method", "T", *(f"{op} {unit}" for op, unit in (("weights", "µs"), ("aggregation", "ms"))), "apart",
        title="fastpcgrad (TorchJD; TorchJD / fastpcgrad, above 1: fastpcgrad is faster)", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    by_key = {(row.op, row.T, row.subject): row for row in measured}
    keys = dict.fromkeys((row.op.partition(".")[0], row.T) for row in measured if row.op != FLOOR)
    for name, tasks in keys:
        cells = []
        for op, scale in (("weights", 1e3), ("aggregation", 1.0)):
            own, other = (by_key.get((f"{name}.{op}", tasks, subject)) for subject in (subjects.LIBRARY, PEER))
            cells.append(_cell(own, other, scale))
        aggregation = by_key[f"{name}.aggregation", tasks, subjects.LIBRARY]
        table.add_row(name, str(tasks), *cells, aggregation.note.partition(" ")[0])
    console.print(table)
    for row in measured:
        if row.op == FLOOR:
            console.print(f"{row.case}: {row.p50_ms:.4g} ms ({row.note})")
    for problem in dict.fromkeys(f"{row.op.partition('.')[0]}: {row.status}" for row in measured if not row.ok):
        console.print(problem, markup=False)


def _cell(own: Row | None, other: Row | None, scale: float) -> str:
    if own is None or own.p50_ms is None:
        return "–"
    found = f"{own.p50_ms * scale:.4g}"
    if other is None or other.p50_ms is None:
        return found
    factor = 1 / own.ratios[PEER]
    colour = "green" if factor >= 1 else "red"
    cold = ", 1 cold" if other.cold else ""
    return f"{found} ({other.p50_ms * scale:.4g}{cold}; [{colour}]{escape(f'{factor:.3g}')}×[/])"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command("methods", "Time the methods.", "N=2^18 instead of 2^22, fewer rounds: about a minute", RESULTS)
    parser.add_argument("--only", action="append", metavar="METHOD", help="one method alone; may be repeated")
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - set(method_cases.names()):
        parser.error(f"--only must be one of {', '.join(method_cases.names())}; found {', '.join(sorted(unknown))}")

    # A peer's warnings would be printed into the progress bar; they change no number.
    warnings.filterwarnings("ignore", category=UserWarning)
    session = Session.begin(options, columns=140)
    console = session.console
    started = time.monotonic()
    width, plan = (1 << 18, Plan(0.1, least=5, most=50)) if options.quick else (1 << 22, Plan(0.5, least=7, most=500))
    chosen = {tasks: [n for n in method_cases.names(tasks) if n in (options.only or [n])] for tasks in TASKS}
    measured: list[Row] = []
    late: list[str] = []
    session.allow(MINUTES)
    with session.progress("methods", sum(map(len, chosen.values()))) as starts:
        for tasks, found in chosen.items():
            grads = task_gradients(tasks, width)
            measured.append(floor(grads, session, plan))
            for name in found:
                starts(f"{name} T={tasks}")
                if session.late:
                    late.append(f"{name} T={tasks}")
                else:
                    measured += measure(name, grads, session, plan)
    show(console, measured)
    if late:
        console.print(f"not begun within {MINUTES:g} minutes: {', '.join(late)}")
    session.keep(measured, options)
    console.print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
