"""The Trainer with surgery against the stock Trainer, and against loops that pack rows by hand."""

import pytest
import torch

from tests.integrations.tiny import BATCH, TASKS, VOCABULARY, InOrder, Texts, collate, distance, flat, language_model

pytest.importorskip("transformers", reason="pip install 'fastpcgrad[transformers]'")
pytest.importorskip("accelerate", reason="pip install 'fastpcgrad[transformers]'")

from transformers import Trainer, TrainerCallback

import fastpcgrad
from fastpcgrad import ConflictMonitor, FastPCGradWarning, methods
from fastpcgrad.integrations.transformers import ConflictCallback, GradientSurgeryTrainer, Surgery

# Of other packages, when they are imported or used.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ROWS = 144


class Stock(InOrder, Trainer):
    pass


class Mine(InOrder, GradientSurgeryTrainer):
    pass


class Weights(TrainerCallback):
    """What the weights are after each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.steps.append(flat(model))


def fixed():
    """Draws from its own generator, so that all runs draw alike."""
    return methods.PCGrad("paper", generator=torch.Generator().manual_seed(7))


def train(arguments, kind=Mine, surgery=None, data=None, model=None, resume=None, **options):
    model = language_model() if model is None else model
    weights = Weights()
    extra = {} if surgery is None else {"surgery": surgery}
    trainer = kind(
        model=model,
        args=arguments(**options),
        train_dataset=Texts(ROWS) if data is None else data,
        data_collator=collate,
        callbacks=[weights],
        **extra,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.weights = weights.steps
    return trainer


def by_hand(arguments, method, accumulation=6, normalize="task", steps=4, dtype=torch.float64, autocast=False):
    """Rows of ``autograd.grad``, packed, weights of their G; optimizer, schedule and clipping are torch's."""
    model, data = language_model(dtype=dtype), Texts(ROWS)
    model.train()
    parameters = list(model.parameters())
    optimizer = Trainer(model=model, args=arguments()).create_optimizer()  # with its groups of weight decay
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)
    for step in range(steps):
        starts = [(step * accumulation + i) * BATCH % ROWS for i in range(accumulation)]
        micro_batches = [[data[start + j] for j in range(BATCH)] for start in starts]
        rows = {}
        for task in range(3):
            own = [rows for rows in micro_batches if rows[0]["task_id"] == task]
            counted = own if normalize == "task" else micro_batches
            tokens = sum(len(row["input_ids"]) - 1 for batch in counted for row in batch)
            total = 0
            for batch in own:
                found = collate(batch)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits
                logits = logits.float() if autocast else logits
                scores = logits[:, :-1].reshape(-1, VOCABULARY)
                wanted = found["labels"][:, 1:].reshape(-1)
                total = total + torch.nn.functional.cross_entropy(scores, wanted, reduction="sum") / tokens
            if own:
                grads = torch.autograd.grad(total, parameters)
                rows[task] = torch.cat([grad.flatten() for grad in grads])
        J = torch.stack(list(rows.values()))
        weights = method.solve_for((J @ J.mT).double(), tuple(rows)).weights
        merged = (weights.to(J.dtype) @ J).split([p.numel() for p in parameters])
        for p, piece in zip(parameters, merged, strict=True):
            p.grad = piece.view_as(p).clone()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
    return model


@pytest.mark.parametrize("accumulation", [6, 4])
def test_surgery_equals_a_loop_by_hand(arguments, accumulation):
    """AdamW, clipping, a linear schedule; with 4 micro-batches tasks are there once, twice, or not at all."""
    surgery = Surgery(tasks=TASKS, method=fixed())
    trainer = train(arguments, surgery=surgery, gradient_accumulation_steps=accumulation)
    expected = by_hand(arguments, fixed(), accumulation)
    assert distance(trainer.model, expected, language_model()) < 1e-5
    stock = train(arguments, Stock, gradient_accumulation_steps=accumulation, data=without_tasks())
    assert distance(trainer.model, stock.model, language_model()) > 1e-2


