"""GradVac: task gradients turned until their cosines reach running targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import variants
from .._modes import is_fake, refuse_tracers
from .._ops import to_device
from ..backends import kernels
from ..variants import Generator
from .base import Method, Solution
from .solvers.problems import check_gram, in_place


class GradVac(Method):
    """Turn each task gradient towards those whose cosine with it is below a running target, then sum.

    For each task i and each other j in random order: φ = cos(g_i', g_j); where φ is below its target φ̂_ij, g_j is added
    to g_i' with the factor that makes the cosine φ̂_ij. Then φ̂_ij ← (1 − β) φ̂_ij + β φ.

    State: φ̂, ``[T, T]`` or ``[S, T, T]``, zero at first: a target for each pair of tasks, by their indices. In a
    surgery the targets of absent tasks stay as they are, and a task that is new begins with zeros; in a list of losses
    the index is the place. ``solve`` is not told the indices, so another number of tasks raises there, and another
    number of problems everywhere; ``reset`` starts over. The generator is not part of the state.

    Args:
        beta: β in [0, 1], how fast the targets follow.
        eps: added to ‖g_i'‖‖g_j‖ and to the other denominator, as TorchJD does; not negative. It is absolute: gradients
            with ‖g_i‖‖g_j‖ near it count as orthogonal. With 0 the merged gradient scales with the gradients, zero
            gradients have cosine 0, and a target of exactly 1, which cannot be reached, changes nothing.
        generator: for the order of j, see ``methods.PCGrad``. None: torch's global generator.
            A task draws T − 1 places with ``torch.randperm``, as in TorchJD: the same seed gives the same result.
    Raises:
        TypeError: a generator of another type.
        ValueError: ``beta`` or ``eps`` is out of range. From ``solve``: the state is for another shape.
    Numerics: float64 by the compiled library on the device of G; without one NumPy on a CPU, else torch on that device.
        Nothing waits for it. NaN or inf in G gives NaN weights
        and leaves φ̂ of that problem as it was.
    Source: Wang et al. 2021, Gradient Vaccine, arXiv:2010.05874, Alg. 1. Oracle: ``reference.gradvac``.
    Example:
        >>> G = torch.tensor([[1.0, -0.6], [-0.6, 1.0]], dtype=torch.float64)
        >>> fastpcgrad.methods.GradVac().solve(G).coefficients
        tensor([[1.0000, 0.6000],
                [0.6000, 1.0000]], dtype=torch.float64)
    """

    def __init__(self, beta: float = 0.5, eps: float = 1e-8, generator: Generator | None = None) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1]; found {beta!r}")
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and not negative; found {eps!r}")
        variants.check_generator(generator)
        self.beta = beta
        self.eps = eps
        self.generator = generator
        self.reset()

    def reset(self) -> None:
        """Forget the targets φ̂."""
        self._phi: Tensor | None = None

    @property
    def known_tasks(self) -> int:
        return 0 if self._phi is None else self._phi.shape[-1]

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        if self._phi is not None and self._phi.shape != gram.shape:
            raise self._no_state_for(gram)
        return self.solve_for(gram, range(gram.shape[-1]))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        check_gram(gram)
        refuse_tracers(gram)
        if is_fake(gram):  # the targets are those of real steps
            coefficients = gram.new_empty(gram.shape)
            return Solution(coefficients.sum(-2), coefficients)
        known = self._known(gram, tasks)
        some = to_device(torch.tensor(tasks), gram.device) if len(tasks) < known.shape[-1] else None
        places = to_device(torch.from_numpy(_draw_places(gram.shape, self.generator)), gram.device)
        # A copy whose rows are dense, which a library takes: a state that was loaded need not be.
        phi = (known if some is None else known[..., some[:, None], some]).clone(memory_format=torch.contiguous_format)
        found: Tensor | None = kernels.gradvac(gram.detach(), places, self.beta, self.eps, phi)
        if found is None:
            found, phi = _vaccinated(gram, phi, places, self.beta, self.eps)
        if some is None:
            self._phi = phi
        else:
            self._phi = known.clone()
            self._phi[..., some[:, None], some] = phi
        return Solution(found.sum(-2), found)

    def _known(self, gram: Tensor, tasks: Sequence[int]) -> Tensor:
        """φ̂ of all tasks up to the last of ``tasks`` or more, on the device of ``gram``."""
        count = 1 + max(tasks, default=-1)
        if self._phi is None:
            return gram.new_zeros(*gram.shape[:-2], count, count)
        if self._phi.shape[:-2] != gram.shape[:-2]:
            raise self._no_state_for(gram)
        new = count - self._phi.shape[-1]
        phi = to_device(self._phi, gram.device)
        return torch.nn.functional.pad(phi, (0, new, 0, new)) if new > 0 else phi

    def _no_state_for(self, gram: Tensor) -> ValueError:
        assert self._phi is not None
        found, known = list(gram.shape), list(self._phi.shape)
        return ValueError(f"gram is {found}, the state is for {known}; call reset() when the tasks change")

    def state_dict(self) -> dict[str, Any]:
        """``phi``: φ̂, float64, or None before the first call."""
        return {"phi": None if self._phi is None else self._phi.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` gave.

        Raises:
            ValueError: other keys, or φ̂ is not float64 ``[T, T]`` or ``[S, T, T]``.
        """
        if set(state) != {"phi"}:
            raise ValueError(f"the state of GradVac has the key phi; found {sorted(state)}")
        phi = state["phi"]
        if phi is not None:
            if not isinstance(phi, Tensor):
                raise ValueError(f"phi must be a tensor or None; found {phi!r}")
            if phi.dtype != torch.float64 or phi.dim() not in (2, 3) or phi.shape[-1] != phi.shape[-2]:
                raise ValueError(f"phi must be float64 [T, T] or [S, T, T]; found {phi.dtype} {list(phi.shape)}")
            if not (phi.abs() <= 1).all():
                raise ValueError(f"phi must lie in [-1, 1]; found {phi}")
            phi = phi.detach().clone()
        self._phi = phi

    def __repr__(self) -> str:
        return f"GradVac(beta={self.beta!r}, eps={self.eps!r})"


def _draw_places(shape: torch.Size, generator: Generator | None) -> NDArray[np.int64]:
    """For each task of all problems itself, then the others in random order: ``[S·T, T]``."""
    tasks, rows = shape[-1], shape[:-1].numel()
    own = np.arange(rows)[:, None] % tasks
    others = _permutations(rows, tasks - 1, generator)
    return np.concatenate([own, others + (others >= own)], axis=1)


def _permutations(count: int, size: int, generator: Generator | None) -> NDArray[np.int64]:
    if generator is None or isinstance(generator, torch.Generator):
        return kernels.permutations(count, size, generator).numpy()
    rows = [list(range(size)) for _ in range(count)]
    for row in rows if size > 1 else ():  # of fewer nothing is drawn
        generator.shuffle(row)
    return np.array(rows, dtype=np.int64).reshape(count, size)


def _vaccinated(gram: Tensor, phi: Tensor, places: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    """C and the new φ̂, where no library is; both as they must be for a G that is not finite."""
    xp, array, finite = in_place(gram)
    given = xp.asarray(phi)
    coefficients, targets = _vaccinate(xp, array, given, xp.asarray(places), beta, eps)
    finite = finite[..., None, None]
    coefficients = xp.where(finite, coefficients, xp.nan)
    return torch.as_tensor(coefficients), torch.as_tensor(xp.where(finite, targets, given))


def _vaccinate(xp: Any, gram: Any, phi: Any, places: Any, beta: float, eps: float) -> tuple[Any, Any]:
    """C and the new φ̂, both in the shape of G.

    The rows of C do not depend on each other, so the tasks of all problems take each step together. Nothing here waits
    for a device.

    Args:
        xp: numpy or torch, whichever the arrays are of.
        gram: G, ``[..., T, T]``; phi: φ̂, of the same shape.
        places: ``[R, T]``, R = S·T: the task of each row, then the others in the order of their turns.
    """
    shape, tasks = gram.shape, gram.shape[-1]
    gram = gram.reshape(-1, tasks)
    targets = phi.reshape(-1, tasks) + 0.0
    coefficients = xp.zeros_like(gram)
    own = places[:, 0]
    row = xp.arange(len(gram), device=gram.device)
    first = row - own  # where the problem begins that the row belongs to
    coefficients[row, own] = 1.0
    norms = xp.sqrt(gram[row, own].clip(0.0))
    products = gram + 0.0  # g_i'·g_k
    for turn in range(1, tasks):
        j = places[:, turn]
        other = first + j
        length, other_length = xp.sqrt((products * coefficients).sum(-1).clip(0.0)), norms[other]
        both = length * other_length + eps
        cosine = (products[row, j] / xp.where(both > 0, both, 1.0)).clip(-1.0, 1.0)
        target = targets[row, j]
        sine, target_sine = xp.sqrt(1.0 - cosine * cosine), xp.sqrt(1.0 - target * target)
        across = other_length * target_sine + eps
        turns = (cosine < target) & (across > 0)
        factor = turns * length * (target * sine - cosine * target_sine) / xp.where(across > 0, across, 1.0)
        coefficients[row, j] += factor
        products += factor[:, None] * gram[other]
        targets[row, j] = (1.0 - beta) * target + beta * cosine
    return coefficients.reshape(shape), targets.reshape(shape)
