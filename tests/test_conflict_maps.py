"""Figures and tables of conflicts say what the report says."""

import pytest
import torch

import fastpcgrad
from fastpcgrad import methods
from fastpcgrad.merging import conflict_maps

pytest.importorskip("matplotlib", reason="pip install 'fastpcgrad[plot]'")
pd = pytest.importorskip("pandas", reason="pip install 'fastpcgrad[plot]'")


def report(tasks=("seg", "depth", "edges"), **options):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, len(tasks)))
    surgery = fastpcgrad.GradientSurgery(
        model.parameters(), tasks=list(tasks), method=methods.PCGrad("tensorflow"), model=model, **options
    )
    return surgery.backward(list((model(torch.randn(9, 4)) - torch.randn(9, len(tasks))).square().mean(dim=0)))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_plot_shows_tasks_and_layers(tmp_path):
    found = report(granularity="layer")
    figure = found.plot()
    tasks, layers = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert labels(tasks.xaxis) == labels(tasks.yaxis) == ["seg", "depth", "edges"]
    shown = {f"{float(found.cosines[i, j]):+.2f}" for i in range(3) for j in range(3) if i != j}
    assert set(texts(tasks)) == shown
    assert labels(layers.xaxis) == ["0", "2"]
    assert layers.get_xlabel() == "layer, from the input on"
    assert labels(layers.yaxis) == ["seg – depth", "seg – edges", "depth – edges"]
    each = found.segment_cosines
    expected = [f"{float(own[i, j]):+.2f}" for i, j in ((0, 1), (0, 2), (1, 2)) for own in each]
    assert texts(layers) == expected
    figure.savefig(tmp_path / "conflicts.png")
    assert (tmp_path / "conflicts.png").stat().st_size > 10_000


def test_the_axis_of_layers_says_what_their_names_begin_with():
    nested = torch.nn.ModuleDict({"trunk": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3))})
    monitor = fastpcgrad.ConflictMonitor(nested, tasks=["seg", "depth", "edges"], every=1)
    monitor.observe(nested["trunk"](torch.randn(4, 2)).square().mean(dim=0))
    layers = monitor.plot().axes[1]
    assert layers.get_xlabel() == "layer of trunk, from the input on" and labels(layers.xaxis) == ["0", "1"]


def test_a_plot_of_one_problem_or_of_one_task_is_one_map():
    for found in (report(), report(tasks=["alone"], granularity="layer")):
        assert len([axes for axes in found.plot().axes if axes.get_label() != "<colorbar>"]) == 1


def test_a_table_has_a_row_for_each_layer_and_pair():
    found = report(granularity="layer")
    frame = found.to_pandas()
    assert list(frame.columns) == ["layer", "task", "other", "product", "cosine", "conflict"]
    assert list(frame["layer"]) == ["", "", "", "0", "0", "0", "2", "2", "2"]
    row = frame[(frame.layer == "2") & (frame.task == "seg") & (frame.other == "edges")].iloc[0]
    assert row.cosine == float(found.segment_cosines[1, 0, 2])
    assert row["product"] == float(found.segment_grams[1, 0, 2])
    assert bool(row.conflict) == (row.cosine < 0)
    assert len(report().to_pandas()) == 3


def test_layers_without_names_have_numbers():
    model = torch.nn.Linear(3, 2)
    surgery = fastpcgrad.GradientSurgery(model.parameters(), 2, granularity="parameter")
    found = surgery.backward(list(model(torch.randn(5, 3)).square().mean(dim=0)))
    assert list(found.to_pandas()["layer"]) == ["", "0", "1"]
    assert not [key for key in found.as_dict() if "conflict_rate/" in key]


@pytest.mark.parametrize(
    ("names", "start", "short"),
    [
        (["model.layers.0", "model.layers.1"], "model.layers", ["0", "1"]),
        (["model.embed", "model.layers.1", "model.norm"], "model", ["embed", "layers.1", "norm"]),
        (["a", "a.b"], "", ["a", "a.b"]),
        (["only.one"], "", ["only.one"]),
        ([], "", []),
    ],
)
def test_names_of_layers_lose_what_they_have_in_common(names, start, short):
    assert conflict_maps._without_common_start(names) == (start, short)
