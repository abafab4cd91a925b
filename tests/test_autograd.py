"""backward and grad against the oracle, and what they leave alone."""

import random
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpcgrad
from fastpcgrad import FastPCGradWarning, _graph, _warnings, methods, reference, variants
from tests.linear_problems import random_problem

for_every_variant = pytest.mark.parametrize("variant", list(variants.VARIANTS))
CALLS = {
    "grad": lambda losses, inputs: fastpcgrad.grad(losses, inputs),
    "backward with inputs": lambda losses, inputs: fastpcgrad.backward(losses, inputs),
    "backward without inputs": lambda losses, inputs: fastpcgrad.backward(losses),
}
for_every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def assert_all_close(found, expected):
    assert [f is None for f in found] == [e is None for e in expected]
    for f, e in zip(found, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(f, e)


def two_losses(model, x):
    output = model(x)
    return [output.square().mean(), (output - 1).abs().mean()]


def plain_gradients(losses, inputs):
    return [torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True) for loss in losses]


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()


@pytest.fixture
def x():
    return torch.randn(5, 4, dtype=torch.float64)


def whole_problems(count):
    """Random ones, by their seed, in which each loss depends on a parameter."""
    for seed in range(count):
        problem = random_problem(seed)
        if not lost_tasks(problem):
            yield seed, problem


def lost_tasks(problem):
    """Those that touch no parameter."""
    return [t for t, row in enumerate(problem.gradients) if all(gradient is None for gradient in row)]


@for_every_variant
def test_grad_is_the_oracles(variant):
    for seed, problem in whole_problems(80):
        inputs = problem.parameters(torch.float64)
        method = methods.PCGrad(variant, generator=random.Random(seed))
        merged = fastpcgrad.grad(problem.losses(inputs), inputs, method=method)
        assert isinstance(merged, tuple)
        assert_all_close(merged, reference.merge(problem.gradients, inputs, variant, random.Random(seed)))


@for_every_variant
def test_backward_adds_the_oracles_gradient_to_grad(variant):
    for seed, problem in whole_problems(40):
        inputs = problem.parameters(torch.float64)
        generator = random.Random(seed)
        expected = reference.merge(problem.gradients, inputs, variant, generator)
        again = reference.merge(problem.gradients, inputs, variant, generator)
        method = methods.PCGrad(variant, generator=random.Random(seed))
        for _ in range(2):
            fastpcgrad.backward(problem.losses(inputs), inputs, method=method)
        sums = [None if e is None else e + a for e, a in zip(expected, again, strict=True)]
        assert_all_close([p.grad for p in inputs], sums)


def test_the_default_method_is_the_papers_from_torchs_generator(model, x):
    inputs = list(model.parameters())
    losses = two_losses(model, x) + two_losses(model, x + 1)
    expected = reference.merge(plain_gradients(losses, inputs), inputs, "paper", torch.Generator().manual_seed(9))
    torch.manual_seed(9)
    assert_all_close(fastpcgrad.grad(losses, inputs), expected)


def test_grad_touches_no_grad_and_runs_no_accumulation_hook(model, x):
    inputs, calls = list(model.parameters()), []
    inputs[0].grad = kept = torch.full_like(inputs[0], 3.0)
    for p in inputs:
        p.register_post_accumulate_grad_hook(calls.append)
    fastpcgrad.grad(two_losses(model, x), inputs)
    assert inputs[0].grad is kept and (kept == 3).all()
    assert all(p.grad is None for p in inputs[1:]) and not calls
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in inputs)


def test_grad_takes_inputs_that_are_no_leaves():
    """Surgery on a shared representation: the gradients of the losses with respect to the trunk's output."""
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True) * 2.0
    losses = [(z * 3).sin().sum(), z.square().sum(), -z.sum()]
    expected = reference.merge(plain_gradients(losses, [z]), [z], "tensorflow")
    assert_all_close(fastpcgrad.grad(losses, [z], method=methods.PCGrad("tensorflow")), expected)


