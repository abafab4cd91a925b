"""Gradients of dense tables by the rows that are looked up: which tables, and that G and what is merged are right."""

import random

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, embedding_bag
from torch.utils.checkpoint import checkpoint

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.rows import choice, factors
from tests.factors.setting import ALIKE, TASKS, assert_merged, rows_of, surgery_of

SIZE, WIDTH = 23, 4
OTHERWISE = "no weight that matrix products alone use, and no table that lookups alone use"
IDS = [torch.tensor([[3, 5, 3], [7, 3, 22]]), torch.tensor([5, 0]), torch.tensor([10])]


class Net(nn.Module):
    """A table and a linear head a task; each task looks up what it is given, besides what all do."""

    def __init__(self, dtype=torch.float32, size=SIZE, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(size, WIDTH, dtype=dtype, **options)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2, dtype=dtype) for _ in range(TASKS))

    def losses(self, ids=IDS, look_up=None):
        look_up = look_up or self.table
        shared = look_up(torch.tensor([1, 5, 5])).sum(dim=0)
        found = [shared + look_up(own).reshape(-1, WIDTH).sum(dim=0) for own in ids]
        return [(head(h) - t).tanh().square().sum() for t, (head, h) in enumerate(zip(self.heads, found, strict=True))]


def double_gradient(weight):
    weight.grad.mul_(2)


def run(net, losses, expected, tolerance=ALIKE, **options):
    """Two steps, compared with autograd's rows; ``expected`` tables are factors."""
    parameters = list(net.parameters())
    surgery = surgery_of(parameters, **options)
    for _ in range(2):
        rows = rows_of(losses(), parameters)
        report = surgery.backward(losses())
        assert_merged(parameters, rows, report, tolerance)
        assert report.rows.factored == expected + TASKS
    return report.rows


def test_the_merged_gradient_is_a_dense_tensor_of_its_own():
    net = Net(padding_idx=3)
    run(net, net.losses, 1)
    grad, touched = net.table.weight.grad, [0, 1, 5, 7, 10, 22]
    assert type(grad) is torch.Tensor and grad.layout == torch.strided and not grad.requires_grad
    assert grad.stride() == net.table.weight.stride() and grad.untyped_storage().nbytes() == grad.nbytes
    others = [place for place in range(SIZE) if place not in touched]
    assert (grad[touched] != 0).any(dim=1).all()
    assert (grad[others] == 0).all()


class TestBags:
    """Of several lookups each: their sums and means."""

    IDS, OFFSETS = torch.tensor([1, 2, 2, 5, 7, 1, 3]), torch.tensor([0, 3, 3, 5])

    def run(self, offsets=OFFSETS, **options):
        """Three steps with bags of several lengths, and some that are alike; gives the report of the last."""
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(SIZE, WIDTH, dtype=torch.float64))
        scales = torch.arange(1.0, 1 + 4 * WIDTH, dtype=torch.float64).view(4, WIDTH)

        def losses():
            found = embedding_bag(self.IDS, weight, offsets, **options)
            alike = embedding_bag(self.IDS[:6].view(2, 3), weight, mode=options["mode"])
            shared = (found * scales).sin().sum()
            return [(t + 1) * shared + (t - 0.5) * alike.exp().sum() + found[t].sum().square() for t in range(TASKS)]

        surgery = surgery_of([weight])
        for _ in range(3):
            rows = rows_of(losses(), [weight])
            report = surgery.backward(losses())
            assert_merged([weight], rows, report, 1e-12)
        return report.rows

    @pytest.mark.parametrize("padding", [{}, {"padding_idx": 2}], ids=["all", "padding"])
    @pytest.mark.parametrize("mode", ["sum", "mean"])
    def test_sums_and_means(self, mode, padding):
        assert self.run(mode=mode, **padding).factored == 1

    @pytest.mark.parametrize("mode", ["sum", "mean"])
    def test_offsets_with_the_last_one(self, mode):
        ends = torch.tensor([0, 3, 3, 5, 7], dtype=torch.int64)
        assert self.run(ends, mode=mode, include_last_offset=True).factored == 1

    @pytest.mark.parametrize(
        "options",
        [
            {"mode": "max"},
            {"mode": "mean", "scale_grad_by_freq": True},
            {"mode": "sum", "per_sample_weights": torch.rand(7, dtype=torch.float64)},
            {"mode": "sum", "per_sample_weights": torch.rand(7, dtype=torch.float64, requires_grad=True)},
        ],
        ids=["max", "by frequency", "weights", "learned weights"],
    )
    def test_others_are_dense(self, options):
        assert self.run(**options).dense == {OTHERWISE: 1}


