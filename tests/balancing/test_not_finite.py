"""A step whose losses or norms are not finite shows in its weighted losses and is skipped by what learns from it."""

import itertools
import random
from functools import partial

import pytest
import torch

from fastpcgrad import balancing

NAN, INF = float("nan"), float("inf")
BAD = (NAN, INF, -INF)
TASKS = 3

OPTIMIZERS = {
    "default": None,
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "Rprop": partial(torch.optim.Rprop, lr=0.01),
}
LEARNED = {
    "GradNorm": lambda optimizer=None: balancing.GradNorm(TASKS, 0.5, optimizer),
    "FAMO": lambda optimizer=None: balancing.FAMO(TASKS, optimizer=optimizer),
}
BALANCERS = LEARNED | {
    "UncertaintyWeighting": lambda: balancing.UncertaintyWeighting(TASKS),
    "DWA": lambda: balancing.DWA(TASKS),
    "Logarithm": lambda: balancing.Logarithm(TASKS),
    "STCH": lambda: balancing.STCH(TASKS, mu=0.5, preference=[0.2, 0.5, 0.3]),
    "COSMOS": lambda: balancing.COSMOS(TASKS, 0.1, [0.2, 0.5, 0.3]),
    "GeometricMean": lambda: balancing.GeometricMean(TASKS),
    "IMTLL": lambda: balancing.IMTLL(TASKS),
    "PBI": lambda: balancing.PBI(TASKS, theta=0.1),
}

for_each_bad_value = pytest.mark.parametrize("bad", BAD)


def values(count):
    return [torch.rand(TASKS) + 0.5 for _ in range(count)]


def step(balancer, losses, others):
    """One training step; ``others``: the norms for GradNorm, the losses after the step for FAMO."""
    weighted = balancer(losses)
    if isinstance(balancer, balancing.GradNorm):
        for t in range(TASKS):
            balancer.note(t, losses[t], others[t])
        balancer.update()
    if isinstance(balancer, balancing.FAMO):
        balancer.update(others)
    return weighted


def good_steps(count):
    return list(zip(values(count), values(count), strict=True))


def with_a_bad_value(losses, others, bad, where):
    """One value of the step replaced, in the losses or in what comes with them."""
    losses, others = losses.clone(), others.clone()
    (losses if where == "losses" else others)[random.randrange(TASKS)] = bad
    return losses, others


def state(balancer):
    """Everything that is saved, flat, copied."""

    def flat(value):
        if isinstance(value, dict):
            return [leaf for key in value for leaf in flat(value[key])]
        if isinstance(value, list | tuple):
            return [leaf for item in value for leaf in flat(item)]
        return [value.clone() if isinstance(value, torch.Tensor) else value]

    return flat(dict(balancer.state_dict()))


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        if isinstance(value, torch.Tensor):
            # The very first losses are not known yet.
            torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert value == other


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("before", [0, 3])
@for_each_bad_value
def test_the_weighted_losses_show_it_and_the_weights_stay(looks, name, before, bad):
    balancer = BALANCERS[name]()
    for losses, others in good_steps(before):
        step(balancer, losses, others)
    weights = balancer.weights.clone()
    assert weights.isfinite().all() and (weights > 0).all()
    for as_list, task in itertools.product((False, True), range(TASKS)):
        losses = torch.rand(TASKS)
        losses[task] = bad
        weighted = balancer(list(losses) if as_list else losses)
        weighted = torch.stack(weighted) if as_list else weighted
        assert torch.equal(weighted.isfinite(), losses.isfinite())
        assert torch.equal(balancer.weights, weights)


@pytest.mark.parametrize("name", [name for name in BALANCERS if name not in ("UncertaintyWeighting", "IMTLL")])
@pytest.mark.parametrize("where", ["losses", "others"])
@for_each_bad_value
def test_what_is_saved_stays_as_it_was_to_the_bit(looks, name, where, bad):
    balancer = BALANCERS[name]()
    for losses, others in good_steps(4):
        step(balancer, losses, others)
    before = state(balancer)
    (losses, others), *_ = good_steps(1)
    if where == "others" and name not in LEARNED:
        where = "losses"
    step(balancer, *with_a_bad_value(losses, others, bad, where))
    assert_same_bits(state(balancer), before)


