"""shared_features: the T gradients at a representation against the oracle, and what happens around them."""

import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpcgrad
from fastpcgrad import methods, reference, shared_features, variants
from tests.methods.test_in_surgery import aggregated, for_every_method, seed


class Net(torch.nn.Module):
    """A trunk with one representation, or two, and a head for each task."""

    def __init__(self, tasks, outputs=1, dtype=torch.float64):
        super().__init__()
        self.trunk = torch.nn.Linear(4, 6, dtype=dtype)
        self.second = torch.nn.Linear(6, 3, dtype=dtype)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(6 + 3 * (outputs - 1), 2, dtype=dtype) for _ in range(tasks))
        self.outputs = outputs

    def features(self, x):
        first = self.trunk(x).tanh()
        return first if self.outputs == 1 else (first, self.second(first))

    def losses(self, features):
        """One loss a task, from what each task is given."""
        joined = [own if self.outputs == 1 else torch.cat(own, dim=1) for own in features]
        pairs = zip(self.heads, joined, strict=True)
        return [(head(own) - (-1) ** t).square().mean() * (t + 1) for t, (head, own) in enumerate(pairs)]


def inputs(dtype=torch.float64):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def trunk_gradients(net):
    return [p.grad for p in (*net.trunk.parameters(), *net.second.parameters())]


def by_hand(net, x, merge):
    """The gradients of the trunk when ``merge`` makes one of the T gradients at its features; those of the heads."""
    z = net.features(x)
    features = [z] if net.outputs == 1 else list(z)
    leaves = [feature.detach().requires_grad_() for feature in features]
    losses = net.losses([leaves[0] if net.outputs == 1 else leaves] * len(net.heads))
    rows = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
    trunk = [*net.trunk.parameters(), *net.second.parameters()]
    pulled = torch.autograd.grad(features, trunk, merge(rows, leaves), allow_unused=True)
    return pulled, torch.autograd.grad(losses, list(net.heads.parameters()))


def assert_all_close(found, expected, **tolerances):
    assert [f is None for f in found] == [e is None for e in expected]
    for f, e in zip(found, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(f, e, **tolerances)


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_the_trunk_gets_the_oracles_gradient_and_the_heads_their_own(variant, outputs, tasks):
    net, x = Net(tasks, outputs), inputs()
    trunk, heads = by_hand(
        net, x, lambda rows, features: reference.merge(rows, features, variant, random.Random(tasks))
    )
    z = shared_features(net.features(x), tasks, methods.PCGrad(variant, generator=random.Random(tasks)))
    sum(net.losses(z)).backward()
    assert_all_close(trunk_gradients(net), trunk)
    assert_all_close([p.grad for p in net.heads.parameters()], heads)


@for_every_method
def test_any_method_merges_the_gradients(make):
    net, x = Net(3, outputs=2), inputs()

    def merge(rows, features):
        merged = aggregated(make(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
        return [
            piece.view_as(z) for piece, z in zip(merged.split([z.numel() for z in features]), features, strict=True)
        ]

    trunk, _ = by_hand(net, x, merge)
    losses = net.losses(shared_features(net.features(x), 3, make()))
    seed()
    torch.autograd.backward(losses)
    assert_all_close(trunk_gradients(net), trunk, rtol=1e-7, atol=1e-9)


def test_the_default_method_is_the_papers_from_torchs_generator():
    net, x = Net(4), inputs()
    generator = torch.Generator().manual_seed(9)
    trunk, _ = by_hand(net, x, lambda rows, features: reference.merge(rows, features, "paper", generator))
    losses = net.losses(shared_features(net.features(x), 4))
    torch.manual_seed(9)
    torch.autograd.backward(losses)
    assert_all_close(trunk_gradients(net), trunk)


def test_the_trunk_is_walked_backward_once():
    net, walks = Net(4), []
    net.trunk.weight.register_post_accumulate_grad_hook(lambda _: walks.append("trunk"))
    z = net.features(inputs())
    z.grad_fn.register_hook(lambda *_: walks.append("z"))
    sum(net.losses(shared_features(z, 4))).backward()
    assert walks == ["z", "trunk"]


def test_the_features_are_the_same_memory_and_nothing_may_be_written_there():
    net = Net(2)
    z = net.features(inputs())
    left, right = shared_features(z, 2)
    assert left.data_ptr() == right.data_ptr() == z.data_ptr() and torch.equal(left, z)
    with pytest.raises(RuntimeError, match="inplace"):
        left.relu_()
    pair = shared_features([z, z * 2], 2)
    assert [len(own) for own in pair] == [2, 2] and torch.equal(pair[1][1], z * 2)


def test_the_report_tells_of_each_backward_pass():
    net, x, reports = Net(3), inputs(), []
    losses = net.losses(shared_features(net.features(x), 3, methods.PCGrad("tensorflow"), on_report=reports.append))
    z = net.features(x)
    rows = [torch.autograd.grad(loss, z)[0].flatten() for loss in net.losses([z] * 3)]
    assert reports == []
    for _ in range(2):
        sum(losses).backward(retain_graph=True)
    assert len(reports) == 2 and list(reports[1].tasks) == [0, 1, 2]
    torch.testing.assert_close(reports[1].gram, reference.gram(torch.stack(rows)))
    assert reports[1].coefficients.shape == (3, 3)


def test_losses_that_run_backward_one_by_one_are_an_error_and_the_trunk_gets_nothing():
    net = Net(3)
    losses = net.losses(shared_features(net.features(inputs()), 3))
    with pytest.raises(RuntimeError, match=r"tasks \[0, 2\].*tasks \[1\].*sum\(losses\)\.backward\(\).*allow_absent"):
        losses[1].backward()
    assert all(grad is None for grad in trunk_gradients(net))


def test_absent_tasks_take_no_part_where_that_is_allowed():
    net, x, reports = Net(4), inputs(), []
    trunk, _ = by_hand(net, x, lambda rows, z: reference.merge([rows[0], rows[3]], z, "tensorflow"))
    method = methods.PCGrad("tensorflow")
    z = shared_features(net.features(x), 4, method, allow_absent=True, on_report=reports.append)
    losses = net.losses(z)
    (losses[0] + losses[3]).backward()
    assert_all_close(trunk_gradients(net), trunk)
    assert list(reports[0].tasks) == [0, 3]
    assert all(p.grad is None for head in (1, 2) for p in net.heads[head].parameters())


@pytest.mark.parametrize("variant", list(variants.VARIANTS))
def test_a_task_may_use_some_of_the_features(variant):
    first, second, unused = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4,), (2,))
    )
    rows = [
        [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64), None],
        [torch.randn(3, 2, dtype=torch.float64), None, None],
        [None, torch.randn(4, dtype=torch.float64), None],
    ]
    method = methods.PCGrad(variant, generator=random.Random(1))
    z = shared_features([first * 1, second * 1, unused * 1], 3, method)
    sum(
        (g * own).sum()
        for row, task in zip(rows, z, strict=True)
        for g, own in zip(row, task, strict=True)
        if g is not None
    ).backward()
    expected = reference.merge(rows, [first, second, unused], variant, random.Random(1))
    assert_all_close([first.grad, second.grad, unused.grad], expected)


