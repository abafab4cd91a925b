"""Methods as weighting strategies of LibMTL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from LibMTL.weighting.abstract_weighting import AbsWeighting
from torch import Tensor

from .. import methods
from ..merging.report import ConflictReport
from ..methods import Elementwise, Method, check_method
from ..surgery import GradientSurgery


class Weighting(AbsWeighting):
    """A method as a weighting strategy: gradients of the shared parameters are merged, all others are summed, unless
    the method is to weigh them too.

    A subclass gives ``make_method``; ``weighting`` makes one. The trainer's ``weight_args`` have no meaning here: what
    a method is told, it is told when it is made.

    Attributes:
        weighs_heads: whether the weights that the method makes of the shared parameters' gradients reach all others
            too, as those of LibMTL's ``Nash_MTL`` do.
        report: the ``ConflictReport`` of the last batch; None before the first.
    Raises:
        NotImplementedError: ``rep_grad=True``.
        In training: TypeError for ``weight_args``; what ``fastpcgrad.GradientSurgery.backward`` raises.
    """

    weighs_heads: bool = False
    report: ConflictReport | None = None
    _surgery: GradientSurgery | None = None

    # Of the architecture that LibMTL's trainer joins it with.
    task_num: int
    task_name: Sequence[str]
    rep_grad: bool

    def make_method(self) -> Method:
        """What to override: the method, made once for a model."""
        raise NotImplementedError(f"{type(self).__name__} must give make_method")

    def init_param(self) -> None:
        if self.rep_grad:
            raise NotImplementedError(
                "rep_grad=True takes gradients at the representation; those of the shared parameters are merged here: "
                "rep_grad=False, or fastpcgrad.shared_features in a loop of your own"
            )

    def backward(self, losses: Any, **kwargs: Any) -> Any:
        """A round: task gradients, merged into ``.grad``.

        Args:
            losses: ``[T]``, or T scalars.
        Returns:
            the weights, ``[T]`` of NumPy, for the trainer's record, the mean over several surgeries; None for a method
            that has none.
        """
        if kwargs:
            raise TypeError(f"weight_args must be empty: make_method tells the method; found {sorted(kwargs)}")
        if self._surgery is None:
            scope = {"gram_over" if self.weighs_heads else "shared": self.get_share_params()}
            self._surgery = GradientSurgery(
                self.parameters(), tasks=list(self.task_name), method=self.make_method(), **scope
            )
        self.report = self._surgery.backward(losses if isinstance(losses, Tensor) else list(losses))
        if isinstance(self._surgery.method, Elementwise):
            return None
        return self.report.weights.reshape(-1, self.task_num).mean(dim=0).numpy(force=True)


class PCGrad(Weighting):
    """LibMTL's PCGrad: the same numbers, from Python's global generator, in fewer passes over memory."""

    def make_method(self) -> Method:
        return methods.PCGrad("libmtl")


def weighting(method: Method, *, weighs_heads: bool = False) -> type[Weighting]:
    """A weighting strategy of any method: ``Trainer(weighting=weighting(methods.UPGrad()), ...)``.

    Args:
        method: for one trainer; the next one would go on with its state.
        weighs_heads: see ``Weighting``.
    Raises:
        TypeError: no method.
    """
    check_method(method, methods.PCGrad)
    of_heads = weighs_heads

    class OfMethod(Weighting):
        weighs_heads = of_heads

        def make_method(self) -> Method:
            return method

    return OfMethod
