"""Scenarios of trainers on two processes: what they train equals one process with batches twice as large."""

from __future__ import annotations

import logging
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import lightning as L
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import Trainer, TrainingArguments

from fastpcgrad import methods
from fastpcgrad.integrations import accelerate as of_accelerate
from fastpcgrad.integrations.lightning import GradientSurgeryMixin
from fastpcgrad.integrations.transformers import GradientSurgeryTrainer, Surgery
from tests.distributed.scenarios import Scenarios
from tests.integrations.tiny import ARGUMENTS, TASKS, InOrder, Texts, collate, distance, flat, language_model

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
STEPS, PROCESSES = 3, 2
ALONE = {"process_group": "local"}
"""Of a run that stands for one process, in each of those that there are."""


def quietly(work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()


SCENARIOS = Scenarios(quietly)
scenario, each = SCENARIOS.one, SCENARIOS.each


@contextmanager
def processes(together):
    """Accelerate and Lightning see all processes, or each sees itself alone."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    seen = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seen.items():
            patch.setenv(name, value) if together else patch.delenv(name, raising=False)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        yield


@contextmanager
def gpus_in_name():
    """Accelerate shards on GPUs alone, by what it calls the kind of processes: nothing else asks for them."""
    make = PartialState.__init__

    def make_named(state, *args, **kwargs):
        make(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "__init__", make_named)
        yield


def alike(model):
    """The weights, to the bit those of all processes."""
    own = flat(model)
    everywhere = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, own)
    assert all(torch.equal(own, other) for other in everywhere)
    return model


def fixed(together=True, kind=methods.PCGrad, **options):
    """Draws as the first process does; the others' generators do not count."""
    seed = 7 + dist.get_rank() if together else 7
    return kind(generator=torch.Generator().manual_seed(seed), **options)


@contextmanager
def folder():
    """One for all processes."""
    named = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(named)
    yield named[0]
    dist.barrier()


# The Trainer of transformers


class Uneven(Texts):
    """Rows of several lengths, so that processes have different numbers of tokens of a task."""

    def __init__(self, rows, run):
        super().__init__(rows, run)
        for i, row in enumerate(self.rows):
            row["input_ids"] = row["input_ids"][: 3 + i % 5]


class Stock(InOrder, Trainer):
    pass


class Mine(InOrder, GradientSurgeryTrainer):
    pass


def trainer_of(
    kind,
    surgery,
    together,
    data,
    model,
    collator=collate,
    place="out",
    held_out=None,
    settings=TrainingArguments,
    tokenizer=None,
    **options,
):
    given = {
        "per_device_train_batch_size": 2 if together else 2 * PROCESSES,
        "max_steps": STEPS,
    }
    return kind(
        model=model,
        args=settings(place, **{**ARGUMENTS, **given, **options}),
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=tokenizer,
        **({} if surgery is None else {"surgery": surgery}),
    )


def train(kind, surgery, together, *arguments, resume=None, shards=False, **options):
    with processes(together), gpus_in_name() if shards else nullcontext():
        trainer = trainer_of(kind, surgery, together, *arguments, **options)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@each(all_tasks=6, some_tasks=2)
def one_task_a_micro_batch(accumulation):
    """AdamW, clipping, a linear schedule, means over the tokens of a task in all processes."""
    runs = []
    for together in (True, False):
        surgery = Surgery(tasks=TASKS, method=fixed(together), options={} if together else ALONE)
        runs.append(
            train(
                Mine, surgery, together, Uneven(72, run=1), language_model(), gradient_accumulation_steps=accumulation
            )
        )
    several, one = runs
    assert distance(alike(several.model), one.model, language_model()) < 1e-6
    for name in ("loss", "grad_norm", "surgery/loss/a", "surgery/conflict_rate"):
        assert logged(several, name) == pytest.approx(logged(one, name), rel=1e-6)


def fully_sharded():
    """Anew: a Trainer adds to what it is given."""
    return {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


@scenario
def a_trainer_with_fully_shard():
    """The same by the second FSDP."""
    runs = []
    for together in (True, False):
        surgery = Surgery(tasks=TASKS, method=fixed(together), options={} if together else ALONE)
        options = fully_sharded() if together else {}
        data = Uneven(72, run=1)
        runs.append(
            train(
                Mine,
                surgery,
                together,
                data,
                language_model(),
                shards=together,
                gradient_accumulation_steps=6,
                **options,
            )
        )
    several, one = runs
    assert isinstance(next(several.model.parameters()), DTensor)
    assert distance(alike(several.model), one.model, language_model()) < 1e-6
    for name in ("loss", "grad_norm", "surgery/loss/a", "surgery/conflict_rate"):
        assert logged(several, name) == pytest.approx(logged(one, name), rel=1e-6)
    with pytest.raises(NotImplementedError, match=r"6 micro-batches a step.*sync_each_batch"):
        unreduced = {**fully_sharded(), "accelerator_config": {}}
        train(
            Mine,
            Surgery(tasks=TASKS),
            True,
            data,
            language_model(),
            shards=True,
            gradient_accumulation_steps=6,
            **unreduced,
        )


@scenario
def the_sum_is_the_stock_trainer_under_data_parallelism():
    data = Uneven(72, run=2 * PROCESSES)
    surgery = Surgery(tasks=TASKS, method=methods.Sum(), normalize="batch")
    mine = train(Mine, surgery, True, data, language_model())
    plain = Uneven(72, run=2 * PROCESSES)
    plain.rows = [{"input_ids": row["input_ids"]} for row in plain.rows]
    stock = train(Stock, None, True, plain, language_model())
    assert distance(alike(mine.model), stock.model, language_model()) < 1e-6
    assert logged(mine, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-6)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Linear(4, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))
        self.double()

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return tuple(head(hidden)[:, 0] for head in self.heads)


def two_losses(model, x):
    a, b = model(x)
    return {"near": (a - x[:, 0]).square().mean(), "far": 5 * (b + x[:, 1]).square().mean()}


class SeveralLosses(Mine):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.task_losses(two_losses(model, inputs["x"]))


class OneLoss(Stock):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return sum(two_losses(model, inputs["x"]).values())


def points():
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [{"x": own} for own in x]


def stacked(rows):
    return {"x": torch.stack([row["x"] for row in rows])}


@each(whole=1, accumulated=3)
def several_losses_a_micro_batch(accumulation):
    options = {"gradient_accumulation_steps": accumulation, "remove_unused_columns": False, "collator": stacked}
    runs = [
        train(
            SeveralLosses,
            Surgery(method=fixed(together), options={} if together else ALONE),
            together,
            points(),
            TwoHeads(),
            **options,
        )
        for together in (True, False)
    ]
    assert distance(alike(runs[0].model), runs[1].model, TwoHeads()) < 1e-6
    mine = train(SeveralLosses, Surgery(method=methods.Sum()), True, points(), TwoHeads(), **options)
    stock = train(OneLoss, None, True, points(), TwoHeads(), **options)
    assert distance(alike(mine.model), stock.model, TwoHeads()) < 1e-6


@each(data_parallel=False, fully_shard=True)
def a_trainer_that_was_resumed_goes_on_with_the_same_numbers(shards):
    def run(**options):
        surgery = Surgery(tasks=TASKS, method=fixed(kind=methods.GradVac, beta=0.3))
        options |= {"shards": shards, "place": place, "max_steps": 4} | (fully_sharded() if shards else {})
        return train(Mine, surgery, True, Uneven(72, run=1), language_model(), **options)

    with folder() as place:
        whole = run(save_strategy="steps", save_steps=2)
        resumed = run(resume=f"{place}/checkpoint-2", held_out=Uneven(8, run=1), eval_strategy="steps", eval_steps=4)
        assert torch.equal(flat(alike(whole.model)), flat(alike(resumed.model)))
        assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
        (found,) = logged(resumed, "eval_loss")
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        assert set(everywhere) == {found} and found > 0


@scenario
def other_tasks_in_other_processes_are_an_error_in_all():
    class Own(Mine):
        def get_train_dataloader(self):
            rows = [row for row in Texts(36).rows if row["task_id"] == dist.get_rank()]
            return DataLoader(rows, batch_size=2, collate_fn=lambda own: {**collate(own), "task_id": own[0]["task_id"]})

    with pytest.raises(RuntimeError, match=r"by task are \[\[6, 0, 0\], \[0, 6, 0\]\].*leave the batches"):
        train(Own, Surgery(tasks=TASKS), True, Texts(36), language_model())
    with pytest.raises(NotImplementedError, match="split_batches or dispatch_batches"):
        train(
            Mine,
            Surgery(tasks=TASKS),
            True,
            Texts(36),
            language_model(),
            accelerator_config={"split_batches": True},
        )


if find_spec("trl") is not None:

    @scenario
    def supervised_fine_tuning_of_trl():
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from fastpcgrad.integrations.trl import SFTSurgeryTrainer
        from tests.integrations.test_trl import tokenizer

        mine = type("MineInOrder", (InOrder, SFTSurgeryTrainer), {})
        stock = type("StockInOrder", (InOrder, SFTTrainer), {})

        def run(kind, surgery, together):
            rows = [{**row, "input_ids": row["input_ids"].tolist()} for row in Uneven(72, run=2 * PROCESSES).rows]
            options = {"bf16": False, "gradient_checkpointing": False}
            settings = {"collator": None, "settings": SFTConfig, "tokenizer": tokenizer(), **options}
            return train(kind, surgery, together, Dataset.from_list(rows), language_model(), **settings).model

        several, one = (
            run(mine, Surgery(tasks=TASKS, method=fixed(together), options={} if together else ALONE), together)
            for together in (True, False)
        )
        assert distance(alike(several), one, language_model()) < 1e-6
        summed = run(mine, Surgery(tasks=TASKS, method=methods.Sum(), normalize="batch"), True)
        assert distance(alike(summed), run(stock, None, True), language_model()) < 1e-6


# Lightning


class Base(L.LightningModule):
    def __init__(self, together=False):
        super().__init__()
        self.net, self.together = TwoHeads(), together

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self):
        data = TensorDataset(stacked(points())["x"])
        if self.together:
            return DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))
        return DataLoader(data, 4 * PROCESSES)


