"""The oracle of PCGrad and of the passes over J against arithmetic by hand, and its two forms against each other."""

import random
from fractions import Fraction

import pytest
import torch

from fastpcgrad import reference, variants


class Unshuffled(random.Random):
    """A generator that leaves every list in its order."""

    def shuffle(self, x):
        pass


class Scripted(random.Random):
    """A generator that gives every list the next of the orders it was made with."""

    def __init__(self, *orders):
        super().__init__()
        self.orders = list(orders)

    def shuffle(self, x):
        x[:] = [x[k] for k in self.orders.pop(0)]


def doubles(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def project(variant, rows, generator=None):
    return [row.tolist() for row in reference.PROJECT[variant](doubles(*rows), generator or Unshuffled())]


def assert_rows(found, expected):
    exact = [[float(Fraction(x)) for x in row.split()] for row in expected]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(exact), rtol=0, atol=1e-15, check_dtype=False)


def merge(variant, tasks, shapes, **options):
    """Merged gradients as lists; each task is a list of lists, or None where it has no gradient."""
    parameters = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    gradients = [[None if g is None else torch.tensor(g, dtype=torch.float64) for g in task] for task in tasks]
    merged = reference.merge(gradients, parameters, variant, Unshuffled(), **options)
    return [None if g is None else g.tolist() for g in merged]


# Two tasks: g1 = (1, 0), g2 = (-1, 1); g1·g2 = -1, |g1|² = 1, |g2|² = 2.
# g1' = g1 + 1/2 g2 = (1/2, 1/2); g2' = g2 + 1/1 g1 = (0, 1). Their sum is (1/2, 3/2).
TWO = [[1.0, 0.0], [-1.0, 1.0]]


@pytest.mark.parametrize("variant", ["paper", "torchjd", "tensorlogic"])
def test_two_tasks(variant):
    assert_rows(project(variant, TWO), ["1/2 1/2", "0 1"])


@pytest.mark.parametrize("variant", ["pytorch-pcgrad", "tensorflow"])
def test_two_tasks_projected_away_from_themselves_too(variant):
    # With two tasks g1'·g1 = 1/2 and g2'·g2 = 1 stay positive: no difference yet.
    assert_rows(project(variant, TWO), ["1/2 1/2", "0 1"])


def test_two_tasks_of_libmtl_have_a_longer_denominator():
    # g1' = g1 + 1/(2 + 1e-8) g2; g2' = g2 + 1/(1 + 1e-8) g1.
    a, b = 1 / (2 + 1e-8), 1 / (1 + 1e-8)
    found = project("libmtl", TWO)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([[1 - a, a], [b - 1, 1.0]]), rtol=0, atol=1e-15)
    assert found[0][0] != 0.5


def test_tensorlogic_leaves_out_a_task_below_its_floor():
    # |g2|² = 0.9801e-8 does not exceed 1e-8, so g1 stays; g2' = g2 + 0.99e-4 g1 = 0. Others project g1 to 0 too.
    short = [[1.0, 0.0], [-0.99e-4, 0.0]]
    assert_rows(project("tensorlogic", short), ["1 0", "0 0"])
    assert_rows(project("paper", short), ["0 0", "0 0"])


# Three tasks: a = (1, 0), b = (-1, 1), c = (-2, -1), so |a|² = 1, |b|² = 2, |c|² = 5,
# a·b = -1, a·c = -2, b·c = 1.
THREE = [[1.0, 0.0], [-1.0, 1.0], [-2.0, -1.0]]


def test_three_tasks_in_their_own_order():
    # a: with b: -1 -> a + b/2 = (1/2, 1/2); with c: -1 - 1/2 = -3/2 -> + 3/10 c = (1/2 - 6/10, 1/2 - 3/10).
    # b: with a: -1 -> b + a = (0, 1); with c: -1 -> + 1/5 c = (-2/5, 4/5).
    # c: with a: -2 -> c + 2a = (0, -1); with b: -1 -> + 1/2 b = (-1/2, -1/2).
    assert_rows(project("tensorlogic", THREE), ["-1/10 1/5", "-2/5 4/5", "-1/2 -1/2"])
    assert_rows(project("paper", THREE), ["-1/10 1/5", "-2/5 4/5", "-1/2 -1/2"])


