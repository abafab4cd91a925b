"""What is known of graphs that were run before, and of the hooks that somebody may have registered since.

A graph does not show hooks on tensors. Their absence is inferred: none was registered since before its first node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any

from torch.autograd.graph import Node

from .._graph import leaf_of
from .._torch import hooks_registered, nodes_made


class Known:
    """Of a graph's weights, by index: of which factors were compared and right, and why others are not to be used."""

    def __init__(self) -> None:
        self.right: set[int] = set()
        self.wrong: dict[int, str] = {}
        self.stacked: bool | None = None
        """Whether stacked gradients were compared, and right."""


class _Seen:
    """What is known of graphs that were run before, as long as nobody else registers a hook on anything.

    There is no lock, which a call that is cut off could leave locked. Threads may lose counts of our own hooks to each
    other, never count one too many; then all is looked at anew.

    Attributes:
        hooks: how many there had been, and ours since.
        since: for each thread the first node that is newer.
        graphs: by what they look like.
    """

    def __init__(self) -> None:
        self.hooks = hooks_registered()
        self.since: dict[int, int] = {}
        self.graphs: dict[int, Known] = {}


_MOST = 256
"""Graphs of which something is known."""
_seen = _Seen()
_unsure: dict[int, int] = {}


def known(signature: int) -> Known:
    """Of a graph, by what it looks like."""
    global _seen
    seen = _seen
    if hooks_registered() != seen.hooks or len(seen.graphs) > _MOST:
        seen = _seen = _Seen()
    seen.since.setdefault(get_ident(), nodes_made())
    return seen.graphs.setdefault(signature, Known())


def unsure_steps(signature: int, is_unsure: bool) -> int:
    """In how many steps of a graph, up to this one, there may have been hooks that cannot be seen."""
    before = _unsure.pop(signature, 0)
    if not is_unsure:
        return 0
    _unsure[signature] = before + 1
    if len(_unsure) > _MOST:
        _unsure.pop(next(iter(_unsure)), None)
    return before + 1


def register(registering: Callable[..., Any], hook: Callable[..., None]) -> Any:
    """A hook of ours, which does not count. Cut off in between, it counts."""
    seen = _seen  # as it is before: one that is made in between may have counted the hook already
    handle = registering(hook)
    seen.hooks += 1
    return handle


def are_without_hooks(nodes: Iterable[Node]) -> bool:
    """Whether nobody can have registered a hook on these: each was made in this thread since hooks were counted.

    Those that add to a leaf's ``.grad`` have no age, and count as new.
    """
    since, born = _seen.since.get(get_ident()), [node._sequence_nr() for node in nodes if leaf_of(node) is None]
    return since is not None and (not born or (since <= min(born) and max(born) < nodes_made()))


def has_hooks(node: Node) -> bool:
    """Whether somebody has registered hooks on a node; those on a tensor cannot be found so."""
    return _has_others(node.register_prehook) or has_post_hooks(node)


def has_post_hooks(node: Node) -> bool:
    return _has_others(node.register_hook)


def _has_others(registering: Callable[..., Any]) -> bool:
    """Whether there are hooks besides one that is registered and removed here."""
    handle = register(registering, lambda *_: None)
    count = len(handle.hooks_dict_ref())
    handle.remove()
    return count > 1