class TestWhatIsNotFactored:
    """Each of these is dense, and right."""

    def test_a_table_that_a_product_uses_too(self):
        net = Net()
        tied = lambda: [loss + net.heads[0](net.table.weight).square().mean() for loss in net.losses()]  # noqa: E731
        assert run(net, tied, 0).dense == {OTHERWISE: 1 + TASKS}

    def test_a_table_that_is_its_own_output_layer(self):
        net = Net()

        def losses():
            h = net.table(torch.tensor([1, 5, 5]))
            return [((h @ net.table.weight.T)[:, t].exp() + net.heads[t](h).sum(dim=1)).sum() for t in range(TASKS)]

        assert run(net, losses, 0).dense == {OTHERWISE: 1 + TASKS}

    @pytest.mark.parametrize("look_up", ["sliced", "indexed", "transposed", "scaled"])
    def test_other_uses(self, look_up):
        net = Net()
        ways = {
            "sliced": lambda ids: net.table(ids) + net.table.weight[:1],
            "indexed": lambda ids: net.table.weight[ids],
            "transposed": lambda ids: embedding(ids % WIDTH, net.table.weight[:WIDTH].t()),
            "scaled": lambda ids: embedding(ids, 2 * net.table.weight),
        }
        assert run(net, lambda: net.losses(look_up=ways[look_up]), 0).dense == {OTHERWISE: 1 + TASKS}

    def test_a_transposed_table(self):
        weight = nn.Parameter(torch.randn(WIDTH, SIZE))
        losses = lambda: [embedding(own, weight.t()).exp().sum() for own in IDS]  # noqa: E731
        rows = rows_of(losses(), [weight])
        report = surgery_of([weight]).backward(losses())
        assert report.rows.dense == {OTHERWISE: 1}
        assert_merged([weight], rows, report)

    @pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
    def test_gradients_that_are_scaled_or_sparse(self, options):
        net = Net(**options)
        rows = [[g.to_dense() for g in self.gradients(loss, net)] for loss in net.losses()]
        report = surgery_of(net.parameters(), methods.Sum()).backward(net.losses())
        assert report.rows.dense == {OTHERWISE: 1 + TASKS}
        torch.testing.assert_close(net.table.weight.grad.to_dense(), sum(row[0] for row in rows))

    @staticmethod
    def gradients(loss, net):
        return torch.autograd.grad(loss, [net.table.weight], retain_graph=True)

    def test_saved_indices_that_are_packed_by_a_hook(self):
        net = Net()

        def losses():
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
                return net.losses()

        rows = rows_of(losses(), list(net.parameters()))
        report = surgery_of(net.parameters()).backward(losses())
        assert report.rows.dense["activations are recomputed, or packed by a hook on saved tensors"] == 1 + TASKS
        assert_merged(list(net.parameters()), rows, report)

    def test_lookups_that_are_recomputed(self):
        net = Net()
        again = lambda ids: checkpoint(net.table, ids, use_reentrant=False)  # noqa: E731
        reason = "activations are recomputed, or packed by a hook on saved tensors"
        assert run(net, lambda: net.losses(look_up=again), 0).dense[reason] == 1

    def test_nothing_that_is_looked_up(self):
        net = Net()
        nothing = torch.empty(0, dtype=torch.long)
        losses = lambda: [net.table(nothing).sum() + head.weight.square().sum() for head in net.heads]  # noqa: E731
        rows = rows_of(losses(), list(net.parameters()))
        report = surgery_of(net.parameters()).backward(losses())
        assert report.rows.dense["nothing in it"] == 1
        assert_merged(list(net.parameters()), rows, report)


class TestHooks:
    def test_on_the_table(self):
        net = Net()
        net.table.weight.register_hook(lambda grad: 2 * grad)
        assert run(net, net.losses, 0).dense["a hook on the weight"] == 1

    def test_that_waits_for_the_gradient(self):
        net = Net()
        net.table.weight.register_post_accumulate_grad_hook(double_gradient)
        surgery = surgery_of(net.parameters(), methods.Sum())
        expected = 2 * sum(TestWhatIsNotFactored.gradients(loss, net)[0] for loss in net.losses())
        assert surgery.backward(net.losses()).rows.dense["a hook on the weight"] == 1
        torch.testing.assert_close(net.table.weight.grad, expected)

    def test_on_a_view_of_the_table(self):
        net = Net(torch.bfloat16).float()
        net.table.bfloat16()

        def look_up(ids):
            view = net.table.weight.float()
            view.register_hook(lambda grad: 2 * grad)
            return embedding(ids, view)

        dense = run(net, lambda: net.losses(look_up=look_up), 0, tolerance=4e-3).dense
        assert dense["factors give another gradient than autograd does"] == 1

    @pytest.mark.parametrize("door", ["backward", "grad"])
    def test_on_what_was_looked_up_are_run_once_a_task(self, door):
        net, calls = Net(), []

        def look_up(ids):
            found = net.table(ids)
            found.register_hook(lambda grad: calls.append(1) or -3 * grad)
            return found

        parameters = list(net.parameters())
        rows = rows_of(net.losses(look_up=look_up), parameters)
        calls.clear()
        if door == "backward":
            report = surgery_of(parameters).backward(net.losses(look_up=look_up))
            assert report.rows.factored == 1 + TASKS
            assert_merged(parameters, rows, report)
        else:
            losses = net.losses(look_up=look_up)
            found = fastpcgrad.grad(losses, parameters, method=methods.Sum(), rows="factored")
            torch.testing.assert_close(torch.cat([g.flatten() for g in found]).double(), rows.sum(dim=0))
        assert len(calls) == 2 * TASKS


