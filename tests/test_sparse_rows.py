"""Gradients that autograd makes sparse stay so: J has a block of what some task has touched."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastpcgrad
from fastpcgrad import methods, reference
from tests.factors.setting import assert_merged

TASKS, SIZE, WIDTH = 3, 11, 4
FIXED = "tensorflow"


class Tables(nn.Module):
    """Two tables and a head a task; each task looks up what it is given, in a bag of each sample."""

    def __init__(self, dtype=torch.float64, size=SIZE):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(size, WIDTH, sparse=True, dtype=dtype)
        self.bags = nn.EmbeddingBag(size, WIDTH, sparse=True, mode="mean", dtype=dtype)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1, dtype=dtype) for _ in range(TASKS))

    def loss(self, task, ids, bags=((1, 2, 2), (), (7,))):
        flat = torch.tensor([number for bag in bags for number in bag], dtype=torch.int64)
        offsets = torch.tensor([0, *map(len, bags)]).cumsum(0)[:-1]
        found = self.table(torch.tensor(ids, dtype=torch.int64)).sum(dim=0) + self.bags(flat, offsets).tanh().sum(dim=0)
        return (self.heads[task](found) - task).square().sum()

    @property
    def parameters_(self):
        return list(self.parameters())

    @property
    def sparse(self):
        return [self.table.weight, self.bags.weight]


IDS = {
    "alike": [[3, 5, 3], [3, 5, 3], [3, 5, 3]],
    "overlapping": [[3, 5, 3], [5, 0], [10, 5, 5, 5]],
    "disjoint": [[0, 1], [2, 2], [3, 10]],
    "empty": [[3, 5], [], [5, 5]],
    "all empty": [[], [], []],
}


def losses_of(net, ids):
    return [net.loss(t, own) for t, own in enumerate(ids)]


def rows_of(net, losses):
    found = [torch.autograd.grad(loss, net.parameters_, retain_graph=True, allow_unused=True) for loss in losses]
    return [list(map(dense, row)) for row in found]


def dense(grad, like=None):
    if grad is None:
        return None if like is None else torch.zeros_like(like).double()
    return (grad.to_dense() if grad.is_sparse else grad).double()


def matrix_of(rows, net):
    pairs = [list(zip(row, net.parameters_, strict=True)) for row in rows]
    return torch.stack([torch.cat([dense(g, p).flatten() for g, p in row]) for row in pairs])


def assert_grads(net, expected, **tolerances):
    for p, wanted in zip(net.parameters_, expected, strict=True):
        assert (p.grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(dense(p.grad), wanted.double(), **tolerances)


def assert_sparse(*tensors):
    for tensor in tensors:
        assert tensor.layout == torch.sparse_coo and tensor.is_coalesced()
        indices = tensor._indices()
        assert torch.equal(indices, indices.unique(dim=1)) and tensor._values().is_contiguous()


def by_pc_backward(net, losses, method):
    fastpcgrad.PCGrad(torch.optim.SGD(net.parameters()), method=method).pc_backward(losses)


def by_streaming(net, losses, method):
    surgery = fastpcgrad.GradientSurgery(net.parameters(), len(losses), method)
    for t, loss in enumerate(losses):
        with surgery.task(t):
            loss.backward()
    surgery.merge()


def by_surgery(net, losses, method):
    fastpcgrad.GradientSurgery(net.parameters(), len(losses), method).backward(losses)


def by_factors(net, losses, method):
    fastpcgrad.GradientSurgery(net.parameters(), len(losses), method, rows="factored").backward(losses)


def by_backward(net, losses, method):
    fastpcgrad.backward(losses, net.parameters_, method=method)


def by_grad(net, losses, method):
    for p, own in zip(net.parameters_, fastpcgrad.grad(losses, net.parameters_, method=method), strict=True):
        p.grad = own


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("door", [by_pc_backward, by_streaming, by_surgery, by_factors, by_backward, by_grad])
def test_every_door_gives_the_oracles_numbers_sparse(door, ids):
    net = Tables()
    rows = rows_of(net, losses_of(net, ids))
    for _ in range(2):
        for p in net.parameters_:
            p.grad = None
        door(net, losses_of(net, ids), methods.PCGrad(FIXED))
        assert_grads(net, reference.merge(rows, net.parameters_, FIXED))
        assert_sparse(*(p.grad for p in net.sparse))
        assert net.table.weight.grad._indices().tolist() == [sorted({number for own in ids for number in own})]


@pytest.mark.parametrize("variant", ["pytorch-pcgrad", "paper", "tensorflow", "torchjd", "libmtl", "tensorlogic"])
@pytest.mark.parametrize("absent", [None, 1])
def test_every_variant_where_tasks_do_not_touch_a_table(variant, absent):
    net = Tables()
    losses = [net.loss(0, [1, 1, 4]), net.heads[1].weight.sum() * net.bags.weight[3].sum(), net.loss(2, [0, 4])]
    rows = [row for t, row in enumerate(rows_of(net, losses)) if t != absent]
    generator = torch.Generator().manual_seed(5) if variant == "torchjd" else random.Random(5)
    expected = reference.merge(rows, net.parameters_, variant, generator=copy.deepcopy(generator))
    method = methods.PCGrad(variant, generator=generator)
    opt = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters()), method=method)
    opt.pc_backward([None if t == absent else loss for t, loss in enumerate(losses)])
    assert_grads(net, expected)


@pytest.mark.parametrize("method", [methods.MGDA, methods.UPGrad, methods.IMTLG, methods.GradVac])
@pytest.mark.parametrize("granularity", ["model", "parameter"])
def test_methods_on_one_problem_and_on_many(method, granularity):
    net = Tables()
    losses = losses_of(net, IDS["overlapping"])
    rows = rows_of(net, losses)
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, method(), granularity=granularity)
    report = surgery.backward(losses)
    assert_sparse(*(p.grad for p in net.sparse))
    if granularity == "model":
        for p in net.parameters_:
            p.grad = dense(p.grad)
        assert_merged(net.parameters_, matrix_of(rows, net), report, 1e-12)
        return
    for index, p in enumerate(net.sparse):
        own = torch.stack([row[index].flatten() for row in rows])
        torch.testing.assert_close(report.segment_grams[index], own @ own.T)
        torch.testing.assert_close(dense(p.grad).flatten(), report.weights[index] @ own)


def test_parameters_outside_are_summed():
    net = Tables()
    losses = losses_of(net, IDS["overlapping"])
    rows = rows_of(net, losses)
    surgery = fastpcgrad.GradientSurgery(
        net.parameters(), TASKS, methods.PCGrad(FIXED), shared=[net.bags.weight, *net.heads.parameters()]
    )
    surgery.backward(losses)
    assert_sparse(net.table.weight.grad)
    torch.testing.assert_close(net.table.weight.grad.to_dense(), sum(row[0] for row in rows))


def test_a_task_that_did_not_touch_a_row_counts_as_zero_in_it():
    net = Tables()
    losses = losses_of(net, IDS["overlapping"])
    J = matrix_of(rows_of(net, losses), net)
    fastpcgrad.backward(losses, net.parameters_, method=methods.TrimmedMean(1))
    found = torch.cat([dense(p.grad).flatten() for p in net.parameters_])
    torch.testing.assert_close(found, reference.trimmed_mean(J, 1))
    assert_sparse(net.table.weight.grad)


def test_one_task():
    net = Tables()
    rows = rows_of(net, [net.loss(0, [2, 2, 9])])
    fastpcgrad.GradientSurgery(net.parameters(), 1).backward([net.loss(0, [2, 2, 9])])
    assert_grads(net, rows[0])
    assert_sparse(net.table.weight.grad)


def test_a_table_that_another_task_multiplies_with_is_dense():
    net = Tables()
    losses = [net.loss(0, [2, 2, 9]), (net.table.weight @ net.heads[1].weight.T).square().sum(), net.loss(2, [1])]
    rows = rows_of(net, losses)
    fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.PCGrad(FIXED)).backward(losses)
    assert_grads(net, reference.merge(rows, net.parameters_, FIXED))
    assert net.table.weight.grad.layout == torch.strided
    assert net.table.weight.grad.stride() == net.table.weight.stride()


def test_every_dimension_may_be_sparse():
    """As the gradients of ``gather`` are."""
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    places = [torch.tensor([[0, 5, 5]]), torch.tensor([[1, 5], [2, 2], [0, 5]])]
    losses = [(-1) ** t * x.gather(1, own, sparse_grad=True).exp().sum() for t, own in enumerate(places)]
    rows = [[g.to_dense()] for g in (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses)]
    fastpcgrad.backward(losses, [x], method=methods.PCGrad(FIXED))
    torch.testing.assert_close(x.grad.to_dense(), reference.merge(rows, [x], FIXED)[0])
    assert_sparse(x.grad)
    assert x.grad._indices().tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 5, 2, 0, 5]]


@pytest.mark.parametrize("accumulate", ["sum", "mean"])
@pytest.mark.parametrize("options", [{}, {"accumulate_dtype": torch.float64}, {"row_dtype": torch.bfloat16}], ids=str)
def test_micro_batches_and_rows_of_other_dtypes(options, accumulate):
    net, ids = Tables(torch.float32), IDS["overlapping"]
    rows = rows_of(net, losses_of(net, ids))
    more = rows_of(net, [net.loss(0, [7, 3])])[0]
    weight = 0.5 if accumulate == "mean" else 1
    rows[0] = [None if a is None else weight * (a + b) for a, b in zip(rows[0], more, strict=True)]
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.Sum(), accumulate=accumulate, **options)
    for t, own in [*enumerate(ids), (0, [7, 3])]:
        with surgery.task(t):
            net.loss(t, own).backward()
    surgery = copy.deepcopy(surgery) if not options else surgery
    surgery.merge()
    if not options:  # the copy has copies of the parameters
        for p, own in zip(net.parameters_, surgery._layouts.current.capture.parameters, strict=True):
            p.grad = own.grad
    tolerance = 1e-2 if "row_dtype" in options else 1e-5
    expected = [sum(grad for grad in column if grad is not None) for column in zip(*rows, strict=True)]
    assert_grads(net, expected, rtol=tolerance, atol=tolerance)
    assert_sparse(*(p.grad for p in net.sparse))
    assert all(p.grad.dtype == torch.float32 for p in net.parameters_)


def test_what_is_written_to_the_ids_after_a_task_changes_nothing():
    net, ids = Tables(), torch.tensor([1, 4, 1])
    surgery = fastpcgrad.GradientSurgery([net.table.weight], 2, methods.Sum())
    for t in range(2):
        with surgery.task(t):
            net.table(ids).sum().backward()
        ids.fill_(9)
    surgery.merge()
    assert dense(net.table.weight.grad)[:, 0].tolist() == [0, 2, 0, 0, 1, 0, 0, 0, 0, 3, 0]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda tables: torch.optim.SparseAdam(tables, lr=0.1),
        lambda tables: torch.optim.Adagrad(tables, lr=0.1),
        lambda tables: torch.optim.SGD(tables, lr=0.1),
    ],
    ids=["SparseAdam", "Adagrad", "SGD"],
)
def test_optimizers_of_sparse_gradients_step(optimizer):
    net, twin = Tables(), Tables()
    surgery = fastpcgrad.PCGrad(optimizer(net.sparse), variant=FIXED)
    plain = optimizer(twin.sparse)
    for ids in (IDS["overlapping"], IDS["disjoint"]):
        expected = reference.merge([row[:2] for row in rows_of(twin, losses_of(twin, ids))], twin.sparse, FIXED)
        for p, own in zip(twin.sparse, expected, strict=True):
            p.grad = own.to_sparse(1)
        plain.step()
        surgery.zero_grad(set_to_none=ids is IDS["overlapping"])
        surgery.pc_backward(losses_of(net, ids))
        surgery.step()
        for p, own in zip(net.sparse, twin.sparse, strict=True):
            torch.testing.assert_close(p, own)


def test_what_is_there_is_added_to():
    net = Tables()
    opt = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters()), variant=FIXED, on_repeat="add")
    expected = [0] * len(net.parameters_)
    for ids in (IDS["overlapping"], IDS["disjoint"]):
        merged = reference.merge(rows_of(net, losses_of(net, ids)), net.parameters_, FIXED)
        expected = [a + b for a, b in zip(expected, merged, strict=True)]
        opt.pc_backward(losses_of(net, ids))
    assert_grads(net, expected)
    assert_sparse(net.table.weight.grad)
    net.table.weight.grad = net.table.weight.grad.to_dense()
    fastpcgrad.backward(losses_of(net, IDS["disjoint"]), net.parameters_, method=methods.PCGrad(FIXED))
    assert_grads(net, [a + b for a, b in zip(expected, merged, strict=True)])


def test_repeats_are_noticed():
    net = Tables()
    opt = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters()), on_repeat="raise")
    opt.pc_backward(losses_of(net, IDS["alike"]))
    with pytest.raises(RuntimeError, match="before the last one's gradients were cleared"):
        opt.pc_backward(losses_of(net, IDS["alike"]))
    opt.zero_grad(set_to_none=False)
    opt.pc_backward(losses_of(net, IDS["alike"]))


def test_a_scaled_step():
    net, twin = Tables(torch.float32), Tables(torch.float32)
    for model, scale in ((net, 1024.0), (twin, 1.0)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        opt = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), variant=FIXED)
        opt.pc_backward(list(map(scaler.scale, losses_of(model, IDS["overlapping"]))))
        scaler.step(opt)
        scaler.update()
    for p, own in zip(net.parameters_, twin.parameters_, strict=True):
        torch.testing.assert_close(p, own)


@pytest.mark.parametrize("options", [{}, {"row_dtype": torch.bfloat16}, {"rows": "factored"}], ids=str)
def test_nothing_is_as_large_as_a_table(options):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for each in found if isinstance(found, tuple) else (found,):
                if isinstance(each, torch.Tensor) and each.layout == torch.strided:
                    self.elements = max(self.elements, each.numel())
            return found

    net = Tables(torch.float32, size=10_000)
    surgery = fastpcgrad.GradientSurgery(net.parameters(), TASKS, methods.PCGrad(FIXED), **options)
    with Largest() as largest:
        for t, ids in enumerate(IDS["overlapping"]):
            with surgery.task(t):
                net.loss(t, ids).backward()
        surgery.merge()
        surgery.backward(losses_of(net, IDS["overlapping"]))
    assert 0 < largest.elements < 200


def test_tables_of_no_width():
    table = nn.Embedding(5, 0, sparse=True)
    x = torch.ones(2, requires_grad=True)
    losses = [x.sum() + table(torch.tensor([1, 1])).sum(), -x.sum() + table(torch.tensor([3])).sum()]
    merged, _ = fastpcgrad.grad(losses, [table.weight, x], method=methods.Sum())
    assert merged.is_coalesced() and merged.shape == (5, 0)
