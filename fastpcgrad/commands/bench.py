"""``python -m fastpcgrad bench``: PCGrad of packed task gradients on this machine, against what else there is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from ..backends.config import backend_in_use
from ..functional import pcgrad
from .timing import conflicting_rows, in_turn, loop

TASKS = (2, 4, 8)
COLUMNS = 1 << 20
SECONDS = 3.0
"""For each number of tasks."""


def compare(columns: int = COLUMNS, device: str = "cpu") -> None:
    """Print the median times of PCGrad, and how many times faster this is than the others.

    Args:
        columns: N, at least 1.
        device: of J.
    Raises:
        ValueError: ``columns`` is below 1.
        RuntimeError: there is no such device; torch's own.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, found {columns}")
    peers: dict[str, Callable[[Tensor], Tensor]] = {"Python loop": loop}
    if find_spec("torchjd") is not None:
        from torchjd.aggregation import PCGrad

        peers["TorchJD"] = PCGrad()
    kind = torch.device(device).type
    print(f"PCGrad of J [T, {columns}] fp32 on {device}: {backend_in_use(kind)}, {torch.get_num_threads()} threads;")
    print("medians, in turn, in milliseconds, and the ratio to fastpcgrad\n")
    print(f"{'T':>3} {'fastpcgrad':>12}" + "".join(f"{name:>22}" for name in peers))
    for tasks in TASKS:
        rows = conflicting_rows(tasks, columns, device)
        calls: dict[str, Callable[[], object]] = {"ours": partial(pcgrad, rows)}
        calls |= {name: partial(peer, rows) for name, peer in peers.items()}
        times = in_turn(calls, SECONDS, device)
        ours = times["ours"]
        columns_of_peers = "".join(f"{1e3 * times[name]:>13.3f} ({times[name] / ours:>5.1f}×)" for name in peers)
        print(f"{tasks:>3} {1e3 * ours:>12.3f}{columns_of_peers}", flush=True)
    if "TorchJD" not in peers:
        print("\nTorchJD is not installed: pip install torchjd")
