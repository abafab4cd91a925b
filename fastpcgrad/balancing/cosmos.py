"""COSMOS: a weighted sum of the losses, and a reward for losses in the proportion of the preferences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType

from torch import Tensor

from .base import all_finite
from .scalarization import Scalarization, preferences


class COSMOS(Scalarization):
    """Weights whose weighted sum of losses has the gradient of Σ_i r_i L_i − λ cos(r, L), and Σ_i r_i L_i as its value.

    That is w_i = r_i − λ (r̂_i − cos(r, L) L̂_i) / ‖L‖, with hats for unit vectors. A weight is negative where a loss
    is so small a part of all that its growth would bring them nearer to r.

    One network for a whole Pareto front draws r anew for each step, from a Dirichlet distribution, and takes r as a
    further input: ``balancer.preference = torch.distributions.Dirichlet(torch.ones(T)).sample()``.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
        lambda_: λ >= 0, in the unit of the losses times r; 0 is the weighted sum alone. The paper takes 0.01 to 8, as
            the data ask.
        preference: r, T numbers >= 0, of which one is > 0; None: 1/T each.
    Attributes:
        preference: r, a buffer; whatever is assigned is looked at as the argument is.
        weights: those of the last call whose losses were finite; r before it.
    Raises:
        ValueError: ``lambda_`` or a preference out of range, or not T numbers. From a call with λ > 0: losses that are
            all 0, which have no direction; see ``Balancer`` for when.
    Numerics: losses may have any sign, and a size whose square overflows.
    Source: Ruchte and Grabocka 2021, Scalable Pareto Front Approximation for Deep Multi-Objective Learning,
        arXiv:2103.13392, eq. 5. Oracle: ``reference.cosmos``.
    Example:
        >>> balancer = fastpcgrad.balancing.COSMOS(2, lambda_=1.0, preference=[0.5, 0.5])
        >>> balancer(torch.tensor([3.0, 1.0])).sum()  # 0.5 · 4: turning L does not change its length
        tensor(2.)
        >>> balancer.weights
        tensor([0.5447, 0.3658])
    """

    preference: Tensor
    given = MappingProxyType({"preference": preferences})

    def __init__(
        self,
        num_tasks: int | None = None,
        lambda_: float = 1.0,
        preference: Iterable[float] | Tensor | None = None,
        *,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        if not 0 <= lambda_ < float("inf"):
            raise ValueError(f"lambda_ must be a finite number >= 0; found {lambda_!r}")
        self.lambda_ = lambda_
        self.register_buffer("preference", preferences(preference, self.num_tasks))
        self._begin_with(self.preference.clone())

    def slopes(self, losses: Tensor) -> Tensor:
        if not self.lambda_:
            return self.preference
        wanted = self.preference / self.preference.norm()
        largest = losses.abs().max()
        scaled = losses / largest
        length = scaled.norm()
        unit = scaled / length
        turned = (wanted - (wanted @ unit) * unit) / length / largest
        slopes = self.preference - self.lambda_ * turned
        self._refusals.refuse(~slopes.isfinite() & all_finite(losses), (losses,), _why_not)
        return slopes

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lambda_={self.lambda_}"


def _why_not(task: int, values: list[float]) -> str:
    return (
        f"losses[{task}] is {values[0]:.6g}, as small as all others: COSMOS takes the angle between losses and "
        "preferences, which losses of 0 do not have; STCH takes such losses"
    )
