"""The scenarios of ``replicated_edges``, see there."""

from tests.distributed.several import on_several_processes

test_replicated_edges = on_several_processes("replicated_edges", (2, 3), on_gpus=(2, 3))
