"""The published PCGrads that ``variants.RELATIVES`` names, against the rules of their sources."""

import copy
import random

import numpy as np
import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, variants

PROBLEMS = 200


def cagrads(rows, rng):
    """Cranial-XIX/CAGrad (commit c691dc5), cityscapes/utils.py: all rows at once, a column of orders at a time."""
    tasks = len(rows)
    shuffled = np.zeros((tasks, tasks - 1), dtype=int)
    for i in range(tasks):
        indices = np.arange(tasks)
        indices[i] = indices[-1]
        shuffled[i] = indices[:-1]
        rng.shuffle(shuffled[i])
    normalized = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
    projected = rows.clone()
    for indices in shuffled.T:
        dot = (projected * normalized[indices]).sum(dim=1, keepdim=True)
        projected -= torch.clamp_max(dot, 0) * normalized[indices]
    return projected.mean(dim=0)


def projected_in_turn(rows, eps):
    """What tensor2robot and SamsungLabs/MTL do with rows that they have shuffled."""
    merged = torch.zeros_like(rows[0])
    for grad in rows:
        for other in rows:
            share = torch.sum(grad * other) / (torch.sum(other * other) + eps)
            grad = grad - torch.clamp_max(share, 0) * other
        merged += grad
    return merged


def tensor2robots(rows, source):
    """google-research/tensor2robot (commit 034f49c), research/qtopt/pcgrad.py, of one variable."""
    shuffled = list(rows)
    source.shuffle(shuffled)
    return projected_in_turn(shuffled, 1e-5)


def samsunglabs(rows, source):
    """SamsungLabs/MTL (commit 3f577f1), code/optim/pcgrad/solver.py."""
    return projected_in_turn(list(rows[torch.randperm(len(rows), generator=source)]), 1e-5)


def libmtls(rows, source):
    """LibMTL 1.1.5, weighting/PCGrad.py."""
    projected = rows.clone()
    for i in range(len(rows)):
        indices = list(range(len(rows)))
        source.shuffle(indices)
        for j in indices:
            dot = torch.dot(projected[i], rows[j])
            if dot < 0:
                projected[i] -= dot * rows[j] / rows[j].norm().pow(2)
    return projected.sum(dim=0)


def once_by_numpy(rows, source):
    """As codes do that shuffle their losses with NumPy and then follow the TensorFlow original."""
    indices = np.arange(len(rows))
    source.shuffle(indices)
    return projected_in_turn(list(rows[indices]), 0.0)


RULES = {
    "cagrad": (cagrads, np.random.default_rng),
    "tensor2robot": (tensor2robots, random.Random),
    "samsunglabs": (samsunglabs, lambda seed: torch.Generator().manual_seed(seed)),
    "libmtl-1.1.5": (libmtls, random.Random),
    "tensorflow": (once_by_numpy, np.random.RandomState),
}
for_every_rule = pytest.mark.parametrize("name", RULES)


def method_of(name, generator):
    return methods.PCGrad(name, generator=generator, order="once" if name == "tensorflow" else None)


def state_of(generator):
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return [part.tolist() if isinstance(part, np.ndarray) else part for part in generator.get_state()]
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state().tolist()


def problem(seed):
    """Two to nine task gradients, most of which conflict, short ones among them, whose guards count."""
    source = torch.Generator().manual_seed(seed)
    tasks = 2 + seed % 8
    rows = torch.randn(tasks, 6, generator=source, dtype=torch.float64) * (1e-4 if seed % 3 == 0 else 1.0)
    if seed % 10 == 0:
        rows[0] = 0.0
    return rows


def test_every_relative_has_a_rule():
    assert set(variants.RELATIVES) == set(RULES) - {"tensorflow"}


@for_every_rule
def test_it_gives_the_originals_numbers_and_leaves_its_generator_in_its_state(name):
    rule, seeded = RULES[name]
    differ = 0
    for seed in range(PROBLEMS):
        rows, mine, originals = problem(seed), seeded(seed), seeded(seed)
        if name == "tensorflow":
            rows = rows + 1e-3 * (rows == 0)  # the original makes NaN of a zero gradient
        expected = rule(rows, originals)
        weights = method_of(name, mine).weights(rows @ rows.mT)
        assert state_of(mine) == state_of(originals), seed
        scale = float((weights.abs() * rows.norm(dim=1)).sum())
        assert float((weights @ rows - expected).norm()) <= 1e-12 * scale, seed
        plain = methods.PCGrad(generator=torch.Generator().manual_seed(seed)).weights(rows @ rows.mT) @ rows
        differ += bool((plain - expected).norm() > 1e-6 * expected.norm())
    assert differ > PROBLEMS // 2


