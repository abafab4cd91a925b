"""The rows of the results file: their schema, where and on what they were measured, reading and appending.

Rows are JSON lines and are appended, never edited. Everything that is shown (plots, the README's table) is
derived from them.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
SCHEMA = 1

# What a number depends on. Results, plots and the README's table change with every run and are none of it.
_MEASURED_PATHS = ("fastpcgrad", "csrc", "benchmarks", "setup.py", "pyproject.toml")

LIBRARY, MACHINE = "fastpcgrad", "machine"
SKIPPED_BUDGET = "skipped: budget"
SKIPPED_LATE = f"{SKIPPED_BUDGET} (the time for this part was up)"

Kind = Literal["bandwidth", "kernel", "step", "memory", "method", "sizes", "training"]


@dataclass(frozen=True)
class Environment:
    """Where and on what a run took place; a part of each of its rows."""

    run: str
    date: str
    commit: str
    device: str
    threads: int
    torch: str
    numpy: str
    fastpcgrad: str
    schema: int = SCHEMA


@dataclass(frozen=True)
class Row:
    """One subject on one case.

    Attributes:
        case: the case's label; rows with the same one were measured in turn and can be compared.
        subject, subject_version: who, and which release of it.
        backend: which of its implementations ran.
        status: ``ok``; else why there are no numbers: ``skipped: ...``, ``missing: ...``, ``wrong: ...``.
        rounds: how many timings the percentiles are of.
        cold: the only timing was the first call, without a warm-up.
        p20_ms, p50_ms, p80_ms: of the op, or of the merge of a step (T backwards and the surgery, no
            forward).
        ratios: this subject's time / that subject's time, median of the paired rounds. Below 1: faster.
        whole_p50_ms, whole_ratios: the same for the whole step: forward, merge and the optimizer's step.
        gbps: bytes that the op must move / its median time, in 10⁹ bytes a second.
        bandwidth_fraction: ``gbps`` / the machine's best copy bandwidth of this run (gram: read bandwidth).
        bandwidth_fraction_in_turn: the same against the copy (read) that took turns with the subject.
        peak_bytes: peak memory of the step beyond model and activations (see ``benchmarks.memory``).
        peak_ratio: ``peak_bytes`` / (T · N · itemsize).
        learning_rate, steps: of a training.
        validation, test: of a training, by measure: the value of each seed 0..S-1 on data of these parts.
        note: how the numbers were taken, where that is not the same for all rows.
    """

    kind: Kind
    case: str
    op: str
    subject: str
    environment: Environment
    subject_version: str = ""
    backend: str = ""
    status: str = "ok"
    T: int | None = None
    N: int | None = None
    dtype: str | None = None
    layout: str | None = None
    rounds: int | None = None
    cold: bool = False
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    whole_p50_ms: float | None = None
    whole_ratios: dict[str, float] = field(default_factory=dict)
    gbps: float | None = None
    bandwidth_fraction: float | None = None
    bandwidth_fraction_in_turn: float | None = None
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    learning_rate: float | None = None
    steps: int | None = None
    validation: dict[str, list[float]] = field(default_factory=dict)
    test: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def failed(error: BaseException) -> str:
    """The status of a row whose subject raised."""
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def missing(error: BaseException) -> str:
    """The status of a row whose subject cannot be had here."""
    return f"missing: {str(error).partition(chr(10))[0]}"


def to_json(row: Row) -> str:
    """One line; the environment's fields lie beside the row's own, and what is None or empty is left out."""
    kept = {name: _rounded(value) for name, value in fields_of(row).items()}
    return json.dumps(dataclasses.asdict(row.environment) | kept, ensure_ascii=False)


def fields_of(row: Row) -> dict[str, Any]:
    """A row's own fields, but for what is None or empty."""
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "environment"}
    return {name: value for name, value in values.items() if value not in (None, "", {}, False)}


def from_json(line: str) -> Row:
    """The row of one line; ValueError names a field that the schema lacks."""
    values: dict[str, Any] = json.loads(line)
    if values.get("schema") != SCHEMA:
        raise ValueError(f"rows of schema {SCHEMA} can be read; found {values.get('schema')!r}")
    of_environment = {f.name for f in dataclasses.fields(Environment)}
    environment = Environment(**{name: values.pop(name) for name in of_environment})
    if unknown := values.keys() - {f.name for f in dataclasses.fields(Row)}:
        raise ValueError(f"a row has fields that the schema lacks: {sorted(unknown)}")
    return Row(environment=environment, **values)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def append(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [from_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the run that was appended last."""
    every = list(rows)
    return [row for row in every if row.environment.run == every[-1].environment.run] if every else []


def latest_of(*results: str) -> list[Row]:
    """Those of each of these files of results."""
    return [row for name in results for row in latest(read(RESULTS / f"{name}.jsonl"))]


def every_of(*results: str) -> list[Row]:
    """Those of all runs of each of these files, for what goes on where an earlier run was cut off."""
    return [row for name in results for row in read(RESULTS / f"{name}.jsonl")]


def environment(threads: int) -> Environment:
    import numpy
    import torch

    import fastpcgrad

    now = datetime.datetime.now(datetime.timezone.utc)
    return Environment(
        run=now.strftime("%Y%m%dT%H%M%SZ"),
        date=now.strftime("%Y-%m-%d"),
        commit=commit(),
        device=cpu_model(),
        threads=threads,
        torch=torch.__version__,
        numpy=numpy.__version__,
        fastpcgrad=fastpcgrad.__version__,
    )


def cpu_model() -> str:
    """The model that the kernel reports and the number of cores: ``AMD EPYC, 2 cores``."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that was measured, ``+dirty`` where files differ from it; ``unknown`` without git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *_MEASURED_PATHS, ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def version_of(distribution: str) -> str:
    if not distribution:
        return ""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
