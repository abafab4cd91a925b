"""Memory of tensors: who else holds that of a gradient, which only then may be taken over; pages for a fresh one."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from itertools import compress, pairwise
from operator import attrgetter

import torch
from torch import Tensor, UntypedStorage

from ._torch import storage_use_count

_ADDRESS = attrgetter("_cdata")
_IS_CPU = attrgetter("is_cpu")


def are_alone(grads: Sequence[Tensor], storages: Sequence[UntypedStorage]) -> bool:
    """Whether nobody but the list ``grads`` holds these tensors, and nobody but them their memory.

    Where this version of torch cannot tell, the answer is no.

    Args:
        grads: strided tensors that were taken from ``.grad``, which is None by now.
        storages: theirs.
    """
    if not grads:
        return True
    return (
        _ALONE is not None
        and _counts(grads, storages) == _ALONE
        # Memory that NumPy, a file or another process may hold, whatever torch's counts say.
        and all(map(UntypedStorage.resizable, storages))
        and not (
            any(map(UntypedStorage.is_shared, storages))  # as all but those on a CPU say of themselves
            and any(map(UntypedStorage.is_shared, compress(storages, map(_IS_CPU, grads))))
        )
    )


def views_alone(grads: Sequence[Tensor]) -> set[int]:
    """The places of those that lie in memory which others of them share and nobody else holds, each in its own part.

    Such are the gradients that came out of one collective: views of what it filled.

    Args:
        grads: dense strided tensors, see ``are_alone``.
    """
    groups: dict[int, list[int]] = {}
    for place, key in enumerate([grad.untyped_storage()._cdata for grad in grads]):
        groups.setdefault(key, []).append(place)
    return {place for places in groups.values() if _is_alone(grads, places) for place in places}


def _is_alone(grads: Sequence[Tensor], places: Sequence[int]) -> bool:
    """Whether these tensors, which share memory, and what they are views of are all that holds it."""
    if _VIEWS_ALONE is None or _counts_of_views(grads, places) != _VIEWS_ALONE:
        return False
    spans = sorted(
        (int(grads[place].storage_offset()) * grads[place].itemsize, grads[place].nbytes) for place in places
    )
    storage = grads[places[0]].untyped_storage()
    return (
        all(start + nbytes <= after for (start, nbytes), (after, _) in pairwise(spans))
        and storage.resizable()
        and not (grads[places[0]].is_cpu and storage.is_shared())
    )


def _counts_of_views(grads: Sequence[Tensor], places: Sequence[int]) -> tuple[set[int], set[int], int, int]:
    """See ``_counts``: of tensors that share memory, of what they are views of, and of the memory without these."""
    assert storage_use_count is not None
    storage = grads[places[0]].untyped_storage()
    bases = list({id(base): base for base in (grads[place]._base for place in places) if base is not None}.values())
    return (
        {sys.getrefcount(grads[place]) for place in places},
        set(map(sys.getrefcount, bases)),
        storage_use_count(storage._cdata) - len(places) - len(bases),
        sys.getrefcount(storage),
    )


Counts = tuple[set[int], set[int], set[int]]


def _counts(grads: Sequence[Tensor], storages: Sequence[UntypedStorage]) -> Counts:
    """How many references there are to each tensor, to its memory, and to Python's name for that.

    The second finds views, DLPack capsules and NumPy arrays; not those who hold the tensor itself, who share its one
    reference to its memory. These the first finds, and the third those who hold ``tensor.untyped_storage()``.
    """
    references, uses = sys.getrefcount, storage_use_count
    assert uses is not None
    return set(map(references, grads)), set(map(uses, map(_ADDRESS, storages))), set(map(references, storages))


def _counts_of_one_alone() -> Counts | None:
    """What ``_counts`` gives for a gradient that nobody else holds, which differs between versions; None: unknown."""
    if storage_use_count is None or not hasattr(UntypedStorage, "_cdata"):
        return None
    parameter = torch.zeros(2, device="cpu", requires_grad=True)
    parameter.grad = torch.ones(2, device="cpu")
    grads = [parameter.grad]
    parameter.grad = None
    return _counts(grads, list(map(Tensor.untyped_storage, grads)))


def _counts_of_views_alone() -> tuple[set[int], set[int], int, int] | None:
    if storage_use_count is None or not hasattr(UntypedStorage, "_cdata"):
        return None
    base = torch.ones(2, device="cpu")
    grads = [base[:1], base[1:]]
    del base
    return _counts_of_views(grads, [0, 1])


_ALONE = _counts_of_one_alone()
_VIEWS_ALONE = _counts_of_views_alone()


_HUGE_FROM = 4 << 20  # bytes; below, a page fault more or less does not matter
_PAGE = 4096
_MADV_HUGEPAGE = 14


def prefer_huge_pages(fresh: Tensor) -> Tensor:
    """Ask Linux to back a large CPU tensor, just allocated, with huge pages; returns the tensor.

    Memory that was never touched costs a page fault every 4 KiB: for a result of 64 MiB more than reading a J of
    512 MiB. It is a hint: where the kernel does not take it, nothing changes.
    """
    if fresh.is_cpu and fresh.nbytes >= _HUGE_FROM and sys.platform == "linux":
        first = -(-fresh.data_ptr() // _PAGE) * _PAGE
        length = (fresh.data_ptr() + fresh.nbytes - first) // _PAGE * _PAGE
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return fresh


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
