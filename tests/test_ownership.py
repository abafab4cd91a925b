"""Memory that others hold: what a surgery must neither write nor keep as a row."""

import copy
import pickle

import numpy
import pytest
import torch

import fastpcgrad
from fastpcgrad import _memory, methods, reference
from fastpcgrad.rows.task_gradients import TaskGradients

FIXED = "tensorflow"
"""A variant that draws nothing."""


def gradients(count=3, size=6):
    values = torch.Generator().manual_seed(count)
    return [torch.randn(size, generator=values, dtype=torch.float64) for _ in range(count)]


def merged(rows):
    return reference.merge([[row] for row in rows], [rows[0]], FIXED)[0]


class Saved(torch.autograd.Function):
    """A linear loss that returns the very tensor that it was given as its gradient."""

    @staticmethod
    def forward(ctx, w, gradient):
        ctx.gradient = gradient
        return w.detach() @ gradient

    @staticmethod
    def backward(ctx, grad_output):
        return ctx.gradient, None


class Reused(torch.autograd.Function):
    """A linear loss whose backward pass writes into one buffer that all losses share, and returns a view of it."""

    buffer = torch.zeros(6, dtype=torch.float64)

    @staticmethod
    def forward(ctx, w, gradient):
        ctx.gradient = gradient
        return w.detach() @ gradient

    @staticmethod
    def backward(ctx, grad_output):
        return Reused.buffer.copy_(ctx.gradient).view(6), None


def by_view(p, g):
    Saved.apply(p.view(6), g).backward()


def by_transposed_view(p, g):
    Saved.apply(p.view(2, 3).t().reshape(6), g.view(2, 3).t().reshape(6)).backward()


def by_output_gradient(p, g):
    (p.view(6) + 1).backward(g)


def assign(p, g):
    p.grad = g if p.grad is None else p.grad + g


def by_assignment(p, g):
    assign(p, g)


def by_assigned_view(p, g):
    assign(p, g[:])


def by_detaching(p, g):
    assign(p, g.detach())


def by_numpy(p, g):
    assign(p, torch.from_numpy(g.numpy()))


def by_reuse(p, g):
    Reused.apply(p, g).backward()


