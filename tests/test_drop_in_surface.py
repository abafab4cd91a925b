"""What scripts of the original reach for, and optimizers and parameters that are not torch's plain ones."""

import random

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference

FIXED = "tensorflow"
"""A variant that draws nothing."""

x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return torch.nn.Linear(4, 3)


MIXED = torch.tensor([[1.0, -2.0, 0.5], [0.5, 1.0, -1.0], [-1.0, 0.5, 1.0]])


def losses_of(model):
    """Each looks at all outputs, so that their gradients conflict."""
    return [(output - t).square().mean() for t, output in enumerate((model(x) @ MIXED).unbind(1))]


def rows_of(model, losses):
    return [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]


def merged(model, tasks=(0, 1, 2)):
    losses = losses_of(model)
    return reference.merge(rows_of(model, [losses[t] for t in tasks]), list(model.parameters()), FIXED)


def test_the_losses_conflict(model):
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows_of(model, losses_of(model))])
    assert (rows @ rows.mT < 0).any()


def assert_grads(model, expected):
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), check_dtype=False)


class Prepared(torch.optim.Optimizer):
    """As trainers prepare one: an Optimizer that has nothing of its own and hands on to the one inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattribute__(self, name):
        if name in ("param_groups", "state", "defaults"):
            return getattr(object.__getattribute__(self, "optimizer"), name)
        return object.__getattribute__(self, name)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class DuckTyped:
    """No torch.optim.Optimizer, but it has what one must have."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        self.steps = 0

    def step(self):
        self.steps += 1
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * p.grad

    def zero_grad(self, set_to_none=True):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]


@pytest.mark.parametrize("kind", ["prepared", "duck-typed"])
def test_optimizers_that_are_not_plain_ones_train_as_plain_ones_do(model, kind):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = Prepared(inner) if kind == "prepared" else DuckTyped(model.parameters())
    optimizer = fastpcgrad.PCGrad(wrapped, "sum", variant=FIXED)
    expected = [p.detach() - 0.1 * m for p, m in zip(model.parameters(), merged(model), strict=True)]
    optimizer.zero_grad()
    optimizer.pc_backward(losses_of(model))
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)
    assert optimizer._opt_called
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:step\\(\\) with gradients")
@pytest.mark.parametrize("kind", ["prepared", "duck-typed"])
def test_a_step_without_surgery_is_noticed_there_too(model, kind):
    wrapped = DuckTyped(model.parameters())
    if kind == "prepared":
        wrapped = Prepared(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = fastpcgrad.PCGrad(wrapped, variant=FIXED)
    sum(losses_of(model)).backward()
    with pytest.warns(fastpcgrad.FastPCGradWarning, match="pc_backward"):
        optimizer.step()


def test_a_scheduler_of_a_wrapped_prepared_optimizer_counts_steps(model):
    optimizer = fastpcgrad.PCGrad(Prepared(torch.optim.SGD(model.parameters(), lr=0.1)), variant=FIXED)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.pc_backward(losses_of(model))
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, 3, None, object()], ids=["class", "number", "None", "object"])
def test_what_is_no_optimizer_is_named(optimizer):
    with pytest.raises(TypeError, match="param_groups, step, zero_grad"):
        fastpcgrad.PCGrad(optimizer)


def test_the_originals_name_for_the_wrapped_optimizer(model):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = fastpcgrad.PCGrad(inner)
    assert optimizer._optim is inner and optimizer.optimizer is inner


# Absent tasks and the shapes of losses.


@pytest.mark.parametrize("present", [(0, 2), (1, 2), (1,)], ids=str)
def test_an_absent_task_takes_no_part_and_the_report_says_who_was_there(model, present):
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum", variant=FIXED)
    expected = merged(model, present)
    optimizer.pc_backward([loss if t in present else None for t, loss in enumerate(losses_of(model))])
    assert optimizer.report.tasks == present
    assert_grads(model, expected)


