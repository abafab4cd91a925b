"""What bad input gets: the argument by name, what was found, and nothing written."""

import random

import pytest
import torch

import fastpcgrad
from fastpcgrad._losses import check_losses


def doubles(*shape):
    return torch.ones(shape, dtype=torch.float64)


def places(*batch, tasks=3):
    return torch.arange(tasks).expand(*batch, tasks, tasks).clone()


J = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

# Each takes the rows alone.
ON_ROWS = {
    "gram": fastpcgrad.gram,
    "combine": lambda grads: fastpcgrad.combine(grads, doubles(3)),
    "mix_": lambda grads: fastpcgrad.mix_(grads, doubles(3, 3)),
    "pcgrad": fastpcgrad.pcgrad,
    "pcgrad_": fastpcgrad.pcgrad_,
}
BAD_ROWS = {
    "a list": ([[1.0, 2.0]], TypeError, r"grads must be a torch\.Tensor; found list"),
    "an array": (J.numpy(), TypeError, r"grads must be a torch\.Tensor; found ndarray"),
    "none": (None, TypeError, r"grads must be a torch\.Tensor; found NoneType"),
    "integers": (J.int(), TypeError, r"float16, bfloat16, float32 or float64; found torch\.int32"),
    "complex": (J.to(torch.complex64), TypeError, r"float32 or float64; found torch\.complex64"),
    "booleans": (J > 0, TypeError, r"float32 or float64; found torch\.bool"),
    "fp8": (J.to(torch.float8_e4m3fn), TypeError, r"found torch\.float8_e4m3fn"),
    "a vector": (J[0], ValueError, r"grads must be \[T, N\] .*; found \[8\]"),
    "three dimensions": (J[None], ValueError, r"grads must be \[T, N\] .*; found \[1, 3, 8\]"),
    "no tasks": (J[:0], ValueError, r"T >= 1 .*; found \[0, 8\]"),
    "sparse": (J.to_sparse(), ValueError, r"grads must be dense; found layout torch\.sparse_coo"),
    "columns": (J.mT, ValueError, r"rows of grads must be contiguous; found strides \(1, 8\)"),
    "every other column": (J[:, ::2], ValueError, r"rows of grads must be contiguous; found strides \(8, 2\)"),
    "one number": (torch.ones(1).expand(3, 8), ValueError, r"rows of grads must be contiguous; found strides \(0, 0\)"),
}

SEGMENTED = {
    "gram": lambda segments: fastpcgrad.gram(J, segments),
    "combine": lambda segments: fastpcgrad.combine(J, doubles(2, 3), segments=segments),
    "mix_": lambda segments: fastpcgrad.mix_(J, doubles(2, 3, 3), segments=segments),
    "pcgrad": lambda segments: fastpcgrad.pcgrad(J, segments=segments),
    "pcgrad_": lambda segments: fastpcgrad.pcgrad_(J, segments=segments),
}
BAD_SEGMENTS = {
    "empty": ([], r"offsets from 0 to N=8; found \[\]"),
    "one offset": ([0], r"found \[0\]"),
    "a late start": ([1, 4, 8], r"found \[1, 4, 8\]"),
    "an early end": ([0, 4, 7], r"found \[0, 4, 7\]"),
    "beyond the end": ([0, 4, 9], r"found \[0, 4, 9\]"),
    "decreasing": ([0, 5, 4, 8], r"non-decreasing .* found \[0, 5, 4, 8\]"),
    "negative": ([0, -1, 8], r"found \[0, -1, 8\]"),
    "many": ([0, *range(7, -1, -1), 8], r"found \[0, 7, 6, 5, '\.\.\.', 1, 0, 8\]"),
    "a tensor of wrong offsets": (torch.tensor([0, 9]), r"found \[0, 9\]"),
    "a tensor of floats": (torch.tensor([0.0, 8.0]), r"segments must be int64 .* found torch\.float32 \[2\]"),
    "a tensor of int32": (torch.tensor([0, 8], dtype=torch.int32), r"found torch\.int32 \[2\]"),
    "a matrix": (torch.tensor([[0, 8]]), r"found torch\.int64 \[1, 2\]"),
}

BAD_MATRICES = {
    "a list": ([1.0, 1.0, 1.0], TypeError, "must be a torch.Tensor; found list"),
    "float32": (lambda *shape: torch.ones(shape), TypeError, r"must be float64; found torch\.float32"),
    "one too many": (lambda *shape: doubles(*(n + 1 for n in shape)), ValueError, r"grads \[3, 8\]; found \[4"),
    "a dimension too many": (lambda *shape: doubles(1, *shape), ValueError, r"found \[1, 3"),
    "a scalar": (lambda *shape: doubles(), ValueError, r"found \[\]"),
    "elsewhere": (lambda *shape: doubles(*shape).to("meta"), ValueError, "must be on cpu, as grads; found meta"),
}

