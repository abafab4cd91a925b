"""How the ops are registered: schemas, fakes, derivatives, mutation, torch.compile."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastpcgrad
from fastpcgrad import _modes, _ops

OPS = torch.ops.fastpcgrad
GUARDS = (False, 0.0, 0.0)


def segments():
    return torch.tensor([0, 7, 7, 40])


def order(*batch):
    return torch.rand(*batch, 3, 3).argsort(dim=-1)


def rows(dtype=torch.float32, requires_grad=False):
    # A view with padding between the rows, as TaskGradients has them.
    return torch.randn(3, 48).to(dtype)[:, :40].requires_grad_(requires_grad)


def doubles(*shape, requires_grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def gram(*batch):
    block = doubles(*batch, 3, 5)
    return block @ block.mT


SAMPLES = {
    "gram": lambda: [
        (rows(),),
        (rows(torch.bfloat16), segments()),
        (rows(torch.float64, requires_grad=True), segments()),
        (rows(requires_grad=True),),
    ],
    "pcgrad_coefficients": lambda: [(gram(), order(), *GUARDS), (gram(2), order(2), True, 1e-8, 1e-8)],
    "combine": lambda: [
        (rows(), doubles(3)),
        (rows(torch.bfloat16), doubles(3, 3), segments()),
        (rows(torch.float64, requires_grad=True), doubles(3, 3, requires_grad=True), segments()),
        (rows(requires_grad=True), doubles(3, requires_grad=True)),
    ],
    "combine_out": lambda: [
        (rows(), doubles(3), None, torch.empty(40)),
        (rows(torch.float16), doubles(3, 3), segments(), torch.empty(40, dtype=torch.float16)),
    ],
    "mix_": lambda: [(rows(), doubles(3, 3)), (rows(torch.bfloat16), doubles(3, 3, 3), segments())],
    "pcgrad": lambda: [(rows(), order(), *GUARDS, 1.0), (rows(torch.float64), order(3), *GUARDS, 0.5, segments())],
    "pcgrad_out": lambda: [
        (rows(), order(), *GUARDS, 1.0, None, torch.empty(40)),
        (rows(), order(3), *GUARDS, 1.0, segments(), torch.empty(40)),
    ],
    "pcgrad_": lambda: [(rows(), order(), *GUARDS), (rows(torch.bfloat16), order(3), *GUARDS, segments())],
}
MUTATING = {"combine_out": -1, "mix_": 0, "pcgrad_out": -1, "pcgrad_": 0}
"""Name -> which argument is written."""


def test_every_op_is_covered():
    assert SAMPLES.keys() == _ops.SCHEMAS.keys()


# Torch 2.15's own, about the copies that opcheck makes and differentiates.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("backend", ["eager", "cpu"], indirect=True)
def test_opcheck(backend, name):
    for sample in SAMPLES[name]():
        # dw is a float64 tensor with the accuracy of the rows.
        tolerance = {"atol": 1e-12, "rtol": 1e-12} if sample[0].dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
        torch.library.opcheck(getattr(OPS, name).default, sample, **tolerance)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_schema_and_fake_on_triton(backend, name):
    checks = ("test_schema", "test_faketensor")
    for sample in SAMPLES[name]():
        torch.library.opcheck(getattr(OPS, name).default, sample, test_utils=checks)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_fake_and_the_kernel_agree_on_shape_dtype_and_strides(backend, name):
    for sample in SAMPLES[name]():
        real = getattr(OPS, name)(*sample)
        faked = getattr(OPS, name)(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in sample))
        as_tuple = lambda result: result if isinstance(result, tuple) else (result,)  # noqa: E731
        for a, b in zip(as_tuple(real), as_tuple(faked), strict=True):
            assert a is b is None or (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", MUTATING)
def test_mutation_bumps_the_version_of_what_is_written_alone(backend, name):
    for sample in SAMPLES[name]():
        tensors = [x for x in sample if isinstance(x, torch.Tensor)]
        before = [x._version for x in tensors]
        getattr(OPS, name)(*sample)
        written = [x._version > version for x, version in zip(tensors, before, strict=True)]
        expected = [x is sample[MUTATING[name]] for x in tensors]
        assert written == expected


@pytest.mark.parametrize(
    "write",
    [
        lambda x: fastpcgrad.mix_(x, torch.eye(3, dtype=torch.float64)),
        lambda x: fastpcgrad.pcgrad_(x),
        lambda x: fastpcgrad.combine(torch.randn(3, 40), doubles(3), x[0]),
    ],
    ids=["mix_", "pcgrad_", "combine_out"],
)
def test_autograd_notices_that_what_it_saved_was_overwritten(backend, write):
    weight, saved = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    loss = (weight * saved).sum()
    write(saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", MUTATING)
def test_the_ops_run_in_inference_mode(backend, name):
    with torch.inference_mode():
        for sample in SAMPLES[name]():
            getattr(OPS, name)(*sample)


@pytest.mark.parametrize("cut", [None, [0, 2, 2, 6]], ids=["whole", "segments"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gram_and_combine_are_differentiable(backend, check, cut):
    j = doubles(3, 6, requires_grad=True)
    w = doubles(*(() if cut is None else (3,)), 3, requires_grad=True)
    assert check(lambda j: fastpcgrad.gram(j, cut), (j,))
    assert check(lambda j, w: fastpcgrad.combine(j, w, segments=cut), (j, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cut", [None, [0, 2, 2, 6]], ids=["whole", "segments"])
def test_derivatives_have_the_dtype_of_their_inputs(backend, dtype, cut):
    j, w = torch.randn(3, 6).to(dtype).requires_grad_(), doubles(*(() if cut is None else (3,)), 3, requires_grad=True)
    loss = fastpcgrad.gram(j, cut).sum() + fastpcgrad.combine(j, w, segments=cut).sum()
    by_j, by_w = torch.autograd.grad(loss, (j, w))
    assert by_j.dtype == dtype and by_w.dtype == torch.float64
    exact_j = j.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        fastpcgrad.gram(exact_j, cut).sum() + fastpcgrad.combine(exact_j, w, segments=cut).sum(), (exact_j, w)
    )
    torch.testing.assert_close(by_j.double(), exact[0], rtol=3e-2, atol=6e-2)
    torch.testing.assert_close(by_w, exact[1], rtol=3e-2, atol=6e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_only_what_requires_grad_gets_a_derivative(backend, dtype):
    j, w = torch.randn(3, 6).to(dtype), doubles(3, requires_grad=True)
    (by_w,) = torch.autograd.grad(fastpcgrad.combine(j, w).sum(), (w,))
    torch.testing.assert_close(by_w, j.sum(dim=1).double())
    assert not fastpcgrad.gram(j).requires_grad and not fastpcgrad.combine(j, w.detach()).requires_grad


def test_differentiating_pcgrad_raises_and_says_what_to_do_instead(backend):
    j = torch.randn(3, 6, requires_grad=True)
    for result in (
        fastpcgrad.pcgrad(j),
        fastpcgrad.pcgrad_coefficients(fastpcgrad.gram(j), order()),
    ):
        with pytest.raises(RuntimeError, match=r"no derivative.*gram and combine"):
            result.sum().backward()
    assert j.grad is None


class Ops(TorchDispatchMode):
    """Writes down the ops that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    pass