def expanded(left, right):
    return left.sum() - 2 * right.sum()


def shared_by_an_addition(left, right):
    """One tensor is the gradient of both."""
    return ((left + right) * torch.arange(1.0, 1 + left.numel()).view_as(left)).sum()


def slices_of_one_tensor(left, right):
    return (torch.stack([left, right]) * torch.arange(2.0 * left.numel()).view(2, *left.shape)).sum()


def transposed(left, right):
    weights = torch.arange(1.0, 1 + left.numel()).view(left.shape[::-1])
    return (left.permute(tuple(reversed(range(left.dim())))) * weights).sum() - right.sum()


@pytest.mark.parametrize("loss", [expanded, shared_by_an_addition, slices_of_one_tensor, transposed])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, torch.contiguous_format) for shape in ((), (1,), (0,), (3, 5), (2, 3, 4, 5))]
    + [((2, 3, 4, 5), torch.channels_last)],
    ids=str,
)
def test_gradients_may_lie_in_memory_in_any_way(loss, shape, layout):
    leaf = torch.randn(shape, requires_grad=True)
    z = (leaf * 2).contiguous(memory_format=layout)
    apart = [z.detach().requires_grad_() for _ in range(2)]
    rows = [[g] for g in torch.autograd.grad(loss(*apart), apart)]
    loss(*shared_features(z, 2, methods.PCGrad("tensorflow"))).backward()
    (expected,) = reference.merge([[g.double() for g in row] for row in rows], [z.double()], "tensorflow")
    torch.testing.assert_close(leaf.grad, 2 * expected.float())


