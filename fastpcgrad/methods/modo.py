"""MoDo: weights that follow products of the task gradients of two independent batches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._batches import BatchesMethod
from ._count import count
from ._shares import onto_simplex


class MoDo(BatchesMethod):
    """One step of projected gradient descent on ½ ‖λ J‖² a call, without the bias that the products of one batch have.

    λ ← Π(λ − γ (J₁ J₂ᵀ + ρ I) λ), where Π projects onto the simplex. The merged gradient is λ (J₁ + J₂)/2, or λ J₃ of a
    third batch.

    The rows are those of all batches, see ``BatchesMethod``: a surgery of T tasks has 2 T or 3 T rows, and as many
    losses, those of the first batch first. Which batches are independent no code can see; the guarantee needs it.

    State: λ, ``weights``, by the index of the task. In a call where tasks are absent, the others share what is theirs.

    Args:
        num_tasks: T.
        gamma: γ, the step size, positive. It is not relative to the size of the gradients.
        rho: ρ, not negative.
        batches: 2 or 3.
    Raises:
        ValueError: an argument is out of range. When solving, rows that are not those of T tasks in each batch.
    Numerics: float64 on the device of G, for which nothing waits. NaN or inf in G gives NaN weights, and λ stays.
    Source: Chen et al. 2024, Three-Way Trade-Off in Multi-Objective Learning, JMLR 25 (MoDo), eq. 2.9, with the
        regularisation of TorchJD. Oracle: ``reference.modo``.
    Example:
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double().repeat(2, 1)  # the same batch twice
        >>> fastpcgrad.methods.MoDo(num_tasks=2, gamma=0.1, rho=0.0).weights(J @ J.T)
        tensor([0.2875, 0.2125, 0.2875, 0.2125], dtype=torch.float64)
    """

    def __init__(self, num_tasks: int, gamma: float = 0.1, rho: float = 0.1, batches: int = 2) -> None:
        super().__init__(num_tasks, count("batches", batches, 2))
        if batches > 3:
            raise ValueError(f"batches must be 2 or 3; found {batches}")
        if not 0 < gamma < float("inf"):
            raise ValueError(f"gamma must be finite and positive; found {gamma!r}")
        if not 0 <= rho < float("inf"):
            raise ValueError(f"rho must be finite and not negative; found {rho!r}")
        self.gamma, self.rho = gamma, rho

    def share(self, products: Tensor, shares: Tensor, tasks: Sequence[int]) -> Tensor:
        slope = (products @ shares[..., None])[..., 0] + self.rho * shares
        return onto_simplex(shares - self.gamma * slope)

    def weigh(self, shares: Tensor, tasks: Sequence[int]) -> Sequence[Tensor | None]:
        return [shares / 2, shares / 2] if self.batches == 2 else [None, None, shares]

    def __repr__(self) -> str:
        return f"MoDo({self.num_tasks}, gamma={self.gamma!r}, rho={self.rho!r}, batches={self.batches})"
