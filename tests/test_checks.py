"""No call reads memory after it was written, or beyond its tensors, whatever way it comes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastpcgrad
from fastpcgrad import _checks, reference

OPS = torch.ops.fastpcgrad
GUARDS = (False, 0.0, 0.0)
WIDTH = 4000
"""Columns: more than a kernel reads before it writes."""


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def places(*batch, tasks=3):
    return torch.arange(tasks).expand(*batch, tasks, tasks).clone()


def touched(tensor):
    """The address of each byte."""
    grid = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        grid = grid[..., None] + torch.arange(size) * stride
    first = tensor.data_ptr() + grid.flatten() * tensor.element_size()
    return {int(a) + b for a in first for b in range(tensor.element_size())}


BUFFER = torch.zeros(64, dtype=torch.float32)


@st.composite
def views(draw, dimensions, dtype):
    """Any view of one buffer, its rows contiguous or not."""
    shape = draw(st.lists(st.integers(0, 4), min_size=dimensions, max_size=dimensions))
    strides = draw(st.lists(st.integers(0, 5), min_size=dimensions, max_size=dimensions))
    whole = BUFFER.view(dtype)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    offset = draw(st.integers(0, max(0, min(24, len(whole) - last - 1))))
    return whole.as_strided(shape, strides, offset)


@given(views(1, torch.float32), views(2, torch.float64))
def test_what_is_refused_is_what_shares_a_byte(written, read):
    written = written if written.is_contiguous() else written.clone()
    shares = not touched(written).isdisjoint(touched(read))
    try:
        _checks.check_apart("out", written, None, read)
        refused = False
    except ValueError as error:
        refused = True
        assert "out shares memory" in str(error) and str(list(read.shape)) in str(error)
    assert refused == shares


@given(st.data())
def test_an_out_that_is_refused_is_one_that_shares_a_byte_with_a_row_that_it_is_not(data):
    tasks, width = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    stride, start = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 20))
    grads = BUFFER.as_strided((tasks, width), (stride, 1), start)
    out = BUFFER.as_strided((width,), (1,), data.draw(st.integers(0, 40)))
    others = [row for row in grads if row.data_ptr() != out.data_ptr()]
    shares = any(not touched(out).isdisjoint(touched(row)) for row in others)
    try:
        _checks.check_out(out, grads)
        refused = False
    except ValueError as error:
        refused = "out overlaps rows of grads" in str(error)
        assert refused
    assert refused == shares


OVERLAPPING = (
    *itertools.product((2, 3), (1, 8, WIDTH - 1), (0, 1, 8, 16, WIDTH - 1)),
    *itertools.product((1,), (0, 1, WIDTH), (0, 5, 24, WIDTH - 1, WIDTH)),
    *itertools.product((2,), (WIDTH, WIDTH + 3), (0, 3, WIDTH - 1, WIDTH, WIDTH + 3, 2 * WIDTH, 2 * WIDTH + 3)),
    *itertools.product((3,), (0,), (0, 1, WIDTH)),
)
"""Tasks, from one row to the next, where ``out`` starts."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_combination_into_overlapping_memory_is_refused_or_right(backend, dtype):
    for case in OVERLAPPING:
        check_combination(dtype, *case)


def check_combination(dtype, tasks, stride, start):
    memory = torch.randn(4 * WIDTH).to(dtype)
    grads, out = memory.as_strided((tasks, WIDTH), (stride, 1)), memory[start : start + WIDTH]
    weights, before = torch.arange(1.0, tasks + 1, dtype=torch.float64), memory.clone()
    expected = reference.combine(grads, weights)
    case = f"{tasks} tasks, stride {stride}, out from {start} on"
    try:
        fastpcgrad.combine(grads, weights, out)
    except ValueError:
        assert torch.equal(memory, before), case
        return
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype]
    assert (out.double() - expected).norm() <= tolerance * weights.sum() * before.double().norm(), case
    behind = before.clone()
    behind[start : start + WIDTH] = memory[start : start + WIDTH]
    assert torch.equal(memory, behind), case


