"""A loop of Accelerate with surgery against rows that are packed by hand."""

import pytest
import torch
from torch import nn

from tests.integrations.tiny import TASKS, Texts, collate, distance, language_model

pytest.importorskip("accelerate", reason="pip install 'fastpcgrad[accelerate]'")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

import fastpcgrad
from fastpcgrad import ConflictMonitor, FastPCGradWarning, methods
from fastpcgrad.integrations.accelerate import GradientSurgery, Surgery

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS = 3
x = torch.randn(96, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
y = torch.randn(96, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def losses_of(model, i):
    out, wanted = model(x[8 * i : 8 * i + 8]), y[8 * i : 8 * i + 8]
    near = (out[:, 0] - wanted[:, 0]).square().mean()
    return {"near": near, "far": 3 * (out.sum(dim=1) - wanted[:, 1]).square().mean()}


def prepared(accumulation=2, **options):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    surgery = GradientSurgery(accelerator, optimizer, **{"tasks": ["near", "far"], **options})
    return accelerator, model, optimizer, surgery


def all_tasks(i, losses):
    return losses


def run(accelerator, model, optimizer, surgery, *, start=0, steps=STEPS, accumulation=2, clip=0.5, keep=all_tasks):
    for i in range(start * accumulation, (start + steps) * accumulation):
        with accelerator.accumulate(model):
            surgery.backward(keep(i, losses_of(model, i)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def by_hand(method, steps=STEPS, accumulation=2, clip=0.5, keep=all_tasks):
    model = net()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for step in range(steps):
        rows = {}
        for i in range(step * accumulation, (step + 1) * accumulation):
            for name, loss in keep(i, losses_of(model, i)).items():
                grads = torch.autograd.grad(loss / accumulation, parameters, retain_graph=True)
                row = torch.cat([grad.flatten() for grad in grads])
                rows[name] = rows[name] + row if name in rows else row
        J = torch.stack([rows[name] for name in ("near", "far") if name in rows])
        merged = (method.weights(J @ J.mT) @ J).split([p.numel() for p in parameters])
        for p, piece in zip(parameters, merged, strict=True):
            p.grad = piece.view_as(p).clone()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return model


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accumulation_and_clipping_equal_a_loop_by_hand(accumulation):
    monitor = ConflictMonitor(net(), ["near", "far"], every=1)
    accelerator, model, optimizer, surgery = prepared(
        accumulation, method=methods.PCGrad("tensorflow"), monitor=monitor
    )
    run(accelerator, model, optimizer, surgery, accumulation=accumulation)
    assert monitor.looks == STEPS
    expected = by_hand(methods.PCGrad("tensorflow"), accumulation=accumulation)
    assert distance(model, expected, net()) < 1e-10
    assert surgery.report.names == surgery.tasks == ("near", "far")


def test_the_sum_is_accelerate_alone():
    accelerator, model, optimizer, surgery = prepared(method=methods.Sum())
    run(accelerator, model, optimizer, surgery)
    accelerator, plain, optimizer, _ = prepared()
    for i in range(2 * STEPS):
        with accelerator.accumulate(plain):
            accelerator.backward(sum(losses_of(plain, i).values()))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert distance(model, plain, net()) < 1e-10


def test_a_micro_batch_may_be_of_one_task():
    def keep(i, named):
        return {"far": named["far"]} if i % 2 else {"near": named["near"]}

    method = methods.PCGrad("tensorflow")
    accelerator, model, optimizer, surgery = prepared(4, method=method)
    run(accelerator, model, optimizer, surgery, accumulation=4, keep=keep)
    expected = by_hand(methods.PCGrad("tensorflow"), accumulation=4, keep=keep)
    assert distance(model, expected, net()) < 1e-10


def test_adapters_by_layer():
    """LoRA on a language model: each layer's rows are merged by themselves."""
    pytest.importorskip("transformers", reason="pip install 'fastpcgrad[transformers]'")
    peft = pytest.importorskip("peft", reason="pip install 'fastpcgrad[peft]'")

    def lora():
        base = language_model()
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        return peft.get_peft_model(base, config).double()

    data, accelerator = Texts(24), Accelerator(cpu=True, gradient_accumulation_steps=6)
    model = lora()
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.5))
    method = methods.PCGrad("tensorflow")
    surgery = GradientSurgery(accelerator, optimizer, TASKS, method, model=model, granularity="layer")
    expected = lora()
    names = {name: p for name, p in expected.named_parameters() if p.requires_grad}
    by_hand = torch.optim.SGD(names.values(), lr=0.5)
    for step in range(2):
        rows = {name: {key: torch.zeros_like(p) for key, p in names.items()} for name in TASKS}
        for i in range(6 * step, 6 * step + 6):
            batch, task = collate([data[2 * i], data[2 * i + 1]]), TASKS[data[2 * i]["task_id"]]
            with accelerator.accumulate(model):
                surgery.backward({task: model(**batch).loss})
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 0.5)
                optimizer.step()
                optimizer.zero_grad()
            grads = torch.autograd.grad(expected(**batch).loss / 6, list(names.values()))
            for key, grad in zip(names, grads, strict=True):
                rows[task][key] += grad
        for layer in ("layers.0.", "layers.1."):
            own = [key for key in names if layer in key]
            J = torch.stack([torch.cat([rows[task][key].flatten() for key in own]) for task in TASKS])
            merged = (method.weights(J @ J.mT) @ J).split([names[key].numel() for key in own])
            for key, piece in zip(own, merged, strict=True):
                names[key].grad = piece.view_as(names[key]).clone()
        nn.utils.clip_grad_norm_(names.values(), 0.5)
        by_hand.step()
    assert distance(model, expected, lora()) < 1e-10
    assert [layer.rpartition(".")[2] for layer in surgery.report.layers] == ["0", "1"]


def test_a_run_that_was_resumed_goes_on_with_the_same_numbers(tmp_path):
    def made():
        method = methods.GradVac(beta=0.3, generator=torch.Generator().manual_seed(7))
        accelerator, model, optimizer, surgery = prepared(method=method)
        accelerator.register_for_checkpointing(surgery)
        return accelerator, model, optimizer, surgery

    whole = made()
    run(*whole, steps=2)
    whole[0].save_state(tmp_path)
    run(*whole, start=2, steps=3)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    resumed = made()
    resumed[0].load_state(tmp_path)
    run(*resumed, start=2, steps=3)
    assert all(map(torch.equal, whole[1].parameters(), resumed[1].parameters()))


# Traps of the drop-in under an Accelerator


def test_the_drop_in_around_a_prepared_optimizer_works():
    accelerator = Accelerator(cpu=True)
    model, plain = net(), net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for own, wrapped in (
        (model, fastpcgrad.PCGrad(optimizer, variant="tensorflow")),
        (plain, fastpcgrad.PCGrad(torch.optim.SGD(plain.parameters(), lr=0.1), variant="tensorflow")),
    ):
        wrapped.zero_grad()
        wrapped.pc_backward(list(losses_of(own, 0).values()))
        wrapped.step()
    assert distance(model, plain, net()) == 0


def test_the_drop_in_that_was_prepared_names_what_to_use():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    model, optimizer = accelerator.prepare(model, fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(AttributeError, match="pc_backward"):
        optimizer.pc_backward(list(losses_of(model, 0).values()))
    with pytest.raises(TypeError, match="give the optimizer itself"):
        GradientSurgery(accelerator, optimizer, ["near", "far"])
    with pytest.warns(FastPCGradWarning, match="replaced the gradients of the last call"):
        for i in range(2):
            with accelerator.accumulate(model):
                optimizer.optimizer.pc_backward(list(losses_of(model, i).values()))
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("place", ["inside", "around"])
def test_losses_without_the_scale_of_fp16_are_refused(monkeypatch, place):
    """Their gradients would be divided by a scale that they do not have. There is no fp16 here: its marks are set."""
    accelerator = Accelerator(cpu=True)
    model = net()
    if place == "inside":
        wrapped = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.prepare(wrapped)
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    else:
        optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.scaler = torch.amp.GradScaler("cpu")
        wrapped = fastpcgrad.PCGrad(optimizer)
    with pytest.raises(RuntimeError, match=r"scale.*integrations\.accelerate\.GradientSurgery"):
        wrapped.pc_backward(list(losses_of(model, 0).values()))
    assert model[0].weight.grad is None


def test_a_loss_scale_is_carried():
    """fp16's scaler, on a CPU: rows are scaled, and so is what is merged of them."""
    accelerator, model, optimizer, surgery = prepared(1, method=methods.PCGrad("tensorflow"))
    surgery.backward(losses_of(model, 0))
    plain = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    surgery.backward(losses_of(model, 0))
    for p, grad in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, 1024 * grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        *(
            ({"distributed_type": kind}, f"{kind}.*cover one process.*fsdp_version=2")
            for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM")
        ),
        ({"distributed_type": "MULTI_GPU", "parallelism_config": "ParallelismConfig(tp_size=2)"}, "tp_size=2.*sharded"),
    ],
    ids=lambda value: value["distributed_type"] if isinstance(value, dict) else None,
)
def test_what_is_not_covered_is_refused_by_name(marks, words):
    accelerator = type(
        "Accelerator", (), {"num_processes": 2, "gradient_accumulation_steps": 1, "is_fsdp2": False, **marks}
    )()
    with pytest.raises(NotImplementedError, match=words):
        GradientSurgery(accelerator, torch.optim.SGD(net().parameters(), lr=0.1), 2)


def test_tasks_are_not_shared_out_among_the_processes_of_a_trainer():
    with pytest.raises(ValueError, match=r"parallel='task'.*its part of every batch"):
        Surgery(options={"parallel": "task"})


def test_wrong_losses_and_optimizers_are_named():
    accelerator, model, _, surgery = prepared()
    with pytest.raises(ValueError, match="'fare'"):
        surgery.backward({"fare": losses_of(model, 0)["far"]})
    with pytest.raises(ValueError, match="2 tasks"):
        surgery.backward([*losses_of(model, 0).values()] * 2)
    with pytest.raises(TypeError, match=r"accelerator\.prepare"):
        GradientSurgery(accelerator, model.parameters(), 2)
    with pytest.raises(ZeroDivisionError), accelerator.accumulate(model):
        losses = losses_of(model, 0)
        losses["far"].register_hook(lambda grad: 1 / 0)
        surgery.backward(losses)
    assert surgery._surgery._layouts.current.capture.rows.tasks == []


def test_one_dataclass_for_all():
    from fastpcgrad.integrations import Surgery as shared

    assert Surgery is shared
