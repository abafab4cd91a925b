"""Which parameters take part, and which of them form one problem."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

from .._losses import check_tensors
from .layers import Layers
from .reach import AUTO, Found, Reach

Granularity = Literal["model", "group", "parameter", "layer"] | Sequence[Iterable[Tensor]]
Collections = list[list[Tensor]]
Scope: TypeAlias = Iterable[Tensor] | Literal["auto"] | None
"""Parameters that a caller has chosen for something; ``auto``: those that two tasks or more reach; None: as the method
has it."""
CheckedGranularity = Literal["model", "group", "parameter"] | Collections | Layers


class Division(NamedTuple):
    """How a caller divides the parameters.

    Attributes:
        shared: for each whether it undergoes surgery; the others are summed. None: as the method's scope says.
        groups: for each the number of its problem; None: one problem, or as the method's scope says.
        names: of the problems, by their number; empty where they have none.
        gram_over: for each whether the Gram matrix of its problem looks at it; None: at all that undergo surgery.
    """

    shared: list[bool] | None = None
    groups: list[int] | None = None
    names: Sequence[str] = ()
    gram_over: list[bool] | None = None

    def of(self, chosen: Sequence[int]) -> Division:
        """That of some of the parameters, by their index."""
        shared = None if self.shared is None else [self.shared[index] for index in chosen]
        groups = None if self.groups is None else [self.groups[index] for index in chosen]
        gram_over = None if self.gram_over is None else [self.gram_over[index] for index in chosen]
        return Division(shared, groups, self.names, gram_over)

    def settled(self, found: Found) -> Division:
        """See ``Learning``."""
        return self


UNDIVIDED = Division()


class Learning(NamedTuple):
    """A division of which the gradients are to show what two tasks or more reach.

    Attributes:
        given: the division otherwise.
        reach: what is known of the parameters.
        parameters: that are divided.
        shared, gram_over: whether these are what they reach.
        is_part: whether other parameters are divided elsewhere.
    """

    given: Division
    reach: Reach
    parameters: Sequence[Tensor]
    shared: bool
    gram_over: bool
    is_part: bool = False

    @property
    def groups(self) -> list[int] | None:
        return self.given.groups

    def of(self, chosen: Sequence[int]) -> Learning:
        """That of some of the parameters, by their index."""
        parameters = [self.parameters[index] for index in chosen]
        return self._replace(given=self.given.of(chosen), parameters=parameters, is_part=True)

    def settled(self, found: Found) -> Division:
        """As it is with the gradients of a round, from which is learned.

        Raises:
            ValueError: G would look at nothing, or at what no weights reach.
            RuntimeError: see ``Reach.learn``.
        """
        self.reach.learn(self.parameters, found)
        shared = self.reach.are_shared(self.parameters)
        division, seen = self.given, self.given.gram_over or ()
        if self.shared:
            division = division._replace(shared=shared)
            if any(looked and not inside for looked, inside in zip(seen, shared, strict=False)):
                raise ValueError(f"gram_over holds a parameter that one task alone reaches: it is {_OUT_OF_REACH}")
        if self.gram_over:
            inside = division.shared or [True] * len(shared)
            division = division._replace(gram_over=[a and b for a, b in zip(shared, inside, strict=True)])
        if division.gram_over is not None and not self.is_part:
            what = ("gram_over='auto' finds no parameter that two tasks reach",) if self.gram_over else ()
            _check_gram_over(division, *what)
        return division


class HasGroups(Protocol):
    """What a surgery asks an optimizer for."""

    param_groups: list[dict[str, Any]]


class Groups:
    """Parameters that were given without an optimizer."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = param_groups


