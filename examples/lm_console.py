"""What the language model's training says in the terminal: progress and the table."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from examples.lm_runs import SURGERY, Run
from fastpcgrad.backends.config import backend_in_use


def introduce(console: Console, runs: dict[str, Run]) -> None:
    run = runs[SURGERY]
    settings, surgery = run.settings, run.surgery
    assert surgery is not None
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    tokens = settings.micro_batches * settings.sequences * settings.model.context
    sizes = ", ".join(f"{name} {len(text.train) / 1e6:.2f} MB" for name, text in run.texts.items())
    console.print(
        f"A GPT with {parameters / 1e6:.2f} M parameters on bytes of {sizes}. Each step: {tokens} bytes of each text "
        f"in {settings.micro_batches} micro-batches; the rows take {surgery.nbytes / 1e6:.1f} MB in bfloat16; "
        f"fastpcgrad's backend: {backend_in_use()}.",
        soft_wrap=True,
    )
    for other in runs.values():
        if other.done:
            console.print(f"{other.name}: continues after step {other.done}.")


def train(console: Console, runs: dict[str, Run], checkpoints: dict[str, Path]) -> None:
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=console) as progress:
        bars = {
            name: progress.add_task(name, total=run.settings.steps, completed=run.done, losses="")
            for name, run in runs.items()
        }
        for name, run in runs.items():
            for _ in run.train(checkpoints[name]):
                losses = "  ".join(f"{text} {loss:.2f}" for text, loss in zip(run.texts, run.losses[-1], strict=True))
                progress.update(bars[name], advance=1, losses=losses)


def table(runs: dict[str, Run]) -> Table:
    rows = Table("", title="Same weights, same batches; bits a byte on text that was not trained on")
    for name in runs:
        rows.add_column(name, justify="right")
    held_out = zip(*(run.held_out() for run in runs.values()), strict=True)
    for text, found in zip(runs[SURGERY].texts, held_out, strict=True):
        rows.add_row(text, *(f"{bits:.3f}" for bits in found))
    rows.add_section()
    conflicts = [f"{rate:.0%}" if (rate := _conflict_rate(run)) is not None else "" for run in runs.values()]
    rows.add_row("task pairs in conflict", *conflicts)
    return rows


def explain(console: Console) -> None:
    console.print(
        "Surgery sums the projected gradients, so a step without a conflict is the plain run's step but for the rows' "
        "rounding to bfloat16. One seed and a short training: gaps of a few hundredths may be noise.",
        soft_wrap=True,
    )


def _conflict_rate(run: Run) -> float | None:
    """Share of the pairs, over all steps, whose gradients opposed each other."""
    if not run.cosines:
        return None
    first, second = torch.triu_indices(len(run.texts), len(run.texts), offset=1)
    return (torch.stack(run.cosines)[:, first, second] < 0).double().mean().item()
