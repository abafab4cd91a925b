"""``python -m fastpcgrad demo``: its table has what the trainings gave, and these are as the drop-in's by hand."""

import contextlib
import io
import re

import pytest
import torch

import fastpcgrad
from fastpcgrad import __main__, methods
from fastpcgrad.commands import demo
from fastpcgrad.commands.demo import FIRST, METHODS, SEARCHED, Outcome
from fastpcgrad.commands.demo_problems import PROBLEMS, Poisson

pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn: pip install 'fastpcgrad[examples]'")


@pytest.fixture(scope="module", autouse=True)
def _kept_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The outcomes of a quick run, and what it printed."""
    printed, state = io.StringIO(), torch.random.get_rng_state()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else object())
        outcomes = demo.show(tmp_path_factory.mktemp("demo"), quick=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    return outcomes, printed.getvalue()


@pytest.fixture
def shown_again(quick, monkeypatch):
    """A demo whose trainings gave what the quick run's did."""
    monkeypatch.setattr(demo, "_all_outcomes", lambda seeds, steps: quick[0])


def test_each_problem_is_trained_by_each_rule(quick):
    found = [(outcome.problem, outcome.rule) for outcome in quick[0]]
    assert found == [(problem, rule) for problem in PROBLEMS for rule in demo.rules(problem)]
    assert all(len(outcome.errors) == demo.QUICK_SEEDS and outcome.milliseconds > 0 for outcome in quick[0])


def test_every_method_that_weighs_by_conflict_takes_part():
    fixed = {"Constant", "Mean", "Sum", "RandomWeights"}
    others = {"Krum", "GradDrop", "TrimmedMean"}  # for workers that may be wrong, and by columns
    others |= {"CRMOGM", "AGEM", "MetaBalance", "PCD"}  # around another; one task before the others
    public = {name for name in methods.__all__ if isinstance(getattr(methods, name), type)}
    others |= {"MoDo", "SDMGrad"}  # of several batches
    others |= {"Bloop", "MoCo", "ExcessMTL", "DBMTL", "MConFIG"}  # with a state as large as J
    public -= {"Method", "Solution", "Elementwise", "Tracking"}
    assert set(METHODS) == public - fixed - others


def test_the_table_has_what_the_trainings_gave(quick):
    outcomes, printed = quick
    lines = [re.match(r"(.{36}) *([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", line) for line in printed.splitlines()]
    rows = [(line[1].strip(), *map(float, line.groups()[1:])) for line in lines if line]
    assert len(rows) == len(outcomes)
    for (rule, *values), outcome in zip(rows, outcomes, strict=True):
        assert rule == outcome.rule
        percent = [100 * error for error in outcome.errors]
        assert values[:3] == pytest.approx([sum(percent) / 2, min(percent), max(percent)], rel=6e-3)  # three digits
        assert values[3] == pytest.approx(outcome.milliseconds, abs=6e-3)


@pytest.mark.parametrize("rule", ["plain sum", FIRST, "weights 1 : 10", "CAGrad", "ConFIG"])
def test_a_network_learns_beside_others_as_it_does_alone(rule):
    """Seed 1 of two against a loop by hand with the drop-in."""
    steps, seed, frequency = 5, 1, 2 * torch.pi
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(1, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 1)]
    net = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    adam = torch.optim.Adam(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    method = METHODS[rule]() if rule in METHODS else None
    optimizer = adam if method is None else fastpcgrad.PCGrad(adam, method=method)
    generator, ends, weights = torch.Generator().manual_seed(seed), torch.tensor([[-1.0], [1.0]]), [1, 1]
    for step in range(steps):
        x = (2 * torch.rand(64, 1, generator=generator) - 1).requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        force = -(frequency**2) * torch.sin(frequency * x)
        losses = [(curvature - force).square().mean(), (net(ends) - ends / 2).square().mean()]
        if rule == FIRST and step == 0:
            weights = [1 / loss.item() for loss in losses]
        if rule == "weights 1 : 10":
            weights = [1, 10]
        optimizer.zero_grad()
        if method is None:
            sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()
        else:
            optimizer.pc_backward(losses)
        optimizer.step()
        schedule.step()
    x = torch.linspace(-1, 1, 401)[:, None]
    solution = torch.sin(frequency * x) + x / 2
    expected = float((net(x).detach() - solution).norm() / solution.norm())
    assert demo.train("poisson", rule, (0, seed), steps)[1] == pytest.approx(expected, rel=1e-4)


def test_the_same_seeds_give_the_same_errors():
    first, again = (demo.train("digits", "PCGrad", (0, 1), 3) for _ in range(2))
    assert first == again and len(set(first)) == 2


def test_the_equation_is_that_of_the_solution():
    """The curvature of the exact solution leaves no loss."""
    problem = Poisson((0,))
    problem.networks.forward = problem.solution
    assert problem.losses().max() < 1e-6 and problem.errors() == 0


def test_a_method_wins_where_its_worst_seed_is_better_than_the_best_of_the_sum():
    outcomes = [Outcome("poisson", rule, (0.5, 0.7, 0.9), 1.0) for rule in demo.rules("poisson")]
    chosen = {"weights 1 : 100": (0.2, 0.3, 0.8), "PCGrad": (0.1, 0.4, 0.49), "UPGrad": (0.1, 0.2, 0.5)}
    found = demo.by_rule([Outcome("poisson", o.rule, chosen.get(o.rule, o.errors), 1.0) for o in outcomes], "poisson")
    assert found[SEARCHED].errors == chosen["weights 1 : 100"]
    assert demo.winners(found, FIRST) == demo.winners(found, "plain sum") == ["PCGrad"]
    assert demo.winners(found, SEARCHED) == []


@pytest.mark.usefixtures("shown_again")
def test_the_figure_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install 'fastpcgrad[examples]'")
    assert __main__.main(["demo", "--quick", "--out", str(tmp_path / "new")]) == 0
    figure = tmp_path / "new" / "demo.png"
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and figure.stat().st_size > 20_000
    assert f"Figure: {figure}" in capsys.readouterr().out


@pytest.mark.usefixtures("shown_again")
def test_without_matplotlib_there_is_the_table_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert __main__.main(["demo", "--out", str(tmp_path)]) == 0
    assert "No figure: matplotlib is missing (pip install matplotlib)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(SystemExit, match=r"scikit-learn, which is missing: pip install scikit-learn"):
        demo.show(tmp_path)
