"""ConflictMonitor: averages against a direct computation, and training that does not notice it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpcgrad
from fastpcgrad import ConflictMonitor, methods

TASKS = ["seg", "depth", "edges"]


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def losses_of(model, x):
    out = model(x)
    return {name: (out[:, t] - x.sum(dim=1) * (-1) ** t).square().mean() for t, name in enumerate(TASKS)}


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


def rows_of(losses, parameters):
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
            for loss in losses.values()
        ]
    )


def train(monitor=None, surgery=False):
    model = model_of()
    dropping = nn.Sequential(model, nn.Dropout(0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wrapped = fastpcgrad.PCGrad(optimizer, tasks=TASKS) if surgery else None
    monitor = None if monitor is None else monitor(model)
    torch.manual_seed(2)
    for x in batches(7):
        losses = losses_of(dropping, x)
        if monitor is not None:
            monitor.observe(losses)
        optimizer.zero_grad()
        if wrapped is not None:
            wrapped.pc_backward(losses)
        else:
            sum(losses.values()).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], torch.get_rng_state(), monitor


@pytest.mark.parametrize("surgery", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_weights_and_generators_are_those_without_a_monitor_to_the_bit(surgery, every):
    weights, generator, _ = train(surgery=surgery)
    watched, after, monitor = train(lambda model: ConflictMonitor(model, TASKS, every=every), surgery)
    assert all(map(torch.equal, weights, watched)) and torch.equal(generator, after)
    assert monitor.calls == 7 and monitor.looks == len(range(0, 7, every))


def test_gradients_that_are_there_stay_and_no_hook_of_theirs_runs():
    model, (x,) = model_of(), batches(1)
    ran = []
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(ran.append)
    before = [p.grad for p in model.parameters()]
    assert ConflictMonitor(model, TASKS).observe(losses_of(model, x))
    assert all(p.grad is grad and (grad == 1).all() for p, grad in zip(model.parameters(), before, strict=True))
    assert ran == []


def test_averages_are_those_of_the_looks():
    model = model_of()
    monitor = ConflictMonitor(model, TASKS, every=1, decay=0.5)
    parameters = list(model.parameters())
    cosines, rates, norms = [], [], []
    for x in batches(3):
        losses = losses_of(model, x)
        monitor.observe(losses)
        J = rows_of(losses, parameters)
        layers = J.split([42, 42 + 6, 21], dim=1)
        each = torch.stack([F.cosine_similarity(own[:, None], own, dim=-1, eps=1e-30) for own in (J, *layers)])
        cosines.append(each)
        rates.append((each < 0).double())
        norms.append(J.norm(dim=1))
        with torch.no_grad():
            for p in parameters:
                p.sub_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    share = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64) / 1.75
    cosine, rate, norm = (torch.einsum("k,k...->...", share, torch.stack(own)) for own in (cosines, rates, norms))
    found = monitor.log(prefix="")
    expected = {
        **{f"cos/{TASKS[i]}-{TASKS[j]}": cosine[0, i, j] for i in range(3) for j in range(i + 1, 3)},
        **{f"conflict/{TASKS[i]}-{TASKS[j]}": rate[0, i, j] for i in range(3) for j in range(i + 1, 3)},
        **{f"grad_norm/{name}": own for name, own in zip(TASKS, norm, strict=True)},
        "conflict_rate": (rate[0].sum() / 6),
        **{f"conflict_rate/{name}": rate[k].sum() / 6 for k, name in ((1, "0"), (2, "2"), (3, "4"))},
    }
    assert {key: pytest.approx(float(value), abs=1e-12) for key, value in expected.items()} == found
    assert any(0 < value < 1 for key, value in found.items() if "conflict" in key)


def test_a_task_that_is_absent_keeps_its_averages():
    model, (x, y) = model_of(), batches(2)
    monitor = ConflictMonitor(model, TASKS, every=1)
    monitor.observe(losses_of(model, x))
    before = monitor.log()
    losses = losses_of(model, y)
    monitor.observe({"seg": losses["seg"], "edges": losses["edges"]})
    after = monitor.log()
    changed = {key for key in after if after[key] != before[key]}
    assert not {key for key in changed if "depth" in key}
    assert {"conflicts/cos/seg-edges", "conflicts/grad_norm/seg"} <= changed
    never = ConflictMonitor(model, TASKS, every=1)
    never.observe([losses["seg"], None, None])
    assert set(never.log()) == {"conflicts/grad_norm/seg"}
    assert all(math.isfinite(value) for value in never.log().values())


def test_what_is_not_finite_is_left_out():
    model, (x, y) = model_of(), batches(2)
    monitor = ConflictMonitor(model, TASKS, every=1)
    monitor.observe(losses_of(model, x))
    before = monitor.log()
    losses = losses_of(model, y)
    monitor.observe({**losses, "depth": losses["depth"] * math.nan})
    after = monitor.log()
    assert set(after) == set(before) and all(math.isfinite(value) for value in after.values())
    assert {key for key in after if "depth" in key and after[key] != before[key]} == set()


def test_reports_of_surgeries_count_as_looks():
    model, (x,) = model_of(), batches(1)
    monitor = ConflictMonitor(model, TASKS)
    losses = losses_of(model, x)
    monitor.observe(losses)
    noted = ConflictMonitor(model, TASKS)
    surgery = fastpcgrad.GradientSurgery(model.parameters(), tasks=TASKS, granularity="layer", model=model)
    noted.note(surgery.backward(losses))
    assert monitor.log() == pytest.approx(noted.log(), rel=1e-12)


def test_parameters_or_an_optimizer_will_do():
    model, (x,) = model_of(), batches(1)
    losses = losses_of(model, x)
    found = []
    for source in (model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), model):
        monitor = ConflictMonitor(source, 3, granularity="model")
        monitor.observe(list(losses.values()))
        found.append(monitor.log())
    assert found[0] == found[1] == found[2] and "conflicts/cos/0-1" in found[0]


def test_what_is_trainable_at_the_time_counts():
    model, (x,) = model_of(), batches(1)
    monitor = ConflictMonitor(model, TASKS, every=1)
    monitor.observe(losses_of(model, x))
    model[0].requires_grad_(False)
    monitor.observe(losses_of(model, x))
    assert monitor.looks == 1, "of other parameters"
    assert [key for key in monitor.log() if "conflict_rate/" in key] == [f"conflicts/conflict_rate/{n}" for n in (2, 4)]


def test_a_plot_has_tasks_layers_and_time(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'fastpcgrad[plot]'")
    _, _, monitor = train(lambda model: ConflictMonitor(model, TASKS, every=2))
    figure = monitor.plot()
    tasks, layers, time = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    figures = monitor.log(prefix="")
    texts = {text.get_text() for text in tasks.texts}
    assert f"{figures['cos/seg-depth']:+.2f}\n({figures['conflict/seg-depth']:.0%})" in texts
    assert [label.get_text() for label in layers.get_xticklabels()] == ["0", "2", "4"]
    lines = {line.get_label(): line for line in time.get_lines()}
    assert list(lines["seg – depth"].get_xdata()) == [0, 2, 4, 6]
    figure.savefig(tmp_path / "figure.png")
    frame = pytest.importorskip("pandas") and monitor.to_pandas()
    assert list(frame.columns) == ["layer", "task", "other", "cosine", "conflict_rate"] and len(frame) == 4 * 3
    monitor.reset()
    assert monitor.log() == {}
    with pytest.raises(RuntimeError, match="observe"):
        monitor.plot()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"every": 0}, ValueError, "every.*0"),
        ({"every": True}, ValueError, "every.*True"),
        ({"decay": 1.0}, ValueError, "decay.*1.0"),
        ({"granularity": "block"}, ValueError, "'layer'.*'block'"),
        ({"tasks": []}, ValueError, "one name or more"),
        (
            {"model_or_params": [torch.zeros(1, requires_grad=True)], "granularity": "layer"},
            ValueError,
            "needs a model",
        ),
        ({"model_or_params": 3}, TypeError, "3"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        ConflictMonitor(**{"model_or_params": model_of(), "tasks": TASKS, **arguments})


def test_wrong_losses_are_named_and_nothing_is_counted_as_seen():
    model, (x,) = model_of(), batches(1)
    monitor = ConflictMonitor(model, TASKS, every=1)
    losses = losses_of(model, x)
    for wrong, error, words in (
        ({"sge": losses["seg"]}, ValueError, "'sge'"),
        ([losses["seg"]] * 4, ValueError, "3 tasks; found 4"),
        ([lambda: losses["seg"]] * 3, TypeError, r"losses\[0\]"),
        ([None] * 3, ValueError, "absent"),
    ):
        with pytest.raises(error, match=words):
            monitor.observe(wrong)
    assert monitor.looks == 0


def test_a_method_changes_nothing_in_what_is_seen():
    """GradVac keeps a state, and is no business of the monitor's."""
    model, (x,) = model_of(), batches(1)
    surgery = fastpcgrad.GradientSurgery(model.parameters(), tasks=TASKS, method=methods.GradVac())
    monitor = ConflictMonitor(model, TASKS, granularity="model")
    monitor.note(surgery.backward(losses_of(model, x)))
    assert monitor.looks == 1 and "looks=1" in repr(monitor)


