"""apply on dicts of arrays: TensorLogic's semantics, the other variants, and answers in kind."""

import inspect
import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from fastpcgrad import methods, reference, variants
from fastpcgrad.arrays import apply

SHAPES = [(), (1,), (7,), (3, 4), (2, 0, 3), (0,), (2, 3, 5), (33,)]


def tensorlogic(tasks):
    """TensorLogic's loops in NumPy: every name by itself, originals in order, mean over the tasks."""
    merged = {}
    for name in tasks[0]:
        if not all(name in task for task in tasks):
            continue
        originals = [task[name] for task in tasks]
        total = np.zeros_like(originals[0])
        for i, own in enumerate(originals):
            projected = own.copy()
            for j, other in enumerate(originals):
                dot, squared_norm = np.sum(projected * other), np.sum(other * other)
                if j != i and dot < 0 and squared_norm > 1e-8:
                    projected = projected - dot / squared_norm * other
            total = total + projected
        merged[name] = total / len(tasks)
    return merged


def random_tasks(rng, dtype=np.float64, scales=(1.0,), missing=0.15):
    """One to eight tasks on up to six names, some of which some tasks lack; the later tasks conflict with others."""
    layout = {f"p{k}": SHAPES[rng.integers(len(SHAPES))] for k in range(rng.integers(1, 7))}
    tasks = []
    for t in range(rng.integers(1, 9)):
        names = [name for name in layout if rng.random() >= missing]
        rng.shuffle(names)
        task = {}
        for name in names:
            values = rng.standard_normal(layout[name]) * rng.choice(scales)
            if t and name in tasks[t - 1] and rng.random() < 0.5:
                values = 0.3 * values - tasks[t - 1][name]
            task[name] = np.asarray(values, dtype=dtype)
        tasks.append(task)
    return tasks


def names_in_order(tasks):
    return list(dict.fromkeys(name for task in tasks for name in task))


def oracle(tasks, variant, seed, reduction=None):
    """``reference.merge`` in float64, as dicts."""
    names = names_in_order(tasks)
    like = {name: array for task in tasks for name, array in task.items()}
    rows = [[torch.tensor(task[n], dtype=torch.float64) if n in task else None for n in names] for task in tasks]
    parameters = [torch.zeros(like[name].shape, dtype=torch.float64) for name in names]
    merged = reference.merge(rows, parameters, variant, random.Random(seed), reduction)
    return {name: grad.numpy() for name, grad in zip(names, merged, strict=True) if grad is not None}


def scale_of(tasks):
    """Σ_j ‖g_j‖, which Σ_j w_j ‖g_j‖ exceeds for a sum."""
    return sum(np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in task.values())) for task in tasks)


def distance(found, expected):
    assert list(found) == list(expected)
    gaps = [np.asarray(found[n], dtype=np.float64) - expected[n] for n in expected]
    return np.sqrt(sum(float(np.sum(np.square(gap))) for gap in gaps))


def copied(tasks):
    return [{name: np.array(array) for name, array in task.items()} for task in tasks]


# What the default does, worked by hand.


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


# Random problems against oracles.


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


# Any method.


def constructible_methods():
    for name in methods.__all__:
        kind = getattr(methods, name)
        if inspect.isclass(kind) and issubclass(kind, methods.Method) and not inspect.isabstract(kind):
            required = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
            if not required:
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


# Answers in kind, inputs as they were.


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


def in_records(a):
    records = np.zeros(a.shape, [("padding", "i1"), ("x", a.dtype)])
    records["x"] = a
    return records["x"]


AWKWARD = {
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "every other": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "Fortran order": np.asfortranarray,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "field of records": lambda a: in_records(a),
    "subclass": lambda a: a.view(type("Named", (np.ndarray,), {})),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD)
def test_numpy_arrays_of_any_layout_give_the_same(make, dtype):
    rng = np.random.default_rng(6)
    plain = [{"w": rng.standard_normal((4, 6)).astype(dtype), "v": np.ones(3, dtype)} for _ in range(3)]
    awkward = [{"w": make(task["w"]), "v": task["v"]} for task in plain]
    before = copied(awkward)
    merged, expected = apply(awkward), apply(plain)
    assert type(merged["w"]) is np.ndarray and merged["w"].dtype == awkward[0]["w"].dtype
    np.testing.assert_array_equal(merged["w"], expected["w"])
    for task, old in zip(awkward, before, strict=True):
        np.testing.assert_array_equal(task["w"], old["w"])