def test_indices_that_changed_raise():
    net, ids = Net(), [own.clone() for own in IDS]
    losses = net.losses(ids)
    ids[0].fill_(9)
    with pytest.raises(RuntimeError, match="inplace operation"):
        surgery_of(net.parameters()).backward(losses)
    assert all(p.grad is None for p in net.parameters())
    assert surgery_of(net.parameters()).backward(net.losses(ids)).rows.factored == 1 + TASKS


def test_a_graph_that_was_freed_raises():
    net = Net()
    losses = net.losses()
    surgery = surgery_of(net.parameters())
    surgery.backward(losses)
    with pytest.raises(RuntimeError, match="a second time"):
        surgery.backward(losses)


@pytest.mark.parametrize(
    "ids", [[torch.tensor([3])] * 2, [torch.tensor([3, 3, 8])] * TASKS], ids=["an absent", "alike"]
)
def test_padding_counts_for_nothing(ids):
    net = Net(padding_idx=3, dtype=torch.float64)
    shared = torch.tensor([3, 3])
    losses = lambda: [  # noqa: E731
        (net.heads[t](net.table(shared).sum(dim=0) + net.table(own).sum(dim=0)) - 1).square().sum()
        for t, own in enumerate(ids)
    ]
    parameters = [net.table.weight, *(p for head in net.heads[: len(ids)] for p in head.parameters())]
    rows = rows_of(losses(), parameters)
    surgery = surgery_of(parameters)
    for _ in range(2):
        report = surgery.backward([*losses(), *[None] * (TASKS - len(ids))])
        assert report.rows.factored == 1 + len(ids)
        assert_merged(parameters, rows, report, 1e-12)
    assert net.table.weight.grad[3].eq(0).all()


