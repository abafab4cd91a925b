"""apply: dicts, lists or trees of arrays in, one merged out, in the library that they came from.

Arrays change hands through DLPack. A library is known by the type of the arrays that the caller gives, so none but
NumPy and torch is ever imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, reduce
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import functional
from ._memory import prefer_huge_pages
from .merging.problems import SUMMED, Problems, check_scopes, weights_table
from .methods import Elementwise, Method, PCGrad, Tracking, check_method
from .rows.parameters import UNDIVIDED, Division
from .variants import Generator, Reduction

_DEFAULT_VARIANT = "tensorlogic"


def apply(
    task_gradients: Iterable[Mapping[str, Any] | Sequence[Any]],
    *,
    variant: str = _DEFAULT_VARIANT,
    method: Method | None = None,
    reduction: Reduction | None = None,
    generator: Generator | None = None,
    gram_over: Iterable[Hashable] | None = None,
) -> Any:
    """Merge task gradients that are dicts, lists or trees of arrays, in any library that speaks DLPack.

    Args:
        task_gradients: T dicts, one a task: name → array of NumPy, torch, CuPy, JAX, TensorFlow or another library
            with DLPack, fp16/bf16/fp32/fp64, dense, of any shape and strides. Under one name all tasks have the same
            library, dtype, shape and device; all arrays lie on one device. Not changed. Or T lists or tuples of
            arrays, as TensorFlow's ``tape.gradient`` gives them, or T trees of dicts, lists and tuples: each place is
            a name. None: the task lacks that name, or all below it.
        variant: which published PCGrad, see ``pcgrad``. ``tensorlogic``: each name is a problem of its own, and one
            that any task lacks is left out. The others see one vector over all names: ``libmtl`` sums the names that
            some task lacks; elsewhere what a task lacks counts as zero.
        method: any method instead of a variant; its ``scope`` says what one problem spans.
        reduction: ``sum`` or ``mean`` of the projected gradients; None: the variant's own.
        generator: for the order of the projections, see ``methods.PCGrad``. None: the global generator of the variant's
            original.
        gram_over: names, or what of a tree lies right at the top, that the Gram matrix is made of; the weights reach
            all the same. None: all.
    Returns:
        name → array, of the library, dtype, shape and device that came in: names in the order in which they first
        appear. None shares memory with what was given; together they may lie in one block of memory. Lists, tuples
        and trees come back as such, any mapping as a dict; a name without an array is None where a task has None, and
        left out where it is not there.
    Raises:
        TypeError: no iterable of dicts or lists of arrays, arrays that are not real floating point or that DLPack
            cannot hand over (traced, see ``integrations.jax.merge``; sharded; TensorFlow's ``IndexedSlices``); a method
            or generator of another type.
        ValueError: no task, arrays that differ under one name in more than their values, trees of different shapes,
            arrays on several devices, sparse arrays; unknown variant or reduction; one of them, or a generator,
            together with ``method``; ``gram_over`` with what no task has, empty, or with a method that has no Gram
            matrix over several names, as the default variant.
    Numerics: see ``gram`` and ``combine``. Names of several dtypes are merged in the dtype that holds them all, and
        each is rounded to its own at the end, so float64 keeps its precision. There is no derivative.
    Memory: (T + 1)·N·itemsize bytes for N elements under all names, in the dtype that holds them all; N·itemsize
        remain. NumPy arrays that torch cannot read (negative strides, foreign byte order) are copied once more.
    Source: Yu et al. 2020, arXiv:2001.06782, Alg. 1. Oracle: ``reference.merge``.
    Example:
        >>> import numpy
        >>> one = {"w": numpy.array([[1.0, 0.0]]), "b": numpy.array([1.0])}
        >>> other = {"w": numpy.array([[-1.0, 1.0]]), "b": numpy.array([3.0])}
        >>> fastpcgrad.apply([one, other])
        {'w': array([[0.25, 0.75]]), 'b': array([2.])}
    """
    chosen = chosen_method(variant, method, reduction, generator)
    tasks, first, tree = _read(task_gradients)
    everywhere = {name: all(name in task for task in tasks) for name in first}
    seen = _seen(first, chosen, gram_over)
    names = sorted(first, key=lambda name: (name in seen, everywhere[name]), reverse=True)
    if chosen.scope == "parameter":
        names = [name for name in names if everywhere[name]]
    if not names:
        return tree.filled({})
    ends = list(accumulate(first[name].tensor.numel() for name in names))
    rows = _pack(tasks, {name: first[name].tensor for name in names})
    division = UNDIVIDED if gram_over is None else Division(gram_over=[name in seen for name in names])
    problems = Problems.made(chosen, [everywhere[name] for name in names], division)
    merged = _merge(rows, ends, chosen, problems, names)
    if merged.is_cuda and any(first[name].library is not _TORCH for name in names):
        # Other libraries do not know torch's stream: it must have read their arrays before their owners go on.
        torch.cuda.current_stream(merged.device).synchronize()
    pieces = {name: merged[start:end] for name, start, end in zip(names, [0, *ends], ends, strict=False)}
    return tree.filled({name: first[name].like_this(piece) for name, piece in pieces.items()})


def chosen_method(
    variant: str = _DEFAULT_VARIANT,
    method: Method | None = None,
    reduction: Reduction | None = None,
    generator: Generator | None = None,
) -> Method:
    """What ``apply`` merges by. Raises: see there."""
    if method is None:
        return PCGrad(variant, reduction, generator)
    named = variant if variant != _DEFAULT_VARIANT else None
    for name, value in (("variant", named), ("reduction", reduction), ("generator", generator)):
        if value is not None:
            raise ValueError(f"{name} belongs to a variant and cannot go with method={method!r}; found {value!r}")
    if isinstance(method, Tracking):
        raise TypeError(
            f"{type(method).__name__} keeps something of each column, and apply does not know whether these are those "
            "of the last call: use it in GradientSurgery, PCGrad, backward or grad"
        )
    return check_method(method, PCGrad)


def _seen(names: Collection[_Path], method: Method, gram_over: Iterable[Hashable] | None) -> Collection[_Path]:
    """The names that the Gram matrix looks at."""
    if gram_over is None:
        return names
    check_scopes(method, gram_over)
    if isinstance(gram_over, str) or not isinstance(gram_over, Iterable):
        raise TypeError(f"gram_over must be names; found {gram_over!r}")
    chosen, tops = set(gram_over), {path[0] for path in names}
    if not chosen or chosen - tops:
        raise ValueError(
            f"gram_over must hold at least one of the names {sorted(tops, key=str)} and no other; "
            f"found {sorted(chosen, key=str)}"
        )
    return {path for path in names if path[0] in chosen}


class _Library(NamedTuple):
    """How arrays of one library become torch tensors, without a copy where possible, and come back."""

    name: str
    read: Callable[[Any], Tensor]
    write: Callable[[Tensor, Any], Any]
    """Makes of a tensor, which is nobody else's, an array like the second argument."""


class _Entry(NamedTuple):
    """An array that the caller gave, and the tensor that reads it."""

    array: Any
    library: _Library
    tensor: Tensor

    def agrees_with(self, other: _Entry) -> bool:
        x, y = self.tensor, other.tensor
        same_library = self.library.name == other.library.name
        return same_library and x.dtype == y.dtype and x.shape == y.shape and x.device == y.device

    def like_this(self, piece: Tensor) -> Any:
        """Columns of the merged gradient as an array of this one's library, dtype and shape."""
        return self.library.write(piece.view(self.tensor.shape).to(self.tensor.dtype), self.array)

    def __str__(self) -> str:
        dtype = _dtype_name(self.array.dtype)
        return f"{self.library.name} {dtype} {list(self.tensor.shape)} on {self.tensor.device}"


_Path = tuple[Hashable, ...]
"""Where in a tree: the keys and indices that lead there. What the arguments call a name."""


class _Tree:
    """The places that tasks have together, in dicts, lists and tuples as deep as they go."""

    def __init__(self) -> None:
        self._kinds: dict[_Path, str] = {}
        self._build: dict[_Path, Callable[[dict[Any, Any]], Any]] = {}
        self._keys: dict[_Path, dict[Any, None]] = {}
        self._nones: set[_Path] = set()

    def arrays(self, where: str, node: Any, path: _Path = ()) -> Iterator[tuple[_Path, str, Any]]:
        """The arrays of a task, each with its place and with what errors call it; takes up the places.

        Raises:
            ValueError: a task before has something else there than this one.
        """
        if node is None:
            self._nones.add(path)
            return
        kind, items, build = _opened(node)
        if (before := self._kinds.setdefault(path, kind)) != kind:
            raise ValueError(f"{where} must be {before}, as in a task before; found {kind}")
        if build is None:
            yield path, where, node
            return
        self._build[path] = build
        keys = self._keys.setdefault(path, {})
        for key, below in items.items():
            keys[key] = None
            yield from self.arrays(f"{where}[{key!r}]", below, (*path, key))

    def filled(self, merged: Mapping[_Path, Any], path: _Path = ()) -> Any:
        """The answer: as the tasks are, with the merged arrays."""
        if path not in self._build:
            return merged.get(path)
        below = {key: (*path, key) for key in self._keys[path]}
        return self._build[path](
            {
                key: self.filled(merged, place)
                for key, place in below.items()
                if place in merged or place in self._build or place in self._nones
            }
        )


def _opened(node: Any) -> tuple[str, Mapping[Any, Any], Callable[[dict[Any, Any]], Any] | None]:
    """What a node of a tree is, what lies below it, and what makes one like it; None for an array."""
    if isinstance(node, Mapping):
        return "a dict", node, dict
    if isinstance(node, list):
        return f"a list of {len(node)}", dict(enumerate(node)), lambda below: list(below.values())
    if isinstance(node, tuple):
        make = getattr(type(node), "_make", tuple)  # of a named tuple
        return f"a {type(node).__name__} of {len(node)}", dict(enumerate(node)), lambda below: make(below.values())
    return "an array", {}, None


def _read(
    task_gradients: Iterable[Mapping[str, Any] | Sequence[Any]],
) -> tuple[list[dict[_Path, _Entry]], dict[_Path, _Entry], _Tree]:
    """Every task's arrays, under each name the first of them, with which the others agree, and their tree."""
    if isinstance(task_gradients, Mapping) or not isinstance(task_gradients, Iterable):
        raise TypeError(
            f"task_gradients must be a list of dicts or lists, one a task; found {type(task_gradients).__name__}"
        )
    tasks: list[dict[_Path, _Entry]] = []
    first: dict[_Path, _Entry] = {}
    tree = _Tree()
    for t, task in enumerate(task_gradients):
        if not isinstance(task, Mapping | list | tuple):
            raise TypeError(f"task_gradients[{t}] must be a dict or a list of arrays; found {type(task).__name__}")
        tasks.append({})
        for name, where, array in tree.arrays(f"task_gradients[{t}]", task):
            entry = tasks[t][name] = _entry(where, array)
            before = first.setdefault(name, entry)
            if not entry.agrees_with(before):
                raise ValueError(f"{where} must be {before}, as in a task before; found {entry}")
    if not tasks:
        raise ValueError("task_gradients must hold at least one task; found none")
    devices = {entry.tensor.device for entry in first.values()}
    if len(devices) > 1:
        raise ValueError(f"all arrays must be on one device; found {', '.join(sorted(map(str, devices)))}")
    return tasks, first, tree


def _entry(where: str, array: Any) -> _Entry:
    kind: Any = type(array)
    library = _library(kind)
    if library is None:
        raise TypeError(
            f"{where} must be an array of NumPy, torch, CuPy, JAX, TensorFlow or another library with DLPack; "
            f"found {kind.__name__}{_REMEDIES.get(kind.__name__, '')}"
        )
    if (dtype := _dtype_name(array.dtype)) not in _DTYPES:
        raise TypeError(f"{where} must be {', '.join(_DTYPES)}; found {dtype}")
    if library is _TORCH and array.layout != torch.strided:
        raise ValueError(f"{where} must be dense; found layout {array.layout}")
    try:
        return _Entry(array, library, library.read(array))
    except Exception as error:  # every library raises its own for what has no memory to read: traced, sharded, deleted
        remedy = "; under jax.jit use fastpcgrad.integrations.jax.merge" if "Tracer" in kind.__name__ else ""
        raise TypeError(f"{where} cannot be read through DLPack: {kind.__name__}: {error}{remedy}") from error


_REMEDIES = {
    "IndexedSlices": ": tf.convert_to_tensor makes a dense gradient of it",
    "ResourceVariable": ": give its value, tf.convert_to_tensor(variable)",
}
"""What to do with what TensorFlow has besides tensors."""


@cache
def _dtype_name(dtype: Any) -> str:
    """``float32`` for what NumPy, torch and TensorFlow each call so."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


_DTYPES = [_dtype_name(dtype) for dtype in functional.ROW_DTYPES]


def _pack(tasks: Sequence[Mapping[_Path, _Entry]], like: Mapping[_Path, Tensor]) -> Tensor:
    """J ``[T, N]`` in the dtype that holds all, with columns in the order of ``like``; zero where a task lacks one."""
    tensors = like.values()
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors))
    lengths, device = [x.numel() for x in tensors], next(iter(tensors)).device
    rows = prefer_huge_pages(torch.empty(len(tasks), sum(lengths), dtype=dtype, device=device))
    columns = zip(tensors, rows.split(lengths, dim=1), strict=True)
    places = [part.view(len(tasks), *x.shape).unbind() for x, part in columns]
    for task, row in zip(tasks, zip(*places, strict=True), strict=True):
        named = dict(zip(like, row, strict=True))
        if absent := [named.pop(name) for name in like if name not in task]:
            torch._foreach_zero_(absent)
        if named:
            torch._foreach_copy_(list(named.values()), [task[name].tensor for name in named])
    return rows


def _merge(rows: Tensor, ends: Sequence[int], method: Method, problems: Problems, names: Sequence[_Path]) -> Tensor:
    """The merged gradient ``[N]``.

    Args:
        ends: of each name's columns; those at which G does not look stand last.
        problems: of the names; where there are many each is one by itself.
    """
    if isinstance(method, Elementwise):
        return method.aggregate(rows)
    offsets = [0, *ends]
    if problems.are_many:
        gram = functional.gram(rows, offsets)
    else:
        gram = functional.gram(rows[:, : offsets[len(ends) - problems.in_gram.count(SUMMED)]])
    known_by = [name[0] if len(name) == 1 else name for name in names]
    with method.solving(known_by) if problems.are_many else nullcontext():
        weights = method.checked_solve(gram, range(len(rows))).weights
    return functional.combine(rows, weights_table(method, weights)[problems.row_of_each], segments=offsets)


def _read_torch(array: Tensor) -> Tensor:
    return array.detach()


def _write_torch(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor


def _read_numpy(array: Any) -> Tensor:
    array = np.asarray(array)  # a NumPy scalar is an array without dimensions
    if _dtype_name(array.dtype) == "bfloat16":  # of ml_dtypes: NumPy itself has none and does not export it
        return _read_numpy(array.view(np.uint16)).view(torch.bfloat16)
    size = array.itemsize
    if not (array.dtype.isnative and all(s >= 0 and s % size == 0 for s in array.strides)):
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    # from_numpy is three times as fast, but warns of read-only arrays, which are only read here
    return torch.from_numpy(array) if array.flags.writeable else from_dlpack(array)


def _write_numpy(tensor: Tensor, like: Any) -> Any:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(like.dtype)
    return tensor.numpy().astype(like.dtype, copy=False)


def _read_tensorflow(array: Any) -> Tensor:
    return from_dlpack(sys.modules["tensorflow"].experimental.dlpack.to_dlpack(array))


def _write_tensorflow(tensor: Tensor, like: Any) -> Any:
    if tensor.data_ptr() % 64:  # TensorFlow ends the process when it computes with less aligned memory
        tensor = tensor.clone()
    return sys.modules["tensorflow"].experimental.dlpack.from_dlpack(tensor.__dlpack__())


def _write_jax(tensor: Tensor, like: Any) -> Any:
    return sys.modules["jax"].numpy.from_dlpack(tensor, device=like.device)  # which may be one of several on the host


def _read_dlpack(array: Any) -> Tensor:
    if any(stride < 0 for stride in getattr(array, "strides", None) or ()):  # torch would end the process
        array = array.copy()
    return from_dlpack(array)


def _write_dlpack(tensor: Tensor, like: Any) -> Any:
    if hasattr(like, "__array_namespace__"):
        return like.__array_namespace__().from_dlpack(tensor)
    return sys.modules[_root(type(like))].from_dlpack(tensor)


_TORCH = _Library("torch", _read_torch, _write_torch)
_NUMPY = _Library("numpy", _read_numpy, _write_numpy)
_JAX = _Library("jax", from_dlpack, _write_jax)
_TENSORFLOW = _Library("tensorflow", _read_tensorflow, _write_tensorflow)


@cache
def _library(kind: type) -> _Library | None:
    """The library that a type of arrays belongs to; None for what is no dense array."""
    if issubclass(kind, Tensor):
        return _TORCH
    if issubclass(kind, np.ndarray | np.generic):
        return None if issubclass(kind, np.ma.MaskedArray) else _NUMPY
    if _root(kind) == "tensorflow":
        return _TENSORFLOW if issubclass(kind, sys.modules["tensorflow"].Tensor) else None
    if _root(kind) in ("jax", "jaxlib"):
        return _JAX if hasattr(kind, "__dlpack__") else None
    return _Library(_root(kind), _read_dlpack, _write_dlpack) if hasattr(kind, "__dlpack__") else None


def _root(kind: type) -> str:
    """The package that a type comes from."""
    return kind.__module__.partition(".")[0]
