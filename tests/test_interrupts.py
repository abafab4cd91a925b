"""An interrupt before any instruction, or an exception in a hook: whatever it cuts off, the next rounds are right."""

import itertools
import os
import random

import pytest
import torch

import fastpcgrad
from fastpcgrad import balancing, methods
from fastpcgrad.rows import host as host_rows
from fastpcgrad.rows import stacked
from tests import interrupts
from tests.late_copies import LateCopies

ROUNDS = int(os.environ.get("FASTPCGRAD_TEST_ROUNDS", 60))
"""Interrupts of each object. By hand more, in a minute and a half: 500 are all places of most."""
FAILURES = ROUNDS * 2 // 5
"""Of hooks."""
FIXED = "tensorflow"
"""A variant that draws nothing: the same round gives the same numbers."""

x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def make_model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))


def losses_of(model):
    left, right = model(x).unbind(1)
    return [left.mean() - right.square().mean(), right.square().mean() + 2 * right.mean() - left.mean()]


class DropIn:
    def __init__(self, **options):
        self.model = make_model()
        self.optimizer = fastpcgrad.PCGrad(torch.optim.SGD(self.model.parameters(), lr=0.1), variant=FIXED, **options)

    def round(self):
        self.model.zero_grad()
        self.optimizer.pc_backward(losses_of(self.model))

    def put_right(self):
        """Nothing: the next round does."""


class Accumulating(DropIn):
    def __init__(self):
        super().__init__(on_repeat="add")

    def round(self):
        super().round()
        self.optimizer.pc_backward(losses_of(self.model))


class Tasks:
    def __init__(self, **options):
        self.model = make_model()
        options.setdefault("method", methods.PCGrad(FIXED))
        self.surgery = fastpcgrad.GradientSurgery(self.model.parameters(), 2, **options)

    def round(self):
        self.model.zero_grad()
        for t in (0, 1, 0):
            with self.surgery.task(t):
                losses_of(self.model)[t].backward()
        self.surgery.merge()

    def put_right(self):
        self.surgery.discard()


class Functions(Tasks):
    def round(self):
        self.surgery.backward([lambda t=t: losses_of(self.model)[t] for t in range(2)])


class TwoPhase(Tasks):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        layers = (layer for _ in range(8) for layer in (torch.nn.Linear(5, 5), torch.nn.Tanh()))
        self.model = torch.nn.Sequential(*layers, torch.nn.Linear(5, 2))
        self.surgery = fastpcgrad.GradientSurgery(self.model.parameters(), 2, methods.PCGrad(FIXED))

    def round(self):
        self.surgery.backward(losses_of(self.model), two_phase=True)


class Factored(DropIn):
    """The bits of its steps are those of torch's products, in another order where a graph is compared."""

    is_exact = False

    def __init__(self):
        super().__init__(rows="factored")


class Stacked(Factored):
    """From its third round on, unless an interrupt or a hook has made it start again."""

    def __init__(self):
        super().__init__()
        for _ in range(2):
            self.round()

    def round(self):
        self.model.zero_grad()
        h = self.model[:2](x)
        left, right = self.model[2](h).unbind(1)
        self.optimizer.pc_backward([left.mean() - right.square().mean(), right.square().mean() + 2 * right.mean()])


class Features:
    def __init__(self):
        self.model = make_model()

    def round(self):
        self.model.zero_grad()
        left, right = fastpcgrad.shared_features(self.model(x), 2, methods.PCGrad(FIXED))
        (left.sum() - right[:, 0].square().sum() - right.sum()).backward()

    def put_right(self):
        """Nothing: no object is kept."""


class LikeAutograd(Features):
    rows = "dense"

    def round(self):
        self.model.zero_grad()
        fastpcgrad.backward(losses_of(self.model), method=methods.PCGrad(FIXED), rows=self.rows)


class FactoredLikeAutograd(LikeAutograd):
    is_exact, options = False, {"rows": "factored"}


