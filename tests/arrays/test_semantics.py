"""apply on dicts of arrays: TensorLogic's semantics, the other variants and methods."""

import inspect
import random

import numpy as np
import pytest
import torch

from fastpcgrad import methods, variants
from fastpcgrad.arrays import apply

from .problems import copied, distance, oracle, random_tasks, scale_of, tensorlogic


def test_conflicting_gradients_are_projected_and_averaged():
    merged = apply([{"w": np.array([[1.0, 0.0]])}, {"w": np.array([[-1.0, 1.0]])}])
    np.testing.assert_array_equal(merged["w"], [[0.25, 0.75]])  # the mean of (½, ½) and (0, 1)


def test_gradients_without_conflict_are_averaged():
    merged = apply([{"w": np.array([1.0, 2.0])}, {"w": np.array([3.0, 0.0])}])
    np.testing.assert_array_equal(merged["w"], [2.0, 1.0])


def test_each_name_is_a_problem_of_its_own():
    """As one vector the two tasks agree; under "a" they conflict."""
    merged = apply([{"a": np.array([1.0]), "b": np.array([2.0])}, {"a": np.array([-1.0]), "b": np.array([2.0])}])
    assert merged == {"a": np.array([0.0]), "b": np.array([2.0])}
    together = apply(
        [{"a": np.array([1.0]), "b": np.array([2.0])}, {"a": np.array([-1.0]), "b": np.array([2.0])}], variant="paper"
    )
    assert together == {"a": np.array([0.0]), "b": np.array([4.0])}


def test_the_tasks_are_taken_in_their_order():
    """g_1 = (1, 0) meets g_2 = (−1, 1) first: (½, ½) no longer conflicts with g_3 = (−1, 2), whereas g_3 first would
    leave (⅘, ⅖) of it, which conflicts with g_2."""
    rows = [np.array([1.0, 0.0]), np.array([-1.0, 1.0]), np.array([-1.0, 2.0])]
    merged = apply([{"w": row} for row in rows], reduction="sum")
    np.testing.assert_allclose(merged["w"], [0.5, 3.5], rtol=1e-15)


def test_a_gradient_below_the_guard_projects_no_other():
    small, large = np.array([-0.9e-4]), np.array([1.0])  # 0.81e-8 is not more than 1e-8
    merged = apply([{"w": large}, {"w": small}])
    np.testing.assert_allclose(merged["w"], [0.5], rtol=1e-15)  # 1 stays; -0.9e-4 is projected away
    merged = apply([{"w": large}, {"w": np.array([-1.1e-4])}])
    np.testing.assert_allclose(merged["w"], [0.0], atol=1e-15)


def test_a_name_that_any_task_lacks_is_left_out():
    tasks = [{"a": np.ones(2), "b": np.ones(1)}, {"b": np.ones(1), "c": np.ones(3)}]
    assert list(apply(tasks)) == ["b"]
    assert apply([{"a": np.ones(2)}, {"b": np.ones(2)}]) == {}
    assert apply([{}, {"b": np.ones(2)}]) == {}
    assert apply([{}]) == {}


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
def test_one_task_gets_its_gradients_copied(variant):
    task = {"w": np.array([[1.5, -2.0]]), "b": np.float64(1e-300), "z": np.zeros((0, 2))}
    merged = apply([task], variant=variant)
    assert list(merged) == ["w", "b", "z"]
    for name, array in task.items():
        np.testing.assert_array_equal(merged[name], array)
        assert merged[name].shape == array.shape and not np.shares_memory(merged[name], array)


def test_500_random_problems_give_what_tensorlogics_loops_give():
    rng = np.random.default_rng(0)
    for _ in range(500):
        tasks = random_tasks(rng, scales=(1.0, 1e-6, 1e3))
        merged, expected = apply(tasks), tensorlogic(tasks)
        assert distance(merged, expected) <= 1e-12 * scale_of(tasks) / len(tasks)
        assert all(merged[name].shape == array.shape for name, array in expected.items())


TOLERANCE = {np.float64: 1e-12, np.float32: 1e-6, np.float16: 1e-3}


