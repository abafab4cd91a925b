"""integrations.jax.merge within jit is apply without."""

import random
from functools import partial

import numpy as np
import pytest
import torch

import fastpcgrad
from fastpcgrad import methods


@pytest.fixture(scope="module")
def merge(jax):
    from fastpcgrad.integrations.jax import merge

    return merge


def parameters(jax, width=5, dtype="float32"):
    """As flax has them."""
    jnp = jax.numpy
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "params": {
            "dense": {
                "kernel": jax.random.normal(keys[0], (4, width)).astype(dtype),
                "bias": jnp.zeros(width, dtype),
            },
            "heads": [(jax.random.normal(key, (width,)) / width**0.5).astype(dtype) for key in keys[1:]],
        }
    }


def gradients(jax, params, x):
    """Of two losses that conflict."""
    jnp = jax.numpy

    def losses(params):
        own = params["params"]
        features = jnp.tanh(x @ own["dense"]["kernel"] + own["dense"]["bias"])
        return jnp.stack(
            [jnp.mean((features @ head - sign) ** 2) for head, sign in zip(own["heads"], (3, -3), strict=True)]
        )

    return [jax.grad(lambda p, t=t: losses(p)[t])(params) for t in range(2)]


X = np.random.default_rng(0).standard_normal((8, 4)).astype("f")


def assert_same_bits(jax, found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(np.asarray(one, "float64"), np.asarray(other, "float64"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        dict,
        lambda: {"variant": "paper", "generator": random.Random(1)},
        lambda: {"variant": "libmtl", "reduction": "mean", "generator": torch.Generator().manual_seed(1)},
        lambda: {"method": methods.UPGrad()},
        lambda: {"method": methods.GradDrop(generator=torch.Generator().manual_seed(1))},
    ],
)
def test_within_jit_it_is_apply_on_the_same_gradients(jax, merge, options, dtype):
    tasks = jax.jit(partial(gradients, jax))(parameters(jax, dtype=dtype), X.astype(dtype))
    expected = fastpcgrad.apply(tasks, **options())
    assert_same_bits(jax, merge(tasks, **options()), expected)
    given = options()
    assert_same_bits(jax, jax.jit(lambda tasks: merge(tasks, **given))(tasks), expected)


@pytest.mark.parametrize("make", [methods.GradVac, lambda: methods.PCGrad(generator=random.Random(2))])
def test_a_compiled_training_loop_walks_as_one_by_hand(jax, merge, make):
    """With gradients of a megabyte, and a method that keeps state and one that draws: once a step, in order."""
    method, by_hand = make(), make()
    grads = jax.jit(partial(gradients, jax))

    @jax.jit
    def step(params, x):
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, merge(gradients(jax, params, x), method=method))

    start = params = other = parameters(jax, 60_000)
    for _ in range(3):
        params = step(params, X)
        merged = fastpcgrad.apply(grads(other, X), method=by_hand)
        other = jax.tree.map(lambda p, g: p - 0.01 * g, other, merged)
    found, expected, before = (np.concatenate([x.ravel() for x in jax.tree.leaves(p)]) for p in (params, other, start))
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected - before) > 0
    if by_hand.generator is not None:
        assert method.generator.getstate() == by_hand.generator.getstate() != make().generator.getstate()
    else:
        torch.testing.assert_close(method.state_dict(), by_hand.state_dict(), rtol=1e-5, atol=1e-7)


def test_what_is_refused(jax, merge):
    jnp = jax.numpy
    ones = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="none"):
        merge([])
    with pytest.raises(ValueError, match=r"task_gradients\[1\].*'b'"):
        merge([ones, {"w": jnp.ones(3), "b": jnp.ones(1)}])
    with pytest.raises(ValueError, match=r"task_gradients\[1\].*\[3\].*\[4\]"):
        merge([ones, {"w": jnp.ones(4)}])
    with pytest.raises(ValueError, match="float16"):
        merge([ones, {"w": jnp.ones(3, "float16")}])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"must be float32, bfloat16.*found int"):
        jax.block_until_ready(jax.jit(lambda tasks: merge(tasks))([{"w": jnp.arange(3)}]))
    with pytest.raises(TypeError, match=r"integrations\.jax\.merge"):
        jax.jit(lambda x: fastpcgrad.apply([{"w": x}]))(jnp.ones(3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": methods.MoCo()}, TypeError, "MoCo keeps something of each column"),
        ({"method": "pcgrad"}, TypeError, "must be a fastpcgrad.methods.Method"),
        ({"variant": "none"}, ValueError, "variant must be"),
        ({"method": methods.UPGrad(), "reduction": "sum"}, ValueError, "reduction belongs to a variant"),
    ],
)
def test_options_are_refused_before_anything_runs(jax, merge, options, error, message):
    for within in (jax.jit, lambda function: function):
        with pytest.raises(error, match=message):
            within(lambda x: merge([{"w": x}, {"w": -x}], **options))(jax.numpy.ones(3))
