"""Several tasks in the Trainer of transformers: ``python -m examples.trainer_tasks``.

Trains a small language model on a dict of datasets, one task a micro-batch, with gradient surgery in each layer, and
draws where the tasks conflicted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch

from examples import command_line
from examples.progressions import TASKS, language_model, rows, stack

SUMMARY = "Train a small language model on three tasks with the Trainer and gradient surgery."
NEEDED = ("transformers", "accelerate", "matplotlib")
FIGURE = "trainer_conflicts.png"


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, draw, and give the last step's figures."""
    options = command_line.trainer_options(
        argv,
        "trainer_tasks",
        SUMMARY,
        seeded="the model and the order of the rows",
        needed=NEEDED,
        extras="transformers,examples",
        steps=120,
    )
    from transformers import TrainingArguments

    import fastpcgrad
    from fastpcgrad.integrations.transformers import GradientSurgeryTrainer, Surgery

    torch.set_num_threads(options.threads)
    model = language_model(options.seed)
    monitor = fastpcgrad.ConflictMonitor(model, tasks=list(TASKS), every=2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GradientSurgeryTrainer(
            model=model,
            args=TrainingArguments(
                folder,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=6,
                max_steps=options.steps,
                learning_rate=3e-3,
                logging_steps=max(1, options.steps // 4),
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                seed=options.seed,
                dataloader_pin_memory=False,
            ),
            train_dataset={task: rows(task, 400, options.seed) for task in TASKS},
            data_collator=stack,
            surgery=Surgery(options={"granularity": "layer"}, monitor=monitor),
        )
        trainer.train()
    options.out.mkdir(parents=True, exist_ok=True)
    monitor.plot().savefig(options.out / FIGURE, dpi=110)
    print(f"conflicts: {options.out / FIGURE}")
    losses: dict[str, float] = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return losses


if __name__ == "__main__":
    main()
