"""docs/comparison.md names what there is: each name is looked up in its column's package, arguments in signatures."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "comparison.md").read_text(encoding="utf-8")
PACKAGES = {name: name for name in ("fastpcgrad", "LibMTL", "pytorch_optimizer")} | {"TorchJD": "torchjd"}
NAME = re.compile(r"`([\w.]+)(?:\(([\w=, ]+)\))?`")


def cells():
    """(package, cell) of all columns but the first of each row."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines())
        if header == ["why"]:
            continue
        yield from ((PACKAGES[column], cell) for row in rows for column, cell in zip(header, row, strict=True))


NAMED = sorted({(package, *found) for package, cell in cells() for found in NAME.findall(cell)})


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


@pytest.mark.parametrize(("package", "name", "arguments"), NAMED, ids=[f"{named[0]}.{named[1]}" for named in NAMED])
def test_what_is_named_is_there(package, name, arguments):
    if package != "fastpcgrad":
        pytest.importorskip(package)
    there = found(f"{package}.{name}")
    for argument in filter(None, arguments.replace("=", "").split(", ")):
        assert argument in inspect.signature(there).parameters


def test_every_row_of_ours_names_something():
    ours = [cell for package, cell in cells() if package == "fastpcgrad"]
    assert len(ours) > 10 and all(map(NAME.fullmatch, ours))


OURS = {
    "methods": "PCGrad MGDA CAGrad GradVac GradDrop IMTLG AlignedMTL ConFIG DualProj FairGrad Krum NashMTL TrimmedMean "
    "UPGrad MoDo SDMGrad",
    "balancing": "COSMOS DWA FAMO GradNorm PBI STCH UncertaintyWeighting",
}
"""What the rows on methods and balancers mean, in the code's names."""


@pytest.mark.parametrize("room", OURS)
def test_the_methods_that_are_named_are_ours(room):
    assert set(OURS[room].split()) <= set(found(f"fastpcgrad.{room}").__all__)


KNOWN_AS = {"Random": "RandomWeights", "UW": "UncertaintyWeighting"}
"""TorchJD's names of what has another name here."""


def test_what_torchjd_has_is_here_or_on_the_page():
    aggregation, scalarization = map(pytest.importorskip, ("torchjd.aggregation", "torchjd.scalarization"))
    theirs = {name.removesuffix("Weighting") for name in aggregation.__all__}
    theirs |= {name for name in vars(scalarization) if name[0].isupper()}
    theirs -= {"", "Aggregator", "GramianWeightedAggregator", "WeightedAggregator", "Scalarizer"}
    ours = {*found("fastpcgrad.methods").__all__, *found("fastpcgrad.balancing").__all__}
    assert len(theirs) > 25 and {KNOWN_AS.get(name, name) for name in theirs} <= ours


def test_what_pytorch_optimizer_does_with_gradients_is_on_the_page():
    package = pytest.importorskip("pytorch_optimizer")
    merging = {name for name, kind in vars(package).items() if hasattr(kind, "pc_backward") or "oto" in name}
    assert {"PCGrad", "RotoGrad"} <= merging and all(f"`{name}`" in PAGE for name in merging)
