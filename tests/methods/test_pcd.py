"""PCD: TorchJD's numbers over steps, the oracle's by trying which constraints bind, and what these promise."""

import pytest
import torch

from fastpcgrad import reference
from fastpcgrad.methods import PCD
from tests.methods import contract
from tests.methods.properties import given, integer_rows, prop, st
from tests.methods.random_rows import error, gram, random_rows


def test_it_is_torchjds_over_steps():
    theirs = pytest.importorskip("torchjd.aggregation").PCD
    compared = 0
    for run in range(60):
        tau = 0.1 if run % 2 else torch.tensor([0.0, 0.5, 0.02], dtype=torch.float64)
        ours, peer = PCD(tau, 0.9, 1e-8), theirs(tau, 0.9)
        for step in range(4):
            rows = random_rows(4 * run + step, 4, 4, powers=(-1, 3))
            weights = ours.weights(gram(rows))
            assert error(weights @ rows, peer(rows), weights, rows) <= 1e-8, (run, step)
            compared += 1
    assert compared >= 200


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.7])
def test_it_is_the_oracles(tau):
    for seed in range(90):
        rows = random_rows(seed, 1, 5)
        expected = reference.pcd(rows, rows.square().sum(dim=1).tolist(), [tau] * 4)
        found = PCD(tau).weights(gram(rows))
        assert error(found @ rows, expected @ rows, expected, rows) <= 1e-9, seed


def test_many_tasks():
    rows = random_rows(0, 40, 40, ("conflicting",))
    check_shares(PCD(0.05).weights(gram(rows)), rows, 0.05)


def check_shares(weights, rows, tau):
    """d is along ĝ_0 + Σ μ_j ĝ_j with μ ≥ 0, whose shares hold, and bind where μ_j > 0; as long as g_0."""
    units = torch.nn.functional.normalize(rows, eps=0).nan_to_num()
    multiples = weights * rows.norm(dim=1) / (weights[0] * rows[0].norm())
    d = multiples @ units
    slack = (units @ d - tau)[1:][rows[1:].any(dim=1)]
    bound = multiples[1:][rows[1:].any(dim=1)]
    size = float(multiples.sum())
    assert bound.min() >= 0 and float(slack.min()) >= -1e-9 * size
    assert float((slack * bound).abs().max()) <= 1e-9 * size**2
    torch.testing.assert_close((weights @ rows).norm(), rows[0].norm())


@prop
@given(rows=integer_rows(), tau=st.sampled_from([0.0, 0.1, 1.0]))
def test_every_task_gets_its_share_or_the_main_gradient_is_followed(rows, tau):
    weights = PCD(tau).weights(gram(rows))
    if not weights.any():
        return  # the main gradient is zero, or what is left of it
    if len(rows) == 1 or not weights[1:].any():
        assert weights[0] == pytest.approx(1)
    else:
        check_shares(weights, rows, tau)


def test_lengths_of_the_other_gradients_do_not_matter():
    scales = torch.tensor([1.0, 1e-6, 30.0, 1e4], dtype=torch.float64)[:, None]
    plain, scaled = PCD(0.3), PCD(0.3)
    for seed in range(4):
        rows = random_rows(seed, 4, 4, ("plain", "conflicting"))
        found = scaled.weights(gram(scales * rows)) @ (scales * rows)
        torch.testing.assert_close(found, plain.weights(gram(rows)) @ rows)


def test_a_task_has_its_own_share_and_average_by_its_index():
    rows = [random_rows(seed, 3, 3, ("plain",), (0, 1))[:, :3] for seed in range(3)]
    rows = [torch.nn.functional.pad(row, (0, 9)) for row in rows]
    surgery = contract.Surgery(PCD([0.1, 0.9], beta=0.5), 3)
    averages, steps = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for step, present in enumerate(([0, 2], [0, 1], [0, 1, 2])):
        surgery.merge({t: rows[step][t] for t in present})
        averages[present] = 0.5 * averages[present] + 0.5 * rows[step][present].square().sum(dim=1)
        steps[present] += 1
        means = (averages / (1 - 0.5**steps))[present].tolist()
        shares = [[0.1, 0.9][t - 1] for t in present[1:]]
        expected = reference.pcd(rows[step][present], means, shares) @ rows[step][present]
        torch.testing.assert_close(surgery.parameter.grad, expected)
    with pytest.raises(ValueError, match="PCD has task 0 as its main task, which is absent"):
        surgery.merge({1: rows[0][1]})


def test_shares_that_exclude_each_other_are_given_up():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
    assert PCD(0.1).weights(gram(rows)).tolist() == [1.0, 0.0, 0.0]
    assert PCD(0.0).weights(gram(rows)).tolist() == [1.0, 0.0, 0.0]


def test_nothing_is_left_of_a_gradient_between_its_opposites():
    rows = torch.tensor([[1.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)
    assert PCD(0.0).weights(gram(rows)).tolist() == [0.0, 0.0]
    assert PCD().weights(torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))).tolist() == [0.0, 0.0]


def test_a_resumed_run_goes_on_with_the_same_numbers():
    method, resumed = PCD(), PCD()
    for seed in range(3):
        method.weights(gram(random_rows(seed, 4, 4)))
    resumed.load_state_dict(method.state_dict())
    for seed in range(3, 6):
        matrix = gram(random_rows(seed, 4, 4))
        assert torch.equal(resumed.weights(matrix), method.weights(matrix))
    method.reset()
    assert method.state_dict() == {"averages": None, "steps": None} and method.known_tasks == 0
    with pytest.raises(ValueError, match="the state of PCD has the keys averages and steps"):
        method.load_state_dict({})


def test_the_contract():
    contract.check_batch_is_a_loop(PCD)
    contract.check_not_finite_stays_in_its_problem(PCD)
    contract.check_scaled_gradients_give_the_same_weights(PCD)
    contract.check_surgery(PCD)
    contract.check_bad_grams_are_refused(PCD)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"tau": 1.5}, ValueError, ["tau", "1.5"]),
        ({"tau": float("nan")}, ValueError, ["tau", "nan"]),
        ({"tau": [0.1, -0.1]}, ValueError, ["tau", "-0.1"]),
        ({"tau": "all"}, TypeError, ["tau", "all"]),
        ({"beta": 1.0}, ValueError, ["beta", "1.0"]),
        ({"eps": -1.0}, ValueError, ["eps", "-1.0"]),
    ],
)
def test_bad_arguments(arguments, kind, words):
    with pytest.raises(kind) as caught:
        PCD(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_shares_of_another_number_of_tasks():
    with pytest.raises(ValueError, match=r"tau has 2 numbers.*found 2 tasks"):
        PCD([0.1, 0.2]).weights(torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"tau has 2 numbers.*found task 3"):
        PCD([0.1, 0.2]).solve_for(torch.eye(2, dtype=torch.float64), [0, 3])
    assert repr(PCD([0.1, 0.2])) == "PCD(tau=[0.1, 0.2], beta=0.999, eps=0.0)"