def test_plain_tensors_that_nobody_watches_need_no_dispatcher():
    assert not _modes.is_watched((rows(), order(), *GUARDS, 1.0, None))
    assert not _modes.is_watched((rows(torch.bfloat16), doubles(3, 3), segments()))
    with torch.no_grad(), torch.autocast("cpu"):
        assert not _modes.is_watched((rows(requires_grad=True), None))
    with torch.inference_mode():
        assert not _modes.is_watched((rows(), rows().clone(), segments()))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.requires_grad_(),
        lambda rows: rows.to("meta"),
        lambda rows: rows.as_subclass(Marked),
        torch._neg_view,
        lambda rows: FakeTensorMode().from_tensor(rows),
    ],
    ids=["requires_grad", "meta", "subclass", "negative", "fake"],
)
def test_other_tensors_go_through_the_dispatcher(change):
    assert _modes.is_watched((change(rows()), order())) and _modes.is_watched((rows(), change(doubles(3))))


def test_a_negative_view_is_negative(backend):
    j, w = rows(), doubles(3)
    torch.testing.assert_close(fastpcgrad.combine(torch._neg_view(j), w), -fastpcgrad.combine(j, w))
    torch.testing.assert_close(fastpcgrad.combine(j, torch._neg_view(w)), -fastpcgrad.combine(j, w))


# Torch 2.11's own, of any profile without a schedule.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events at the end of each cycle:UserWarning")
def test_modes_tracers_and_transforms_see_the_ops():
    j = rows()
    with Ops() as seen:
        fastpcgrad.pcgrad(j, order=order())
        fastpcgrad.pcgrad_(j, order=order())
        fastpcgrad.combine(j, fastpcgrad.gram(j)[0])
    names = [name for name in seen.names if name.startswith("fastpcgrad")]
    assert names == [f"fastpcgrad::{name}" for name in ("pcgrad", "pcgrad_", "gram", "combine")]
    assert "fastpcgrad.gram" in make_fx(lambda j: fastpcgrad.gram(j))(j).code
    batched = torch.func.vmap(lambda weights: weights + _modes.is_watched((j, weights)))
    assert bool((batched(torch.zeros(2, 3)) == 1).all())
    with torch.profiler.profile() as profile:
        fastpcgrad.gram(j)
    assert "fastpcgrad::gram" in [event.name for event in profile.events()]


