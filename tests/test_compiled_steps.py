"""Training steps that are compiled as a whole: the surgery in them runs as ever, and the rest is compiled around it."""

import pytest
import torch
from torch import nn

import fastpcgrad
from fastpcgrad import methods


def drop_in(optimizer, model):
    return fastpcgrad.PCGrad(optimizer, variant="tensorflow").pc_backward


def rounds(optimizer, model):
    return fastpcgrad.GradientSurgery(optimizer, 2, methods.UPGrad()).backward


def two_phases(optimizer, model):
    surgery = fastpcgrad.GradientSurgery(optimizer, 2, methods.UPGrad())
    return lambda losses: surgery.backward(losses, two_phase=True)


def tasks(optimizer, model):
    surgery = fastpcgrad.GradientSurgery(optimizer, 2, methods.GradVac(generator=torch.Generator().manual_seed(0)))

    def run(losses):
        for t, loss in enumerate(losses):
            with surgery.task(t):
                loss.backward(retain_graph=t == 0)
        surgery.merge()

    return run


def functions(optimizer, model):
    monitor, parameters = fastpcgrad.ConflictMonitor(model, 2, every=2), list(model.parameters())

    def run(losses):
        monitor.observe(losses)
        fastpcgrad.gramian(losses, parameters, retain_graph=True)
        fastpcgrad.grad(losses, parameters, retain_graph=True)
        fastpcgrad.backward(losses, parameters)

    return run


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, where graphs break
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch's own use of it
@pytest.mark.parametrize("door", [drop_in, rounds, two_phases, tasks, functions])
def test_a_compiled_step_is_the_step(door):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        layers = [layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())]
        model = nn.ModuleList([nn.Sequential(*layers), nn.Linear(6, 2), nn.Linear(6, 2)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run = door(optimizer, model)

        def step(x, model=model, optimizer=optimizer, run=run):
            optimizer.zero_grad()
            h = model[0](x)
            run([model[1](h).square().mean(), h.mean() - 0.1 * model[2](h).sum()])
            optimizer.step()

        torch._dynamo.reset()
        chosen = torch.compile(step, backend="eager") if is_compiled else step
        for _ in range(3):
            chosen(x)
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found)
