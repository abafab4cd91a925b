"""Training steps with factors: whatever happens around a round, the same steps as with dense rows."""

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.rows import stacked
from tests.factors.setting import TASKS, assert_merged, losses_of_heads, rows_of, surgery_of, trunk_and_heads

ROWS = ("dense", "factored")


@pytest.fixture(autouse=True)
def _pays(monkeypatch):
    monkeypatch.setattr(stacked, "stacking_pays", lambda *_: True)


def trained(rows, step, **options):
    """Parameters after some steps, each made by ``step(optimizer, losses)``, and the optimizer."""
    net, x = trunk_and_heads(dtype=torch.float64)
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    optimizer = fastpcgrad.PCGrad(inner, rows=rows, **{"variant": "tensorflow", **options})
    for _ in range(4):
        step(optimizer, lambda: losses_of_heads(net, x))
    return [p.detach() for p in net.parameters()], optimizer


def assert_same_steps(step, **options):
    """Gives the report of the last factored surgery."""
    (dense, _), (factored, optimizer) = (trained(rows, step, **options) for rows in ROWS)
    torch.testing.assert_close(factored, dense, rtol=1e-10, atol=1e-12)
    assert optimizer.report.rows.factored == 2 + TASKS
    return optimizer.report


def test_gradients_that_add_up_over_calls():
    def step(optimizer, losses):
        optimizer.zero_grad()
        for _ in range(2):
            optimizer.pc_backward(losses())
        optimizer.step()

    assert assert_same_steps(step, on_repeat="add").rows.stacked


def test_gradients_that_are_replaced():
    def step(optimizer, losses):
        optimizer.zero_grad()
        optimizer.pc_backward([loss * 5 for loss in losses()])
        optimizer.pc_backward(losses())
        optimizer.step()

    with pytest.warns(fastpcgrad.FastPCGradWarning, match="replaced the gradients"):
        assert_same_steps(step)


def test_a_second_call_that_raises_leaves_the_merged_gradient():
    net, x = trunk_and_heads()
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), on_repeat="raise", rows="factored")
    optimizer.pc_backward(losses_of_heads(net, x))
    before = [p.grad.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="before the last one's gradients were cleared"):
        optimizer.pc_backward(losses_of_heads(net, x))
    assert all(map(torch.equal, (p.grad for p in net.parameters()), before))


def test_scaled_losses_and_a_scaler():
    def with_scaler(scaler):
        def step(optimizer, losses):
            optimizer.zero_grad()
            optimizer.pc_backward([scaler.scale(loss) for loss in losses()])
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1)
            scaler.step(optimizer)
            scaler.update()

        return step

    results = [trained(rows, with_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**16))) for rows in ROWS]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=1e-12)


def test_a_scaler_skips_the_step_of_a_gradient_that_is_not_finite():
    net, x = trunk_and_heads()
    optimizer = fastpcgrad.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), rows="factored")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in net.parameters()]
    losses = losses_of_heads(net, x)
    optimizer.pc_backward([scaler.scale(losses[0] * torch.inf), *losses[1:]])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(map(torch.equal, net.parameters(), before))


def test_clipping_in_place_between_the_steps_touches_nothing_that_is_kept():
    def step(optimizer, losses):
        optimizer.zero_grad(set_to_none=False)
        optimizer.pc_backward(losses())
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)
        optimizer.step()

    assert_same_steps(step)