@pytest.mark.parametrize("present", [(0, 2), (1, 2)], ids=str)
def test_an_absent_task_takes_no_part_in_any_front_end(model, present):
    expected = merged(model, present)
    for front_end in FRONT_ENDS.values():
        model.zero_grad()
        front_end(model, [loss if t in present else None for t, loss in enumerate(losses_of(model))])
        assert_grads(model, expected)
    losses = [loss if t in present else None for t, loss in enumerate(losses_of(model))]
    found = fastpcgrad.grad(losses, list(model.parameters()), method=methods.PCGrad(FIXED))
    torch.testing.assert_close(list(found), list(expected), check_dtype=False)


def test_what_a_method_keeps_stays_with_its_task(model):
    method = methods.GradVac(generator=torch.Generator().manual_seed(2))
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.0), method=method)
    optimizer.pc_backward(losses_of(model))
    before = method.state_dict()["phi"]
    optimizer.zero_grad()
    losses = losses_of(model)
    optimizer.pc_backward([losses[0], None, losses[2]])
    changed = method.state_dict()["phi"] != before
    assert changed[0, 2] and changed[2, 0]
    assert not changed[1].any() and not changed[:, 1].any()


def test_a_list_without_a_task_is_named(model):
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="3 times None"):
        optimizer.pc_backward([None] * 3)


def give(model, grads):
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad


FRONT_ENDS = {
    "pc_backward": lambda model, losses: fastpcgrad.PCGrad(
        torch.optim.SGD(model.parameters(), lr=0.1), "sum", variant=FIXED
    ).pc_backward(losses),
    "surgery": lambda model, losses: fastpcgrad.GradientSurgery(model.parameters(), 3, methods.PCGrad(FIXED)).backward(
        losses
    ),
    "backward": lambda model, losses: fastpcgrad.backward(losses, method=methods.PCGrad(FIXED)),
    "grad": lambda model, losses: give(
        model, fastpcgrad.grad(losses, list(model.parameters()), method=methods.PCGrad(FIXED))
    ),
}
SHAPES = {
    "[T]": lambda losses: torch.stack(losses),
    "[T, 1]": lambda losses: torch.stack(losses)[:, None],
    "list of [1]": lambda losses: [loss[None] for loss in losses],
    "list of [1, 1]": lambda losses: [loss[None, None] for loss in losses],
    "tuple": tuple,
}


@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_losses_of_every_shape_with_one_element_a_task(model, front_end, shape):
    expected = merged(model)
    front_end(model, shape(losses_of(model)))
    assert_grads(model, expected)


@pytest.mark.parametrize("shape", [(1, 3), (3, 2), (3, 1, 1), ()], ids=str)
def test_other_shapes_are_named(model, shape):
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = torch.ones(shape, requires_grad=True)
    with pytest.raises(ValueError, match="found a tensor"):
        optimizer.pc_backward(losses)


@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_a_second_pass_over_a_freed_graph_says_how_to_keep_it(model, front_end):
    losses = [loss.exp() for loss in losses_of(model)]
    front_end(model, losses)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        front_end(model, losses)


# Parameters of other kinds.