def test_an_unaligned_array_is_read_in_another_dtype_too():
    values = np.random.default_rng(6).standard_normal(1001).astype("f")
    unaligned = AWKWARD["unaligned"](values)
    merged = apply([{"w": unaligned, "v": np.ones(2)}])
    np.testing.assert_array_equal(merged["w"], values)


def test_broadcast_arrays_and_scalars():
    merged = apply(
        [{"w": np.broadcast_to(3.0, (2, 3)), "s": np.float32(1)}, {"w": np.ones((2, 3)), "s": np.float32(2)}]
    )
    np.testing.assert_array_equal(merged["w"], np.full((2, 3), 2.0))
    assert merged["s"].shape == () and merged["s"].dtype == np.float32 and merged["s"] == 1.5


def test_numpys_bfloat16_comes_back():
    dtype = pytest.importorskip("ml_dtypes").bfloat16
    merged = apply([{"w": np.array([[1.0, 0.0]], dtype)}, {"w": np.array([[-1.0, 1.0]], dtype)[:, :]}])
    assert merged["w"].dtype == dtype and merged["w"].tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_tensors_come_back(dtype):
    one = {"w": torch.tensor([[1.0, 0.0]], dtype=dtype).T.requires_grad_(), "s": torch.tensor(1.0, dtype=dtype)}
    other = {"w": torch.tensor([[-1.0], [1.0]], dtype=dtype), "s": torch.nn.Parameter(torch.tensor(3.0, dtype=dtype))}
    merged = apply([one, other])
    assert merged["w"].dtype == dtype and merged["w"].tolist() == [[0.25], [0.75]]
    assert merged["s"].dtype == dtype and merged["s"].shape == () and merged["s"].item() == 2.0
    pointers = {x.untyped_storage().data_ptr() for task in (one, other) for x in task.values()}
    assert all(type(x) is torch.Tensor and not x.requires_grad for x in merged.values())
    assert pointers.isdisjoint(x.untyped_storage().data_ptr() for x in merged.values())


def test_channels_last_and_expanded_tensors():
    plain = [torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(2)]
    merged = apply([{"w": x.to(memory_format=torch.channels_last), "e": torch.ones(1).expand(4)} for x in plain])
    assert torch.equal(merged["w"], apply([{"w": x} for x in plain])["w"])
    assert merged["e"].tolist() == [1.0, 1.0, 1.0, 1.0]


def test_names_of_different_libraries_come_back_as_they_were():
    merged = apply([{"n": np.ones(2), "t": torch.ones(3)}, {"n": np.ones(2), "t": torch.ones(3)}], variant="paper")
    assert type(merged["n"]) is np.ndarray and type(merged["t"]) is torch.Tensor
    assert merged["n"].tolist() == [2.0, 2.0] and merged["t"].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
def test_names_of_several_dtypes_keep_them_and_their_precision(variant):
    rng = np.random.default_rng(7)
    dtypes = {"a": np.float64, "b": np.float32, "c": np.float16, "d": np.float64}
    tasks = [{name: rng.standard_normal(9).astype(dtype) for name, dtype in dtypes.items()} for _ in range(4)]
    merged = apply(tasks, variant=variant, generator=random.Random(1))
    expected = oracle(tasks, variant, 1)
    assert {name: array.dtype for name, array in merged.items()} == dtypes
    for name, dtype in dtypes.items():
        assert np.abs(merged[name] - expected[name]).max() <= TOLERANCE[dtype] * scale_of(tasks)


def test_fp16_and_bf16_together_lose_nothing_of_either():
    """2¹⁰ + 1 needs fp16's precision, 2¹⁰⁰ bf16's range."""
    task = {"p": torch.tensor([1025.0], dtype=torch.float16), "r": torch.tensor([2.0**100], dtype=torch.bfloat16)}
    merged = apply([task])
    assert merged == task and [x.dtype for x in merged.values()] == [torch.float16, torch.bfloat16]


def test_without_columns_there_is_still_an_answer():
    tasks = [{"z": np.zeros((0, 3), np.float32)}, {"z": np.zeros((0, 3), np.float32)}]
    for variant in variants.VARIANTS:
        merged = apply(tasks, variant=variant)
        assert merged["z"].shape == (0, 3) and merged["z"].dtype == np.float32


