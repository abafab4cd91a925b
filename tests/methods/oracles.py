"""Each method with its oracle, on all that makes a solver stumble, and how far the two may be apart.

The merged gradients w J are compared, for where task gradients depend on each other several w give the same. They agree
to 1e-13 of Σ_t |w_t| ‖g_t‖ where a case does not say what else.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch

from fastpcgrad import methods, reference
from fastpcgrad.methods.solvers import fairness
from tests.methods.random_rows import HARD, KINDS, random_rows

ALL_KINDS = KINDS + HARD
SIMILAR = tuple(kind for kind in ALL_KINDS if kind != "scales apart")
PREFERRED = [0.5, 1.0, 0.0, 2.0, 0.25, 0.75, 1.5, 3.0, 0.1, 1.25]


# What is allowed, from J and the oracle's w; None: nothing can be compared.


def rounding(rows, weights):
    return 1e-13


def nearly_dependent(rows, weights):
    """Of three gradients 1e-6 from a plane the products in G tell the plane to 1e-12."""
    return 1e-12


def beside_the_longest(rows, weights):
    """G hides what is 1e-16 of ‖J‖_F."""
    return 1e-13 + 1e-16 * float(rows.norm() / (weights.abs() @ rows.norm(dim=1)).clamp_min(1e-300))


def without_kink(rows, weights):
    """‖g_v‖, which is at least 1e-4 ‖J‖_F (norm_eps), is smoothed by 1e-9 ‖J‖_F."""
    return 5e-11


def without_ridge(rows, weights):
    """The ridge stays where w_t‖g_t‖² is 1e8 times g_t·d for a task: d is then all but zero for what it is made of, and
    may change by the root of the ridge."""
    stays = weights * rows.norm(dim=1) ** 2 * fairness.RIDGE > 0.005 * (rows @ (weights @ rows))
    return fairness.RIDGE**0.5 if stays.any() else 1e-12


def by_eigenvalues(rows, weights):
    """What rounding makes of the smallest eigenvalue of G that counts; None where it decides which of them count."""
    values = torch.linalg.svdvals(rows) / torch.linalg.matrix_norm(rows, 2).clamp_min(1e-300)
    if ((values > 1e-9) & (values < 1e-6)).any():
        return None
    return 1e-14 / float(values[values > 1e-7].min()) ** 2 if values.any() else 0.0


def by_eigenvalues_and_a_sum(rows, weights):
    """w = v/Σv, where v may cancel."""
    allowed = by_eigenvalues(rows, weights)
    return None if allowed is None else allowed * max(1.0, float(weights.abs().sum()))


def by_eigenvalues_and_projections(rows, weights):
    """The length of the merged gradient is a sum of projections, which may cancel."""
    norms = rows.norm(dim=1)
    allowed = by_eigenvalues(rows / norms.where(norms > 0, 1.0)[:, None], weights)
    cancelled = float(norms.sum() / (weights.abs() @ norms).clamp_min(1e-300))
    return None if allowed is None else allowed * max(1.0, cancelled)


def without_ties(rows, weights):
    """None where rounding decides which of two scores is lower; distances are roots of it."""
    scores = sorted(reference.krum_scores(rows, n_byzantine=1, squared=False))
    return None if any(b - a < 1e-6 * scores[-1] for a, b in pairwise(scores)) else 0.0


def without_cancelled_memory(rows, weights):
    """The mean of the others may be short beside them: G has its square as a sum."""
    memory = rows[1:]
    parts, left = float(memory.norm(dim=1).sum()), float(memory.sum(dim=0).norm())
    return 1e-13 if parts == 0 else 1e-13 + 1e-15 * (parts / left) ** 2 if left > 1e-6 * parts else None


class Case(NamedTuple):
    make: Callable  # of the number of tasks
    oracle: Callable  # of J, and of as many preferences as there are tasks where the method has some
    allowed: Callable = rounding
    kinds: tuple = SIMILAR
    least: int = 1  # tasks
    most: int = 10
    preferred: bool = False


def seeded():
    return torch.Generator().manual_seed(3)


CASES = {
    "AGEM": Case(lambda T: methods.AGEM(), reference.agem, without_cancelled_memory, most=64),
    # Frank-Wolfe's steps of 1 − γ are no numbers any more where scales are apart.
    "MGDA": Case(lambda T: methods.MGDA(), reference.frank_wolfe, most=64),
    "MGDA, few steps": Case(lambda T: methods.MGDA(1e-9, 7), lambda J: reference.frank_wolfe(J, 1e-9, 7), most=64),
    "MGDA, exact": Case(lambda T: methods.MGDA(solver="exact"), reference.mgda, beside_the_longest, ALL_KINDS),
    "CAGrad": Case(lambda T: methods.CAGrad(c=0.5), lambda J: reference.cagrad(J, 0.5), without_kink, ALL_KINDS),
    "CAGrad, far": Case(lambda T: methods.CAGrad(c=2.0), lambda J: reference.cagrad(J, 2.0), without_kink, ALL_KINDS),
    "CAGrad, no radius": Case(lambda T: methods.CAGrad(c=0.0), lambda J: reference.cagrad(J, 0.0)),
    "FairGrad": Case(
        lambda T: methods.FairGrad(0.5), lambda J: reference.fairgrad(J, 0.5), without_ridge, ALL_KINDS, most=64
    ),
    "FairGrad, 3": Case(
        lambda T: methods.FairGrad(3.0), lambda J: reference.fairgrad(J, 3.0), without_ridge, ALL_KINDS, most=64
    ),
    "FairGrad, not fair": Case(lambda T: methods.FairGrad(0.0), lambda J: reference.fairgrad(J, 0.0)),
    "NashMTL": Case(lambda T: methods.NashMTL(), reference.nash_mtl, without_ridge, ALL_KINDS, most=64),
    "NashMTL, whole": Case(lambda T: methods.NashMTL(0), lambda J: reference.nash_mtl(J, 0), without_ridge, ALL_KINDS),
    "UPGrad": Case(lambda T: methods.UPGrad(), lambda J: reference.upgrad(J, reg_eps=1e-4), kinds=ALL_KINDS),
    "UPGrad, exact": Case(
        lambda T: methods.UPGrad(PREFERRED[:T], reg_eps=0.0),
        reference.upgrad,
        nearly_dependent,
        ALL_KINDS,
        preferred=True,
    ),
    "DualProj": Case(lambda T: methods.DualProj(), lambda J: reference.dualproj(J, reg_eps=1e-4), kinds=ALL_KINDS),
    "DualProj, exact": Case(
        lambda T: methods.DualProj(PREFERRED[:T], reg_eps=0.0),
        reference.dualproj,
        nearly_dependent,
        ALL_KINDS,
        preferred=True,
    ),
    "AlignedMTL": Case(lambda T: methods.AlignedMTL(), reference.aligned_mtl, by_eigenvalues, ALL_KINDS, most=64),
    "AlignedMTL, median": Case(
        lambda T: methods.AlignedMTL(PREFERRED[:T], "median"),
        lambda J, p: reference.aligned_mtl(J, p, "median"),
        by_eigenvalues,
        ALL_KINDS,
        preferred=True,
    ),
    "AlignedMTL, rmse": Case(
        lambda T: methods.AlignedMTL(scale_mode="rmse"),
        lambda J: reference.aligned_mtl(J, scale_mode="rmse"),
        by_eigenvalues,
        ALL_KINDS,
        most=64,
    ),
    "IMTLG": Case(lambda T: methods.IMTLG(), reference.imtlg, by_eigenvalues_and_a_sum, ALL_KINDS, most=64),
    "ConFIG": Case(
        lambda T: methods.ConFIG(), reference.conflict_free, by_eigenvalues_and_projections, ALL_KINDS, most=64
    ),
    "ConFIG, preferred": Case(
        lambda T: methods.ConFIG(PREFERRED[:T]),
        reference.conflict_free,
        by_eigenvalues_and_projections,
        ALL_KINDS,
        preferred=True,
    ),
    "Krum": Case(
        lambda T: methods.Krum(1, 2), lambda J: reference.krum(J, 1, 2, squared=False), without_ties, least=4, most=64
    ),
    "Krum, squared": Case(
        lambda T: methods.Krum(1, squared=True), lambda J: reference.krum(J, 1), without_ties, least=4
    ),
    "Mean": Case(lambda T: methods.Mean(), reference.mean),
    "Sum": Case(lambda T: methods.Sum(), reference.total),
    "Constant": Case(lambda T: methods.Constant(PREFERRED[:T]), lambda J, w: reference.constant(w), preferred=True),
    "RandomWeights": Case(
        lambda T: methods.RandomWeights(seeded()),
        lambda J: reference.random_weights(torch.randn(len(J), generator=seeded(), dtype=torch.float64)),
    ),
}
ELSEWHERE = {"PCGrad", "GradVac", "GradDrop", "TrimmedMean", "CRMOGM", "MetaBalance", "PCD", "MoDo", "SDMGrad"}
ELSEWHERE |= {"Bloop", "MoCo", "ExcessMTL", "DBMTL", "MConFIG"}
"""Methods whose oracles give rows or the merged gradient itself, go on over steps, or take more than one J: see their
own tests."""


def problems(case):
    """Up to 6 tasks, each kind seven times; 10 tasks; many tasks where the oracle takes them."""
    for seed in range(7 * len(case.kinds)):
        yield random_rows(seed, case.least, max(6, case.least), case.kinds, powers=(-22, 15))
    yield random_rows(10, 10, 10, ("conflicting",))
    for tasks in (32, 64):
        if tasks <= case.most:
            yield random_rows(tasks, tasks, tasks, ("conflicting",))


@cache
def answers(name):
    """(J, the oracle's w, what is allowed) of each problem that has an answer."""
    case, found = CASES[name], []
    for rows in problems(case):
        given = (rows, PREFERRED[: len(rows)]) if case.preferred else (rows,)
        try:
            weights = case.oracle(*given)
        except ArithmeticError:  # nothing to compare with
            continue
        allowed = case.allowed(rows, weights)
        if allowed is not None:
            found.append((rows, weights, allowed))
    assert len(found) >= 40
    return found
