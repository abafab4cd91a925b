"""docs/comparison.md names what there is: each name in code is imported, each argument looked for in a signature."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "comparison.md").read_text(encoding="utf-8")
NAME = re.compile(r"`((?:fastpcgrad|torchjd|LibMTL|pytorch_optimizer)[\w.]*)(?:\(([\w=, ]+)\))?`")
NAMED = sorted({(name, arguments) for name, arguments in NAME.findall(PAGE)})


def found(name):
    """What a dotted name stands for: a module, or an attribute of one."""
    package, *rest = name.split(".")
    here = importlib.import_module(package)
    for k, part in enumerate(rest):
        try:
            here = getattr(here, part)
        except AttributeError:
            here = importlib.import_module(".".join((package, *rest[: k + 1])))
    return here


@pytest.mark.parametrize(("name", "arguments"), NAMED, ids=[name for name, _ in NAMED])
def test_what_is_named_is_there(name, arguments):
    if not name.startswith("fastpcgrad"):
        pytest.importorskip(name.partition(".")[0])
    there = found(name)
    for argument in filter(None, arguments.replace("=", "").split(", ")):
        assert argument in inspect.signature(there).parameters


def test_every_row_of_ours_names_something():
    table = PAGE.partition("## What fastpcgrad has")[2]
    rows = [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 10 and all(NAME.fullmatch(cell) for cell in rows)


OURS = {
    "methods": "PCGrad MGDA CAGrad GradVac GradDrop IMTLG AlignedMTL ConFIG DualProj FairGrad Krum NashMTL TrimmedMean "
    "UPGrad",
    "balancing": "DWA UncertaintyWeighting FAMO STCH GradNorm",
}
"""What the rows on methods and balancers mean, in the code's names."""


@pytest.mark.parametrize("room", OURS)
def test_the_methods_that_are_named_are_ours(room):
    assert set(OURS[room].split()) <= set(found(f"fastpcgrad.{room}").__all__)
