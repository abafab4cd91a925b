"""How the gradients of some parameters lie in rows: other than they lie in ``.grad``."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .._gradients import as_real


class Form(Protocol):
    """Between the gradient of one parameter and its part of a row, in the same memory where that can be."""

    def like_row(self) -> Tensor:
        """A tensor with the shape, strides, dtype and device that the parameter's rows have."""

    def check(self) -> None:
        """RuntimeError where ``.grad`` is not all that backward passes have made."""

    def into_row(self, grad: Tensor) -> Tensor:
        """What a row holds of a gradient."""

    def out_of_row(self, own: Tensor) -> Tensor:
        """The gradient of which a row holds this."""


class Complex:
    """The gradient of a complex parameter: its real and imaginary parts."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter

    def like_row(self) -> Tensor:
        return as_real(self._parameter.detach())

    def check(self) -> None:
        pass

    def into_row(self, grad: Tensor) -> Tensor:
        return as_real(grad)

    def out_of_row(self, own: Tensor) -> Tensor:
        return torch.view_as_complex(own)
