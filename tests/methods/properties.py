"""What hypothesis draws for the tests of Gram-based methods."""

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
given = hypothesis.given

prop = hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)


@st.composite
def integer_rows(draw, max_tasks=5, width=6):
    """J of small integers, so that zeros, duplicates and exact opposites are frequent."""
    tasks = draw(st.integers(1, max_tasks))
    row = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    return torch.tensor(draw(st.lists(row, min_size=tasks, max_size=tasks)), dtype=torch.float64)