def test_three_tasks_in_their_own_order_projected_away_from_themselves_too():
    # a first meets itself: 1 > 0, nothing; then b and c as above: (-1/10, 1/5).
    # b: with a -> (0, 1); with b: 1, nothing; with c: -1 -> (-2/5, 4/5).
    # c: with a -> (0, -1); with b: -1 -> (-1/2, -1/2); with c: 1 + 1/2 > 0, nothing.
    assert_rows(project("tensorflow", THREE), ["-1/10 1/5", "-2/5 4/5", "-1/2 -1/2"])


def test_self_projection_matters_from_three_tasks_on():
    # With a last: b, c, a. a + b/2 = (1/2, 1/2); + 3/10 c = (-1/10, 1/5); with a: -1/10 -> + 1/10 a = (0, 1/5).
    orders = [[1, 2, 0]] * 3
    # b: with b: 2; with c: 1; with a: -1 -> (0, 1).    c: with b: 1; with c: 5; with a: -2 -> (0, -1).
    assert_rows(project("paper", THREE, Scripted(*orders)), ["-1/10 1/5", "0 1", "0 -1"])
    found = project("libmtl", THREE, Scripted(*orders))
    torch.testing.assert_close(torch.tensor(found), torch.tensor([[0, 0.2], [0, 1], [0, -1]]), rtol=0, atol=1e-7)


def test_pytorch_pcgrad_shuffles_one_list_again_and_again():
    # The same move, first to last, three times: the list is b c a, then c a b, then a b c.
    # a: b, c, a as above: (0, 1/5).
    # b: c: 1; a: -1 -> (0, 1); b: 1: nothing. (0, 1).
    # c: a: -2 -> (0, -1); b: -1 -> (-1/2, -1/2); c: 3/2: nothing.
    move = [1, 2, 0]
    assert_rows(project("pytorch-pcgrad", THREE, Scripted(move, move, move)), ["0 1/5", "0 1", "-1/2 -1/2"])


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_zero_gradients_give_no_nan(variant):
    assert_rows(project(variant, [[0.0, 0.0], [1.0, -1.0], [0.0, 0.0]]), ["0 0", "1 -1", "0 0"])


@pytest.mark.parametrize(("variant", "expected"), [("pytorch-pcgrad", [0.25, 0.75]), ("paper", [0.5, 1.5])])
def test_the_merged_gradient_of_two_tasks(variant, expected):
    # The sum of (1/2, 1/2) and (0, 1), or their mean.
    assert merge(variant, [[TWO[0]], [TWO[1]]], [(2,)]) == [expected]


def test_pytorch_pcgrad_averages_what_all_tasks_touch_and_adds_elsewhere():
    # Parameters: shared (2), the heads of task 1 and of task 2 (1 each). g1 = (1, 0 | 2 | -), g2 = (-1, 1 | - | 3).
    # As whole vectors g1·g2 = -1, |g1|² = 5, |g2|² = 11: the heads count in the norms and are altered.
    # g1' = g1 + 1/11 g2 = (10/11, 1/11 | 2 | 3/11); g2' = g2 + 1/5 g1 = (-4/5, 1 | 2/5 | 3).
    tasks = [[TWO[0], [2.0], None], [TWO[1], None, [3.0]]]
    shared, one, two = merge("pytorch-pcgrad", tasks, [(2,), (1,), (1,)])
    assert shared == pytest.approx([(10 / 11 - 4 / 5) / 2, (1 / 11 + 1) / 2], abs=1e-15)
    assert one == pytest.approx([2 + 2 / 5]) and two == pytest.approx([3 / 11 + 3])


def test_a_given_reduction_replaces_the_variants_own():
    tasks = [[TWO[0]], [TWO[1]]]
    assert merge("pytorch-pcgrad", tasks, [(2,)], reduction="sum") == [[0.5, 1.5]]
    assert merge("paper", tasks, [(2,)], reduction="mean") == [[0.25, 0.75]]


