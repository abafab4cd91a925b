"""The examples on several processes train on two."""

import pytest

pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn: pip install 'fastpcgrad[examples]'")

from tests.distributed import ranks


def test_they_train_on_two_processes(tmp_path):
    said = ranks.run("tests.distributed.trained_examples", 2, tmp_path, seconds=120)
    assert all(not any(found) for found in said.values()), said
