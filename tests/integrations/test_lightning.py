"""LightningModules with surgery against rows that are packed by hand; recipes of manual optimization and Fabric."""

import logging

import pytest
import torch
from torch import nn

from tests.integrations.tiny import distance

pytest.importorskip("lightning", reason="pip install 'fastpcgrad[lightning]'")

import lightning as L

import fastpcgrad
from fastpcgrad import ConflictMonitor, FastPCGradWarning, methods
from fastpcgrad.integrations.lightning import ConflictCallback, GradientSurgeryMixin, Surgery

pytestmark = [  # of other packages
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|no logger|Checkpoint directory|val_dataloader):"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

TASKS = ["near", "far", "sum"]
x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
y = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def losses_of(model, x, y):
    out = model(x)
    return {
        "near": (out[:, 0] - y[:, 0]).square().mean(),
        "far": 3 * (out[:, 1] + out[:, 0] - y[:, 1]).square().mean(),
        "sum": (out.sum(dim=1) + y[:, 2]).square().mean(),
    }


def fixed():
    return methods.PCGrad("paper", "mean", generator=torch.Generator().manual_seed(7))


class Base(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)


class Plain(Base):
    def training_step(self, batch, _):
        return sum(losses_of(self.net, *batch).values())


class Mine(GradientSurgeryMixin, Base):
    method = staticmethod(fixed)

    def configure_surgery(self):
        return Surgery(method=self.method())

    def training_step(self, batch, _):
        return self.surgery(losses_of(self.net, *batch))


def fit(module, accumulation=1, clip=None, steps=4, **options):
    options = {"max_steps": steps, "logger": False, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=accumulation,
        gradient_clip_val=clip,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module)
    return trainer


def by_hand(accumulation=1, clip=None, steps=4, autocast=False):
    model, method = net(), fixed()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for step in range(steps):
        J = 0
        for i in range(step * accumulation, (step + 1) * accumulation):
            chosen = slice(8 * (i % 8), 8 * (i % 8) + 8)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = losses_of(model, x[chosen], y[chosen])
            rows = [torch.autograd.grad(loss / accumulation, parameters, retain_graph=True) for loss in losses.values()]
            J = J + torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
        G = J.double() @ J.double().mT
        merged = (method.weights(G).float() @ J).split([p.numel() for p in parameters])
        for p, piece in zip(parameters, merged, strict=True):
            p.grad = piece.view_as(p).clone()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return model


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_accumulation_clipping_and_precision_equal_a_loop_by_hand(accumulation, clip, precision):
    module = Mine()
    fit(module, accumulation, clip, precision=precision)
    expected = by_hand(accumulation, clip, autocast=precision != "32-true")
    assert distance(module.net, expected, net()) < 1e-5


def test_the_sum_is_lightning_alone():
    module, plain = Mine(), Plain()
    module.method = methods.Sum
    fit(module, 2, 0.3)
    fit(plain, 2, 0.3)
    assert distance(module.net, plain.net, net()) < 1e-5


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
@pytest.mark.parametrize("skipped", [{1}, {0}, {2, 3}, {1, 2}, {3, 5, 7}])
def test_batches_that_are_skipped(skipped):
    """Without them a step takes what there is of its accumulation."""

    def trained(kind):
        class Some(kind):
            method = staticmethod(methods.Sum)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.05)

            def training_step(self, batch, i):
                return None if i in skipped else super().training_step(batch, i)

        module = Some()
        fit(module, 2)
        return module

    assert distance(trained(Mine).net, trained(Plain).net, net()) < 1e-5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, where graphs break
def test_a_compiled_module():
    module = Mine()
    fit(torch.compile(module, backend="eager"))
    assert distance(module.net, by_hand(), net()) < 1e-5


def test_a_batch_may_be_of_some_tasks_and_a_loss_may_be_weighted():
    class Some(Mine):
        def training_step(self, batch, i):
            losses = losses_of(self.net, *batch)
            return 0.5 * self.surgery({TASKS[i % 3]: losses[TASKS[i % 3]]})

        def configure_surgery(self):
            return Surgery(tasks=TASKS, method=methods.PCGrad("tensorflow"))

    module, model = Some(), net()
    fit(module, 3, steps=2)
    assert module.surgery_report.tasks == (0, 1, 2) and module.surgery_report.names == tuple(TASKS)
    parameters = list(model.parameters())
    surgery = fastpcgrad.GradientSurgery(parameters, tasks=TASKS, method=methods.PCGrad("tensorflow"))
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for step in range(2):
        for i in range(3 * step, 3 * step + 3):
            with surgery.task(TASKS[i % 3]):
                (losses_of(model, x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])[TASKS[i % 3]] / 6).backward()
        surgery.merge()
        optimizer.step()
    assert distance(module.net, model, net()) < 1e-5


