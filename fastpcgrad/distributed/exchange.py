"""What processes say to each other in a surgery: sums of G, the answer that counts, and where each of them is."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from .._blocks import Blocks
from ..methods import Elementwise, Method, Solution
from ..rows.columns import Columns
from .links import Lanes, Link, messenger
from .local_tensors import Place

PATIENCE = timedelta(seconds=10)
"""How long a process that has failed waits for the others to hear of it, before it raises what made it fail."""

_SPREAD = 1e-3
"""By which part of the largest entry G may differ between processes that should have the same gradients."""


class Ahead(Protocol):
    """What processes send before they meet at a point: the same in the same order, but one is further than another."""

    begun: int
    """How many collectives this process has begun since the last point."""

    def catch_up(self, begun: int) -> None:
        """Begin as many, of whatever. Waits for nobody: not all may know yet."""

    def forget(self) -> None:
        """Wait for all, which all processes have begun, and count anew."""


class Rounds:
    """That all processes are at the same point of a round. Five numbers go round at each point.

    They travel through groups of their own, on the host: no device waits for them, and a process that has failed can
    tell the others while these wait in a collective of the model.

    Args:
        groups: see ``Link``.
    Attributes:
        ahead: what this process sends between the points, if anything. Where they meet in any other way than to go on
            with it, all catch up with the one that has begun most, so that nobody waits for a collective that another
            has not begun.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        self._groups = groups
        self._points: list[object] = []
        self.ahead: Ahead | None = None

    @cached_property
    def _link(self) -> Link:
        return Link(list(map(messenger, self._groups)))  # which all of them make together, in their first round

    @property
    def nbytes(self) -> int:
        """See ``Link``."""
        return self._link.nbytes if "_link" in vars(self) else 0

    def arrive(self, point: str, *details: object, goes_on: bool = False) -> bool:
        """Wait for the others at a point of the round.

        Args:
            goes_on: whether what was sent ahead is good as far as this process knows, and it goes on with it.
        Returns:
            whether that holds in all; else all of it is forgotten.
        Raises:
            OutOfStep: one of them has failed, or is at another point or came there another way.
            RuntimeError: whatever the process group raises where one is gone.
        """
        self._points.append((point, details))
        alike = repr((self._points, self.ahead is not None)).encode()
        number = int.from_bytes(hashlib.blake2b(alike, digest_size=7).digest(), "big")
        message = torch.tensor([0, number, -number, int(not goes_on), self._begun])
        failed, most, least, ends, begun = self._link.max_(message).tolist()
        if self.ahead is not None and (failed or ends or most != -least):
            self.ahead.catch_up(begun)
        if failed:
            raise OutOfStep(f"process {failed - 1} has failed in this round of gradient surgery, which ends everywhere")
        if most != -least:
            where = " ".join(map(str, (point, *details)))
            raise OutOfStep(
                "the processes that share parameters are not at the same point of a round of gradient surgery; process "
                f"{torch.distributed.get_rank()} is at: {where}. All must enter the same tasks in the same order, each "
                "as often, with gradients of the same parameters, give None for the same losses, have the same "
                "overlap, and go on from the same checkpoint"
            )
        if self.ahead is not None and ends:
            self.ahead.forget()
        return not ends

    def fail(self) -> None:
        """Tell the others that this process will not come to the next point."""
        lowest = -(1 << 62)
        message = torch.tensor([torch.distributed.get_rank() + 1, lowest, lowest, 1, self._begun])
        with suppress(Exception):  # what made this process fail is what it will raise
            for group in self._link.groups:
                operation = torch.distributed.ReduceOp.MAX
                torch.distributed.all_reduce(message, op=operation, group=group, async_op=True).wait(PATIENCE)
            if self.ahead is not None:
                self.ahead.catch_up(int(message[-1]))

    @property
    def _begun(self) -> int:
        return 0 if self.ahead is None else self.ahead.begun

    def restart(self) -> None:
        """A new round."""
        self._points = []


class OutOfStep(RuntimeError):
    """Another process has failed, or is somewhere else in its round."""


class Exchange:
    """What merging parameters that several processes share has to tell them.

    Args:
        places: for each parameter what this process has of it; None: a plain tensor, alike in all processes.
        in_step: whether all enter the same tasks in the same order, and meet at each; else at the merge alone.
    """

    def __init__(self, places: Sequence[Place | None], *, in_step: bool = True) -> None:
        self._places, self.in_step = places, in_step
        self.link = Link(list(dict.fromkeys(group for place in places if place for group in place.groups)))
        self.rounds = Rounds(self.link.groups)

    @property
    def nbytes(self) -> int:
        """What this process has handed to collectives so far."""
        return self.link.nbytes + self.rounds.nbytes

    def __repr__(self) -> str:
        return " and ".join(dict.fromkeys(place.where for place in self._places if place is not None))

    def send_ahead(self, ahead: Ahead, lanes: Lanes) -> None:
        """Let something be reduced between the points of a round, in all processes."""
        self.link.lanes, self.rounds.ahead = lanes, ahead

    def over(self, columns: Columns) -> Columns:
        """J, of which this process has these columns."""
        return SharedColumns(columns, self.link, self._places)


