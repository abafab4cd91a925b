"""Methods that merge task gradients: one file a method."""

from .agem import AGEM
from .aligned_mtl import AlignedMTL
from .base import Method, Solution, check_method
from .cagrad import CAGrad
from .conflict_free import ConFIG
from .crmogm import CRMOGM
from .dualproj import DualProj
from .elementwise import Elementwise
from .fairgrad import FairGrad
from .fixed_weights import Constant, Mean, RandomWeights, Sum
from .graddrop import GradDrop
from .gradvac import GradVac
from .imtlg import IMTLG
from .krum import Krum
from .metabalance import MetaBalance
from .mgda import MGDA
from .nash_mtl import NashMTL
from .pcd import PCD
from .pcgrad import PCGrad
from .trimmed_mean import TrimmedMean
from .upgrad import UPGrad

__all__ = [
    "AGEM",
    "CRMOGM",
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "DualProj",
    "Elementwise",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Krum",
    "Mean",
    "MetaBalance",
    "Method",
    "NashMTL",
    "PCGrad",
    "RandomWeights",
    "Solution",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "check_method",
]