WAYS = [
    by_view,
    by_transposed_view,
    by_output_gradient,
    by_assignment,
    by_assigned_view,
    by_detaching,
    by_numpy,
    by_reuse,
]
OPTIONS = {
    "one problem": {},
    "means": {"accumulate": "mean"},
    "by parameter": {"granularity": "parameter"},
    "on the rows": {"method": methods.TrimmedMean(0)},
    "converted": {"row_dtype": torch.float32},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_gradient_was_made_of_stays_as_it_was(way, options):
    rows = gradients()
    given = [row.clone() for row in rows]
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    surgery = fastpcgrad.GradientSurgery([p], 3, **{"method": methods.PCGrad(FIXED), **options})
    for stays in (1, 2):
        for t in range(3):
            for _ in range(stays):
                with surgery.task(t):
                    way(p, given[t])
        surgery.merge()
        factor = stays if surgery.accumulate == "sum" else 1
        expected = torch.stack(rows).mean(dim=0) if "method" in options else merged(rows)
        torch.testing.assert_close(p.grad, factor * expected, rtol=1e-5, atol=1e-6)
        p.grad.zero_()  # as optimizers and clipping write
        assert all(torch.equal(a, b) for a, b in zip(given, rows, strict=True))


@pytest.mark.parametrize("first", ["inside", "outside"])
def test_another_leafs_gradient_in_the_same_memory_adds_up_by_itself(first):
    """Both get views of one buffer, and autograd adds the second task's to that of the leaf outside in place."""
    rows = gradients(2)
    p, q = (torch.zeros(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = p.t() + q.t() if first == "inside" else q.t() + p.t()
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD([p], lr=0.1), "sum", variant=FIXED)
    optimizer.pc_backward([(z.reshape(6) * row).sum() for row in rows])
    as_rows = [row.view(3, 2).t().reshape(6) for row in rows]
    torch.testing.assert_close(p.grad.reshape(6), merged(as_rows))
    torch.testing.assert_close(q.grad.reshape(6), sum(as_rows))


@pytest.mark.parametrize("kind", ["tensor", "view of it", "accumulated"])
def test_gradients_that_hooks_keep_stay_as_they_were(kind):
    rows, kept = gradients(), []
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    seen = p.view(2, 3) if kind == "view of it" else p
    if kind == "accumulated":
        p.register_post_accumulate_grad_hook(lambda p: kept.append(p.grad))
    else:
        seen.register_hook(kept.append)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD([p], lr=0.1), "sum", variant=FIXED)
    optimizer.pc_backward([(seen.reshape(6) * row).sum() for row in rows])
    torch.testing.assert_close(p.grad, merged(rows))
    assert all(torch.equal(a.reshape(6), b) for a, b in zip(kept, rows, strict=True))


def test_a_gradient_that_is_held_within_its_task_stays_as_it_was():
    rows, held = gradients(2), []
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    surgery = fastpcgrad.GradientSurgery([p], 2, methods.PCGrad(FIXED))
    for t, row in enumerate(rows):
        with surgery.task(t):
            (p * row).sum().backward()
            held.append(p.grad)
    surgery.merge()
    assert all(torch.equal(a, b) for a, b in zip(held, rows, strict=True))
    torch.testing.assert_close(p.grad, merged(rows))


def test_one_tensor_assigned_to_several_parameters_counts_for_each():
    rows = gradients(2)
    a, b = (torch.zeros(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    surgery = fastpcgrad.GradientSurgery([a, b], 2, methods.PCGrad(FIXED))
    for t, row in enumerate(rows):
        with surgery.task(t):
            a.grad = b.grad = row.clone()
    surgery.merge()
    torch.testing.assert_close(torch.stack([a.grad, b.grad]), merged(rows).expand(2, 6))
    assert a.grad is not b.grad and a.grad.data_ptr() != b.grad.data_ptr()


@pytest.mark.parametrize("graph", ["own", "shared", "retained"])
def test_what_autograd_makes_for_a_model_is_taken_over_without_a_copy(graph, monkeypatch):
    """The promise that a row costs nothing: every gradient of ordinary layers is alone in its memory."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 8),
        torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 3),
    )  # fmt: skip
    settled = []
    original = TaskGradients._settled_one
    monkeypatch.setattr(TaskGradients, "_settled_one", lambda *a: settled.append(a) or original(*a))
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(5, 2, 6, 6)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(x).unbind(1) if graph != "own" else [model(x)[:, t] for t in range(3)]
        optimizer.pc_backward([out.square().mean() for out in outputs], retain_graph=graph == "retained")
        optimizer.step()
    assert not settled


def test_every_gradient_is_copied_where_torch_cannot_tell_who_holds_it(monkeypatch):
    monkeypatch.setattr(_memory, "_ALONE", None)
    rows = gradients()
    p = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    surgery = fastpcgrad.GradientSurgery([p], 3, methods.PCGrad(FIXED))
    for t, row in enumerate(rows):
        with surgery.task(t):
            (p * row).sum().backward()
            place = p.grad.data_ptr()
        assert surgery._layouts.current.capture.rows._rows[t][0].data_ptr() != place
    surgery.merge()
    torch.testing.assert_close(p.grad, merged(rows))


@pytest.mark.parametrize(
    "share",
    [
        lambda g: g.numpy(),
        lambda g: g.__dlpack__(),
        lambda g: g.view(2, 3),
        lambda g: g.detach(),
        lambda g: g.untyped_storage(),
        lambda g: g,
        lambda g: numpy.from_dlpack(g),
        lambda g: memoryview(g.numpy()),
    ],
    ids=["numpy", "dlpack", "view", "detached", "storage", "itself", "numpy by dlpack", "buffer"],
)
def test_whoever_holds_a_gradient_is_noticed_for_as_long_as_it_does(share):
    p = torch.zeros(6, requires_grad=True)
    (2 * p).sum().backward()
    row = [p.grad]
    p.grad = None

    def alone():
        return _memory.are_alone(row, [row[0].untyped_storage()])

    assert alone()
    held = share(row[0])
    assert not alone()
    del held


def test_memory_that_another_process_or_a_file_may_hold_is_not_alone(tmp_path):
    foreign = [
        torch.ones(3).share_memory_(),
        torch.from_numpy(numpy.ones(3)),
        torch.frombuffer(bytearray(12), dtype=torch.float32),
        torch.from_file(str(tmp_path / "file"), shared=True, size=3),
    ]
    for place in range(len(foreign)):
        row = [foreign[place]]
        foreign[place] = None
        assert not _memory.are_alone(row, [row[0].untyped_storage()])


# Copies of the objects.

DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}
for_every_duplicate = pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)


class OwnSurgery(fastpcgrad.GradientSurgery):
    """A subclass with a constructor and an attribute of its own."""

    def __init__(self, model):
        super().__init__(model.parameters(), 2, methods.PCGrad(FIXED), shared=[model.weight])
        self.name = "own"


class OwnPCGrad(fastpcgrad.PCGrad):
    def __init__(self, model):
        super().__init__(torch.optim.SGD(model.parameters(), lr=0.1), variant=FIXED, shared=[model.bias])
        self.name = "own"


def losses_of(model):
    x = torch.arange(12.0).view(3, 4) / 10 - 0.5
    y = model(x)
    return [y[:, 0].mean() - 3 * y[:, 1].mean(), y[:, 1].square().mean() - y[:, 0].mean()]


def surgeries(model):
    weight, bias = model.parameters()
    method = methods.PCGrad(FIXED)
    return {
        "shared": fastpcgrad.GradientSurgery([weight, bias], 2, method, shared=[weight]),
        "collections": fastpcgrad.GradientSurgery([weight, bias], 2, method, granularity=[[bias], [weight]]),
        "converted": fastpcgrad.GradientSurgery([weight, bias], 2, method, row_dtype=torch.float64),
        "of an optimizer": fastpcgrad.GradientSurgery(torch.optim.Adam(model.parameters()), 2, method, shared=[bias]),
        "means": fastpcgrad.GradientSurgery([weight, bias], 2, method, accumulate="mean"),
        "subclass": OwnSurgery(model),
        "with targets": fastpcgrad.GradientSurgery([weight, bias], 2, methods.GradVac()),
    }


def model_of_two():
    torch.manual_seed(3)
    return torch.nn.Linear(4, 2)


@for_every_duplicate
@pytest.mark.parametrize("name", surgeries(model_of_two()))
@pytest.mark.parametrize("filled", [(), (0,), (0, 1, 0)], ids=["at rest", "one task", "all tasks"])
def test_a_copy_of_a_surgery_goes_on_as_its_original_does(duplicate, name, filled):
    model = model_of_two()
    surgery = surgeries(model)[name]
    surgery.backward(losses_of(model))
    for t in filled:
        with surgery.task(t):
            losses_of(model)[t].backward()
    other_model, other = duplicate((model, surgery))
    assert type(other) is type(surgery) and getattr(other, "name", None) == getattr(surgery, "name", None)
    results = []
    for m, s in ((model, surgery), (other_model, other)):
        torch.manual_seed(4)
        for t in (1, 0) if filled else (0, 1):
            with s.task(t):
                losses_of(m)[t].backward()
        s.merge()
        first = [p.grad.clone() for p in m.parameters()]
        s.backward(losses_of(m))
        results.append([*first, *(p.grad.clone() for p in m.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@for_every_duplicate
def test_a_copy_and_its_original_share_no_memory(duplicate):
    model = model_of_two()
    surgery = fastpcgrad.GradientSurgery(model.parameters(), 2, methods.PCGrad(FIXED))
    for t in range(2):
        with surgery.task(t):
            losses_of(model)[t].backward()
    other_model, other = duplicate((model, surgery))
    surgery.merge()
    expected = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad.zero_()
    other.merge()
    torch.testing.assert_close([p.grad for p in other_model.parameters()], expected, rtol=0, atol=0)


@for_every_duplicate
def test_a_copy_inside_a_task_is_refused(duplicate):
    model = model_of_two()
    surgery = fastpcgrad.GradientSurgery(model.parameters(), 2, methods.PCGrad(FIXED))
    with surgery.task(1), pytest.raises(RuntimeError, match=r"copy of the surgery inside task\(1\)"):
        duplicate(surgery)


@for_every_duplicate
def test_a_copy_of_a_wrapper_keeps_what_subclasses_add_and_the_report(duplicate):
    model = model_of_two()
    optimizer = OwnPCGrad(model)
    optimizer.pc_backward(losses_of(model))
    optimizer.step()
    other_model, other = duplicate((model, optimizer))
    assert type(other) is OwnPCGrad and other.name == "own"
    assert torch.equal(other.report.gram, optimizer.report.gram)
    for m, o in ((model, optimizer), (other_model, other)):
        o.zero_grad()
        o.pc_backward(losses_of(m))
        o.step()
    torch.testing.assert_close(list(other_model.parameters()), list(model.parameters()), rtol=0, atol=0)
    assert other._opt_called


@for_every_duplicate
def test_a_copy_of_a_report_keeps_what_was_added(duplicate):
    model = model_of_two()
    surgery = fastpcgrad.GradientSurgery(model.parameters(), 2, methods.PCGrad(FIXED))
    report = surgery.backward(losses_of(model))
    report.step = 7
    other = duplicate(report)
    assert other.step == 7 and other.as_dict() == report.as_dict()
