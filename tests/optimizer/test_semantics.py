"""PCGrad(optimizer) against the oracle: the same numbers, and the same state of the generator, as each original."""

import math
import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch

import fastpcgrad
from fastpcgrad import reference, variants
from tests.linear_problems import KINDS, Problem, random_problem

PROBLEMS = 160
"""For each variant."""

# Problems of one task, and surgeries that follow each other without a step, are meant.
pytestmark = pytest.mark.filterwarnings("ignore::fastpcgrad.FastPCGradWarning")

for_every_variant = pytest.mark.parametrize("variant", list(variants.VARIANTS))


def random_choices(seed: int, count: int) -> tuple[variants.Reduction | None, list[int] | None]:
    """A reduction, and the indices of the parameters that are named as shared."""
    draw = random.Random(seed)
    reductions: tuple[variants.Reduction | None, ...] = (None, None, "sum", "mean")
    reduction = draw.choice(reductions)
    shared = [p for p in range(count) if draw.random() < 0.6] if draw.random() < 0.3 else None
    return reduction, shared


def seed_global_generators(seed: int) -> None:
    random.seed(seed)
    torch.default_generator.manual_seed(seed)


def make_generator(seed: int) -> random.Random | torch.Generator | None:
    return (None, random.Random(seed), torch.Generator().manual_seed(seed))[seed % 3]


def states(generator: random.Random | torch.Generator | None) -> list[object]:
    found: list[object] = [random.getstate(), torch.get_rng_state().tolist()]
    if isinstance(generator, random.Random):
        found.append(generator.getstate())
    if isinstance(generator, torch.Generator):
        found.append(generator.get_state().tolist())
    return found


def merged_by_wrapper(problem: Problem, seed: int, variant: str, dtype: torch.dtype):
    """The wrapper after its surgery, its parameters, and the states of all generators."""
    parameters = problem.parameters(dtype)
    reduction, shared = random_choices(seed, len(parameters))
    generator = make_generator(seed)
    wrapper = fastpcgrad.PCGrad(
        torch.optim.SGD(parameters, lr=0.1),
        reduction,
        variant=variant,
        shared=None if shared is None else [parameters[p] for p in shared],
        generator=generator,
    )
    seed_global_generators(seed)
    wrapper.pc_backward(problem.losses(parameters))
    return wrapper, parameters, states(generator)


@cache
def merged_by_oracle(seed: int, variant: str):
    """The merged gradients in float64 and the states of all generators; both dtypes are compared with it."""
    problem = random_problem(seed)
    parameters = problem.parameters(torch.float64)
    reduction, shared = random_choices(seed, len(parameters))
    generator = make_generator(seed)
    seed_global_generators(seed)
    merged = reference.merge(problem.gradients, parameters, variant, generator, reduction, shared)
    return merged, states(generator)


def weights_of_each_parameter(problem: Problem, seed: int, variant: str, report: fastpcgrad.ConflictReport):
    """w such that the merged gradient of each parameter is Σ_j w_j g_j: ``[T]`` each."""
    chosen, tasks = variants.get(variant), len(problem.gradients)
    reduction, shared = random_choices(seed, len(problem.kinds))
    averaged = (reduction or chosen.reduction) == "mean"
    solved = iter(report.weights)  # where each parameter is a problem: one row for each that undergoes surgery
    for p in range(len(problem.kinds)):
        everywhere = all(gradients[p] is not None for gradients in problem.gradients)
        inside = p in shared if shared is not None else chosen.scope != "shared" or everywhere
        if not inside:
            yield torch.ones(tasks, dtype=torch.float64)
        else:
            weights = next(solved) if report.weights.dim() == 2 else report.weights
            yield weights * tasks if averaged and chosen.partial_sum and not everywhere else weights


def sum_of_weighted_norms(problem: Problem, weights: Sequence[torch.Tensor]) -> float:
    """Σ_j w_j ‖g_j‖, the scale of the project's error measure, where parameters may have weights of their own."""
    return sum(
        math.hypot(*(float(w[t] * g.norm()) for w, g in zip(weights, gradients, strict=True) if g is not None))
        for t, gradients in enumerate(problem.gradients)
    )


def assert_merged_gradients(seed: int, variant: str, dtype: torch.dtype, tolerance: float):
    problem = random_problem(seed)
    wrapper, parameters, found_states = merged_by_wrapper(problem, seed, variant, dtype)
    expected, expected_states = merged_by_oracle(seed, variant)
    where = f"{variant}, problem {seed}"
    assert found_states == expected_states, f"{where}: the generators end in another state"
    assert [p.grad is None for p in parameters] == [e is None for e in expected], where
    assert all(p.grad is None or p.grad.dtype == dtype for p in parameters)

    weights = list(weights_of_each_parameter(problem, seed, variant, wrapper.report))
    error = math.hypot(
        *(float((p.grad.double() - e).norm()) for p, e in zip(parameters, expected, strict=True) if e is not None)
    )
    assert error <= tolerance * sum_of_weighted_norms(problem, weights), where


@for_every_variant
def test_float64_gradients_and_generator_states_are_the_oracles(variant):
    for seed in range(PROBLEMS):
        assert_merged_gradients(seed, variant, torch.float64, 1e-13)


@for_every_variant
def test_float32_models_are_within_1e_6_of_the_float64_oracle(variant):
    for seed in range(0, PROBLEMS, 2):
        assert_merged_gradients(seed, variant, torch.float32, 1e-6)


@for_every_variant
def test_successive_steps_go_on_drawing_from_the_same_generator(variant):
    """Orders of later steps must be the later draws of the original, on rows that were used before."""
    problem, generators = random_problem(11), [random.Random(5), random.Random(5)]
    parameters = problem.parameters(torch.float64)
    wrapper = fastpcgrad.PCGrad(torch.optim.SGD(parameters, lr=0.1), variant=variant, generator=generators[0])
    for _ in range(5):
        wrapper.pc_backward(problem.losses(parameters))
        expected = reference.merge(problem.gradients, parameters, variant, generators[1])
        for p, e in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, e)


def test_the_random_problems_cover_what_they_are_meant_to():
    problems = [random_problem(seed) for seed in range(PROBLEMS)]
    assert {len(problem.gradients) for problem in problems} == set(range(1, 13))
    assert {kind for problem in problems for kind in problem.kinds} == set(KINDS)
    present = [[g is not None for g in gradients] for problem in problems for gradients in problem.gradients]
    assert any(not any(task) for task in present) and any(all(task) for task in present)
    zero = [g for problem in problems for task in problem.gradients for g in task if g is not None and not g.any()]
    assert 2 * len(zero) > PROBLEMS
