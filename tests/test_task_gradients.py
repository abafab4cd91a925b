"""The packed buffer: where parameters lie in it, and what its rows hold."""

import itertools

import pytest
import torch

from fastpcgrad.task_gradients import TaskGradients
from tests.linear_problems import KINDS, Kind

ROW_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def parameters():
    return [kind.parameter(torch.float32) for kind in KINDS]


def numbered(parameters, start=1.0):
    """A gradient for each parameter, with the parameter's strides; no value comes twice."""
    result = []
    for p in parameters:
        values = torch.arange(start, start + p.numel(), dtype=p.dtype).reshape(p.shape)
        result.append(torch.empty_like(p, requires_grad=False).copy_(values))
        start += p.numel()
    return result


def fill(grads, task, values):
    row = grads.open_row(task)
    grads.store_all(row, values)
    return row


def test_every_parameter_has_a_place_of_its_own_and_rows_have_no_gaps(parameters):
    grads = TaskGradients(parameters, 2)
    taken = sorted((place.offset, place.length) for place in grads.places)
    ends = itertools.accumulate((length for _, length in taken), initial=0)
    assert all(offset == end for (offset, _), end in zip(taken, ends, strict=False))
    assert grads.width == sum(p.numel() for p in parameters)
    assert [place.shape for place in grads.places] == [p.shape for p in parameters]


def test_by_offset_lists_the_parameters_in_the_order_of_their_columns(parameters):
    grads = TaskGradients(parameters, 2)
    ends = [grads.places[p].offset + grads.places[p].length for p in grads.by_offset]
    assert sorted(grads.by_offset) == list(range(len(parameters))) and ends == sorted(ends)


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_parameters_of_whole_cache_lines_are_aligned_in_every_row(dtype):
    sizes = [3, 64, 1, 128, 0, 7, 4096]
    grads = TaskGradients([torch.zeros(n, dtype=dtype) for n in sizes], 3)
    for task in range(3):
        row = grads.open_row(task)
        for size, view in zip(sizes, grads.views(row), strict=True):
            assert size % 64 or size == 0 or view.data_ptr() % 64 == 0


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("width", [1, 1000, 1 << 16, (1 << 16) + 3, 1 << 20])
def test_rows_of_large_buffers_do_not_share_cache_sets(width, dtype):
    """Rows a multiple of a page apart would; small buffers are padded to a cache line only."""
    grads = TaskGradients([torch.zeros(width, dtype=dtype)], 8)
    stride = grads.row_stride * dtype.itemsize
    assert stride % 64 == 0 and grads.row_stride >= width
    assert stride < 1.11 * width * dtype.itemsize + 64
    assert stride % 4096 != 0 or stride < 1 << 16
    assert grads.nbytes == 8 * stride


def test_memory_is_taken_with_the_first_row_only():
    grads = TaskGradients([torch.zeros(8)], 1 << 40)  # far more than there is
    assert grads.nbytes == 64 << 40


def test_views_have_the_strides_of_dense_parameters_and_are_contiguous_for_others():
    kinds = [Kind((4, 3, 2, 2), "channels_last"), Kind((5, 3), "transposed"), Kind((3, 5), "gappy"), Kind(())]
    parameters = [kind.parameter(torch.float32) for kind in kinds]
    grads = TaskGradients(parameters, 1)
    views = grads.views(grads.open_row(0))
    assert views[0].stride() == parameters[0].stride() and views[1].stride() == parameters[1].stride()
    assert views[2].is_contiguous() and views[3].shape == ()


def test_rows_are_filled_in_the_order_in_which_tasks_come(parameters):
    grads = TaskGradients(parameters, 4)
    for task in (3, 0, 2):
        fill(grads, task, numbered(parameters, task))
    assert grads.tasks == [3, 0, 2]
    assert [grads.open_row(task) for task in (0, 2, 3)] == [1, 2, 0]
    assert grads.rows.shape == (3, grads.width) and grads.rows.stride() == (grads.row_stride, 1)


def test_what_is_stored_is_what_the_views_and_the_row_hold(parameters):
    grads = TaskGradients(parameters, 2)
    values = numbered(parameters)
    row = fill(grads, 1, values)
    for view, value in zip(grads.views(row), values, strict=True):
        assert torch.equal(view, value)
    assert grads.rows[row].sort().values.tolist() == [float(n) for n in range(1, grads.width + 1)]


