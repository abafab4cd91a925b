"""What the trainings of ``benchmarks.quality`` say: Δm, ranks, and the page's tables.

Δm is the mean over a problem's measures of how much better a rule is than a network that learned one task alone, in per
cent of that network's value; where no task can be learned alone, than the plain sum. Each rule has the learning rate
that is best by validation data; the reference, too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality_problems import PROBLEMS, Budget, Measure, Part, Problem
from benchmarks.quality_rules import ALONE, BALANCERS, FIRST, MEAN, METHODS, PLAIN, SEARCHED
from benchmarks.rows import Row
from benchmarks.tables import markdown

CLEAR = 3.0
"""Standard errors from which on a difference is marked."""
Cells = Mapping[tuple[str, float], Row]
"""By rule and learning rate."""
BASELINES = (PLAIN, MEAN, FIRST, SEARCHED)


@dataclass(frozen=True)
class Outcome:
    """What a rule came to on a problem, with the learning rate that validation chose.

    Attributes:
        deltas: Δm of each seed, in per cent; not finite where training went astray.
        test: by measure the value of each seed.
    """

    rule: str
    rate: float
    deltas: tuple[float, ...]
    test: Mapping[str, Sequence[float]]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.deltas)


def cells(rows: Iterable[Row], problem: str, budget: Budget) -> Cells:
    """The latest row of each cell that had this budget."""
    found: dict[tuple[str, float], Row] = {}
    for row in rows:
        ours = (row.kind, row.case, row.steps) == ("training", problem, budget.steps)
        if ours and all(len(values) == budget.seeds for values in row.test.values()):
            found[row.subject, row.learning_rate or 0.0] = row
    return found


def gain(measure: Measure, value: float, reference: float) -> float:
    """How much better a value is than the reference, in per cent of that."""
    return 100 * (value - reference) / abs(reference) * (1 if measure.larger_is_better else -1)


def delta(problem: type[Problem], values: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Δm: the mean gain over the measures."""
    return statistics.fmean(gain(m, values[m.name], reference[m.name]) for m in problem.measures)


def means(row: Row, part: Part) -> dict[str, float]:
    """Over the seeds, by measure."""
    return {name: statistics.fmean(values) for name, values in getattr(row, part).items()}


def best(found: Cells, rules: Iterable[str], measures: Sequence[Measure], reference: Mapping[str, float]) -> Row | None:
    """The cell of these rules with the highest mean gain on validation data; None where none has numbers."""

    def score(row: Row) -> float:
        values = means(row, "validation")
        mean = statistics.fmean(gain(m, values[m.name], reference[m.name]) for m in measures)
        return mean if math.isfinite(mean) else -math.inf

    wanted = set(rules)
    return max((row for (rule, _), row in found.items() if rule in wanted and row.ok), key=score, default=None)


def references(found: Cells, problem: type[Problem]) -> dict[Part, dict[str, float]] | None:
    """The value of each measure that gains are by: of networks that learned its task alone, or by the plain sum."""
    both: dict[Part, dict[str, float]] = {"validation": {}, "test": {}}
    for place, measure in enumerate(problem.measures):
        rule = ALONE + problem.tasks[place] if problem.alone else PLAIN
        row = best(found, [rule], [measure], {measure.name: 1.0})
        if row is None:
            return None
        for part, values in both.items():
            values[measure.name] = means(row, part)[measure.name]
    return both


def outcomes(found: Cells, problem: type[Problem]) -> dict[str, Outcome]:
    """Of every rule that has numbers, and of the best of the four weightings; nothing without the references."""
    by = references(found, problem)
    if by is None:
        return {}
    made = {}
    groups = {rule: [rule] for rule, _ in found if not rule.startswith(ALONE) and rule not in problem.weightings}
    for name, rules in ({PLAIN: [PLAIN], SEARCHED: list(problem.weightings)} | groups).items():
        row = best(found, rules, problem.measures, by["validation"])
        if row is not None:
            seeds = range(len(next(iter(row.test.values()))))
            of_seed = [{name: values[s] for name, values in row.test.items()} for s in seeds]
            deltas = tuple(delta(problem, values, by["test"]) for values in of_seed)
            made[name] = Outcome(name, row.learning_rate or 0.0, deltas, row.test)
    return made


