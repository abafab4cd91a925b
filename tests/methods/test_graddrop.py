"""GradDrop: TorchJD's numbers, the expected sign, hand-worked cases."""

import re

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad.methods import graddrop
from fastpcgrad.methods.graddrop import GradDrop
from fastpcgrad.methods.trimmed_mean import TrimmedMean
from tests.methods.random_rows import HARD, KINDS, random_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_oracles(dtype, solver):
    """Sums of up to 6 numbers of one sign, in any order."""
    for seed in range(66):
        rows = random_rows(seed, max_tasks=6, kinds=KINDS + HARD).to(dtype)
        leak = torch.rand(len(rows)).tolist() if seed % 2 else None
        found = GradDrop(leak=leak, generator=torch.Generator().manual_seed(seed)).aggregate(rows)
        drawn = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(seed), dtype=dtype)
        expected = reference.graddrop(rows, drawn, leak)
        assert ((found - expected).abs() <= 8 * torch.finfo(dtype).eps * rows.abs().sum(dim=0)).all(), seed


@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchjd(leaky, dtype, monkeypatch):
    """With the same seed, whatever the chunks: U is drawn in the order of the columns."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    monkeypatch.setattr(graddrop, "_CPU_COLUMNS", 5)
    for seed in range(200):
        rows = random_rows(seed).to(dtype)
        leak = torch.rand(len(rows), dtype=dtype) if leaky else None
        torch.manual_seed(seed)
        found = GradDrop(leak=leak).aggregate(rows)
        torch.manual_seed(seed)
        expected = aggregation.GradDrop(leak=leak)(rows)
        allowed = 8 * len(rows) * torch.finfo(dtype).eps * rows.abs().sum(dim=0)
        assert ((found - expected).abs() <= allowed).all(), seed


def test_f_shapes_the_probability():
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = random_rows(0)

    def steeper(purity):
        return (2 * purity - 0.5).clamp(0, 1)

    torch.manual_seed(0)
    found = GradDrop(steeper).aggregate(rows)
    torch.manual_seed(0)
    torch.testing.assert_close(found, aggregation.GradDrop(steeper)(rows))


def test_the_sign_is_drawn_with_the_probability_of_the_purity():
    """3 and -1: positive in three of four columns; 4 standard errors."""
    rows = torch.tensor([[3.0], [-1.0]]).repeat(1, 40_000)
    found = GradDrop(generator=torch.Generator().manual_seed(1)).aggregate(rows)
    assert set(found.unique().tolist()) == {3.0, -1.0}
    assert abs((found > 0).double().mean() - 0.75) < 4 * (0.75 * 0.25 / 40_000) ** 0.5


def test_leak_by_hand():
    """f = 1 keeps the positive; the leak adds its part of the negative."""
    rows = torch.tensor([[2.0, 0.0], [-4.0, -1.0]])
    found = GradDrop(lambda purity: torch.ones_like(purity), leak=[0.0, 0.25]).aggregate(rows)
    assert found.tolist() == [2.0 - 1.0, -0.25]
    assert GradDrop(leak=[1.0, 1.0]).aggregate(rows).tolist() == [-2.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    rows = torch.randn(5, 300).to(dtype)
    found = GradDrop(generator=torch.Generator().manual_seed(1)).aggregate(rows)
    expected = GradDrop(generator=torch.Generator().manual_seed(1)).aggregate(rows.float())
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("leak", [None, [0.0, 0.5, 0.0]])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_the_result_at_its_place(value, leak):
    rows = torch.randn(3, 50)
    rows[1, 7], rows[:, 9] = value, 0.0
    found = GradDrop(leak=leak).aggregate(rows)
    assert (~found.isfinite()).nonzero().tolist() == [[7]]
    assert found[9] == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_it_scales(scale):
    rows = torch.randn(4, 200, dtype=torch.float64)
    torch.manual_seed(3)
    expected = GradDrop().aggregate(rows)
    torch.manual_seed(3)
    torch.testing.assert_close(GradDrop().aggregate(rows * scale) / scale, expected)


def test_chunks_of_columns_give_the_whole(monkeypatch):
    rows = torch.randn(3, 1000)
    whole = GradDrop(generator=torch.Generator().manual_seed(2)).aggregate(rows)
    monkeypatch.setattr(graddrop, "_CPU_COLUMNS", 1)
    assert torch.equal(GradDrop(generator=torch.Generator().manual_seed(2)).aggregate(rows), whole)


def test_the_rows_stay_as_they_are_and_may_be_strided():
    rows = torch.randn(3, 60)
    before, strided = rows.clone(), rows[:, ::2]
    first = GradDrop(leak=[0.1, 0.2, 0.3], generator=torch.Generator().manual_seed(2)).aggregate(strided)
    again = GradDrop(leak=[0.1, 0.2, 0.3], generator=torch.Generator().manual_seed(2)).aggregate(strided.contiguous())
    assert torch.equal(rows, before) and torch.equal(first, again)
    assert GradDrop().aggregate(rows[:, :0]).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"f": 3}, TypeError, ["f", "3"]),
        ({"leak": [0.5, 1.5]}, ValueError, ["leak", "1.5"]),
        ({"leak": [[0.5]]}, ValueError, ["leak", "[1, 1]"]),
        ({"generator": 3}, TypeError, ["generator", "3"]),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        GradDrop(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_leaks_of_another_number_of_tasks():
    with pytest.raises(ValueError, match=r"leak has 2 .* found 3"):
        GradDrop(leak=[0.5, 0.5]).aggregate(torch.ones(3, 4))


def test_it_has_no_weights():
    with pytest.raises(TypeError, match="GradDrop needs the task gradients"):
        GradDrop().weights(torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("make", [GradDrop, lambda: TrimmedMean(1)])
def test_it_can_be_compiled(make):
    rows = torch.randn(3, 100)
    torch.manual_seed(1)
    expected = make().aggregate(rows)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.compile(make().aggregate, backend="eager")(rows), expected)


@pytest.mark.parametrize("make", [GradDrop, lambda: TrimmedMean(0)])
def test_rows_that_are_none_are_refused(make):
    with pytest.raises(TypeError, match=r"fp32 or fp64; found torch\.int64"):
        make().aggregate(torch.ones(2, 3, dtype=torch.int64))
    for shape in ((0, 3), (3,), (1, 2, 3)):
        with pytest.raises(ValueError, match=re.escape(f"found {list(shape)}")):
            make().aggregate(torch.ones(shape))


def test_f_may_be_a_number():
    rows = torch.tensor([[2.0], [-1.0]])
    assert GradDrop(lambda purity: 1.0).aggregate(rows) == 2.0 and GradDrop(lambda purity: 0.0).aggregate(rows) == -1.0


def test_repr():
    assert repr(GradDrop(leak=[0.5])) == "GradDrop(f=identity, leak=[0.5], generator=None)"
