"""A guard against calls that wait for the GPU."""

import warnings
from contextlib import contextmanager

import torch


@contextmanager
def no_waiting():
    """Within, a call that waits for the GPU raises."""
    try:
        with warnings.catch_warnings():  # at its first use torch warns that it does not find every such call
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
