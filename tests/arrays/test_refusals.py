"""What apply takes, and what it refuses by name."""

import random
import types

import numpy as np
import pytest
import torch

from fastpcgrad import methods
from fastpcgrad.arrays import apply


def test_any_iterable_of_mappings_will_do():
    tasks = [{"w": np.ones(2)}, {"w": np.ones(2)}]
    merged = apply(types.MappingProxyType(task) for task in tasks)
    assert type(merged) is dict and merged["w"].tolist() == [1.0, 1.0]


ONES = np.ones(3)


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        ([], ValueError, ["task_gradients", "none"]),
        ({"w": ONES}, TypeError, ["task_gradients", "list", "dict"]),
        (3, TypeError, ["task_gradients", "int"]),
        ([{"w": ONES}, ONES], TypeError, ["task_gradients[1]", "ndarray"]),
        ([{"w": [1.0]}], TypeError, ["task_gradients[0]['w'][0]", "float", "DLPack"]),
        ([None], TypeError, ["task_gradients[0]", "NoneType"]),
        ([[ONES], [ONES, ONES]], ValueError, ["task_gradients[1]", "a list of 1", "a list of 2"]),
        ([[ONES], (ONES,)], ValueError, ["task_gradients[1]", "a list of 1", "a tuple of 1"]),
        ([[ONES], {"w": ONES}], ValueError, ["task_gradients[1]", "a list of 1", "a dict"]),
        ([{"w": {"kernel": ONES}}, {"w": ONES}], ValueError, ["task_gradients[1]['w']", "a dict", "an array"]),
        ([{"w": {"k": ONES}}, {"w": {"k": ONES[:2]}}], ValueError, ["task_gradients[1]['w']['k']", "[3]", "[2]"]),
        ([{"w": 1.0}], TypeError, ["['w']", "float"]),
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