@pytest.mark.parametrize("stopped", [2, 1])
def test_a_run_that_was_resumed_goes_on_with_the_same_numbers(tmp_path, stopped):
    class Kept(Mine):
        @staticmethod
        def method():
            return methods.GradVac(beta=0.4, generator=torch.Generator().manual_seed(1))

    options = {"steps": -1, "accumulation": 2, "clip": 0.5}
    whole, first, resumed, anew = Kept(), Kept(), Kept(), Kept()
    fit(whole, max_epochs=3, **options)
    fit(first, max_epochs=stopped, **options).save_checkpoint(tmp_path / "first.ckpt")
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(resumed, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    checkpoint = torch.load(tmp_path / "first.ckpt", weights_only=True)
    with pytest.warns(FastPCGradWarning, match="no state of a surgery"):
        anew.on_load_checkpoint({key: value for key, value in checkpoint.items() if key != "fastpcgrad"})


def test_figures_are_logged():
    module = Mine()
    trainer = fit(module, callbacks=[L.Callback()])
    logged = trainer.callback_metrics
    assert {"surgery/conflict_rate", "surgery/cos/near-far", "surgery/loss/sum", "surgery/weight/far"} <= set(logged)
    assert float(logged["surgery/grad_norm/near"]) == pytest.approx(float(module.surgery_report.norms[0]))


def test_layers_of_the_module():
    class Layers(Mine):
        def configure_surgery(self):
            self.monitor = ConflictMonitor(self, TASKS)
            return Surgery(options={"granularity": "layer"}, monitor=self.monitor)

    module = Layers()
    trainer = fit(module, steps=1, callbacks=[L.Callback()])
    assert module.monitor.looks == 1 and "conflicts/conflict_rate/net.2" in trainer.callback_metrics
    assert list(module.surgery_report.layers) == ["net.0", "net.2"]


# Recipes


def test_manual_optimization_as_the_docs_have_it():
    class Manual(Base):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.rounds = None

        def training_step(self, batch, _):
            optimizer = self.optimizers()
            if self.rounds is None:
                self.rounds = fastpcgrad.GradientSurgery(optimizer, tasks=TASKS, method=fixed())
            losses = losses_of(self.net, *batch)
            for name, loss in losses.items():
                with self.rounds.task(name):
                    self.manual_backward(loss, retain_graph=True)
            self.rounds.merge()
            self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()

    module = Manual()
    fit(module)
    assert distance(module.net, by_hand(clip=0.3), net()) < 1e-5


def test_fabric_as_the_docs_have_it():
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = net()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    surgery = fastpcgrad.GradientSurgery(optimizer, tasks=TASKS, method=fixed())
    for i in range(4):
        losses = losses_of(model, x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
        for name, loss in losses.items():
            with surgery.task(name):
                fabric.backward(loss, retain_graph=True)
        surgery.merge()
        fabric.clip_gradients(model, optimizer, max_norm=0.3)
        optimizer.step()
        optimizer.zero_grad()
    assert distance(model, by_hand(clip=0.3), net()) < 1e-5


# What is refused, and what is said


def test_the_drop_in_from_configure_optimizers_does_not_stay_silent():
    class Wrapped(Plain):
        def configure_optimizers(self):
            return fastpcgrad.PCGrad(super().configure_optimizers())

    with pytest.warns(FastPCGradWarning, match="no surgery has made: call pc_backward"):
        fit(Wrapped())

    class Both(Mine):
        def configure_optimizers(self):
            return fastpcgrad.PCGrad(super().configure_optimizers())

    with pytest.raises(TypeError, match="give the optimizer itself"):
        fit(Both())


def test_a_loss_that_knows_no_tasks_is_refused():
    class Sums(Mine):
        def training_step(self, batch, _):
            return sum(losses_of(self.net, *batch).values())

    with pytest.raises(RuntimeError, match=r"return self\.surgery\("):
        fit(Sums())


def penalty(module):
    return sum(p.square().sum() for p in module.parameters())


def added_in_place(module, losses):
    total = module.surgery(losses)
    total += penalty(module)
    return total


@pytest.mark.parametrize(
    "loss",
    [
        lambda module, losses: module.surgery(losses) + penalty(module),
        lambda module, losses: 0.5 * (penalty(module) - module.surgery(losses)),
        added_in_place,
        lambda module, losses: module.surgery({"near": losses.pop("near")}) + module.surgery(losses),
        lambda module, losses: module.surgery(losses) * 0 + sum(losses.values()),
        lambda module, losses: (module.surgery(losses), sum(losses.values()))[1],
    ],
    ids=["more", "less", "in place", "two dicts", "beside", "another"],
)
def test_what_would_have_no_part_in_the_surgery_is_refused(loss):
    class More(Mine):
        def training_step(self, batch, _):
            return loss(self, losses_of(self.net, *batch))

    module = More()
    with pytest.raises(RuntimeError, match=r"no multiple of the sum.*put it into the dict"):
        fit(module)
    assert all(torch.equal(p, q) for p, q in zip(module.net.parameters(), net().parameters(), strict=True))


def halved_in_place(module, losses):
    total = module.surgery(losses)
    total /= 2
    return total


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        (halved_in_place, 0.5),
        (lambda module, losses: {"loss": 2 * module.surgery(losses), "beside": penalty(module)}, 2),
        (lambda module, losses: module.surgery(losses) + 0 * penalty(module) + 1, 1),  # so that DDP finds all used
        (lambda module, losses: module.surgery(losses) + penalty(module).detach(), 1),
    ],
    ids=["in place", "in a dict", "zero", "detached"],
)
def test_multiples_of_the_sum_of_losses(loss, factor):
    class Multiple(Mine):
        def training_step(self, batch, _):
            return loss(self, losses_of(self.net, *batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05 / factor)

    class Once(Mine):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    module, expected = Multiple(), Once()
    fit(module), fit(expected)
    assert distance(module.net, expected.net, net()) < 1e-5


def test_manual_optimization_names_its_recipe():
    class Manual(Mine):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(RuntimeError, match=r"self\.manual_backward\(loss\)"):
        fit(Manual())


def test_several_optimizers_and_other_strategies_are_refused(monkeypatch):
    module = Mine()
    fit(module, steps=1)
    module._rounds = None
    trainer = type("Trainer", (), {"world_size": 2, "strategy": object(), "optimizers": [None]})()
    monkeypatch.setattr(type(module), "trainer", trainer)
    with pytest.raises(NotImplementedError, match=r"2 processes.*one process, DistributedDataParallel"):
        module._built(dict.fromkeys(TASKS))
    for name in ("DeepSpeedStrategy", "FSDPStrategy"):
        trainer.world_size, trainer.strategy = 1, type(name, (), {})()
        with pytest.raises(NotImplementedError, match=name):
            module._built(dict.fromkeys(TASKS))
    trainer.strategy, trainer.optimizers = object(), [None, None]
    with pytest.raises(NotImplementedError, match="one optimizer; found 2"):
        module._built(dict.fromkeys(TASKS))


def test_the_drop_in_under_a_loss_scale_is_refused():
    """fp16-mixed needs a GPU: a scaler is put where its plugin has one."""

    class Manual(Base):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return fastpcgrad.PCGrad(super().configure_optimizers())

        def training_step(self, batch, _):
            self.trainer.strategy.precision_plugin.scaler = torch.amp.GradScaler("cpu")
            self.optimizers().pc_backward(list(losses_of(self.net, *batch).values()))

    with pytest.raises(RuntimeError, match=r"Lightning multiplies losses by a scale.*manual_backward"):
        fit(Manual())


# Watching


@pytest.mark.parametrize("kind", [Plain, Mine])
def test_weights_are_those_without_a_monitor_to_the_bit(kind):
    weights = []
    for watch in (False, "callback", "step"):
        module = kind()
        module.net.insert(1, nn.Dropout(0.2))
        torch.manual_seed(3)
        if not watch:
            fit(module)
        else:
            monitor = ConflictMonitor(module, TASKS, every=2)
            losses = (lambda own, batch: losses_of(own.net, *batch)) if watch == "callback" else None
            if watch == "step":
                step = module.training_step

                def watched(batch, i, step=step, module=module, monitor=monitor):
                    torch_state = torch.get_rng_state()
                    monitor.observe(losses_of(module.net, *batch))
                    torch.set_rng_state(torch_state)
                    return step(batch, i)

                module.training_step = watched
            trainer = fit(module, callbacks=[ConflictCallback(monitor, losses)])
            assert monitor.calls == 4 and monitor.looks == 2
            assert "conflicts/cos/near-far" in trainer.callback_metrics
            assert "conflicts/conflict_rate/net.0" in trainer.callback_metrics
        weights.append([p.detach() for p in module.parameters()])
    assert all(map(torch.equal, weights[0], weights[1])) and all(map(torch.equal, weights[0], weights[2]))
