"""One loss a sample: G and merged gradients of factors, as of a backward pass for each loss."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.rows import samples
from tests import random_graphs
from tests.factors.setting import flattened

BATCH = 6


def rows_of(losses, inputs):
    found = [torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack([flattened(row, inputs) for row in found]).double()


def assert_right(losses, inputs, tolerance, **options):
    """G and merged gradients of what ``losses()`` gives, and that both take no more than they say."""
    rows = rows_of(losses(), inputs)
    lengths = rows.norm(dim=1)
    gram = fastpcgrad.gramian(losses(), inputs, batch_dim=0, **options)
    assert ((gram - rows @ rows.T).abs() <= tolerance * lengths[:, None] * lengths).all()
    for method in (methods.PCGrad("tensorflow"), methods.UPGrad(), methods.Mean()):
        w = method.weights(rows @ rows.T)
        merged = fastpcgrad.grad(losses(), inputs, batch_dim=0, method=method, **options)
        error = flattened(merged, inputs).double() - w @ rows
        assert error.norm() <= 10 * tolerance * (w.abs() * lengths).sum()
        pairs = zip(merged, inputs, strict=True)
        assert all(g is None or (g.dtype, g.shape) == (p.dtype, p.shape) for g, p in pairs)


@pytest.fixture
def factored(monkeypatch):
    """The shapes of parameters that were factors in the last call."""
    shapes = []
    find = samples.find_samples

    def noting(graph, losses, parameters, retain_graph):
        found = find(graph, losses, parameters, retain_graph)
        shapes[:] = [tuple(parameters[index].shape) for index in found]
        return found

    monkeypatch.setattr("fastpcgrad.merging.by_factors.find_samples", noting)
    return shapes


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)).to(dtype)


def losses_of(net, x):
    return lambda: (net(x).flatten(1) - 0.3).square().sum(dim=1)


@pytest.mark.parametrize("batch", [1, 2, BATCH, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_mlp_is_all_factors(batch, dtype, factored):
    net, x = mlp(dtype), torch.randn(batch, 8, dtype=dtype)
    for _ in range(2):
        assert_right(losses_of(net, x), list(net.parameters()), 1e-6 if dtype == torch.float32 else 1e-13)
        assert factored == [(16, 8), (5, 16), (16,), (5,)]


class Sequence(nn.Module):
    """Three rows a sample, of positions that come after the batch or before it."""

    def __init__(self, batch_first):
        super().__init__()
        self.first, self.second, self.batch_first = nn.Linear(8, 16), nn.Linear(16, 5, bias=False), batch_first

    def forward(self, x):
        x = x.view(BATCH, 3, 8)
        h = self.second(self.first(x if self.batch_first else x.transpose(0, 1).contiguous()).tanh())
        return (h if self.batch_first else h.transpose(0, 1)).cumsum(dim=1)


def test_many_samples_are_multiplied_one_matrix_after_the_other(monkeypatch):
    """With the same bits as few are, all at once."""
    net, x = mlp(torch.float32), torch.randn(6, 8)
    losses = losses_of(net, x)
    at_once = fastpcgrad.gramian(losses(), list(net.parameters()), batch_dim=0)
    monkeypatch.setattr(samples, "_AT_ONCE", 4 * 6 * 6 - 1)  # two weights, each with its δ
    found = fastpcgrad.gramian(losses(), list(net.parameters()), batch_dim=0)
    torch.testing.assert_close(found, at_once, rtol=0, atol=0)


@pytest.mark.parametrize("by_pairs", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_several_rows_a_sample(batch_first, by_pairs, factored, monkeypatch):
    if not by_pairs:
        monkeypatch.setattr(samples.Samples, "_gram_by_pairs", lambda self, left: (torch.full((), torch.nan), False))
    monkeypatch.setattr(samples, "_AT_ONCE", 100)
    torch.manual_seed(0)
    net = Sequence(batch_first).double()
    assert_right(losses_of(net, torch.randn(BATCH, 24, dtype=torch.float64)), list(net.parameters()), 1e-13)
    assert factored == [(16, 8), (5, 16), (16,)]


OTHERS = (random_graphs.BatchNorm, random_graphs.AfterAccumulation)
KINDS = [kind for kind in random_graphs.PIECES if kind not in OTHERS]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_layer(kind):
    """What is no factor has a row a sample."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), kind(), nn.Linear(8, 8)).double()
    parameters = [p for p in net.parameters() if p.requires_grad]
    for _ in range(2):
        assert_right(losses_of(net, torch.randn(BATCH, 3, 8, dtype=torch.float64)), parameters, 1e-12)


