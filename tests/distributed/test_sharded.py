"""The scenarios of ``sharded``, see there."""

from tests.distributed.several import on_several_processes

test_sharded = on_several_processes("sharded", (2, 3, 4), on_gpus=(1, 2, 3, 4))
