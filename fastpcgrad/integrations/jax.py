"""apply within ``jax.jit``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental import io_callback

from ..arrays import apply, chosen_method
from ..methods import Method
from ..variants import Generator, Reduction


def merge(
    task_gradients: Iterable[Any],
    *,
    variant: str | None = None,
    method: Method | None = None,
    reduction: Reduction | None = None,
    generator: Generator | None = None,
) -> Any:
    """Merge task gradients that are pytrees of JAX, eagerly or within ``jax.jit``: ``fastpcgrad.apply`` on the host.

    Under ``jit`` the gradients go to the host and the merged one comes back, in each run of the compiled function once
    and in the order of the program, so that methods that draw or keep state do so as in a loop.

    Args:
        task_gradients: T pytrees of the same structure, shapes and dtypes, such as ``jax.grad`` gives for the
            parameters of any model.
        variant, method, reduction, generator: see ``fastpcgrad.apply``; each leaf is a name.
    Returns:
        a pytree like each of them.
    Raises:
        ValueError: no task; pytrees that differ in structure, shapes or dtypes.
        TypeError, ValueError: options that ``fastpcgrad.apply`` refuses, when the function is traced. What it finds in
            the gradients comes within JAX's own error, when the function runs.
        What JAX raises of ordered effects: under ``grad``, under ``vmap``, on several devices.
    Example:
        @jax.jit
        def step(parameters, batch):
            gradients = [jax.grad(loss)(parameters, batch) for loss in losses]
            return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, merge(gradients))
    """
    options: dict[str, Any] = {} if variant is None else {"variant": variant}
    chosen = chosen_method(method=method, reduction=reduction, generator=generator, **options)
    tasks = [jax.tree.flatten(task) for task in task_gradients]
    if not tasks:
        raise ValueError("task_gradients must hold at least one task; found none")
    leaves, structure = tasks[0]
    kinds = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    for t, (own, found) in enumerate(tasks):
        if found != structure:
            raise ValueError(f"task_gradients[{t}] must be {structure}, as the first task is; found {found}")
        for leaf, kind in zip(own, kinds, strict=True):
            if (leaf.shape, leaf.dtype) != (kind.shape, kind.dtype):
                raise ValueError(
                    f"task_gradients[{t}] must have {kind.dtype} {list(kind.shape)} where the first task has it; "
                    f"found {leaf.dtype} {list(leaf.shape)}"
                )

    def on_host(gradients: list[list[Any]]) -> list[Any]:
        merged: list[Any] = apply(jax.device_get(gradients), method=chosen)
        return merged

    return structure.unflatten(io_callback(on_host, kinds, [own for own, _ in tasks], ordered=True))
