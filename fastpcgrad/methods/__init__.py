"""Methods that merge task gradients: one file a method."""

from .agem import AGEM
from .aligned_mtl import AlignedMTL
from .base import Method, Solution, check_method
from .bloop import Bloop
from .cagrad import CAGrad
from .conflict_free import ConFIG
from .crmogm import CRMOGM
from .db_mtl import DBMTL
from .dualproj import DualProj
from .elementwise import Elementwise
from .excess_mtl import ExcessMTL
from .fairgrad import FairGrad
from .fixed_weights import Constant, Mean, RandomWeights, Sum
from .graddrop import GradDrop
from .gradvac import GradVac
from .imtlg import IMTLG
from .krum import Krum
from .metabalance import MetaBalance
from .mgda import MGDA
from .moco import MoCo
from .modo import MoDo
from .momentum_config import MConFIG
from .nash_mtl import NashMTL
from .pcd import PCD
from .pcgrad import PCGrad
from .sdmgrad import SDMGrad
from .tracking import Tracking
from .trimmed_mean import TrimmedMean
from .upgrad import UPGrad

__all__ = [
    "AGEM",
    "CRMOGM",
    "DBMTL",
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "Bloop",
    "CAGrad",
    "ConFIG",
    "Constant",
    "DualProj",
    "Elementwise",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Krum",
    "MConFIG",
    "Mean",
    "MetaBalance",
    "Method",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "RandomWeights",
    "SDMGrad",
    "Solution",
    "Sum",
    "Tracking",
    "TrimmedMean",
    "UPGrad",
    "check_method",
]
