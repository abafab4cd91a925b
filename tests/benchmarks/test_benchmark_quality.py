"""Trainings by every rule: cells that are not run twice, networks as they are alone, Δm and ranks by hand."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import plot, quality, quality_tables, rows
from benchmarks.quality_problems import PARTS, PROBLEMS, Budget, Measure, Problem
from benchmarks.quality_problems.physics import Burgers
from benchmarks.quality_rules import ALONE, BALANCERS, METHODS, PLAIN, SEARCHED, names
from benchmarks.quality_tables import Outcome
from benchmarks.rows import Environment, Row
from benchmarks.session import Run
from fastpcgrad import balancing, methods
from fastpcgrad.commands.demo_problems import Networks

pytest.importorskip("sklearn", reason="two problems' data come with scikit-learn: pip install scikit-learn")

ENVIRONMENT = Environment("r", "2026-01-01", "c", "a CPU", 1, "2", "2", "0")
QUICK = ["--quick", "--only", "poisson", "--methods", PLAIN, "--methods", "PCGrad", "--append", "--results"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a quick run."""
    folder = tmp_path_factory.mktemp("quality")
    assert quality.main([*QUICK, str(folder)]) == 0
    return folder


def test_a_finished_cell_is_not_run_again_and_a_missing_one_is_the_same(quick, tmp_path, monkeypatch, capsys):
    whole = rows.read(quick / quality.FILE)
    assert [(row.subject, row.learning_rate) for row in whole] == [
        (by, rate) for by in (PLAIN, "PCGrad") for rate in quality.RATES
    ]
    rows.append([row for row in whole if (row.subject, row.learning_rate) != ("PCGrad", 1e-2)], tmp_path / quality.FILE)
    assert quality.main([*QUICK, str(tmp_path)]) == 0
    (again,) = rows.read(tmp_path / quality.FILE)[-1:]
    assert (again.subject, again.learning_rate) == ("PCGrad", 1e-2)
    assert again.test["right digits of u"] == pytest.approx(whole[5].test["right digits of u"], rel=1e-3)
    monkeypatch.setattr(quality, "train", None)
    assert quality.main([*QUICK, str(tmp_path)]) == 0
    assert "| `PCGrad` |" in capsys.readouterr().out


def test_another_budget_is_another_cell(quick):
    found = rows.read(quick / quality.FILE)
    assert quality.missing(found, "poisson", "PCGrad", PROBLEMS["poisson"].budget(True)) == []
    assert quality.missing(found, "poisson", "PCGrad", PROBLEMS["poisson"].budget(False)) == list(quality.RATES)
    failed = [replace(row, status="failed: ValueError") for row in found]
    assert quality.missing(failed, "poisson", "PCGrad", PROBLEMS["poisson"].budget(True)) == list(quality.RATES)


def test_what_fails_side_by_side_is_trained_one_by_one_and_fails_where_it_must(quick, monkeypatch):
    def refuse(problem, by, rates, seeds, steps):
        if len(rates) * len(seeds) > 1 or 1e-1 in rates:
            raise ValueError("too large")
        return training(problem, by, rates, seeds, steps)

    training = quality.Training
    monkeypatch.setattr(quality, "Training", refuse)
    found = quality.train(Run(ENVIRONMENT, quick=True), "poisson", "PCGrad", quality.RATES)
    assert [(row.learning_rate, row.status) for row in found] == [
        (3e-3, "ok"), (1e-2, "ok"), (3e-2, "ok"), (1e-1, "failed: ValueError: too large")
    ]  # fmt: skip
    for row, beside in zip(found[:3], rows.read(quick / quality.FILE)[4:7], strict=True):
        assert row.test["right digits of u"] == pytest.approx(beside.test["right digits of u"], rel=1e-3)
    assert not found[3].test


def test_times_are_by_that_of_the_plain_sum():
    run = Run(ENVIRONMENT, quick=True)
    quality.measure_times(run, "poisson", 0.0)
    assert {row.subject for row in run.rows} == {*quality_tables.BASELINES, *BALANCERS, *METHODS} - {SEARCHED}
    (plain,) = (row for row in run.rows if row.subject == PLAIN)
    assert plain.ratios == {PLAIN: 1}
    for row in run.rows:
        assert row.p50_ms == pytest.approx(row.ratios[PLAIN] * plain.p50_ms)