@pytest.mark.parametrize("present", [TASKS, TASKS[1:], TASKS[:1]])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_a_report_of_tasks_in_another_order_is_taken_by_their_names(order, present):
    model, (x,) = model_of(), batches(1)
    losses = {name: loss for name, loss in losses_of(model, x).items() if name in present}
    names = [TASKS[t] for t in order]
    surgery = fastpcgrad.GradientSurgery(model.parameters(), tasks=TASKS, granularity="layer", model=model)
    report = surgery.backward(losses, retain_graph=True)
    noted, observed = (ConflictMonitor(model, names, every=1) for _ in range(2))
    noted.note(report), observed.observe(losses)
    found, expected = noted.log(), observed.log()
    assert found == {key: pytest.approx(value, abs=1e-12) for key, value in expected.items()}


@pytest.mark.parametrize("tasks", [["seg", "depth", "text"], ["seg", "edges"], 2])
def test_a_report_of_other_tasks_is_refused(tasks):
    model, (x,) = model_of(), batches(1)
    report = fastpcgrad.GradientSurgery(model.parameters(), tasks=TASKS).backward(losses_of(model, x))
    monitor = ConflictMonitor(model, tasks, every=1)
    with pytest.raises(ValueError, match="tasks that the monitor does not have"):
        monitor.note(report)
    assert monitor.log() == {}
