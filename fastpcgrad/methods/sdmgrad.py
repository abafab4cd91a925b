"""SDMGrad: MGDA near a preferred direction, from the task gradients of three independent batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._batches import BatchesMethod
from ._count import count
from ._shares import onto_simplex
from ._task_vector import Preference, TaskVector, check_length, shown, task_vector


class SDMGrad(BatchesMethod):
    """Steps of projected SGD on ½ ‖(w + λ w̃) J‖², without the bias that the products of one batch have.

    w ← Π(w − lr·v) with v ← momentum·v + A (w + λ w̃), ``n_iter`` times from the last w on, where A = J₁ J₂ᵀ / s² and s
    is the mean length of the task gradients, √A_tt where that is positive. The merged gradient is
    (w + λ w̃) J₃ / (1 + λ).

    The rows are those of three batches, see ``BatchesMethod``: a surgery of T tasks has 3 T rows, and as many losses,
    those of the first batch first. Which batches are independent no code can see; the guarantee needs it.

    State: w, ``weights``, by the index of the task. In a call where tasks are absent, the others share what is theirs.

    Args:
        num_tasks: T.
        lr, momentum: of the steps; positive, and in [0, 1).
        n_iter: how many; positive.
        lambda_: λ, not negative: 0 is MGDA, more goes to the preferred direction.
        pref_vector: w̃, ``[T]``; None: 1/T each, the mean.
        norm_eps: added to s², as TorchJD does; not negative. It is absolute. With 0 the weights do not change with the
            scale of the gradients; where s is 0 too, w stays.
    Raises:
        TypeError, ValueError: a bad argument; when solving, rows that are not those of T tasks in each batch.
    Numerics: float64 on the device of G, for which nothing waits. NaN or inf in G gives NaN weights, and w stays.
    Source: Xiao, Ban and Ji 2023, Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
        Algorithms, arXiv:2305.18409, Alg. 1, with the scale of their code. Oracle: ``reference.sdmgrad``.
    Example:
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double().repeat(3, 1)
        >>> fastpcgrad.methods.SDMGrad(num_tasks=2, lr=0.1).weights(J @ J.T)[4:]
        tensor([0.8005, 0.1995], dtype=torch.float64)
    """

    def __init__(
        self,
        num_tasks: int,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        pref_vector: TaskVector | None = None,
        norm_eps: float = 1e-8,
    ) -> None:
        super().__init__(num_tasks, batches=3)
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr must be finite and positive; found {lr!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); found {momentum!r}")
        for name, value in (("lambda_", lambda_), ("norm_eps", norm_eps)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative; found {value!r}")
        self.lr, self.momentum, self.lambda_, self.norm_eps = lr, momentum, lambda_, norm_eps
        self.n_iter = count("n_iter", n_iter, 1)
        self.pref_vector = None if pref_vector is None else task_vector("pref_vector", pref_vector)
        if self.pref_vector is not None:
            check_length("pref_vector", self.pref_vector, self.num_tasks)
        self._preference = Preference()

    def share(self, products: Tensor, shares: Tensor, tasks: Sequence[int]) -> Tensor:
        lengths = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        squared = lengths.mean(dim=-1)[..., None, None].square() + self.norm_eps
        scaled = torch.where(squared > 0, products / squared, 0.0)
        pulled = self.lambda_ * self._preferred(shares, tasks)
        velocity = torch.zeros_like(shares)
        for _ in range(self.n_iter):
            velocity = self.momentum * velocity + (scaled @ (shares + pulled)[..., None])[..., 0]
            shares = onto_simplex(shares - self.lr * velocity)
        return shares

    def weigh(self, shares: Tensor, tasks: Sequence[int]) -> Sequence[Tensor | None]:
        pulled = self.lambda_ * self._preferred(shares, tasks)
        return [None, None, (shares + pulled) / (1 + self.lambda_)]

    def _preferred(self, shares: Tensor, tasks: Sequence[int]) -> Tensor:
        """w̃ of the tasks that are there."""
        preference = self._preference.on(shares.device, self.pref_vector, self.num_tasks)
        return torch.full_like(shares, 1 / len(tasks)) if preference is None else preference[list(tasks)]

    def __repr__(self) -> str:
        return (
            f"SDMGrad({self.num_tasks}, lr={self.lr!r}, momentum={self.momentum!r}, n_iter={self.n_iter}, "
            f"lambda_={self.lambda_!r}, pref_vector={shown(self.pref_vector)}, norm_eps={self.norm_eps!r})"
        )
