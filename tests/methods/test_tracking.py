"""Methods that keep something as large as J: their oracles step by step, in every door, and what is refused."""

import copy
import re

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference
from fastpcgrad.distributed.exchange import Exchange
from fastpcgrad.merging import by_tracking
from tests.linear_problems import Kind, linear_loss
from tests.methods.properties import given, integer_rows, prop

SHAPES = ((4, 3), (), (0,), (9,))
WIDTH = 22


class Oracle:
    """Rows and losses of the tasks that are there into the merged gradient; what is kept of absent ones stays."""

    def __init__(self, tasks, **options):
        self.kept = torch.zeros(tasks, WIDTH, dtype=torch.float64)
        self.shares = torch.full((tasks,), 1 / tasks, dtype=torch.float64)
        self.steps, self.options = 0, options

    def merged(self, tasks):
        """Of which tasks a step merges rows."""
        return tuple(tasks)


class MoCo(Oracle):
    def __init__(self, tasks, normalize=True, **options):
        super().__init__(tasks, **options)
        self.normalize = normalize

    def merge(self, tasks, rows, losses):
        self.steps += 1
        mass = self.shares[tasks].sum()
        merged, kept, shares = reference.moco(
            rows,
            losses if self.normalize else None,
            self.kept[tasks],
            self.shares[tasks] / mass,
            self.steps,
            **self.options,
        )
        self.kept[tasks], self.shares[tasks] = kept, mass * shares
        return merged


class ExcessMTL(Oracle):
    def __init__(self, tasks, n_warmup_steps=0, **options):
        super().__init__(tasks, **options)
        self.warmup, self.seen = n_warmup_steps, {}

    def merge(self, tasks, rows, losses):
        self.steps += 1
        mass = self.shares[tasks].sum()
        known = [sum(self.seen[t]) / len(self.seen[t]) if t in self.seen else None for t in tasks]
        merged, self.kept[tasks], shares, risks = reference.excess_mtl(
            rows, self.kept[tasks], self.shares[tasks] / mass, known, **self.options
        )
        for t, risk, baseline in zip(tasks, risks, known, strict=True):
            if self.steps <= self.warmup or baseline is None:
                self.seen.setdefault(t, []).append(risk)
        if self.steps <= self.warmup:
            return self.shares[tasks] / mass @ rows
        self.shares[tasks] = mass * shares
        return merged


class DBMTL(Oracle):
    def merge(self, tasks, rows, losses):
        self.steps += 1
        merged, self.kept[tasks] = reference.db_mtl(rows, self.kept[tasks], self.steps, **self.options)
        return merged


class Bloop(Oracle):
    def __init__(self, tasks, **options):
        super().__init__(tasks, **options)
        self.average = None

    def merge(self, tasks, rows, losses):
        merged, self.average = reference.bloop(rows, self.average, **self.options)
        return merged


class MConFIG(Oracle):
    def __init__(self, tasks, **options):
        super().__init__(tasks, **options)
        self.held = reference.Momenta(self.kept, [0] * tasks, self.kept[0], self.kept[0], 0)

    def merge(self, tasks, rows, losses):
        merged, self.held = reference.momentum_config(dict(zip(tasks, rows, strict=True)), self.held, **self.options)
        return merged

    def merged(self, tasks):
        return tuple(t for t, times in enumerate(self.held.times) if times)


