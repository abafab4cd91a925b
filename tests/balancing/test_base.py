"""What all balancers share: lists and tensors in, checks, composition with surgery."""

import copy

import pytest
import torch

from fastpcgrad import PCGrad, balancing, methods

BALANCERS = {
    "GradNorm": lambda tasks: balancing.GradNorm(tasks, 0.5),
    "UncertaintyWeighting": balancing.UncertaintyWeighting,
    "DWA": balancing.DWA,
    "FAMO": balancing.FAMO,
    "Logarithm": balancing.Logarithm,
    "STCH": lambda tasks: balancing.STCH(tasks, mu=0.5),
    "COSMOS": balancing.COSMOS,
    "GeometricMean": balancing.GeometricMean,
    "IMTLL": balancing.IMTLL,
    "PBI": balancing.PBI,
}


@pytest.fixture(params=BALANCERS)
def make(request):
    return BALANCERS[request.param]


def test_every_balancer_is_here():
    public = {name for name in balancing.__all__ if name != "Balancer"}
    assert public == set(BALANCERS)


@pytest.mark.parametrize("tasks", [1, 2, 17])
def test_a_list_and_a_tensor_give_the_same(make, tasks):
    values = torch.rand(tasks) + 0.5
    by_tensor = make(tasks)(values)
    by_list = make(tasks)(list(values))
    assert by_tensor.shape == (tasks,) and isinstance(by_list, list)
    torch.testing.assert_close(torch.stack(by_list), by_tensor)
    torch.testing.assert_close(torch.stack(make(tasks)(iter(values))), by_tensor)


SHAPES = {
    "[T, 1]": lambda x: x[:, None],
    "list of [1]": lambda x: [value.reshape(1) for value in x.unbind()],
    "list of [1, 1]": lambda x: [value.reshape(1, 1) for value in x.unbind()],
    "mixed list": lambda x: [value.reshape([1] * (t % 3)) for t, value in enumerate(x.unbind())],
}


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_losses_of_any_shape_with_one_element_weigh_as_scalars(make, tasks, shape):
    """Over steps with whatever the balancer learns; the answers have the shapes of the losses, and the gradients."""
    plain, shaped = make(tasks), make(tasks)
    for _ in range(3):
        x = (torch.rand(tasks) + 0.5).requires_grad_()
        expected, given = plain(x), shape(x)
        found = shaped(given)
        flat = torch.cat([value.flatten() for value in found])
        assert torch.equal(flat, expected)
        assert torch.equal(shaped.weights, plain.weights)
        if isinstance(given, torch.Tensor):
            assert found.shape == given.shape
        else:
            assert [value.shape for value in found] == [value.shape for value in given]
        (right,) = torch.autograd.grad(expected.sum(), x)
        (grad,) = torch.autograd.grad(flat.sum(), x)
        assert torch.equal(grad, right)
        for balancer, losses in ((plain, x), (shaped, given)):
            advance(balancer, losses, x)


def advance(balancer, losses, x):
    """What a training loop does after the call."""
    if isinstance(balancer, balancing.GradNorm):
        scaled = [loss * (t + 1) for t, loss in enumerate(losses)]
        balancer.note_gradients(losses if isinstance(losses, torch.Tensor) else scaled, x)
        balancer.note_gradients(torch.stack([loss.reshape(1) * (t + 1) for t, loss in enumerate(losses)]), x)
        balancer.update()
    elif isinstance(balancer, balancing.FAMO):
        half = [loss.detach() / 2 for loss in losses]
        balancer.update(torch.stack(half) if isinstance(losses, torch.Tensor) else half)
    elif isinstance(balancer, balancing.DWA):
        balancer.end_epoch()


def test_a_list_keeps_the_tasks_graphs_apart(make):
    parameters = [torch.tensor(1.0 + t, requires_grad=True) for t in range(3)]
    weighted = make(3)([p.square() for p in parameters])
    for t, loss in enumerate(weighted):
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        assert [grad is not None for grad in grads] == [t == u for u in range(3)]


def test_what_multiplies_the_gradients_are_the_weights(make):
    balancer = make(3)
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (grad,) = torch.autograd.grad(balancer(x).sum(), x)
    torch.testing.assert_close(grad, balancer.weights.detach())
    assert not balancer.weights.requires_grad


