"""Task gradients as factors: which weights, and that the gradient is right or made as ever."""

import random

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.rows import choice, factors

from . import random_graphs
from .test_random_graphs import check, drawn

TASKS = 3
ALIKE = 1e-6


def trunk_and_heads(width=16, dtype=torch.float32, rows=5):
    """Two layers and a head a task, and what goes in."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU())
    heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(TASKS))
    return nn.ModuleList([trunk, heads]).to(dtype), torch.randn(rows, width, dtype=dtype)


def losses_of_heads(net, x):
    h = net[0](x)
    return [(head(h) - t).square().mean() for t, head in enumerate(net[1])]


def rows_of(losses, parameters):
    """J in float64, by autograd alone."""
    found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([flattened(row, parameters) for row in found]).double()


def flattened(gradients, parameters):
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def assert_merged(parameters, rows, report, tolerance=ALIKE):
    """``.grad`` is w J for these rows and the report's w, and G is theirs."""
    merged = flattened([p.grad for p in parameters], parameters).double()
    lengths = rows.norm(dim=1)
    assert ((report.gram - rows @ rows.T).abs() <= tolerance * lengths[:, None] * lengths).all()
    assert (
        torch.linalg.vector_norm(merged - report.weights @ rows) <= tolerance * (report.weights.abs() * lengths).sum()
    )


def surgery_of(parameters, method=None, **options):
    return fastpcgrad.GradientSurgery(
        parameters, TASKS, method or methods.PCGrad("tensorflow"), **{"rows": "factored", **options}
    )


FACTORED = {
    "Piece": 1, "NoBias": 1, "Flat": 1, "Residual": 1, "InPlace": 1, "LayerNorm": 1, "BatchNorm": 1, "Convolution": 0,
    "Attention": 2, "Recurrent": 2, "Cell": 2, "Reused": 1, "BothWays": 0, "Penalised": 0, "AsItIs": 1, "Scaled": 0,
    "LowRank": 2, "Frozen": 0, "WeightNorm": 0, "HookedActivation": 1, "Reversed": 1, "HookedWeight": 0,
    "HookedView": 0, "AfterAccumulation": 0, "Retained": 1, "Checkpointed": 0, "Packed": 0, "Custom": 1, "Embedded": 1,
}  # fmt: skip
"""How many weights of each kind are products alone."""


@pytest.mark.parametrize("kind", random_graphs.PIECES, ids=lambda kind: kind.__name__)
def test_what_is_factored_and_that_it_is_right(kind):
    kinds = [random_graphs.Flat, kind, random_graphs.Flat]
    model, twin = (drawn(5, TASKS, kinds) for _ in range(2))
    for report in check(model, twin, torch.randn(model.shape, dtype=torch.float64), TASKS):
        assert report.rows.factored == 2 + TASKS + FACTORED[kind.__name__]


@pytest.mark.parametrize("kind", random_graphs.PIECES, ids=lambda kind: kind.__name__)
def test_fp32_is_as_exact_as_ever(kind):
    model = drawn(5, TASKS, [kind, random_graphs.Flat]).float()
    x = torch.randn(model.shape)
    parameters = model.of_surgery()
    surgery = surgery_of(parameters)
    if model.pieces[0].linear.weight._post_accumulate_grad_hooks:
        pytest.skip("autograd.grad, which gives the rows here, does not run such hooks")
    for _ in range(2):
        rows = rows_of(model(x), parameters)
        report = surgery.backward(model(x))
        assert_merged(parameters, rows, report)
        assert report.rows.factored >= 1 + TASKS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters(dtype):
    net, x = trunk_and_heads(width=64, dtype=dtype)
    parameters = list(net.parameters())
    surgery = surgery_of(parameters)
    for _ in range(2):
        report = surgery.backward(losses_of_heads(net, x))
        assert report.rows.factored == 2 + TASKS
        assert_merged(parameters, rows_of(losses_of_heads(net, x), parameters), report, 4e-3)
        assert all(p.grad.dtype == dtype for p in parameters)


