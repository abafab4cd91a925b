"""The scenarios of ``replicated``, see there."""

from tests.distributed.several import IN_FULL, on_several_processes

test_replicated = on_several_processes("replicated", (2, 3, 4) if IN_FULL else (2, 3), on_gpus=(2, 3, 4))
