"""Rows of another dtype, summed up in another, or on the host: what arrives, one gradient after the other."""

import weakref

import pytest
import torch

from fastpcgrad.rows.moved import MovedGradients
from tests.late_copies import LateCopies
from tests.linear_problems import KINDS

SPARSE = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 2), (2, 2), check_invariants=True)
ELSEWHERE = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.full((1, 2), 5.0), (2, 2), check_invariants=True)


def filled(grads, task, *micro_batches):
    """Each of the lists of gradients, in one stay."""
    grads.open(task)
    for batch in micro_batches:
        for index, value in enumerate(batch):
            if value is not None:
                grads.add(index, value)
    grads.close()


@pytest.fixture(params=[False, True], ids=["device", "host"])
def copies(request):
    return LateCopies() if request.param else None


@pytest.mark.parametrize("accumulate_dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_dense_copies_of_their_dtype(dtype, accumulate_dtype, copies):
    parameters = [kind.parameter(torch.float32) for kind in KINDS]
    values = [torch.randn(p.shape) for p in parameters]
    values[1] = None
    grads = MovedGradients(parameters, dtype, accumulate_dtype, copies)
    for task in (4, 1):
        filled(grads, task, values)
    blocks = grads.columns().whole
    assert grads.tasks == [1, 4] and blocks.dtype == dtype and blocks.device == torch.device("cpu")
    for row, pointers in zip(blocks.tensors, blocks.pointers, strict=True):
        assert row[1] is None and pointers[1] == 0
        for found, value, pointer in zip(row, values, pointers, strict=True):
            if value is not None:
                assert found is not value and found.data_ptr() == pointer
                assert torch.equal(found, value.to(dtype))


def test_gradients_are_added_to_an_open_row():
    grads = MovedGradients([torch.zeros(2), torch.zeros(2, 2)], torch.float64)
    grown = torch.ones(2, requires_grad=True) * 3
    filled(grads, 0, [grown, SPARSE], [grown, SPARSE])
    columns = grads.columns()
    first, second = columns.whole.tensors[0]
    assert first.tolist() == [6.0, 6.0] and not first.requires_grad
    assert second.tolist() == [[4, 4]] and second.dtype == torch.float64
    assert columns.touched[1].indices.tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("accumulate_dtype", [None, torch.float64])
def test_sparse_and_dense_gradients_add_up_in_any_order(accumulate_dtype, dtype, copies):
    orders = [[SPARSE, ELSEWHERE], [SPARSE, torch.ones(2, 2)], [torch.ones(2, 2), SPARSE], [ELSEWHERE] * 3]
    grads = MovedGradients([torch.zeros(2, 2)], dtype, accumulate_dtype, copies)
    for task, order in enumerate(orders):
        filled(grads, task, *[[grad] for grad in order[:2]])
        for grad in order[2:]:
            filled(grads, task, [grad])
    blocks = grads.columns().whole.tensors
    assert [row[0].dtype for row in blocks] == [dtype] * 4
    assert [row[0].tolist() for row in blocks] == [
        [[5, 5], [2, 2]],
        [[1, 1], [3, 3]],
        [[1, 1], [3, 3]],
        [[15, 15], [0, 0]],
    ]
    assert torch.equal(ELSEWHERE.to_dense(), torch.tensor([[5.0, 5.0], [0.0, 0.0]]))


def test_a_gradient_that_two_parameters_share_is_added_to_each_by_itself(copies):
    grads = MovedGradients([torch.zeros(4), torch.zeros(2, 2)], torch.float32, torch.float64, copies)
    shared = torch.ones(4)
    filled(grads, 0, [shared, shared.view(2, 2)], [shared, shared.view(2, 2)])
    assert [row.flatten().tolist() for row in grads.columns().whole.tensors[0]] == [[2.0] * 4] * 2


def test_sums_of_one_stay_are_rounded_once(copies):
    """In bfloat16 1 + 2⁻⁹ is 1, however often it is added."""
    one, little = torch.ones(3), torch.full((3,), 2.0**-9)
    each = MovedGradients([torch.zeros(3)], torch.bfloat16, None, copies)
    together = MovedGradients([torch.zeros(3)], torch.bfloat16, torch.float32, copies)
    for grads in (each, together):
        filled(grads, 0, [one], *[[little]] * 4)
    assert each.columns().whole.tensors[0][0].tolist() == [1.0] * 3
    assert together.columns().whole.tensors[0][0].tolist() == [1 + 2.0**-7] * 3


def test_a_further_stay_widens_adds_and_rounds_again(copies):
    one, little = torch.ones(3), torch.full((3,), 2.0**-9)
    grads = MovedGradients([torch.zeros(3), torch.zeros(1)], torch.bfloat16, torch.float32, copies)
    filled(grads, 0, [one, torch.ones(1)])
    filled(grads, 0, [little])
    assert [row.tolist() for row in grads.columns().whole.tensors[0]] == [[1.0] * 3, [1.0]]
    filled(grads, 0, *[[little]] * 4)
    assert grads.columns().whole.tensors[0][0].tolist() == [1 + 2.0**-7] * 3


def test_what_was_given_may_be_overwritten_once_the_next_stay_has_begun(copies):
    """On the device: a gradient's memory is another's as soon as autograd goes on, though its copy comes late."""
    grads, given = MovedGradients([torch.zeros(3)], torch.float32, None, copies), torch.ones(3)
    filled(grads, 0, [given])
    grads.open(1)
    given.fill_(torch.nan)
    assert not grads.drop()
    assert grads.columns().whole.tensors[0][0].tolist() == [1.0] * 3


def test_what_was_dropped_leaves_nothing(copies):
    grads = MovedGradients([torch.zeros(3)], torch.bfloat16, None, copies)
    filled(grads, 0, [torch.ones(3)])
    grads.open(0)
    grads.add(0, torch.ones(3))
    assert grads.drop() and grads.tasks == []
    grads.open(0)
    assert not grads.drop()
    filled(grads, 0, [torch.ones(3)])
    assert grads.columns().whole.tensors[0][0].tolist() == [1.0] * 3


def test_rows_are_freed_parameter_by_parameter_as_the_merged_gradient_is_given():
    parameters = [torch.zeros(3), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(2)]
    grads = MovedGradients(parameters, torch.bfloat16)
    for task in range(3):
        filled(grads, task, [torch.ones_like(p) for p in parameters])
    tensors = grads.columns().whole.tensors
    alive = [[weakref.ref(grad) for grad in row] for row in tensors]
    merged = list(tensors[0])
    merged[2] = None
    del tensors
    result = []
    for index, own in enumerate(grads.give(merged)):
        result.append(own)
        assert all(row[later]() is not None for row in alive for later in range(index + 1, 3))
        assert not any(row[index]() is not None for row in alive[1:])
        assert not any(row[earlier]() is not None for row in alive for earlier in range(index) if earlier != 1)
    assert result[0].dtype == torch.float32 and result[1].dtype == torch.bfloat16 and result[2] is None
    assert result[1] is alive[0][1]()


def test_the_memory_of_the_host_serves_every_round():
    copies = LateCopies()
    grads = MovedGradients([torch.zeros(3)], None, None, copies)
    for value in (1.0, 2.0):
        for task in range(2):
            filled(grads, task, [torch.full((3,), value)])
        found = grads.columns().whole.tensors
        assert [row[0].tolist() for row in found] == [[value] * 3] * 2
        assert [own.tolist() for own in grads.give(list(found[0]))] == [[value] * 3]
        grads.clear()
    assert len(copies.locked) == 2