@pytest.mark.parametrize("factored", [True, False])
def test_autocast_is_seen_through(factored):
    net, x = trunk_and_heads(width=64)
    parameters = list(net.parameters())
    exact = rows_of(losses_of_heads(net, x), parameters)

    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            return losses_of_heads(net, x)

    surgery = surgery_of(parameters, rows="factored" if factored else "dense")
    for _ in range(2):
        report = surgery.backward(losses())
        assert report.rows.factored == (2 + TASKS if factored else 0)
        # bf16 activations and δ differ from float64's; the products of the factors do not.
        assert_merged(parameters, rows_of(losses(), parameters), report, 4e-3)
        assert_merged(parameters, exact, report, 2e-2)
    # Also where the surgery itself is inside the region, which would round what goes into products.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(surgery.backward(losses()).gram, report.gram)


METHODS = [
    methods.PCGrad(),
    methods.PCGrad("pytorch-pcgrad"),
    methods.PCGrad("libmtl"),
    methods.PCGrad("tensorlogic"),
    methods.UPGrad(),
    methods.MGDA(),
    methods.CAGrad(0.4),
    methods.GradVac(),
    methods.Mean(),
    methods.AlignedMTL(),
]


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2)], ids=["all", "one absent"])
@pytest.mark.parametrize("granularity", ["model", "group", "parameter"])
@pytest.mark.parametrize("shared", [False, True], ids=["all", "trunk"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_every_scope_is_that_of_dense_rows(method, shared, granularity, present):
    net, x = trunk_and_heads(dtype=torch.float64)
    groups = [{"params": list(net[0].parameters())}, {"params": [*net[1].parameters()]}]
    results = []
    for rows in ("dense", "factored"):
        torch.manual_seed(3)
        random.seed(3)
        state = method.state_dict()
        surgery = surgery_of(
            groups, method, shared=net[0].parameters() if shared else None, granularity=granularity, rows=rows
        )
        losses = losses_of_heads(net, x)
        report = surgery.backward([loss if t in present else None for t, loss in enumerate(losses)])
        method.load_state_dict(state)
        assert report.rows.factored == (2 + len(present) if rows == "factored" else 0)
        results.append((report, [p.grad for p in net.parameters()]))
    (dense, expected), (factored, found) = results
    assert factored.tasks == dense.tasks
    for name in ("gram", "weights", "segment_grams", "coefficients"):
        own, other = getattr(factored, name), getattr(dense, name)
        assert own is other is None or torch.allclose(own, other, rtol=1e-9, atol=1e-12)
    for own, other in zip(found, expected, strict=True):
        assert own is other is None or torch.allclose(own, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [methods.GradDrop(), methods.TrimmedMean(1)], ids=repr)
def test_methods_that_need_the_rows_get_them(method):
    net, x = trunk_and_heads()
    report = surgery_of(net.parameters(), method).backward(losses_of_heads(net, x))
    assert report.rows.dense == {"the method works on each column of the task gradients": 10}


class TestHooksOutOfSight:
    """What is registered after a graph's first step is seen in the next."""

    @pytest.fixture
    def run(self):
        self.net, self.x = trunk_and_heads()
        self.first = self.net[0][0]
        parameters = list(self.net.parameters())
        surgery = surgery_of(parameters)

        def run():
            rows = rows_of(losses_of_heads(self.net, self.x), parameters)
            report = surgery.backward(losses_of_heads(self.net, self.x))
            assert_merged(parameters, rows, report)
            return report.rows

        assert run().factored == run().factored == 2 + TASKS
        return run

    @staticmethod
    def after(module, register):
        def hook(_module, _inputs, output):
            register(output)

        module.register_forward_hook(hook)

    def test_on_the_weight(self, run):
        handle = self.first.weight.register_hook(lambda grad: 2 * grad)
        assert run().dense["a hook on the weight"] == 1
        handle.remove()
        assert run().factored == 2 + TASKS

    def test_on_a_view_of_the_weight(self, run):
        def forward(x):
            view = self.first.weight.t()
            view.register_hook(lambda grad: 2 * grad)
            return torch.addmm(self.first.bias, x, view)

        self.first.forward = forward
        for _ in range(2):
            assert run().dense["factors give another gradient than autograd does"] == 1

    def test_that_is_registered_anew_and_changes_the_gradient_of_one_task_alone(self):
        torch.manual_seed(0)
        weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(3, 8)
        surgery = surgery_of([weight])

        def losses():
            view = weight.t()
            view.register_hook(lambda grad: grad.clamp(-1, 1))
            h = x @ view
            return [1e-3 * h.square().mean(), h.sum(), 1e3 * h.square().sum()]

        for _ in range(3):
            rows = rows_of(losses(), [weight])
            report = surgery.backward(losses())
            assert report.rows.dense == {"factors give another gradient than autograd does": 1}
            assert_merged([weight], rows, report)
        found = fastpcgrad.grad(losses(), weight, method=methods.Sum(), rows="factored")[0]
        torch.testing.assert_close(found.flatten().double(), rows.sum(dim=0))

    def test_on_the_node_that_accumulates(self, run):
        node = self.first.weight.expand_as(self.first.weight).grad_fn.next_functions[0][0]
        calls = []
        handle = node.register_hook(lambda *_: calls.append(1))
        for _ in range(2):
            calls.clear()
            assert run().dense["a hook between the weight and its products"] == 1
            assert len(calls) == TASKS
        handle.remove()

    def test_on_the_product(self, run):
        calls = []
        self.after(self.first, lambda out: out.grad_fn.register_hook(lambda *_: calls.append(1)))
        assert run().dense["a hook between the weight and its products"] == 1
        assert len(calls) == 2 * TASKS  # those of the oracle, and ours

    def test_that_leaves_the_gradient_alone_runs_as_often_as_ever(self, run):
        calls = []
        self.after(self.net[0][1], lambda out: out.register_hook(lambda grad: calls.append(1)))
        assert run().factored == 2 + TASKS
        assert len(calls) == 2 * TASKS


class TestRange:
    """fp32 products of activations leave fp32's range where their gradients do not."""

    @pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e20])
    def test_large_and_small_activations(self, scale):
        net, x = trunk_and_heads()
        parameters = [net[0][0].weight]
        losses = losses_of_scaled(net, x, scale)
        rows = rows_of(losses, parameters)
        report = surgery_of(parameters).backward(losses)
        assert report.rows.factored == 1
        assert_merged(parameters, rows, report)
        assert report.gram.isfinite().all()
        assert (report.gram.diagonal() > 0).all()

    @pytest.mark.parametrize("scale", [1e-170, 1e170])
    def test_float64_out_of_range_is_made_dense(self, scale):
        net, x = trunk_and_heads(dtype=torch.float64)
        parameters = [net[0][0].weight]
        surgery = surgery_of(parameters)
        # The first step compares; the second finds out by itself.
        for own, dense in ((1.0, {}), (scale, {"factors would not have been exact": 1})):
            losses = losses_of_scaled(net, x, own)
            rows = rows_of(losses, parameters)
            report = surgery.backward(losses)
            assert report.rows.dense == dense
            assert_merged(parameters, rows, report, 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("mean", [30.0, 1000.0, 1e5])
    def test_activations_far_from_zero_before_a_normalisation(self, mean, dtype):
        torch.manual_seed(0)
        layer, norm = nn.Linear(32, 32, dtype=dtype), nn.BatchNorm1d(32, affine=False, dtype=dtype)
        parameters = [layer.weight]
        x, targets = torch.randn(16, 32, dtype=dtype) + mean, torch.randn(TASKS, 16, 32, dtype=dtype)
        surgery = surgery_of(parameters)
        for _ in range(2):
            losses = [(norm(layer(x)) * target).sum() for target in targets]
            out = layer(x)
            losses = [(norm(out) * target).sum() for target in targets]
            delta = [torch.autograd.grad(loss, out, retain_graph=True)[0].double() for loss in losses]
            # Of the same δ and a: those themselves are rounded, and what cancels in δᵀ a shows it.
            rows = torch.stack([(d.T @ x.double()).flatten() for d in delta])
            report = surgery.backward(losses)
            lengths = rows.norm(dim=1)
            tolerance = 1e-9 if dtype == torch.float64 else 1e-5 * max(1, mean / 1000)
            assert ((report.gram - rows @ rows.T).abs() <= tolerance * lengths[:, None] * lengths).all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_is_not_finite_shows_at_its_place(self, value):
        net, x = trunk_and_heads()
        parameters = list(net.parameters())
        results = []
        for rows in ("dense", "factored"):
            surgery = surgery_of(parameters, rows=rows)
            losses = losses_of_heads(net, x)
            losses[1] = losses[1] * value
            surgery.backward(losses)
            results.append([p.grad.isfinite() for p in parameters])
            report = surgery.backward(losses_of_heads(net, x))
        assert all(map(torch.equal, *results))
        assert report.rows.factored == 2 + TASKS  # what could not be compared then is now


def losses_of_scaled(net, x, scale):
    """δ of the first layer is as small as its activations are large."""
    layer = net[0][0]
    hidden = linear(x * scale, layer.weight) / scale + layer.bias
    return [head(net[0][1:](hidden)).square().mean() for head in net[1]]


class Hidden(torch.autograd.Function):
    """Runs a backward pass within its own, of which the graph shows nothing."""

    @staticmethod
    def forward(ctx, h, module):
        ctx.save_for_backward(h)
        ctx.module = module
        return module(h)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            h = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.module(h).backward(grad)
        return h.grad, None


@pytest.mark.parametrize("from_the_first_step", [True, False])
def test_a_hidden_backward_pass_to_a_factored_weight(from_the_first_step):
    net, x = trunk_and_heads(dtype=torch.float64)
    twin, _ = trunk_and_heads(dtype=torch.float64)
    hides = from_the_first_step

    def losses(net):
        h = net[0](x)
        h = Hidden.apply(h, net[0]) if hides else h
        return [head(h).square().mean() for head in net[1]]

    surgery, dense = surgery_of(net.parameters()), surgery_of(twin.parameters(), rows="dense")
    for step in range(3):
        report, expected = surgery.backward(losses(net)), dense.backward(losses(twin))
        torch.testing.assert_close(report.gram, expected.gram, rtol=1e-10, atol=1e-12)
        for own, other in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12)
        hides = hides or step == 0
    assert report.rows.factored == TASKS


