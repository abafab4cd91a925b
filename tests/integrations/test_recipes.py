"""What docs/recipes.md shows runs, with each package that is here."""

import re
from pathlib import Path

import pytest
import torch

import fastpcgrad

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
SETUP, *BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The loop of the page, and the block that imports a package; what they leave, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(package=None):
        namespace = {"__name__": "recipes"}
        blocks = [SETUP]
        if package is not None:
            pytest.importorskip(package, reason=f"pip install {package}")
            blocks += [block for block in BLOCKS if re.search(rf"^(import|from) .*\b{package}\b", block, re.MULTILINE)]
            assert len(blocks) == 2
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), namespace)
        return namespace

    return run


def test_every_block_is_run_here():
    assert len(BLOCKS) == len(LOGGERS) + 1 and PAGE.read_text(encoding="utf-8").count("```python") == len(BLOCKS) + 1


def test_the_loop_trains_and_has_figures(run):
    page = run()
    reports = [report for _, report in page["train"]()]
    assert len(reports) == 20 and "surgery/cos/left-right" in reports[0].as_dict()
    assert page["monitor"].looks == 4 and "conflicts/cos/left-right" in page["monitor"].log()


LOGGERS = {"tensorboard": "runs/surgery/events*", "wandb": "wandb/offline-run*/*.wandb", "mlflow": "runs.db"}


@pytest.mark.parametrize("package", LOGGERS)
def test_loggers_take_the_figures(run, package, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    page = run(package)
    assert page["step"] == 19
    (written,) = tmp_path.glob(LOGGERS[package])
    assert b"surgery/cos/left-right" in written.read_bytes()


def test_keras_trains_by_the_merged_gradient(run):
    page = run("keras")
    model, losses = page["keras_model"], page["history"].history
    assert all(losses[name][-1] < losses[name][0] for name in ("left", "right"))
    x, y, weights = page["x"], page["y"], [weight.value for weight in model.trainable_weights]
    of_tasks = [(model(x)[name] - y[name]).square().mean() for name in ("left", "right")]
    expected = [w - 0.1 * g for w, g in zip(weights, fastpcgrad.grad(of_tasks, weights), strict=True)]
    model.train_step((x, y))
    for weight, right in zip(model.trainable_weights, expected, strict=True):
        torch.testing.assert_close(weight.value, right)
