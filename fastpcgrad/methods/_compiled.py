"""A method whose T×T problem the compiled libraries solve."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from torch import Tensor

from .._modes import is_fake
from .base import Method, Solution
from .solvers.problems import Array, CompiledSolver, check_gram, compiled, from_host, on_host


class CompiledMethod(Method):
    """A method whose problem the compiled libraries solve, on the device of G.

    With the CUDA library nothing waits for the device up to T = 64. ``solve_on_host``, which waits, is for where there
    is no compiled solver: no library, ``FASTPCGRAD_BACKEND=eager``, eigenvalues of more than 16 tasks on a CPU.
    """

    @abstractmethod
    def compiled_solver(self) -> CompiledSolver | None:
        """None: ``solve_on_host`` it is."""

    @abstractmethod
    def solve_on_host(self, gram: Array) -> Array:
        """Weights ``[S, T]`` for finite Gram matrices ``[S, T, T]``, both float64."""

    def preference(self, gram: Tensor) -> Tensor | None:
        """What the solver gets as preferences, on the device of G; None: 1/T each."""
        return None

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        solver = self.compiled_solver()
        answers = None if solver is None else compiled(solver, gram, self.preference(gram))
        if answers is None and is_fake(gram):
            answers = gram.new_empty(gram.shape[:-1])
        if answers is not None:
            return Solution(answers, None)
        problems, finite = on_host(gram)
        weights = self.solve_on_host(problems)
        if not finite.all():
            weights[~finite] = np.nan
        return Solution(from_host(weights, gram), None)
