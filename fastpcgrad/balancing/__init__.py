"""Balancers that weigh the task losses before they are summed or merged: one file a balancer."""

from .base import Balancer
from .dwa import DWA
from .famo import FAMO
from .gradnorm import GradNorm
from .logarithm import Logarithm
from .stch import STCH
from .uncertainty import UncertaintyWeighting

__all__ = ["DWA", "FAMO", "STCH", "Balancer", "GradNorm", "Logarithm", "UncertaintyWeighting"]