@pytest.mark.parametrize("name", LEARNED)
@for_each_bad_value
def test_a_bad_step_before_any_other_leaves_nothing_where_flags_are_looked_at(name, bad):
    balancer = LEARNED[name]()
    before = state(balancer)
    (losses, others), *_ = good_steps(1)
    step(balancer, *with_a_bad_value(losses, others, bad, "losses"))
    assert_same_bits(state(balancer), before)
    assert not balancer.optimizer.state


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("places", [(0,), (1,), (0, 0, 3, 7), (9, 9, 9)])
def test_training_goes_on_as_if_the_step_had_not_been(looks, name, optimizer, places):
    skipping, alone = (LEARNED[name](OPTIMIZERS[optimizer]) for _ in range(2))
    for index, (losses, others) in enumerate(good_steps(10)):
        for kind in range(places.count(index)):
            where = ("losses", "others")[kind % 2]
            step(skipping, *with_a_bad_value(losses, others, random.choice(BAD), where))
        assert torch.equal(step(skipping, losses, others), step(alone, losses, others))
        assert_same_bits(state(skipping), state(alone))
    assert (alone.state_dict()["weights" if name == "GradNorm" else "logits"] - 1).abs().max() > 0.01


@pytest.mark.parametrize("name", [*LEARNED, "DWA"])
@pytest.mark.parametrize("first", [True, False])
def test_a_run_resumed_after_a_skipped_step_is_the_run_without_it(looks, name, first, tmp_path):
    steps = good_steps(8)
    skipping, resumed, alone = (BALANCERS[name]() for _ in range(3))
    for each in (skipping, alone):
        for losses, others in steps[: 0 if first else 4]:
            step(each, losses, others)
    step(skipping, *with_a_bad_value(*steps[0], NAN, "losses"))
    torch.save(skipping.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for losses, others in steps[4:]:
        step(alone, losses, others)
        step(resumed, losses, others)
    if name == "DWA":
        alone.end_epoch()
        resumed.end_epoch()
    assert_same_bits(state(resumed), state(alone))


def test_the_first_finite_losses_are_the_initial_ones(looks):
    balancer = balancing.GradNorm(TASKS, 0.5)
    steps = good_steps(3)
    step(balancer, *with_a_bad_value(*steps[0], INF, "losses"))
    step(balancer, *with_a_bad_value(*steps[1], NAN, "others"))
    assert balancer.initial_losses.isnan().all()
    step(balancer, *steps[2])
    step(balancer, *steps[0])
    assert torch.equal(balancer.initial_losses, steps[2][0])


@pytest.mark.parametrize("where", ["losses", "others"])
def test_alpha_0_hides_no_loss_that_is_not_finite(looks, where):
    """There NaN⁰ would be 1."""
    balancer = balancing.GradNorm(TASKS, 0.0)
    (losses, others), *_ = good_steps(1)
    step(balancer, losses, others)
    before = state(balancer)
    step(balancer, *with_a_bad_value(losses, others, NAN, where))
    assert_same_bits(state(balancer), before)


@pytest.mark.parametrize("places", [(0,), (1,), (0, 0, 4), (2, 3, 5)])
def test_the_means_of_an_epoch_are_those_of_its_finite_steps(looks, places):
    """Epochs of two steps."""
    skipping, alone = BALANCERS["DWA"](), BALANCERS["DWA"]()
    for index, losses in enumerate(values(8)):
        for _ in range(places.count(index)):
            skipping(with_a_bad_value(losses, losses, random.choice(BAD), "losses")[0])
        for each in (skipping, alone):
            each(losses)
            if index % 2:
                each.end_epoch()
        assert_same_bits(state(skipping), state(alone))
    assert (alone.weights != 1).all()


def test_an_epoch_that_was_saved_with_its_last_step_can_be_ended():
    saved, resumed = BALANCERS["DWA"](), BALANCERS["DWA"]()
    for losses in values(2):
        saved(losses)
        resumed.load_state_dict(saved.state_dict())
        for each in (saved, resumed):
            each.end_epoch()
        assert_same_bits(state(resumed), state(saved))
    assert (resumed.weights != 1).all()


def test_an_epoch_without_a_finite_step_is_none(looks):
    skipping, alone = BALANCERS["DWA"](), BALANCERS["DWA"]()
    for losses in values(4):
        skipping(torch.full((TASKS,), NAN))
        skipping.end_epoch()
        for each in (skipping, alone):
            each(losses)
            each.end_epoch()
        assert_same_bits(state(skipping), state(alone))


@for_each_bad_value
@pytest.mark.parametrize("as_list", [False, True])
def test_a_learned_variance_gets_a_gradient_of_0_from_it(bad, as_list):
    balancer = BALANCERS["UncertaintyWeighting"]()
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.1)
    balancer.log_variance.data.copy_(torch.tensor([0.3, -0.2, 0.1]))
    losses = torch.tensor([1.5, bad, 2.5], requires_grad=True)
    sum(balancer(list(losses) if as_list else losses)).backward()
    gradient = balancer.log_variance.grad.clone()
    assert gradient[1] == 0
    assert losses.grad.isfinite().all()
    balancer.log_variance.grad = None
    finite = torch.tensor([1.5, 2.0, 2.5])
    balancer(finite).sum().backward()
    assert torch.equal(gradient[::2], balancer.log_variance.grad[::2])
    balancer.log_variance.grad = gradient
    optimizer.step()
    assert balancer.log_variance[1] == torch.tensor(-0.2)
    assert balancer.log_variance.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_whose_square_overflows_is_not_finite_either(looks, dtype):
    """Adam's second moment would be infinite for good, and every later step 0."""
    spike = torch.finfo(dtype).max ** 0.75
    skipping, alone = (balancing.GradNorm(TASKS, 0.5).to(dtype) for _ in range(2))
    for index, (losses, norms) in enumerate(good_steps(4)):
        if index in (0, 2):
            step(skipping, 2 * losses.to(dtype), spike * norms.to(dtype))
        for each in (skipping, alone):
            step(each, losses.to(dtype), norms.to(dtype))
        assert_same_bits(state(skipping), state(alone))


