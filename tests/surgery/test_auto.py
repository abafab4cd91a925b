"""shared="auto" and gram_over="auto": what two tasks or more reach, as the gradients show it."""

import copy
import io
import random
import weakref

import pytest
import torch

import fastpcgrad
from fastpcgrad import FastPCGradWarning, methods
from tests.surgery import test_scopes

METHODS = {
    "pcgrad": lambda: methods.PCGrad("pytorch-pcgrad", generator=random.Random(3)),
    "upgrad": lambda: methods.UPGrad(),
    "nash_mtl": lambda: methods.NashMTL(),
    "graddrop": lambda: methods.GradDrop(generator=torch.Generator().manual_seed(3)),
}


class Trunk(test_scopes.Trunk):
    """Whose tasks conflict, in the trunk and with their heads."""

    def losses(self):
        z = self.trunk(self.x)
        return [
            (head(z) + (-1) ** t * 3 * z[:, :1] - t - 1).square().mean() * (t + 1) for t, head in enumerate(self.heads)
        ]


def by_optimizer(setting, method, **scopes):
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(setting.all, lr=0.1), method=method, **scopes)
    optimizer.pc_backward(setting.losses())


def by_surgery(setting, method, *, two_phase=False, **options):
    surgery = fastpcgrad.GradientSurgery(setting.all, 3, method, **options)
    surgery.backward(setting.losses(), two_phase=two_phase)


def by_functions(setting, method, **scopes):
    surgery = fastpcgrad.GradientSurgery(setting.all, 3, method, **scopes)
    surgery.backward([lambda t=t: setting.losses()[t] for t in range(3)])


def by_tasks(setting, method, **scopes):
    surgery = fastpcgrad.GradientSurgery(setting.all, 3, method, **scopes)
    for t in range(3):
        with surgery.task(t):
            setting.losses()[t].backward()
    surgery.merge()


def by_backward(setting, method, **scopes):
    fastpcgrad.backward(setting.losses(), method=method, **scopes)


def by_grad(setting, method, **scopes):
    merged = fastpcgrad.grad(setting.losses(), setting.all, method=method, **scopes)
    for p, own in zip(setting.all, merged, strict=True):
        p.grad = own


DOORS = {
    "optimizer": by_optimizer,
    "surgery": by_surgery,
    "functions": by_functions,
    "tasks": by_tasks,
    "backward": by_backward,
    "grad": by_grad,
    "factors": lambda *given, **scopes: by_surgery(*given, rows="factored", **scopes),
    "bf16 rows": lambda *given, **scopes: by_surgery(*given, row_dtype=torch.bfloat16, **scopes),
    "two phases": lambda *given, **scopes: by_surgery(*given, two_phase=True, **scopes),
}


def merged(door, method, **scopes):
    setting = Trunk()
    DOORS[door](setting, METHODS[method](), **{name: chosen(setting) for name, chosen in scopes.items()})
    return [p.grad for p in setting.all]


