"""Balancers whose weights are the gradient of a scalarization: against its oracle by autograd, and TorchJD's."""

import copy
import math

import numpy
import pytest
import torch

from fastpcgrad import reference
from fastpcgrad.balancing import COSMOS, PBI, STCH, GeometricMean


def problems(count):
    """Losses ``[T]`` of sizes that lie up to 1e4 apart, a preference for each (often 0), and an ideal below them."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(count):
        tasks = 1 + seed % 6
        losses = 10 ** (4 * torch.rand(tasks, generator=generator, dtype=torch.float64) - 2)
        preference = torch.rand(tasks, generator=generator, dtype=torch.float64).sub(0.2).clamp_min(0)
        preference[seed % tasks] += 0.1
        ideal = losses * torch.rand(tasks, generator=generator, dtype=torch.float64)
        yield losses.requires_grad_(), preference, ideal


SCALARIZATIONS = {
    "GeometricMean": (
        lambda T, r, z: GeometricMean(T),
        lambda L, r, z: reference.geometric_mean(L),
        lambda theirs, r, z: theirs.GeometricMean(),
    ),
    "COSMOS": (
        lambda T, r, z: COSMOS(T, 0.3, r),
        lambda L, r, z: reference.cosmos(L, 0.3, r),
        lambda theirs, r, z: theirs.COSMOS(0.3, r),
    ),
    "PBI": (
        lambda T, r, z: PBI(T, 5.0, r, z),
        lambda L, r, z: reference.pbi(L, 5.0, r, z),
        lambda theirs, r, z: theirs.PBI(5.0, r, z),
    ),
}
for_each = pytest.mark.parametrize(("make", "oracle", "peer"), SCALARIZATIONS.values(), ids=SCALARIZATIONS)


def gradients(make, scalarization):
    """Ours and that of a scalarization, on each problem, and what the preferences are."""
    for losses, preference, ideal in problems(240):
        balancer = make(len(losses), preference, ideal).double()
        (found,) = torch.autograd.grad(balancer(losses).sum(), losses)
        (expected,) = torch.autograd.grad(scalarization(losses, preference, ideal), losses)
        yield found, expected


@for_each
def test_the_gradient_is_that_of_the_oracle(make, oracle, peer):
    for found, expected in gradients(make, oracle):
        if len(found) > 1 or make is not SCALARIZATIONS["PBI"][0]:  # of one loss √0 has no derivative
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@for_each
def test_the_gradient_is_torchjds(make, oracle, peer):
    theirs = pytest.importorskip("torchjd.scalarization")
    for found, expected in gradients(make, lambda L, r, z: peer(theirs, r, z)(L)):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_the_geometric_mean_is_libmtls_loss():
    """There ``torch.pow(losses.prod(), 1 / T)``."""
    for losses, _, _ in problems(30):
        expected = torch.pow(losses.prod(), 1 / len(losses))
        weighted = GeometricMean(len(losses)).double()(losses)
        torch.testing.assert_close(weighted.sum(), expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(value, losses)[0] for value in (weighted.sum(), expected)), rtol=1e-10, atol=0
        )


def test_no_product_over_or_underflows():
    for size in (1e-30, 1e30):
        balancer = GeometricMean(17)
        torch.testing.assert_close(balancer(torch.full((17,), size)).sum(), torch.tensor(size), rtol=1e-4, atol=0)
        torch.testing.assert_close(balancer.weights, torch.full((17,), 1 / 17), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("losses", "words"),
    [([1.0, 0.0, 2.0], ["losses[1] is 0", "STCH"]), ([1.0, 2.0, -3.0], ["losses[2] is -3"]), ([1e-38, 1e38, 1e38], [])],
)
def test_losses_without_a_logarithm_are_refused(losses, words):
    balancer = GeometricMean(3)
    before = balancer.weights.clone()
    with pytest.raises(ValueError) as caught:
        balancer(torch.tensor(losses))
    assert all(word in str(caught.value) for word in words)
    assert torch.equal(balancer.weights, before)


def test_cosmos_by_hand():
    """At L = (3, 4) the unit vector is (3, 4)/5 and r̂ = (1, 0): its cosine 3/5 has the gradient (16, -12)/125."""
    balancer = COSMOS(2, 5.0, [1.0, 0.0]).double()
    balancer(torch.tensor([3.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(balancer.weights, torch.tensor([1 - 16 / 25, 12 / 25], dtype=torch.float64))


def test_cosmos_takes_losses_whose_squares_overflow():
    small, large = COSMOS(2, 1.0, [0.5, 0.5]), COSMOS(2, 1e30, [0.5, 0.5])
    small(torch.tensor([3.0, 1.0]))
    large(torch.tensor([3e30, 1e30]))
    torch.testing.assert_close(small.weights, large.weights)


def test_losses_of_zero_have_no_angle():
    with pytest.raises(ValueError, match=r"losses\[0\] is 0.*COSMOS.*STCH"):
        COSMOS(2)(torch.zeros(2))
    assert COSMOS(2, 0.0, [1.0, 3.0])(torch.ones(2)).tolist() == [1.0, 3.0]
    assert COSMOS(2, 0.0)(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_losses_along_the_preferences_have_no_distance_from_them():
    """In fp32 what is left of L − d₁ r̂ is rounding, in any direction."""
    along = torch.tensor([0.1, 0.7, 0.3])
    for scale in (1e-20, 1.0, 1e20):
        balancer = PBI(3, 5.0, along)
        balancer(along * scale)
        torch.testing.assert_close(balancer.weights, along / along.norm())
    single = PBI(1, 5.0)
    single(torch.tensor([0.3]))
    assert single.weights.tolist() == [1.0]


def test_pbi_sees_the_losses_over_their_ideal():
    balancer = PBI(2, 2.0, [1.0, 1.0], ideal=[1.0, 2.0]).double()
    balancer(torch.tensor([1.0, 3.0], dtype=torch.float64))  # (0, 1): beside (1, 1) along (-1, 1)
    root = math.sqrt(0.5)
    torch.testing.assert_close(balancer.weights, torch.tensor([root - 2 * root, root + 2 * root]).double())


def test_preferences_may_be_drawn_anew_and_are_saved():
    for make in (COSMOS, PBI):
        balancer, resumed = make(3), make(3)
        balancer.preference = torch.tensor([0.1, 0.2, 0.7])
        resumed.load_state_dict(balancer.state_dict())
        losses = torch.rand(3) + 0.5
        assert torch.equal(balancer(losses), resumed(losses))
        assert not torch.equal(balancer.weights, make(3)(losses) / losses)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: COSMOS(2, -1.0), ["lambda_", "-1.0"]),
        (lambda: COSMOS(2, float("nan")), ["lambda_", "nan"]),
        (lambda: COSMOS(2, 1.0, [1.0]), ["preference", "2", "[1.0]"]),
        (lambda: COSMOS(2, 1.0, [1.0, -0.5]), ["preference", ">= 0", "-0.5"]),
        (lambda: PBI(2, preference=[0.0, 0.0]), ["preference", "> 0 for one", "[0.0, 0.0]"]),
        (lambda: PBI(2, theta=float("inf")), ["theta", "inf"]),
        (lambda: PBI(2, ideal=[1.0]), ["ideal", "2", "[1.0]"]),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("make", [COSMOS, PBI, STCH])
def test_what_is_set_anew_is_looked_at_as_an_argument_is(make):
    balancer, losses = make(2), torch.tensor([1.0, 3.0])
    before = balancer(losses)
    for value in ([1.0], torch.ones(3), torch.tensor([1.0, float("nan")]), [-1.0, 2.0], torch.zeros(2)):
        with pytest.raises(ValueError, match=r"preference must be .* found"):
            balancer.preference = value
    if make is not COSMOS:
        with pytest.raises(ValueError, match=r"ideal must be 2 finite numbers, one a task; found \[0.5\]"):
            balancer.ideal = torch.tensor([0.5])
        balancer.ideal = [0.5, 0.25]
    assert torch.equal(make(2)(losses), before)
    anew = [0.3, 0.7]
    expected = make(2, preference=anew, **({} if make is COSMOS else {"ideal": [0.5, 0.25]}))(losses)
    for value in (anew, torch.tensor(anew), torch.tensor(anew, dtype=torch.float64), numpy.array(anew)):
        balancer.preference = value
        assert balancer.preference.dtype == torch.float32
        assert torch.equal(balancer(losses), expected)
    assert "preference" in dict(balancer.named_buffers())
    torch.testing.assert_close(copy.deepcopy(balancer).double()(losses.double()).float(), expected)
