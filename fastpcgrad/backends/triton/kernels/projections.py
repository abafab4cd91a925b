# mypy: ignore-errors
# A kernel's parameters are typed by Triton (constexpr, or the string annotations that fix a width), not by Python.
"""The T×T solve of PCGrad."""

import triton
import triton.language as tl


@triton.jit
def solve(
    gram, order, coefficients, order_stride: "i64", self_projection: "i32", eps: "fp64", min_squared_norm: "fp64",
    T: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Row i of one T×T problem a program: v = C_i G is kept up to date, projection by projection."""
    i = tl.program_id(0) % T
    s = (tl.program_id(0) // T).to(tl.int64)
    gram += s * (T * T)
    order += s * order_stride + i * T
    t = tl.arange(0, PAD)
    v = tl.load(gram + i * T + t, mask=t < T, other=0.0)
    c = tl.where(t == i, 1.0, 0.0).to(tl.float64)
    invalid = i * 0
    floor = tl.full([], min_squared_norm, tl.float64)
    for step in range(0, T):
        wanted = tl.load(order + step)
        invalid += tl.where((wanted < 0) | (wanted >= T), 1, 0)
        j = tl.minimum(tl.maximum(wanted, 0), T - 1)
        row = tl.load(gram + j * T + t, mask=t < T, other=0.0)
        square = tl.load(gram + j * T + j)
        dot = tl.sum(tl.where(t == j, v, 0.0), axis=0)
        conflict = (dot < 0) & (dot > -float("inf")) & (square > floor) & (square < float("inf"))
        conflict = conflict & ((j != i) | (self_projection != 0))
        factor = tl.where(conflict, -dot, 0.0) / tl.where(conflict, square + eps, 1.0)
        c = tl.where(t == j, c + factor, c)
        # A number, not a truth value: the interpreter spreads a scalar one over a block as the floats it came from.
        project = tl.where(conflict, 1, 0)
        v = tl.where(project > 0, v + factor * row, v)
    c = tl.where(invalid > 0, float("nan"), c)
    tl.store(coefficients + s * (T * T) + i * T + t, c, mask=t < T)


@triton.jit
def column_sums(coefficients, weights, scale: "fp64", T: tl.constexpr, PAD: tl.constexpr):
    """weights[s, j] = scale * Σ_i C[s, i, j], rows added in order."""
    s = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, PAD)
    total = tl.zeros([PAD], tl.float64)
    for i in range(0, T):
        total += tl.load(coefficients + s * (T * T) + i * T + t, mask=t < T, other=0.0)
    tl.store(weights + s * T + t, total * scale, mask=t < T)
