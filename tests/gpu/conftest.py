"""What the tests on a GPU share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _memory_for_others():
    """Several processes may test on one GPU: what torch keeps for later here is missing there."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