def parameter_source(source: HasGroups | Iterable[Any]) -> HasGroups:
    """What has ``param_groups``: an optimizer, which is asked anew each round, or groups made of parameters."""
    if not isinstance(source, Iterable):
        if not hasattr(source, "param_groups"):
            raise TypeError(
                f"optimizer_or_params must be an optimizer, with param_groups, or parameters; found {source!r}"
            )
        return source
    values = [] if isinstance(source, Tensor) else list(source)
    if values and all(isinstance(value, dict) for value in values):
        groups = values
    else:
        groups = [{"params": check_tensors("optimizer_or_params", values or source)}]
    for group in groups:
        if "params" not in group:
            raise ValueError(f"a parameter group must have 'params'; found keys {sorted(group)}")
    groups = [{"params": check_tensors("params", _as_list(group["params"]))} for group in groups]
    if not any(group["params"] for group in groups):
        raise ValueError("optimizer_or_params holds no parameters")
    return Groups(groups)


def _as_list(params: Any) -> Any:
    """A group may hold a single tensor, as optimizers allow."""
    return [params] if isinstance(params, Tensor) else params


def are_among(tensors: Sequence[Tensor], chosen: Iterable[Tensor]) -> list[bool]:
    """For each tensor whether it is one of those chosen."""
    known = set(map(id, chosen))
    return [id(tensor) in known for tensor in tensors]


class Scopes(NamedTuple):
    """Which parameters a caller has chosen for what, see ``GradientSurgery``; None: as the method's scope says."""

    shared: Sequence[Tensor] | Literal["auto"] | None = None
    gram_over: Sequence[Tensor] | Literal["auto"] | None = None

    @classmethod
    def of(cls, shared: Scope, gram_over: Scope) -> Scopes:
        """TypeError for what are no tensors, nor 'auto'."""
        return cls(_chosen("shared", shared), _chosen("gram_over", gram_over))

    @property
    def learn(self) -> bool:
        """Whether gradients are to show one of them."""
        return AUTO in (self.shared, self.gram_over)


def _chosen(name: str, scope: Scope) -> Sequence[Tensor] | Literal["auto"] | None:
    if scope is None or isinstance(scope, str):
        if scope not in (None, AUTO):
            raise TypeError(f"{name} must be an iterable of tensors or 'auto'; found {scope!r}")
        return scope
    return check_tensors(name, scope)


_OUT_OF_REACH = "not in shared, so that no weights reach it"