def test_an_out_may_be_a_row_or_lie_between_rows(backend):
    memory = doubles(5, WIDTH)
    grads, weights = memory[::2], doubles(3)
    for out in (*grads, memory[1], memory[3]):
        expected = reference.combine(grads, weights)
        torch.testing.assert_close(fastpcgrad.combine(grads, weights, out), expected)


# Small tensors that lie where something is written.

ROWS = 3


def shared(dtype, *shape, offset=0, stride=None):
    """Rows [3, WIDTH] of float64 and a small tensor of ``dtype`` inside them."""
    grads = doubles(ROWS, WIDTH)
    flat = grads.view(-1).view(dtype)
    dense = torch.empty(shape, device="meta").stride()
    small = flat.as_strided(shape, dense if stride is None else stride, offset)
    return grads, small


def in_rows(small, values):
    small.copy_(values)
    return small


WRITTEN = {
    "weights in out, a row": lambda: combined(0),
    "weights in the end of out": lambda: combined(2 * WIDTH - 3, row=1),
    "weights across out, strided": lambda: combined(WIDTH - 100, row=1, stride=(60,)),
    "weights of segments in out": lambda: combined(40, segments=[0, 1, WIDTH], stride=(1, 2)),
    "coefficients in the rows": lambda: mixed(17),
    "coefficients of segments in the rows": lambda: mixed(2 * WIDTH, segments=[0, 50, WIDTH]),
    "coefficients in the rows, transposed": lambda: mixed(WIDTH - 4, stride=(1, 3)),
    "an order in the rows": lambda: projected(100),
    "an order in the last row": lambda: projected(3 * WIDTH - 9),
    "orders of segments in the rows": lambda: projected(100, segments=[0, 7, WIDTH]),
}


def combined(offset, row=0, segments=None, stride=None):
    shape = (ROWS,) if segments is None else (len(segments) - 1, ROWS)
    grads, weights = shared(torch.float64, *shape, offset=offset, stride=stride)
    return grads, lambda: fastpcgrad.combine(grads, weights, grads[row], segments=segments)


def mixed(offset, segments=None, stride=None):
    shape = (ROWS, ROWS) if segments is None else (len(segments) - 1, ROWS, ROWS)
    grads, coefficients = shared(torch.float64, *shape, offset=offset, stride=stride)
    return grads, lambda: fastpcgrad.mix_(grads, coefficients, segments=segments)


def projected(offset, segments=None):
    batch = () if segments is None else (len(segments) - 1,)
    grads, order = shared(torch.int64, *batch, ROWS, ROWS, offset=offset)
    order.copy_(places(*batch))
    return grads, lambda: fastpcgrad.pcgrad_(grads, order=order, segments=segments)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_small_tensor_that_would_be_overwritten_is_refused(backend, name):
    grads, call = WRITTEN[name]()
    before = grads.clone()
    with pytest.raises(ValueError, match=r"(out|grads) shares memory with a tensor \[.*\] of torch\..* clone of it"):
        call()
    assert torch.equal(grads, before)


def test_a_small_tensor_beside_what_is_written_is_let_through(backend):
    memory = doubles(4 * WIDTH)
    grads = memory.as_strided((ROWS, WIDTH), (WIDTH + 9, 1), 9)
    gap = memory[WIDTH + 9 : WIDTH + 18].view(ROWS, ROWS)  # between two rows
    expected = reference.mix(grads, gap)
    torch.testing.assert_close(fastpcgrad.mix_(grads, gap), expected)
    out, weights = memory[:WIDTH], memory[WIDTH : WIDTH + ROWS]
    grads = doubles(ROWS, WIDTH)
    torch.testing.assert_close(fastpcgrad.combine(grads, weights, out), reference.combine(grads, weights))


def test_a_small_tensor_may_lie_in_rows_that_are_only_read(backend):
    grads = doubles(ROWS, WIDTH)
    weights = grads[1, 5 : 5 + ROWS]
    torch.testing.assert_close(fastpcgrad.combine(grads, weights), reference.combine(grads, weights))
    torch.testing.assert_close(
        fastpcgrad.combine(grads, weights, torch.empty(WIDTH).double()), reference.combine(grads, weights)
    )


