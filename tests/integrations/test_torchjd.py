"""Methods inside TorchJD give what fastpcgrad's own calls give."""

import inspect
import random

import pytest
import torch

import fastpcgrad
from benchmarks.method_cases import OF_MORE_THAN_ONE_J
from fastpcgrad import methods

pytest.importorskip("torchjd", reason="pip install 'fastpcgrad[test]'")

from torchjd import autojac
from torchjd.aggregation import GramianWeightedAggregator
from torchjd.autogram import Engine

from fastpcgrad.integrations import torchjd

KINDS = [
    pytest.param(kind, id=name)
    for name, kind in vars(methods).items()
    if inspect.isclass(kind) and issubclass(kind, methods.Method) and not inspect.isabstract(kind)
    if not issubclass(kind, OF_MORE_THAN_ONE_J)
]

ARGUMENTS = {
    methods.CAGrad: (0.5,),
    methods.CRMOGM: (methods.MGDA(),),
    methods.Constant: (torch.tensor([1.0, 2.0, 3.0]),),
    methods.FairGrad: (1.0,),
    methods.Krum: (0,),
    methods.TrimmedMean: (1,),
}


def made(kind):
    """A new method, after the generators it may draw from were set."""
    torch.manual_seed(0)
    random.seed(0)
    return kind(*ARGUMENTS.get(kind, ()))


def network(dtype=torch.float32):
    torch.manual_seed(1)
    trunk = torch.nn.Linear(8, 16).to(dtype)
    heads = torch.nn.ModuleList(torch.nn.Linear(16, 1) for _ in range(3)).to(dtype)
    features = trunk(torch.randn(32, 8, dtype=dtype)).tanh()
    targets = torch.randn(32, 3, dtype=dtype)
    losses = [(head(features)[:, 0] - targets[:, t]).square().mean() * (t + 1) for t, head in enumerate(heads)]
    return trunk, heads, features, losses


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def distance(found, expected):
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_in_jac_to_grad_every_method_gives_what_backward_gives(kind):
    trunk, heads, _, losses = network()
    model = torch.nn.ModuleList([trunk, heads])
    autojac.backward(losses)
    weights = autojac.jac_to_grad(model.parameters(), torchjd.Aggregator(made(kind)))
    assert (weights is None) == issubclass(kind, methods.Elementwise)
    found = gradients(model)
    trunk, heads, _, losses = network()
    model = torch.nn.ModuleList([trunk, heads])
    parameters = list(model.parameters())
    fastpcgrad.backward(losses, parameters, method=made(kind), shared=parameters)
    assert distance(found, gradients(model)) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_after_mtl_backward_every_method_gives_what_grad_and_backward_give(kind):
    trunk, heads, features, losses = network()
    autojac.mtl_backward(losses, features=features)
    autojac.jac_to_grad(trunk.parameters(), torchjd.Aggregator(made(kind)))
    found = gradients(trunk)
    of_heads = gradients(heads)
    trunk, heads, _, losses = network()
    merged = fastpcgrad.grad(losses, list(trunk.parameters()), method=made(kind), retain_graph=True)
    assert distance(found, torch.cat([g.flatten() for g in merged])) <= 1e-6
    fastpcgrad.backward(losses, method=made(kind), shared="auto")
    assert distance(found, gradients(trunk)) <= 1e-6
    assert distance(of_heads, gradients(heads)) <= 1e-6


def test_the_gram_matrix_may_be_torchjds_own():
    found = []
    for optimized in (False, True):
        trunk, _, features, losses = network(torch.float64)
        autojac.mtl_backward(losses, features=features)
        aggregator = torchjd.Aggregator(methods.UPGrad())
        assert isinstance(aggregator, GramianWeightedAggregator)
        autojac.jac_to_grad(trunk.parameters(), aggregator, optimize_gramian_computation=optimized)
        found.append(gradients(trunk))
    assert distance(found[1], found[0]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_engine_takes_a_weighting(dtype):
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)
    x, y = torch.randn(6, 4, dtype=dtype), torch.randn(6, dtype=dtype)
    engine = Engine(model, batch_dim=0)
    losses = (model(x)[:, 0] - y).square()
    weights = torchjd.Weighting(methods.UPGrad())(engine.compute_gramian(losses))
    assert weights.dtype == dtype
    losses.backward(weights)
    found = gradients(model)
    losses = (model(x)[:, 0] - y).square()
    expected = fastpcgrad.grad(losses, list(model.parameters()), method=methods.UPGrad())
    assert distance(found, torch.cat([g.flatten() for g in expected])) <= 1e-6


@pytest.mark.parametrize("kind", [methods.UPGrad, methods.GradDrop])
def test_jacobians_of_any_strides_and_with_grad(kind):
    J = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), requires_grad=True).mT
    found = torchjd.Aggregator(made(kind))(J)
    assert not found.requires_grad
    assert torch.equal(found, torchjd.Aggregator(made(kind))(J.detach().contiguous()))


def test_a_method_keeps_its_state():
    method = methods.GradVac()
    J = torch.randn(3, 5, generator=torch.Generator().manual_seed(4))
    torchjd.Aggregator(method)(J)
    assert method.state_dict()


def test_what_is_refused_is_named():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        torchjd.Weighting()(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\[2, 2, 2\]"):
        torchjd.Weighting()(torch.ones(2, 2, 2))
    for method in (methods.UPGrad(), methods.GradDrop()):
        with pytest.raises(ValueError, match=r"\[3\]"):
            torchjd.Aggregator(method)(torch.ones(3))
        with pytest.raises(TypeError, match="int64"):
            torchjd.Aggregator(method)(torch.ones(3, 2, dtype=torch.long))
        with pytest.raises(ValueError, match=r"\[0, 2\]|\[0, 0\]"):
            torchjd.Aggregator(method)(torch.ones(0, 2))
    with pytest.raises(TypeError, match=r"GradDrop.*Aggregator"):
        torchjd.Weighting(methods.GradDrop())
    for door in (torchjd.Aggregator, torchjd.Weighting):
        with pytest.raises(TypeError, match="'upgrad'"):
            door("upgrad")


def test_they_show_their_method():
    assert repr(torchjd.Aggregator(methods.PCGrad())) == "Aggregator(PCGrad(variant='paper', reduction='sum'))"
    assert repr(torchjd.Weighting(methods.PCGrad())) == "Weighting(PCGrad(variant='paper', reduction='sum'))"
