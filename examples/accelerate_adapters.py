"""Adapters that several tasks share, with Accelerate and PEFT: ``python -m examples.accelerate_adapters``.

Trains LoRA adapters of a frozen language model on three tasks, one surgery a layer, with accumulation and clipping, and
draws where the tasks conflicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from examples import command_line
from examples.progressions import TASKS, language_model, rows, stack

SUMMARY = "Train LoRA adapters on three tasks with Accelerate and gradient surgery."
NEEDED = ("accelerate", "peft", "transformers", "matplotlib")
FIGURE = "adapter_conflicts.png"
BATCH = 8


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train, draw, and give each task's losses."""
    options = command_line.trainer_options(
        argv,
        "accelerate_adapters",
        SUMMARY,
        seeded="the model and the rows",
        needed=NEEDED,
        extras="peft,examples",
        steps=100,
    )
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    import fastpcgrad
    from fastpcgrad.integrations.accelerate import GradientSurgery

    torch.set_num_threads(options.threads)
    base = language_model(options.seed)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(TASKS))
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=2e-2))
    monitor = fastpcgrad.ConflictMonitor(model, tasks=list(TASKS), every=2)
    surgery = GradientSurgery(
        accelerator, optimizer, tasks=list(TASKS), model=model, granularity="layer", monitor=monitor
    )
    data = {task: rows(task, 50 * BATCH, options.seed) for task in TASKS}
    losses: dict[str, list[float]] = {task: [] for task in TASKS}
    for step in range(options.steps):
        at = step * BATCH % (50 * BATCH)
        for task in TASKS:
            with accelerator.accumulate(model):
                loss = model(**stack(data[task][at : at + BATCH])).loss
                surgery.backward({task: loss})
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses[task].append(loss.item())
    options.out.mkdir(parents=True, exist_ok=True)
    monitor.plot().savefig(options.out / FIGURE, dpi=110)
    for task, own in losses.items():
        print(f"{task}: loss {own[0]:.3f} at the first step, {own[-1]:.3f} at the last")
    print(f"conflicts: {options.out / FIGURE}")
    return losses


if __name__ == "__main__":
    main()
