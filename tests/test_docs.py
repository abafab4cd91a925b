"""Every example that users read runs: docstrings of public names, and pages."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import fastpcgrad

ROOT = Path(__file__).parent.parent


def public_objects():
    """The public names, those of the methods, and the public members of public classes."""
    named = {f"fastpcgrad.{name}": getattr(fastpcgrad, name) for name in fastpcgrad.__all__}
    for room in (fastpcgrad.methods, fastpcgrad.balancing):
        named |= {f"{room.__name__}.{name}": getattr(room, name) for name in room.__all__}
    for name, found in list(named.items()):
        if inspect.isclass(found):
            members = {key: value for key, value in vars(found).items() if not key.startswith("_")}
            named |= {f"{name}.{key}": value for key, value in members.items() if inspect.getdoc(value)}
    return {name: found for name, found in named.items() if inspect.getdoc(found)}


def run_doctest(text, name):
    """Run the examples of a docstring; gives how many there are."""
    namespace = {"torch": torch, "fastpcgrad": fastpcgrad}
    examples = doctest.DocTestParser().get_doctest(text, namespace, name, None, 0)
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    result = runner.run(examples, out=report.append)
    assert result.failed == 0, "".join(report)
    return result.attempted


PUBLIC = public_objects()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_docstrings_run(name):
    run_doctest(inspect.getdoc(PUBLIC[name]), name)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, found in PUBLIC.items()
        if name.count(".") == 1 and inspect.isfunction(found) and inspect.signature(found).parameters
    ]
    + ["fastpcgrad.PCGrad", "fastpcgrad.GradientSurgery", "fastpcgrad.methods.PCGrad"],
)
def test_every_public_function_and_method_has_an_example(name):
    assert ">>>" in inspect.getdoc(PUBLIC[name])


def test_every_public_name_has_a_docstring():
    bare = [name for name in fastpcgrad.__all__ if f"fastpcgrad.{name}" not in PUBLIC]
    assert bare == []


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("index", "usage", "migration", "large_models", "below_the_floor", "methods")),
)


def python_blocks(path):
    """The ```python blocks of a page, each padded with empty lines so that errors show the page's line numbers."""
    text = path.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text.count("\n", 0, block.start(1)) + block[1]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_of_a_page_run_in_order(page):
    path = ROOT / page
    blocks = list(python_blocks(path))
    assert blocks, f"{page} has no ```python blocks"
    namespace = {"__name__": page}
    for block in blocks:
        exec(compile(block, str(path), "exec"), namespace)


def test_a_page_has_no_python_block_that_the_tests_overlook():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(list(python_blocks(ROOT / page))) == len(re.findall(r"```+ *(?:python|py)\b", text)), page


def test_an_example_that_is_wrong_is_found():
    with pytest.raises(AssertionError, match="Expected"):
        run_doctest(">>> torch.ones(1)\ntensor([2.])", "wrong")