def test_a_reentrant_checkpoint_is_dense():
    net, x = trunk_and_heads()
    h = checkpoint(net[0], x.requires_grad_(), use_reentrant=True)
    report = surgery_of(net.parameters()).backward([head(h).square().mean() for head in net[1]])
    assert report.rows.dense == {"a reentrant checkpoint hides what lies behind it": 10}
    assert net[0][0].weight.grad is not None


def test_a_compiled_trunk_is_dense():
    net, x = trunk_and_heads()
    parameters = list(net.parameters())
    with torch._functorch.config.patch(donated_buffer=False):
        compiled = torch.compile(net[0], backend="aot_eager")
        h = compiled(x)
        losses = [head(h).square().mean() for head in net[1]]
        rows = rows_of(losses, parameters)
        report = surgery_of(parameters).backward(losses)
    assert report.rows.factored == TASKS
    assert_merged(parameters, rows, report)


class TestGraphs:
    def test_are_freed_by_the_last_pass(self):
        net, x = trunk_and_heads()
        surgery = surgery_of(net.parameters())
        for _ in range(2):
            losses = losses_of_heads(net, x)
            surgery.backward(losses)
            with pytest.raises(RuntimeError, match="a second time"):
                surgery.backward(losses)

    def test_may_be_kept(self):
        net, x = trunk_and_heads()
        surgery = surgery_of(net.parameters())
        losses = losses_of_heads(net, x)
        first = surgery.backward(losses, retain_graph=True)
        assert torch.equal(surgery.backward(losses).gram, first.gram)

    def test_with_an_activation_that_changed_raise(self):
        net, x = trunk_and_heads()
        before = [p.grad for p in net.parameters()]
        h = net[0][0](x)
        losses = [head(net[0][1:](h)).square().mean() for head in net[1]]
        with torch.no_grad():
            x.add_(1)
        surgery = surgery_of(net.parameters())
        with pytest.raises(RuntimeError, match="inplace operation"):
            surgery.backward(losses)
        assert [p.grad for p in net.parameters()] == before
        assert surgery.backward(losses_of_heads(net, x)).rows.factored == 2 + TASKS

    def test_of_a_pass_that_failed_have_no_hooks_left(self):
        net, x = trunk_and_heads()
        losses = losses_of_heads(net, x)
        broken = losses[1] * 1
        broken.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            surgery_of(net.parameters()).backward([losses[0], broken, losses[2]], retain_graph=True)
        node = losses[0].grad_fn
        while node.name() != "AddmmBackward0":
            node = node.next_functions[0][0]
        handle = node.register_prehook(lambda grads: None)
        assert len(handle.hooks_dict_ref()) == 1


