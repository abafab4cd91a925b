"""The scenarios of ``parts_of_a_batch``, see there."""

from tests.distributed.several import on_several_processes

test_parts_of_a_batch = on_several_processes("parts_of_a_batch", (2, 3))
