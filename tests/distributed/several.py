"""Makes tests of the scenarios of a module: a file of tests for each, so that they are shared among workers."""

import os
from importlib import import_module

import pytest
import torch

from tests.distributed import ranks

IN_FULL = os.environ.get("FASTPCGRAD_TEST_METHODS") == "all"
SECONDS = 240


def on_several_processes(name, counts, on_gpus=()):
    """A test for each scenario of ``tests.distributed.<name>``, with each number of processes.

    Args:
        on_gpus: numbers of processes with FASTPCGRAD_TEST_DEVICE=cuda, where there are so many GPUs.
    """
    module = import_module(f"tests.distributed.{name}")
    dies = getattr(module, "DIES", None)
    if ranks.DEVICE == "cuda":
        counts = [count for count in on_gpus if count <= torch.cuda.device_count()]

    outcomes = {}

    @pytest.mark.parametrize(
        ("count", "scenario"),
        [
            pytest.param(count, scenario, id=f"{name}, {count} processes: {scenario}")
            for count in counts
            for scenario in module.SCENARIOS
        ],
    )
    def test(count, scenario, tmp_path_factory):
        if count not in outcomes:
            outcomes[count] = ranks.run(module.__name__, count, tmp_path_factory.mktemp("ranks"), SECONDS)
        said = outcomes[count][scenario]
        if scenario == dies:
            said = said[:-1]  # the last one is dead
        assert not any(said), "\n".join(said)

    return test