def test_libmtl_projects_what_all_tasks_touch_and_adds_the_rest():
    # The heads take no part: the shared parameter is TWO, the heads keep their gradients.
    tasks = [[TWO[0], [2.0], None], [TWO[1], None, [3.0]]]
    shared, one, two = merge("libmtl", tasks, [(2,), (1,), (1,)])
    assert shared == pytest.approx([0.5, 1.5], abs=1e-7) and one == [2.0] and two == [3.0]


def test_tensorlogic_takes_each_parameter_by_itself_and_leaves_out_what_a_task_lacks():
    # The first is TWO: the mean of (1/2, 1/2) and (0, 1). The second agrees: (4 + 2) / 2. The third lacks task 2.
    tasks = [[TWO[0], [4.0], [1.0]], [TWO[1], [2.0], None]]
    assert merge("tensorlogic", tasks, [(2,), (1,), (1,)]) == [[0.25, 0.75], [3.0], None]


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_parameter_that_no_task_touches_gets_none(variant):
    merged = merge(variant, [[[1.0], None], [[1.0], None]], [(1,), (3,)])
    assert merged[1] is None and merged[0] is not None


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_only_the_given_parameters_undergo_surgery(variant):
    tasks = [[TWO[0], [2.0]], [TWO[1], [-2.0]]]
    first, second = merge(variant, tasks, [(2,), (1,)], shared=[0], reduction="sum")
    assert first == pytest.approx([0.5, 1.5], abs=1e-7) and second == [0.0]


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_shapes_are_kept(variant):
    merged = merge(variant, [[1.0, [[1.0, 2.0]]], [2.0, [[3.0, 4.0]]]], [(), (1, 2)], reduction="sum")
    assert merged == [3.0, [[4.0, 6.0]]]


@pytest.mark.parametrize("variant", variants.VARIANTS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_coefficients_reproduce_the_projected_vectors(variant, tasks):
    chosen = variants.get(variant)
    rows = torch.randn(tasks, 4, dtype=torch.float64)
    projected = torch.stack(reference.PROJECT[variant](list(rows), random.Random(3)))
    order = chosen.draw_order(tasks, random.Random(3))
    guards = chosen.guards
    matrix = reference.coefficients(reference.gram(rows), order, *guards)
    torch.testing.assert_close(matrix @ rows, projected, rtol=1e-10, atol=1e-10)


def test_coefficients_by_hand():
    # THREE in its own order: a' = a + b/2 + 3/10 c, b' = b + a + c/5, c' = c + 2a + b/2.
    rows = torch.tensor(THREE, dtype=torch.float64)
    matrix = reference.coefficients(reference.gram(rows), torch.arange(3).repeat(3, 1))
    assert_rows(matrix.tolist(), ["1 1/2 3/10", "1 1 1/5", "2 1/2 1"])


def test_gram_combine_and_mix_by_hand():
    rows = torch.tensor(THREE)
    assert reference.gram(rows).tolist() == [[1, -1, -2], [-1, 2, 1], [-2, 1, 5]]
    # The first column alone, and the second alone: (1, -1, -2) and (0, 1, -1).
    first, second = [[1, -1, -2], [-1, 1, 2], [-2, 2, 4]], [[0, 0, 0], [0, 1, -1], [0, -1, 1]]
    assert reference.gram(rows, [0, 1, 2]).tolist() == [first, second]
    weights = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0]])
    assert reference.combine(rows, weights[0]).tolist() == [-1, 2]
    assert reference.combine(rows, weights, [0, 1, 2]).tolist() == [-1, 2]
    swap = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    assert reference.mix(rows, swap).tolist() == [[-1, 1], [1, 0], [-4, -2]]
    both = torch.stack([swap, torch.eye(3)])
    assert reference.mix(rows, both, [0, 1, 2]).tolist() == [[-1, 0], [1, 1], [-4, -1]]


def test_passes_over_j_compute_in_float64():
    rows = torch.tensor([[1.0, 2.0**-12]]).half()
    assert reference.gram(rows).item() == 1 + 2.0**-24
    assert (
        reference.combine(rows, torch.tensor([1 / 3])).dtype == reference.mix(rows, torch.eye(1)).dtype == torch.float64
    )