class TestFunctional:
    """``grad`` and ``backward``, which touch no ``.grad`` until they add to it."""

    def test_equal_those_with_dense_rows(self):
        net, x = trunk_and_heads(dtype=torch.float64)
        inputs = list(net.parameters())
        results = []
        for rows in ("dense", "factored", "factored"):
            torch.manual_seed(0)
            results.append(fastpcgrad.grad(losses_of_heads(net, x), inputs, rows=rows))
            assert all(p.grad is None for p in inputs)
        for dense, first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, dense, rtol=1e-10, atol=1e-12)
            assert torch.equal(second, first)
        torch.manual_seed(0)
        fastpcgrad.backward(losses_of_heads(net, x), rows="factored")
        for p, own in zip(inputs, results[2], strict=True):
            torch.testing.assert_close(p.grad, own, rtol=1e-10, atol=1e-12)

    def test_hooks_on_the_output_of_a_product_that_need_not_run(self):
        torch.manual_seed(0)
        layer = nn.Linear(8, 8, bias=False)
        x = torch.randn(3, 8)

        def losses():
            h = layer(x)
            h.register_hook(lambda grad: grad * 10)
            return [(h - t).square().mean() for t in range(TASKS)]

        for _ in range(2):
            (dense,) = fastpcgrad.grad(losses(), layer.weight, method=methods.Mean(), rows="dense")
            (found,) = fastpcgrad.grad(losses(), layer.weight, method=methods.Mean(), rows="factored")
            torch.testing.assert_close(found, dense)


