"""Each variant draws as its original does, and gives its original's numbers."""

import random

import numpy as np
import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference, variants
from fastpcgrad.backends import cpu, kernels

VARIANTS = list(variants.VARIANTS)


def replay(name, tasks, shuffle, permute):
    """The orders, drawn by the calls that the original makes."""
    if name == "pytorch-pcgrad":
        items, rows = list(range(tasks)), []
        for _ in range(tasks):
            shuffle(items)
            rows.append(list(items))
        return rows
    if name == "libmtl":
        rows = [list(range(tasks)) for _ in range(tasks)]
        for row in rows:
            shuffle(row)
        return rows
    if name in ("paper", "torchjd"):
        return [permute(tasks) for _ in range(tasks)]
    return [list(range(tasks)) for _ in range(tasks)]


def with_torch(generator=None):
    """(shuffle, permute) as they are with a torch generator."""
    permute = lambda count: torch.randperm(count, generator=generator).tolist()  # noqa: E731

    def shuffle(items):
        items[:] = [items[k] for k in permute(len(items))]

    return shuffle, permute


def with_python(source):
    """(shuffle, permute) as they are with a Python generator."""

    def permute(count):
        items = list(range(count))
        source.shuffle(items)
        return items

    return source.shuffle, permute


def global_states():
    return random.getstate(), torch.random.get_rng_state().tolist()


def restore(states):
    random.setstate(states[0])
    torch.random.set_rng_state(torch.tensor(states[1], dtype=torch.uint8))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_draws_from_the_originals_global_generator_as_the_original_does(name, tasks):
    before = global_states()
    expected = replay(name, tasks, random.shuffle, lambda count: torch.randperm(count).tolist())
    after = global_states()
    restore(before)
    assert variants.get(name).draw_order(tasks).tolist() == expected
    assert global_states() == after


@pytest.mark.parametrize("name", VARIANTS)
def test_draws_from_a_given_python_generator_as_the_original_does(name):
    mine, originals, before = random.Random(7), random.Random(7), global_states()
    expected = replay(name, 5, *with_python(originals))
    assert variants.get(name).draw_order(5, mine).tolist() == expected
    assert mine.getstate() == originals.getstate() and global_states() == before


@pytest.mark.parametrize("name", VARIANTS)
def test_draws_from_a_given_torch_generator_as_the_original_does(name):
    mine, originals = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    before = global_states()
    expected = replay(name, 5, *with_torch(originals))
    assert variants.get(name).draw_order(5, mine).tolist() == expected
    assert torch.equal(mine.get_state(), originals.get_state()) and global_states() == before


@pytest.mark.parametrize("name", VARIANTS)
def test_each_row_of_an_order_is_a_permutation(name):
    order = variants.get(name).draw_order(9)
    assert order.dtype == torch.int64 and order.device.type == "cpu"
    assert torch.equal(order.sort(dim=1).values, torch.arange(9).repeat(9, 1))


@pytest.mark.parametrize("name", VARIANTS)
def test_many_problems_draw_one_after_the_other(name):
    variant, mine, one_by_one = variants.get(name), random.Random(7), random.Random(7)
    found = variant.draw_orders(4, 3, mine).expand(3, 4, 4)
    assert torch.equal(found, torch.stack([variant.draw_order(4, one_by_one) for _ in range(3)]))
    assert mine.getstate() == one_by_one.getstate()
    assert variant.draw_orders(4, None, mine).shape == (4, 4)


SIZES = [(0, 4), (1, 1), (3, 0), (1, 2), (1, 3), (3, 4), (4, 4), (5, 8), (40, 33), (7, 300)]
"""Of permutations: how many, of what; some with an odd number of draws, of which torch gives two at a time."""


@pytest.mark.skipif(cpu.why_unavailable("cpu") is not None, reason="needs the CPU library")
@pytest.mark.parametrize(("count", "size"), SIZES)
@pytest.mark.parametrize("given", [True, False])
def test_the_library_draws_what_torch_draws_and_leaves_its_generator_in_the_same_state(count, size, given):
    assert cpu.draws_as_torch()
    mine, torchs = (torch.Generator().manual_seed(7) if given else None for _ in range(2))
    torch.manual_seed(7)
    expected = [variants.permutations(count, size, torchs) for _ in range(2)], torch.rand(3, generator=torchs)
    torch.manual_seed(7)
    found = [kernels.permutations(count, size, mine) for _ in range(2)], torch.rand(3, generator=mine)
    assert all(map(torch.equal, found[0], expected[0])) and torch.equal(found[1], expected[1])
    assert found[0][0].dtype == torch.int64 and found[0][0].shape == (count, size)


@pytest.mark.skipif(cpu.why_unavailable("cpu") is not None, reason="needs the CPU library")
def test_torch_draws_no_permutation_where_the_library_does(monkeypatch):
    assert cpu.draws_as_torch()

    def refuse(*given, **named):
        raise AssertionError

    monkeypatch.setattr(torch, "randperm", refuse)
    gram = torch.eye(4, dtype=torch.float64)
    for call in (lambda: fastpcgrad.pcgrad(torch.ones(4, 5)), lambda: methods.PCGrad().weights(gram)):
        call()
    methods.GradVac().weights(torch.eye(6, dtype=torch.float64))


