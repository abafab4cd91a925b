"""Balancers that weigh the task losses before they are summed or merged: one file a balancer."""

from .base import Balancer
from .cosmos import COSMOS
from .dwa import DWA
from .famo import FAMO
from .geometric_mean import GeometricMean
from .gradnorm import GradNorm
from .imtll import IMTLL
from .logarithm import Logarithm
from .pbi import PBI
from .stch import STCH
from .uncertainty import UncertaintyWeighting

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "IMTLL",
    "PBI",
    "STCH",
    "Balancer",
    "GeometricMean",
    "GradNorm",
    "Logarithm",
    "UncertaintyWeighting",
]
