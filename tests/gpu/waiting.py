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


@contextmanager
def behind(cycles=500_000_000):
    """Within, the GPU's stream sleeps for a quarter of a second; what waits for it, in torch's eyes or not, fails."""
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    awake = torch.cuda.Event()
    awake.record()
    yield
    assert not awake.query(), "the host waited for the stream"
