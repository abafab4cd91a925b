"""What may go wrong with a rank, for the test of ``ranks`` itself."""

import os

import torch.distributed as dist


def goes_well():
    dist.barrier()


def fails_on_one():
    assert not dist.get_rank(), f"of rank {dist.get_rank()}"


def dies_on_one():
    if dist.get_rank():
        os._exit(1)


def waits_for_the_dead():
    dist.barrier()


SCENARIOS = {function.__name__: function for function in (goes_well, fails_on_one, dies_on_one, waits_for_the_dead)}