def test_another_version_of_torch_may_draw_otherwise(monkeypatch):
    """Then its own numbers are taken."""
    drawn = lambda size, generator=None, device=None: torch.arange(size).roll(1)  # noqa: E731
    monkeypatch.setattr(torch, "randperm", drawn)
    cpu.draws_as_torch.cache_clear()
    try:
        assert torch.equal(kernels.permutations(2, 4, None), torch.tensor([[3, 0, 1, 2]] * 2))
    finally:
        cpu.draws_as_torch.cache_clear()


@pytest.mark.parametrize("order", ["once", "fresh", "cumulative", "others"])
@pytest.mark.parametrize("count", [None, 0, 1, 3])
def test_orders_of_many_problems_are_those_drawn_one_by_one(order, count):
    variant = variants.get("paper").ordered(order)
    mine, one_by_one = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    found = variant.draw_orders(5, count, mine, kernels.permutations)
    single = count is None or order == "once"
    expected = [reference_order(order, 5, one_by_one) for _ in range(1 if single else count)]
    assert found.tolist() == (expected[0] if single else expected)
    assert torch.equal(mine.get_state(), one_by_one.get_state())


def reference_order(order, tasks, generator):
    """By ``torch.randperm``, one row after the other."""
    permuted = lambda items: [items[k] for k in torch.randperm(len(items), generator=generator).tolist()]  # noqa: E731
    items, rows = list(range(tasks)), []
    if order == "once":
        return [permuted(items)] * tasks
    for i in range(tasks):
        if order == "others":
            others = list(range(tasks))
            others[i] = others[-1]
            rows.append([*permuted(others[:-1]), i])
        else:
            items = permuted(items if order == "cumulative" else list(range(tasks)))
            rows.append(items)
    return rows


def generators(kind, seed):
    return random.Random(seed) if kind == "python" else torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["python", "torch"])
def test_gives_the_originals_numbers_with_the_same_seed(backend, name, kind):
    rows = torch.randn(6, 40) + torch.randn(6, 2) @ torch.randn(2, 40)
    # One parameter, so that a scope of each parameter by itself is the same as all.
    (expected,) = reference.merge([[row] for row in rows.double()], [rows[0]], name, generators(kind, 3))
    found = fastpcgrad.pcgrad(rows, variant=name, generator=generators(kind, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    projected = torch.stack(reference.PROJECT[name](list(rows.double()), generators(kind, 3)))
    found = fastpcgrad.pcgrad_(rows.clone(), variant=name, generator=generators(kind, 3))
    torch.testing.assert_close(found.double(), projected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("call", [fastpcgrad.pcgrad, fastpcgrad.pcgrad_])
def test_pcgrad_leaves_the_global_generators_in_the_originals_state(name, call):
    before = global_states()
    replay(name, 5, random.shuffle, lambda count: torch.randperm(count).tolist())
    after = global_states()
    restore(before)
    call(torch.randn(5, 10, generator=torch.Generator()), variant=name)
    assert global_states() == after


@pytest.mark.parametrize("name", VARIANTS)
def test_a_given_order_draws_nothing(name):
    before = global_states()
    fastpcgrad.pcgrad(torch.ones(3, 4), variant=name, order=torch.arange(3).repeat(3, 1))
    assert global_states() == before


@pytest.mark.parametrize("tasks", [1, 2, 5, 9])
def test_torchjd_is_torchjds_aggregator(backend, tasks):
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = torch.randn(tasks, 30, dtype=torch.float64) + torch.randn(30, dtype=torch.float64)
    rows[::2] *= -1
    before = torch.random.get_rng_state()
    expected = aggregation.PCGrad()(rows)
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    found = fastpcgrad.pcgrad(rows, variant="torchjd")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.random.get_rng_state(), after)


def test_the_table_of_variants():
    facts = {
        name: (v.order, v.source, *v.guards, v.reduction, v.partial_sum, v.scope)
        for name, v in variants.VARIANTS.items()
    }
    assert facts == {
        "paper": ("fresh", "torch", False, 0.0, 0.0, "sum", False, "all"),
        "pytorch-pcgrad": ("cumulative", "python", True, 0.0, 0.0, "mean", True, "all"),
        "tensorflow": ("fixed", "none", True, 0.0, 0.0, "sum", False, "all"),
        "torchjd": ("fresh", "torch", False, 0.0, 0.0, "sum", False, "all"),
        "libmtl": ("fresh", "python", True, 1e-8, 0.0, "sum", False, "shared"),
        "tensorlogic": ("fixed", "none", False, 0.0, 1e-8, "mean", False, "parameter"),
    }


@pytest.mark.parametrize("name", ["Paper", "", None, 3, ["paper"]])
def test_an_unknown_variant_is_shown_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"paper, pytorch-pcgrad, .*tensorlogic, .*libmtl-1\.1\.5; found") as raised:
        variants.get(name)
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize("generator", [3, "seed", random, np.random])
def test_what_is_no_generator_is_shown(generator):
    with pytest.raises(TypeError, match=r"torch\.Generator, a random\.Random, .*, or None; found") as raised:
        variants.check_generator(generator)
    assert repr(generator) in str(raised.value)


@pytest.mark.parametrize(
    "generator", [None, random.Random(), torch.Generator(), np.random.default_rng(0), np.random.RandomState(0)]
)
def test_generators_are_accepted(generator):
    variants.check_generator(generator)