class Plain(Base):
    def training_step(self, batch, _):
        return sum(two_losses(self.net, *batch).values())


class Surgical(GradientSurgeryMixin, Base):
    made = None

    def configure_surgery(self):
        return self.made

    def training_step(self, batch, i):
        losses = two_losses(self.net, *batch)
        return self.surgery(losses if i % 2 == 0 else {"far": losses["far"]})


def fit(kind, together, surgery=None, path=None, strategy="ddp_find_unused_parameters_true", **length):
    with processes(together):
        module = kind(together)
        module.made = surgery
        trainer = L.Trainer(
            accelerator="cpu",
            strategy=strategy if together else "auto",
            devices=PROCESSES if together else 1,
            use_distributed_sampler=False,  # it would shuffle
            accumulate_grad_batches=2,
            gradient_clip_val=0.3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[L.Callback()],
            **(length or {"max_steps": STEPS}),
        )
        trainer.fit(module, ckpt_path=path, weights_only=True)
    return trainer, module


@scenario
def lightning_with_accumulation_and_clipping():
    """Of every second batch one loss alone."""
    runs = [
        fit(Surgical, together, Surgery(method=fixed(together), options={} if together else ALONE))
        for together in (True, False)
    ]
    (several, module), (one, expected) = runs
    assert distance(alike(module), expected, Base()) < 1e-6
    for name in ("surgery/loss/near", "surgery/conflict_rate"):
        assert float(several.callback_metrics[name]) == pytest.approx(float(one.callback_metrics[name]), rel=1e-6)