def test_a_convolution_and_a_norm_beside_factors(factored):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 3)).double()
    net(torch.randn(BATCH, 2, 8, dtype=torch.float64))
    net.eval()
    assert_right(losses_of(net, torch.randn(BATCH, 2, 8, dtype=torch.float64)), list(net.parameters()), 1e-12)
    assert factored == [(3, 24), (3,)]


class TestSamplesThatMix:
    MESSAGE = "depend on their own sample alone"

    def assert_refused(self, losses, parameters):
        for call in (fastpcgrad.gramian, fastpcgrad.grad):
            for _ in range(2):
                with pytest.raises(ValueError, match=self.MESSAGE):
                    call(losses(), parameters, batch_dim=0)
        before = [p.grad for p in parameters]
        with pytest.raises(ValueError, match=self.MESSAGE):
            fastpcgrad.backward(losses(), batch_dim=0)
        assert all(p.grad is old for p, old in zip(parameters, before, strict=True))
        assert fastpcgrad.gramian(losses(), parameters).shape == (BATCH, BATCH)

    @pytest.mark.parametrize("bias", [True, False])
    def test_in_a_batch_norm(self, bias):
        net = nn.Sequential(nn.Linear(8, 16, bias=bias), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).double()
        losses = losses_of(net, torch.randn(BATCH, 8, dtype=torch.float64))
        self.assert_refused(losses, list(net.parameters()))
        net.eval()
        assert_right(losses, list(net.parameters()), 1e-12)
        net.train()
        self.assert_refused(losses, list(net.parameters()))

    def test_in_a_contrastive_loss(self):
        net, x = mlp(), torch.randn(BATCH, 8, dtype=torch.float64)

        def losses():
            h = net(x)
            return -(h @ h.T).log_softmax(dim=1).diagonal()

        self.assert_refused(losses, list(net.parameters()))

    def test_a_little(self):
        net, x = mlp(torch.float32), torch.randn(BATCH, 8)

        def losses():
            out = net(x).square().sum(dim=1)
            return out + 1e-5 * out.roll(1)

        self.assert_refused(losses, list(net.parameters()))

    def test_below_the_weights_is_no_matter(self, factored):
        """What goes into a layer may depend on anything."""
        norm, net = nn.BatchNorm1d(8, affine=False).double(), mlp()
        assert_right(losses_of(nn.Sequential(norm, net), torch.randn(BATCH, 8).double()), list(net.parameters()), 1e-12)
        assert len(factored) == 4


def test_gradients_of_single_samples_that_are_zero_or_not_finite():
    net, x = mlp(), torch.randn(BATCH, 8, dtype=torch.float64)
    parameters = list(net.parameters())

    def losses(factors):
        return net(x).square().sum(dim=1) * torch.tensor(factors, dtype=torch.float64)

    assert_right(lambda: losses([1.0, 0, -1, 0, 2, 3]), parameters, 1e-13)
    gram = fastpcgrad.gramian(losses([1.0, torch.nan, 1, 1, torch.inf, 1]), parameters, batch_dim=0)
    finite = [0, 2, 3, 5]
    rows = rows_of(losses([1.0] * BATCH), parameters)[finite]
    torch.testing.assert_close(gram[finite][:, finite], rows @ rows.T)
    assert not gram[[1, 4]].isfinite().any()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_activations_out_of_the_range_of_products(scale):
    net, x = mlp(torch.float32), torch.randn(BATCH, 8)

    def losses():
        h = (linear(x * scale, net[0].weight) / scale).relu()
        return net[2](h).square().sum(dim=1)

    assert_right(losses, [net[0].weight], 1e-6)


def test_what_cancels_in_a_sample_is_made_of_gradients():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).double()
    x = torch.randn(BATCH, 4, 8, dtype=torch.float64) + 1e5
    targets = torch.randn(BATCH, 4, 8, dtype=torch.float64)
    targets -= targets.mean(dim=1, keepdim=True)
    assert_right(lambda: (layer(x) * targets).sum(dim=(1, 2)), [layer.weight], 1e-10)