def test_lazy_parameters_take_part_once_they_have_a_shape():
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.LazyLinear(5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum", variant=FIXED)
    surgery = fastpcgrad.GradientSurgery(model.parameters(), 3, methods.PCGrad(FIXED))
    optimizer.pc_backward(losses_of(model))
    expected = merged(model)
    assert_grads(model, expected)
    surgery.backward(losses_of(model))
    assert_grads(model, expected)


def test_a_forward_pass_that_would_give_parameters_their_shape_inside_a_task_is_refused():
    model = torch.nn.LazyLinear(3)
    surgery = fastpcgrad.GradientSurgery(model.parameters(), 3)
    with pytest.raises(RuntimeError, match="lazy parameters"), surgery.task(0):
        raise AssertionError("the task was entered")
    with pytest.raises(RuntimeError, match="lazy parameters"):
        surgery.backward([lambda: losses_of(model)[0]] * 3)
    assert model.has_uninitialized_params()


def complex_model():
    """A complex weight beside a real one, as in spectral layers."""
    values = torch.Generator().manual_seed(4)
    w = torch.randn(4, 4, dtype=torch.complex128, generator=values).requires_grad_()
    v = torch.randn(4, dtype=torch.float64, generator=values).requires_grad_()
    y = torch.randn(6, 4, dtype=torch.complex128, generator=values)

    def losses():
        z = (y @ w) * v
        return [z.abs().square().mean(), (z.real - z.imag).mean(), (z - 1).abs().mean()]

    return [w, v], losses


def real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@pytest.mark.parametrize("options", [{}, {"row_dtype": torch.float32}, {"shared": "real ones"}, {"row_device": "cpu"},
                                     {"granularity": "parameter"}], ids=str)  # fmt: skip
def test_complex_parameters_are_rows_of_real_and_imaginary_parts(options):
    parameters, losses = complex_model()
    rows = [[real(g) for g in torch.autograd.grad(loss, parameters, retain_graph=True)] for loss in losses()]
    expected = reference.merge(rows, [real(p.detach()) for p in parameters], FIXED)
    if options.get("shared"):
        options = {"shared": [parameters[1]]}
        expected = [sum(row[0] for row in rows), reference.merge([row[1:] for row in rows], parameters[1:], FIXED)[0]]
    if options.get("granularity"):
        expected = [
            reference.merge([[row[p]] for row in rows], [real(parameters[p].detach())], FIXED)[0] for p in range(2)
        ]
    surgery = fastpcgrad.GradientSurgery(parameters, 3, methods.PCGrad(FIXED), **options)
    for _ in range(2):
        for _stay in range(2):
            for t in range(3):
                with surgery.task(t):
                    (losses()[t] / 2).backward()
        surgery.merge()
        for p, e in zip(parameters, expected, strict=True):
            assert p.grad.dtype == p.dtype and p.grad.shape == p.shape
            torch.testing.assert_close(real(p.grad), e, rtol=1e-5, atol=1e-6)


def test_a_complex_gradient_that_others_hold_stays_as_it_was():
    parameters, losses = complex_model()
    kept = []
    parameters[0].register_post_accumulate_grad_hook(lambda p: kept.append((p.grad, p.grad.clone())))
    fastpcgrad.PCGrad(torch.optim.SGD(parameters, lr=0.1), variant=FIXED).pc_backward(losses())
    assert kept and all(torch.equal(grad, value) for grad, value in kept)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("options", [{}, {"row_dtype": torch.float64}, {"row_dtype": torch.bfloat16}], ids=str)
def test_gradients_of_another_dtype_than_their_parameters_keep_it(options):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    rows = [torch.full((5,), 0.1001), torch.linspace(-1, 1, 5, dtype=torch.bfloat16).float() * 2.0]
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD([p], lr=0.1), "sum", variant=FIXED, **options)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward([0.1001 * p.float().sum(), p.float().square().sum()])
        assert p.grad.dtype == torch.float32
        exact = reference.merge([[row] for row in rows], [rows[0]], FIXED)[0]
        tolerance = 1e-2 if options.get("row_dtype") == torch.bfloat16 else 1e-5
        torch.testing.assert_close(p.grad, exact, rtol=tolerance, atol=tolerance)


def test_the_generator_of_a_subclassed_method_may_be_anything_python_has(model):
    """What the drop-in hands to the variant."""
    a, b = random.Random(5), random.Random(5)
    grads = []
    for generator in (a, b):
        optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), generator=generator)
        optimizer.zero_grad()
        optimizer.pc_backward(losses_of(model))
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    assert a.getstate() == b.getstate()