@for_every_rule
def test_it_steps_an_optimizer(name):
    """Two parameters that all tasks touch, which are one problem, or one each; and a head."""
    rule, seeded = RULES[name]
    shared = [torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    head = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    source = torch.Generator().manual_seed(2)
    rows = torch.randn(4, 8, generator=source, dtype=torch.float64)
    losses = [(shared[0] * row[:4]).sum() + (shared[1] * row[4:]).sum() for row in rows]
    losses[0] = losses[0] + head.sum()
    order = {"order": "once"} if name == "tensorflow" else {}
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD([*shared, head], lr=0.1), variant=name, generator=seeded(3), **order)
    optimizer.pc_backward(losses)
    if variants.get(name).scope == "parameter":
        expected = [rule(part, seeded(3)) for part in rows.split(4, dim=1)]
        assert head.grad is None
    elif variants.get(name).scope == "shared":
        expected = rule(rows, seeded(3)).split(4)
        torch.testing.assert_close(head.grad, torch.ones(2, dtype=torch.float64))
    else:
        with_head = torch.cat([rows, torch.zeros(4, 2)], dim=1)
        with_head[0, 8:] = 1.0
        *expected, own = rule(with_head, seeded(3)).split([4, 4, 2])
        torch.testing.assert_close(head.grad, own)
    torch.testing.assert_close([p.grad for p in shared], list(expected))


@pytest.mark.parametrize("generator", [random.Random, np.random.default_rng, np.random.RandomState, torch.Generator])
@pytest.mark.parametrize("order", ["fixed", "once", "fresh", "cumulative", "others"])
def test_orders_are_permutations(order, generator):
    variant = variants.get("paper").ordered(order)
    found = variant.draw_order(6, generator())
    assert torch.equal(found.sort(dim=1).values, torch.arange(6).repeat(6, 1))
    alike = bool((found == found[0]).all())
    assert alike == (order in ("fixed", "once"))
    if order == "others":
        assert torch.equal(found[:, -1], torch.arange(6))
    several = variant.draw_orders(6, 3, generator())
    assert several.shape == ((6, 6) if alike else (3, 6, 6))


def test_without_a_generator_each_draws_from_the_originals():
    random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), torch.get_rng_state(), state_of(np.random.mtrand._rand)
    rows = problem(7)
    for name in ("cagrad", "tensor2robot", "samsunglabs"):
        before = random.getstate(), torch.get_rng_state()
        methods.PCGrad(name).weights(rows @ rows.mT)
        changed = random.getstate() != before[0], not torch.equal(torch.get_rng_state(), before[1])
        assert changed == (name == "tensor2robot", name == "samsunglabs")
    assert state_of(np.random.mtrand._rand) == states[2]
    random.setstate(states[0])
    assert methods.PCGrad("tensorflow", order="once").variant.source == "python"


@pytest.mark.parametrize("make", [np.random.default_rng, np.random.RandomState, lambda seed: _philox(seed)])
def test_a_resumed_surgery_draws_what_the_first_would(make, tmp_path):
    parameter = torch.zeros(3, requires_grad=True)
    first = fastpcgrad.GradientSurgery([parameter], 2, methods.PCGrad("cagrad", generator=make(1)))
    methods.PCGrad("cagrad", generator=first.method.generator).weights(torch.eye(5).double())
    torch.save(first.state_dict(), tmp_path / "state")
    second = fastpcgrad.GradientSurgery([parameter], 2, methods.PCGrad("cagrad", generator=make(2)))
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    orders = [variants.get("cagrad").draw_order(9, surgery.method.generator) for surgery in (first, second)]
    assert torch.equal(*orders)
    other = fastpcgrad.GradientSurgery([parameter], 2, methods.PCGrad("cagrad", generator=random.Random(1)))
    with pytest.raises(ValueError, match="does not fit a generator"):
        other.load_state_dict(first.state_dict())
    foreign = fastpcgrad.GradientSurgery([parameter], 2, methods.PCGrad("cagrad", generator=_sfc(1)))
    with pytest.raises(ValueError):
        foreign.load_state_dict(first.state_dict())


