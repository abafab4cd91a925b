"""``python -m fastpcgrad doctor``: what is installed, which backend runs and why, and whether its results are right."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import backends, functional, reference
from .._version import __version__
from ..backends.config import backend_in_use, show_config
from ..optimizer import PCGrad
from .timing import conflicting_rows, in_turn, loop

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Of the merged gradient, relative to the sum of the norms that went into it."""
TASKS, COLUMNS, SECONDS = 4, 1 << 22, 4.0
"""Of the measurement."""
OPENMP = ("libgomp", "libomp", "libiomp")


def examine() -> int:
    """Print what was found, and a verdict.

    Returns:
        0 where all results are right, however slow; 1 where one is wrong or no backend runs.
    """
    print(f"fastpcgrad {__version__} from {Path(__file__).parents[1]}")
    print(f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    show_config()
    runtimes = openmp_runtimes()
    print(f"OpenMP runtimes in this process: {', '.join(map(str, runtimes)) or 'none, or this system does not tell'}")
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    slow, wrong = list(_what_makes_slow(devices, runtimes)), list[str]()
    print("self-test:")
    for device in devices:
        for name in backends.NAMES:
            if backends.why_unavailable(name, device) is None:
                wrong += _test(name, device)
        _show_speed(device)
    wrong += _test_the_drop_in()
    for line in slow:
        print(f"slower than it could be: {line}")
    for line in wrong:
        print(f"WRONG: {line}")
    print("verdict: " + ("not to be used as it is" if wrong else "right, but slow" if slow else "all is well"))
    return int(bool(wrong))


def _what_makes_slow(devices: Sequence[str], runtimes: Sequence[Path]) -> Iterator[str]:
    """What this process has that costs time, each with its remedy."""
    if len(runtimes) > 1:
        yield "several OpenMP runtimes compete for the cores: install torch and what else brings one from one source"
    for device in devices:
        if backend_in_use(device, detailed=False) != device:
            reason = backends.why_unavailable(device, device) or "FASTPCGRAD_BACKEND forces another"
            yield f"the compiled {device} library does not run {device} tensors: {reason}"


def openmp_runtimes() -> list[Path]:
    """The OpenMP libraries that are mapped into this process; empty where there is no /proc."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    return sorted({path.resolve() for path in files if path.name.startswith(OPENMP)})


def _test(name: str, device: str) -> list[str]:
    """Each dtype on one backend against the oracle; what is wrong."""
    wrong = []
    for dtype, tolerance in TOLERANCE.items():
        rows = conflicting_rows(5, 3001, "cpu").to(dtype)
        order = torch.arange(5).repeat(5, 1)
        coefficients = reference.coefficients(reference.gram(rows), order, False, 0.0, 0.0)
        expected, scale = coefficients.sum(dim=0) @ rows.double(), float(_reach(coefficients, rows))
        with backends.forcing(name):
            found = functional.pcgrad(rows.to(device), order=order.to(device)).cpu().double()
        error = float((found - expected).norm()) / scale
        if not error <= tolerance:
            wrong.append(
                f"{name} on {device}, {dtype}: the merged gradient is {error:.1e} off, {tolerance:.0e} is allowed"
            )
    print(f"  {name} on {device} tensors: {'WRONG' if wrong else 'right'}")
    return wrong


def _reach(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Σ_j |w_j| ‖g_j‖."""
    return coefficients.sum(dim=0).abs() @ rows.double().norm(dim=1)


def _test_the_drop_in() -> list[str]:
    """One step of a small model against the oracle."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3)).double()
    x, parameters = torch.randn(16, 10, dtype=torch.float64), list(net.parameters())
    optimizer = PCGrad(torch.optim.SGD(parameters, lr=0.1), variant="tensorflow", process_group="local")
    losses = [(output - t).square().mean() for t, output in enumerate(net(x).unbind(dim=1))]
    rows = [list(torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses]
    optimizer.pc_backward(losses)
    expected = reference.merge(rows, parameters, "tensorflow")
    right = all(
        p.grad is not None and e is not None and torch.allclose(p.grad, e, rtol=1e-10, atol=1e-12)
        for p, e in zip(parameters, expected, strict=True)
    )
    print(f"  pc_backward of a small model: {'right' if right else 'WRONG'}")
    return [] if right else ["pc_backward of a small model is not the oracle's"]


def _show_speed(device: str) -> None:
    """Bytes a second of the passes beside those of a copy, and the ratio to a Python loop."""
    rows = conflicting_rows(TASKS, COLUMNS, device)
    out, weights = torch.empty_like(rows[0]), torch.ones(TASKS, dtype=torch.float64, device=device)
    copy = torch.empty_like(rows)
    times = in_turn(
        {
            "gram": lambda: functional.gram(rows),
            "combine": lambda: functional.combine(rows, weights, out),
            "copy": lambda: copy.copy_(rows),
            "pcgrad": lambda: functional.pcgrad(rows),
            "loop": lambda: loop(rows),
        },
        SECONDS,
        device,
    )
    moved = {"gram": rows.nbytes, "combine": rows.nbytes + out.nbytes, "copy": 2 * rows.nbytes}
    speeds = ", ".join(f"{name} {nbytes / times[name] / 1e9:.1f} GB/s" for name, nbytes in moved.items())
    print(f"  J [{TASKS}, {COLUMNS}] fp32 on {device}: {speeds} (torch's)")
    print(
        f"  pcgrad takes {1e3 * times['pcgrad']:.1f} ms, "
        f"a Python loop {times['loop'] / times['pcgrad']:.1f} times as long"
    )