CASES = {
    "Bloop": (methods.Bloop, Bloop, {}),
    "Bloop, of the batch": (methods.Bloop, Bloop, {"lambda_": 2.0, "ema": 1.0, "eps": 0.0}),
    "DBMTL": (methods.DBMTL, DBMTL, {}),
    "DBMTL, decaying": (methods.DBMTL, DBMTL, {"beta": 0.5, "beta_sigma": 0.5}),
    "ExcessMTL": (methods.ExcessMTL, ExcessMTL, {"robust_step_size": 0.01}),
    "ExcessMTL, warm": (methods.ExcessMTL, ExcessMTL, {"n_warmup_steps": 3}),
    "MConFIG": (methods.MConFIG, MConFIG, {}),
    "MConFIG, short": (methods.MConFIG, MConFIG, {"beta_1": 0.5, "beta_2": 0.9}),
    "MoCo": (methods.MoCo, MoCo, {}),
    "MoCo, plain": (methods.MoCo, MoCo, {"normalize": False, "gamma": 2.0, "rho": 0.1, "beta": 0.9}),
}
for_each = pytest.mark.parametrize("name", CASES)
KINDS = [methods.Bloop, methods.DBMTL, methods.ExcessMTL, methods.MConFIG, methods.MoCo]
for_each_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind, tasks, **options):
    return kind(tasks, **options) if kind is methods.MConFIG else kind(**options)


def packed(gradients):
    """As one vector, with zeros for None."""
    parts = zip(gradients, SHAPES, strict=True)
    return torch.cat([(torch.zeros(s) if g is None else g).double().flatten() for g, s in parts])


class Problem:
    """Losses that are linear in parameters of several shapes, each step with gradients of its own."""

    def __init__(self, tasks, seed, dtype=torch.float64):
        self.generator = torch.Generator().manual_seed(seed)
        self.parameters = [Kind(shape).parameter(dtype) for shape in SHAPES]
        self.tasks, self.dtype = tasks, dtype

    def draw(self, present=None, touched=None):
        """Gradients by task, the packed rows of the tasks that are there, their losses and their indices."""
        tasks = list(range(self.tasks)) if present is None else present
        gradients = {
            t: [torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype) for shape in SHAPES]
            for t in tasks
        }
        if touched is not None:
            for t, own in gradients.items():
                gradients[t] = [g if here else None for g, here in zip(own, touched[t], strict=True)]
        rows = [packed(own) for own in gradients.values()]
        offsets = (1 + 3 * torch.rand(len(tasks), generator=self.generator)).tolist()
        each = zip(gradients.items(), offsets, strict=True)
        losses = {t: linear_loss(self.parameters, own) + offset for (t, own), offset in each}
        return losses, torch.stack(rows), [float(loss.detach()) for loss in losses.values()], tasks

    def grad(self):
        return packed([p.grad for p in self.parameters])

    def listed(self, losses):
        return [losses.get(t) for t in range(self.tasks)]


@for_each
def test_every_step_is_the_oracles(name):
    """Of 16 surgeries of 7 steps; tasks are absent, and do not touch some parameters, in every other surgery."""
    kind, oracle_of, options = CASES[name]
    for seed in range(16):
        problem = Problem(1 + seed % 5, seed)
        surgery = fastpcgrad.GradientSurgery(problem.parameters, problem.tasks, made(kind, problem.tasks, **options))
        oracle = oracle_of(problem.tasks, **options)
        for step in range(7):
            absent = seed % 2 and problem.tasks > 1 and step in (1, 2, 5)
            missing = step % problem.tasks
            if kind is methods.Bloop:  # which has task 0 as its main one
                missing = max(missing, 1)
            present = [t for t in range(problem.tasks) if t != missing] if absent else None
            touched = [[(t + step + k) % 3 > 0 for k in range(4)] for t in range(problem.tasks)] if seed % 2 else None
            losses, rows, values, tasks = problem.draw(present, touched)
            report = surgery.backward(problem.listed(losses))
            expected = oracle.merge(tasks, rows, values)
            assert report.tasks == oracle.merged(tasks)
            # MConFIG divides what cancels, up to rounding, by as little as 1e-8.
            atol = 1e-6 if kind is methods.MConFIG else 1e-9
            torch.testing.assert_close(problem.grad(), expected, rtol=1e-9, atol=atol)


def steps(make, run, problem, count=3):
    """The merged gradient of some steps."""
    method, found = make(), []
    for _ in range(count):
        losses, *_ = problem.draw()
        run(method, problem, losses)
        found.append(problem.grad().clone())
        for p in problem.parameters:
            p.grad = None
    return torch.stack(found)