def test_a_single_tensor_of_losses_and_a_single_input_will_do(model, x):
    method = methods.PCGrad("tensorflow")
    inputs = list(model.parameters())
    together = fastpcgrad.grad(torch.stack(two_losses(model, x)), inputs, method=method)
    assert_all_close(together, fastpcgrad.grad(two_losses(model, x), inputs, method=method))
    (alone,) = fastpcgrad.grad(two_losses(model, x), inputs[0], method=method)
    assert alone.shape == inputs[0].shape


def test_an_input_that_no_loss_depends_on_has_no_gradient(model, x):
    unused = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    *_, nothing = fastpcgrad.grad(two_losses(model, x), [*model.parameters(), unused])
    assert nothing is None
    fastpcgrad.backward(two_losses(model, x), [*model.parameters(), unused])
    assert unused.grad is None


def test_backward_without_inputs_finds_the_leaves(model, x):
    frozen, other = model[0].bias.requires_grad_(False), torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = [*two_losses(model, x), other, (model(x) * other).sum()]  # one loss is a leaf itself
    leaves = [*(p for p in model.parameters() if p.requires_grad), other]
    expected = reference.merge(plain_gradients(losses, leaves), leaves, "tensorflow")
    fastpcgrad.backward(losses, method=methods.PCGrad("tensorflow"))
    assert_all_close([p.grad for p in leaves], expected)
    assert frozen.grad is None


def test_backward_does_not_reach_leaves_that_are_not_named(model, x):
    fastpcgrad.backward(two_losses(model, x), [model[2].weight])
    assert model[2].weight.grad is not None
    assert all(p.grad is None for p in model.parameters() if p is not model[2].weight)


def test_backward_adds_once_to_an_input_that_is_named_twice(model, x):
    weight = model[2].weight
    (expected,) = fastpcgrad.grad(two_losses(model, x), [weight], method=methods.PCGrad("tensorflow"))
    fastpcgrad.backward(two_losses(model, x), [weight, weight], method=methods.PCGrad("tensorflow"))
    torch.testing.assert_close(weight.grad, expected)


def test_backward_adds_to_a_sparse_gradient():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    expected = embedding.weight.grad.to_dense() + 1
    fastpcgrad.backward([embedding.weight.sum()], [embedding.weight])
    torch.testing.assert_close(embedding.weight.grad.to_dense(), expected)


def test_the_last_pass_frees_the_graph_unless_it_is_retained(model, x):
    losses, inputs = two_losses(model, x), list(model.parameters())
    method = methods.PCGrad("tensorflow")
    first = fastpcgrad.grad(losses, inputs, method=method, retain_graph=True)
    assert_all_close(fastpcgrad.grad(losses, inputs, method=method), first)
    with pytest.raises(RuntimeError, match="second time"):
        fastpcgrad.grad(losses, inputs, method=method)


def test_checkpointing_that_is_not_reentrant_changes_nothing(model, x):
    method, inputs = methods.PCGrad("tensorflow"), list(model.parameters())
    expected = fastpcgrad.grad(two_losses(model, x), inputs, method=method)
    checkpointed = two_losses(lambda z: checkpoint(model, z, use_reentrant=False), x)
    assert_all_close(fastpcgrad.grad(checkpointed, inputs, method=method, retain_graph=True), expected)
    fastpcgrad.backward(checkpointed, method=method)
    assert_all_close([p.grad for p in inputs], expected)


