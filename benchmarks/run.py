"""``python -m benchmarks.run [--quick] [--only kernel|step|memory] [--threads 2] [--append]``

What is timed, for each kind of row:

- *kernel*: one call of an op on a packed J that exists already. Competitors that need another form of J (a
  list of rows, a mask) get it before the clock starts; a preallocated result where the op takes one.
- *step*: every subject has its own equal model. Each round its gradients are set to None and a forward builds
  the losses (not part of the figure); then the merge is timed: for ``plain`` T times (gradients to None,
  ``loss.backward(retain_graph=not last)``), for the others the call on the same losses that ends with the
  merged gradient in ``.grad``, their own T backward passes included. The ratio is subject / plain. A second
  figure, the whole step, is forward + merge + SGD step against the same sum of ``plain``.
- *memory*: see ``benchmarks.memory``.

Competitors take turns in one process (``benchmarks.measure``). Each is compared with the float64 oracle first
(``benchmarks.check``); who is wrong gets no numbers. Rows are appended to benchmarks/results/cpu.jsonl with
``--append`` alone; without it they are only shown.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import cases, check, memory, models, rows, subjects, targets
from benchmarks.cases import KernelCase, MemoryCase, StepCase
from benchmarks.measure import (
    Bandwidth,
    BandwidthProbe,
    Plan,
    Samples,
    Subject,
    in_turn,
    paired_ratio,
    percentile,
    total,
)
from benchmarks.memory import available_bytes
from benchmarks.models import Forward
from benchmarks.rows import SKIPPED_BUDGET, SKIPPED_LATE, Row, failed
from benchmarks.session import Session, command
from benchmarks.subjects import KernelContender, Missing, StepContender

MACHINE = "machine"
SKIPPED_MEMORY = "skipped: memory"

# Ops that move less than this many bytes a call may find their data in a cache: no fraction of bandwidth for
# them.
_STREAMING_BYTES = 256 << 20


@dataclasses.dataclass
class Budget:
    """Seconds for calls that are slow; what is predicted to exceed them is skipped and its row says so."""

    one_call: float
    all_calls: float
    _rate: dict[str, float] = dataclasses.field(default_factory=dict)

    def refuses(self, name: str, work: float) -> str:
        """Why a slow subject may not run work = T² N now; empty where it may."""
        predicted = self._rate.get(name, 0.0) * work
        if predicted > self.one_call:
            return f"{SKIPPED_BUDGET} (one call: {predicted:.0f} s predicted, {self.one_call:.0f} s allowed)"
        if 2 * predicted > self.all_calls:
            return f"{SKIPPED_BUDGET} ({predicted:.0f} s predicted, {self.all_calls:.0f} s left for slow calls)"
        return ""

    def spent(self, name: str, work: float, samples: Samples) -> None:
        self._rate[name] = percentile(samples.values, 50) / 1e3 / work
        # Beside the samples there was a warm-up, unless the warm-up is the sample.
        extra = 0.0 if samples.cold else percentile(samples.values, 50)
        self.all_calls -= (sum(samples.values) + extra) / 1e3


def _objection(error: Callable[[], float]) -> str:
    """Why a subject gets no numbers: it raised, or is off the oracle; empty where it is right."""
    try:
        found = error()
    except Exception as problem:
        return failed(problem)
    return "" if found <= 1 else f"wrong: {found:.3g} times the tolerance off the float64 oracle"


def _timed(row: Row, samples: Samples) -> Row:
    p20, p50, p80 = (percentile(samples.values, p) for p in (20, 50, 80))
    return dataclasses.replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80, rounds=samples.rounds, cold=samples.cold)


def _ratios(name: str, samples: dict[str, Samples]) -> dict[str, float]:
    return {other: paired_ratio(samples[name], samples[other]) for other in samples if other not in (name, MACHINE)}


class KernelPart:
    """The kernel grid. Fractions of bandwidth are added at the end, when the machine's best is known."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._plan = Plan(0.15, least=5, most=20) if session.quick else Plan(0.35, least=5, most=40, slow=1.0)
        self._budget = Budget(10.0, 20.0) if session.quick else Budget(60.0, 170.0)
        session.allow(minutes=6.0)
        self._cases = cases.kernel_cases(session.quick)
        self._checked: dict[tuple[str, str, str, str], str] = {}
        self._in_turn_bandwidth: dict[tuple[str, str], float] = {}

    def run(self) -> list[Row]:
        with self._session.progress("kernels", len(self._cases) + 2) as starts:
            starts("bandwidth of the machine")
            probe = BandwidthProbe(self._session.threads)
            bandwidth = probe.measure(Plan(1.0))
            pool = subjects.Pool(max(case.tasks * case.row_stride for case in self._cases))
            measured: list[Row] = []
            for case in self._cases:
                starts(case.label)
                measured += self._case(case, pool, probe, bandwidth)
            starts("bandwidth of the machine, again")
            bandwidth = bandwidth.best_of(probe.measure(Plan(1.0)))
        return self._bandwidth_rows(bandwidth) + [self._with_bandwidth(row, bandwidth) for row in measured]

    def _case(self, case: KernelCase, pool: subjects.Pool, probe: BandwidthProbe, bandwidth: Bandwidth) -> list[Row]:
        done: list[Row] = []
        ready: dict[str, KernelContender] = {}
        for contender in subjects.kernel_contenders(case):
            status = self._status(contender, case)
            if status or isinstance(contender, Missing):
                done.append(self._row(case, contender, status=status))
            else:
                ready[contender.name] = contender
        if not ready:
            return done
        inputs = pool.inputs(case)
        competitors = [Subject(c.name, {"call": c.build(inputs)}) for c in ready.values()]
        if case.bytes_moved >= _STREAMING_BYTES and case.op != "pcgrad":
            rate = bandwidth.read if case.op == "gram" else bandwidth.copy
            competitors.append(probe.subject(MACHINE, rate.candidate))
        samples = {name: phases["call"] for name, phases in in_turn(competitors, self._plan).items()}
        for name, contender in ready.items():
            if contender.slow:
                self._budget.spent(name, case.tasks**2 * case.width, samples[name])
            if MACHINE in samples:
                moved = (1 if case.op == "gram" else 2) * probe.bytes
                ours = case.bytes_moved / moved * paired_ratio(samples[MACHINE], samples[name])
                self._in_turn_bandwidth[case.label, name] = ours
            row = self._row(case, contender, ratios=_ratios(name, samples))
            done.append(_timed(row, samples[name]))
        return done

    def _status(self, contender: KernelContender | Missing, case: KernelCase) -> str:
        """Why there will be no numbers; empty where there will be."""
        if isinstance(contender, Missing):
            return subjects.MISSING + contender.reason
        if self._session.late:
            return SKIPPED_LATE
        key = (contender.name, case.op, case.dtype, case.layout)
        if key not in self._checked:
            self._checked[key] = _objection(functools.partial(check.kernel_error, contender, case))
        if self._checked[key]:
            return self._checked[key]
        needed = contender.copies * case.tasks * case.width * case.itemsize
        if needed > 0.7 * available_bytes():
            return f"{SKIPPED_MEMORY} ({needed / 2**30:.1f} GiB needed)"
        return self._budget.refuses(contender.name, case.tasks**2 * case.width) if contender.slow else ""

    def _row(
        self,
        case: KernelCase,
        contender: KernelContender | Missing,
        status: str = "ok",
        ratios: dict[str, float] | None = None,
    ) -> Row:
        return Row(
            kind="kernel",
            case=case.label,
            op=case.op,
            subject=contender.name,
            environment=self._session.environment,
            subject_version=subjects.version(contender),
            backend=contender.backend,
            status=status or "ok",
            T=case.tasks,
            N=case.width,
            dtype=case.dtype,
            layout=case.layout,
            ratios=ratios or {},
        )

    def _with_bandwidth(self, row: Row, bandwidth: Bandwidth) -> Row:
        case = next(c for c in self._cases if c.label == row.case)
        if row.p50_ms is None or case.bytes_moved < _STREAMING_BYTES:
            return row
        rate = bandwidth.read if case.op == "gram" else bandwidth.copy
        gbps = case.bytes_moved / row.p50_ms / 1e6
        return dataclasses.replace(
            row,
            gbps=gbps,
            bandwidth_fraction=gbps / rate.gigabytes_per_second,
            bandwidth_fraction_in_turn=self._in_turn_bandwidth.get((row.case, row.subject)),
        )

    def _bandwidth_rows(self, bandwidth: Bandwidth) -> list[Row]:
        size = f"{4 * BandwidthProbe.ELEMENTS / 2**20:.0f} MiB fp32"
        return [
            Row(
                kind="bandwidth",
                case=f"{op} bandwidth",
                op=op,
                subject=MACHINE,
                environment=self._session.environment,
                backend=rate.candidate,
                gbps=rate.gigabytes_per_second,
                note=f"{size}; bytes {moved} per second; the fastest of several ways, by its median",
            )
            for op, rate, moved in (
                ("read", bandwidth.read, "read"),
                ("copy", bandwidth.copy, "read and written"),
            )
        ]


