"""The examples with trainers: short runs train, and draw where tasks conflicted."""

import pytest
import torch

pytest.importorskip("matplotlib", reason="pip install 'fastpcgrad[examples]'")

from examples import accelerate_adapters, lightning_digits, trainer_tasks
from examples.progressions import LENGTH, NUMBERS, TASKS, rows, stack

# Of other packages, when they are imported or used.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
]


@pytest.fixture(autouse=True)
def _kept_state():
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def is_a_figure(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 20_000


def test_rows_go_on_as_their_task_says():
    for t, (task, by) in enumerate(TASKS.items()):
        ids = stack(rows(task, 5))["input_ids"]
        assert ids.shape == (5, LENGTH + 1) and (ids[:, 0] == NUMBERS + t).all()
        assert ((ids[:, 2:] - ids[:, 1:-1] - by) % NUMBERS == 0).all()
    starts = [stack(rows(task, 5))["input_ids"][:, 1] for task in TASKS]
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])


def test_the_trainer(tmp_path, capsys):
    pytest.importorskip("transformers", reason="pip install 'fastpcgrad[transformers]'")
    logged = trainer_tasks.main(["--steps", "4", "--out", str(tmp_path / "new")])
    assert is_a_figure(tmp_path / "new" / trainer_tasks.FIGURE)
    assert {"surgery/loss/up", "conflicts/conflict_rate/model.layers.3"} <= set(logged)
    assert str(tmp_path / "new") in capsys.readouterr().out.replace("\n", "")


def test_adapters(tmp_path):
    pytest.importorskip("peft", reason="pip install 'fastpcgrad[peft]'")
    losses = accelerate_adapters.main(["--steps", "8", "--out", str(tmp_path)])
    assert is_a_figure(tmp_path / accelerate_adapters.FIGURE)
    assert all(own[-1] < own[0] for own in losses.values())


def test_lightning(tmp_path):
    pytest.importorskip("lightning", reason="pip install 'fastpcgrad[lightning]'")
    figures = lightning_digits.main(["--epochs", "1", "--out", str(tmp_path)])
    assert is_a_figure(tmp_path / lightning_digits.FIGURE)
    assert figures["surgery/loss/digit"] < 2.3 and "conflicts/conflict_rate/reader.trunk.0" in figures


@pytest.mark.parametrize("example", [trainer_tasks, accelerate_adapters, lightning_digits])
def test_a_missing_package_is_named_with_its_remedy(example, monkeypatch):
    monkeypatch.setattr("examples.command_line.find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"missing: .*pip install 'fastpcgrad\[(transformers|peft|lightning),examples\]'"
    ):
        example.main([])
