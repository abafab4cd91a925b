"""What is known of graphs that were run before, and of the hooks that somebody may have registered since.

A graph does not show hooks on tensors. Their absence is inferred: none was registered since before its first node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock, get_ident
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
    """What is known of graphs that were run before, as long as nobody else registers a hook on anything."""

    _MOST = 256

    def __init__(self) -> None:
        self._lock = Lock()
        self._hooks = -1
        self._since: dict[int, int] = {}
        self._graphs: dict[int, Known] = {}
        self._unsure: dict[int, int] = {}

    def known(self, signature: int) -> Known:
        """Of a graph, by what it looks like."""
        with self._lock:
            if hooks_registered() != self._hooks or len(self._graphs) > self._MOST:
                self._graphs.clear()
                self._since.clear()
                self._hooks = hooks_registered()
            self._since.setdefault(get_ident(), nodes_made())
            return self._graphs.setdefault(signature, Known())

    def unsure_steps(self, signature: int, is_unsure: bool) -> int:
        """In how many steps of a graph, up to this one, there may have been hooks that cannot be seen."""
        with self._lock:
            before = self._unsure.pop(signature, 0)
            if not is_unsure:
                return 0
            self._unsure[signature] = before + 1
            if len(self._unsure) > self._MOST:
                del self._unsure[next(iter(self._unsure))]
            return before + 1

    def register(self, register: Callable[..., Any], hook: Callable[..., None]) -> Any:
        """A hook of ours, which does not count. Cut off in between, it counts."""
        with self._lock:
            handle = register(hook)
            self._hooks += 1
            return handle

    def are_newer(self, nodes: Iterable[Node]) -> bool:
        """Whether each of these nodes was made since the hooks were counted, in this thread: then it has none.

        Those that add to a leaf's ``.grad`` have no age, and count as new.
        """
        since, born = self._since.get(get_ident()), [node._sequence_nr() for node in nodes if leaf_of(node) is None]
        return since is not None and all(since <= number < nodes_made() for number in born)


_seen = _Seen()
known, register, unsure_steps = _seen.known, _seen.register, _seen.unsure_steps


def are_without_hooks(nodes: Iterable[Node]) -> bool:
    """Whether nobody can have registered a hook on any of these nodes, but for those of leaves."""
    return _seen.are_newer(nodes)


def has_hooks(node: Node) -> bool:
    """Whether somebody has registered hooks on a node; those on a tensor cannot be found so."""
    return _has_others(node.register_prehook) or has_post_hooks(node)


def has_post_hooks(node: Node) -> bool:
    return _has_others(node.register_hook)


def _has_others(register: Callable[..., Any]) -> bool:
    """Whether there are hooks besides one that is registered and removed here."""
    handle = _seen.register(register, lambda *_: None)
    count = len(handle.hooks_dict_ref())
    handle.remove()
    return count > 1
