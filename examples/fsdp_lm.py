"""A small language model under ``fully_shard``: ``torchrun --nproc_per_node 2 -m examples.fsdp_lm``.

Three texts are three tasks. Each process has a shard of every parameter and its own part of every batch; inside
``surgery.task(t)`` the backward pass is the ordinary one, and its sharded gradients are the rows. By NCCL where there
is a GPU for each process, else by gloo.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastpcgrad
from examples.lm_model import LanguageModel, ModelConfig
from examples.processes import run, say

NEEDED = ("sklearn",)
CONFIG = ModelConfig(context=64, width=64, layers=2, heads=4)
SEQUENCES = 4
"""Of each task and process in a step."""


def main(arguments: list[str] | None = None) -> None:
    run(train, "fsdp_lm", "A language model, fully sharded.", 60, NEEDED, arguments)


def train(steps: int, seed: int, device: torch.device) -> list[float]:
    """Train on this process' parts of the batches, and say how it goes in the first one.

    Returns:
        each task's loss in the last step, in bits a byte: the mean over all processes.
    """
    from examples.lm_runs import windows
    from examples.lm_text import load

    texts = load()
    torch.manual_seed(seed)  # the same parameters in all, of which each keeps its shards
    model = LanguageModel(CONFIG).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    surgery = fastpcgrad.GradientSurgery(optimizer, len(texts))
    generator = torch.Generator().manual_seed(seed + dist.get_rank())  # other batches in each
    for step in range(1, steps + 1):
        losses = torch.zeros(len(texts), device=device)
        for t, text in enumerate(texts.values()):
            tokens = windows(text.train, CONFIG.context, SEQUENCES, generator).to(device)
            with surgery.task(t):
                logits = model(tokens[:, :-1])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
            losses[t] = loss.detach() / math.log(2) / dist.get_world_size()
        report = surgery.merge()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(losses)
        if step == 1 or step % 20 == 0:
            listed = ", ".join(f"{name} {bits:.2f}" for name, bits in zip(texts, losses.tolist(), strict=True))
            say(f"step {step}: bits a byte: {listed}; {float(report.conflict_rate):.0%} of task pairs in conflict")
    found: list[float] = losses.tolist()
    return found


if __name__ == "__main__":
    main()