ORDERED = {
    "pcgrad_coefficients": lambda order: fastpcgrad.pcgrad_coefficients(J.double() @ J.double().mT, order),
    "pcgrad": lambda order: fastpcgrad.pcgrad(J, order=order),
    "pcgrad_": lambda order: fastpcgrad.pcgrad_(J, order=order),
}
BAD_ORDERS = {
    "a list": ([[0, 1, 2]] * 3, TypeError, r"order must be a torch\.Tensor; found list"),
    "int32": (places().int(), ValueError, r"order must be int64 \[3, 3\]; found torch\.int32 \[3, 3\]"),
    "one row": (places()[0], ValueError, r"found torch\.int64 \[3\]"),
    "too many tasks": (places(tasks=4), ValueError, r"order must be int64 \[3, 3\]; found torch\.int64 \[4, 4\]"),
    "for segments": (places(2), ValueError, r"found torch\.int64 \[2, 3, 3\]"),
    "a task twice": (
        torch.tensor([[0, 1, 2], [0, 0, 2], [2, 1, 0]]),
        ValueError,
        r"permutation of 0\.\.2; found \[0, 0, 2\]",
    ),
    "an index out of range": (places() + 1, ValueError, r"permutation of 0\.\.2; found \[1, 2, 3\]"),
    "a negative index": (places() - 1, ValueError, r"permutation of 0\.\.2; found \[-1, 0, 1\]"),
    "elsewhere": (places().to("meta"), ValueError, "order must be on cpu, as the gradients; found meta"),
}

BAD_OUTS = {
    "a list": ([0.0] * 8, TypeError, r"out must be a torch\.Tensor; found list"),
    "another dtype": (
        torch.zeros(8).double(),
        ValueError,
        r"out must be torch\.float32 on cpu.*found torch\.float64 on cpu",
    ),
    "elsewhere": (torch.zeros(8, device="meta"), ValueError, r"found torch\.float32 on meta"),
    "too long": (torch.zeros(9), ValueError, r"out must be contiguous \[8\]; found \[9\]"),
    "a matrix": (torch.zeros(1, 8), ValueError, r"found \[1, 8\]"),
    "strided": (torch.zeros(16)[::2], ValueError, r"found \[8\] with strides \(2,\)"),
    "one number": (torch.zeros(1).expand(8), ValueError, r"found \[8\] with strides \(0,\)"),
    "with grad": (torch.zeros(8).requires_grad_(), RuntimeError, r"out= has no derivative.*no_grad"),
}


@pytest.fixture(autouse=True)
def rows_stay_as_they_were():
    before = J.clone()
    yield
    after = J.clone()
    J.copy_(before)
    assert torch.equal(after, before), "a refused call wrote to its rows"


@pytest.mark.parametrize("op", ON_ROWS)
@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_of_a_wrong_kind(op, name):
    grads, error, message = BAD_ROWS[name]
    with pytest.raises(error, match=message):
        ON_ROWS[op](grads)


@pytest.mark.parametrize("op", SEGMENTED)
@pytest.mark.parametrize("name", BAD_SEGMENTS)
def test_segments_that_do_not_cut_the_columns(op, name):
    segments, message = BAD_SEGMENTS[name]
    with pytest.raises(ValueError, match=message):
        SEGMENTED[op](segments)


@pytest.mark.parametrize("segments", [[0, 2.5, 8], ["a", "b"], 5], ids=["a fraction", "names", "a number"])
def test_segments_that_are_no_integers(segments):
    with pytest.raises((TypeError, ValueError), match="segments must be"):
        fastpcgrad.gram(J, segments)


@pytest.mark.parametrize("name", BAD_MATRICES)
def test_weights_and_coefficients_of_a_wrong_kind(name):
    make, error, message = BAD_MATRICES[name]
    bad = lambda *shape: make(*shape) if callable(make) else make  # noqa: E731
    with pytest.raises(error, match=f"weights .*{message}"):
        fastpcgrad.combine(J, bad(3))
    with pytest.raises(error, match=f"coefficients .*{message}"):
        fastpcgrad.mix_(J, bad(3, 3))


def test_weights_and_coefficients_need_one_for_each_segment():
    with pytest.raises(ValueError, match=r"weights must be \[2, 3\] for grads \[3, 8\]; found \[3\]"):
        fastpcgrad.combine(J, doubles(3), segments=[0, 4, 8])
    with pytest.raises(ValueError, match=r"coefficients must be \[2, 3, 3\] for grads \[3, 8\]; found \[1, 3, 3\]"):
        fastpcgrad.mix_(J, doubles(1, 3, 3), segments=[0, 4, 8])