# A library like CuPy: DLPack, but a module-level from_dlpack and its own copy().


@pytest.fixture
def other_library(monkeypatch):
    module = types.ModuleType("otherlib")

    class Array:
        def __init__(self, values):
            self.values = values
            self.dtype, self.strides = values.dtype, values.strides

        def copy(self):
            return Array(self.values.copy())

        def __dlpack__(self, **options):
            return self.values.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.values.__dlpack_device__()

    Array.__module__ = "otherlib.core"
    module.Array, module.from_dlpack = Array, lambda x: Array(np.from_dlpack(x))
    monkeypatch.setitem(sys.modules, "otherlib", module)
    return module


def test_any_library_with_dlpack_is_answered_in_kind(other_library):
    rows = [np.array([[1.0, 0.0]]), np.array([[1.0, -1.0]])[:, ::-1]]  # a negative stride, which DLPack cannot have
    merged = apply([{"w": other_library.Array(row)} for row in rows])
    assert type(merged["w"]) is other_library.Array and merged["w"].values.tolist() == [[0.25, 0.75]]


def run_in_library(to_array, to_numpy, dtype, tolerance):
    """Random problems in some library agree with NumPy's, and come back as what they were."""
    rng = np.random.default_rng(8)
    for variant in ("tensorlogic", "pytorch-pcgrad", "libmtl"):
        for seed in range(5):
            tasks = random_tasks(rng, np.float32)
            theirs = [{name: to_array(array, dtype) for name, array in task.items()} for task in tasks]
            rounded = [{name: to_numpy(array) for name, array in task.items()} for task in theirs]
            merged = apply(theirs, variant=variant, generator=random.Random(seed))
            likes = {name: array for task in theirs for name, array in task.items()}
            for name, array in merged.items():
                assert type(array) is type(likes[name])
                assert array.dtype == likes[name].dtype and array.shape == likes[name].shape
            found = {name: to_numpy(array) for name, array in merged.items()}
            assert distance(found, oracle(rounded, variant, seed)) <= tolerance * scale_of(tasks)
            for task, old in zip(theirs, rounded, strict=True):
                assert all(np.array_equal(to_numpy(task[name]), old[name]) for name in task)


LIBRARY_DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)]
)


