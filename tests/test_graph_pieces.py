"""Pieces of a graph: run one after the other they give each task's gradient, however small they are."""

import random

import pytest
import torch

from fastpcgrad.merging.graph_pieces import Graph
from tests import graph_models

for_every_model = pytest.mark.parametrize("kind", graph_models.MODELS, ids=lambda kind: kind.__name__)


def run_in_pieces(losses, parameters, budget):
    """Each task's gradients, and the pieces."""
    graph = Graph(losses, parameters)
    pieces = list(graph.pieces(budget))
    tasks = [{root: torch.ones_like(loss)} for root, loss in zip(graph.roots, losses, strict=True)]
    rows = [[None] * len(parameters) for _ in losses]
    for piece in pieces:
        for row, gradients in zip(rows, tasks, strict=True):
            piece.run(gradients)
            for index in piece.complete:
                row[index] = gradients.pop(graph.leaves[index], None)
    assert all(gradients.keys() <= set(graph.roots) for gradients in tasks), "gradients were left in the graph"
    return rows, pieces


def assert_rows_equal(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert [g is None for g in f] == [g is None for g in e]
        for a, b in zip(f, e, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b)


@for_every_model
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 1])
@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_pieces_give_each_tasks_gradient(kind, share, tasks):
    model = kind().double()
    parameters = list(model.parameters())
    losses = model(tasks)
    budget = int(share * sum(p.numel() for p in parameters))
    found, pieces = run_in_pieces(losses, parameters, budget)
    expected = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    assert_rows_equal(found, expected)
    assert share > 0.2 or len(pieces) > 2
    finished = [index for piece in pieces for index in piece.complete]
    assert sorted(finished) == sorted(set(finished))


def random_losses(seed):
    """Losses of a random graph: activations are used again at any distance, parameters anywhere."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    parameters = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(draw.randint(1, 8))]
    made = [torch.randn(2, 3, dtype=torch.float64) @ parameters[0]]
    for _ in range(draw.randint(3, 40)):
        old = [draw.choice(made[-draw.choice((1, 1, 1, 3, 100)) :]) for _ in range(3)]
        kind = draw.randrange(6)
        if kind <= 1:
            made.append((old[0] @ draw.choice(parameters)).tanh())
        elif kind == 2:
            made.append(old[0] + old[1])
        elif kind == 3:
            made.append(old[0] * old[1].mean(dim=0))
        elif kind == 4:
            made += torch.cat(old).chunk(3)[: draw.randint(1, 3)]
        else:
            made.append(graph_models.Scaled.apply(old[0], old[1]) / 4)
    losses = [(draw.choice(made[-draw.choice((1, 5)) :]) * torch.randn(2, 3)).sum() for _ in range(draw.randint(1, 4))]
    return losses, parameters


@pytest.mark.parametrize("seed", range(60))
def test_pieces_of_random_graphs(seed):
    losses, parameters = random_losses(seed)
    expected = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    for budget in (0, 9, 20, 40):
        assert_rows_equal(run_in_pieces(losses, parameters, budget)[0], expected)


@for_every_model
def test_gradients_of_some_parameters(kind):
    model = kind().double()
    parameters = list(model.parameters())[1::3]
    losses = model(3)
    found, _ = run_in_pieces(losses, parameters, 0)
    expected = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    assert_rows_equal(found, expected)


@pytest.mark.parametrize("kind", [graph_models.MLP, graph_models.Residual, graph_models.Conv, graph_models.LongSkips])
def test_a_piece_holds_no_more_than_the_budget_where_the_graph_allows_it(kind):
    model = kind()
    parameters = list(model.parameters())
    width, layer = sum(p.numel() for p in parameters), sum(p.numel() for p in model.layers[0].parameters())
    for parts in (2, 4, 8):
        budget = max(layer, width // parts)
        assert max(piece.held for piece in Graph(model(2), parameters).pieces(budget)) <= budget


@pytest.mark.parametrize("kind", [graph_models.Tied, graph_models.LanguageModel])
@pytest.mark.parametrize("parts", [2, 3])
def test_what_is_held_from_earlier_pieces_counts_for_the_budget(kind, parts):
    model = kind()
    parameters = list(model.parameters())
    budget = sum(p.numel() for p in parameters) // parts
    pieces = list(Graph(model(2), parameters).pieces(budget))
    assert len(pieces) > parts and max(piece.held for piece in pieces) <= budget


def test_pieces_are_few():
    model = graph_models.MLP(layers=64)
    parameters = list(model.parameters())
    for parts in (2, 4, 8):
        pieces = list(Graph(model(2), parameters).pieces(sum(p.numel() for p in parameters) // parts))
        assert parts <= len(pieces) <= 2 * parts


def test_a_tied_parameter_is_held_until_its_last_use():
    model = graph_models.LanguageModel()
    parameters = list(model.parameters())
    pieces = list(Graph(model(2), parameters).pieces(0))
    assert 0 in pieces[-1].complete
    assert all(piece.held >= parameters[0].numel() for piece in pieces[2:])


def test_each_node_runs_once_a_task():
    """Also in checkpointed blocks that are cut in two."""
    model = graph_models.Checkpointed()
    parameters = list(model.parameters())
    calls = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    losses = model(1)
    calls.clear()
    torch.autograd.grad(losses[0], parameters, retain_graph=True)
    plain = len(calls)
    calls.clear()
    with torch.utils.checkpoint.GraphExecGroup():
        _, pieces = run_in_pieces(losses, parameters, 0)
    assert len(pieces) > len(parameters) / 2
    assert len(calls) == plain


def test_custom_functions_run_once_a_task():
    ran = []

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            return a.clone()

        @staticmethod
        def backward(ctx, grad):
            ran.append(1)
            return grad

    model = graph_models.MLP()
    h = model.x
    for layer in model.layers:
        h = h + Counting.apply(layer(h))
    run_in_pieces(graph_models.losses_of(h, 3), list(model.parameters()), 0)
    assert len(ran) == 3 * len(model.layers)


def test_reentrant_checkpoints_raise():
    model = graph_models.MLP()
    h = torch.utils.checkpoint.checkpoint(model.layers[0], model.x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="reentrant"):
        Graph([h.sum()], list(model.parameters()))


def test_a_loss_without_parameters_gives_one_empty_piece():
    (piece,) = Graph([torch.ones((), requires_grad=True).exp()], []).pieces(0)
    assert not piece.complete and not piece.held