def beside(outcome: Outcome, other: Outcome) -> tuple[float, float]:
    """The mean difference of Δm, seed by seed, and its standard error."""
    differences = [own - its for own, its in zip(outcome.deltas, other.deltas, strict=True)]
    return statistics.fmean(differences), standard_error(differences)


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; NaN where one is not finite."""
    return statistics.stdev(values) / math.sqrt(len(values)) if all(map(math.isfinite, values)) else math.nan


def is_clear(difference: float, error: float) -> bool:
    return abs(difference) > CLEAR * error


def mean_ranks(every: Mapping[str, Mapping[str, Outcome]]) -> dict[str, float]:
    """1 is the best: the rank by each measure's mean over seeds; its mean over a problem's measures, over problems.

    Equal ones share their mean rank; NaN comes last. Of rules that all problems have.
    """
    kept = [found for found in every.values() if found]
    rules = [rule for rule in kept[0] if all(rule in found for found in kept)] if kept else []
    of_problems: dict[str, list[float]] = {rule: [] for rule in rules}
    for name, found in every.items():
        if found:
            each = [_ranks({r: _loss(m, found[r]) for r in rules}) for m in PROBLEMS[name].measures]
            for rule in rules:
                of_problems[rule].append(statistics.fmean(ranks[rule] for ranks in each))
    return {rule: statistics.fmean(ranks) for rule, ranks in of_problems.items()}


def _loss(measure: Measure, outcome: Outcome) -> float:
    mean = statistics.fmean(outcome.test[measure.name])
    return math.inf if not math.isfinite(mean) else -mean if measure.larger_is_better else mean


def _ranks(losses: Mapping[str, float]) -> dict[str, float]:
    ordered = sorted(losses.values())
    return {rule: ordered.index(loss) + (1 + ordered.count(loss)) / 2 for rule, loss in losses.items()}


def all_outcomes(rows: Sequence[Row], quick: bool = False) -> dict[str, dict[str, Outcome]]:
    """By problem and rule."""
    every = {name: cells(rows, name, problem.budget(quick)) for name, problem in PROBLEMS.items()}
    return {name: outcomes(found, PROBLEMS[name]) for name, found in every.items()}


def in_order(every: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    """Baselines, then the others by their mean rank; at the end what not all problems have."""
    ranks = mean_ranks(every)
    others = {rule for found in every.values() for rule in found} - set(BASELINES)
    return [*BASELINES, *sorted(others, key=lambda rule: (ranks.get(rule, math.inf), rule))]


def page(rows: Sequence[Row], quick: bool = False) -> str:
    """Δm, ranks and times; what is clearly better; and all values."""
    every = {name: found for name, found in all_outcomes(rows, quick).items() if found}
    if not every:
        return "Not yet measured."
    parts = [_deltas(every, rows), _findings(every), *(_values(name, found) for name, found in every.items())]
    return "\n\n".join([*parts, _origin([row for row in rows if row.case in every])])


def _deltas(every: Mapping[str, Mapping[str, Outcome]], rows: Sequence[Row]) -> str:
    ranks, times = mean_ranks(every), _times(rows)
    failed = {(row.case, row.subject) for row in rows if not row.ok}
    lines = []
    for rule in in_order(every):
        shown = [
            "failed" if rule not in found and (name, rule) in failed else _delta_cell(found.get(rule), found.get(PLAIN))
            for name, found in every.items()
        ]
        rank = f"{ranks[rule]:.1f}" if rule in ranks else ""
        lines.append((_shown(rule), *shown, rank, times.get(rule, "")))
    header = ("Δm, % ± standard error", *(PROBLEMS[name].title for name in every), "mean rank", "step / plain sum")
    return markdown(header, lines)


def _shown(rule: str) -> str:
    kind = "" if rule in METHODS else "balancer: " if rule in BALANCERS else "sum: "
    return f"{kind}`{rule}`" if rule in METHODS or rule in BALANCERS else f"{kind}{rule.removesuffix(' sum')}"


def number(value: float) -> str:
    """Of Δm, as it is shown."""
    return "astray" if not math.isfinite(value) else f"{round(value, 1) + 0:+.1f}"


def _delta_cell(outcome: Outcome | None, plain: Outcome | None) -> str:
    if outcome is None:
        return ""
    if plain is None or outcome.rule == PLAIN or not math.isfinite(outcome.mean):
        return number(outcome.mean)
    difference, error = beside(outcome, plain)
    mark = " ▲" if difference > 0 else " ▼"
    return f"{number(outcome.mean)} ± {error:.1f}{mark if is_clear(difference, error) else ''}"


def _times(rows: Sequence[Row]) -> dict[str, str]:
    """By rule, the lowest and the highest of the problems."""
    timed = [row for row in rows if (row.kind, row.op) == ("step", "quality")]
    latest = [row for row in timed if row.environment.run == timed[-1].environment.run]
    ratios: dict[str, list[float]] = {}
    for row in latest:
        ratios.setdefault(row.subject, []).append(row.ratios[PLAIN])
    return {rule: f"{min(found):.1f} to {max(found):.1f}×" for rule, found in ratios.items() if rule != PLAIN}


def _findings(every: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Who is clearly better or worse than the plain sum and than the best weights, from the numbers alone."""
    lines = []
    for name, found in every.items():
        plain, searched = found.get(PLAIN), found.get(SEARCHED)
        counts = [
            _clear(found, METHODS, plain, 1), _clear(found, METHODS, plain, -1), _clear(found, BALANCERS, plain, 1),
            _clear(found, [*METHODS, *BALANCERS], searched, 1),
        ]  # fmt: skip
        lines.append((PROBLEMS[name].title, *counts))
    header = (
        f"by more than {CLEAR:.0f} standard errors", "methods better than the plain sum", "methods worse than it",
        "balancers better than it", "methods and balancers better than the best weights of 4",
    )  # fmt: skip
    return markdown(header, lines)