class TestChoice:
    @pytest.fixture
    def net_and_losses(self, monkeypatch):
        for module in (choice, factors):
            monkeypatch.setattr(module, "LEAST_ELEMENTS", 1000)
        net, x = trunk_and_heads(width=64, rows=8)
        return net, lambda: losses_of_heads(net, x)

    def factored(self, net, losses, **options):
        """In a second step: the first one's graph may be hooked."""
        surgery = surgery_of(net.parameters(), **options)
        surgery.backward(losses())
        return surgery.backward(losses()).rows.factored

    def test_the_first_step_is_dense_unless_factors_are_asked_for(self, net_and_losses):
        net, losses = net_and_losses
        reason = "the first step, or a hook was registered since the graph was begun"
        torch.ones(1, requires_grad=True).register_hook(print)
        surgery = surgery_of(net.parameters(), rows="auto")
        assert surgery.backward(losses()).rows.dense[reason] == 2
        graph = losses()
        assert surgery.backward(losses()).rows.factored == 2
        graph[0].register_hook(print)
        assert surgery.backward(graph).rows.dense[reason] == 2
        assert surgery.backward(losses()).rows.factored == 2

    def test_auto_takes_factors_of_what_several_tasks_reach(self, net_and_losses):
        net, losses = net_and_losses
        assert self.factored(net, losses, rows="auto") == 2
        assert self.factored(net, losses, rows="factored") == 2 + TASKS
        assert self.factored(net, losses, rows="dense") == 0

    def test_many_rows_are_left_dense(self, net_and_losses):
        net, _ = net_and_losses
        many = torch.randn(40, 64)
        report = surgery_of(net.parameters(), rows="auto").backward(losses_of_heads(net, many))
        assert report.rows.factored == 0
        assert report.rows.dense["factors would not pay"] == 2 + TASKS

    def test_the_environment_and_the_context_switch_it_off(self, net_and_losses, monkeypatch):
        net, losses = net_and_losses
        with fastpcgrad.dense_rows():
            assert self.factored(net, losses) == 0
        assert self.factored(net, losses) == 2 + TASKS
        monkeypatch.setenv("FASTPCGRAD_ROWS", "dense")
        assert self.factored(net, losses) == 0
        monkeypatch.setenv("FASTPCGRAD_ROWS", "auto")
        assert self.factored(net, losses) == 2 + TASKS
        monkeypatch.setenv("FASTPCGRAD_ROWS", "sparse")
        with pytest.raises(ValueError, match="FASTPCGRAD_ROWS must be auto or dense; found 'sparse'"):
            losses_of = losses()
            surgery_of(net.parameters()).backward(losses_of)

    def test_the_drop_in_hands_it_on(self, net_and_losses):
        net, losses = net_and_losses
        for rows, count in (("auto", 2), ("dense", 0)):
            optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), rows=rows)
            for _ in range(2):
                optimizer.zero_grad()
                optimizer.pc_backward(losses())
            assert optimizer.report.rows.factored == count

    def test_small_models_are_not_looked_at(self, monkeypatch):
        net, x = trunk_and_heads()
        monkeypatch.setattr("fastpcgrad.surgery.planned", None)
        report = surgery_of(net.parameters(), rows="auto").backward(losses_of_heads(net, x))
        assert list(report.rows.dense) == ["the model's matrices have less than 1000000 elements"]

    def test_rows_of_another_dtype_are_dense(self):
        net, x = trunk_and_heads()
        report = surgery_of(net.parameters(), row_dtype=torch.bfloat16).backward(losses_of_heads(net, x))
        assert report.rows.dense == {"rows of another dtype or on another device": 10}

    def test_what_a_caller_ran_is_dense(self):
        net, x = trunk_and_heads()
        surgery = surgery_of(net.parameters())
        surgery.backward(losses_of_heads(net, x))
        for t in range(TASKS):
            with surgery.task(t):
                losses_of_heads(net, x)[t].backward()
        assert surgery.merge().rows.dense == {"backward passes that the surgery did not run": 1}

    @pytest.mark.parametrize("rows", ["sparse", None, 1])
    def test_another_choice_is_refused(self, rows):
        net, x = trunk_and_heads()
        message = f"rows must be 'auto', 'dense' or 'factored'; found {rows!r}"
        with pytest.raises(ValueError, match=message):
            surgery_of(net.parameters(), rows=rows)
        with pytest.raises(ValueError, match=message):
            fastpcgrad.grad(losses_of_heads(net, x), list(net.parameters()), rows=rows)