@for_every_call
def test_reentrant_checkpoints_raise_where_they_would_hide_gradients(call, model, x):
    losses = two_losses(lambda z: checkpoint(model, z, use_reentrant=True), x.requires_grad_())
    with pytest.raises(RuntimeError, match="reentrant"):
        call(losses, list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_sparse_gradients_stay_sparse():
    embedding = torch.nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    losses = [embedding(torch.tensor([0, 1])).sum(), -embedding(torch.tensor([1, 4])).sum()]
    tasks = [[g.to_dense() for g in row] for row in plain_gradients(losses, [embedding.weight])]
    (merged,) = fastpcgrad.grad(losses, [embedding.weight], method=methods.PCGrad("tensorflow"))
    assert merged.is_coalesced() and merged._indices().tolist() == [[0, 1, 4]]
    torch.testing.assert_close(merged.to_dense(), reference.merge(tasks, [embedding.weight], "tensorflow")[0])


def test_a_non_finite_gradient_reaches_the_merged_gradient_at_its_place(model, x):
    inputs = list(model.parameters())
    losses = [*two_losses(model, x), inputs[3][0] * torch.nan]
    merged = fastpcgrad.grad(losses, inputs)
    assert [int(g.isnan().sum()) for g in merged] == [0, 0, 0, 1]
    assert merged[3][0].isnan()


class Cached:
    """Losses that are no part of a graph: a hook runs the real backward pass, as with a gradient cache."""

    def __init__(self, model, x):
        self.model, self.x, self.ran = model, x, 0

    def losses(self):
        return [self._stand_in(t) * 0.5 for t in range(2)]

    def real(self):
        return [loss * 0.5 for loss in two_losses(self.model, self.x)]

    def _stand_in(self, t):
        loss = two_losses(self.model, self.x)[t].detach().requires_grad_()

        def hook(grad):
            self.ran += 1
            with torch.enable_grad():
                (two_losses(self.model, self.x)[t] * grad).backward()

        loss.register_hook(hook)
        return loss


@pytest.mark.parametrize("call", [fastpcgrad.grad, fastpcgrad.backward])
def test_of_random_problems_the_first_loss_that_touches_nothing_is_named(call):
    problems = [problem for problem in map(random_problem, range(80)) if lost_tasks(problem)]
    for problem in problems:
        inputs = problem.parameters(torch.float64)
        with pytest.raises(ValueError, match=rf"^losses\[{lost_tasks(problem)[0]}\] depends on none"):
            call(problem.losses(inputs), inputs)
        assert all(p.grad is None for p in inputs)
    assert len(problems) > 5


@for_every_call
@pytest.mark.parametrize("place", [0, 1, 2, None])
def test_losses_that_run_their_backward_in_a_hook_are_refused_before_they_do(call, place, model, x):
    cached = Cached(model, x)
    losses = cached.losses() if place is None else two_losses(model, x)
    if place is not None:
        losses.insert(place, cached.losses()[0])
    with pytest.raises(ValueError, match=rf"^losses\[{place or 0}\].*hook.*pc_backward.*surgery.task\(t\)"):
        call(losses, list(model.parameters()))
    assert not cached.ran and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("remedy", ["pc_backward", "surgery.task(t)"])
def test_the_remedies_for_losses_that_run_their_backward_in_a_hook_work(remedy, model, x):
    cached, parameters, method = Cached(model, x), list(model.parameters()), methods.PCGrad("tensorflow")
    expected = reference.merge(plain_gradients(cached.real(), parameters), parameters, "tensorflow")
    if remedy == "pc_backward":
        fastpcgrad.PCGrad(torch.optim.SGD(parameters, lr=0.1), method=method).pc_backward(cached.losses())
    else:
        surgery = fastpcgrad.GradientSurgery(parameters, 2, method)
        for t, loss in enumerate(cached.losses()):
            with surgery.task(t):
                loss.backward()
        surgery.merge()
    assert cached.ran == 2
    assert_all_close([p.grad for p in parameters], expected)


def assert_lost(losses, inputs, index):
    """``grad`` names the loss of that index, and only then; the graph can be run afterwards."""
    if index is None:
        return fastpcgrad.grad(losses, inputs)
    with pytest.raises(ValueError, match=rf"^losses\[{index}\] depends on none of the {len(inputs)} inputs"):
        fastpcgrad.grad(losses, inputs)
    return sum(losses).backward()


@pytest.mark.parametrize("variant", ["head", "other output", "leaf", "deep", "other leaf"])
def test_a_loss_that_reaches_no_input_is_named_and_one_that_does_is_not(variant, model, x):
    trunk, head = model[0], model[2]
    z = trunk(x)
    left, right = z.unbind(dim=1)[:2]  # two outputs of one node
    free = torch.ones((), dtype=torch.float64, requires_grad=True)
    cases = {
        "head": ([head.weight.square().sum(), head(z.tanh()).sum()], [trunk.weight, trunk.bias], 0),
        "other output": ([(left * left).sum(), right.sum()], [left], 1),
        "leaf": ([z.sum(), free], [trunk.weight, free], None),
        "deep": ([head(z.tanh()).sum(), z.square().sum(), z.sum()], [trunk.weight], None),
        "other leaf": ([z.sum(), z.square().sum(), free], [trunk.bias], 2),
    }
    assert_lost(*cases[variant])


@pytest.mark.parametrize("as_parameter", [False, True])
def test_a_scalar_with_a_hook_is_an_input_like_any_other(as_parameter, model, x):
    """A learnable temperature: one of the user's own, which takes part in several losses or is a parameter."""
    calls = []
    scalar = torch.ones((), dtype=torch.float64)
    scalar = torch.nn.Parameter(scalar) if as_parameter else scalar.requires_grad_()
    scalar.register_hook(calls.append)
    losses = [scalar * 2, scalar.square()] if not as_parameter else [scalar * 2, model(x).sum()]
    fastpcgrad.backward(losses, method=methods.Sum())
    assert scalar.grad == (2 if as_parameter else 4) and calls


def test_losses_that_share_a_graph_are_not_each_followed_to_its_end(monkeypatch):
    layers = [torch.nn.Linear(4, 4) for _ in range(50)]
    z = torch.nn.Sequential(*layers)(torch.randn(2, 4))
    losses = [(z * t).sum() for t in range(20)]
    visits, leaf_of = [], _graph.leaf_of
    monkeypatch.setattr(_graph, "leaf_of", lambda node: visits.append(node) or leaf_of(node))
    assert _graph.unreached(losses, [layers[0].weight]) == []
    assert len(visits) < len(list(_graph.nodes(losses))) + 5 * len(losses)


class Remembers(torch.autograd.Function):
    """Keeps its input under the name that a node which adds to ``.grad`` has for its leaf."""

    @staticmethod
    def forward(ctx, x):
        ctx.variable = x
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_what_a_function_keeps_is_no_leaf(model, x):
    losses = [Remembers.apply(loss) for loss in two_losses(model, x)]
    parameters = list(model.parameters())
    expected = reference.merge(plain_gradients(losses, parameters), parameters, "tensorflow")
    fastpcgrad.backward(losses, method=methods.PCGrad("tensorflow"))
    assert_all_close([p.grad for p in parameters], expected)


@for_every_call
@pytest.mark.parametrize(
    "form", [lambda losses: [sum(losses)], lambda losses: torch.stack([losses[0] + losses[1]])], ids=["list", "[1]"]
)
def test_one_loss_is_warned_of_once_where_the_call_is(call, form, model, x, monkeypatch):
    monkeypatch.setattr(_warnings, "_said", set())
    with pytest.warns(
        FastPCGradWarning, match="^one loss: nothing to merge; pass the task losses separately"
    ) as caught:
        call(form(two_losses(model, x)), list(model.parameters()))
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(form(two_losses(model, x)), list(model.parameters()))


@for_every_call
def test_several_losses_are_not_warned_of(call, model, x, monkeypatch):
    monkeypatch.setattr(_warnings, "_said", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(two_losses(model, x), list(model.parameters()))


@pytest.mark.parametrize("call", ["grad", "backward", "all leaves"])
def test_what_is_kept_of_an_input_is_not_taken_for_that_of_another(call):
    """By a method with a problem for each."""
    method = methods.CRMOGM(methods.PCGrad("tensorlogic"))
    a, b, c = (torch.nn.Parameter(torch.ones(2) * n) for n in (1, 2, 3))

    def run(*inputs):
        total = sum((n * p).square().sum() for n, p in enumerate(inputs, start=1))
        losses = [total, inputs[0].sum() - total]
        if call == "grad":
            return fastpcgrad.grad(losses, inputs, method=method)
        fastpcgrad.backward(losses, None if call == "all leaves" else inputs, method=method)

    run(a, b), run(a, b)
    state = method.state_dict()
    for others in ((b, c), (b, a)):
        with pytest.raises(ValueError, match=r"of other parameters or in another order.*reset"):
            run(*others)
    torch.testing.assert_close(method.state_dict(), state, rtol=0, atol=0)
    run(a, b)