def _philox(seed):
    return np.random.Generator(np.random.Philox(seed))


def _sfc(seed):
    return np.random.Generator(np.random.SFC64(seed))


@pytest.mark.parametrize("call", [fastpcgrad.pcgrad, fastpcgrad.pcgrad_])
def test_packed_rows_have_all_but_cagrads_guard(call):
    rows = problem(5)
    before = rows.clone()
    with pytest.raises(ValueError, match=r"variant='cagrad' divides by .*methods\.PCGrad\('cagrad'\)\.weights\(gram"):
        call(rows, variant="cagrad")
    assert torch.equal(rows, before)
    for name in set(RULES) - {"cagrad", "tensorflow"}:
        rule, seeded = RULES[name]
        found = call(before.clone(), variant=name, generator=seeded(4))
        merged = found if found.dim() == 1 else found.sum(dim=0)
        torch.testing.assert_close(merged, rule(before, seeded(4)))


def test_cagrads_guard_in_every_door():
    rows, generator = problem(4), np.random.default_rng(3)
    expected = cagrads(rows, copy.deepcopy(generator))
    parameter = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    losses = [(parameter * row).sum() for row in rows]
    surgery = fastpcgrad.GradientSurgery([parameter], len(rows), methods.PCGrad("cagrad", generator=generator))
    start = copy.deepcopy(generator.bit_generator.state)
    for _ in range(2):  # the second round of a small model takes the short way where there is one
        generator.bit_generator.state = start
        surgery.backward(losses, retain_graph=True)
        torch.testing.assert_close(parameter.grad, expected)
    arrays = [{"w": row.numpy()} for row in rows]
    given = {"variant": "cagrad", "generator": np.random.default_rng(3)}
    torch.testing.assert_close(torch.from_numpy(fastpcgrad.apply(arrays, **given)["w"]), expected)


@pytest.mark.parametrize(("eps", "norm_eps"), [(1e-2, None), (None, 1e-1), (1e-2, 1e-1), (0.0, 0.0)])
def test_a_chosen_guard_is_in_the_denominator(eps, norm_eps):
    for seed in range(20):
        rows = problem(seed)
        expected = []
        for i, row in enumerate(rows):
            for j in range(len(rows)):
                dot = torch.dot(row, rows[j])
                if j != i and dot < 0:
                    row = row - dot / ((rows[j].norm() + (norm_eps or 0)) ** 2 + (eps or 0)) * rows[j]
            expected.append(row)
        method = methods.PCGrad("paper", order="fixed", eps=eps, norm_eps=norm_eps)
        torch.testing.assert_close(method.coefficients(rows @ rows.mT) @ rows, torch.stack(expected))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"eps": -1.0}, ["eps", "-1.0"]),
        ({"norm_eps": float("nan")}, ["norm_eps", "nan"]),
        ({"variant": "tensorflow", "norm_eps": 1e-8}, ["norm_eps=1e-08", "tensorflow", "torchjd"]),
        ({"variant": "tensorlogic", "norm_eps": 1e-8}, ["norm_eps=1e-08", "tensorlogic", "torchjd"]),
    ],
)
def test_bad_guards_are_shown(arguments, words):
    with pytest.raises(ValueError) as caught:
        methods.PCGrad(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_bad_orders_are_shown():
    with pytest.raises(
        ValueError, match="order must be one of fixed, once, fresh, cumulative, others or None; found 'x'"
    ):
        methods.PCGrad(order="x")
    with pytest.raises(ValueError, match="order='others' leaves j = i out, which variant='tensorflow' has"):
        methods.PCGrad("tensorflow", order="others")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="order='once'"):
        fastpcgrad.PCGrad(optimizer, method=methods.MGDA(), order="once")
    assert repr(methods.PCGrad("tensorflow", order="once")).endswith("reduction='sum', order='once')")
    assert repr(methods.PCGrad(eps=1e-5)) == "PCGrad(variant='paper', reduction='sum', eps=1e-05)"