OBJECTS = {
    "PCGrad": DropIn,
    "PCGrad that adds": Accumulating,
    "PCGrad with rows of another dtype": lambda: DropIn(row_dtype=torch.float64),
    "task by task": Tasks,
    "means over micro-batches": lambda: Tasks(accumulate="mean"),
    "sums in another dtype": lambda: Tasks(accumulate="mean", accumulate_dtype=torch.float64),
    "rows on the host": lambda: Tasks(row_device="cpu"),
    "a problem a parameter": lambda: Tasks(granularity="parameter"),
    "a method on the rows": lambda: Tasks(method=methods.TrimmedMean(0)),
    "functions": Functions,
    "two phases": TwoPhase,
    "shared_features": Features,
    "backward": LikeAutograd,
    "PCGrad with factors": Factored,
    "PCGrad with stacked tasks": Stacked,
    "backward with factors": FactoredLikeAutograd,
}


@pytest.fixture(params=OBJECTS)
def made(request, monkeypatch):
    if request.param == "rows on the host":
        monkeypatch.setattr(host_rows, "copies_for", lambda device, row_device: LateCopies())
    monkeypatch.setattr(stacked, "stacking_pays", lambda *_: request.param == "PCGrad with stacked tasks")
    return OBJECTS[request.param]()


def assert_round_is_right(made, expected):
    made.round()
    parameters = list(made.model.parameters())
    alike = 0 if getattr(made, "is_exact", True) else 1e-6
    torch.testing.assert_close([p.grad for p in parameters], expected, rtol=alike, atol=alike)
    assert not any(p._post_accumulate_grad_hooks for p in parameters)


def expected_of(made):
    made.round()
    return [p.grad.clone() for p in made.model.parameters()]


def test_the_round_after_an_interrupt_at_any_instruction_is_right(made):
    expected = expected_of(made)
    for number in interrupts.places(made.round, ROUNDS):
        assert interrupts.run(made.round, number), number
        made.put_right()
        assert_round_is_right(made, expected)