def test_a_second_gradient_is_added_and_none_adds_nothing(parameters):
    grads = TaskGradients(parameters, 1)
    values = numbered(parameters)
    fill(grads, 0, values)
    row = fill(grads, 0, [value if index % 2 else None for index, value in enumerate(values)])
    for index, (view, value) in enumerate(zip(grads.views(row), values, strict=True)):
        assert torch.equal(view, value * (1 + index % 2))


def test_closing_zeroes_what_tasks_did_not_touch(parameters):
    grads = TaskGradients(parameters, 1)
    fill(grads, 0, numbered(parameters))
    grads.clear()
    row = fill(grads, 0, [None if index % 2 else value for index, value in enumerate(numbered(parameters))])
    assert list(grads.touched(row)) == [1 - index % 2 for index in range(len(parameters))]
    grads.close()
    assert not any(view.any() for index, view in enumerate(grads.views(row)) if index % 2)
    assert all(view.all() for index, view in enumerate(grads.views(row)) if not index % 2)


def test_close_says_whether_every_task_touched_everything(parameters):
    grads = TaskGradients(parameters, 2)
    fill(grads, 0, numbered(parameters))
    assert grads.close()
    fill(grads, 1, [None, *numbered(parameters)[1:]])
    assert not grads.close()


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_dropping_a_row_keeps_the_others(parameters, dropped):
    grads = TaskGradients(parameters, 3)
    values = {task: numbered(parameters, 100.0 * (1 + task)) for task in (5, 6, 7)}
    for task, gradients in values.items():
        fill(grads, task, [None if index == task - 5 else g for index, g in enumerate(gradients)])
    grads.drop_row(dropped)
    assert sorted(grads.tasks) == sorted({5, 6, 7} - {5 + dropped})
    grads.close()
    for row, task in enumerate(grads.tasks):
        for index, (view, value) in enumerate(zip(grads.views(row), values[task], strict=True)):
            assert torch.equal(view, torch.zeros_like(value) if index == task - 5 else value)


def test_a_row_that_was_dropped_can_be_opened_again_without_leftovers(parameters):
    grads = TaskGradients(parameters, 2)
    for task in (0, 1):
        fill(grads, task, numbered(parameters))
    grads.drop_row(0)
    row = grads.open_row(0)
    assert not any(grads.touched(row))
    grads.close()
    assert not grads.rows[row].any()


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_rows_of_another_dtype_than_the_parameters(parameters, dtype):
    grads = TaskGradients(parameters, 1, dtype)
    values = numbered(parameters)
    row = fill(grads, 0, values)
    assert grads.rows.dtype == dtype and grads.nbytes == grads.row_stride * dtype.itemsize
    assert all(torch.equal(v, g.to(dtype)) for v, g in zip(grads.views(row), values, strict=True))


def test_sparse_gradients_and_gradients_with_a_graph_are_stored_plainly():
    parameters = [torch.zeros(4, 2), torch.zeros(3)]
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 2), (4, 2), check_invariants=True)
    grown = torch.ones(3, requires_grad=True) * 2
    for times in (1, 2):
        grads = TaskGradients(parameters, 1)
        for _ in range(times):
            row = fill(grads, 0, [sparse, grown])
        assert torch.equal(grads.views(row)[0], sparse.to_dense() * times)
        assert grads.views(row)[1].tolist() == [2.0 * times] * 3
        assert not grads.rows.requires_grad


@pytest.mark.parametrize("parameters", [[], [torch.zeros(0)], [torch.zeros(0), torch.zeros(2, 0)]], ids=len)
def test_rows_may_be_empty(parameters):
    grads = TaskGradients(parameters, 2)
    for task in (0, 1):
        fill(grads, task, [torch.zeros_like(p) for p in parameters])
    assert grads.close()
    assert grads.width == 0 and grads.rows.shape == (2, 0)


@pytest.mark.parametrize(
    ("parameters", "dtype", "error", "words"),
    [
        ([torch.zeros(1), torch.zeros(1).double()], None, ValueError, ["float32", "float64"]),
        ([torch.zeros(1), torch.zeros(1, device="meta")], None, ValueError, ["one device", "cpu", "meta"]),
        ([torch.zeros(1, dtype=torch.complex64)], None, TypeError, ["complex64"]),
        ([torch.zeros(1, dtype=torch.int32)], None, TypeError, ["int32"]),
        ([torch.zeros(1)], torch.int8, TypeError, ["int8"]),
        ([torch.zeros(1, dtype=torch.complex64)], torch.float32, TypeError, ["complex64"]),
    ],
)
def test_bad_parameters_are_named(parameters, dtype, error, words):
    with pytest.raises(error) as caught:
        TaskGradients(parameters, 1, dtype)
    assert all(word in str(caught.value) for word in words), caught.value
