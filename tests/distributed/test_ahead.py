"""The scenarios of ``ahead``, see there."""

from tests.distributed.several import IN_FULL, on_several_processes

test_ahead = on_several_processes("ahead", (2, 3) if IN_FULL else (2,), on_gpus=(2, 3))