@pytest.mark.parametrize("name", MUTATING)
def test_an_op_that_overwrites_is_no_part_of_a_graph(name):
    for sample in SAMPLES[name]():
        for place, argument in enumerate(sample):
            if not isinstance(argument, torch.Tensor) or not argument.is_floating_point():
                continue
            before = argument.clone()
            given = [*sample[:place], argument.detach().requires_grad_(), *sample[place + 1 :]]
            with pytest.raises(RuntimeError, match=f"{name} has no derivative"):
                getattr(OPS, name)(*given)
            torch.testing.assert_close(argument, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_trace_computes_anew():
    traced = torch.jit.trace(lambda j: fastpcgrad.combine(j, fastpcgrad.gram(j)[0]), rows(), check_trace=False)
    j = rows()
    assert torch.equal(traced(j), fastpcgrad.combine(j, fastpcgrad.gram(j)[0]))


COMPILED = {
    "gram": lambda j, order: fastpcgrad.gram(j * 2),
    "gram-segments": lambda j, order: fastpcgrad.gram(j, [0, 10, 40]) + 1,
    "coefficients": lambda j, order: fastpcgrad.pcgrad_coefficients(fastpcgrad.gram(j), order) * 2,
    "combine": lambda j, order: fastpcgrad.combine(j + 1, fastpcgrad.gram(j).sum(dim=0)) * 2,
    "combine-out": lambda j, order: fastpcgrad.combine(j, fastpcgrad.gram(j)[0], torch.empty(40)) + 1,
    "mix_": lambda j, order: fastpcgrad.mix_(j.clone(), fastpcgrad.gram(j)) + 1,
    "pcgrad": lambda j, order: fastpcgrad.pcgrad(j + 0.5, order=order) * 2,
    "pcgrad-none": lambda j, order: fastpcgrad.pcgrad(j, order=order, reduction="none") * 2,
    "pcgrad_": lambda j, order: fastpcgrad.pcgrad_(j * 1.0, order=order) + 1,
    "pcgrad-segments": lambda j, order: fastpcgrad.pcgrad(j, order=order, segments=[0, 10, 40]),
    "pcgrad-tensorflow": lambda j, order: fastpcgrad.pcgrad(j, variant="tensorflow"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_into_one_graph(name):
    torch.compiler.reset()
    j, places = rows(), order()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    before = j.clone()
    torch.testing.assert_close(compiled(j, places), COMPILED[name](j, places))
    assert torch.equal(j, before)


def test_compiled_code_writes_its_argument_in_place():
    torch.compiler.reset()
    j, places = rows(), order()
    expected = fastpcgrad.pcgrad_(j.clone(), order=places)
    torch.compile(lambda x: fastpcgrad.pcgrad_(x, order=places), fullgraph=True, backend="aot_eager")(j)
    assert torch.equal(j, expected)


def test_compiled_pcgrad_draws_its_order_from_torchs_generator():
    torch.compiler.reset()
    # Every order gives the same here: no more than two tasks.
    j = torch.randn(2, 40)
    compiled = torch.compile(lambda x: fastpcgrad.pcgrad(x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(j), fastpcgrad.pcgrad(j) * 2)


def test_compiled_code_is_differentiable():
    torch.compiler.reset()
    function = lambda j, w: fastpcgrad.combine(j, w).square().sum() + fastpcgrad.gram(j).sum()  # noqa: E731
    j, w = torch.randn(3, 40, requires_grad=True), doubles(3, requires_grad=True)
    expected = torch.autograd.grad(function(j, w), (j, w))
    found = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(j, w), (j, w))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own, from importing inductor
def test_inductor_calls_the_ops():
    # not monkeypatch: what it puts back, the configuration counts as deleted
    from torch._inductor import config

    torch.compiler.reset()

    def step(j, order):
        # Calls alone: inductor needs no C++ compiler for them, and they are what this is about.
        merged = fastpcgrad.pcgrad(j, order=order)
        again = fastpcgrad.combine(j, fastpcgrad.gram(j)[0])
        return merged, again, fastpcgrad.pcgrad_(j, order=order)

    j, places = rows(), order()
    compiled = j.clone()
    expected = step(j, places)
    with config.patch(compile_threads=1):
        found = torch.compile(step, fullgraph=True)(compiled, places)
    torch.testing.assert_close(found, expected)
    assert torch.equal(compiled, j)
