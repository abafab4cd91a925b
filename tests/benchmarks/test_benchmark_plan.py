"""The plan of ``make gpu``, with commands that stand in for its parts."""

import os
import re
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_plan
from benchmarks.gpu_plan import Part
from benchmarks.rows import ROOT

FAILING = "print('the reason'); raise SystemExit(3)"
HANGING = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"


def part(name, script, limit=30):
    return Part(name, [sys.executable, "-c", script], 1, limit, f"stands in for {name}")


def test_what_fails_or_hangs_does_not_stop_the_next(tmp_path, capfd):
    """Nor does what it started live on."""
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    plan = [
        part("fails", FAILING),
        part("hangs", HANGING.format(child=child), limit=1),
        Part("missing", [str(tmp_path / "nothing")], 1, 1, "a command that is not there"),
        part("works", f"import pathlib; pathlib.Path({str(tmp_path / 'out' / 'rows')!r}).write_text('a row')"),
    ]
    start = time.monotonic()
    assert not gpu_plan.run(plan, tmp_path / "out", minutes=1)
    out = tmp_path / "out"
    assert (out / "rows").read_text() == "a row"
    said = (out / "gpu_plan.txt").read_text()
    assert re.findall(r"^=== (\w+): (.*), \d+ s$", said, re.MULTILINE) == [
        ("fails", "failed with status 3"),
        ("hangs", "ended after 1 s"),
        ("missing", f"not begun: [Errno 2] No such file or directory: '{tmp_path / 'nothing'}'"),
        ("works", "done"),
    ]
    assert "\nthe reason\n=== fails" in said and "\nbegun\n=== hangs" in said
    assert said.index("works      about   1 s,  30 at most") < said.index("=== fails")  # the plan comes first
    shown = capfd.readouterr().out
    assert "the reason" in shown and "=== works: done" in shown
    time.sleep(max(0.0, start + 4 - time.monotonic()))
    assert not late.exists()


def test_what_is_left_of_the_time_limits_a_part(tmp_path):
    plan = [part("long", "import time; time.sleep(60)"), part("next", "")]
    assert not gpu_plan.run(plan, tmp_path, minutes=0.5 / 60)
    said = (tmp_path / "gpu_plan.txt").read_text()
    assert "=== long: ended after 0 s" in said and "=== next: no time was left" in said


def test_all_went_well(tmp_path):
    assert gpu_plan.run([part("works", "")], tmp_path, minutes=1)


def test_the_parts_write_where_out_says_and_name_what_is_there(tmp_path):
    plan = gpu_plan.parts(tmp_path)
    assert sum(part.seconds for part in plan) <= 15 * 60 and all(part.seconds < part.limit for part in plan)
    words = [word for part in plan for word in part.command]
    assert {word for word in words if word.startswith(str(tmp_path))} == {
        str(tmp_path / "gpu.jsonl"),
        str(tmp_path / "tuned.h"),
        str(tmp_path / "triton_sizes.jsonl"),
        str(tmp_path / "triton_tuned.py"),
    }
    named = [word.removeprefix("--ignore=") for word in words if "tests/" in word]
    assert named and all((ROOT / path).exists() for path in named)


@pytest.mark.parametrize("chosen", [["sleep"], ["tests", "figure"]])
def test_an_unknown_part_is_refused_with_the_names(chosen, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_plan", *chosen]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 2 and f"no part {chosen[-1]}; there are library, solvers" in result.stderr
    assert not list(tmp_path.iterdir())