def by_backward(method, problem, losses):
    fastpcgrad.backward(problem.listed(losses), problem.parameters, method=method)


def by_grad(method, problem, losses):
    merged = fastpcgrad.grad(problem.listed(losses), problem.parameters, method=method)
    for p, grad in zip(problem.parameters, merged, strict=True):
        p.grad = grad


def by_functions(method, problem, losses):
    surgery = fastpcgrad.GradientSurgery(problem.parameters, problem.tasks, method)
    surgery.backward([lambda loss=loss: loss for loss in losses.values()])


def by_drop_in(method, problem, losses):
    fastpcgrad.PCGrad(torch.optim.SGD(problem.parameters), method=method).pc_backward(problem.listed(losses))


def by_micro_batches(method, problem, losses):
    surgery = fastpcgrad.GradientSurgery(problem.parameters, problem.tasks, method, accumulate="mean")
    for part in (0.5, 1.5):
        surgery._add({t: part * loss for t, loss in losses.items()}, retain_graph=True)
    surgery.merge()


@for_each
@pytest.mark.parametrize("run", [by_grad, by_functions, by_drop_in, by_micro_batches])
def test_every_door_gives_the_same(name, run):
    kind, _, options = CASES[name]
    expected = steps(lambda: made(kind, 3, **options), by_backward, Problem(3, 5))
    torch.testing.assert_close(
        steps(lambda: made(kind, 3, **options), run, Problem(3, 5)), expected, rtol=1e-12, atol=1e-12
    )


@for_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_other_dtypes(name, dtype):
    """What is kept of 16-bit rows is fp32: only the rows themselves are rounded."""
    kind, _, options = CASES[name]
    method, exact = made(kind, 3, **options), made(kind, 3, **options)
    problem, other = Problem(3, 6, torch.float32), Problem(3, 6, torch.float32)
    surgery = fastpcgrad.GradientSurgery(problem.parameters, 3, method, row_dtype=dtype)
    plain = fastpcgrad.GradientSurgery(other.parameters, 3, exact)
    for _ in range(4):
        surgery.backward(problem.listed(problem.draw()[0]))
        plain.backward(other.listed(other.draw()[0]))
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        assert float((problem.grad() - other.grad()).norm() / other.grad().norm()) <= tolerance
    kept = [own for row in method.state_dict()["rows"].values() for own in row]
    assert {own.dtype for own in kept} == {torch.float32}


@for_each
def test_parameters_in_16_bits(name):
    kind, _, options = CASES[name]
    problem, other = Problem(2, 7, torch.bfloat16), Problem(2, 7, torch.float64)
    for own, wide in zip(problem.parameters, other.parameters, strict=True):
        own.data.copy_(wide.data)
    method, exact = made(kind, 2, **options), made(kind, 2, **options)
    for _ in range(3):
        by_backward(method, problem, problem.draw()[0])
        by_backward(exact, other, other.draw()[0])
        assert float((problem.grad() - other.grad()).norm() / other.grad().norm()) <= 3e-2
        assert all(p.grad.dtype == torch.bfloat16 for p in problem.parameters)
        for p in (*problem.parameters, *other.parameters):
            p.grad = None


@for_each
def test_what_is_not_shared_is_summed(name):
    kind, _, options = CASES[name]
    problem, alone = Problem(3, 8), Problem(3, 8)
    surgery = fastpcgrad.GradientSurgery(problem.parameters, 3, made(kind, 3, **options), shared=problem.parameters[3:])
    method = made(kind, 3, **options)
    for _ in range(3):
        losses, rows, *_ = problem.draw()
        surgery.backward(problem.listed(losses))
        torch.testing.assert_close(problem.grad()[:13], rows[:, :13].sum(dim=0))
        trunk = list(alone.draw()[0].values())
        (expected,) = fastpcgrad.grad(trunk, [alone.parameters[3]], method=method)
        torch.testing.assert_close(problem.parameters[3].grad, expected)


