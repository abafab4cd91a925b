"""methods.PCGrad on Gram matrices and rows against the oracle."""

import random

import pytest
import torch

from fastpcgrad import methods, reference, variants
from fastpcgrad.backends import kernels
from fastpcgrad.rows.task_gradients import TaskGradients
from tests.methods.random_rows import error, gram, random_rows

TASKS = (1, 2, 3, 8, 17)

for_every_variant = pytest.mark.parametrize("variant", list(variants.VARIANTS))
for_every_reduction = pytest.mark.parametrize("reduction", [None, "sum", "mean"])


def task_gradients(tasks, width=40):
    rows = torch.randn(tasks, width, dtype=torch.float64)
    rows[tasks // 2] = -1.3 * rows[0]  # zero from the start for T = 1, a conflict with the whole of another for T > 1
    return rows


def projected_rows(variant, rows, generator):
    return torch.stack(reference.PROJECT[variant](list(rows), generator))


def merged(variant, rows, generator, reduction):
    reduction = reduction or variants.get(variant).reduction
    projected = projected_rows(variant, rows, generator)
    return projected.mean(dim=0) if reduction == "mean" else projected.sum(dim=0)


@for_every_variant
@pytest.mark.parametrize("tasks", TASKS)
def test_coefficients_give_the_projected_rows_of_the_oracle(variant, tasks):
    rows = task_gradients(tasks)
    coefficients = methods.PCGrad(variant, generator=random.Random(3)).coefficients(rows @ rows.mT)
    assert coefficients.shape == (tasks, tasks) and coefficients.dtype == torch.float64
    torch.testing.assert_close(coefficients @ rows, projected_rows(variant, rows, random.Random(3)))


@for_every_variant
@for_every_reduction
@pytest.mark.parametrize("tasks", TASKS)
def test_weights_give_the_merged_gradient_of_the_oracle(variant, reduction, tasks):
    rows = task_gradients(tasks)
    weights = methods.PCGrad(variant, reduction, random.Random(3)).weights(rows @ rows.mT)
    assert weights.shape == (tasks,) and weights.dtype == torch.float64
    torch.testing.assert_close(weights @ rows, merged(variant, rows, random.Random(3), reduction))


def test_it_is_torchjds():
    """From the same seed, which it leaves in the same state. Left out: zero gradients, by which TorchJD divides."""
    weighting = pytest.importorskip("torchjd.aggregation").PCGradWeighting()
    compared = 0
    for seed in range(260):
        rows = random_rows(seed)
        if not rows.any(dim=1).all():
            continue
        torch.manual_seed(seed)
        expected, after = weighting(gram(rows)), torch.get_rng_state()
        torch.manual_seed(seed)
        weights = methods.PCGrad("torchjd").weights(gram(rows))
        assert torch.equal(torch.get_rng_state(), after)
        assert error(weights @ rows, expected @ rows, weights, rows) <= 1e-12, seed
        compared += 1
    assert compared >= 200


@for_every_variant
@for_every_reduction
def test_problems_in_a_batch_draw_one_order_each_from_one_generator(variant, reduction):
    problems = [task_gradients(5) for _ in range(4)]
    grams = torch.stack([rows @ rows.mT for rows in problems])
    method, one_by_one = (methods.PCGrad(variant, reduction, random.Random(3)) for _ in "ab")
    weights, coefficients = method.solve(grams)
    assert weights.shape == (4, 5) and coefficients.shape == (4, 5, 5)
    for s, matrix in enumerate(grams):
        expected = one_by_one.solve(matrix)
        torch.testing.assert_close(weights[s], expected.weights)
        torch.testing.assert_close(coefficients[s], expected.coefficients)


@for_every_variant
def test_one_order_drawn_for_several_problems_leaves_the_generator_where_single_draws_do(variant):
    together, single = random.Random(3), random.Random(3)
    methods.PCGrad(variant, generator=together).weights(torch.eye(5, dtype=torch.float64).repeat(4, 1, 1))
    for _ in range(4):
        methods.PCGrad(variant, generator=single).weights(torch.eye(5, dtype=torch.float64))
    assert together.getstate() == single.getstate()


def in_blocks(rows, widths=(7, 0, 33)):
    grads = TaskGradients(rows[0].split(widths))
    for t, row in enumerate(rows):
        grads.put(t, [piece.clone() for piece in row.split(widths)])
    return grads


@for_every_variant
@for_every_reduction
def test_projections_by_one_kernel_are_solve_and_combine(variant, reduction):
    rows = task_gradients(5)
    grads = in_blocks(rows)
    blocks = grads.columns().whole
    out = [torch.full_like(place, torch.nan) for place in blocks.tensors[0]]
    projections = methods.PCGrad(variant, reduction, random.Random(3)).projections(len(rows), blocks.device)
    found = kernels.pcgrad_blocks(blocks, *projections, out)()
    expected = methods.PCGrad(variant, reduction, random.Random(3)).solve(rows @ rows.mT)
    torch.testing.assert_close(found.gram, rows @ rows.mT)
    torch.testing.assert_close(found.weights, expected.weights)
    torch.testing.assert_close(found.coefficients, expected.coefficients)
    torch.testing.assert_close(torch.cat(out), merged(variant, rows, random.Random(3), reduction))


def test_projections_may_be_written_over_a_row():
    rows = task_gradients(5)
    grads = in_blocks(rows)
    blocks = grads.columns().whole
    out = blocks.tensors[1]
    kernels.pcgrad_blocks(blocks, *methods.PCGrad("tensorflow").projections(5, blocks.device), out)
    torch.testing.assert_close(torch.cat(out), merged("tensorflow", rows, None, None))


@for_every_variant
@for_every_reduction
def test_partial_weights_follow_the_original(variant, reduction):
    """Only the widely used PyTorch code averages nothing but what every task touches."""
    method = methods.PCGrad(variant, reduction)
    weights = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    averaged = (reduction or variants.get(variant).reduction) == "mean"
    factor = 3 if variant == "pytorch-pcgrad" and averaged else 1
    torch.testing.assert_close(method.partial_weights(weights), weights * factor)


@for_every_variant
def test_coefficients_are_bounded_by_the_norms(variant):
    """Without self-projection C_ii = 1, C_ij ≥ 0 and |C_ij| ‖g_j‖ ≤ ‖g_i‖; with it C_ii may grow."""
    for tasks in TASKS:
        rows = task_gradients(tasks)
        norms = rows.norm(dim=1)
        coefficients = methods.PCGrad(variant).coefficients(rows @ rows.mT)
        assert (coefficients >= 0).all() and (coefficients.diagonal() >= 1).all()
        if not variants.get(variant).guards.self_projection:
            assert (coefficients.diagonal() == 1).all()
            assert (coefficients * norms <= norms[:, None] * (1 + 1e-12)).all()


def test_a_global_generator_is_used_only_where_none_is_given():
    before = random.getstate(), torch.get_rng_state()
    for variant in variants.VARIANTS:
        for generator in (random.Random(1), torch.Generator()):
            methods.PCGrad(variant, generator=generator).weights(torch.eye(4, dtype=torch.float64))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"variant": "pcgrad"}, ValueError, ["pcgrad", "pytorch-pcgrad"]),
        ({"variant": ["paper"]}, ValueError, ["variant", "paper"]),
        ({"reduction": "none"}, ValueError, ["reduction", "none", "mean"]),
        ({"generator": 3}, TypeError, ["generator", "3"]),
        ({"generator": random}, TypeError, ["generator", "random"]),
    ],
)
def test_bad_choices_name_what_was_found(arguments, error, words):
    with pytest.raises(error) as caught:
        methods.PCGrad(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_it_has_no_state():
    method = methods.PCGrad()
    assert method.state_dict() == {}
    method.load_state_dict({})
    with pytest.raises(ValueError, match="momentum"):
        method.load_state_dict({"momentum": 1})


def test_repr_says_what_was_chosen():
    assert repr(methods.PCGrad("libmtl", "mean")) == "PCGrad(variant='libmtl', reduction='mean')"
