"""gram_over: the parameters that G is made of, apart from those that the weights reach."""

import random

import numpy as np
import pytest
import torch

import fastpcgrad
from fastpcgrad import methods, reference
from tests.surgery.setting import Setting, Weighted, assert_unchanged, snapshot

METHODS = {
    "nash_mtl": lambda: methods.NashMTL(),
    "cagrad": lambda: methods.CAGrad(c=0.5),
    "pcgrad": lambda: methods.PCGrad("pytorch-pcgrad", generator=random.Random(3)),
    "libmtl": lambda: methods.PCGrad("libmtl", generator=random.Random(3)),
}


class Trunk:
    """A trunk of four layers, a head for each of three tasks, and the gradients as a loop finds them."""

    def __init__(self):
        torch.manual_seed(5)
        layers = [torch.nn.Linear(size, 6, dtype=torch.float64) for size in (5, 6, 6, 6)]
        self.trunk = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.Tanh())))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(6, 1, dtype=torch.float64) for _ in range(3))
        self.x = torch.randn(16, 5, dtype=torch.float64)
        self.shared, self.all = list(self.trunk.parameters()), [*self.trunk.parameters(), *self.heads.parameters()]

    def losses(self):
        z = self.trunk(self.x)
        scales = (1.0, 20.0, 0.1)
        return [
            s * (head(z) + z[:, t : t + 1] - t).square().mean()
            for t, (head, s) in enumerate(zip(self.heads, scales, strict=True))
        ]

    def expected(self, method):
        """G over the trunk, then each parameter's own gradients with the weights that belong to it."""
        rows = [torch.autograd.grad(loss, self.all, allow_unused=True, retain_graph=True) for loss in self.losses()]
        J = torch.stack([torch.cat([g.flatten() for g in row[: len(self.shared)]]) for row in rows])
        weights = method.weights(reference.gram(J))
        merged = []
        for column in zip(*rows, strict=True):
            whole = all(g is not None for g in column)
            own = weights if whole else method.partial_weights(weights)
            if method.scope == "shared" and not whole:
                own = torch.ones(3)
            merged.append(sum(w * g for w, g in zip(own, column, strict=True) if g is not None))
        return merged

    def assert_grad(self, found, method):
        torch.testing.assert_close(list(found), self.expected(method), rtol=1e-9, atol=1e-12)


def by_optimizer(setting, method):
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(setting.all, lr=0.1), method=method, gram_over=setting.shared)
    optimizer.pc_backward(setting.losses())
    return [p.grad for p in setting.all]


def by_surgery(setting, method, **options):
    run = {"two_phase": options.pop("two_phase", False)}
    surgery = fastpcgrad.GradientSurgery(setting.all, 3, method, gram_over=setting.trunk.parameters(), **options)
    surgery.backward(setting.losses(), **run)
    return [p.grad for p in setting.all]


def by_apply(setting, method):
    tasks = []
    for loss in setting.losses():
        grads = torch.autograd.grad(loss, setting.all, allow_unused=True, retain_graph=True)
        tasks.append({n: g.numpy() for n, g in enumerate(grads) if g is not None})
    merged = fastpcgrad.apply(tasks, method=method, gram_over=range(len(setting.shared)))
    return [torch.from_numpy(merged[n]) for n in range(len(setting.all))]


def by_backward(setting, method):
    fastpcgrad.backward(setting.losses(), method=method, gram_over=setting.shared)
    return [p.grad for p in setting.all]