@for_each
def test_what_is_not_finite_changes_no_state(name):
    kind, _, options = CASES[name]
    problem, other = Problem(2, 9), Problem(2, 9)
    method, clean = made(kind, 2, **options), made(kind, 2, **options)
    for step in range(3):
        losses, *_ = problem.draw()
        if step:
            bad = {0: losses[0] * (torch.nan if step == 1 else torch.inf), 1: losses[1]}
            before = method.state_dict()
            by_backward(method, problem, bad)
            assert problem.grad()[:12].isnan().any()
            torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
            losses, *_ = problem.draw()
            other.draw()
        for p in (*problem.parameters, *other.parameters):
            p.grad = None
        by_backward(method, problem, losses)
        by_backward(clean, other, other.draw()[0])
        assert torch.equal(problem.grad(), other.grad())


@for_each
def test_state_is_copied_and_goes_on_to_the_bit(name):
    kind, _, options = CASES[name]
    problem, other = Problem(3, 10), Problem(3, 10)
    method, resumed = made(kind, 3, **options), made(kind, 3, **options)
    by_backward(method, problem, problem.draw()[0])
    other.draw()
    state = method.state_dict()
    saved = copy.deepcopy(state)
    resumed.load_state_dict(state)
    for _ in range(2):
        for p in (*problem.parameters, *other.parameters):
            p.grad = None
        by_backward(method, problem, problem.draw()[0])
        by_backward(resumed, other, other.draw()[0])
        assert torch.equal(problem.grad(), other.grad())
    torch.testing.assert_close(state, saved, rtol=0, atol=0)
    for bad in ({}, {**state, "step": -1}, {**state, "widths": [1]}, {**state, "rows": {0: [torch.zeros(3)] * 4}}):
        with pytest.raises(ValueError, match=r"has keys|step must be|must hold a tensor or None for each parameter"):
            resumed.load_state_dict(bad)


@for_each_kind
def test_other_parameters_are_refused(kind):
    method, problem = made(kind, 2), Problem(2, 11)
    by_backward(method, problem, problem.draw()[0])
    losses = list(problem.draw()[0].values())
    with pytest.raises(
        ValueError, match=r"keeps something of each of 4 parameters with 22 elements; found 1 with 9.*reset\(\)"
    ):
        fastpcgrad.grad(losses, [problem.parameters[3]], method=method, retain_graph=True)
    with pytest.raises(ValueError, match="in another order"):
        fastpcgrad.grad(losses, problem.parameters[::-1], method=method, retain_graph=True)
    method.reset()
    fastpcgrad.grad(losses, [problem.parameters[3]], method=method)


SHIFTS = {
    "inputs in another order": lambda a, b, c: ([a, b], [b, a]),
    "another block of the same shape": lambda a, b, c: ([a, b], [b, c]),
    "another one among them": lambda a, b, c: ([a, b], [a, c]),
}


@for_each_kind
@pytest.mark.parametrize("shift", SHIFTS)
def test_parameters_of_the_same_shapes_are_not_mistaken_for_each_other(kind, shift):
    layers = [torch.nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(seed))) for seed in range(3)]
    before, after = SHIFTS[shift](*layers)
    method = made(kind, 2)

    def losses():
        product = layers[0] * layers[1] * layers[2]
        return [(product - t).square().sum() for t in range(2)]

    fastpcgrad.backward(losses(), before, method=method)
    state = method.state_dict()
    with pytest.raises(ValueError, match=r"keeps something of each of 2 parameters.*others, or in another order"):
        fastpcgrad.backward(losses(), after, method=method)
    torch.testing.assert_close(method.state_dict(), state, rtol=0, atol=0)
    fastpcgrad.backward(losses(), before, method=method)
    method.load_state_dict(state)  # of a checkpoint, which is of the parameters that come next
    fastpcgrad.backward(losses(), after, method=method)


