"""The scenarios of ``replicated``, see there."""

from tests.distributed.several import on_several_processes

test_replicated = on_several_processes("replicated", (2, 3, 4), on_gpus=(2, 3, 4))