@pytest.mark.parametrize("stride", [0, 1, 7, 100])
def test_a_single_row_has_no_other_to_overlap_with(backend, stride):
    memory = torch.randn(300)
    row = memory.as_strided((1, 100), (stride, 1), 3)
    expected = 2 * row.clone()
    assert torch.equal(fastpcgrad.mix_(row, torch.full((1, 1), 2.0, dtype=torch.float64)), expected)
    assert torch.equal(fastpcgrad.pcgrad_(row), expected)


# Calls that pass functional by.


def rows(dtype=torch.float32):
    return torch.randn(3, 40).to(dtype)


def segments(*offsets):
    return torch.tensor(offsets)


GOOD = {
    "gram": lambda: {"grads": rows(), "segments": segments(0, 7, 40)},
    "pcgrad_coefficients": lambda: {"gram": torch.eye(3).double(), "order": places(), **guards()},
    "combine": lambda: {"grads": rows(), "weights": doubles(2, 3), "segments": segments(0, 7, 40)},
    "combine_out": lambda: {
        "grads": rows(),
        "weights": doubles(2, 3),
        "segments": segments(0, 7, 40),
        "out": torch.zeros(40),
    },
    "mix_": lambda: {"grads": rows(), "coefficients": doubles(2, 3, 3), "segments": segments(0, 7, 40)},
    "pcgrad": lambda: {"grads": rows(), "order": places(), **guards(), "scale": 1.0, "segments": segments(0, 7, 40)},
    "pcgrad_out": lambda: {
        "grads": rows(),
        "order": places(),
        **guards(),
        "scale": 1.0,
        "segments": segments(0, 7, 40),
        "out": torch.zeros(40),
    },
    "pcgrad_": lambda: {"grads": rows(), "order": places(2), **guards(), "segments": segments(0, 7, 40)},
}
BAD = {
    "grads": [
        torch.randn(40),
        torch.randn(0, 40),
        torch.randn(40, 3).mT,
        torch.randn(3, 40).int(),
        torch.randn(3, 80)[:, ::2],
    ],
    "gram": [torch.eye(3), doubles(3, 4), doubles(3), doubles(0, 0)],
    "segments": [
        segments(0, 7, 41),
        segments(0, 7, 1 << 40),
        segments(-1, 7, 40),
        segments(0, 20, 7, 40),
        segments(0, 7, 39),
        segments(1, 7, 40),
        segments(0, 7, 40).int(),
        segments(0),
        segments(0, 7, 40)[None],
        segments(0, 7, 40).to("meta"),
    ],
    "weights": [doubles(2, 4), doubles(3), doubles(3, 3), torch.randn(2, 3), doubles(2, 3).to("meta")],
    "coefficients": [doubles(2, 3, 4), doubles(3, 3), doubles(1, 3, 3), torch.randn(2, 3, 3)],
    "order": [
        places() + 1,
        places() - 1,
        torch.zeros(3, 3, dtype=torch.int64),
        places().int(),
        places(tasks=2),
        places(3),
        torch.stack([places(), places() - 1]),
        places()[0],
    ],
    "eps": [-1.0, float("nan")],
    "min_squared_norm": [-1.0],
    "out": [
        torch.zeros(39),
        torch.zeros(41),
        torch.zeros(80)[::2],
        torch.zeros(40).double(),
        torch.zeros(1).expand(40),
        torch.zeros(1, 40),
    ],
}


def guards():
    return dict(zip(("self_projection", "eps", "min_squared_norm"), GUARDS, strict=True))


@pytest.mark.parametrize("op", GOOD)
def test_the_op_itself_refuses_a_bad_argument(backend, op):
    arguments = GOOD[op]()
    getattr(OPS, op)(**arguments)
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    for name in arguments.keys() & BAD.keys():
        for bad in BAD[name]:
            # What torch itself refuses (tensors on several devices) is a NotImplementedError or a RuntimeError.
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                getattr(OPS, op)(**(arguments | {name: bad}))
                pytest.fail(f"{name} = {bad} was taken")
            assert all(torch.equal(arguments[key], value) for key, value in before.items()), (name, bad)


