"""Trainers on two processes, see ``on_processes``."""

import pytest

from tests.distributed import ranks

pytest.importorskip("transformers", reason="pip install 'fastpcgrad[transformers]'")
pytest.importorskip("lightning", reason="pip install 'fastpcgrad[lightning]'")

from tests.integrations import on_processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return ranks.run(on_processes.__name__, on_processes.PROCESSES, tmp_path_factory.mktemp("ranks"), seconds=120)


@pytest.mark.parametrize("name", on_processes.SCENARIOS)
def test_on_two_processes(name, outcomes):
    said = outcomes[name]
    assert said == [""] * on_processes.PROCESSES, "\n".join(said)
