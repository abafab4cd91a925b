"""Task gradients as factors: which weights, and that G and the merged gradient are right."""

import random

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from fastpcgrad import methods
from tests import random_graphs
from tests.factors.setting import TASKS, assert_merged, losses_of_heads, rows_of, surgery_of, trunk_and_heads
from tests.test_random_graphs import check, drawn

FACTORED = {
    "Piece": 1, "NoBias": 1, "Flat": 1, "Residual": 1, "InPlace": 1, "LayerNorm": 1, "BatchNorm": 1, "Convolution": 0,
    "Attention": 2, "Recurrent": 2, "Cell": 2, "Reused": 1, "BothWays": 0, "Penalised": 0, "AsItIs": 1, "Scaled": 0,
    "LowRank": 2, "Frozen": 0, "WeightNorm": 0, "HookedActivation": 1, "Reversed": 1, "HookedWeight": 0,
    "HookedView": 0, "AfterAccumulation": 0, "Retained": 1, "Checkpointed": 0, "Packed": 0, "Custom": 1, "Embedded": 1,
    "LookedUp": 2, "Bags": 2, "Renormalised": 2, "ByFrequency": 1, "FrozenTable": 1, "HookedTable": 1,
    "HookedLookup": 2,
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


@pytest.mark.parametrize("way", ["scaled", "transposed twice"])
def test_what_the_graph_shows_needs_no_comparison(way):
    net, x = trunk_and_heads()
    weight, bias = net[0][0].weight, net[0][0].bias

    def losses():
        used, alpha = (weight.t(), 2) if way == "scaled" else (weight.t().t(), 1)
        hidden = torch.addmm(bias, x, used, alpha=alpha)
        return [head(hidden).square().mean() for head in net[1]]

    rows = rows_of(losses(), [weight])
    report = surgery_of([weight]).backward(losses())
    reason = "no weight that matrix products alone use, and no table that lookups alone use"
    assert report.rows.dense == ({reason: 1} if way == "scaled" else {})
    assert_merged([weight], rows, report)


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

    def test_float64_activations_whose_squares_are_subnormal(self):
        """Though their products with δ, and its squares, are well within range."""
        net, x = trunk_and_heads(dtype=torch.float64)
        parameters = [net[0][0].weight]
        losses = [1e-8 * loss for loss in losses_of_scaled(net, x, 1e-159)]
        rows = rows_of(losses, parameters)
        report = surgery_of(parameters).backward(losses)
        assert report.rows.factored == 0
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