def optional(name):
    """A library that may be missing; what it warns of while it is imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture(scope="module")
def jax():
    """JAX with float64 and, as it is used here for the first time, two devices on the host."""
    module = optional("jax")
    module.config.update("jax_num_cpu_devices", 2)
    module.config.update("jax_enable_x64", True)
    yield module
    module.config.update("jax_enable_x64", False)


@LIBRARY_DTYPES
def test_jax_arrays_come_back(jax, dtype, tolerance):
    run_in_library(
        lambda array, dtype: jax.numpy.asarray(array, dtype=dtype),
        lambda array: np.asarray(array, dtype=np.float64),
        dtype,
        tolerance,
    )


def test_jax_arrays_come_back_to_their_device(jax):
    for device in jax.devices("cpu"):
        merged = apply([{"w": jax.device_put(jax.numpy.ones(3), device)}])
        assert merged["w"].device == device and merged["w"].tolist() == [1.0, 1.0, 1.0]


def test_sharded_jax_arrays_are_refused(jax):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices("cpu"))
    sharded = jax.device_put(jax.numpy.ones(4), jax.NamedSharding(mesh, jax.P("x")))
    with pytest.raises(TypeError, match=r"task_gradients\[0\]\['w'\].*sharded"):
        apply([{"w": sharded}])


def test_jax_arrays_are_refused_while_traced(jax):
    with pytest.raises(TypeError, match=r"task_gradients\[0\]\['w'\].*Tracer"):
        jax.jit(lambda x: apply([{"w": x}])["w"])(jax.numpy.ones(3))


@LIBRARY_DTYPES
def test_tensorflow_tensors_come_back(dtype, tolerance):
    tensorflow = optional("tensorflow")
    run_in_library(
        lambda array, dtype: tensorflow.cast(tensorflow.constant(array), dtype),
        lambda array: tensorflow.cast(array, "float64").numpy(),  # computes, so it needs aligned memory
        dtype,
        tolerance,
    )


def test_tensorflow_tensors_are_refused_while_traced():
    tensorflow = optional("tensorflow")
    with pytest.raises(TypeError, match=r"task_gradients\[0\]\['w'\].*DLPack"):
        tensorflow.function(lambda x: apply([{"w": x}])["w"])(tensorflow.ones(3))


def test_tensorflow_variables_and_slices_are_refused():
    tensorflow = optional("tensorflow")
    slices = tensorflow.IndexedSlices(tensorflow.ones((1, 2)), tensorflow.constant([0]), tensorflow.constant([3, 2]))
    for array in (tensorflow.Variable([1.0]), slices):
        with pytest.raises(TypeError, match=type(array).__name__):
            apply([{"w": array}])


# NaN, inf and order.


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


def test_any_iterable_of_mappings_will_do():
    tasks = [{"w": np.ones(2)}, {"w": np.ones(2)}]
    merged = apply(types.MappingProxyType(task) for task in tasks)
    assert type(merged) is dict and merged["w"].tolist() == [1.0, 1.0]


# Bad input.

ONES = np.ones(3)


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        ([], ValueError, ["task_gradients", "none"]),
        ({"w": ONES}, TypeError, ["task_gradients", "list", "dict"]),
        (3, TypeError, ["task_gradients", "int"]),
        ([{"w": ONES}, ONES], TypeError, ["task_gradients[1]", "ndarray"]),
        ([{"w": [1.0]}], TypeError, ["task_gradients[0]['w']", "list", "DLPack"]),
        ([{"w": 1.0}], TypeError, ["['w']", "float"]),
        ([{"w": None}], TypeError, ["['w']", "NoneType"]),
        ([{"w": {"kernel": ONES}}], TypeError, ["['w']", "dict"]),
        ([{"w": np.ma.masked_array(ONES)}], TypeError, ["MaskedArray"]),
        ([{"w": np.arange(3)}], TypeError, ["['w']", "int64", "float32"]),
        ([{"w": ONES > 0}], TypeError, ["bool"]),
        ([{"w": ONES * 1j}], TypeError, ["complex128"]),
        ([{"w": ONES.astype(np.longdouble)}], TypeError, [np.dtype(np.longdouble).name, "float64"]),
        ([{"w": np.array([None])}], TypeError, ["object"]),
        ([{"w": torch.arange(3)}], TypeError, ["int64"]),
        ([{"w": torch.eye(2).to_sparse()}], ValueError, ["dense", "sparse_coo"]),
        ([{"w": ONES}, {"w": np.ones((3, 1))}], ValueError, ["task_gradients[1]['w']", "[3]", "[3, 1]"]),
        ([{"w": ONES}, {"w": ONES.astype("f")}], ValueError, ["float64", "float32"]),
        ([{"w": ONES}, {"w": torch.ones(3).double()}], ValueError, ["numpy", "torch"]),
        ([{}, {"w": ONES}, {"w": np.ones(2)}], ValueError, ["task_gradients[2]['w']", "[3]", "[2]"]),
        ([{"w": torch.ones(3)}, {"w": torch.ones(3, device="meta")}], ValueError, ["cpu", "meta"]),
        ([{"w": torch.ones(3), "v": torch.ones(3, device="meta")}], ValueError, ["one device", "cpu", "meta"]),
    ],
)
def test_bad_gradients_name_what_was_found_and_what_is_allowed(tasks, error, words):
    with pytest.raises(error) as caught:
        apply(tasks)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"variant": "pcgrad"}, ValueError, ["'pcgrad'", "tensorlogic"]),
        ({"reduction": "none"}, ValueError, ["reduction", "none"]),
        ({"generator": 3}, TypeError, ["generator", "3"]),
        ({"method": "paper"}, TypeError, ["method", "'paper'"]),
        ({"method": methods.PCGrad}, TypeError, ["method", "PCGrad"]),
        ({"method": methods.PCGrad(), "variant": "paper"}, ValueError, ["variant", "method", "paper"]),
        ({"method": methods.PCGrad(), "reduction": "sum"}, ValueError, ["reduction", "method", "sum"]),
        ({"method": methods.PCGrad(), "generator": random.Random(1)}, ValueError, ["generator", "method"]),
    ],
)
def test_bad_choices_name_what_was_found(options, error, words):
    with pytest.raises(error) as caught:
        apply([{"w": ONES}], **options)
    assert all(word in str(caught.value) for word in words), caught.value