@pytest.mark.parametrize("method", [methods.GradVac(), methods.NashMTL(), methods.PCGrad("pytorch-pcgrad")], ids=repr)
def test_the_state_of_a_method_goes_on(method):
    """Saved after one step and loaded by another surgery, which goes on with the other rows."""
    results = []
    for first, second in (ROWS, ROWS[::-1]):
        net, x = trunk_and_heads(dtype=torch.float64)
        random.seed(7)
        reports, state = [], surgery_of(net.parameters(), copy.deepcopy(method)).state_dict(global_generators=True)
        for rows in (first, second, first, second):
            surgery = surgery_of(net.parameters(), copy.deepcopy(method), rows=rows)
            surgery.load_state_dict(pickle.loads(pickle.dumps(state)))
            reports.append(surgery.backward(losses_of_heads(net, x)))
            state = surgery.state_dict(global_generators=True)
        results.append(([r.weights for r in reports], [p.grad for p in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_goes_on(duplicate):
    net, x = trunk_and_heads()
    surgery = surgery_of(net.parameters())
    for _ in range(3):
        report = surgery.backward(losses_of_heads(net, x))
    assert report.rows.stacked
    twin_net, twin = duplicate((net, surgery))
    for _ in range(3):
        report = twin.backward(losses_of_heads(twin_net, x))
        parameters = list(twin_net.parameters())
        assert_merged(parameters, rows_of(losses_of_heads(twin_net, x), parameters), report)
    assert report.rows.stacked
    assert twin.backward(losses_of_heads(twin_net, x)).rows.factored == 2 + TASKS


def test_another_method_from_one_round_to_the_next():
    net, x = trunk_and_heads()
    parameters = list(net.parameters())
    surgery = surgery_of(parameters)
    for method in (methods.MGDA(), methods.GradDrop(), methods.UPGrad(), methods.TrimmedMean(1), methods.PCGrad()):
        surgery.method = method
        report = surgery.backward(losses_of_heads(net, x))
        if isinstance(method, methods.GradDrop | methods.TrimmedMean):
            assert report.rows.factored == 0
        else:
            assert report.rows.factored == 2 + TASKS
            assert_merged(parameters, rows_of(losses_of_heads(net, x), parameters), report)


def test_a_method_that_changes_during_the_backward_pass_gets_the_rows_that_it_needs():
    net, x = trunk_and_heads(dtype=torch.float64)
    surgery = surgery_of(net.parameters())
    rows = rows_of(losses_of_heads(net, x), list(net.parameters()))
    h = net[0](x)
    h.register_hook(lambda _: setattr(surgery, "method", methods.TrimmedMean(1)))
    surgery.backward([(head(h) - t).square().mean() for t, head in enumerate(net[1])])
    found = torch.cat([p.grad.flatten() for p in net[0].parameters()])
    trunk = rows[:, : len(found)]
    torch.testing.assert_close(found, trunk.sort(dim=0).values[1], rtol=1e-9, atol=1e-12)


def test_a_method_that_fails_ends_the_round_and_the_next_is_right():
    class Fails(methods.Mean):
        broken = True

        def solve(self, gram):
            if self.broken:
                raise ZeroDivisionError
            return super().solve(gram)

    net, x = trunk_and_heads()
    parameters, method = list(net.parameters()), Fails()
    surgery = surgery_of(parameters, method)
    with pytest.raises(ZeroDivisionError):
        surgery.backward(losses_of_heads(net, x))
    assert all(p.grad is None for p in parameters)
    with pytest.raises(RuntimeError, match="merge\\(\\) with no task"):
        surgery.merge()
    method.broken = False
    assert_merged(parameters, rows_of(losses_of_heads(net, x), parameters), surgery.backward(losses_of_heads(net, x)))


def test_tasks_that_are_run_by_hand_between_rounds():
    net, x = trunk_and_heads()
    parameters = list(net.parameters())
    surgery = surgery_of(parameters)
    for _ in range(3):
        surgery.backward(losses_of_heads(net, x))
        rows = rows_of(losses_of_heads(net, x), parameters)
        for t in range(TASKS):
            with surgery.task(t):
                losses_of_heads(net, x)[t].backward()
        with pytest.raises(RuntimeError, match="rows of tasks"):
            surgery.backward(losses_of_heads(net, x))
        assert_merged(parameters, rows, surgery.merge())


def test_steps_in_two_threads():
    """Each makes what it makes alone."""
    start, _ = trunk_and_heads(dtype=torch.float64)

    def train(seed):
        net = copy.deepcopy(start)
        x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer = fastpcgrad.PCGrad(
            torch.optim.SGD(net.parameters(), lr=0.1), method=methods.PCGrad("tensorflow"), rows="factored"
        )
        for _ in range(25):
            optimizer.zero_grad()
            optimizer.pc_backward(losses_of_heads(net, x))
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    alone = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(train, range(4)))
    for own, other in zip(together, alone, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_a_graph_from_another_thread_is_compared_and_looped():
    net, x = trunk_and_heads()
    parameters = list(net.parameters())
    surgery = surgery_of(parameters)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            report = surgery.backward(pool.submit(losses_of_heads, net, x).result())
            assert_merged(parameters, rows_of(losses_of_heads(net, x), parameters), report)
    assert not report.rows.stacked


def test_fake_tensors_have_dense_rows():
    with FakeTensorMode():
        net, x = torch.nn.Linear(4, TASKS), torch.ones(6, 4)
        report = surgery_of(net.parameters()).backward([out.square().mean() for out in net(x).unbind(1)])
        assert report.rows.dense == {"a mode, a transform or a subclass of Tensor": 2}
        assert all(p.grad.shape == p.shape for p in net.parameters())
