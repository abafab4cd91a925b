"""The model, and what goes in."""

import pytest
import torch

from .models import Model


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def x():
    return torch.randn(16, 4)
