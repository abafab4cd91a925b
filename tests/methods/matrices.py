"""Jacobians for the tests of Gram-based methods: random rows with the dependencies that break solvers."""

import torch

KINDS = ("independent", "conflicting", "duplicate", "opposite", "dependent", "zero row")
TASKS = range(1, 9)
SCALES = (1.0, 1e-8, 1e8)


def jacobian(kind, tasks, seed):
    """J ``[T, 12]`` float64 with rows of length about 1 to 10.

    conflicting: all rows share a direction, half of them reversed. duplicate and opposite: the last row is the first or
    its negative. dependent: rows of rank ⌈T/2⌉. zero row: the last row. With one task the first row is the last.
    """
    generator = torch.Generator().manual_seed(1000 * seed + tasks)
    rows = torch.randn(tasks, 12, dtype=torch.float64, generator=generator)
    if kind == "conflicting":
        sides = torch.where(torch.arange(tasks) % 2 == 0, 1.0, -1.0)
        rows = rows + sides[:, None] * rows.mean(dim=0) * 3
    elif kind == "dependent":
        rank = (tasks + 1) // 2
        rows = torch.randn(tasks, rank, dtype=torch.float64, generator=generator) @ rows[:rank]
    elif kind == "duplicate":
        rows[-1] = rows[0]
    elif kind == "opposite" and tasks > 1:
        rows[-1] = -rows[0]
    elif kind == "zero row":
        rows[-1] = 0.0
    return rows


def jacobians(kinds=KINDS, tasks=TASKS, seeds=range(3), scales=SCALES):
    """(what it is, J) for each combination."""
    for kind in kinds:
        for count in tasks:
            for seed in seeds:
                for scale in scales:
                    yield f"{kind}, T={count}, seed {seed}, scale {scale}", scale * jacobian(kind, count, seed)


def gram(rows):
    return rows @ rows.mT


def difference(rows, found, expected):
    """‖(w − w')J‖ / Σ_j |w'_j|‖g_j‖: how far apart two merged gradients are; 0 for two zero ones."""
    scale = expected.abs() @ rows.norm(dim=1)
    gap = ((found - expected) @ rows).norm()
    return float(gap / scale) if scale > 0 else float(gap)
