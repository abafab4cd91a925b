"""IMTL-L: learned scales bring the losses to one size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .learned_exponents import LearnedExponents


class IMTLL(LearnedExponents):
    """L_i becomes e^(s_i) L_i − s_i with a learned s_i, which starts at 0 and settles where e^(s_i) L_i is 1.

    The loss half of IMTL. The whole of it is these losses, merged by ``methods.IMTLG``:
    ``optimizer.pc_backward(balancer(losses))`` with ``PCGrad(..., method=fastpcgrad.methods.IMTLG())``. It is twice
    ``UncertaintyWeighting`` with s for −s.

    The s_i are learned with the network, by any optimizer; see ``UncertaintyWeighting`` for where they belong in
    surgery.

    Args:
        num_tasks, tasks, process_group: see ``Balancer``.
    Attributes:
        log_scale: s, a parameter ``[T]``.
        weights: e^s, detached.
    Numerics: losses should be > 0: where L_i stays at or below 0, e^(s_i) L_i − s_i has no minimum and s_i rises
        without end. A loss that is not finite: see ``UncertaintyWeighting``.
    Source: Liu et al. 2021, Towards Impartial Multi-task Learning, ICLR, sec. 3.2. Oracle: ``reference.imtl_l``.
    Example:
        >>> balancer = fastpcgrad.balancing.IMTLL(2)
        >>> optimizer = torch.optim.SGD(balancer.parameters(), lr=0.1)
        >>> sum(balancer([torch.tensor(3.0), torch.tensor(1.0)])).backward()
        >>> optimizer.step()  # s_i moves by −0.1 (L_i − 1)
        >>> balancer.log_scale.data
        tensor([-0.2000,  0.0000])
    """

    factor = 1.0

    def __init__(
        self,
        num_tasks: int | None = None,
        *,
        tasks: Sequence[str] | int | None = None,
        process_group: object = "auto",
    ) -> None:
        super().__init__(num_tasks, process_group, tasks=tasks)
        self.log_scale = nn.Parameter(torch.zeros(self.num_tasks))

    @property
    def exponents(self) -> Tensor:
        return self.log_scale