class Sharded(Surgical):
    def configure_model(self):
        if self.together:
            for part in (self.net.trunk, *self.net.heads, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


@scenario
def lightning_with_fully_shard():
    runs = [
        fit(Sharded, together, Surgery(method=fixed(together), options={} if together else ALONE), strategy=strategy)
        for together, strategy in ((True, ModelParallelStrategy(PROCESSES, 1)), (False, "auto"))
    ]
    (_, module), (_, expected) = runs
    assert isinstance(next(module.parameters()), DTensor)
    assert distance(alike(module), expected, Base()) < 1e-6


@scenario
def the_sum_is_lightning_under_data_parallelism():
    class All(Surgical):
        def training_step(self, batch, _):
            return self.surgery(two_losses(self.net, *batch))

    _, module = fit(All, True, Surgery(method=methods.Sum()))
    _, plain = fit(Plain, True)
    assert distance(alike(module), plain, Base()) < 1e-6


@scenario
def a_lightning_module_that_was_resumed_goes_on_with_the_same_numbers():
    def surgery():
        return Surgery(method=fixed(kind=methods.GradVac, beta=0.3))

    with folder() as place:
        _, whole = fit(Surgical, True, surgery(), max_epochs=2)
        trainer, _ = fit(Surgical, True, surgery(), max_epochs=1)
        trainer.save_checkpoint(f"{place}/first.ckpt")
        _, resumed = fit(Surgical, True, surgery(), path=f"{place}/first.ckpt", max_epochs=2)
        assert torch.equal(flat(alike(whole)), flat(alike(resumed)))


# Accelerate


def sharding():
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]
    )


