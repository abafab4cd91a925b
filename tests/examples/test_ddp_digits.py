"""The example of data parallelism trains on two processes."""

import pytest

pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn: pip install 'fastpcgrad[examples]'")

from tests.distributed import ranks


def test_it_trains_on_two_processes(tmp_path):
    said = ranks.run("tests.distributed.digits", 2, tmp_path, seconds=120)
    assert all(not any(found) for found in said.values()), said
