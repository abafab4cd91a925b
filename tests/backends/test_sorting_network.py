"""Sorting networks sort."""

import itertools

import pytest

from fastpcgrad.backends.sorting_network import sorting_network


@pytest.mark.parametrize("size", range(1, 12))
def test_it_sorts(size):
    """What sorts all sequences of zeros and ones sorts everything (Knuth 5.3.4, theorem Z)."""
    for bits in itertools.product((0, 1), repeat=size):
        entries = list(bits)
        for low, high in sorting_network(size):
            entries[low], entries[high] = sorted((entries[low], entries[high]))
        assert entries == sorted(bits)
