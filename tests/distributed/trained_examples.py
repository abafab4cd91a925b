"""The examples on several processes."""

import torch
import torch.distributed as dist

from tests.distributed.scenarios import Scenarios

SCENARIOS = Scenarios()
CPU = torch.device("cpu")


def alike(numbers):
    """As a tensor, where all processes have the same."""
    found = torch.tensor(numbers)
    everywhere = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, found)
    assert all(torch.equal(other, found) for other in everywhere)
    return found


@SCENARIOS.each(ddp_digits=150, task_parallel=100)
def trains_alike_in_all_processes_and_better_than_chance(steps):
    from examples import ddp_digits, task_parallel  # scikit-learn, which not every launch of ranks has

    accuracies = alike((ddp_digits if steps == 150 else task_parallel).train(steps, 0, CPU))
    assert (accuracies > torch.tensor([0.2, 0.2, 0.55])).all(), accuracies


@SCENARIOS.one
def a_sharded_language_model_learns():
    from examples import fsdp_lm

    bits = alike(fsdp_lm.train(12, 0, CPU))
    assert (bits < 6).all(), bits  # of 8
