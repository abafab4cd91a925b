"""Forward mode and the transforms of torch.func: gram and combine have them, the rest says that it has none."""

from itertools import pairwise

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastpcgrad
from tests.methods.test_in_surgery import ARGUMENTS

# torch's own, where forward mode first needs its formulas.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

T, N = 3, 11
SEGMENTS = {"one problem": None, "segments": [0, 4, 4, 11]}


def values(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_gram(J, segments=None):
    return J @ J.mT if segments is None else torch.stack([p @ p.mT for p in J.split(sizes(segments), dim=1)])


def plain_combine(J, w, segments=None):
    if segments is None:
        return w @ J
    return torch.cat([v @ p for v, p in zip(w, J.split(sizes(segments), dim=1), strict=True)])


def sizes(segments):
    return [b - a for a, b in pairwise(segments)]


def cases(segments):
    """Each op and its plain form as functions of J and w alone."""
    weights = values(T, seed=1) if segments is None else values(3, T, seed=1)
    rows = values(T, N)
    return {
        "gram": (lambda J: fastpcgrad.gram(J, segments), lambda J: plain_gram(J, segments), values(T, N)),
        "combine of J": (
            lambda J: fastpcgrad.combine(J, weights, segments=segments),
            lambda J: plain_combine(J, weights, segments),
            values(T, N),
        ),
        "combine of w": (
            lambda w: fastpcgrad.combine(rows, w, segments=segments),
            lambda w: plain_combine(rows, w, segments),
            weights,
        ),
    }


def hessian_of_norm(function):
    return lambda x: torch.func.hessian(lambda y: function(y).square().sum())(x)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.cos(x),))[1],
    "jacfwd": torch.func.jacfwd,
    "jacrev": torch.func.jacrev,
    "hessian": hessian_of_norm,
    "jvp of jvp": lambda f: (
        lambda x: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (torch.sin(y),))[1], (x,), (torch.cos(x),))[1]
    ),
    "vmap": lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x, x.cos()])),
    "vmap over the last dimension": lambda f: (
        lambda x: torch.func.vmap(f, in_dims=-1, out_dims=-1)(torch.stack([x, 2 * x, x.cos()], dim=-1))
    ),
    "gradients of each sample": lambda f: (
        lambda x: torch.func.vmap(torch.func.grad(lambda y: f(y).square().sum()))(torch.stack([x, -x]))
    ),
}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("name", cases(None))
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_those_of_the_plain_formula(backend, transform, name, segments):
    ours, plain, x = cases(segments)[name]
    torch.testing.assert_close(transform(ours)(x), transform(plain)(x))


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("name", cases(None))
def test_dual_numbers_have_the_plain_tangents(backend, name, segments):
    ours, plain, x = cases(segments)[name]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.cos(x))
        found, expected = forward_ad.unpack_dual(ours(dual)), forward_ad.unpack_dual(plain(dual))
    torch.testing.assert_close(found.primal, expected.primal)
    torch.testing.assert_close(found.tangent, expected.tangent)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("name", cases(None))
def test_derivatives_are_those_of_finite_differences(backend, name, segments):
    ours, _, x = cases(segments)[name]
    x.requires_grad_()
    assert torch.autograd.gradcheck(ours, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, x)


SOLVED = ["AlignedMTL", "CAGrad", "ConFIG", "DualProj", "FairGrad", "GradVac", "IMTLG", "MGDA", "NashMTL", "UPGrad"]
UNSEEN = {
    "make_fx": lambda weights, G: make_fx(lambda G: weights(G))(G),
    "vmap": lambda weights, G: torch.func.vmap(weights, randomness="different")(G.expand(2, T, T)),
    "jvp": lambda weights, G: torch.func.jvp(weights, (G,), (G,)),
    "grad": lambda weights, G: torch.func.grad(lambda G: weights(G).sum())(G),
}


@pytest.mark.parametrize("way", UNSEEN)
@pytest.mark.parametrize("name", SOLVED)
def test_weights_that_no_op_computes_are_no_part_of_a_trace_or_a_derivative(name, way):
    method = getattr(fastpcgrad.methods, name)(**ARGUMENTS.get(name, {}))
    with pytest.raises(RuntimeError, match=r"cannot be traced by make_fx or transformed by torch\.func"):
        UNSEEN[way](method.weights, fastpcgrad.gram(values(T, N)))


def test_a_surgery_is_no_part_of_a_trace():
    p = torch.zeros(N, dtype=torch.float64, requires_grad=True)

    def surgery(J):
        fastpcgrad.backward(J @ p)
        return p.grad

    with pytest.raises(RuntimeError, match="cannot be traced by make_fx"):
        make_fx(surgery)(values(T, N))


WITHOUT = {
    "mix_": lambda J: fastpcgrad.mix_(J, torch.eye(T, dtype=torch.float64)),
    "mix_ of coefficients": lambda J: fastpcgrad.mix_(values(T, N), J[:, :T]),
    "pcgrad_": fastpcgrad.pcgrad_,
    "pcgrad": fastpcgrad.pcgrad,
    "projected rows": lambda J: fastpcgrad.pcgrad(J, reduction="none"),
    "pcgrad_coefficients": lambda J: fastpcgrad.pcgrad_coefficients(
        J[:, :T] @ J[:, :T].mT, torch.arange(T).repeat(T, 1)
    ),
    "combine with out": lambda J: fastpcgrad.combine(J, values(T), out=torch.empty(N, dtype=torch.float64)),
}


@pytest.mark.parametrize("call", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("way", ["dual", "jvp", "grad"])
def test_what_has_no_derivative_says_so_in_every_mode(backend, call, way):
    J = values(T, N)
    with pytest.raises(RuntimeError, match=r"no derivative|detach|requires grad"):
        if way == "dual":
            with forward_ad.dual_level():
                call(forward_ad.make_dual(J.clone(), J.cos()))
        elif way == "jvp":
            torch.func.jvp(lambda x: call(x.clone()), (J,), (J.cos(),))
        else:
            torch.func.grad(lambda x: call(x.clone()).sum())(J)