@for_each_kind
def test_blocks_that_are_trained_in_turns_are_not_mistaken_for_each_other(kind):
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    surgery = fastpcgrad.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), 2, made(kind, 2))

    def step(block):
        for number, layer in enumerate(model):
            layer.requires_grad_(number == block)
        outputs = model(torch.ones(1, 2))
        surgery.backward([(outputs - t).square().sum() for t in range(2)])

    step(0), step(0)
    with pytest.raises(ValueError, match="or in another order"):
        step(1)
    surgery.method.reset()
    step(1)


@for_each_kind
def test_a_copy_goes_on_with_parameters_of_its_own(kind):
    model = torch.nn.Linear(3, 2)
    surgery = fastpcgrad.GradientSurgery(model.parameters(), 2, made(kind, 2))
    both = [(model, surgery)]
    for round_ in range(3):
        for own, rounds in both:
            outputs = own(torch.arange(3.0) + round_)
            rounds.backward([(outputs[t] - t).square() for t in range(2)])
        for own, _ in both[1:]:
            assert torch.equal(own.weight.grad, model.weight.grad)
        both.append(copy.deepcopy((model, surgery)))


@for_each_kind
def test_a_state_of_other_shapes_is_refused(kind):
    """Of as many elements, which a copy would spread or not take at all."""
    problem, turned = (
        fastpcgrad.GradientSurgery(torch.nn.Linear(*size, bias=False).parameters(), 2, made(kind, 2))
        for size in ((2, 3), (3, 2))
    )
    for surgery, width in ((problem, 2), (turned, 3)):
        parameter = surgery._layouts.trainable()[0]
        losses = [(parameter @ torch.ones(width) - t).square().sum() for t in range(2)]
        if surgery is turned:
            surgery.load_state_dict(problem.state_dict())
            with pytest.raises(ValueError, match="keeps something of each of 1 parameters with 6 elements"):
                surgery.backward(losses)
        else:
            surgery.backward(losses)


WRONG = {
    "step": [True, 1.0, -1],
    "widths": [6, "6", torch.ones(1), [3.0]],
    "rows": [None, [1], {0: None}, {0: [1.0]}, {"0": []}, {-1: []}, torch.ones(1)],
    "weights": [[1.0], torch.ones(2), -torch.ones(2).double(), torch.ones(1, 2).double()],
    "baselines": [None, {0: 1.0}, {0: (1.0,)}, {0: (1.0, 0)}, {0: ("1", 1)}],
    "times": [None, [1], {0: 0}, {0: 1.5}],
    "pseudo": [None, [1.0], [torch.ones(2)], {0: 1}],
    "squares": [None, torch.ones(1), [torch.ones(5)] * 2],
}


@for_each_kind
def test_states_that_cannot_be_are_refused_before_anything_changes(kind):
    method, other = made(kind, 2), made(kind, 2)
    p = torch.nn.Parameter(torch.ones(6))
    for own, scale in ((method, 1.0), (other, 2.0)):
        fastpcgrad.grad([(scale * p - t).square().sum() for t in range(2)], [p], method=own)
    before, state = method.state_dict(), other.state_dict()
    for name in state:
        for value in WRONG[name]:
            with pytest.raises(ValueError, match=name):
                method.load_state_dict({**state, name: value})
            torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


@for_each_kind
def test_a_first_step_without_a_trunk_is_no_ground_for_a_refusal(kind):
    """Of two tasks one has zeros at first, so that 'auto' finds what both reach in the second step."""
    trunk = torch.nn.Parameter(torch.ones(3))
    surgery = fastpcgrad.GradientSurgery([trunk], 2, made(kind, 2), shared="auto")
    surgery.backward([trunk.sum(), (0 * trunk).sum()])
    assert trunk.grad.tolist() == [1.0] * 3
    right = fastpcgrad.GradientSurgery([trunk], 2, made(kind, 2))
    with pytest.warns(fastpcgrad.FastPCGradWarning, match="one task alone has reached so far"):
        surgery.backward([trunk.sum(), trunk.square().sum()])
    assert trunk.grad.isfinite().all()
    right.backward([trunk.sum(), trunk.square().sum()])
    found, expected = surgery.method.state_dict()["rows"], right.method.state_dict()["rows"]
    assert sorted(found) == sorted(expected) == ([0] if kind is methods.Bloop else [0, 1])
    for task in found:
        direction = found[task][0] / expected[task][0]
        assert float(direction.std()) == pytest.approx(0, abs=1e-6)


