"""The scenarios of ``own_tasks``, see there."""

from tests.distributed.several import on_several_processes

test_own_tasks = on_several_processes("own_tasks", (2, 3, 4), on_gpus=(2, 3, 4))