def test_gradnorm_has_the_norms_of_the_last_shared_layers_weights(monkeypatch):
    """Of the first network of two, against a trunk of layers."""
    training = quality.Training("digits", "GradNorm", (1e-2,), (0, 1), 3)
    noted = {}
    monkeypatch.setattr(training.rule.balancers[0], "note", lambda task, loss, norm: noted.update({task: norm}))
    batch = training.problem.batch()
    training.rule.note(training.problem.losses(batch))
    (trunk,) = Networks((0,), (64, 64, 16), torch.nn.ReLU()).each
    features = trunk[1](trunk[0](training.problem.images[batch[0][0]]).relu()).relu()
    scores, ink = (head(features.expand(2, -1, -1))[0] for head in training.problem.own)
    digit, expected = training.problem.digit[batch[0][0]], training.problem.ink[batch[0][0]]
    losses = (
        torch.nn.functional.cross_entropy(scores, digit),
        (training.problem.unit * ink[:, 0] - expected).square().mean(),
    )
    for task, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, trunk[1].weight, retain_graph=True)
        torch.testing.assert_close(noted[task], gradient.norm(), rtol=1e-4, atol=0)


def test_an_unknown_method_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--methods", "Adam"])
    assert "PCGrad" in capsys.readouterr().err


def test_all_methods_and_balancers_that_need_no_arguments_take_part():
    assert set(METHODS) >= {
        "PCGrad",
        "GradVac",
        "MGDA",
        "CAGrad",
        "IMTLG",
        "NashMTL",
        "FairGrad",
        "AlignedMTL",
        "UPGrad",
    }
    assert set(METHODS) >= {"DualProj", "ConFIG", "GradDrop"} and not set(METHODS) & {"Krum", "TrimmedMean", "Constant"}
    assert set(BALANCERS) >= {"GradNorm", "DWA", "FAMO", "STCH", "UncertaintyWeighting"}
    assert all(issubclass(getattr(methods, name), methods.Method) for name in METHODS)
    assert all(issubclass(getattr(balancing, name), balancing.Balancer) for name in BALANCERS)