@for_each_kind
def test_a_task_that_reaches_nothing_of_the_trunk_has_a_row_of_zeros(kind):
    """Its head alone, as where the trunk is detached for it, in one step or in all."""
    found = []
    for zero in (True, False):
        trunk, head = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
        surgery = fastpcgrad.GradientSurgery([trunk, head], 3, made(kind, 3), shared=[trunk])
        for step in range(3):
            last = head.square().sum() + (trunk.prod() if step == 1 else 0 * trunk.sum() if zero else 0)
            surgery.backward([(trunk * (step + 1)).sum(), (trunk - 2).square().sum() * 3, last])
            assert head.grad.tolist() == [2.0] * 2
            found.append(trunk.grad)
    for with_zeros, without in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(with_zeros, without, rtol=0, atol=0)
        assert with_zeros.isfinite().all()


@for_each_kind
def test_a_step_that_keeps_nothing_is_of_no_parameters(kind):
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    method = made(kind, 2)
    fastpcgrad.backward([(first * torch.inf).sum(), first.sum()], [first], method=method)
    assert first.grad.isnan().all()
    fastpcgrad.backward([second.square().sum(), second.sum()], [second], method=method)
    assert second.grad.isfinite().all()


@for_each_kind
def test_rows_in_several_processes_are_refused(kind):
    with pytest.raises(NotImplementedError, match=rf"{kind.__name__} keeps .*process_group='local'"):
        by_tracking.check_one_process(made(kind, 2), Exchange([]))


@for_each_kind
def test_channels_last_keeps_its_order(kind):
    def merged(layout):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3).double().to(memory_format=layout)
        method, surgery = made(kind, 2), None
        surgery = fastpcgrad.GradientSurgery(conv.parameters(), 2, method)
        for step in range(3):
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step)).double()
            out = conv(x.to(memory_format=layout)).square()
            surgery.backward([out[:, :2].mean(), out[:, 2:].mean()])
            if step == 1:
                state = {**method.state_dict()}
                state["rows"] = {t: [own.contiguous() for own in row] for t, row in state["rows"].items()}
                method.load_state_dict(state)
        return conv.weight.grad

    plain, last = merged(torch.contiguous_format), merged(torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=1e-12, atol=1e-14)


@for_each_kind
def test_where_there_are_no_such_rows_it_is_refused(kind):
    method, problem = made(kind, 2), Problem(2, 12)
    losses = problem.listed(problem.draw()[0])
    p = problem.parameters
    name = kind.__name__
    with pytest.raises(TypeError, match=f"in two phases; found {name}"):
        fastpcgrad.GradientSurgery(p, 2, method).backward(losses, two_phase=True)
    with pytest.raises(ValueError, match=f"{name} keeps something of each task gradient: leave rows"):
        fastpcgrad.GradientSurgery(p, 2, method, rows="factored").backward(losses, retain_graph=True)
    with pytest.raises(ValueError, match=f"{name} takes all parameters as one problem"):
        fastpcgrad.GradientSurgery(p, 2, method, granularity="parameter").backward(losses, retain_graph=True)
    with pytest.raises(ValueError, match="gram_over needs a method"):
        fastpcgrad.GradientSurgery(p, 2, method, gram_over=p[:1])
    with pytest.raises(ValueError, match=f"inputs must be given with {name}"):
        fastpcgrad.backward(losses, method=method)
    with pytest.raises(ValueError, match="no batch_dim"):
        fastpcgrad.grad(torch.stack(losses), p, method=method, batch_dim=0)
    with pytest.raises(TypeError, match=f"{name} keeps something of each column, and the features of another batch"):
        fastpcgrad.shared_features(torch.ones(3, requires_grad=True), 2, method)
    with pytest.raises(TypeError, match=f"{name} keeps something of each column, and apply"):
        fastpcgrad.apply([{"a": torch.ones(3)}] * 2, method=method)
    with pytest.raises(TypeError, match=f"{name} needs the task gradients themselves"):
        method.weights(torch.eye(2, dtype=torch.float64))
    table = torch.nn.Embedding(5, 3, sparse=True)
    out = table(torch.tensor([1, 2])).sum(dim=1)
    with pytest.raises(ValueError, match=re.escape("sparse gradients leave out: sparse=False")):
        fastpcgrad.GradientSurgery(table.parameters(), 2, method).backward([out[0], out[1]])
    assert method.state_dict()["rows"] == {}


