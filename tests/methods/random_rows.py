"""Random task gradients with all that makes a method stumble, and the measure of an error."""

import torch

KINDS = (
    "plain",
    "common direction",
    "conflicting",
    "duplicates",
    "opposites",
    "low rank",
    "zero row",
    "all zero",
    "mixed norms",
)
HARD = ("nearly dependent", "scales apart")


def random_rows(seed, min_tasks=1, max_tasks=8, kinds=KINDS, powers=(-8, 8)):
    """J ``[T, N]`` float64: the kind goes round with the seed, the scale is 1e-8 to 1e8, or between other ``powers``.

    nearly dependent: a row lies 1e-6 to 1e-1 of its length from the span of two others, between their opposites or not.
    scales apart: lengths of 1e-22 to 1e15 in one J.
    """
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    tasks = integer(min_tasks, max_tasks)
    width = integer(tasks, 3 * tasks + 4)
    rows = torch.randn(tasks, width, generator=generator, dtype=torch.float64)
    kind = kinds[seed % len(kinds)]
    a, b = integer(0, tasks - 1), integer(0, tasks - 1)
    if kind == "common direction":
        rows += torch.randn(width, generator=generator, dtype=torch.float64)
    elif kind == "conflicting":
        rows -= rows.mean(dim=0) * 0.95
    elif kind == "duplicates":
        rows[a] = rows[b]
    elif kind == "opposites":
        rows[a] = -rows[b]
    elif kind == "low rank":
        rank = integer(1, tasks)
        rows = torch.randn(tasks, rank, generator=generator, dtype=torch.float64) @ rows[:rank]
    elif kind == "zero row":
        rows[a] = 0
    elif kind == "all zero":
        rows.zero_()
    elif kind == "mixed norms":
        rows *= 10 ** (4 * torch.rand(tasks, 1, generator=generator, dtype=torch.float64) - 2)
    elif kind == "nearly dependent":
        others, distance = rows[[a, b]], 10.0 ** -integer(1, 6)
        c = integer(0, tasks - 1)
        rows[c] = torch.randn(2, generator=generator, dtype=torch.float64) @ others + distance * rows[c]
    elif kind == "scales apart":
        rows *= 10 ** (37 * torch.rand(tasks, 1, generator=generator, dtype=torch.float64) - 22)
    return rows * 10.0 ** integer(*powers)


def gram(rows):
    return rows @ rows.mT


def error(found, expected, weights, rows):
    """‖m − m'‖ as a part of Σ_j |w_j| ‖g_j‖."""
    scale = float((weights.abs() * rows.norm(dim=1)).sum())
    distance = float((found - expected).norm())
    return distance / scale if scale > 0 else distance


def check_batch(method, tasks, tolerance=1e-12):
    """S problems at once give what they give one by one, and a broken one breaks no other."""
    problems = [random_rows(seed, tasks, tasks) for seed in range(12)]
    grams = torch.stack([gram(rows) for rows in problems])
    together = method.weights(grams)
    assert together.shape == (12, tasks) and together.dtype == torch.float64
    for rows, single, weights in zip(problems, grams, together, strict=True):
        assert error(weights @ rows, method.weights(single) @ rows, weights, rows) <= tolerance
    assert method.weights(grams[:0]).shape == (0, tasks)
    return grams, together


def check_broken(method, tasks):
    """NaN and inf give NaN weights in their problem, and change no bit of another's."""
    grams, together = check_batch(method, tasks)
    for value in (torch.nan, torch.inf, -torch.inf):
        for places in ([0, 0], [0, tasks - 1], [tasks - 1, tasks - 1]):
            broken = grams.clone()
            broken[3, places[0], places[1]] = broken[3, places[1], places[0]] = value
            found = method.weights(broken)
            assert found[3].isnan().all()
            others = [s for s in range(12) if s != 3]
            assert torch.equal(found[others], together[others])
            assert method.weights(broken[3]).isnan().all()


def check_scales(method, tasks, tolerance=1e-10):
    """Gradients that are c times as large give a result that is c times as large: the same weights."""
    for seed in range(27):
        rows = random_rows(seed, tasks, tasks)
        weights = method.weights(gram(rows))
        for scale in (1e-8, 1e-3, 1e8):
            scaled = method.weights(gram(rows * scale))
            assert error(scaled @ rows, weights @ rows, weights, rows) <= tolerance, (seed, scale)
