"""States of random generators in a form that checkpoints hold, also those that are loaded with ``weights_only``."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .variants import Generator


def state_of(generator: Generator | None) -> Any:
    """None for no generator."""
    if generator is None:
        return None
    if isinstance(generator, np.random.Generator | np.random.RandomState):
        return _held(_numpy_state(generator))
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_state(generator: Generator | None, state: Any) -> None:
    """Let a generator go on where ``state_of`` found one.

    Raises:
        ValueError: the state is that of another kind of generator, or there is one and no state, or the reverse.
    """
    if isinstance(generator, random.Random) and isinstance(state, tuple | list):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif isinstance(generator, torch.Generator) and isinstance(state, torch.Tensor):
        generator.set_state(state.cpu())
    elif isinstance(generator, np.random.Generator | np.random.RandomState) and isinstance(state, Mapping):
        given = _given(state, _numpy_state(generator))
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = given
        else:
            generator.set_state(given)
    elif generator is not None or state is not None:
        raise ValueError(
            f"a state that is a {type(state).__name__} does not fit a generator that is a {type(generator).__name__}: "
            "give the method the kind of generator that the checkpoint was made with"
        )


def _numpy_state(generator: np.random.Generator | np.random.RandomState) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def _held(state: Any) -> Any:
    """A state of NumPy's with tensors for its arrays."""
    if isinstance(state, Mapping):
        return {key: _held(value) for key, value in state.items()}
    return torch.from_numpy(state.astype(np.int64)) if isinstance(state, np.ndarray) else state


def _given(state: Any, like: Any) -> Any:
    """A state as NumPy has them, its arrays as those of a state of the same kind.

    Raises:
        ValueError: it is that of another kind.
    """
    if isinstance(state, Mapping) and isinstance(like, Mapping):
        if set(state) != set(like):
            raise ValueError(f"the state of this kind of generator has the keys {sorted(like)}; found {sorted(state)}")
        return {key: _given(value, like[key]) for key, value in state.items()}
    return state.cpu().numpy().astype(like.dtype) if isinstance(state, torch.Tensor) else state


def global_states() -> dict[str, Any]:
    """Of Python's, NumPy's and torch's global generators, and of each CUDA device's where there are any."""
    numpy: Any = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_global_states(states: Mapping[str, Any]) -> None:
    """Let the global generators go on where ``global_states`` found them."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
