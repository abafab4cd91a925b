"""apply on the arrays of any library with DLPack: answers in kind."""

import random
import sys
import types

import numpy as np
import pytest

from fastpcgrad.arrays import apply

from .problems import distance, optional, oracle, random_tasks, scale_of


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
