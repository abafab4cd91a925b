"""The rows of a round: taken over as they are, copied only where they must be."""

import weakref

import pytest
import torch

from fastpcgrad.rows.task_gradients import TaskGradients
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


def values_of(grads, row):
    return grads.columns().whole.tensors[row]


def test_rows_are_taken_over_without_a_copy(parameters):
    grads = TaskGradients(parameters)
    values = {task: numbered(parameters, task) for task in (3, 0, 2)}
    for task, row in values.items():
        grads.put(task, list(row))
    assert grads.tasks == [0, 2, 3]
    for row, task in enumerate(grads.tasks):
        assert all(a is b for a, b in zip(values_of(grads, row), values[task], strict=True))


def test_blocks_say_where_gradients_lie_and_how_long_they_are(parameters):
    grads = TaskGradients(parameters)
    row = [None if index % 2 else value for index, value in enumerate(numbered(parameters))]
    grads.put(4, row)
    blocks = grads.columns().whole
    assert list(blocks.widths) == [p.numel() for p in parameters]
    assert blocks.pointers == [[0 if g is None else g.data_ptr() for g in row]]
    assert (blocks.dtype, blocks.device) == (torch.float32, torch.device("cpu"))
    assert grads.row_nbytes == 4 * sum(p.numel() for p in parameters)


def test_gradients_with_other_strides_than_their_parameters_are_copied():
    kinds = [Kind((4, 3, 2, 2), "channels_last"), Kind((5, 3), "transposed"), Kind((3, 5), "gappy"), Kind((6,))]
    parameters = [kind.parameter(torch.float32) for kind in kinds]
    strides = [parameters[0].stride(), parameters[1].stride(), (5, 1), (1,)]
    given = [torch.randn(4, 3, 2, 2), torch.randn(5, 3), torch.randn(3, 10)[:, ::2], torch.ones(1).expand(6)]
    grads = TaskGradients(parameters)
    grads.put(0, list(given))
    for found, value, stride in zip(values_of(grads, 0), given, strides, strict=True):
        assert found.stride() == stride and torch.equal(found, value)


@pytest.mark.parametrize(
    "odd",
    [torch.ones(1).expand(6), torch.arange(9.0)[:6], torch.arange(6.0).double()],
    ids=["expanded", "piece", "dtype"],
)
def test_one_gradient_that_is_copied_leaves_the_others_as_they_are(odd):
    grads = TaskGradients([torch.zeros(6) for _ in range(4)])
    row = [torch.randn(6), None, odd, torch.randn(6)]
    grads.put(0, list(row))
    first, absent, copy, last = values_of(grads, 0)
    assert first is row[0] and absent is None and last is row[3]
    assert copy.stride() == (1,) and copy.untyped_storage().nbytes() == 24
    assert torch.equal(copy, odd.to_dense().float())


def test_a_gradient_of_another_dtype_of_the_same_size_is_converted():
    grads = TaskGradients([torch.zeros(6, dtype=torch.float16)])
    given = torch.arange(6.0).bfloat16()
    grads.put(0, [given])
    (found,) = values_of(grads, 0)
    assert found.dtype == torch.float16 and torch.equal(found, given.half())


def test_a_gradient_that_is_a_piece_of_a_larger_tensor_is_copied():
    """What lies beside it is somebody else's, and stays alive as long as the piece."""
    whole = torch.arange(6.0)
    grads = TaskGradients([torch.zeros(3)])
    grads.put(0, [whole[:3]])
    (found,) = values_of(grads, 0)
    assert torch.equal(found, whole[:3]) and found.untyped_storage().nbytes() == 12


def test_parameters_that_share_a_gradient_get_one_each():
    """As autograd has it for a.view(-1) + b.view(-1)."""
    shared = torch.arange(6.0)
    grads = TaskGradients([torch.zeros(6), torch.zeros(2, 3), torch.zeros(0), torch.zeros(0)])
    grads.put(0, [shared, shared.view(2, 3), torch.zeros(0), torch.zeros(0)])
    first, second, *_ = values_of(grads, 0)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second.view(-1))
    assert grads.columns().whole.pointers[0][1] == second.data_ptr()


def test_a_buffer_that_is_used_again_is_refused():
    buffer = torch.ones(3)
    grads = TaskGradients([torch.zeros(3)])
    grads.put(0, [buffer])
    grads.put(1, [buffer.view(3)])
    with pytest.raises(RuntimeError, match="task 1's gradient lies in the memory of another task's"):
        grads.columns()


def test_empty_parameters_share_no_memory():
    grads = TaskGradients([torch.zeros(0), torch.zeros(2)])
    for task in range(3):
        grads.put(task, [torch.zeros(0), torch.ones(2)])
    assert [row[0] for row in grads.columns().whole.pointers] == [0, 0, 0]


def test_a_row_can_be_taken_out_and_put_back():
    grads = TaskGradients([torch.zeros(3)])
    assert grads.take(5) is None
    grads.put(5, [torch.ones(3)])
    row = grads.take(5)
    assert grads.tasks == [] and row[0].tolist() == [1, 1, 1]
    grads.put(5, row)
    assert grads.tasks == [5]


def test_rows_of_the_last_round_are_freed_one_by_one_as_new_ones_begin():
    grads = TaskGradients([torch.zeros(3)])
    alive = []
    for task in range(3):
        grads.take(task)
        gradient = torch.zeros(3)
        alive.append(weakref.ref(gradient))
        grads.put(task, [gradient])
    del gradient
    grads.clear()
    assert grads.tasks == []
    for task in range(3):
        assert [reference() is not None for reference in alive] == [t >= task for t in range(3)]
        assert grads.take(task) is None
    assert not any(reference() for reference in alive)


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_rows_of_another_dtype_than_the_parameters(parameters, dtype):
    grads = TaskGradients(parameters, dtype)
    values = numbered(parameters)
    grads.put(0, list(values))
    assert all(torch.equal(f, g.to(dtype)) for f, g in zip(values_of(grads, 0), values, strict=True))
    assert grads.row_nbytes == dtype.itemsize * sum(p.numel() for p in parameters)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_gradients_of_other_layouts_and_with_a_graph_are_stored_plainly():
    sparse = torch.diag(torch.ones(4))[:, :2].to_sparse_csr()
    grown = torch.ones(3, requires_grad=True) * 2
    grads = TaskGradients([torch.zeros(4, 2), torch.zeros(3)])
    grads.put(0, [sparse, grown])
    dense, plain = values_of(grads, 0)
    assert torch.equal(dense, torch.eye(4)[:, :2]) and dense.layout == torch.strided
    assert plain.tolist() == [2.0] * 3 and not plain.requires_grad


@pytest.mark.parametrize(
    ("parameters", "dtype", "error", "words"),
    [
        ([torch.zeros(1), torch.zeros(1, device="meta")], None, ValueError, ["no memory", "cpu", "meta"]),
        ([torch.zeros(1, dtype=torch.complex64)], None, TypeError, ["complex64"]),
        ([torch.zeros(1, dtype=torch.int32)], None, TypeError, ["int32"]),
        ([torch.zeros(1)], torch.int8, TypeError, ["int8"]),
        ([torch.zeros(1, dtype=torch.complex64)], torch.float32, TypeError, ["complex64"]),
    ],
)
def test_bad_parameters_are_named(parameters, dtype, error, words):
    with pytest.raises(error) as caught:
        TaskGradients(parameters, dtype)
    assert all(word in str(caught.value) for word in words), caught.value
