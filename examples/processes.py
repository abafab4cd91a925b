"""What the examples on several processes have in common: ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from examples import command_line


def run(
    train: Callable[[int, int, torch.device], object],
    module: str,
    summary: str,
    steps: int,
    needed: Sequence[str],
    arguments: Sequence[str] | None,
) -> None:
    """The command of an example: ``train`` is given its steps, its seed and the device of this process.

    Args:
        module, summary, steps: see ``command_line.torchrun_parser``.
        needed: packages, without which the command says how to install them.
        arguments: of the command; None: of this process.
    """
    options = command_line.torchrun_parser(module, summary, steps).parse_args(arguments)
    command_line.exit_if_missing(needed)
    with process_group() as device:
        train(options.steps, options.seed, device)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Of all processes: by NCCL where there is a GPU for each of this machine, else by gloo.

    Yields:
        the device of this process.
    """
    on_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def say(text: str) -> None:
    """Print it, in the first process."""
    if dist.get_rank() == 0:
        print(text, flush=True)
