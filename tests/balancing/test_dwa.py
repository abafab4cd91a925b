"""Dynamic weight average against its formula."""

import math

import pytest
import torch

from fastpcgrad.balancing import DWA


def run(balancer, epochs):
    """The weights of each epoch."""
    weights = []
    for losses in epochs:
        for batch in losses:
            balancer(batch)
        weights.append(balancer.weights.clone())
        balancer.end_epoch()
    return torch.stack(weights)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_weights_are_the_formulas(temperature):
    epochs = torch.rand(6, 4, 3, dtype=torch.float64) + 0.1
    means = epochs.mean(dim=1)
    found = run(DWA(3, temperature).double(), epochs)
    assert (found[:2] == 1).all()
    for e in range(2, 6):
        rates = means[e - 1] / means[e - 2]
        expected = [3 * math.exp(r / temperature) / sum(math.exp(q / temperature) for q in rates) for r in rates]
        torch.testing.assert_close(found[e].tolist(), expected)
    torch.testing.assert_close(found.sum(dim=1), torch.full((6,), 3.0, dtype=torch.float64))


def test_weights_worked_by_hand():
    """Rates 1 and 1 + 2 ln 3 under temperature 2: the second exponential is three times the first."""
    balancer = DWA(2)
    run(balancer, [[torch.tensor([1.0, 1.0])], [torch.tensor([1.0, 1 + 2 * math.log(3)])]])
    torch.testing.assert_close(balancer.weights, torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(balancer(torch.tensor([2.0, 2.0])), torch.tensor([1.0, 3.0]))


def test_calls_in_evaluation_mode_do_not_count():
    epochs = torch.rand(3, 2, 2) + 0.1
    watched, alone = DWA(2), DWA(2)
    for losses in epochs:
        for batch in losses:
            watched(batch)
            alone(batch)
        watched.eval()
        watched(torch.full((2,), 100.0))
        watched.train()
        watched.end_epoch()
        alone.end_epoch()
    assert torch.equal(watched.weights, alone.weights)


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_resumed_run_gives_the_same_numbers(stop, tmp_path):
    """Stopped within an epoch of two batches, and between epochs."""
    batches = torch.rand(8, 2) + 0.1

    def advance(balancer, first, last):
        for i in range(first, last):
            balancer(batches[i])
            if i % 2:
                balancer.end_epoch()

    straight, resumed = DWA(2), DWA(2)
    advance(straight, 0, stop)
    torch.save(straight.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for balancer in (straight, resumed):
        advance(balancer, stop, 8)
    assert torch.equal(straight.weights, resumed.weights)
    assert (straight.weights != 1).all()


def test_a_step_with_a_nan_is_left_out_of_the_mean():
    epochs = torch.rand(6, 2, 2) + 0.1
    with_nan = epochs.clone()
    with_nan[1, 0, 0] = torch.nan
    epochs[1, 0] = epochs[1, 1]
    torch.testing.assert_close(run(DWA(2), with_nan), run(DWA(2), epochs))


def test_an_epoch_without_losses_is_an_error():
    balancer = DWA(2)
    with pytest.raises(RuntimeError, match="without losses"):
        balancer.end_epoch()
    run(balancer, [[torch.ones(2)]])
    with pytest.raises(RuntimeError, match="without losses"):
        balancer.end_epoch()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_temperature_is_named(temperature):
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        DWA(2, temperature)