def assert_same_bits(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


CASES = [
    (door, scope, method)
    for door in DOORS
    for scope in ("shared", "gram_over")
    for method in METHODS
    if method != "graddrop" or (scope == "shared" and door != "two phases")  # it has no Gram matrix
]


@pytest.mark.parametrize(("door", "scope", "method"), CASES)
def test_it_is_the_trunk_by_hand(door, scope, method):
    by_hand = merged(door, method, **{scope: lambda setting: setting.shared})
    assert_same_bits(merged(door, method, **{scope: lambda setting: "auto"}), by_hand)
    if method != "graddrop":  # which works on each column, and leaves that of one task as it is
        assert not all(map(torch.equal, by_hand, merged(door, method)))


@pytest.mark.parametrize("granularity", ["layer", "parameter", "collections"])
def test_problems_are_made_of_what_is_shared(granularity):
    found = []
    for by_hand in (True, False):
        setting = Trunk()
        model = torch.nn.ModuleList([setting.trunk, setting.heads])
        chosen = [setting.shared[:3], setting.shared[3:]] if granularity == "collections" else granularity
        if granularity == "collections" and not by_hand:
            chosen = [*chosen, setting.all[len(setting.shared) :]]
        surgery = fastpcgrad.GradientSurgery(
            setting.all,
            3,
            methods.UPGrad(),
            granularity=chosen,
            model=None if granularity == "collections" else model,
            shared=setting.shared if by_hand else "auto",
        )
        report = surgery.backward(setting.losses())
        found.append([*(p.grad for p in setting.all), report.segment_grams])
    assert_same_bits(*found)


class Pairs:
    """Parameter a of all three tasks, b of tasks 0 and 1, and c, d of tasks 1 and 2 alone."""

    def __init__(self, **options):
        generator = torch.Generator().manual_seed(2)
        self.all = [torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(4)]
        options.setdefault("shared", "auto")
        self.surgery = fastpcgrad.GradientSurgery(self.all, 3, methods.UPGrad(), **options)

    def losses(self):
        a, b, c, d = self.all
        x, y = torch.linspace(-1, 1, 4, dtype=torch.float64), torch.linspace(2, -1, 4, dtype=torch.float64)
        return [
            ((a * x).sum() + (b * y).sum() - 1).square(),
            ((a * y).sum() - (b * x).sum() + c.sum() - 2).square(),
            ((a - x).square().sum() - (d * y).sum()).square(),
        ]

    def run(self, *tasks):
        losses = self.losses()
        self.surgery.backward([losses[t] if t in tasks else None for t in range(3)])
        return [p.grad.clone() for p in self.all if p.grad is not None]


def by_hand():
    setting = Pairs(shared=None)
    setting.surgery = fastpcgrad.GradientSurgery(setting.all, 3, methods.UPGrad(), shared=setting.all[:2])
    return setting


@pytest.mark.parametrize("tasks", [(0, 2), (1, 2), (1,)], ids=str)
def test_what_is_shared_stays_so_while_its_other_task_is_absent(tasks):
    setting, right = Pairs(), by_hand()
    assert_same_bits(setting.run(0, 1, 2), right.run(0, 1, 2))
    assert_same_bits(setting.run(*tasks), right.run(*tasks))


def test_copies_and_checkpoints_know_what_was_learned():
    setting, right = Pairs(), by_hand()
    setting.run(0, 1, 2)
    kept = io.BytesIO()
    torch.save(setting.surgery.state_dict(), kept)
    kept.seek(0)
    resumed = Pairs()
    with pytest.raises(RuntimeError, match=r"tasks \[1\] have never been there"):
        resumed.run(0, 2)
    assert [p.grad for p in resumed.all] == [None] * 4
    resumed.surgery.load_state_dict(torch.load(kept, weights_only=True))
    assert_same_bits(resumed.run(0, 2), right.run(0, 2))
    copied = copy.deepcopy(setting)
    assert_same_bits(copied.run(0, 2), right.run(0, 2))
    fewer = fastpcgrad.GradientSurgery(setting.all[:2], 3, methods.UPGrad(), shared="auto")
    with pytest.raises(ValueError, match="must be of the 2 parameters that there are; found it of 4"):
        fewer.load_state_dict(setting.surgery.state_dict())


@pytest.mark.parametrize("two_phase", [False, True])
def test_a_first_round_without_all_tasks_is_refused(two_phase):
    setting = Pairs()
    a = setting.losses()
    with pytest.raises(RuntimeError, match=r"tasks \[1\] have never been there: let the first round have all tasks"):
        setting.surgery.backward([a[0], None, a[2]], two_phase=two_phase)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(setting.all, lr=0.1), shared="auto")
    with pytest.raises(RuntimeError, match=r"tasks \[2\] have never been there"):
        optimizer.pc_backward([a[0], a[1], None])
    with pytest.raises(ValueError, match=r"'auto' needs the losses of all tasks.*found None for some"):
        fastpcgrad.backward([a[0], None, a[2]], shared="auto")
    assert [p.grad for p in setting.all] == [None] * 4


def test_what_turns_out_to_be_shared_is_said():
    setting = Pairs()
    setting.run(0, 1, 2)
    *losses, last = setting.losses()
    with pytest.warns(FastPCGradWarning, match="1 parameters that one task alone has reached so far"):
        setting.surgery.backward([*losses, last + setting.all[2].square().sum()])
    right = fastpcgrad.GradientSurgery(setting.all, 3, methods.UPGrad(), shared=setting.all[:3])
    found = setting.run(0, 2)
    losses = setting.losses()
    right.backward([losses[0], None, losses[2]])
    assert_same_bits(found, [p.grad for p in setting.all if p.grad is not None])


def test_parameters_come_and_go():
    setting, right = Pairs(), by_hand()
    setting.run(0, 1, 2)
    for pair in (setting, right):
        pair.all[1].requires_grad_(False)
    setting.run(0, 1, 2), right.run(0, 1, 2)
    for pair in (setting, right):
        pair.all[1].requires_grad_(True)
    assert_same_bits(setting.run(0, 2), right.run(0, 2))


