"""LibMTL's trainer with our weighting strategies is LibMTL's trainer with its own."""

import importlib.util
import random
import sys
import types

import numpy as np
import pytest
import torch

from fastpcgrad import methods

TASKS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def libmtl():
    """LibMTL 1.1.5, which takes a name from a module that torchvision no longer has."""
    if importlib.util.find_spec("LibMTL") is None:
        pytest.skip("pip install --no-deps LibMTL")
    gone = types.ModuleType("torchvision.models.utils")
    gone.load_state_dict_from_url = None
    with pytest.MonkeyPatch.context() as patch:
        if "LibMTL" not in sys.modules:
            patch.setitem(sys.modules, gone.__name__, gone)
        import LibMTL

        yield LibMTL


class Encoder(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6), torch.nn.Tanh())


class Loader(list):
    """Batches, by an iterator that has ``next``, as LibMTL calls it."""

    def __iter__(self):
        return Batches(super().__iter__())


class Batches:
    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.inner)

    next = __next__


def trained(libmtl, weighting, epochs=2, rep_grad=False, **weight_args):
    """The weights after an epoch or two, and those that the strategy has recorded for the losses."""

    class OnCPU(libmtl.Trainer):
        def _prepare_model(self, *args):
            self.device = torch.device("cpu")
            super()._prepare_model(*args)

    class KeepsZeros(libmtl.architecture.HPS):
        """Its own PCGrad fails where gradients are set to None."""

        def zero_grad_share_params(self):
            self.encoder.zero_grad(set_to_none=False)

    class Score(libmtl.metrics.AbsMetric):
        def update_fun(self, pred, gt):
            self.bs.append(len(pred))

        def score_fun(self):
            return [0.5]

    class Loss(libmtl.loss.AbsLoss):
        def compute_loss(self, pred, gt):
            return (pred - gt).square().mean()

    torch.manual_seed(0)
    random.seed(0)
    decoders = torch.nn.ModuleDict({task: torch.nn.Linear(6, 2) for task in TASKS})
    batches = Loader((torch.randn(8, 4), {task: torch.randn(8, 2) for task in TASKS}) for _ in range(4))
    trainer = OnCPU(
        task_dict={task: {"metrics": ["m"], "metrics_fn": Score(), "loss_fn": Loss(), "weight": [1]} for task in TASKS},
        weighting=weighting,
        architecture=KeepsZeros,
        encoder_class=Encoder,
        decoders=decoders,
        rep_grad=rep_grad,
        multi_input=False,
        optim_param={"optim": "sgd", "lr": 0.1, "momentum": 0.9},
        scheduler_param=None,
        weight_args=weight_args,
        arch_args={},
    )
    start = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    of_losses = trainer.train(batches, batches, epochs, return_weight=True)
    end = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    return start, end, of_losses, trainer


@pytest.fixture(scope="module")
def ours(libmtl):
    from fastpcgrad.integrations import libmtl

    return libmtl


def walked_alike(one, other):
    start, end, _, _ = other
    return float((one[1] - end).norm() / (end - start).norm())


def test_pcgrad_is_libmtls_own(libmtl, ours):
    theirs, found = (trained(libmtl, weighting) for weighting in (libmtl.weighting.PCGrad, ours.PCGrad))
    assert torch.equal(found[0], theirs[0]) and not torch.equal(found[0], found[1])
    assert walked_alike(found, theirs) <= 1e-6
    np.testing.assert_allclose(found[2], theirs[2], atol=1e-5)
    assert (theirs[2] > 1).any()  # gradients that conflict
    assert "surgery/weight/a" in found[3].model.report.as_dict()


def test_the_sum_is_equal_weighting(libmtl, ours):
    found = trained(libmtl, ours.weighting(methods.Sum()))
    assert walked_alike(found, trained(libmtl, libmtl.weighting.EW)) <= 1e-6
    assert (found[2] == 1).all()


def test_weights_reach_the_heads_where_they_are_to(libmtl, ours):
    class WeighsAll(libmtl.weighting.abstract_weighting.AbsWeighting):
        """As LibMTL's Nash_MTL: G of the shared parameters, and one backward pass of the weighted losses."""

        def backward(self, losses, **kwargs):
            self._compute_grad_dim()
            grads = self._compute_grad(losses, mode="autograd").double()
            weights = methods.CAGrad(c=0.5).weights(grads @ grads.mT)
            (weights * losses).sum().backward()
            return weights.numpy()

    theirs = trained(libmtl, WeighsAll)
    weighed, summed = (
        trained(libmtl, ours.weighting(methods.CAGrad(c=0.5), weighs_heads=flag)) for flag in (True, False)
    )
    assert walked_alike(weighed, theirs) <= 1e-5
    assert walked_alike(summed, theirs) > 0.1


@pytest.mark.parametrize("method", [methods.UPGrad(), methods.PCGrad("tensorlogic"), methods.TrimmedMean(1)])
def test_any_method_trains(libmtl, ours, method):
    start, end, of_losses, trainer = trained(libmtl, ours.weighting(method), epochs=1)
    assert not torch.equal(start, end) and end.isfinite().all()
    assert trainer.model.report is not None
    assert (of_losses == 0).all() == isinstance(method, methods.Elementwise)


def test_what_is_refused(libmtl, ours):
    with pytest.raises(NotImplementedError, match="rep_grad"):
        trained(libmtl, ours.PCGrad, rep_grad=True)
    with pytest.raises(TypeError, match=r"weight_args.*calpha"):
        trained(libmtl, ours.PCGrad, calpha=0.5)
    with pytest.raises(TypeError, match="'cagrad'"):
        ours.weighting("cagrad")
    with pytest.raises(NotImplementedError, match="make_method"):
        trained(libmtl, ours.Weighting)


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_mgda_divides_by_what_libmtls_does(libmtl, normalization):
    """There a corner of the hull gets 0.999 or 0.001, and three tasks stop short of the minimum by 1e-5."""
    theirs = libmtl.weighting.MGDA()
    theirs.device = torch.device("cpu")
    ours, compared = methods.MGDA(solver="exact", normalization=normalization), 0
    generator = torch.Generator().manual_seed(0)
    for seed in range(60):
        rows = torch.randn(2 + seed % 2, 30, generator=generator, dtype=torch.float64)
        losses = torch.rand(len(rows), generator=generator, dtype=torch.float64) + 0.5
        scaled = theirs._gradient_normalizers(rows, losses, normalization)
        weights = theirs._find_min_norm_element(scaled.float())
        if weights is None:  # after 250 steps it gives nothing
            continue
        if normalization.startswith("loss"):
            ours.losses = losses
        found = ours.weights(rows @ rows.mT) @ rows
        expected = weights.double() @ scaled
        tolerance = 1e-6 if len(rows) == 2 else 2e-3
        if weights.min() > 0.002:
            assert float((found - expected).norm()) <= tolerance * float(scaled.norm()), seed
            compared += 1
    assert compared >= 50
