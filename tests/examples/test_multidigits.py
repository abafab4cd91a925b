"""The two-digits example: its data are what it says they are, and fastpcgrad trains as the slow loop does."""

import itertools
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn: pip install 'fastpcgrad[examples]'")

from sklearn.datasets import load_digits

from examples import command_line, multidigits
from examples.digits_data import CANVAS, JITTER, SIDE, TASKS, TwoDigits, two_digits
from examples.digits_runs import FAST, LOOP, PLAIN, Network, Run, Settings


@pytest.fixture(scope="module")
def data() -> tuple[TwoDigits, TwoDigits]:
    return two_digits(train_size=300, test_size=200, seed=3)


@pytest.fixture
def one_thread_and_kept_state():
    threads, python_state = torch.get_num_threads(), random.getstate()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python_state)
    torch.set_num_threads(threads)


def test_shapes_and_ranges(data):
    for split, size in zip(data, (300, 200), strict=True):
        assert len(split) == size
        assert split.images.shape == (size, CANVAS, CANVAS)
        assert split.images.dtype == torch.float32
        assert split.images.min() == 0
        assert split.images.max() == 1
        assert split.labels.shape == (size, len(TASKS))
        for t, classes in enumerate(TASKS.values()):
            assert split.labels[:, t].unique().tolist() == list(range(classes))


def test_no_test_digit_is_seen_in_training(data):
    train, test = data
    digits = torch.as_tensor(load_digits().data)
    assert not set(train.sources.flatten().tolist()) & set(test.sources.flatten().tolist())
    # By pixels too: two sources could be copies of one scan.
    distances = torch.cdist(digits[train.sources.flatten()], digits[test.sources.flatten()])
    assert distances.min() > 0


def test_labels_belong_to_the_sources(data):
    targets = torch.as_tensor(load_digits().target)
    for split in data:
        left, right = targets[split.sources].unbind(1)
        assert torch.equal(split.labels, torch.stack([left, right, (left > right).long()], dim=1))


def test_an_image_is_the_maximum_of_its_two_digits(data):
    digits = torch.as_tensor(load_digits().images, dtype=torch.float32) / 16
    for image, (left, right) in zip(data[0].images[:40], data[0].sources[:40], strict=True):
        shifts = itertools.product(range(JITTER + 1), repeat=4)
        assert any(torch.equal(image, _drawn(digits[left], digits[right], *shift)) for shift in shifts)


def _drawn(left, right, top, start, bottom, end):
    first, second = torch.zeros(2, CANVAS, CANVAS)
    first[top : top + SIDE, start : start + SIDE] = left
    second[CANVAS - SIDE - bottom : CANVAS - bottom, CANVAS - SIDE - end : CANVAS - end] = right
    return torch.maximum(first, second)


def test_the_seed_decides_the_data(data):
    again = two_digits(train_size=300, test_size=200, seed=3)
    other = two_digits(train_size=300, test_size=200, seed=4)
    assert torch.equal(again[1].images, data[1].images)
    assert not torch.equal(other[1].images, data[1].images)


def test_both_surgeries_are_one_computation(data, one_thread_and_kept_state):
    """In float64 rounding cannot hide a difference between the slow loop and fastpcgrad."""
    train = data[0]
    torch.manual_seed(0)
    network = Network(width=48, features=16).double()
    batches = [(train.images[k::10].double(), train.labels[k::10]) for k in range(10)]
    runs = {name: Run(name, network, Settings()) for name in (PLAIN, LOOP, FAST)}
    for run in runs.values():
        for _ in run.epoch(batches * 3):
            pass
    losses = {name: torch.tensor(run.losses, dtype=torch.float64) for name, run in runs.items()}
    torch.testing.assert_close(losses[FAST], losses[LOOP], rtol=1e-9, atol=0)
    assert runs[FAST].random_state == runs[LOOP].random_state
    # The agreement means something only if surgery changed the training.
    assert (losses[PLAIN] - losses[LOOP]).abs().max() > 1e-4


def test_quick_run_draws_its_figure_and_both_surgeries_agree(tmp_path: Path, capsys, one_thread_and_kept_state):
    experiment = multidigits.main(["--quick", "--threads", "1", "--out", str(tmp_path / "new" / "folder")])
    figure = tmp_path / "new" / "folder" / "multidigits.png"
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert figure.stat().st_size > 20_000
    assert str(figure) in capsys.readouterr().out
    assert all(len(run.losses) == experiment.settings.steps == 60 for run in experiment.runs.values())
    # Equal weights give equal first losses; later ones differ by rounding, most of which is the slow loop's.
    runs = experiment.runs
    assert len(experiment.exact.losses) == 50
    assert experiment.gap(runs[LOOP], runs[FAST])[0] == 0
    assert experiment.gap(runs[LOOP], runs[FAST])[:10].max() < 2e-5
    assert experiment.gap(runs[FAST], experiment.exact)[:20].max() < 2e-6
    # A network that learned nothing would agree as well.
    for run in runs.values():
        assert sum(run.losses[-1]) < 0.95 * sum(run.losses[0])
    assert 0 < experiment.pair_conflicts().double().mean() < 1


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == "rich" else object())
    with pytest.raises(SystemExit, match=r"rich.*pip install 'fastpcgrad\[examples\]'"):
        multidigits.main(["--quick"])
