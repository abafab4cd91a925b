"""Several losses a batch in Lightning: ``python -m examples.lightning_digits``.

One network reads handwritten digits for three questions: which digit it is, how much ink it has, and how far right
the ink lies. Trains in automatic optimization with gradient surgery, and draws where the tasks conflicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples import command_line

SUMMARY = "Train a network with three heads on digits with Lightning and gradient surgery."
NEEDED = ("lightning", "sklearn", "matplotlib")
FIGURE = "lightning_conflicts.png"
TASKS = ["digit", "ink", "place"]


class Reader(nn.Module):
    """A trunk of three layers and a head for each question."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 32, 32, 16)
        self.trunk = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.trunk += nn.Sequential(nn.Linear(before, after), nn.ReLU())
        self.heads = nn.ModuleDict({"digit": nn.Linear(16, 10), "ink": nn.Linear(16, 1), "place": nn.Linear(16, 1)})

    def losses(self, images: Tensor, digits: Tensor, values: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        found = {name: head(features) for name, head in self.heads.items()}
        losses = {"digit": nn.functional.cross_entropy(found["digit"], digits)}
        for k, name in enumerate(("ink", "place")):
            losses[name] = nn.functional.mse_loss(found[name][:, 0], values[:, k])
        return losses


def digits_data() -> torch.utils.data.TensorDataset:
    """Images ``[1797, 64]`` in 0..1, the digits, and ink and place of each, standardized."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.data, dtype=torch.float32) / 16
    columns = images.view(-1, 8, 8).sum(dim=1)
    place = (columns * torch.arange(8.0)).sum(dim=1) / columns.sum(dim=1)
    values = torch.stack([images.sum(dim=1), place], dim=1)
    values = (values - values.mean(dim=0)) / values.std(dim=0)
    return torch.utils.data.TensorDataset(images, torch.tensor(found.target), values)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, draw, and give what was logged last."""
    options = command_line.trainer_options(
        argv,
        "lightning_digits",
        SUMMARY,
        seeded="the model and the order of the images",
        needed=NEEDED,
        extras="lightning,examples",
        epochs=4,
    )
    import lightning as L

    import fastpcgrad
    from fastpcgrad.integrations.lightning import ConflictCallback, GradientSurgeryMixin, Surgery

    class Module(GradientSurgeryMixin, L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.reader = Reader()

        def configure_surgery(self) -> Surgery:
            return Surgery(tasks=TASKS, method=fastpcgrad.methods.PCGrad(reduction="mean"))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=3e-3)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.surgery(self.reader.losses(*batch))

    torch.set_num_threads(options.threads)
    L.seed_everything(options.seed, verbose=False)
    module = Module()
    monitor = fastpcgrad.ConflictMonitor(module, tasks=TASKS, every=4)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # Its own backward passes, so that each layer is seen by itself; Surgery(monitor=monitor) does without.
        callbacks=[ConflictCallback(monitor, lambda own, batch: own.reader.losses(*batch))],
    )
    trainer.fit(module, torch.utils.data.DataLoader(digits_data(), batch_size=32, shuffle=True))
    options.out.mkdir(parents=True, exist_ok=True)
    monitor.plot().savefig(options.out / FIGURE, dpi=110)
    figures = {key: float(value) for key, value in trainer.callback_metrics.items()}
    for name in TASKS:
        print(f"{name}: loss {figures[f'surgery/loss/{name}']:.3f}")
    print(f"conflicts: {options.out / FIGURE}")
    return figures


if __name__ == "__main__":
    main()