def test_an_interrupt_while_it_is_put_right_can_be_put_right():
    made = Tasks(row_dtype=torch.float64)
    expected = expected_of(made)
    for number in interrupts.places(made.round, ROUNDS // 2):
        interrupts.run(made.round, number)
        count = 0
        while interrupts.run(made.put_right, count):
            count += 7
        assert_round_is_right(made, expected)


def test_gradients_that_were_there_are_there_again(made):
    """Those that a task sets aside."""
    if not hasattr(made, "surgery") or isinstance(made, Functions | TwoPhase):
        pytest.skip("a round of these replaces what is in .grad")

    def one_task():
        with made.surgery.task(0):
            losses_of(made.model)[0].backward()

    parameters = list(made.model.parameters())
    for number in interrupts.places(one_task, ROUNDS):
        before = [torch.randn_like(p) for p in parameters]
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
        interrupts.run(one_task, number)
        made.put_right()
        assert all(p.grad is grad for p, grad in zip(parameters, before, strict=True)), number


def test_a_merge_that_was_cut_off_while_it_wrote_is_no_round_any_more():
    """A second merge would take what is half merged for task gradients."""
    made = Tasks()
    expected = expected_of(made)
    cut_off = 0
    for number in itertools.count(0, 3):
        for t in (0, 1, 0):
            with made.surgery.task(t):
                losses_of(made.model)[t].backward()
        if not interrupts.run(made.surgery.merge, number):
            break
        try:
            made.surgery.merge()
        except RuntimeError as error:
            cut_off += "cut off" in str(error)
            made.surgery.discard()
        else:
            torch.testing.assert_close([p.grad for p in made.model.parameters()], expected, rtol=0, atol=0)
    assert cut_off > 0


@pytest.mark.parametrize("accumulate", ["sum", "mean"])
def test_a_method_that_fails_leaves_rows_that_can_be_merged(accumulate):
    class Fails(methods.PCGrad):
        broken = False

        def draw(self):
            if self.broken:
                raise ZeroDivisionError

        def projections(self, tasks, device):
            self.draw()
            return super().projections(tasks, device)

    method = Fails(FIXED)
    made = Tasks(method=method, accumulate=accumulate)
    expected = expected_of(made)
    for t in (0, 1, 0):
        with made.surgery.task(t):
            losses_of(made.model)[t].backward()
    method.broken = True
    with pytest.raises(ZeroDivisionError):
        made.surgery.merge()
    method.broken = False
    made.surgery.merge()
    torch.testing.assert_close([p.grad for p in made.model.parameters()], expected, rtol=0, atol=0)


def test_a_method_that_fails_when_it_has_written_leaves_rows_that_cannot_be_merged(backend):
    class Fails(methods.TrimmedMean):
        def merge_rows(self, rows, out):
            super().merge_rows(rows, out)
            raise ZeroDivisionError

    made = Tasks()
    expected = expected_of(made)
    for t in (0, 1, 0):
        with made.surgery.task(t):
            losses_of(made.model)[t].backward()
    made.surgery.method = Fails(trim_number=0)
    with pytest.raises(ZeroDivisionError):
        made.surgery.merge()
    made.surgery.method = methods.PCGrad(FIXED)
    for further in (made.surgery.merge, made.surgery.task(0).__enter__):
        with pytest.raises(RuntimeError, match="cut off"):
            further()
    made.surgery.discard()
    assert_round_is_right(made, expected)


@pytest.mark.parametrize("kind", ["tensor", "accumulated"])
def test_the_round_after_an_exception_in_a_hook_is_right(made, kind):
    if isinstance(made, TwoPhase) and kind == "accumulated":
        pytest.skip("two phases refuse such hooks")
    expected = expected_of(made)
    draw, left = random.Random(5), [-1]

    def hook(*_):
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError

    parameters = list(made.model.parameters())
    register = torch.Tensor.register_hook if kind == "tensor" else torch.Tensor.register_post_accumulate_grad_hook
    failures = 0
    for _ in range(FAILURES):
        handles = [register(p, hook) for p in parameters]
        left[0] = draw.randint(1, len(parameters))
        try:
            made.round()
        except ZeroDivisionError:
            failures += 1
        for handle in handles:
            handle.remove()
        made.put_right()
        assert_round_is_right(made, expected)
    assert failures == FAILURES or isinstance(made, LikeAutograd)


BALANCERS = {
    "GradNorm": lambda: balancing.GradNorm(2, alpha=0.5),
    "FAMO": lambda: balancing.FAMO(2),
    "DWA": lambda: balancing.DWA(2),
    "STCH": lambda: balancing.STCH(2, mu=0.5),
    "UncertaintyWeighting": lambda: balancing.UncertaintyWeighting(2),
    "COSMOS": lambda: balancing.COSMOS(2),
    "GeometricMean": lambda: balancing.GeometricMean(2),
    "IMTLL": lambda: balancing.IMTLL(2),
    "PBI": lambda: balancing.PBI(2, theta=0.1),
}


@pytest.mark.parametrize("name", BALANCERS)
def test_a_balancer_goes_on_after_an_interrupt(name):
    """Its weights stay finite and positive; the update that was cut off may count or not."""
    balancer = BALANCERS[name]()
    values = [torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)]

    def update():
        losses = [v.square() for v in values]
        if name == "GradNorm":
            for t in range(2):
                balancer.note(t, losses[t], torch.tensor(1.0 + t))
        balancer(losses)
        if name == "FAMO":
            balancer.update([0.9 * loss.detach() for loss in losses])
        elif name == "GradNorm":
            balancer.update()
        elif name == "DWA":
            balancer.end_epoch()

    for number in interrupts.places(update, ROUNDS):
        interrupts.run(update, number)
        update()
        weights = balancer.weights
        assert weights.isfinite().all() and (weights > 0).all(), number