def test_autocast():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), torch.randn(BATCH, 64)

    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float().square().sum(dim=1)

    assert_right(losses, list(net.parameters()), 4e-3)


def test_a_hook_that_is_not_linear_has_the_gradients_of_single_samples(factored):
    net, x = mlp(), torch.randn(BATCH, 8, dtype=torch.float64)
    net[0].weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    net[0].bias.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    assert_right(losses_of(net, x), list(net.parameters()), 1e-12)
    assert factored == [(5, 16), (5,)]


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)])
def test_backward_adds_to_what_is_there(shape):
    net, x = mlp(), torch.randn(BATCH, 8, dtype=torch.float64)
    losses = lambda: losses_of(net, x)().view(shape)  # noqa: E731
    parameters = list(net.parameters())
    expected = fastpcgrad.grad(losses(), parameters)
    before = [torch.randn_like(p) for p in parameters]
    for p, own in zip(parameters, before, strict=True):
        p.grad = own.clone()
    fastpcgrad.backward(losses(), batch_dim=0)
    for p, own, new in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close(p.grad, own + new, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [True, False])
def test_graphs_are_kept_where_that_is_asked_for(norm):
    net = nn.Sequential(mlp(), nn.LayerNorm(5).double()) if norm else mlp()
    fastpcgrad.gramian(losses_of(net, torch.randn(BATCH, 8, dtype=torch.float64))(), batch_dim=0)
    graph = losses_of(net, torch.randn(BATCH, 8, dtype=torch.float64))()
    parameters = list(net.parameters())
    first = fastpcgrad.gramian(graph, parameters, batch_dim=0, retain_graph=True)
    torch.testing.assert_close(fastpcgrad.gramian(graph, parameters, batch_dim=0), first)
    with pytest.raises(RuntimeError, match="a second time"):
        fastpcgrad.gramian(graph, parameters, batch_dim=0)


@pytest.mark.parametrize("options", [{"rows": "dense"}, {"method": methods.TrimmedMean(1)}], ids=str)
def test_rows_where_factors_are_not_wanted(options, factored):
    net, x = mlp(), torch.randn(BATCH, 8, dtype=torch.float64)
    parameters = list(net.parameters())
    found = fastpcgrad.grad(losses_of(net, x)(), parameters, batch_dim=0, **options)
    expected = fastpcgrad.grad(losses_of(net, x)(), parameters, **options)
    assert all(map(torch.equal, found, expected)) and not factored


def test_nothing_is_drawn_from_global_generators():
    net, x = mlp(), torch.randn(BATCH, 8, dtype=torch.float64)
    before = torch.get_rng_state()
    fastpcgrad.gramian(losses_of(net, x)(), batch_dim=0)
    assert torch.equal(torch.get_rng_state(), before)


class TestGramian:
    def test_of_tasks(self):
        net, x = mlp(), torch.randn(BATCH, 8, dtype=torch.float64)
        parameters = list(net.parameters())

        def losses():
            out = net(x)
            return [out[:, 0].sum(), None, out[:, 1].square().sum(), out.mean()]

        rows = rows_of([loss for loss in losses() if loss is not None], parameters)
        for options in ({}, {"params": parameters}, {"rows": "factored"}, {"rows": "dense"}):
            gram = fastpcgrad.gramian(losses(), **options)
            assert gram.dtype == torch.float64 and all(p.grad is None for p in parameters)
            torch.testing.assert_close(gram, rows @ rows.T)
        own = rows[:, : parameters[0].numel()]
        torch.testing.assert_close(fastpcgrad.gramian(losses(), parameters[0]), own @ own.T)

    @pytest.mark.parametrize("batch_dim", [1, -1, True, "0"])
    def test_of_another_dimension_is_refused(self, batch_dim):
        with pytest.raises(ValueError, match="batch_dim must be 0 or None; found"):
            fastpcgrad.gramian(losses_of(mlp(), torch.randn(BATCH, 8).double())(), batch_dim=batch_dim)

    def test_of_a_list_of_samples_is_refused(self):
        losses = list(losses_of(mlp(), torch.randn(BATCH, 8).double())())
        with pytest.raises(TypeError, match=r"batch_dim=0 needs one tensor \[B\] with the losses; found list"):
            fastpcgrad.grad(losses, list(mlp().parameters()), batch_dim=0)
