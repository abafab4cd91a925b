"""apply on lists, nested dicts and what else gradients come in: what the flat call gives."""

import collections
import random
import sys
import types

import numpy as np
import pytest

from fastpcgrad import methods, variants
from fastpcgrad.arrays import apply

Pair = collections.namedtuple("Pair", ["left", "right"])


def problem(tasks=3):
    rng = np.random.default_rng(0)
    return [{name: rng.standard_normal(shape) - 0.3 for name, shape in SHAPES.items()} for _ in range(tasks)]


SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": (), "last": (2, 0), "left": (5,), "right": (5, 1)}


def tree(flat):
    """Like the parameters of a flax model, with lists and tuples in them."""
    return {
        "params": {
            "dense": {"kernel": flat["kernel"], "bias": flat["bias"]},
            "layers": [{"scale": flat["scale"]}, (flat["last"],), Pair(flat["left"], flat["right"])],
        }
    }


def assert_same(found, expected):
    """Of the same kinds all the way down, and of the same bits."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("variant", [name for name, own in variants.VARIANTS.items() if own.scope == "parameter"])
def test_variants_that_take_each_name_by_itself(variant):
    flat = problem()
    merged = apply(flat, variant=variant)
    assert_same(apply([tree(task) for task in flat], variant=variant), tree(merged))


@pytest.mark.parametrize("method", [methods.UPGrad(), methods.PCGrad("tensorflow"), methods.TrimmedMean(1)])
def test_methods_that_take_all_names_together(method):
    flat = problem()
    merged = apply(flat, method=method)
    assert_same(apply([tree(task) for task in flat], method=method), tree(merged))
    assert_same(apply([list(task.values()) for task in flat], method=method), list(merged.values()))
    assert_same(apply([tuple(task.values()) for task in flat], method=method), tuple(merged.values()))


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
def test_none_is_a_name_that_the_task_lacks(variant):
    """As a tape gives it for a variable that a loss does not depend on."""
    flat = problem(2)
    with_none = [{**flat[0], "bias": None}, {**flat[1], "scale": None, "bias": None}]
    without = [{name: array for name, array in task.items() if array is not None} for task in with_none]
    merged = apply(without, variant=variant, generator=random.Random(3))
    expected = [merged.get(name) for name in SHAPES]
    assert expected[1] is None and expected[0] is not None
    lists = [list(task.values()) for task in with_none]
    assert_same(apply(lists, variant=variant, generator=random.Random(3)), expected)


def test_none_stays_where_it_was_and_what_is_missing_is_left_out():
    one, two = np.ones(2), np.full(2, 3.0)
    assert_same(apply([{"a": one, "b": None}, {"a": two, "b": None}]), {"a": np.full(2, 2.0), "b": None})
    assert_same(apply([{"a": one, "b": one}, {"a": two, "b": None}]), {"a": np.full(2, 2.0), "b": None})
    assert_same(apply([{"a": one, "b": one}, {"a": two}]), {"a": np.full(2, 2.0)})
    assert_same(apply([[None], [None]]), [None])
    paper = apply([{"a": {"b": one, "c": one}}, {"a": None}], variant="paper")
    assert_same(paper, {"a": {"b": one, "c": one}})


def test_other_mappings_come_back_as_dicts():
    frozen = types.MappingProxyType({"w": types.MappingProxyType({"k": np.ones(2)})})
    assert_same(apply([frozen, frozen]), {"w": {"k": np.ones(2)}})


def test_what_tensorflow_has_besides_tensors_is_refused_with_the_remedy(monkeypatch):
    module = types.ModuleType("tensorflow")
    module.Tensor = type("Tensor", (), {"__module__": "tensorflow.python.framework.tensor"})
    monkeypatch.setitem(sys.modules, "tensorflow", module)
    for name in ("IndexedSlices", "ResourceVariable"):
        kind = type(name, (), {"__module__": "tensorflow.python.framework"})
        with pytest.raises(TypeError, match=rf"task_gradients\[0\]\[1\].*{name}.*tf\.convert_to_tensor"):
            apply([[np.ones(2), kind()]])