def test_int32_indices():
    net = Net()
    run(net, lambda: net.losses([own.int() for own in IDS]), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_tables(dtype):
    net = Net(dtype)
    run(net, net.losses, 1, tolerance=1e-2)
    assert net.table.weight.grad.dtype == dtype


def test_one_place_that_is_looked_up_thousands_of_times():
    """Partial sums in fp32 lose more than products do, in autograd's as in ours."""
    net, often = Net(), torch.zeros(30_000, dtype=torch.long)
    scales, parameters = torch.rand(TASKS, 30_000, WIDTH) + 0.5, [net.table.weight]
    surgery = surgery_of(parameters)
    for _ in range(2):
        rows = rows_of([(net.table(often) * own).sum() for own in scales], parameters)
        found = net.table(often)
        report = surgery.backward([(found * own).sum() for own in scales])
        assert report.rows.factored == 1
        assert_merged(parameters, rows, report, 2e-5)


@pytest.mark.parametrize("granularity", ["model", "group", "parameter"])
@pytest.mark.parametrize("shared", [False, True], ids=["all", "table"])
@pytest.mark.parametrize(
    "method",
    [methods.PCGrad(), methods.PCGrad("pytorch-pcgrad"), methods.PCGrad("tensorlogic"), methods.UPGrad()],
    ids=repr,
)
def test_every_scope_is_that_of_dense_rows(method, shared, granularity):
    net = Net(torch.float64, padding_idx=5)
    groups = [{"params": [net.table.weight]}, {"params": list(net.heads.parameters())}]
    for present in ((0, 1, 2), (0, 2)):
        results = []
        for rows in ("dense", "factored"):
            torch.manual_seed(3)
            random.seed(3)
            state = method.state_dict()
            options = {"shared": [net.table.weight] if shared else None, "granularity": granularity, "rows": rows}
            surgery = surgery_of(groups, method, **options)
            report = surgery.backward([loss if t in present else None for t, loss in enumerate(net.losses())])
            method.load_state_dict(state)
            assert report.rows.factored == (1 + len(present) if rows == "factored" else 0)
            results.append((report, [p.grad for p in net.parameters()]))
        (dense, expected), (factored, found) = results
        for name in ("gram", "weights", "segment_grams", "coefficients"):
            own, other = getattr(factored, name), getattr(dense, name)
            assert own is other is None or torch.allclose(own, other, rtol=1e-9, atol=1e-12)
        for own, other in zip(found, expected, strict=True):
            assert own is other is None or torch.allclose(own, other, rtol=1e-9, atol=1e-12)


def test_what_is_not_finite_shows_where_it_does_with_dense_rows():
    net = Net()
    for value, method in ((torch.inf, methods.PCGrad("tensorflow")), (torch.nan, methods.Mean())):
        results = []
        for rows in ("dense", "factored"):
            losses = net.losses()
            losses[1] = losses[1] * value
            # Whose first step was compared: what is not finite cannot be.
            surgery = surgery_of([net.table.weight], method, rows=rows)
            surgery.backward(net.losses())
            report = surgery.backward(losses)
            assert report.rows.factored == (rows == "factored")
            results.append((report.gram, net.table.weight.grad))
        for own, other in zip(*results, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert not other.isfinite().all()


def test_weights_that_are_not_finite_leave_no_zeros():
    class Broken(methods.Mean):
        def solve(self, gram):
            solution = super().solve(gram)
            return solution._replace(weights=solution.weights * torch.nan)

    net = Net()
    for rows in ("dense", "factored"):
        surgery_of(net.parameters(), Broken(), rows=rows).backward(net.losses())
        assert net.table.weight.grad.isnan().all()


def test_what_adds_up_over_calls_and_steps_is_that_of_dense_rows():
    trained = []
    for rows in ("dense", "factored"):
        net = Net(torch.float64, max_norm=1.0)
        optimizer = fastpcgrad.PCGrad(
            torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5), variant="tensorflow", rows=rows, on_repeat="add"
        )
        for _ in range(3):
            optimizer.zero_grad()
            for ids in (IDS, IDS[::-1]):
                optimizer.pc_backward(net.losses(ids))
            optimizer.step()
        trained.append(list(net.parameters()))
    torch.testing.assert_close(*trained, rtol=1e-10, atol=1e-12)


def test_one_loss_a_sample_has_rows_of_tables():
    net, ids = Net(torch.float64), torch.tensor([[1, 5], [5, 5], [2, 0], [3, 1]])

    def losses():
        return net.heads[0](net.table(ids).sum(dim=1)).square().sum(dim=1)

    inputs = [net.table.weight, *net.heads[0].parameters()]
    rows = rows_of(losses().unbind(), inputs)
    torch.testing.assert_close(fastpcgrad.gramian(losses(), inputs, batch_dim=0), rows @ rows.T)


@pytest.mark.parametrize("tasks", [TASKS, 12])
def test_one_tensor_is_as_large_as_the_table_whatever_the_number_of_tasks(tasks):
    """But in the first step, which compares the gradient of one task."""
    net = Net(size=5000)
    head = net.heads[0]
    losses = lambda: [(head(net.table(torch.arange(8))).square().sum() - t).square() for t in range(tasks)]  # noqa: E731
    surgery = fastpcgrad.GradientSurgery([net.table.weight, *head.parameters()], tasks, rows="factored")
    for _ in range(2):
        surgery.backward(losses())
    graph = losses()
    with torch.profiler.profile(profile_memory=True) as profile:
        report = surgery.backward(graph)
    assert report.rows.factored == 2
    assert [e.name for e in profile.events() if e.self_cpu_memory_usage >= 4 * 5000 * WIDTH] == ["aten::empty"]


class TestChoice:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        for module in (choice, factors):
            monkeypatch.setattr(module, "LEAST_ELEMENTS", 1000)

    @pytest.mark.parametrize(("size", "factored"), [(400, 1), (300, 0)])
    def test_auto_takes_tables_with_four_rows_a_lookup(self, size, factored):
        net, ids = Net(size=size), torch.arange(100)
        surgery = surgery_of(net.parameters(), rows="auto")
        for _ in range(2):
            h = net.table(ids)
            losses = [head(h).square().sum() for head in net.heads]
            report = surgery.backward(losses)
        assert report.rows.factored == factored
        assert report.rows.dense["factors would not pay"] == TASKS + 1 - factored

    def test_a_task_that_looks_up_alone_keeps_its_gradient(self):
        net = Net(size=1000)
        losses = lambda: [net.table(torch.tensor([1])).sum(), *(h.weight.square().sum() for h in net.heads[1:])]  # noqa: E731
        report = surgery_of(net.parameters(), rows="auto").backward(losses())
        assert report.rows.factored == 0