def test_weights_that_cannot_be_scaled_are_taken_back(looks):
    """Ratios 1.9 and 0.1 with α = ½ ask less of both norms, 1.5 and 0.5: with lr 1 the weights become ∓½, of sum 0."""
    balancer = balancing.GradNorm(2, 0.5, partial(torch.optim.SGD, lr=1.0, momentum=0.5), initial_losses=[1.0, 1.0])
    for losses, norms in ([1.0, 1.0], [1.0, 1.0]), ([1.9, 0.1], [1.5, 0.5]):
        before = state(balancer)
        for t in range(2):
            balancer.note(t, torch.tensor(losses[t]), torch.tensor(norms[t]))
        balancer.update()
    assert_same_bits(state(balancer), before)
    assert balancer.weights.tolist() == [1.0, 1.0]


def test_no_huge_loss_makes_the_smooth_maximum_overflow():
    balancer = balancing.STCH(2, mu=1e-6, preference=[1.0, 1.0])
    balancer(torch.tensor([1e35, 2e35]))
    assert balancer.weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", LEARNED)
def test_counts_of_steps_lie_on_a_gpu_where_the_weights_do_and_on_the_host_otherwise(name):
    balancer = LEARNED[name]()
    for losses, others in good_steps(2):
        step(balancer, losses, others)
    saved = balancer.optimizer.state_dict()
    balancer._load(torch.device("cuda"), saved)
    assert [group["capturable"] for group in balancer.optimizer.param_groups] == [True]
    balancer.set_extra_state(balancer.optimizer.state_dict())
    assert [group["capturable"] for group in balancer.optimizer.param_groups] == [False]
    assert [held["step"].device.type for held in balancer.optimizer.state.values()] == ["cpu"]
    for losses, others in good_steps(2):
        step(balancer, losses, others)
    assert [held["step"].item() for held in balancer.optimizer.state.values()] == [4.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gpu_skips_without_a_wait(name, optimizer):
    from tests.gpu.waiting import no_waiting

    skipping, alone = (LEARNED[name](OPTIMIZERS[optimizer]).cuda() for _ in range(2))
    for losses, others in good_steps(5):
        good = losses.cuda(), others.cuda()
        bad = [value.cuda() for value in with_a_bad_value(losses, others, NAN, "losses")]
        with no_waiting():
            step(skipping, *bad)
            step(skipping, *good)
            step(alone, *good)
        assert torch.equal(skipping.weights, alone.weights)
    skipping.cpu()
    step(skipping, *good_steps(1)[0])
    assert skipping.weights.isfinite().all()