def check_leaves(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        if not p.is_leaf:
            raise ValueError(f"parameters must be leaves of the graph; found {list(p.shape)} with {p.grad_fn}")


def _check_scopes(
    parameters: Sequence[Tensor], shared: Sequence[Tensor] | None, gram_over: Sequence[Tensor] | None
) -> None:
    _check_among("shared", shared, parameters, "none of the parameters")
    _check_among("gram_over", gram_over, parameters, "none of the parameters")
    if shared is not None:
        _check_among("gram_over", gram_over, shared, _OUT_OF_REACH)


def _check_among(name: str, chosen: Sequence[Tensor] | None, known: Sequence[Tensor], why: str) -> None:
    trainable = [p for p in chosen or () if p.requires_grad]
    for p, is_known in zip(trainable, are_among(trainable, known), strict=True):
        if not is_known:
            raise ValueError(f"{name} holds a tensor {list(p.shape)} that is {why}")


def check_granularity(granularity: Granularity, model: nn.Module | None = None) -> CheckedGranularity:
    """Its name, each collection as a list, or where there are names of the model's the layers that have them."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    if isinstance(granularity, str) and granularity in ("layer", "parameter") and model is not None:
        return Layers(model, by_parameter=granularity == "parameter")
    if granularity == "layer":
        raise ValueError(
            "granularity='layer' needs the model whose layers are meant: give model=, or choose 'model', 'group' or "
            "'parameter'"
        )
    if granularity in ("model", "group", "parameter"):
        return granularity
    if isinstance(granularity, str) or not isinstance(granularity, Iterable):
        raise ValueError(
            "granularity must be 'model', 'group', 'parameter', 'layer' or a sequence of collections of parameters; "
            f"found {granularity!r}"
        )
    collections = [check_tensors(f"granularity[{g}]", collection) for g, collection in enumerate(granularity)]
    owner: dict[int, int] = {}
    for g, collection in enumerate(collections):
        for p in collection:
            if owner.setdefault(id(p), g) != g:
                raise ValueError(
                    f"granularity[{owner[id(p)]}] and granularity[{g}] both hold a parameter of shape {list(p.shape)}"
                )
    return collections


def divide(
    parameters: Sequence[Tensor],
    granularity: CheckedGranularity,
    groups: Sequence[dict[str, Any]],
    scopes: Scopes,
    reach: Reach | None = None,
) -> Division | Learning:
    """Which of the parameters undergo surgery, which form one problem, and at which its Gram matrix looks.

    Args:
        reach: what is known of that, where scopes are 'auto'.
    Raises:
        ValueError: scopes with a tensor that is none of the parameters; collections without a parameter that undergoes
            surgery, or with one that is not there; a model without one; a problem whose Gram matrix would look at
            nothing.
    """
    shared, gram_over = (None if isinstance(scope, str) else scope for scope in scopes)
    _check_scopes(parameters, shared, gram_over)
    division = _divided(parameters, granularity, groups, shared)
    if gram_over is not None:
        division = division._replace(gram_over=are_among(parameters, gram_over))
    if reach is not None:
        return Learning(division, reach, parameters, shared=scopes.shared == AUTO, gram_over=scopes.gram_over == AUTO)
    if gram_over is not None:
        _check_gram_over(division)
    return division


def _check_gram_over(division: Division, what: str = "gram_over holds no trainable parameter") -> None:
    """ValueError where a problem's Gram matrix would look at no parameter, which ``what`` says."""
    shared, groups, names, seen = division
    assert seen is not None
    problems = [0] * len(seen) if groups is None else groups
    inside = [True] * len(seen) if shared is None else shared
    if empty := set(compress(problems, inside)) - set(compress(problems, seen)):
        missing = "" if groups is None else f" of problem {names[min(empty)] if names else min(empty)}"
        raise ValueError(f"{what}{missing}: its Gram matrix would be zero")


def _divided(
    parameters: Sequence[Tensor],
    granularity: CheckedGranularity,
    groups: Sequence[dict[str, Any]],
    shared: Sequence[Tensor] | None,
) -> Division:
    """But for what the Gram matrices look at."""
    operated = None if shared is None else are_among(parameters, shared)
    if granularity == "model":
        return Division(operated)
    if granularity == "parameter":
        places = {id(p): place for place, p in enumerate(p for group in groups for p in group["params"])}
        return Division(operated, [places[id(p)] for p in parameters])  # as long as others are frozen, too
    if isinstance(granularity, Layers):
        inside = parameters if operated is None else list(compress(parameters, operated))
        numbers, names = granularity.of(inside)
        owner = dict(zip(map(id, inside), numbers, strict=True))
        return Division(operated, [owner.get(id(p), 0) for p in parameters], names)
    collections = [group["params"] for group in groups] if granularity == "group" else granularity
    owner = {id(p): g for g, collection in enumerate(collections) for p in collection}
    if isinstance(granularity, list):
        _check_collections(parameters, granularity, owner, shared)
    return Division(operated, [owner.get(id(p), 0) for p in parameters])


def _check_collections(
    parameters: Sequence[Tensor], collections: Collections, owner: dict[int, int], shared: Sequence[Tensor] | None
) -> None:
    operated = [True] * len(parameters) if shared is None else are_among(parameters, shared)
    for p in compress(parameters, operated):
        if id(p) not in owner:
            raise ValueError(
                "granularity must hold every parameter that undergoes surgery; "
                f"one of shape {list(p.shape)} is in none of the {len(collections)} collections"
            )
    known = {id(p) for p in parameters}
    for g, collection in enumerate(collections):
        for p in collection:
            if p.requires_grad and id(p) not in known:
                raise ValueError(f"granularity[{g}] holds a tensor {list(p.shape)} that is none of the parameters")