DOORS = {
    "optimizer": by_optimizer,
    "surgery": by_surgery,
    "two phases": lambda *given: by_surgery(*given, two_phase=True),
    "factors": lambda *given: by_surgery(*given, rows="factored"),
    "backward": by_backward,
    "grad": lambda s, method: fastpcgrad.grad(s.losses(), s.all, method=method, gram_over=iter(s.shared)),
    "apply": by_apply,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("door", DOORS)
def test_weights_of_the_trunks_gram_matrix_reach_the_heads(door, method):
    setting = Trunk()
    setting.assert_grad(DOORS[door](setting, METHODS[method]()), METHODS[method]())


def test_the_report_has_the_gram_matrix_that_was_looked_at():
    setting = Setting()
    surgery = fastpcgrad.GradientSurgery(setting.parameters, 3, Weighted(1, 2, 3), gram_over=setting.parameters[:1])
    setting.surgery = surgery
    setting.fill(0, 1, 2)
    report = surgery.merge()
    rows = torch.stack([task[0].flatten() for task in setting.gradients])
    torch.testing.assert_close(report.gram, reference.gram(rows))
    setting.assert_grad(
        [
            sum(w * g for w, g in zip((1, 2, 3), column, strict=True) if g is not None)
            for column in zip(*setting.gradients, strict=True)
        ]
    )


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_all_tasks_touch_are_told_apart_too(method):
    parameters = [torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rows = torch.randn(3, 8, dtype=torch.float64)
    losses = [(torch.cat(parameters) * row).sum() for row in rows]
    surgery = fastpcgrad.GradientSurgery(parameters, 3, METHODS[method](), gram_over=parameters[1:])
    report = surgery.backward(losses)
    torch.testing.assert_close(report.gram, reference.gram(rows[:, 4:]))
    weights = METHODS[method]().weights(reference.gram(rows[:, 4:]))
    torch.testing.assert_close(torch.cat([p.grad for p in parameters]), weights @ rows)


def test_each_problem_has_parameters_of_its_own_to_look_at():
    setting = Setting()
    a, b, c = setting.parameters
    method = methods.CAGrad(c=0.5)
    setting.surgery = fastpcgrad.GradientSurgery([a, b, c], 3, method, granularity=[[a, b], [c]], gram_over=[b, c])
    setting.fill(0, 1, 2)
    report = setting.surgery.merge()
    seen = torch.stack([task[1].flatten() for task in setting.gradients])
    torch.testing.assert_close(report.segment_grams[0], reference.gram(seen))
    weights = method.weights(reference.gram(seen))
    torch.testing.assert_close(a.grad, sum(w * task[0] for w, task in zip(weights, setting.gradients, strict=True)))
    with pytest.raises(ValueError, match="gram_over holds no trainable parameter of problem 1: its Gram matrix would"):
        fastpcgrad.GradientSurgery([a, b, c], 3, method, granularity=[[a, b], [c]], gram_over=[b])


def test_parameters_beside_shared_are_summed_still():
    setting = Setting()
    a, b, c = setting.parameters
    given = {"shared": [a, b], "gram_over": [b]}
    setting.surgery = fastpcgrad.GradientSurgery([a, b, c], 3, Weighted(1, 2, 3), **given)
    setting.fill(0, 1, 2)
    setting.surgery.merge()
    torch.testing.assert_close(c.grad, setting.gradients[2][2])
    torch.testing.assert_close(a.grad, sum((t + 1) * task[0] for t, task in enumerate(setting.gradients)))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (methods.PCGrad("tensorlogic"), "one G for several parameters"),
        (methods.GradDrop(), "needs the rows"),
        (methods.TrimmedMean(1), "needs the rows"),
    ],
    ids=["parameter", "graddrop", "trimmed mean"],
)
def test_methods_without_such_a_gram_matrix_are_refused(method, message):
    setting = Trunk()
    before = snapshot(setting.all)
    losses = setting.losses()
    with pytest.raises(ValueError, match=message):
        fastpcgrad.GradientSurgery(setting.all, 3, method, gram_over=setting.shared)
    with pytest.raises(ValueError, match=message):
        fastpcgrad.backward(losses, method=method, gram_over=setting.shared)
    with pytest.raises(ValueError, match=message):
        fastpcgrad.apply([{"a": np.ones(2)}] * 3, method=method, gram_over=["a"])
    assert_unchanged(setting.all, before)


def test_what_g_cannot_look_at_is_refused():
    setting, other = Trunk(), torch.nn.Linear(2, 2)
    for p in setting.heads.parameters():
        p.requires_grad_(False)
    cases = {
        "gram_over holds a tensor .2, 2. that is none of the parameters": {"gram_over": other.parameters()},
        "gram_over holds a tensor .6, 6. that is not in shared": {
            "gram_over": setting.shared,
            "shared": setting.shared[:2],
        },
        "gram_over holds no trainable parameter: its": {"gram_over": setting.heads.parameters()},
    }
    for message, scopes in cases.items():
        with pytest.raises(ValueError, match=message):
            fastpcgrad.PCGrad(torch.optim.SGD(setting.all, lr=0.1), method=methods.NashMTL(), **scopes)
    with pytest.raises(ValueError, match="none of the parameters"):
        fastpcgrad.grad(setting.losses(), setting.shared, gram_over=next(other.parameters()))
    for names in ([], ["b"]):
        with pytest.raises(ValueError, match=r"gram_over must hold at least one of the names .'a'. and no other"):
            fastpcgrad.apply([{"a": np.ones(2)}] * 2, method=methods.MGDA(), gram_over=names)
    with pytest.raises(TypeError, match="gram_over must be names; found 'a'"):
        fastpcgrad.apply([{"a": np.ones(2)}] * 2, method=methods.MGDA(), gram_over="a")
