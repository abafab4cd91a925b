"""What UPGrad and DualProj share: their arguments, and the projection."""

from __future__ import annotations

import torch
from torch import Tensor

from .._modes import is_fake
from .._ops import refuse_capture
from ._task_vector import Preference, TaskVector, preferences, shown, task_vector
from .base import Method
from .solvers.dual_cone import LARGE, project
from .solvers.problems import CompiledSolver, check_gram, compiled


class DualConeMethod(Method):
    """What UPGrad and DualProj share: their arguments, and the projection."""

    def __init__(self, pref_vector: TaskVector | None = None, norm_eps: float = 0.0, reg_eps: float = 1e-4) -> None:
        check_eps(norm_eps, reg_eps)
        self.pref_vector = None if pref_vector is None else task_vector("pref_vector", pref_vector)
        self.norm_eps, self.reg_eps = norm_eps, reg_eps
        self._preference = Preference()

    def _projected(self, gram: Tensor, each: bool) -> Tensor:
        """Each task's preferred vector projected, weights ``[..., T, T]``; or their sum, ``[..., T]``."""
        tasks = check_gram(gram)[-1]
        solver = CompiledSolver("project_each" if each else "project_one", (self.norm_eps, self.reg_eps))
        if tasks <= LARGE or is_fake(gram):
            answers = compiled(solver, gram, self._preference.on(gram.device, self.pref_vector, tasks))
            if answers is not None:
                return answers
        refuse_capture(gram.device)
        wanted = preferences(self.pref_vector, tasks)
        if each:
            return project(gram, torch.diag(wanted), self.norm_eps, self.reg_eps)
        return project(gram, wanted[None], self.norm_eps, self.reg_eps).squeeze(-2)

    def __repr__(self) -> str:
        pref_vector = shown(self.pref_vector)
        return f"{type(self).__name__}(pref_vector={pref_vector}, norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"


def check_eps(norm_eps: float, reg_eps: float) -> None:
    """ValueError unless both are finite and not negative."""
    for name, value in (("norm_eps", norm_eps), ("reg_eps", reg_eps)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative; found {value!r}")