class JointColumns(Columns):
    """J of which each process has columns of its own. All solve, so that their methods' states go on; the root's answer
    and state count.

    Args:
        columns: of this process.
        link: to those that have the others.
    """

    def __init__(self, columns: Columns, link: Link) -> None:
        parts = columns.tensors, columns.pointers, columns.widths, columns.dtypes, columns.devices
        super().__init__(*parts, columns.touched)
        self._link = link

    @property
    def fused(self) -> Blocks | None:
        return None

    def solve(self, method: Method, gram: Tensor, tasks: Sequence[int]) -> Solution:
        """See ``Columns``."""
        solution = super().solve(method, gram, tasks)
        state = method.state_dict()
        kept = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        weights, coefficients, *states = self._from_root(solution.weights, solution.coefficients, *kept.values())
        assert weights is not None
        if kept:
            method.load_state_dict({**state, **dict(zip(kept, states, strict=True))})
        return Solution(weights, coefficients)

    def _from_root(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """The root's, sent as one."""
        given = [tensor for tensor in tensors if tensor is not None]
        sent = torch.cat([tensor.to(given[0].device).contiguous().view(-1).view(torch.uint8) for tensor in given])
        parts = iter(self._link.from_root_(sent).split([tensor.nbytes for tensor in given]))
        return [
            None if own is None else next(parts).clone().view(own.dtype).view(own.shape).to(own.device)
            for own in tensors
        ]


class SharedColumns(JointColumns):
    """Columns of which processes have parts: one pass sums G over all processes, the other needs nobody.

    Args:
        columns, link: see ``JointColumns``.
        places: see ``Exchange``.
    """

    def __init__(self, columns: Columns, link: Link, places: Sequence[Place | None]) -> None:
        super().__init__(columns, link)
        self._places = places

    def gram(self, problem_of: Sequence[int] | None, problems: int) -> Tensor:
        """See ``Columns``. That of each mesh is summed over it; of the result all take the root's bits."""
        meshes = list(dict.fromkeys(place.groups for place in self._places if place is not None))
        numbers = []
        for index, place in enumerate(self._places):
            problem = 0 if problem_of is None else problem_of[index]
            counts = problem >= 0 and (place is None or place.counts)
            mesh = 0 if place is None else 1 + meshes.index(place.groups)
            numbers.append(mesh * problems + problem if counts else -1)
        tasks = len(self.tensors)
        each = super().gram(numbers, (1 + len(meshes)) * problems).view(-1, problems, tasks, tasks)
        for own, groups in zip(each[1:], meshes, strict=True):
            self._link.sum_(own, groups)
        if None in self._places:
            self._check_alike(each[0])
        return self._link.from_root_(each.sum(dim=0))

    def drawing(self, method: Elementwise) -> Callable[[int], Elementwise]:
        """See ``Columns``. Replicas of a column draw alike, and no two others do."""
        if not method.draws:
            return lambda index: method
        generator, device = method.generator, self.devices[0]
        assert generator is None or isinstance(generator, torch.Generator)
        own = torch.randint(1 << 62, (1,), generator=generator, device=generator.device if generator else device)
        seed = int(self._link.from_root_(own.to(device)))
        drawing = copy.copy(method)

        def seeded(index: int) -> Elementwise:
            place = self._places[index]
            key = repr((seed, index, () if place is None else place.shard)).encode()
            number = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
            drawing.generator = torch.Generator(self.devices[index]).manual_seed(number)
            return drawing

        return seeded

    def _check_alike(self, gram: Tensor) -> None:
        """RuntimeError where plain parameters have other gradients in other processes, which nobody would reduce."""
        most, negated = self._link.max_(torch.stack([gram, -gram]))
        if ((most + negated).abs().amax() > _SPREAD * torch.maximum(most, negated).amax()).item():
            raise RuntimeError(
                "the gradients of parameters that are no DTensors differ between the processes that share the others: "
                "shard or replicate these parameters too, with fully_shard or distribute_module, or give all "
                "processes of a tensor-parallel group the same batch"
            )


class AveragedColumns(JointColumns):
    """Columns whose gradients are averaged later: those at the features of one part of a batch."""

    def gram(self, problem_of: Sequence[int] | None, problems: int) -> Tensor:
        """See ``Columns``: of the whole batch, whose loss is the mean of those of its parts."""
        total = self._link.sum_(super().gram(problem_of, problems)).div_(self._link.size**2)
        return self._link.from_root_(total)


class Averaging:
    """With the processes that have other parts of a batch.

    Args:
        groups: see ``Link``.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        self._link = Link(groups)

    @property
    def nbytes(self) -> int:
        """What this process has handed to collectives so far."""
        return self._link.nbytes

    def over(self, columns: Columns) -> Columns:
        """J, of which this process has these columns."""
        return AveragedColumns(columns, self._link)

    def present(self, there: Sequence[Sequence[bool]], device: torch.device) -> list[list[bool]]:
        """For each task and tensor whether any process has a gradient."""
        return self._link.max_(torch.tensor(there, dtype=torch.int32, device=device)).bool().tolist()