"""The error that DESIGN allows; fp16's is that of rounding the result, which has a half unit of 2⁻¹¹."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", list(variants.VARIANTS))
def test_random_problems_agree_with_the_oracle(variant, dtype):
    rng = np.random.default_rng(1)
    for seed in range(40):
        tasks = random_tasks(rng, dtype)
        reduction = [None, "sum", "mean"][seed % 3]
        merged = apply(tasks, variant=variant, reduction=reduction, generator=random.Random(seed))
        expected = oracle(tasks, variant, seed, reduction)
        assert all(array.dtype == dtype for array in merged.values())
        averaged = (reduction or variants.get(variant).reduction) == "mean" and variant == "tensorlogic"
        assert distance(merged, expected) <= TOLERANCE[dtype] * scale_of(tasks) / (len(tasks) if averaged else 1)


def test_large_gradients_agree_with_the_oracle():
    """Wide enough that gram and combine work in chunks and threads; rows that cross them."""
    rng = np.random.default_rng(2)
    tasks = [
        {k: rng.standard_normal(n).astype("f") - 0.1 * t for k, n in (("a", 70_001), ("b", 3), ("c", 30_000))}
        for t in range(4)
    ]
    for variant in variants.VARIANTS:
        merged = apply(tasks, variant=variant, generator=random.Random(3))
        assert distance(merged, oracle(tasks, variant, 3)) <= 1e-6 * scale_of(tasks) / len(tasks)


def constructible_methods():
    for name in methods.__all__:
        kind = getattr(methods, name)
        if inspect.isclass(kind) and issubclass(kind, methods.Method) and not inspect.isabstract(kind):
            required = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
            if not (required or issubclass(kind, methods.Tracking)):
                yield pytest.param(kind, id=name)


@pytest.mark.parametrize("kind", list(constructible_methods()))
def test_every_method_can_be_used(kind):
    rng = np.random.default_rng(4)
    tasks = [{"a": rng.standard_normal((2, 3)), "b": rng.standard_normal(5)} for _ in range(3)]
    torch.manual_seed(0)
    random.seed(0)
    merged = apply(tasks, method=kind())
    torch.manual_seed(0)
    random.seed(0)
    rows = torch.tensor(np.stack([np.concatenate([g.ravel() for g in task.values()]) for task in tasks]))
    method = kind()
    elementwise = isinstance(method, methods.Elementwise)
    expected = method.aggregate(rows) if elementwise else method.weights(rows @ rows.mT) @ rows
    np.testing.assert_allclose(
        np.concatenate([g.ravel() for g in merged.values()]), expected.numpy(), rtol=1e-7, atol=1e-9
    )


class Half(methods.Method):
    """Weights that show which rule was used where."""

    def solve(self, gram):
        return methods.Solution(gram.new_full(gram.shape[:-1], 0.5), coefficients=None)

    def partial_weights(self, weights):
        return weights * 4


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("all", {"a": [2.0], "b": [1.0], "c": [10.0]}),
        ("shared", {"a": [1.0], "b": [1.0], "c": [5.0]}),
        ("parameter", {"b": [1.0]}),
    ],
)
def test_the_scope_of_a_method_says_what_becomes_of_partial_names(scope, expected):
    method = Half()
    method.scope = scope
    merged = apply([{"a": np.ones(1), "b": np.ones(1)}, {"c": np.full(1, 5.0), "b": np.ones(1)}], method=method)
    assert {name: array.tolist() for name, array in merged.items()} == expected
    assert list(merged) == list(expected)


def test_a_method_keeps_its_state_between_calls():
    class Counter(Half):
        calls = 0

        def solve(self, gram):
            self.calls += 1
            return super().solve(gram)

    method = Counter()
    for _ in range(3):
        apply([{"w": np.ones(2)}], method=method)
    assert method.calls == 3


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
def test_inputs_are_neither_written_nor_shared(variant):
    rng = np.random.default_rng(5)
    tasks = [{"a": rng.standard_normal((3, 4)), "b": rng.standard_normal(())} for _ in range(3)]
    before = copied(tasks)
    merged = apply(tasks, variant=variant)
    for task, old in zip(tasks, before, strict=True):
        for name in task:
            np.testing.assert_array_equal(task[name], old[name])
            assert not any(np.shares_memory(task[name], array) for array in merged.values())
    assert not np.shares_memory(merged["a"], merged["b"])
    merged["a"][:] = 7.0  # the answer belongs to the caller
    np.testing.assert_array_equal(tasks[0]["a"], before[0]["a"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_stays_visible_under_its_name(bad):
    tasks = [{"a": np.array([1.0, bad]), "b": np.array([1.0])}, {"a": np.array([-1.0, 1.0]), "b": np.array([3.0])}]
    merged = apply(tasks)
    assert not np.isfinite(merged["a"][1])
    np.testing.assert_array_equal(merged["b"], [2.0])


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_its_place(variant, bad):
    tasks = [{"a": np.array([1.0, bad]), "b": np.array([1.0])}, {"a": np.array([-1.0, 1.0]), "b": np.array([3.0])}]
    assert not np.isfinite(apply(tasks, variant=variant)["a"][1])


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
@pytest.mark.parametrize("make", [random.Random, lambda seed: torch.Generator().manual_seed(seed)])
def test_the_same_generator_gives_the_same_bits(variant, make):
    rng = np.random.default_rng(9)
    tasks = [{"a": rng.standard_normal(50), "b": rng.standard_normal((3, 3))} for _ in range(6)]
    first, again = (apply(tasks, variant=variant, generator=make(3)) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


def test_another_order_gives_another_answer():
    rng = np.random.default_rng(9)
    tasks = [{"a": rng.standard_normal(5)} for _ in range(6)]
    answers = {apply(tasks, variant="paper", generator=random.Random(seed))["a"].tobytes() for seed in range(10)}
    assert len(answers) > 1


def test_the_default_draws_nothing():
    before = random.getstate(), torch.get_rng_state()
    apply([{"w": np.ones(3)}, {"w": -np.ones(3)}])
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("names", [("w", "c"), ("b", "w"), (1, "w")])
def test_what_is_kept_of_a_name_is_not_taken_for_that_of_another(names):
    """As many names in every call, by a method with a problem for each."""
    method = methods.CRMOGM(methods.PCGrad("tensorlogic"))

    def call(*names):
        return apply([{name: np.ones(2) * t - k for k, name in enumerate(names)} for t in (1, 2)], method=method)

    call("w", "b"), call("w", "b")
    state = method.state_dict()
    with pytest.raises(ValueError, match=r"keeps something of each of 2 problems \(w, b\); found 2 problems .*reset"):
        call(*names)
    torch.testing.assert_close(method.state_dict(), state, rtol=0, atol=0)
    call("w", "b")
    method.reset()
    call(*names)
