"""Gradient surgery for PyTorch at memory speed: PCGrad and its relatives on task gradients."""

from . import backends as backends  # registers the kernels of the ops
from . import balancing, integrations, methods
from ._version import __version__
from ._warnings import FastPCGradWarning
from .arrays import apply
from .autograd import backward, grad, gramian
from .backends.config import show_config
from .features import shared_features
from .functional import combine, gram, mix_, pcgrad, pcgrad_, pcgrad_coefficients
from .gradnorm import gradNorm
from .merging.report import ConflictReport
from .monitor import ConflictMonitor
from .optimizer import PCGrad
from .rows.choice import RowsReport, dense_rows
from .rows.memory_plan import MemoryPlan, MemoryPlanWarning
from .surgery import GradientSurgery

__all__ = [
    "ConflictMonitor",
    "ConflictReport",
    "FastPCGradWarning",
    "GradientSurgery",
    "MemoryPlan",
    "MemoryPlanWarning",
    "PCGrad",
    "RowsReport",
    "__version__",
    "apply",
    "backward",
    "balancing",
    "combine",
    "dense_rows",
    "grad",
    "gradNorm",
    "gram",
    "gramian",
    "integrations",
    "methods",
    "mix_",
    "pcgrad",
    "pcgrad_",
    "pcgrad_coefficients",
    "shared_features",
    "show_config",
]