def without_tasks():
    data = Texts(ROWS)
    data.rows = [{"input_ids": row["input_ids"]} for row in data.rows]
    return data


def test_the_sum_is_the_stock_trainer(arguments):
    """By the losses as the Trainer divides them; tokens are counted over all tasks."""
    surgery = Surgery(tasks=TASKS, method=methods.Sum(), normalize="batch")
    trainer = train(arguments, surgery=surgery)
    stock = train(arguments, Stock, data=without_tasks())
    assert distance(trainer.model, stock.model, language_model()) < 1e-6
    for mine, theirs in zip(trainer.state.log_history, stock.state.log_history, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "train_loss"):
            assert (key in mine) == (key in theirs)
            assert mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}, {"bf16": True}],
    ids=lambda options: next(iter(options)),
)
def test_what_changes_a_forward_or_backward_pass(arguments, options):
    dtype = torch.float32 if "bf16" in options else torch.float64
    trainer = train(
        arguments, surgery=Surgery(tasks=TASKS, method=fixed()), model=language_model(dtype=dtype), **options
    )
    expected = by_hand(arguments, fixed(), dtype=dtype, autocast="bf16" in options)
    assert distance(trainer.model, expected, language_model(dtype=dtype)) < 1e-5


def test_each_task_has_its_own_means(arguments):
    """Rows of stock normalisation are shorter, and the more so the fewer tokens a task has."""
    norms = {}
    for normalize in ("task", "batch"):
        trainer = train(arguments, surgery=Surgery(tasks=TASKS, method=fixed(), normalize=normalize), max_steps=1)
        norms[normalize] = trainer.surgery_report.norms
    tokens = torch.tensor([3.0, 5.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(norms["batch"] / norms["task"], tokens / tokens.sum(), rtol=1e-4, atol=0)


def test_logs_have_the_figures_and_the_losses_of_each_task(arguments):
    trainer = train(arguments, surgery=Surgery(tasks=TASKS, method=fixed()), logging_steps=2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    report = trainer.surgery_report.as_dict()
    assert {key: logged[-1][key] for key in report} == report
    assert {"surgery/cos/a-b", "surgery/grad_norm/c", "surgery/removed_frac/a"} <= set(report)
    losses = [logged[-1][f"surgery/loss/{name}"] for name in TASKS]
    assert sum(losses) / 3 == pytest.approx(logged[-1]["loss"], rel=1e-6)
    assert all(type(value) in (float, int) for value in logged[-1].values())


@pytest.mark.parametrize("own_generator", [True, False])
def test_a_run_that_was_resumed_goes_on_with_the_same_numbers(arguments, tmp_path, own_generator):
    def surgery():
        method = methods.GradVac(beta=0.3, generator=torch.Generator().manual_seed(7) if own_generator else None)
        return Surgery(tasks=TASKS, method=method)

    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 10}
    whole = train(arguments, surgery=surgery(), **options)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = train(arguments, surgery=surgery(), resume=str(checkpoint), **options)
    assert all(map(torch.equal, whole.weights[2:], resumed.weights)) and len(resumed.weights) == 2
    (checkpoint / "surgery.pt").unlink()
    with pytest.warns(FastPCGradWarning, match="has no surgery.pt"):
        anew = train(arguments, surgery=surgery(), resume=str(checkpoint), **options)
    assert not torch.equal(anew.weights[-1], whole.weights[-1])


def test_a_dict_of_datasets_and_names_of_tasks(arguments):
    """The same as one dataset with a column, where the batches are the same; evaluation does not see the tasks."""
    data = {
        name: [{"input_ids": row["input_ids"]} for row in Texts(ROWS).rows if row["task_id"] == task]
        for task, name in enumerate(TASKS)
    }
    trainer = train(arguments, GradientSurgeryTrainer, Surgery(method=fixed()), data)
    assert trainer.surgery_report.names == tuple(TASKS)
    assert len(trainer.train_dataset) == ROWS
    assert [trainer.train_dataset[i]["task_id"] for i in (0, 47, 48, 143)] == ["a", "a", "b", "c"]
    other = train(arguments, GradientSurgeryTrainer, Surgery(tasks=["c", "a", "b"]), data, max_steps=1)
    assert other.surgery_report.names == ("c", "a", "b")
    assert [other._task_of({"task_id": name}) for name in TASKS] == [1, 2, 0]
    named = train(arguments, surgery=Surgery(method=fixed()), data=Texts(ROWS, named=True))
    assert named.surgery_report.names == tuple(TASKS)
    expected = by_hand(arguments, fixed())
    assert distance(named.model, expected, language_model()) < 1e-5
    named.eval_dataset = Texts(6)
    for kept in (True, False):
        named.args.remove_unused_columns = kept
        assert named.evaluate()["eval_loss"] > 0


def test_shuffled_rows_make_batches_of_one_task(arguments):
    seen = []

    class Watching(GradientSurgeryTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            lengths = (inputs["attention_mask"].sum(dim=1)).tolist()
            seen.append((self.current_task, lengths))
            return super().compute_loss(model, inputs, *args, **kwargs)

    train(arguments, Watching, Surgery(tasks=TASKS), Texts(30, run=1), max_steps=-1, num_train_epochs=2)
    assert len(seen) == 2 * 15
    for task, lengths in seen:
        assert lengths == [{"a": 4, "b": 6, "c": 9}[task]] * 2
    first, second = seen[:15], seen[15:]
    assert first != second, "another order in each epoch"


def test_layers_of_a_model_with_adapters(arguments):
    """LoRA, one surgery a layer: each layer's rows are merged by themselves."""
    peft = pytest.importorskip("peft", reason="pip install 'fastpcgrad[peft]'")

    def lora():
        base = language_model()
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        return peft.get_peft_model(base, config).double()

    model, start = lora(), lora()
    surgery = Surgery(tasks=TASKS, method=methods.PCGrad("tensorflow"), options={"granularity": "layer"})
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_steps": 2}
    trainer = train(arguments, surgery=surgery, model=model, max_grad_norm=0.5, **options)
    prefix = "base_model.model.model.layers"
    assert list(trainer.surgery_report.layers) == [f"{prefix}.0", f"{prefix}.1"]
    assert {f"surgery/conflict_rate/{prefix}.1"} <= set(trainer.state.log_history[0])

    expected, data, method = lora(), Texts(ROWS), methods.PCGrad("tensorflow")
    trained = {name: p for name, p in expected.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    for step in range(2):
        rows = {task: {name: torch.zeros_like(p) for name, p in trained.items()} for task in range(3)}
        for i in range(6):
            batch = [data[(step * 6 + i) * BATCH + j] for j in range(BATCH)]
            grads = torch.autograd.grad(expected(**collate(batch)).loss / 2, list(trained.values()))
            for name, grad in zip(trained, grads, strict=True):
                rows[batch[0]["task_id"]][name] += grad
        for layer in ("layers.0", "layers.1"):
            names = [name for name in trained if layer in name]
            J = torch.stack([torch.cat([rows[task][name].flatten() for name in names]) for task in range(3)])
            merged = (method.weights(J @ J.mT) @ J).split([trained[name].numel() for name in names])
            for name, piece in zip(names, merged, strict=True):
                trained[name].grad = piece.view_as(trained[name]).clone()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
    assert distance(model, expected, start) < 1e-5


class TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = torch.nn.Linear(4, 8)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(2))
        self.double()

    def forward(self, x, labels=None):
        hidden = self.trunk(x).tanh()
        return tuple(head(hidden)[:, 0] for head in self.heads)


class SeveralLosses(InOrder, GradientSurgeryTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = two_losses(model, inputs["x"], inputs["y"])
        loss = self.task_losses({"near": losses[0], "far": losses[1]})
        return (loss, {"loss": loss, "x": inputs["x"]}) if return_outputs else loss


def two_losses(model, x, y):
    a, b = model(x)
    return (a - y[:, 0]).square().mean(), 5 * (b - y[:, 1]).square().mean()


def pairs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(96, 2, generator=generator, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("accumulation", [1, 3])
def test_several_losses_a_micro_batch(arguments, accumulation):
    x, y = pairs()
    options = {
        "optim": "adamw_torch",
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4,
        "remove_unused_columns": False,
        "label_names": ["y"],
    }
    model = TwoHeads()
    trainer = SeveralLosses(
        model=model,
        args=arguments(**options),
        train_dataset=[{"x": x[i], "y": y[i]} for i in range(96)],
        eval_dataset=[{"x": x[i], "y": y[i]} for i in range(4)],
        surgery=Surgery(method=fixed()),
    )
    trainer.train()
    expected, method = TwoHeads(), fixed()
    parameters = list(expected.parameters())
    optimizer = Trainer(model=expected, args=arguments(**options)).create_optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (4 - step) / 4)
    for step in range(4):
        rows = torch.zeros(2, sum(p.numel() for p in parameters), dtype=torch.float64)
        for k in range(accumulation):
            chosen = slice(4 * (step * accumulation + k), 4 * (step * accumulation + k + 1))
            for t, loss in enumerate(two_losses(expected, x[chosen], y[chosen])):
                grads = torch.autograd.grad(
                    loss / accumulation, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                rows[t] += torch.cat([grad.flatten() for grad in grads])
        merged = (method.weights(rows @ rows.mT) @ rows).split([p.numel() for p in parameters])
        for p, piece in zip(parameters, merged, strict=True):
            p.grad = piece.view_as(p).clone()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
    assert distance(model, expected, TwoHeads()) < 1e-5
    logged = trainer.state.log_history[0]
    assert logged["surgery/loss/near"] + logged["surgery/loss/far"] == pytest.approx(logged["loss"], rel=1e-6)
    assert trainer.surgery_report.names == ("near", "far") and trainer.current_task is None
    assert trainer.evaluate()["eval_loss"] > 0


# What is refused, and what is said


def test_the_drop_in_in_the_optimizers_place_does_not_stay_silent(arguments):
    model = language_model()
    wrapped = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    stock = Stock(
        model=model,
        args=arguments(max_steps=1),
        train_dataset=without_tasks(),
        data_collator=collate,
        optimizers=(wrapped, None),
    )
    with pytest.warns(FastPCGradWarning, match=r"no surgery has made: call pc_backward"):
        stock.train()
    mine = Mine(
        model=model,
        args=arguments(max_steps=1),
        train_dataset=Texts(ROWS),
        data_collator=collate,
        optimizers=(wrapped, None),
        surgery=Surgery(tasks=TASKS),
    )
    with pytest.raises(TypeError, match="give the optimizer itself"):
        mine.train()


def test_a_loss_of_no_task_is_refused(arguments):
    with pytest.raises(KeyError, match=r"no 'task_id' in a micro-batch of.*'input_ids'.*task_losses"):
        train(arguments, surgery=Surgery(tasks=TASKS), data=without_tasks())


def test_losses_of_several_tasks_on_a_batch_of_one_are_refused(arguments):
    class Both(Mine):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return self.task_losses({"a": super().compute_loss(model, inputs, *args, **kwargs)})

    with pytest.raises(RuntimeError, match="of one task, 'a'"):
        train(arguments, Both, Surgery(tasks=TASKS))


@pytest.mark.parametrize("way", ["in place", "added", "two dicts"])
def test_what_would_have_no_part_in_the_surgery_is_refused(arguments, way):
    class More(SeveralLosses):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            near, far = two_losses(model, inputs["x"], inputs["y"])
            if way == "two dicts":
                return self.task_losses({"near": near}) + self.task_losses({"far": far})
            total, penalty = self.task_losses({"near": near, "far": far}), sum(p.sum() for p in model.parameters())
            if way == "added":
                return total + penalty
            total += penalty
            return total

    x, y = pairs()
    model = TwoHeads()
    trainer = More(
        model=model,
        args=arguments(remove_unused_columns=False),
        train_dataset=[{"x": x[i], "y": y[i]} for i in range(96)],
        surgery=Surgery(tasks=["near", "far"]),
    )
    with pytest.raises(RuntimeError, match=r"no multiple of the sum.*put it into the dict"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), TwoHeads().parameters(), strict=True))


def test_a_mixed_batch_is_refused_where_a_loader_of_ones_own_made_it(arguments):
    class Own(Mine):
        def get_train_dataloader(self):
            def collated(rows):
                return {**collate(rows), "task_id": torch.tensor([row["task_id"] for row in rows])}

            return torch.utils.data.DataLoader(Texts(12, run=self.run), batch_size=2, collate_fn=collated)

    Own.run = 1
    with pytest.raises(ValueError, match=r"one task; found \['0', '1'\] in 'task_id'"):
        train(arguments, Own, Surgery(tasks=TASKS))
    Own.run = 2
    trainer = train(arguments, Own, Surgery(tasks=TASKS), max_steps=1)
    assert trainer.surgery_report.tasks == (0, 1, 2)
    with pytest.raises(ValueError, match=r"how many there are: give Surgery\(tasks="):
        train(arguments, Own, Surgery())


def test_an_unknown_task_is_refused_with_those_that_are_known(arguments):
    with pytest.raises(IndexError, match=r"0\.\.1.*found 2"):
        train(arguments, surgery=Surgery(tasks=["a", "b"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": "lomo"}, "lomo"),
        ({"optim": "galore_adamw_layerwise"}, "layerwise"),
        ({"packing": True}, "packing"),
        ({"distributed_type": "DEEPSPEED"}, "DEEPSPEED"),
        ({"distributed_type": "FSDP"}, "FSDP"),
        ({"distributed_type": "XLA"}, "XLA"),
        ({"n_gpu": 2}, "DataParallel"),
        ({"is_distributed_loading_by_transformers": True}, "sharded when it was loaded"),
    ],
    ids=lambda value: None if isinstance(value, str) else "=".join(map(str, *value.items())),
)
def test_what_is_not_covered_is_refused_by_name(arguments, change, words):
    """Of most there is none here: the refusal looks at what a Trainer says of itself."""
    trainer = Mine(model=language_model(), args=arguments(), train_dataset=Texts(6), surgery=Surgery(tasks=TASKS))
    ((name, value),) = change.items()
    if name == "distributed_type":
        trainer.accelerator = type(
            "Accelerator", (), {"distributed_type": value, "num_processes": 2, "is_fsdp2": False}
        )()
    elif name == "is_distributed_loading_by_transformers":
        trainer.is_distributed_loading_by_transformers = value
    else:
        trainer.args = type(
            "Arguments", (), {"optim": "adamw_torch", "n_gpu": 1, "gradient_accumulation_steps": 1, name: value}
        )()
    with pytest.raises(NotImplementedError, match=words):
        trainer._refuse()


def test_settings_that_cannot_be_are_refused():
    for wrong, error, words in (
        ({"normalize": "tokens"}, ValueError, "'task' or 'batch'"),
        ({"tasks": []}, ValueError, "one name or more"),
        ({"method": "pcgrad"}, TypeError, "pcgrad"),
        ({"options": {"tasks": 2}}, ValueError, "tasks"),
    ):
        with pytest.raises(error, match=words):
            Surgery(**wrong)


def test_fewer_micro_batches_than_tasks_are_said(arguments):
    with pytest.warns(FastPCGradWarning, match="2 micro-batches for 3 tasks"):
        train(arguments, surgery=Surgery(tasks=TASKS), gradient_accumulation_steps=2, max_steps=1)


def test_a_failure_leaves_no_half_round(arguments):
    class Fails(Mine):
        fails = True

        def compute_loss(self, *args, **kwargs):
            if self.current_task == "b" and self.fails:
                raise ZeroDivisionError
            return super().compute_loss(*args, **kwargs)

    trainer = Fails(
        model=language_model(),
        args=arguments(max_steps=1),
        train_dataset=Texts(ROWS),
        data_collator=collate,
        surgery=Surgery(tasks=TASKS, method=fixed()),
    )
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    Fails.fails = False
    trainer.train()
    assert trainer.surgery_report.tasks == (0, 1, 2)


# Watching


@pytest.mark.parametrize("kind", [Stock, Mine])
def test_weights_are_those_without_a_monitor_to_the_bit(arguments, kind):
    def probe(model):
        data = Texts(6)
        return {name: model(**collate([data[2 * t], data[2 * t + 1]])).loss for t, name in enumerate(TASKS)}

    class Reports(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, **_):
            self.seen = (*self.seen, *logs)

    runs = []
    for watched in (False, True):
        model, reports = language_model(), Reports()
        trainer = kind(
            model=model,
            args=arguments(),
            train_dataset=Texts(ROWS) if kind is Mine else without_tasks(),
            data_collator=collate,
            callbacks=[reports],
            **({"surgery": Surgery(tasks=TASKS, method=fixed())} if kind is Mine else {}),
        )
        if watched:
            monitor = ConflictMonitor(model, TASKS, every=2)
            trainer.callback_handler.callbacks.insert(0, ConflictCallback(monitor, probe))
        trainer.train()
        runs.append(model)
    assert torch.equal(flat(runs[0]), flat(runs[1]))
    assert monitor.calls == 4 and monitor.looks == 2
    logged = [entry for entry in trainer.state.log_history if "conflicts/cos/a-b" in entry]
    assert [entry["step"] for entry in logged] == [1, 3]
    assert "conflicts/conflict_rate/model.layers.1" in logged[0]
    assert "conflicts/cos/a-b" in reports.seen


def test_reports_of_a_trainer_are_looks(arguments):
    model = language_model()
    monitor = ConflictMonitor(model, TASKS, every=2)
    trainer = train(
        arguments, surgery=Surgery(tasks=TASKS, monitor=monitor, options={"granularity": "layer"}), model=model
    )
    assert monitor.calls == 4 and monitor.looks == 2
    assert trainer.state.log_history[0]["conflicts/conflict_rate/lm_head"] >= 0


# Datasets of the library that most use with the Trainer


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return pytest.importorskip("datasets", reason="pip install 'fastpcgrad[test]'")


def padded(rows):
    return collate([{"input_ids": torch.as_tensor(row["input_ids"])} for row in rows])


@pytest.mark.parametrize("form", ["column", "named column", "dict", "stream"])
def test_datasets_of_every_form_give_the_same(arguments, datasets, form):
    """A column of indices or names, a ``DatasetDict``, a stream of rows whose batches hold one task each."""
    rows = [{"input_ids": row["input_ids"].tolist(), "task_id": row["task_id"]} for row in Texts(ROWS).rows]
    extra = [{**row, "unused": "text"} for row in rows]
    collator, kind = padded, Mine
    if form == "column":
        data = datasets.Dataset.from_list(extra)
    elif form == "named column":
        data = datasets.Dataset.from_list([{**row, "task_id": TASKS[row["task_id"]]} for row in extra])
    elif form == "dict":
        of_tasks = {name: [row for row in extra if row["task_id"] == t] for t, name in enumerate(TASKS)}
        data = datasets.DatasetDict({name: datasets.Dataset.from_list(own) for name, own in of_tasks.items()})

        class kind(GradientSurgeryTrainer):  # in turn, as the rows of the others come
            def _get_train_sampler(self, *_):
                each = ROWS // 3
                order = [t * each + 2 * i + j for i in range(each // 2) for t in range(3) for j in range(2)]
                return type(
                    "InTurn",
                    (torch.utils.data.Sampler,),
                    {"__iter__": lambda _: iter(order), "__len__": lambda _: ROWS},
                )()

    else:
        data = datasets.Dataset.from_list(rows).to_iterable_dataset()

        def collator(rows):
            return {**padded(rows), "task_id": torch.tensor([row["task_id"] for row in rows])}

    trainer = kind(
        model=language_model(),
        args=arguments(),
        train_dataset=data,
        data_collator=collator,
        surgery=Surgery(tasks=TASKS, method=fixed()),
    )
    trainer.train()
    assert distance(trainer.model, by_hand(arguments, fixed()), language_model()) < 1e-5
