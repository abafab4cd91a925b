"""Every figure of a ConflictReport against a direct computation on the task gradients."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastpcgrad
from fastpcgrad import methods, reference
from fastpcgrad._ops import Figures
from fastpcgrad.merging.report import ConflictReport
from tests.linear_problems import linear_loss

TASKS = 5


@pytest.fixture
def parameters():
    return [torch.zeros(12, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def gradients(tasks=TASKS):
    """Task gradients of two parameters; task 1 opposes task 0, task 3 has no gradient at all."""
    rows = torch.randn(tasks, 24, dtype=torch.float64)
    if tasks > 1:
        rows[1] = -0.5 * rows[0] + 0.1 * rows[1]
    if tasks > 3:
        rows[3] = 0.0
    return rows


def surgery_on(parameters, rows, tasks=None, **options):
    options.setdefault("method", methods.PCGrad("tensorflow"))
    surgery = fastpcgrad.GradientSurgery(parameters, len(rows), **options)
    for t in range(len(rows)) if tasks is None else tasks:
        with surgery.task(t):
            linear_loss(parameters, rows[t].split([p.numel() for p in parameters])).backward()
    return surgery.merge()


def projected(rows):
    return torch.stack(reference.project_tensorflow(list(rows)))


def test_norms_and_gram(parameters):
    rows = gradients()
    report = surgery_on(parameters, rows)
    torch.testing.assert_close(report.gram, rows @ rows.mT)
    torch.testing.assert_close(report.norms, rows.norm(dim=1))


def test_cosines(parameters):
    rows = gradients()
    report = surgery_on(parameters, rows)
    torch.testing.assert_close(report.cosines, F.cosine_similarity(rows[:, None], rows, dim=-1, eps=1e-30))
    pairs = [(i, j) for i, j in itertools.product(range(TASKS), repeat=2) if i < j]
    torch.testing.assert_close(report.pair_cosines, torch.stack([report.cosines[i, j] for i, j in pairs]))


def test_cosines_to_the_mean(parameters):
    rows = gradients()
    report = surgery_on(parameters, rows)
    torch.testing.assert_close(report.cosines_to_mean, F.cosine_similarity(rows, rows.mean(dim=0)[None], eps=1e-30))


def test_cosines_within_each_problem(parameters):
    rows = gradients()
    report = surgery_on(parameters, rows, granularity="parameter")
    for found, piece in zip(report.segment_cosines, rows.split(12, dim=1), strict=True):
        torch.testing.assert_close(found, F.cosine_similarity(piece[:, None], piece, dim=-1, eps=1e-30))


def test_a_method_without_weights_has_none_in_the_dict(parameters):
    report = surgery_on(parameters, gradients(), method=methods.TrimmedMean(1))
    assert report.weights.isnan().all()
    assert not [key for key, value in report.as_dict().items() if "weight/" in key or math.isnan(value)]


def test_conflict_rate(parameters):
    rows = gradients()
    pairs = list(itertools.combinations(rows, 2))
    expected = sum(float(a @ b) < 0 for a, b in pairs) / len(pairs)
    assert 0 < expected < 1
    assert surgery_on(parameters, rows).conflict_rate.item() == pytest.approx(expected)


def test_weights_and_coefficients_reproduce_what_was_merged(parameters):
    rows = gradients()
    report = surgery_on(parameters, rows)
    torch.testing.assert_close(report.coefficients @ rows, projected(rows))
    torch.testing.assert_close(report.weights @ rows, torch.cat([p.grad for p in parameters]))


def test_removed_fraction(parameters):
    rows = gradients()
    before, after = rows.norm(dim=1), projected(rows).norm(dim=1)
    expected = torch.where(before > 0, 1 - after / before, 0.0)
    assert expected.max() > 0.5
    torch.testing.assert_close(surgery_on(parameters, rows).removed_fraction, expected)


def test_a_gradient_that_is_removed_but_for_rounding_lost_everything():
    """What is left of it has a squared norm of a little above zero or below."""
    signs = set()
    for seed in range(40):
        row = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        gram, order = reference.gram(torch.stack([row, -0.3 * row])), torch.tensor([[0, 1], [0, 1]])
        coefficients = reference.coefficients(gram, order)
        report = ConflictReport((0, 1), lambda g=gram, c=coefficients: Figures(g, c.sum(dim=0), c))
        signs.update((coefficients @ gram * coefficients).sum(dim=1).sign().tolist())
        torch.testing.assert_close(report.removed_fraction, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-7)
    assert -1.0 in signs and 1.0 in signs


def test_removed_fraction_over_several_problems(parameters):
    """Each parameter loses its own part; the norms are those of the whole gradients."""
    rows = gradients()
    report = surgery_on(parameters, rows, granularity="parameter")
    after = torch.cat([projected(piece) for piece in rows.split(12, dim=1)], dim=1).norm(dim=1)
    expected = torch.where(rows.norm(dim=1) > 0, 1 - after / rows.norm(dim=1), 0.0)
    torch.testing.assert_close(report.removed_fraction, expected)


def test_several_problems_have_their_own_grams_and_weights(parameters):
    rows = gradients()
    report = surgery_on(parameters, rows, granularity="parameter")
    torch.testing.assert_close(report.segment_grams, reference.gram(rows, [0, 12, 24]))
    torch.testing.assert_close(report.gram, rows @ rows.mT)
    merged = torch.cat([w @ piece for w, piece in zip(report.weights, rows.split(12, dim=1), strict=True)])
    torch.testing.assert_close(merged, torch.cat([p.grad for p in parameters]))


def test_one_problem_has_no_grams_of_segments(parameters):
    assert surgery_on(parameters, gradients()).segment_grams is None


def test_absent_tasks_are_left_out(parameters):
    rows = gradients()
    report = surgery_on(parameters, rows, tasks=(4, 0, 1))
    present = rows[[0, 1, 4]]
    assert report.tasks == (0, 1, 4)
    torch.testing.assert_close(report.gram, present @ present.mT)
    torch.testing.assert_close(report.removed_fraction, 1 - projected(present).norm(dim=1) / present.norm(dim=1))


def test_a_single_task_has_no_pairs(parameters):
    rows = gradients(1)
    report = surgery_on(parameters, rows)
    assert report.conflict_rate == 0 and report.cosines.tolist() == [[pytest.approx(1)]]
    assert report.pair_cosines.shape == (0,)
    figures = report.as_dict()
    assert set(figures) == {
        f"surgery/{key}" for key in ("conflict_rate", "grad_norm/0", "cos_to_mean/0", "weight/0", "removed_frac/0")
    }
    assert figures["surgery/conflict_rate"] == 0 and figures["surgery/weight/0"] == 1


def test_zero_gradients_give_zeros_and_no_nan(parameters):
    report = surgery_on(parameters, torch.zeros(3, 24, dtype=torch.float64))
    assert all(value == 0 for key, value in report.as_dict().items() if "weight" not in key)
    assert report.weights.tolist() == [1, 1, 1]


def test_non_finite_gradients_show(parameters):
    rows = gradients()
    rows[2, 5] = torch.nan
    report = surgery_on(parameters, rows)
    assert report.norms.isnan().tolist() == [False, False, True, False, False]
    assert math.isnan(report.as_dict()["surgery/grad_norm/2"])


def test_as_dict_has_every_figure_as_a_float(parameters):
    report = surgery_on(parameters, gradients())
    figures = report.as_dict()
    assert all(type(value) is float for value in figures.values())
    assert figures == {
        "surgery/conflict_rate": report.conflict_rate.item(),
        "surgery/cos_min": report.pair_cosines.min().item(),
        "surgery/cos_mean": report.pair_cosines.mean().item(),
        **{f"surgery/grad_norm/{t}": report.norms[t].item() for t in range(TASKS)},
        **{f"surgery/weight/{t}": report.weights[t].item() for t in range(TASKS)},
        **{f"surgery/removed_frac/{t}": report.removed_fraction[t].item() for t in range(TASKS)},
        **{f"surgery/cos_to_mean/{t}": report.cosines_to_mean[t].item() for t in range(TASKS)},
        **{f"surgery/cos/{i}-{j}": report.cosines[i, j].item() for i in range(TASKS) for j in range(i + 1, TASKS)},
    }


def test_as_dict_names_tasks_by_their_index(parameters):
    report = surgery_on(parameters, gradients(), tasks=(4, 1))
    figures = report.as_dict(names=["a", "b", "c", "d", "e"], prefix="train/")
    assert [key for key in figures if "weight" in key] == ["train/weight/b", "train/weight/e"]
    assert figures["train/grad_norm/e"] == report.norms[1].item()


def test_as_dict_averages_the_weights_over_problems(parameters):
    report = surgery_on(parameters, gradients(), granularity="parameter")
    assert report.as_dict()["surgery/weight/0"] == pytest.approx(report.weights[:, 0].mean().item())


def test_parameters_outside_of_the_surgery_do_not_count(parameters):
    """With one parameter shared, figures over S problems are those of the problems that were solved."""
    rows = gradients()
    report = surgery_on(parameters, rows, shared=[parameters[1]], granularity="parameter")
    inside = rows[:, 12:]
    torch.testing.assert_close(report.gram, inside @ inside.mT)
    expected = torch.stack(reference.project_tensorflow(list(inside))).norm(dim=1)
    norms = inside.norm(dim=1)
    torch.testing.assert_close(report.removed_fraction, torch.where(norms > 0, 1 - expected / norms, 0.0))
    alone = surgery_on(parameters[1:], inside)
    assert report.as_dict()["surgery/weight/0"] == pytest.approx(alone.as_dict()["surgery/weight/0"])


def test_a_method_without_coefficients_has_no_removed_fraction(parameters):
    class Sum(methods.Method):
        def solve(self, gram):
            return methods.Solution(torch.ones(len(gram), dtype=torch.float64), None)

    report = surgery_on(parameters, gradients(), method=Sum())
    assert report.coefficients is None and report.removed_fraction.isnan().all()
    assert not [key for key, value in report.as_dict().items() if "removed_frac" in key or math.isnan(value)]


def test_repr_shows_the_figures(parameters):
    text = repr(surgery_on(parameters, gradients(2)))
    assert text.startswith("ConflictReport(tasks=[0, 1], conflict_rate=1, cos_min=-0.")
    assert "grad_norm/1=" in text and "surgery/" not in text


def test_a_report_outlives_the_rows_that_it_was_made_of(parameters):
    rows = gradients()
    first = surgery_on(parameters, rows)
    gram = first.gram.clone()
    surgery_on(parameters, gradients())
    assert torch.equal(first.gram, gram)


def test_survives_pickling_and_copying(parameters):
    report = surgery_on(parameters, gradients())
    for twin in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert twin.tasks == report.tasks
        torch.testing.assert_close(twin.gram, report.gram)
        torch.testing.assert_close(twin.removed_fraction, report.removed_fraction)


def test_shows_the_surgery_that_it_was_made_for(parameters):
    """Read for the first time when another surgery has been done since."""
    rows = gradients()
    first = surgery_on(parameters, rows)
    surgery_on(parameters, 2 * rows)
    torch.testing.assert_close(first.gram, rows @ rows.mT)