def test_a_sparse_gradient_is_made_dense():
    table = torch.randn(5, 3, requires_grad=True)
    left, right = shared_features(table * 1, 2, methods.Sum())
    index = torch.tensor([1, 1, 4])
    (torch.nn.functional.embedding(index, left, sparse=True).sum() + right.sum()).backward()
    assert table.grad[:, 0].tolist() == [1, 3, 1, 1, 2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_narrow_features_are_as_near_the_oracle_as_their_dtype_allows(dtype, tolerance):
    leaf = torch.zeros(4000, dtype=dtype, requires_grad=True)
    rows = [torch.randn(4000).to(dtype) - 0.3 * t for t in range(4)]
    reports = []
    z = shared_features(leaf * 1, 4, methods.PCGrad("tensorflow"), on_report=reports.append)
    sum((own * row).sum() for own, row in zip(z, rows, strict=True)).backward()
    (expected,) = reference.merge([[row.double()] for row in rows], [leaf.double()], "tensorflow")
    scale = sum(w * row.double().norm() for w, row in zip(reports[0].weights, rows, strict=True))
    assert leaf.grad.dtype == dtype
    assert (leaf.grad.double() - expected).norm() <= tolerance * scale


def test_under_autocast_the_features_keep_their_narrow_dtype():
    net, x = Net(3, dtype=torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = shared_features(net.features(x), 3, methods.PCGrad("tensorflow"))
        assert z[0].dtype == torch.bfloat16
        losses = net.losses(z)
    torch.autograd.backward(losses)
    exact = Net(3)
    exact.load_state_dict(net.state_dict())
    trunk, _ = by_hand(exact, x.double(), lambda rows, z: reference.merge(rows, z, "tensorflow"))
    found = net.trunk.weight.grad
    assert found.dtype == torch.float32
    assert (found - trunk[0]).norm() <= 0.03 * trunk[0].norm()


@pytest.mark.parametrize("scale", [1e-30, 1e18])
def test_a_loss_scale_passes_through(scale):
    gradients = []
    for factor in (1.0, scale):
        net = Net(3)
        torch.manual_seed(0)
        for p in net.parameters():
            torch.nn.init.normal_(p)
        losses = net.losses(shared_features(net.features(inputs()), 3, methods.PCGrad("tensorflow")))
        (sum(losses) * factor).backward()
        gradients.append(net.trunk.weight.grad / factor)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_goes_on_at_its_place(value):
    leaf = torch.ones(6, requires_grad=True)
    left, right = shared_features(leaf, 2)
    weights = torch.tensor([1.0, 1.0, value, 1.0, 1.0, 1.0])
    ((left * weights).sum() - right.sum()).backward()
    assert leaf.grad.isfinite().logical_not().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_features_are_handed_through(switch):
    net = Net(2)
    with switch():
        z = net.features(inputs())
        assert all(own is z for own in shared_features(z, 2))
        assert shared_features([z, z], 2) == ((z, z), (z, z))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_trunk_changes_nothing(reentrant):
    net, x = Net(3), inputs().requires_grad_()
    trunk, _ = by_hand(net, x, lambda rows, z: reference.merge(rows, z, "tensorflow"))
    z = checkpoint(net.features, x, use_reentrant=reentrant)
    sum(net.losses(shared_features(z, 3, methods.PCGrad("tensorflow")))).backward()
    assert_all_close(trunk_gradients(net), trunk)


def test_a_second_derivative_is_an_error():
    net, x = Net(2), inputs().requires_grad_()
    loss = sum(net.losses(shared_features(net.features(x), 2)))
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks there
def test_compiled_trunk_and_heads_give_the_same_gradients():
    net, x = Net(3), inputs()

    def loss(x):
        return sum(net.losses(shared_features(net.features(x), 3, methods.PCGrad("tensorflow"))))

    trunk, heads = by_hand(net, x, lambda rows, z: reference.merge(rows, z, "tensorflow"))
    torch.compile(loss, backend="aot_eager")(x).backward()
    assert_all_close(trunk_gradients(net), trunk)
    assert_all_close([p.grad for p in net.heads.parameters()], heads)
    torch.compiler.reset()  # else the compiled pieces are found again
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(x)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), loss(x))


Z = torch.zeros(3, requires_grad=True)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((Z, 0), ValueError, ["num_tasks", "0"]),
        ((Z, 2.0), ValueError, ["num_tasks", "2.0"]),
        ((Z, 2, "paper"), TypeError, ["method", "paper"]),
        (([], 2), ValueError, ["z", "none"]),
        ((None, 2), TypeError, ["z", "NoneType"]),
        (([Z, 1.0], 2), TypeError, ["z[1]", "float"]),
        ((Z.detach(), 2), ValueError, ["z must require grad", "tensor 0", "[3]"]),
        (([Z, Z.detach()], 2), ValueError, ["z must require grad", "tensor 1", "[3]"]),
        (([Z, torch.zeros(3, device="meta", requires_grad=True)], 2), ValueError, ["cpu", "meta"]),
        ((torch.zeros(3, dtype=torch.complex64, requires_grad=True), 2), TypeError, ["complex64"]),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error) as caught:
        shared_features(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_step_over_the_features_is_not_a_step_over_the_parameters():
    """What the docstring says: the two surgeries differ, so neither may be taken for the other."""
    net, x = Net(3), inputs()
    merged = fastpcgrad.grad(net.losses([net.features(x)] * 3), [net.trunk.weight], method=methods.MGDA())[0]
    sum(net.losses(shared_features(net.features(x), 3, methods.MGDA()))).backward()
    assert (net.trunk.weight.grad - merged).norm() > 1e-3 * merged.norm()
