"""The scenarios of ``together``, see there."""

from tests.distributed.several import on_several_processes

test_together = on_several_processes("together", (2, 3), on_gpus=(2, 3))