def test_balanced_then_merged_is_merged_from_weighted_gradients(make):
    """Balance, then surgery: pc_backward on weighted losses is PCGrad on weighted task gradients."""
    matrix = torch.randn(3, 8, dtype=torch.float64)
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    balancer = make(3).double()
    optimizer = PCGrad(torch.optim.SGD([x], lr=0.1), method=methods.PCGrad("tensorflow"))
    optimizer.pc_backward(balancer([(row @ x).square() + 1 for row in matrix]))
    rows = balancer.weights.detach()[:, None] * (2 * (matrix @ x)[:, None] * matrix).detach()
    expected = methods.PCGrad("tensorflow").weights(rows @ rows.mT) @ rows
    torch.testing.assert_close(x.grad, expected)


def test_half_precision_losses_are_weighed_in_the_balancers_precision(make):
    balancer = make(2)
    weighted = balancer([torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(2.0, dtype=torch.bfloat16)])
    assert balancer.weights.dtype == torch.float32
    assert {loss.dtype for loss in weighted} == {torch.float32}


def test_no_task_loss_is_changed_or_kept_alive(make):
    losses = torch.rand(2) + 0.5
    before = losses.clone()
    make(2)(losses)
    assert torch.equal(losses, before)


def test_a_meta_balancer_runs_so_no_value_is_looked_at(make):
    """A tensor without data cannot be waited for."""
    balancer = make(2).to("meta")
    weighted = balancer([torch.ones((), device="meta"), torch.ones((), device="meta")])
    assert [loss.device.type for loss in weighted] == ["meta"] * 2
    if isinstance(balancer, balancing.GradNorm):
        for t in range(2):
            balancer.note(t, torch.ones((), device="meta"), torch.ones((), device="meta"))
        balancer.update()
    if isinstance(balancer, balancing.FAMO):
        balancer.update(torch.ones(2, device="meta"))
    if isinstance(balancer, balancing.DWA):
        balancer.end_epoch()
        balancer(torch.ones(2, device="meta"))
        balancer.end_epoch()
    assert balancer.weights.device.type == "meta"


def test_copies_are_independent(make):
    balancer = make(2)
    copied = copy.deepcopy(balancer)
    for values in copied.state_dict().values():
        if isinstance(values, torch.Tensor):
            values.fill_(3.0)
    torch.testing.assert_close(balancer(torch.ones(2)), make(2)(torch.ones(2)))


@pytest.mark.parametrize(
    ("losses", "error", "words"),
    [
        ([], ValueError, ["losses", "2", "0"]),
        ([torch.ones(())], ValueError, ["losses", "2", "1"]),
        ([torch.ones(()), 1.0], TypeError, ["losses[1]", "float"]),
        ([torch.ones(()), torch.ones(3)], ValueError, ["losses[1]", "[3]"]),
        ([torch.ones(()), torch.ones((), dtype=torch.int64)], TypeError, ["losses[1]", "int64"]),
        ([torch.ones(()), torch.ones((), dtype=torch.complex64)], TypeError, ["losses[1]", "complex64"]),
        ([torch.ones(()), torch.ones((), device="meta")], ValueError, ["losses[1]", "meta", "cpu"]),
        (torch.ones(3), ValueError, ["losses", "[2]", "[3]"]),
        (torch.ones(2, 2), ValueError, ["losses", "[2]", "[2, 2]"]),
        (torch.ones(1, 2), ValueError, ["losses", "[2]", "[1, 2]"]),
        (torch.ones(2, 1, 1), ValueError, ["losses", "[2]", "[2, 1, 1]"]),
        (torch.ones(3, 1), ValueError, ["losses", "[2]", "[3, 1]"]),
        ([torch.ones(()), torch.ones(1, 2)], ValueError, ["losses[1]", "[1, 2]"]),
        ([torch.ones(()), None], TypeError, ["losses[1]", "NoneType"]),
        (torch.ones(2, dtype=torch.int32), TypeError, ["losses", "int32"]),
        (torch.ones(2, device="meta"), ValueError, ["losses", "meta", "cpu"]),
    ],
)
def test_bad_losses_are_named(make, losses, error, words):
    with pytest.raises(error) as caught:
        make(2)(losses)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("tasks", "error"), [(0, ValueError), (-1, ValueError), (1.5, ValueError), (True, ValueError), (None, TypeError)]
)
def test_a_bad_number_of_tasks_is_named(make, tasks, error):
    with pytest.raises(error, match=f"num_tasks.*{tasks}"):
        make(tasks)


