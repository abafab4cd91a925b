"""The oracle: every algorithm as its paper or its original implementation writes it.

Plain loops over vectors, no Gram matrix where the original has none, any dtype, torch alone. Speed does not
matter here and nothing is shared with the fast path: each backend and each solver is compared with this package.

Passes over J (``gram``, ``combine``, ``mix``) compute in float64 whatever the dtype of the rows.
PCGrad (``project``, ``merge``) computes in the dtype that it is given; compare with float64 inputs.
Each other method has a function with the name of its file in ``methods/``: from J ``[T, N]``, in float64, to weights
``[T]`` where it has weights. State and random draws are arguments. J is taken rather than G since G holds half of its
digits: what a solver makes of G is compared with what is true of J. What a balancer scalarizes is a function of the
losses, whose gradient is autograd's.
"""

from .averages import averaged_weights, metabalance
from .batches import modo, sdmgrad, simplex_point
from .columns import graddrop, trimmed_mean
from .directions import aligned_mtl, conflict_free, imtlg
from .faces import cagrad, dualproj, mgda, upgrad
from .fairness import fairgrad, nash_mtl
from .fixed_weights import constant, mean, random_weights, total
from .frank_wolfe import frank_wolfe, normalized
from .gradvac import gradvac
from .krum import krum, krum_scores
from .main_task import agem, pcd
from .passes import combine, gram, mix
from .pcgrad import (
    PROJECT,
    Generator,
    TaskGradient,
    coefficients,
    merge,
    project_libmtl,
    project_paper,
    project_pytorch_pcgrad,
    project_tensorflow,
    project_tensorlogic,
    project_torchjd,
)
from .scalarizations import cosmos, geometric_mean, imtl_l, pbi
from .tracking import Momenta, bloop, db_mtl, excess_mtl, moco, momentum_config

__all__ = [
    "PROJECT",
    "Generator",
    "Momenta",
    "TaskGradient",
    "agem",
    "aligned_mtl",
    "averaged_weights",
    "bloop",
    "cagrad",
    "coefficients",
    "combine",
    "conflict_free",
    "constant",
    "cosmos",
    "db_mtl",
    "dualproj",
    "excess_mtl",
    "fairgrad",
    "frank_wolfe",
    "geometric_mean",
    "graddrop",
    "gradvac",
    "gram",
    "imtl_l",
    "imtlg",
    "krum",
    "krum_scores",
    "mean",
    "merge",
    "metabalance",
    "mgda",
    "mix",
    "moco",
    "modo",
    "momentum_config",
    "nash_mtl",
    "normalized",
    "pbi",
    "pcd",
    "project_libmtl",
    "project_paper",
    "project_pytorch_pcgrad",
    "project_tensorflow",
    "project_tensorlogic",
    "project_torchjd",
    "random_weights",
    "sdmgrad",
    "simplex_point",
    "total",
    "trimmed_mean",
    "upgrad",
]