def _clear(found: Mapping[str, Outcome], rules: Iterable[str], other: Outcome | None, sign: int) -> str:
    if other is None:
        return ""
    named = []
    for rule in rules:
        if rule in found:
            difference, error = beside(found[rule], other)
            if sign * difference > 0 and is_clear(difference, error):
                named.append(f"`{rule}`")
    return ", ".join(named) or "none"


def _values(name: str, found: Mapping[str, Outcome]) -> str:
    """The values themselves, with the learning rate that was chosen."""
    measures = PROBLEMS[name].measures
    lines = [
        (_shown(rule), f"{found[rule].rate:g}", *(_spread(found[rule].test[m.name]) for m in measures))
        for rule in in_order({name: found})
        if rule in found
    ]
    return markdown((PROBLEMS[name].title, "learning rate", *(m.name for m in measures)), lines)


def _spread(values: Sequence[float]) -> str:
    error = standard_error(values)
    return "astray" if math.isnan(error) else f"{statistics.fmean(values):.4g} ± {error:.2g}"


def _origin(rows: Sequence[Row]) -> str:
    """Of all runs that the rows are from."""
    environments = [row.environment for row in rows]
    machines, versions, commits, dates = (
        ", ".join(dict.fromkeys(getattr(environment, name) for environment in environments))
        for name in ("device", "torch", "commit", "date")
    )
    return f"Measured on {machines}, 1 thread; torch {versions}; commit {commits}; {dates}."
