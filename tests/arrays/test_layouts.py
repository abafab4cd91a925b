"""apply on NumPy arrays and torch tensors of any layout and dtype: answers in kind."""

import random

import numpy as np
import pytest
import torch

from fastpcgrad import variants
from fastpcgrad.arrays import apply

from .problems import copied, oracle, scale_of
from .test_semantics import TOLERANCE


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