@pytest.mark.parametrize("op", ORDERED)
@pytest.mark.parametrize("name", BAD_ORDERS)
def test_an_order_that_is_none(op, name):
    order, error, message = BAD_ORDERS[name]
    with pytest.raises(error, match=message):
        ORDERED[op](order)


def test_an_order_for_another_number_of_segments():
    with pytest.raises(ValueError, match=r"int64 \[3, 3\] or \[2, 3, 3\]; found torch\.int64 \[4, 3, 3\]"):
        fastpcgrad.pcgrad(J, order=places(4), segments=[0, 4, 8])


@pytest.mark.parametrize("name", BAD_OUTS)
def test_an_out_of_a_wrong_kind(name):
    out, error, message = BAD_OUTS[name]
    with pytest.raises(error, match=message):
        fastpcgrad.combine(J, doubles(3), out)
    if isinstance(out, torch.Tensor) and out.device.type == "cpu":
        assert not out.any(), "a refused call wrote to out"


@pytest.mark.parametrize("start", [1, 7, 9, 15])
def test_an_out_that_overlaps_the_rows_but_is_none_of_them(start):
    # Writing it would change columns of the rows that are still to be read.
    rows = J.clone()
    with pytest.raises(ValueError, match="out"):
        fastpcgrad.combine(rows, doubles(3), rows.view(-1)[start : start + 8])
    assert torch.equal(rows, J)


@pytest.mark.parametrize("stride", range(4, 13))
def test_an_out_between_the_rows_is_legal_where_it_touches_none(stride):
    """Every place of an out around three rows of four: before them, in the gaps, across, behind."""
    before, width, tasks = 6, 4, 3
    storage = torch.randn(before + tasks * stride + 6)
    firsts = [before + t * stride for t in range(tasks)]
    elements = {first + n for first in firsts for n in range(width)}
    legal = 0
    for start in range(len(storage) - width + 1):
        memory = storage.clone()
        rows, out = memory.as_strided((tasks, width), (stride, 1), before), memory[start : start + width]
        expected = memory.clone()
        if start in firsts or elements.isdisjoint(range(start, start + width)):
            expected[start : start + width] = rows.double().sum(dim=0)
            torch.testing.assert_close(fastpcgrad.combine(rows, doubles(tasks), out), expected[start : start + width])
            torch.testing.assert_close(memory, expected)
            legal += 1
        else:
            with pytest.raises(ValueError, match="overlaps rows"):
                fastpcgrad.combine(rows, doubles(tasks), out)
            assert torch.equal(memory, expected)
    assert legal >= tasks + 2


@pytest.mark.parametrize("which", ["grads", "weights"])
def test_an_out_beside_a_tensor_that_requires_grad(which):
    grads, weights, out = J.clone().requires_grad_(which == "grads"), doubles(3), torch.zeros(8)
    weights.requires_grad_(which == "weights")
    with pytest.raises(RuntimeError, match=r"out= has no derivative.*no_grad"):
        fastpcgrad.combine(grads, weights, out)
    assert not out.any()
    with torch.no_grad():
        fastpcgrad.combine(grads, weights, out)
    torch.testing.assert_close(out, J.sum(dim=0))


@pytest.mark.parametrize("op", ["mix_", "pcgrad_"])
def test_rows_that_would_be_overwritten(op):
    grads = J.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"grads requires grad and would be overwritten.*no_grad"):
        ON_ROWS[op](grads)
    assert torch.equal(grads, J)
    with torch.no_grad():
        ON_ROWS[op](grads)

    overlapping = torch.arange(16.0).as_strided((3, 8), (4, 1))
    before = overlapping.clone()
    with pytest.raises(ValueError, match=r"overlapping rows .* strides \(4, 1\)"):
        ON_ROWS[op](overlapping)
    with pytest.raises(ValueError, match=r"overlapping rows .* strides \(0, 1\)"):
        ON_ROWS[op](overlapping[:1].expand(3, -1))
    assert torch.equal(overlapping, before)


@pytest.mark.parametrize(
    ("gram", "error", "message"),
    [
        ([[1.0]], TypeError, r"gram must be a torch\.Tensor; found list"),
        (torch.eye(3), TypeError, r"gram must be float64; found torch\.float32"),
        (doubles(3), ValueError, r"gram must be \[T, T\] or \[S, T, T\].*found \[3\]"),
        (doubles(3, 2), ValueError, r"found \[3, 2\]"),
        (doubles(0, 0), ValueError, r"T >= 1; found \[0, 0\]"),
        (doubles(1, 1, 3, 3), ValueError, r"found \[1, 1, 3, 3\]"),
        (doubles(3, 3).to("meta"), ValueError, "order must be on meta"),
    ],
)
def test_a_gram_matrix_of_a_wrong_kind(gram, error, message):
    with pytest.raises(error, match=message):
        fastpcgrad.pcgrad_coefficients(gram, places())