@pytest.mark.parametrize("op", ["mix_", "pcgrad_"])
@pytest.mark.parametrize("stride", [0, 20, 39])
def test_the_op_itself_refuses_overlapping_rows_that_it_would_overwrite(backend, op, stride):
    grads = torch.randn(118).as_strided((3, 40), (stride, 1))
    before = grads.clone()
    with pytest.raises(ValueError, match=rf"overlapping rows .* strides \({stride}, 1\)"):
        getattr(OPS, op)(**(GOOD[op]() | {"grads": grads}))
    assert torch.equal(grads, before)


def test_the_op_itself_refuses_memory_that_is_read_after_it_is_written(backend):
    grads, cut = doubles(3, 40), segments(0, 7, 40)
    inside = grads.view(-1).view(torch.int64)
    calls = {
        "combine_out": lambda: OPS.combine_out(grads, doubles(2, 3), cut, grads.view(-1)[1:41]),
        "weights": lambda: OPS.combine_out(grads, grads.view(-1)[1:7].view(2, 3), cut, grads[0]),
        "segments": lambda: OPS.combine_out(grads, doubles(2, 3), written(inside[5:8], cut), grads[0]),
        "mix_": lambda: OPS.mix_(grads, doubles(2, 3, 3), written(inside[50:53], cut)),
        "pcgrad_": lambda: OPS.pcgrad_(grads, places(), *GUARDS, written(inside[50:53], cut)),
        "pcgrad_out": lambda: OPS.pcgrad_out(grads, places(), *GUARDS, 1.0, written(inside[5:8], cut), grads[0]),
        "order": lambda: OPS.pcgrad_out(grads, written(inside[3:12].view(3, 3), places()), *GUARDS, 1.0, cut, grads[0]),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"shares memory|overlaps"):
            call()
        assert name and grads.isfinite().all()


def written(view, values):
    return view.copy_(values)


COMPILED = {
    "an order that is none": (
        lambda: (rows(), torch.zeros(3, 3, dtype=torch.int64)),
        lambda j, order: fastpcgrad.pcgrad(j, order=order),
        "permutation",
    ),
    "an order of coefficients": (
        lambda: (rows().double(), places() - 1),
        lambda j, order: fastpcgrad.pcgrad_coefficients(j @ j.mT, order),
        "permutation",
    ),
    "an order that is none, in place": (
        lambda: (rows(), places() + 1),
        lambda j, order: fastpcgrad.pcgrad_(j * 1, order=order),
        "permutation",
    ),
    "segments past the end": (
        lambda: (rows(), segments(0, 3, 200_000)),
        lambda j, cut: fastpcgrad.gram(j, cut),
        "offsets from 0 to N=40; found",
    ),
    "segments that decrease": (
        lambda: (rows(), segments(0, 30, 20, 40)),
        lambda j, cut: fastpcgrad.combine(j, torch.ones(3, 3, dtype=torch.float64), segments=cut),
        "non-decreasing",
    ),
    "negative segments": (
        lambda: (rows(), segments(0, -3, 40)),
        lambda j, cut: fastpcgrad.mix_(j * 1, torch.ones(2, 3, 3, dtype=torch.float64), segments=cut),
        "non-decreasing",
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_refuses_what_eager_code_refuses(backend, name):
    torch.compiler.reset()
    make, function, message = COMPILED[name]
    arguments = make()
    with pytest.raises(ValueError, match=message):
        function(*arguments)
    with pytest.raises(ValueError, match=message):
        torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", [0, 1, 39, 40, 80, 81])
@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own, from importing inductor
def test_compiled_code_combines_into_overlapping_memory_rightly_or_not_at_all(compiler, start):
    # not monkeypatch: what it puts back, the configuration counts as deleted
    from torch._inductor import config

    torch.compiler.reset()
    memory, w = torch.randn(160), doubles(3)
    before = memory.clone()
    expected = reference.combine(memory[:120].view(3, 40), w)

    def combine(memory, w):
        return fastpcgrad.combine(memory[:120].view(3, 40), w, memory[start : start + 40]) * 1

    with config.patch(compile_threads=1):
        compiled = torch.compile(combine, backend=compiler, fullgraph=True)
        try:
            found = compiled(memory, w)
        except ValueError as error:
            assert start % 40 and "out overlaps rows of grads" in str(error)
            assert torch.equal(memory, before)
            return
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory[start : start + 40].double(), expected, rtol=1e-5, atol=1e-5)
