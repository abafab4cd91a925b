"""Methods that merge task gradients: one file a method."""

from .base import Method, Solution, check_method
from .pcgrad import PCGrad

__all__ = ["Method", "PCGrad", "Solution", "check_method"]
