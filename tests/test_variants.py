"""Each variant draws as its original does, and gives its original's numbers."""

import random

import numpy as np
import pytest
import torch

import fastpcgrad
from fastpcgrad import reference, variants

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