class StepPart:
    """Training steps: the merge against T plain backward passes, and the whole step."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._cases = cases.step_cases(session.quick)
        session.allow(minutes=3.5)

    def run(self) -> list[Row]:
        measured: list[Row] = []
        with self._session.progress("steps", len(self._cases)) as starts:
            for case in self._cases:
                starts(case.label)
                measured += self._case(case)
        return measured

    def _plan(self, case: StepCase) -> Plan:
        seconds = 1.0 if self._session.quick else 3.0
        # The small model's step takes a fraction of a millisecond and needs many rounds.
        most = 2000 if case.model == "tutorial" else 40
        return Plan(seconds, least=11, most=most, slow=1.0, slow_least=2, cold=15.0)

    def _case(self, case: StepCase) -> list[Row]:
        done: list[Row] = []
        ready: dict[str, StepContender] = {}
        for contender in subjects.step_contenders():
            if isinstance(contender, Missing):
                done.append(self._row(case, contender, status=subjects.MISSING + contender.reason))
            elif contender.timed and self._session.late:
                done.append(self._row(case, contender, status=SKIPPED_LATE))
            elif contender.timed:
                objection = _objection(functools.partial(check.step_error, contender, case))
                if objection:
                    done.append(self._row(case, contender, status=objection))
                else:
                    ready[contender.name] = contender
        samples = in_turn([step_subject(c, case) for c in ready.values()], self._plan(case))
        merges = {name: phases["merge"] for name, phases in samples.items()}
        wholes = {name: total(phases.values()) for name, phases in samples.items()}
        for name, contender in ready.items():
            row = self._row(case, contender)
            done.append(
                dataclasses.replace(
                    _timed(row, merges[name]),
                    ratios=_ratios(name, merges),
                    whole_p50_ms=percentile(wholes[name].values, 50),
                    whole_ratios=_ratios(name, wholes),
                )
            )
        return done

    def _row(self, case: StepCase, contender: StepContender | Missing, status: str = "ok") -> Row:
        return Row(
            kind="step",
            case=case.label,
            op="step",
            subject=contender.name,
            environment=self._session.environment,
            subject_version=subjects.version(contender),
            backend=contender.backend,
            status=status,
            T=case.tasks,
            N=sum(p.numel() for p in models.build(case).parameters()),
            dtype="float32",
            note="merge: T backwards and surgery on given losses",
        )


def step_subject(contender: StepContender, case: StepCase) -> Subject:
    """An own copy of the model, and the three timed phases of its step."""
    problem = models.build(case)
    parameters = problem.parameters_list()
    calls = contender.build(problem, subjects.new_optimizer(problem))
    built: list[Forward] = []

    def forward() -> None:
        built.clear()
        models.clear_gradients(parameters)
        built.append(problem())

    return Subject(contender.name, {"forward": forward, "merge": lambda: calls.merge(built[0]), "step": calls.step})


class MemoryPart:
    """Peaks; two fresh processes at a time, since nothing is timed."""

    # The slow peers need minutes at T=8 and show the same multiple of T·N as at T=4.
    SLOW_PEERS = ("loop", "pytorch_optimizer")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._cases = cases.memory_cases(session.quick)
        session.allow(minutes=2.5)

    def run(self) -> list[Row]:
        jobs = [(case, contender) for case in self._cases for contender in self._contenders(case)]
        jobs.sort(key=lambda job: job[1].name in self.SLOW_PEERS)
        measured: list[Row] = []
        with (
            self._session.progress("memory", len(jobs) + len(self._cases)) as starts,
            ThreadPoolExecutor(2) as pool,
        ):

            def peak(case: MemoryCase, subject: str) -> memory.Measured:
                starts(f"{case.label}: {subject}")
                if self._session.late:
                    return memory.Measured(error=SKIPPED_LATE)
                return memory.in_fresh_process(case, subject, self._session.threads)

            common = {case.label: pool.submit(peak, case, memory.ACTIVATIONS) for case in self._cases if case.step}
            peaks = [
                None if isinstance(contender, Missing) else pool.submit(peak, case, contender.name)
                for case, contender in jobs
            ]
            for (case, contender), future in zip(jobs, peaks, strict=True):
                base = common[case.label].result() if case.label in common else memory.Measured()
                measured.append(self._row(case, contender, base, future.result() if future else None))
        return measured

    def _contenders(self, case: MemoryCase) -> Sequence[KernelContender | StepContender | Missing]:
        if case.kernel is not None:
            return subjects.kernel_contenders(case.kernel)
        assert case.step is not None
        skipped = self.SLOW_PEERS if case.step.tasks > 4 else ()
        return [c for c in subjects.step_contenders() if c.name not in skipped]

    def _row(
        self,
        case: MemoryCase,
        contender: KernelContender | StepContender | Missing,
        base: memory.Measured,
        found: memory.Measured | None,
    ) -> Row:
        tasks = (case.step or case.kernel).tasks  # type: ignore[union-attr]
        row = Row(
            kind="memory",
            case=case.label,
            op="step" if case.step else "pcgrad",
            subject=contender.name,
            environment=self._session.environment,
            T=tasks,
            dtype="float32",
            note=memory.NOTE,
        )
        if found is None or isinstance(contender, Missing):
            reason = contender.reason if isinstance(contender, Missing) else ""
            return dataclasses.replace(row, status=subjects.MISSING + reason)
        if error := found.error or base.error:
            return dataclasses.replace(row, status=error)
        beyond = found.peak - (base.peak - base.gradients)
        return dataclasses.replace(
            row,
            subject_version=subjects.version(contender),
            backend=contender.backend,
            N=found.width,
            peak_bytes=beyond,
            peak_ratio=beyond / (tasks * found.width * 4),
        )


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _by_case(measured: Sequence[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in measured:
        grouped.setdefault(row.case, []).append(row)
    return grouped


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=i == 0)
    return table


def show_kernels(console: Console, measured: Sequence[Row]) -> None:
    for row in measured:
        if row.kind == "bandwidth":
            console.print(f"{row.case}: {row.gbps:.1f} GB/s ({row.backend}; {row.note})")
    kernels = [r for r in measured if r.kind == "kernel"]
    others = list(dict.fromkeys(r.subject for r in kernels if r.subject != subjects.LIBRARY))
    table = _table(
        "kernels: milliseconds of fastpcgrad, and how many times as long the others take",
        "case", "rounds", "p20", "p50 ms", "p80", "GB/s", "of machine", "in turn", *map(escape, others),
    )  # fmt: skip
    for case, found in _by_case(kernels).items():
        by_subject = {row.subject: row for row in found}
        ours = by_subject[subjects.LIBRARY]
        table.add_row(
            case,
            str(ours.rounds or ours.status.partition(":")[0]),
            *(_milliseconds(value) for value in (ours.p20_ms, ours.p50_ms, ours.p80_ms)),
            "" if ours.gbps is None else f"{ours.gbps:.1f}",
            "" if ours.bandwidth_fraction is None else f"{ours.bandwidth_fraction:.0%}",
            "" if ours.bandwidth_fraction_in_turn is None else f"{ours.bandwidth_fraction_in_turn:.0%}",
            *(_times(ours, by_subject.get(other)) for other in others),
        )
    console.print(table)
    reasons = Counter((row.subject, row.status) for row in kernels if not row.ok)
    for (subject, status), times in reasons.items():
        console.print(f"{subject}: {status}, {times} times", markup=False)


def _times(ours: Row, row: Row | None) -> str:
    if row is None:
        return ""
    if not row.ok or row.subject not in ours.ratios:
        return f"[red]{row.status.partition(':')[0]}"
    factor = 1 / ours.ratios[row.subject]
    return f"[{'green' if factor >= 1 else 'red'}]{factor:.3g}{' (1 cold)' if row.cold else ''}"


def show_steps(console: Console, measured: Sequence[Row]) -> None:
    table = _table(
        "steps: merge = T backwards and surgery; whole = forward, merge, SGD step",
        "case", "subject", "p20", "p50 ms", "p80", "rounds", "merge / plain", "whole ms", "whole / plain",
    )  # fmt: skip
    for case, found in _by_case(measured).items():
        for i, row in enumerate(found):
            table.add_row(
                case if i == 0 else "",
                escape(row.subject),
                *(_milliseconds(value) for value in (row.p20_ms, row.p50_ms, row.p80_ms)),
                str(row.rounds or ""),
                f"{row.ratios['plain']:.2f}"
                if "plain" in row.ratios
                else ""
                if row.ok
                else f"[red]{escape(row.status)}",
                _milliseconds(row.whole_p50_ms),
                f"{row.whole_ratios['plain']:.2f}" if "plain" in row.whole_ratios else "",
                end_section=i == len(found) - 1,
            )
    console.print(table)


def show_memory(console: Console, measured: Sequence[Row]) -> None:
    table = _table("peak memory beyond model and activations", "case", "subject", "MB", "of T·N·itemsize")
    for case, found in _by_case(measured).items():
        for i, row in enumerate(found):
            table.add_row(
                case if i == 0 else "",
                escape(row.subject),
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
                f"[red]{escape(row.status)}" if row.peak_ratio is None else f"{row.peak_ratio:.3f}",
                end_section=i == len(found) - 1,
            )
    console.print(table)


def show_targets(console: Console, measured: Sequence[Row], of: Sequence[targets.Target] = targets.TARGETS) -> None:
    table = _table("targets", "target", "worst case", "limit", "measured", "verdict")
    colour = {True: "green", False: "bold red", None: "yellow"}
    for verdict in targets.verdicts(measured, of):
        table.add_row(
            verdict.target.text,
            verdict.worst.case if verdict.worst else "",
            verdict.limit,
            verdict.value,
            f"[{colour[verdict.met]}]{verdict.word}",
        )
    console.print(table)


PARTS: dict[str, tuple[type[KernelPart | StepPart | MemoryPart], Callable[[Console, Sequence[Row]], None]]] = {
    "kernel": (KernelPart, show_kernels),
    "step": (StepPart, show_steps),
    "memory": (MemoryPart, show_memory),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(
        "run", "Time fastpcgrad and its peers.", "fewer and smaller cases: about two minutes", rows.RESULTS
    )
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="one part alone; may be repeated")
    options = parser.parse_args(arguments)
    # A peer's warnings would be printed into the progress bar; they change no number.
    warnings.filterwarnings("ignore", category=UserWarning)
    session = Session.begin(options, columns=180)
    console = session.console
    started = time.monotonic()
    measured: list[Row] = []
    for name, (part, show) in PARTS.items():
        if options.only and name not in options.only:
            continue
        found = part(session).run()
        show(console, found)
        measured += found
        session.keep(found, options)
    show_targets(console, measured)
    console.print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