def loop(together, method, losses_of, tasks=("near", "far"), place=None, stops=(), start=0, shards=False):
    with processes(together), gpus_in_name() if shards else nullcontext():
        accumulation = GradientAccumulationPlugin(num_steps=2, sync_each_batch=shards)
        plugin = sharding() if shards else None
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=accumulation, fsdp_plugin=plugin)
        model = TwoHeads()
        loader = DataLoader(TensorDataset(stacked(points())["x"]), batch_size=4 if together else 4 * PROCESSES)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        options = {} if together else ALONE
        surgery = None
        if method is not None:
            surgery = of_accelerate.GradientSurgery(accelerator, optimizer, list(tasks), method, **options)
            accelerator.register_for_checkpointing(surgery)
        if start:
            accelerator.load_state(place)
        for i, (x,) in enumerate(loader):
            if i < start:
                continue
            with accelerator.accumulate(model):
                if surgery is None:
                    accelerator.backward(sum(losses_of(model, x, i).values()))
                else:
                    surgery.backward(losses_of(model, x, i))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
            if i + 1 in stops:
                accelerator.save_state(place)
        return accelerator.unwrap_model(model)


def all_losses(model, x, i):
    return two_losses(model, x)


def some_losses(model, x, i):
    """The second micro-batch of each accumulation, before which Accelerate prepares to average, has one loss alone."""
    losses = two_losses(model, x)
    return losses if i % 2 == 0 else {"far": losses["far"]}


@each(all_tasks=all_losses, some_tasks=some_losses)
def accelerate_with_accumulation_and_clipping(losses_of):
    several = loop(True, fixed(), losses_of)
    one = loop(False, fixed(together=False), losses_of)
    assert distance(alike(several), one, TwoHeads()) < 1e-6


@each(all_tasks=all_losses, some_tasks=some_losses)
def accelerate_with_fully_shard(losses_of):
    several = loop(True, fixed(), losses_of, shards=True)
    assert isinstance(next(several.parameters()), DTensor)
    one = loop(False, fixed(together=False), losses_of)
    assert distance(alike(several), one, TwoHeads()) < 1e-6


def far_and_all(model, x, i):
    losses = two_losses(model, x)
    return {"near": losses["near"], "far": losses["far"] + losses["near"] / 7}


def cached_losses(model, x, i):
    """The far one reaches no parameter: its backward pass runs another one, as cached losses do."""

    def run_another(grad):
        with torch.enable_grad():
            far_and_all(getattr(model, "module", model), x, i)["far"].backward(grad)

    losses = far_and_all(model, x, i)
    outside = torch.ones((), dtype=torch.float64, requires_grad=True) * losses["far"].detach()
    outside.register_hook(run_another)
    return {"near": losses["near"], "far": outside}


@scenario
def a_loss_with_a_backward_pass_of_its_own():
    cached, plain = loop(True, fixed(), cached_losses), loop(True, fixed(), far_and_all)
    assert distance(alike(cached), plain, TwoHeads()) < 1e-6


@scenario
def the_sum_is_accelerate_under_data_parallelism():
    several, plain = loop(True, methods.Sum(), all_losses), loop(True, None, all_losses)
    assert distance(alike(several), plain, TwoHeads()) < 1e-6


@scenario
def a_loop_of_accelerate_that_was_resumed_goes_on_with_the_same_numbers():
    def method():
        return fixed(kind=methods.GradVac, beta=0.3)

    with folder() as place:
        whole = loop(True, method(), some_losses, place=place, stops=(4,))
        resumed = loop(True, method(), some_losses, place=place, start=4)
        assert torch.equal(flat(alike(whole)), flat(alike(resumed)))


@scenario
def other_losses_in_other_processes_are_an_error_in_all():
    def own_losses(model, x, i):
        losses = two_losses(model, x)
        return {name: losses[name] for name in (("near", "far")[dist.get_rank()],)}

    with pytest.raises(RuntimeError, match="not at the same point of a round"):
        loop(True, fixed(), own_losses)