def test_tasks_that_have_nothing_in_common_are_summed():
    heads = [torch.full((2,), 3.0, requires_grad=True) for _ in range(2)]
    losses = [head.square().sum() * (t - 2) for t, head in enumerate(heads)]
    fastpcgrad.backward(losses, method=methods.UPGrad(), shared="auto", retain_graph=True)
    assert [head.grad.tolist() for head in heads] == [[-12.0] * 2, [-6.0] * 2]
    with pytest.raises(
        ValueError, match="gram_over='auto' finds no parameter that two tasks reach: its Gram matrix would be"
    ):
        fastpcgrad.backward(losses, method=methods.UPGrad(), gram_over="auto")


def test_a_gram_matrix_of_what_one_task_reaches_is_refused():
    setting = Trunk()
    head = list(setting.heads.parameters())[:1]
    for door in ("surgery", "two phases", "backward"):
        with pytest.raises(ValueError, match="one task alone reaches: it is not in shared"):
            DOORS[door](setting, methods.UPGrad(), shared="auto", gram_over=[setting.shared[0], *head])


class Joined(torch.autograd.Function):
    """Several outputs, of which those that are not used get zeros in the backward pass."""

    @staticmethod
    def forward(ctx, *outputs):
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx, *grads):
        return grads


class Mixed(Trunk):
    """Three heads whose gradients from each other's losses are zeros, not None."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def outputs(self, x):
        z = self.trunk(x)
        return z, [head(z) + (-1) ** t * 3 * z[:, :1] for t, head in enumerate(self.heads)]

    def losses(self):
        if self.how == "compiled":
            z, outputs = torch.compile(self.outputs, backend="aot_eager")(self.x)
        else:
            z, outputs = self.outputs(self.x)
        if self.how == "stacked losses":
            return list(torch.stack([(o - 1).square().mean() for o in outputs]) * z.square().mean())
        if self.how == "one tensor":
            return torch.stack([(o - 1).square().mean() for o in outputs])
        if self.how == "masks":
            errors = (torch.cat(outputs, dim=1) - 1).square().mean(dim=0)
            return [(errors * mask).sum() for mask in torch.eye(3, dtype=torch.float64)]
        if self.how == "samples of each task":
            task_of, joined = torch.arange(16) % 3, torch.zeros(16, 1, dtype=torch.float64)
            for t, output in enumerate(outputs):
                joined[task_of == t] = output[task_of == t]
            return [(joined[task_of == t] - 1).square().mean() for t in range(3)]
        if self.how == "written into columns":
            joined = torch.empty(16, 3, dtype=torch.float64)
            for t, output in enumerate(outputs):
                joined[:, t] = output[:, 0]
            return [(joined[:, t] - 1).square().mean() for t in range(3)]
        if self.how == "all parameters touched":
            zero = 0 * sum(p.sum() for p in self.heads.parameters())
            return [(o - 1).square().mean() + zero for o in outputs]
        if self.how == "custom function":
            outputs = Joined.apply(*outputs)
        return [(o - 1).square().mean() for o in outputs]


WAYS = [
    "stacked losses",
    "one tensor",
    "masks",
    "samples of each task",
    "written into columns",
    "all parameters touched",
    "compiled",
    "custom function",
]


JOINED = [
    (how, door)
    for how in WAYS
    for door in ("optimizer", "surgery", "tasks", "backward", "factors", "two phases")
    if (how, door) != ("compiled", "two phases")  # one graph, which cannot be cut
]


@pytest.mark.parametrize("scope", ["shared", "gram_over"])
@pytest.mark.parametrize(("how", "door"), JOINED)
def test_zeros_are_no_gradient(how, door, scope):
    found = []
    for is_known in (True, False):
        setting = Mixed(how)
        DOORS[door](setting, METHODS["upgrad"](), **{scope: setting.shared if is_known else "auto"})
        found.append([p.grad for p in setting.all])
    assert_same_bits(*found)


def test_features_may_be_joined_and_taken_apart():
    """What lies behind all parts, or is not taken apart again, is no ground for a refusal."""
    torch.manual_seed(0)
    trunk, heads = torch.nn.Linear(3, 4), [torch.nn.Linear(8, 1) for _ in range(2)]
    z = torch.cat([trunk(torch.randn(5, 3)), trunk(torch.randn(5, 3))], dim=1)
    early, late = torch.stack([z, z * 2]).unbind()
    losses = [head(part).square().mean() for head, part in zip(heads, (early, late), strict=True)]
    parameters = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]
    found = fastpcgrad.grad(losses, parameters, method=methods.UPGrad(), shared="auto", retain_graph=True)
    right = fastpcgrad.grad(losses, parameters, method=methods.UPGrad(), shared=trunk.parameters())
    assert_same_bits(found, right)


def test_other_words_and_samples_are_refused():
    setting = Trunk()
    for scope in ("shared", "gram_over"):
        with pytest.raises(TypeError, match=f"{scope} must be an iterable of tensors or 'auto'; found 'trunk'"):
            fastpcgrad.GradientSurgery(setting.all, 3, methods.UPGrad(), **{scope: "trunk"})
    losses = setting.heads[0](setting.trunk(setting.x)).square()[:, 0]
    with pytest.raises(ValueError, match="found one loss a sample"):
        fastpcgrad.backward(losses, batch_dim=0, method=methods.UPGrad(), shared="auto")


@pytest.mark.parametrize("scope", ["shared", "gram_over"])
def test_lists_do_for_backward_and_grad(scope):
    setting = Trunk()
    surgery = fastpcgrad.GradientSurgery(setting.all, 3, methods.UPGrad(), **{scope: setting.shared})
    surgery.backward(setting.losses())
    expected = [p.grad for p in setting.all]
    found = fastpcgrad.grad(setting.losses(), setting.all, method=methods.UPGrad(), **{scope: setting.shared})
    assert_same_bits(found, expected)


def test_a_parameter_that_tasks_reach_in_turns_is_shared():
    """Each round one task alone reaches it, never the same twice."""
    trunk, turns, heads = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    surgery = fastpcgrad.GradientSurgery([trunk, turns, heads], 2, methods.UPGrad(), shared="auto")

    def losses(owner):
        return [(trunk * (t + 1)).sum() + (turns.sum() if t == owner else heads.sum() * (t + 1)) for t in range(2)]

    surgery.backward(losses(0))
    with pytest.warns(FastPCGradWarning, match="parameters that one task alone has reached so far"):
        surgery.backward(losses(1))
    assert surgery._layouts.reach.are_shared([trunk, turns, heads]) == [True, True, True]


def test_a_loss_that_does_not_count_yet_reaches_nothing():
    """A hinge that is not active in the first round: what it reaches is learned when it is."""
    trunk, heads = torch.nn.Parameter(torch.ones(3)), [torch.nn.Parameter(torch.full((2,), 2.0)) for _ in range(2)]
    surgery = fastpcgrad.GradientSurgery([trunk, *heads], 2, methods.UPGrad(), shared="auto")

    def losses(margin):
        return [(trunk.sum() + heads[0].sum()), (margin - trunk.sum() - heads[1].sum()).relu()]

    surgery.backward(losses(0.0))
    assert [p.grad.tolist() for p in (trunk, *heads)] == [[1.0] * 3, [1.0] * 2, [0.0] * 2]
    with pytest.warns(FastPCGradWarning, match="1 parameters that one task alone has reached so far"):
        surgery.backward(losses(9.0))
    assert surgery._layouts.reach.are_shared([trunk, *heads]) == [True, False, False]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_zero(number):
    shared = torch.nn.Parameter(torch.ones(2))
    surgery = fastpcgrad.GradientSurgery([shared], 2, methods.Mean(), shared="auto")
    surgery.backward([shared.sum(), (shared * number).sum()])
    assert surgery._layouts.reach.are_shared([shared]) == [True]


def test_a_refused_round_leaves_the_graphs_and_the_number_of_tasks():
    setting = Pairs()
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(setting.all, lr=0.1), method=methods.UPGrad(), shared="auto")
    losses = setting.losses()
    for given in ([losses[0], None, losses[1], losses[2]], [None, *losses]):
        with pytest.raises(RuntimeError, match="have never been there"):
            optimizer.pc_backward(given)
    optimizer.pc_backward(losses)
    assert optimizer.report.tasks == (0, 1, 2)
    assert_same_bits([p.grad for p in setting.all], by_hand().run(0, 1, 2))


def test_parameters_that_are_gone_are_forgotten():
    kept, gone = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD([kept, gone], lr=0.1), shared="auto")
    optimizer.pc_backward([(kept * gone).sum(), (kept + gone).sum()])
    optimizer.zero_grad()
    is_there = weakref.ref(gone)
    optimizer.param_groups[0]["params"] = [kept]
    del gone
    optimizer.pc_backward([kept.sum(), kept.square().sum()])
    assert is_there() is None


@pytest.mark.parametrize(
    ("reach", "message"),
    [
        ({"tasks": 7}, r"must hold tasks and reached; found \['tasks'\]"),
        ({"tasks": 7, "reached": [3]}, "must be of the 4 parameters that there are; found it of 1"),
        ({"tasks": 7, "reached": [3, 3, None, 3]}, "integers, with a bit for each task; found None"),
        ({"tasks": -1, "reached": [3] * 4}, "found -1"),
    ],
)
def test_states_that_cannot_be_are_refused(reach, message):
    surgery = Pairs().surgery
    state = {**surgery.state_dict(), "reach": reach}
    with pytest.raises(ValueError, match=message):
        surgery.load_state_dict(state)