NAMED = {
    "GradNorm": lambda tasks: balancing.GradNorm(tasks=tasks, alpha=0.5),
    "UncertaintyWeighting": lambda tasks: balancing.UncertaintyWeighting(tasks=tasks),
    "DWA": lambda tasks: balancing.DWA(tasks=tasks),
    "FAMO": lambda tasks: balancing.FAMO(tasks=tasks),
    "Logarithm": lambda tasks: balancing.Logarithm(tasks=tasks),
    "STCH": lambda tasks: balancing.STCH(tasks=tasks, mu=0.5),
    "COSMOS": lambda tasks: balancing.COSMOS(tasks=tasks),
    "GeometricMean": lambda tasks: balancing.GeometricMean(tasks=tasks),
    "IMTLL": lambda tasks: balancing.IMTLL(tasks=tasks),
    "PBI": lambda tasks: balancing.PBI(tasks=tasks),
}


@pytest.mark.parametrize("name", NAMED)
def test_tasks_have_names_and_dicts_are_answered_by_dicts(name):
    """By names in any order, or by index; over steps with whatever the balancer learns."""
    named, plain, by_index = NAMED[name](["seg", "depth"]), BALANCERS[name](2), BALANCERS[name](2)
    assert named.tasks == ("seg", "depth") and plain.tasks == () and "['seg', 'depth']" in repr(named)
    layer = torch.nn.Linear(3, 2)
    for _ in range(3):
        seg, depth = layer(torch.rand(4, 3)).square().mean(dim=0)
        given = {"depth": depth, "seg": seg}
        if name == "GradNorm":
            named.note_gradients(given, layer)
            plain.note_gradients([seg, depth], layer)
            by_index.note_gradients({0: seg, 1: depth}, layer)
        found, expected, third = named(given), plain([seg, depth]), by_index({1: depth, 0: seg})
        assert list(found) == ["depth", "seg"] and list(third) == [1, 0]
        assert torch.equal(found["seg"], expected[0]) and torch.equal(third[1], found["depth"])
        if name == "GradNorm":
            named.note("depth", depth, torch.ones(()))
            plain.note(1, depth, torch.ones(()))
            by_index.note(1, depth, torch.ones(()))
            for balancer in (named, plain, by_index):
                balancer.update()
        if name == "FAMO":
            named.update({"depth": depth / 3, "seg": seg / 2})
            plain.update([seg / 2, depth / 3])
            by_index.update({0: seg / 2, 1: depth / 3})
        assert torch.equal(named.weights, plain.weights)
    with pytest.raises(ValueError, match=r"all 2 tasks.*\['seg'\] missing"):
        named({"depth": depth})
    with pytest.raises(ValueError, match=r"key 'deep'; the tasks have the names \['seg', 'depth'\]"):
        named({"seg": seg, "deep": depth})
    with pytest.raises(TypeError, match=r"either num_tasks or tasks"):
        NAMED[name](None)


def test_six_lines_make_a_balancer():
    class Equal(balancing.Balancer):
        def __init__(self, num_tasks):
            super().__init__(num_tasks)
            self.register_buffer("weights", torch.full((num_tasks,), 1 / num_tasks))

        def weigh(self, losses):
            return self.weights

    torch.testing.assert_close(Equal(2)(torch.tensor([1.0, 3.0])), torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize("name", NAMED)
def test_a_state_of_other_tasks_is_refused_and_changes_nothing(name, tmp_path):
    """Also within a model, of a copy, and read from a file; one without names is taken as it is."""
    saved, plain = NAMED[name](["seg", "depth"]), BALANCERS[name](2)
    for balancer in (saved, plain):
        balancer(torch.tensor([1.0, 3.0]))
    torch.save(torch.nn.ModuleDict({"b": copy.deepcopy(saved)}).state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    swapped = torch.nn.ModuleDict({"b": NAMED[name](["depth", "seg"])})
    before = repr(swapped.state_dict())
    with pytest.raises(ValueError, match=r"tasks \['seg', 'depth'\], and these are \['depth', 'seg'\]"):
        swapped.load_state_dict(state)
    assert repr(swapped.state_dict()) == before
    for taken, given in ((NAMED[name](["seg", "depth"]), saved), (BALANCERS[name](2), saved), (saved, plain)):
        taken.load_state_dict(given.state_dict())
        assert torch.equal(taken(torch.tensor([2.0, 1.0]))[0], given(torch.tensor([2.0, 1.0]))[0])
