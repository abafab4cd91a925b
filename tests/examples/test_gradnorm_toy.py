"""The GradNorm toy example: its data are the paper's, its figures are drawn, and GradNorm brings the rates together."""

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="pip install 'fastpcgrad[examples]'")
pytest.importorskip("matplotlib", reason="pip install 'fastpcgrad[examples]'")

from examples import command_line, gradnorm_toy
from examples.gradnorm_toy import EQUAL, GRADNORM, ToyNet, scales, toy_data


@pytest.fixture
def kept_state():
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def test_the_data_are_the_papers():
    x, y = toy_data(10, torch.Generator().manual_seed(0))
    assert x.shape == (10_000, 250) and y.shape == (10_000, 10, 100)
    assert x.min() >= 0 and x.max() < 1 and abs(x.mean() - 0.5) < 0.01
    assert scales(10)[0] == 1 and scales(10)[-1] == 100
    # tanh saturates at these deviations, so the largest targets are the scales themselves
    torch.testing.assert_close(y.abs().amax(dim=(0, 2)), scales(10))
    # tasks share B: their signs agree far more often than by chance, and not always
    agree = (y[:, 0].sign() == y[:, 9].sign()).float().mean()
    assert 0.7 < agree < 0.95


def test_the_network_is_the_papers():
    net = ToyNet(10)
    shapes = [tuple(p.shape) for p in net.trunk.parameters() if p.dim() == 2]
    assert shapes == [(100, 250), (100, 100), (100, 100), (100, 100)]
    assert tuple(next(net.last_shared.parameters()).shape) == (100, 100)
    assert net(torch.rand(3, 250), torch.rand(3, 10, 100)).shape == (10,)


def test_a_short_run_draws_its_figures_and_is_deterministic(tmp_path, capsys, kept_state):
    runs, again = (
        gradnorm_toy.main(["--quick", "--threads", "1", "--out", str(tmp_path / "new" / name)]) for name in "ab"
    )
    assert [(run.tasks, run.name) for run in runs] == [(t, name) for t in (2, 10) for name in (EQUAL, GRADNORM)]
    printed = capsys.readouterr().out.replace("\n", "")
    for name in ("losses", "weights"):
        figure = tmp_path / "new" / "a" / f"gradnorm_{name}.png"
        assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert figure.stat().st_size > 20_000
        assert str(figure) in printed
    for run, other in zip(runs, again, strict=True):
        assert run.losses.shape == run.weights.shape == (gradnorm_toy.QUICK_STEPS, run.tasks)
        np.testing.assert_array_equal(run.losses, other.losses)
        np.testing.assert_allclose(run.weights.sum(axis=1), run.tasks, rtol=1e-5)
        if run.name == EQUAL:
            np.testing.assert_allclose(run.weights, 1, rtol=1e-5)
        else:
            assert (np.diff(run.weights[-1]) <= 0).all(), "the larger the scale, the smaller the weight"
            assert run.weights[-1, 0] > 1 > run.weights[-1, -1]


def test_gradnorm_brings_the_rates_together(kept_state):
    """500 of the default run's steps at T=2, where the small task's loss rises under equal weights."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = toy_data(2, generator)
    chosen = torch.randint(len(x), (500, 100), generator=generator)
    equal, learned = (
        gradnorm_toy.train(name, ((x[rows], y[rows]) for rows in chosen), 2, seed=0) for name in (EQUAL, GRADNORM)
    )
    assert learned.spread < 0.9 * equal.spread
    assert learned.losses.max() < equal.losses.max()


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == "rich" else object())
    with pytest.raises(SystemExit, match=r"rich.*pip install 'fastpcgrad\[examples\]'"):
        gradnorm_toy.main([])


def test_a_bad_number_of_steps_is_refused(capsys):
    with pytest.raises(SystemExit):
        gradnorm_toy.main(["--steps", "0"])
    assert "at least 1" in capsys.readouterr().err
