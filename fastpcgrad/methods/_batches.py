"""Methods whose rows are the task gradients of several independent batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._modes import is_fake
from ._count import count
from ._shares import Shares
from .base import Method, Solution
from .solvers.problems import check_gram


class BatchesMethod(Method):
    """A method that takes products of task gradients of different batches: G₁₂ = J₁ J₂ᵀ, which is a block of G.

    The rows are J₁, J₂ and maybe J₃ one below the other: with T tasks, row b·T + t is the gradient of task t on batch
    b. A surgery is told of as many tasks as there are rows, and its losses are those of the first batch, then those of
    the second, and so on. A task that is absent is absent in all batches.

    State: shares of the tasks, see ``Shares``.

    Args:
        num_tasks: T.
        batches: how many.
    Raises:
        TypeError, ValueError: no integers of at least 1.
        When solving: ValueError for rows that are not b·T, or of tasks that are there in some batches only.
    """

    def __init__(self, num_tasks: int, batches: int) -> None:
        self.num_tasks = count("num_tasks", num_tasks, 1)
        self.batches = batches
        self._shares = Shares()

    def reset(self) -> None:
        """Forget the shares."""
        self._shares = Shares()

    @property
    def known_tasks(self) -> int:
        return self.batches * self.num_tasks

    @abstractmethod
    def share(self, products: Tensor, shares: Tensor, tasks: Sequence[int]) -> Tensor:
        """The next shares ``[..., k]`` of the tasks that are there.

        Args:
            products: J₁ J₂ᵀ, ``[..., k, k]`` float64.
            shares: the last ones, ``[..., k]``.
            tasks: their indices, of T.
        """

    @abstractmethod
    def weigh(self, shares: Tensor, tasks: Sequence[int]) -> Sequence[Tensor | None]:
        """For each batch the weights of its rows ``[..., k]``; None: zeros."""

    def solve(self, gram: Tensor) -> Solution:
        check_gram(gram)
        return self.solve_for(gram, range(gram.shape[-1]))

    def solve_for(self, gram: Tensor, tasks: Sequence[int]) -> Solution:
        check_gram(gram)
        own = self._of_one_batch(list(tasks))
        if is_fake(gram):  # the state is that of real steps
            return Solution(gram.new_empty(gram.shape[:-1]), None)
        given = gram.detach()
        finite = given.isfinite().all(-1).all(-1)[..., None]
        products = torch.where(finite[..., None], given, 0.0)[..., : len(own), len(own) : 2 * len(own)]
        shares = self.share(products, self._shares.of(gram, own), own).where(finite, torch.nan)
        self._shares.put(shares, own)
        none = torch.zeros_like(shares)
        weights = [none.where(finite, torch.nan) if w is None else w for w in self.weigh(shares, own)]
        return Solution(torch.cat(weights, dim=-1), None)

    def _of_one_batch(self, rows: list[int]) -> list[int]:
        """The tasks that are there, of T; ValueError where they are not the same in all batches."""
        total, each = self.batches * self.num_tasks, self.num_tasks
        own = [row for row in rows if row < each]
        if not own or rows != [batch * each + task for batch in range(self.batches) for task in own]:
            raise ValueError(
                f"{type(self).__name__} needs the {each} losses of a batch, then those of the next, {total} in all for "
                f"{self.batches} batches, and the same tasks in each of them; found rows {rows}"
            )
        return own

    def state_dict(self) -> dict[str, Any]:
        """``weights``: the shares, ``[T]`` or ``[S, T]`` float64 of mean 1, or None before the first call."""
        return {"weights": self._shares.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that ``state_dict`` gave.

        Raises:
            ValueError: other keys, or weights that are not float64 ``[T]`` or ``[S, T]``.
        """
        if set(state) != {"weights"}:
            raise ValueError(f"the state of {type(self).__name__} has the key weights; found {sorted(state)}")
        shares = Shares()
        shares.load("weights", state["weights"])
        self._shares = shares