def test_an_empty_batch_of_gram_matrices_has_no_coefficients(backend):
    found = fastpcgrad.pcgrad_coefficients(doubles(0, 3, 3), places())
    assert found.shape == (0, 3, 3) and found.dtype == torch.float64


@pytest.mark.parametrize("name", ["eps", "min_squared_norm"])
@pytest.mark.parametrize("value", [-1e-8, -torch.inf, torch.nan])
def test_guards_below_zero(name, value):
    with pytest.raises(ValueError, match=f"must not be negative; found .*{name}={value}"):
        fastpcgrad.pcgrad_coefficients(doubles(3, 3), places(), **{name: value})


@pytest.mark.parametrize("op", [fastpcgrad.pcgrad, fastpcgrad.pcgrad_])
def test_an_unknown_variant(op):
    with pytest.raises(ValueError, match=r"variant must be one of paper, .*; found 'PCGrad'"):
        op(J, variant="PCGrad")


@pytest.mark.parametrize("reduction", ["Mean", "", 1, True])
def test_an_unknown_reduction_is_an_error_and_not_the_end_of_the_process(reduction):
    with pytest.raises(ValueError, match=rf"'sum', 'mean', 'none' or None; found {reduction!r}"):
        fastpcgrad.pcgrad(J, reduction=reduction)


@pytest.mark.parametrize("op", [fastpcgrad.pcgrad, fastpcgrad.pcgrad_])
@pytest.mark.parametrize("generator", [0, "seed", random])
def test_what_is_no_generator(op, generator):
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, a random\.Random, .*, or None; found"):
        op(J, generator=generator)


def test_refused_calls_draw_nothing():
    before = random.getstate(), torch.random.get_rng_state()
    for options in ({"reduction": "x"}, {"segments": [0, 9]}, {"order": places() + 1}):
        for variant in ("paper", "libmtl"):
            with pytest.raises(ValueError):
                fastpcgrad.pcgrad(J, variant=variant, **options)
    assert random.getstate() == before[0] and torch.equal(torch.random.get_rng_state(), before[1])


def test_a_forced_backend_that_cannot_run_raises_and_says_why(monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"FASTPCGRAD_BACKEND=cuda cannot run tensors on device type 'cpu': \w+"):
        fastpcgrad.gram(J)


def test_a_backend_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "rocm")
    with pytest.raises(ValueError, match="must be one of eager, cpu, cuda, triton; found 'rocm'"):
        fastpcgrad.gram(J)


def test_an_empty_variable_forces_nothing(monkeypatch):
    monkeypatch.setenv("FASTPCGRAD_BACKEND", "")
    assert fastpcgrad.gram(J).shape == (3, 3)


def loss(value=1.0, **options):
    return torch.tensor(value, requires_grad=True, **options)


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([], ValueError, "losses must hold at least one task loss; found none"),
        (torch.ones(0), ValueError, "at least one task loss; found none"),
        (loss(), ValueError, r"losses must be scalars, or one tensor \[T\]; found a tensor \[\]"),
        (torch.ones(2, 2), ValueError, r"found a tensor \[2, 2\]"),
        ([loss(), 1.0], TypeError, r"losses\[1\] must be a torch\.Tensor; found float"),
        ([loss(), None], TypeError, r"losses\[1\] must be a torch\.Tensor; found NoneType"),
        ([torch.tensor(1)], TypeError, r"losses\[0\] must be real floating point; found torch\.int64"),
        ([loss(1j)], TypeError, r"losses\[0\] must be real floating point; found torch\.complex64"),
        ([loss(), loss([1.0, 2.0])], ValueError, r"losses\[1\] must be a scalar; found shape \[2\]"),
        ([loss([])], ValueError, r"losses\[0\] must be a scalar; found shape \[0\]"),
        ([loss(), torch.tensor(1.0)], ValueError, r"losses\[1\] has no grad"),
        ([loss(), loss(device="meta")], ValueError, "losses must be on one device; found cpu, meta"),
    ],
)
def test_losses_of_a_wrong_kind(losses, error, message):
    with pytest.raises(error, match=message):
        check_losses(losses)


@pytest.mark.parametrize("losses", [None, 3])
def test_losses_that_are_no_sequence(losses):
    with pytest.raises(TypeError, match="losses"):
        check_losses(losses)


def test_losses_may_be_a_list_a_generator_or_one_tensor():
    made = [loss(1.0), loss([2.0]), loss(3.0, dtype=torch.float64)]
    assert check_losses(made) == made == check_losses(x for x in made)
    assert check_losses(made) is not made
    stacked = torch.stack([loss(1.0), loss(2.0)])
    assert [x.item() for x in check_losses(stacked)] == [1.0, 2.0]


def test_losses_that_are_not_finite_are_let_through():
    assert len(check_losses([loss(torch.nan), loss(torch.inf)])) == 2