def test_a_single_task_learns_as_a_network_of_its_own():
    """The second of two seeds, at the second of two rates, against a loop by hand over one task."""
    steps, seed, rate = 4, 1, 1e-2
    training = quality.Training("digits", ALONE + "class", (3e-3, rate), (0, seed), steps)
    ink_before = training.problem.own[1].vectors[3].detach().clone()
    data = quality.PROBLEMS["digits"]((seed,))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = [torch.nn.Linear(64, 64), torch.nn.Linear(64, 16)]
        torch.manual_seed(seed)
        head = torch.nn.Linear(16, 10)
    network = torch.nn.Sequential(trunk[0], torch.nn.ReLU(), trunk[1], torch.nn.ReLU(), head)
    adam = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        training.step()
        (chosen,) = data.batch()
        adam.zero_grad()
        torch.nn.functional.cross_entropy(network(data.images[chosen[0]]), data.digit[chosen[0]]).backward()
        adam.step()
        schedule.step()
    found = torch.cat([training.problem.shared[0].vectors[3], training.problem.own[0].vectors[3]])
    expected = torch.nn.utils.parameters_to_vector(network.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(training.problem.own[1].vectors[3], ink_before, rtol=0, atol=0)


@pytest.mark.parametrize("by", ["UPGrad", "GradNorm", "FAMO", "STCH"])
def test_a_network_learns_beside_others_as_it_does_alone(by):
    many = quality.Training("tables", by, (3e-3, 1e-2), (0, 1), 4)
    alone = quality.Training("tables", by, (1e-2,), (1,), 4)
    for training in (many, alone):
        for _ in range(3):
            training.step()
    for beside, single in zip(many.problem.shared, alone.problem.shared, strict=True):
        torch.testing.assert_close(beside.vectors[3], single.vectors[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_seeds_differ_and_there_are_four_weightings(problem):
    made = PROBLEMS[problem]((0, 1))
    losses = made.losses(made.batch())
    assert losses.shape == (len(made.tasks), 2) and (losses[:, 0] != losses[:, 1]).all()
    assert made.judged("test").shape == (len(made.measures), 2)
    assert len(made.weightings) == 4 and made.weightings[PLAIN] == (1,) * len(made.tasks)
    assert all(len(weights) == len(made.tasks) for weights in made.weightings.values())


def test_what_is_learned_from_chosen_by_and_shown_are_different_samples():
    digits, tables, texts = (PROBLEMS[name]((0, 1)) for name in ("digits", "tables", "texts"))
    every = [{"training": digits.training} | digits.parts, *tables.places, *texts.places]
    for places in every:
        training, validation, test = (torch.atleast_2d(places[part])[-1] for part in ("training", *PARTS))
        assert len(torch.cat([training, validation, test]).unique()) == len(training) + len(validation) + len(test)


def test_the_solution_of_burgers_solves_its_equation():
    """By central differences, where the front is not yet narrow; and it starts and ends as it must."""
    problem, h = Burgers((0,)), 2e-2
    x, t = torch.linspace(-0.9, 0.9, 19), torch.full((19,), 0.2)

    def u(dx, dt):
        return problem.solution(torch.stack([x + dx, t + dt], dim=1)).double()

    u_t, u_x = (u(0, h) - u(0, -h)) / (2 * h), (u(h, 0) - u(-h, 0)) / (2 * h)
    residual = u_t + u(0, 0) * u_x - problem.viscosity * (u(h, 0) - 2 * u(0, 0) + u(-h, 0)) / h**2
    assert u_t.abs().max() > 1 and residual.abs().max() < 0.05
    start = problem.solution(torch.stack([x, torch.zeros_like(x)], dim=1))
    torch.testing.assert_close(start, -torch.sin(math.pi * x), rtol=0, atol=1e-6)
    ends = problem.solution(torch.tensor([[-1.0, 0.5], [1.0, 0.7]]))
    torch.testing.assert_close(ends, torch.zeros(2), rtol=0, atol=1e-5)


class Two(Problem):
    """An accuracy and an error."""

    tasks = ("a", "b")
    measures = (Measure("accuracy", True), Measure("error", False))
    weightings = {PLAIN: (1, 1), "w2": (1, 2), "w3": (1, 3), "w4": (1, 4)}  # noqa: RUF012
    steps = 10


def cell(rule, rate, validation, test):
    """Values by measure, of two seeds."""
    return Row("training", "two", "quality", rule, ENVIRONMENT, learning_rate=rate, steps=10,
               validation=validation, test=test)  # fmt: skip


def both(accuracy, error):
    return {"accuracy": list(accuracy), "error": list(error)}


SINGLE = [
    cell(ALONE + "a", 0.1, {"accuracy": [80, 80]}, {"accuracy": [70, 90]}),
    cell(ALONE + "a", 0.2, {"accuracy": [79, 79]}, {"accuracy": [99, 99]}),  # better by the test alone
    cell(ALONE + "b", 0.1, {"error": [5, 5]}, {"error": [1, 1]}),
    cell(ALONE + "b", 0.2, {"error": [4, 4]}, {"error": [4, 6]}),
]


def test_delta_m_by_hand_with_what_validation_chose():
    found = quality_tables.cells(
        [
            *SINGLE,
            cell(PLAIN, 0.1, both([80, 80], [4, 4]), both([80, 88], [5, 4])),
            cell("PCGrad", 0.1, both([40, 40], [4, 4]), both([96, 96], [5, 5])),
            cell("PCGrad", 0.2, both([80, 80], [4, 4]), both([72, 96], [5, 6])),
            cell("w3", 0.2, both([88, 88], [4, 4]), both([88, 80], [10, 5])),
        ],
        "two",
        Budget(2, 10),
    )
    made = quality_tables.outcomes(found, Two)
    # The references: an accuracy of 80, an error of 5.
    assert made[PLAIN].deltas == pytest.approx([0, (10 + 20) / 2])
    assert made["PCGrad"].rate == 0.2 and made["PCGrad"].deltas == pytest.approx([-5, (20 - 20) / 2])
    assert made[SEARCHED].deltas == pytest.approx([(10 - 100) / 2, 0])
    assert set(made) == {PLAIN, SEARCHED, "PCGrad"}
    difference, error = quality_tables.beside(made["PCGrad"], made[PLAIN])
    assert (difference, error) == pytest.approx((-10, 5))  # of -5 and -15: their deviation is 50 ** 0.5
    assert not quality_tables.is_clear(difference, error) and quality_tables.is_clear(-15.1, 5)


def test_a_later_row_of_a_cell_counts_and_one_of_another_budget_does_not():
    old, new = (cell(PLAIN, 0.1, both([v, v], [1, 1]), both([v, v], [1, 1])) for v in (1, 2))
    longer = replace(new, steps=20)
    found = quality_tables.cells([old, new, longer, replace(new, case="digits")], "two", Budget(2, 10))
    assert found == {(PLAIN, 0.1): new} and quality_tables.cells([new], "two", Budget(5, 10)) == {}


def test_ranks_by_hand(monkeypatch):
    def outcome(rule, accuracy, error):
        return Outcome(rule, 0.1, (0.0, 0.0), both(accuracy, error))

    monkeypatch.setitem(PROBLEMS, "two", Two)
    found = {
        "a": outcome("a", [90, 92], [3, 3]),  # 1st, and 2nd to 3rd
        "b": outcome("b", [91, 91], [3, 3]),  # the same
        "c": outcome("c", [80, 80], [1, 1]),  # 3rd, 1st
        "d": outcome("d", [math.nan, 99], [4, 4]),  # astray: 4th, and 4th
    }
    assert quality_tables.mean_ranks({"two": found}) == {"a": 2, "b": 2, "c": 2, "d": 4}
    assert quality_tables.in_order({"two": found})[-4:] == ["a", "b", "c", "d"]


def test_the_figure_has_a_panel_for_each_problem_that_has_rows(monkeypatch, tmp_path):
    """One rule among them that went astray and has no place on the axis."""
    pytest.importorskip("matplotlib", reason="pip install 'fastpcgrad[examples]'")
    problem = PROBLEMS["poisson"]
    monkeypatch.setattr(problem, "steps", 10)
    measure = problem.measures[0].name
    found = [
        Row("training", "poisson", "quality", rule, ENVIRONMENT, learning_rate=0.1, steps=10,
            validation={measure: values}, test={measure: values})
        for rule, values in {PLAIN: [1.0, 2, 1, 2, 1], "PCGrad": [2.0, 3, 2, 3, 3], "FAMO": [math.nan] * 5}.items()
    ]  # fmt: skip
    (path,) = plot.draw_quality(found, tmp_path)
    assert path.name == "quality.png" and path.read_bytes().startswith(b"\x89PNG")
    assert plot.draw_quality(found[1:], tmp_path) == []  # nothing to compare with
    page = quality_tables.page(found)
    assert "| `PCGrad` | +85.7 ± 14.3 ▲ |" in page and "| balancer: `FAMO` | astray |" in page


def test_a_rule_that_failed_on_a_problem_is_said_to():
    values = {"right digits of u": [1.0, 2.0]}
    done = [
        replace(cell(rule, 0.1, values, values), case=case, steps=PROBLEMS[case].budget(quick=True).steps)
        for case in ("poisson", "burgers")
        for rule in (PLAIN, "PCGrad")
    ]
    done[-1] = replace(done[-1], status="failed: ValueError", validation={}, test={})
    assert "| `PCGrad` | +0.0 ± 0.0 | failed |" in quality_tables.page(done, quick=True)


def test_without_references_there_is_nothing_to_say():
    assert quality_tables.outcomes(quality_tables.cells(SINGLE[:2], "two", Budget(2, 10)), Two) == {}
    assert quality_tables.page([]) == "Not yet measured."


def test_every_problem_has_the_same_rules_but_for_its_own_sums():
    for problem in PROBLEMS.values():
        own = {by for by in names(problem) if by.startswith((ALONE, "weights "))}
        assert len(own) == 3 + len(problem.tasks) * problem.alone
