"""Surgery over several real processes: DTensors, rounds in step, parts of a batch."""

import os
from importlib import import_module

import pytest
import torch

from tests.distributed import ranks

IN_FULL = os.environ.get("FASTPCGRAD_TEST_METHODS") == "all"
MODULES = {
    "sharded": (2, 3, 4),
    "together": (2, 3),
    "replicated": (2, 3, 4),
    "replicated_edges": (2, 3),
    "ahead": (2, 3) if IN_FULL else (2,),
    "parts_of_a_batch": (2, 3),
    "own_tasks": (2, 3, 4),
}
ON_GPUS = {
    "sharded": (1, 2, 3, 4),
    "together": (2, 3),
    "replicated": (2, 3, 4),
    "replicated_edges": (2, 3),
    "ahead": (2, 3),
    "own_tasks": (2, 3, 4),
}
"""With FASTPCGRAD_TEST_DEVICE=cuda, where there are so many."""
SECONDS = 240

_outcomes: dict[tuple[str, int], dict[str, list[str]]] = {}


def cases():
    on_gpus = ranks.DEVICE == "cuda"
    for name, counts in (ON_GPUS if on_gpus else MODULES).items():
        for count in counts:
            if not on_gpus or count <= torch.cuda.device_count():
                for scenario in import_module(f"tests.distributed.{name}").SCENARIOS:
                    yield pytest.param(name, count, scenario, id=f"{name}, {count} processes: {scenario}")


@pytest.mark.parametrize(("name", "count", "scenario"), list(cases()))
def test_on_several_processes(name, count, scenario, tmp_path_factory):
    if (name, count) not in _outcomes:
        folder = tmp_path_factory.mktemp("ranks")
        _outcomes[name, count] = ranks.run(f"tests.distributed.{name}", count, folder, SECONDS)
    said = _outcomes[name, count][scenario]
    if scenario == getattr(import_module(f"tests.distributed.{name}"), "DIES", None):
        said = said[:-1]  # the last one is dead
    assert not any(said), "\n".join(said)