@pytest.mark.parametrize("warmup", [0, 2])
def test_excess_mtl_equals_torchjd(warmup):
    """Of 100 problems of 3 steps, half of them with a warmup."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    for seed in range(50):
        step_size = (0.01, 1.0)[seed % 2]
        theirs = aggregation.ExcessMTL(step_size, warmup)
        method, x = methods.ExcessMTL(step_size, warmup), torch.zeros(11, dtype=torch.float64, requires_grad=True)
        generator = torch.Generator().manual_seed(seed)
        scales = 10 ** (3 * torch.rand(3, 1, generator=generator, dtype=torch.float64) - 2)
        for _ in range(3):
            rows = torch.randn(3, 11, generator=generator, dtype=torch.float64) * scales
            (found,) = fastpcgrad.grad(list(rows @ x), x, method=method)
            torch.testing.assert_close(found, theirs(rows), rtol=1e-9, atol=1e-12)


def test_momenta_of_tasks_that_take_turns():
    """One backward pass a step, as published: the merged gradient is zero until each has been there; nothing warns."""
    problem, oracle = Problem(2, 14), MConFIG(2)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(problem.parameters, lr=0.1), method=methods.MConFIG(2))
    for step in range(9):
        losses, rows, values, tasks = problem.draw([step % 2])
        optimizer.zero_grad()
        optimizer.pc_backward(problem.listed(losses))
        torch.testing.assert_close(problem.grad(), oracle.merge(tasks, rows, values), rtol=1e-9, atol=1e-9)
        assert bool(problem.grad().any()) == (step > 0)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="num_tasks is 2; found the gradient of task 2"):
        optimizer.pc_backward([None, None, (problem.parameters[0] ** 2).sum()])


def test_squares_beyond_the_range_of_what_is_kept_are_not_finite():
    x, method = torch.zeros(3, requires_grad=True), methods.ExcessMTL()
    (found,) = fastpcgrad.grad([1e17 * x.sum(), x.sum()], x, method=method)
    assert found.isnan().all() and method.state_dict()["rows"] == {}


def test_losses_that_are_not_known_are_an_error():
    problem = Problem(2, 13)
    surgery = fastpcgrad.GradientSurgery(problem.parameters, 2, methods.MoCo())
    losses, *_ = problem.draw()
    surgery._add({0: losses[0]}, retain_graph=True)
    for t in range(2):
        with surgery.task(t):
            losses[t].backward(retain_graph=True)
    with pytest.raises(ValueError, match=r"those of tasks \[0, 1\] are not known: give losses or functions"):
        surgery.merge()
    surgery.discard()
    assert surgery.method.state_dict()["rows"] == {}
    surgery.backward(list(losses.values()))


def test_in_large_models_rows_stay_dense():
    model = torch.nn.Linear(1000, 1000, bias=False)
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), method=methods.MoCo())
    out = model(torch.ones(1, 1000)).square()
    optimizer.pc_backward([out[:, :500].mean(), out[:, 500:].mean()])
    assert optimizer.report.rows.factored == 0
    assert "the method works on each column of the task gradients" in optimizer.report.rows.dense


def test_bad_arguments_are_refused():
    for arguments in ({"beta": 0.0}, {"beta": 1.5}, {"gamma": -1.0}, {"beta_sigma": -1.0}, {"rho": float("inf")}):
        (name,) = arguments
        with pytest.raises(ValueError, match=f"{name} must be .*found"):
            methods.MoCo(**arguments)
    for arguments in ({"beta": 1.0}, {"beta_sigma": -1.0}):
        (name,) = arguments
        with pytest.raises(ValueError, match=f"{name} must be .*found"):
            methods.DBMTL(**arguments)
    for arguments in ({"lambda_": -1.0}, {"lambda_": float("nan")}, {"ema": 0.0}, {"ema": 1.5}, {"eps": -1.0}):
        (name,) = arguments
        with pytest.raises(ValueError, match=f"{name} must be .*found"):
            methods.Bloop(**arguments)
    for arguments in ({"num_tasks": 0}, {"beta_1": 1.0}, {"beta_2": -0.1}, {"pref_vector": [1.0]}):
        with pytest.raises(ValueError, match=r"(must be|has 1 numbers).*found"):
            methods.MConFIG(**{"num_tasks": 2, **arguments})
    for arguments in ({"robust_step_size": 0.0}, {"n_warmup_steps": -1}):
        (name,) = arguments
        with pytest.raises(ValueError, match=f"{name} must be .*found"):
            methods.ExcessMTL(**arguments)


def test_the_main_task_of_bloop_must_be_there():
    problem, method = Problem(2, 15), methods.Bloop()
    for run in (by_backward, by_drop_in):
        losses, *_ = problem.draw([1])
        with pytest.raises(ValueError, match=r"Bloop has task 0 as its main task, which is absent; found tasks \[1\]"):
            run(method, problem, losses)
    assert method.state_dict()["rows"] == {}


def test_the_report_of_bloop_is_of_the_tasks_alone():
    problem = Problem(3, 16)
    losses, rows, *_ = problem.draw()
    report = fastpcgrad.GradientSurgery(problem.parameters, 3, methods.Bloop(0.5)).backward(list(losses.values()))
    torch.testing.assert_close(report.gram, rows @ rows.T)
    assert report.weights.tolist() == [1.0, 0.5, 0.5]


def test_an_average_of_zeros_removes_nothing():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for eps in (0.0, 1e-7):
        (found,) = fastpcgrad.grad([0 * x.sum(), x.sum()], x, method=methods.Bloop(0.5, eps=eps))
        assert found.tolist() == [0.5] * 3


@prop
@given(rows=integer_rows())
def test_what_bloop_adds_is_orthogonal_to_the_main_gradient(rows):
    x = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    (found,) = fastpcgrad.grad(list(rows @ x), x, method=methods.Bloop(1.0, eps=0.0))
    added = found - rows[0]
    assert abs(float(added @ rows[0])) <= 1e-12 * float(rows[0].norm() * rows.norm(dim=1).sum())


@prop
@given(rows=integer_rows())
def test_of_the_first_step_lengths_are_equal_and_shares_of_the_simplex(rows):
    x = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    lengths = rows.norm(dim=1)
    (found,) = fastpcgrad.grad(list(rows @ x), x, method=methods.DBMTL())
    units = rows[lengths > 0] / lengths[lengths > 0][:, None]
    torch.testing.assert_close(found, 0.1 * lengths.max() * units.sum(dim=0), rtol=1e-6, atol=1e-6)
    surgery = fastpcgrad.GradientSurgery([x], len(rows), methods.MoCo(normalize=False))
    weights = surgery.backward(list(rows @ x)).weights
    assert weights.min() >= 0 and float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(x.grad, 0.5 * weights @ rows, rtol=1e-9, atol=1e-9)
