"""Conv2dNormActivation, and the folded convolution that a norm keeps: when it may be used, and
that it is never one of weights that have changed since."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import resops
from resops.nn import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchRenormAct2d,
    Conv2dNormActivation,
    Conv3dNormActivation,
    GhostBatchNormAct2d,
)
from resops.nn import conv_bn_act as implementation
from resops.nn.conv_bn_act import conv_norm_act
from tests.dispatch import counted_calls
from tests.torchvision_ops import torchvision

CL = torch.channels_last


def filled(module: nn.Module, seed: int = 1) -> Any:
    """The module with weights and statistics that are not their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if t.is_floating_point():
                scale = 1 / math.sqrt(t[0].numel()) if t.dim() > 1 else 1.0
                t.copy_(torch.rand(t.shape, generator=generator) * scale + ("var" in name))
    return module


def block(**kwargs: Any) -> Any:
    return filled(Conv2dNormActivation(8, 12, bias=True, **kwargs)).to(memory_format=CL).eval()


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 8, 7, 6).contiguous(memory_format=CL)


@torch.no_grad()
def stock(layer: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """What torch's ops make of the layer's parameters as they are now."""
    conv: Any = layer[0]
    norm: Any = layer[1]
    z = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    z = F.batch_norm(
        z, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )
    return norm.act(z if residual is None else z + residual)


def assert_stock(layer: Any, x: Tensor, y: Tensor) -> None:
    """A stale fold is wrong by percents; folding itself costs some roundings of values of a few
    units."""
    torch.testing.assert_close(y, stock(layer, x), rtol=1e-5, atol=1e-5)


@contextmanager
def counted_folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    count = [0]
    fold = implementation._fold

    def counting(*args: Any) -> Any:
        count[0] += 1
        return fold(*args)

    with monkeypatch.context() as patch:
        patch.setattr(implementation, "_fold", counting)
        yield count


def folds(layer: Any, *args: Any) -> bool:
    """Whether this call is one convolution without a batch norm."""
    with counted_calls() as calls:
        layer(*args)
    folded = calls["mkldnn::_convolution_pointwise"]
    assert folded + calls["aten::convolution"] + calls["aten::conv2d"] == 1
    return folded == 1 and not any("batch_norm" in name for name in calls)


# ---- the same values -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "activation", [nn.ReLU, None, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish, nn.PReLU]
)
def test_folded_equals_stock(activation: Any, mode: Any) -> None:
    inplace = None if activation in (nn.GELU, nn.PReLU) else True
    layer = block(activation_layer=activation, inplace=inplace)
    x = image()
    with mode():
        for residual in (None, torch.randn(2, 12, 7, 6)):
            y = layer(x, residual)
            torch.testing.assert_close(y, stock(layer, x, residual), rtol=1e-5, atol=1e-5)
            assert y.is_contiguous(memory_format=CL)
            assert folds(layer, x, residual)


@pytest.mark.parametrize(
    ("conv", "norm", "size"),
    [
        (nn.Conv1d(4, 6, 3), BatchNormAct1d(6), (2, 4, 9)),
        (nn.Conv3d(4, 6, 3), BatchNormAct3d(6), (2, 4, 5, 6, 7)),
    ],
    ids=["1d", "3d"],
)
@torch.no_grad()
def test_other_dimensions(conv: nn.Module, norm: Any, size: tuple[int, ...]) -> None:
    filled(conv), filled(norm).eval()
    x = torch.randn(size)
    with counted_calls() as calls:
        y = conv_norm_act(conv, norm, x)
    assert not any("batch_norm" in name for name in calls)
    torch.testing.assert_close(y, norm(conv(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer, x = block().to(dtype), image().to(dtype)
    y = layer(x, stock(layer, x))
    assert y.dtype == dtype
    # Two roundings of values of some units, to 8 bits at the coarsest.
    torch.testing.assert_close(y, stock(layer, x, stock(layer, x)), rtol=2**-6, atol=2**-5)
    assert any("batch_norm" in name for name in counted(layer, x)) is False


def counted(layer: Any, *args: Any) -> dict[str, int]:
    with counted_calls() as calls:
        layer(*args)
    return dict(calls)


@torch.no_grad()
def test_float32_norm_behind_a_16_bit_convolution() -> None:
    layer = block()
    layer[0].bfloat16()
    x = image().bfloat16()
    assert folds(layer, x)
    torch.testing.assert_close(layer(x), stock(layer, x), rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_with_gradients_it_is_the_composition(training: bool) -> None:
    """In float64, and with a smooth activation: relu has no derivative to compare at 0."""
    layer = block(activation_layer=nn.SiLU).double().train(training)
    twin: Any = copy.deepcopy(layer)
    x = image().double().requires_grad_()
    residual = torch.randn(2, 12, 7, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x, residual)
    n = twin[1]
    z = F.batch_norm(twin[0](x), n.running_mean, n.running_var, n.weight, n.bias, training)
    expected = F.silu(z + residual)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    grads = torch.autograd.grad(y.square().sum(), [x, residual, *layer.parameters()])
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, residual, *twin.parameters()])
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.equal(n.num_batches_tracked, layer[1].num_batches_tracked - int(training))


def test_a_gradient_that_only_one_tensor_wants() -> None:
    layer, x = block(), image()
    layer.requires_grad_(False)
    assert folds(layer, x)  # nothing wants one
    for tensor in (x, *layer.parameters()):
        tensor.requires_grad_()
        assert layer(x).requires_grad
        assert not folds(layer, x)
        with torch.no_grad():
            assert folds(layer, x)
        tensor.requires_grad_(False)


# ---- NaN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_between_two_layers(bad: float, mode: Any) -> None:
    """The second layer knows a bound of the first one's output, until that is written to."""
    first, second = block(), filled(Conv2dNormActivation(12, 12)).to(memory_format=CL).eval()
    x = image()
    with mode():
        assert first(x).isfinite().all() and second(first(x)).isfinite().all()
        y = first(x)
        y[0, 0, 3, 3] = bad
        assert torch.equal(second(y).isnan(), stock(second, y).isnan())
        assert not second(y).isfinite().all()
        y = first(x)
        y.detach().permute(0, 2, 3, 1).view(-1)[0] = bad
        assert not second(y).isfinite().all()
        residual = first(x)
        residual[1, 2, 3, 4] = bad
        assert not second(first(x), residual).isfinite().all()
        assert torch.equal(
            second(first(x), residual).isnan(), stock(second, first(x), residual).isnan()
        )
        poisoned = x.clone()
        poisoned[0, 0] = bad
        assert not second(first(poisoned)).isfinite().all()


@torch.no_grad()
def test_a_bound_is_read_anew_once_it_has_grown_past_use() -> None:
    """Fifty layers, each with a bound a thousand times that of its input."""
    layer = filled(Conv2dNormActivation(12, 12)).to(memory_format=CL).eval()
    layer[0].weight.copy_(torch.randn_like(layer[0].weight) * 0.1)
    layer[1].weight.fill_(20.0)
    layer[1].running_var.fill_(400.0)
    y = torch.randn(2, 12, 7, 6).contiguous(memory_format=CL)
    with counted_calls() as calls:
        for _ in range(50):
            y = layer(y)
    assert calls["mkldnn::_convolution_pointwise"] == 50
    assert 1 < calls["aten::linalg_vector_norm"] < 25
    assert calls["aten::relu_"] == 0 and y.isfinite().all()


# ---- what was folded is never stale --------------------------------------------------------------


def add_(t: Tensor) -> None:
    t.add_(0.5)


def through_data(t: Tensor) -> None:
    t.data.mul_(1.5)


def new_data(t: Tensor) -> None:
    t.data = t.data * 1.5


def new_data_twice(t: Tensor) -> None:
    """The second may get the address of the first, which is free again."""
    t.data = t.data * 2
    t.data = t.data * 0.75


def through_a_view(t: Tensor) -> None:
    t[-1:].squeeze(0).add_(1.0)


def through_detach(t: Tensor) -> None:
    t.detach()[0] = 3.0


def one_element(t: Tensor) -> None:
    """Not among the values that are compared."""
    t[(0, 1, 0, 0) if t.dim() == 4 else 1] = 3.0


CHANGES = [
    add_,
    one_element,
    through_data,
    new_data,
    new_data_twice,
    through_a_view,
    through_detach,
]
NAMES = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_changed_tensor(name: str, change: Callable[[Tensor], None]) -> None:
    layer, x = block(), image()
    before = layer(x)
    change(layer.get_parameter(name) if "run" not in name else layer.get_buffer(name))
    after = layer(x)
    assert_stock(layer, x, after)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_replaced_tensor(name: str) -> None:
    layer, x = block(), image()
    layer(x)
    child, attribute = layer[int(name[0])], name[2:]
    new = getattr(child, attribute) + 1
    setattr(child, attribute, new if "running" in attribute else nn.Parameter(new))
    assert_stock(layer, x, layer(x))
    layer(x)
    if attribute != "weight" and "running" not in attribute:
        setattr(child, attribute, None)
        assert_stock(layer, x, layer(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer[1], "eps", 2.0),
        lambda layer: setattr(layer[0], "padding", (0, 0)),
        lambda layer: setattr(layer[0], "stride", (2, 1)),
        lambda layer: setattr(layer[0], "dilation", (2, 2)),
        lambda layer: setattr(layer[1], "act", nn.SiLU()),
        lambda layer: setattr(layer[1], "act", nn.Softplus()),
    ],
)
@torch.no_grad()
def test_changed_setting(change: Callable[[Any], None]) -> None:
    layer, x = block(), image()
    layer(x)
    change(layer)
    assert_stock(layer, x, layer(x))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_step_in_evaluation(optimizer: Any) -> None:
    layer, x = block(), image()
    for _ in range(3):
        with torch.no_grad():
            assert_stock(layer, x, layer(x))
        step = optimizer(layer.parameters(), lr=0.1)
        layer(x).square().mean().backward()
        step.step()


def test_training_in_between() -> None:
    layer, x = block(), image()
    for _ in range(2):
        with torch.no_grad():
            assert_stock(layer.eval(), x, layer(x))
            layer.train()(x + 5)
    # Without train() and eval() of the layer, which would drop what was folded.
    norm = layer.eval()[1]
    with torch.no_grad():
        layer(x)
        norm.training = True
        norm(torch.randn(3, 12, 4, 4) + 5)
        norm.training = False
        assert_stock(layer, x, layer(x))
        norm.num_batches_tracked = None
        layer(x)
        F.batch_norm(torch.randn(3, 12, 4, 4), norm.running_mean, norm.running_var, training=True)
        assert_stock(layer, x, layer(x))
        resops.functional.batch_norm_act(
            torch.randn(3, 12, 4, 4), norm.running_mean, norm.running_var, training=True
        )
        assert_stock(layer, x, layer(x))


@torch.no_grad()
def test_load_state_dict() -> None:
    for assign in (False, True):
        layer, x = block(), image()
        layer(x)
        other = filled(Conv2dNormActivation(8, 12, bias=True), seed=5).state_dict()
        layer.load_state_dict(other, assign=assign)
        assert_stock(layer, x, layer(x))


@torch.no_grad()
def test_functional_call() -> None:
    layer, x = block(), image()
    before = layer(x)
    other = filled(copy.deepcopy(layer), seed=5)
    for _ in range(2):
        y = torch.func.functional_call(layer, dict(other.state_dict()), (x,))
        assert_stock(other, x, y)
        assert torch.equal(layer(x), before)


@torch.no_grad()
def test_one_norm_after_two_convolutions() -> None:
    norm = filled(BatchNormAct2d(12)).eval()
    convs = [filled(nn.Conv2d(8, 12, 3), seed=s) for s in (1, 2)]
    x = image()
    for conv in (*convs, *convs):
        y = conv_norm_act(conv, norm, x)
        torch.testing.assert_close(y, norm(conv(x)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_folded_once_for_calls_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = block(), image()
    with counted_folds(monkeypatch) as count:
        layer(x), layer(x), layer(image(5)), layer(x, torch.randn(2, 12, 7, 6))
        assert count == [1]
        layer(x[..., :5].contiguous(memory_format=CL))  # packed for the size of the image
        assert count == [2]
        layer(x.contiguous(memory_format=CL)), layer.eval(), layer(x)
        assert count == [4]


@torch.no_grad()
def test_sizes_and_layouts_in_turn() -> None:
    layer = block()
    for size in ((2, 8, 7, 6), (1, 8, 12, 3), (3, 8, 1, 1)):
        for memory_format in (CL, torch.contiguous_format):
            x = torch.randn(size).contiguous(memory_format=memory_format)
            y = layer(x)
            assert_stock(layer, x, y)
            assert y.stride() == layer[1](layer[0](x)).stride()


@torch.no_grad()
def test_what_was_folded_is_no_state() -> None:
    layer, x = block(), image()
    keys = list(layer.state_dict())
    y = layer(x)
    assert layer[1]._folded is not None and list(layer.state_dict()) == keys
    assert [n for n, _ in layer.named_buffers()] == [k for k in keys if "run" in k or "num" in k]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
        copy.deepcopy(layer).to(torch.float32),
    ):
        assert torch.equal(other(x), y)
        with pytest.MonkeyPatch.context() as patch, counted_folds(patch) as count:
            copy.deepcopy(other)(x)
        assert count == [1]
    for drop in (layer.eval, layer.float, lambda: layer.load_state_dict(layer.state_dict())):
        layer(x)
        drop()
        assert layer[1]._folded is None


# ---- when it must not fold -----------------------------------------------------------------------


def forward_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, args, y: y * 2)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))


def patched_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 2


@pytest.mark.parametrize("change", [forward_hook, pre_hook, patched_forward])
@pytest.mark.parametrize("child", ["0", "1", "1.act", "1.drop"])
@torch.no_grad()
def test_hooks_on_children_run(child: str, change: Callable[[nn.Module], None]) -> None:
    layer, x = block(), image()
    layer(x)
    conv = layer[0]
    doubled = 2 if change is pre_hook and child == "0" else 1
    z = F.conv2d(x * doubled, conv.weight, conv.bias, padding=1)
    if child == "0" and change is not pre_hook:
        z = z * 2
    if child == "1" and change is pre_hook:
        z = z * 2
    norm = layer[1]
    z = F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if child == "1.drop":
        z = z * 2
    z = F.relu(z) * (2 if child == "1.act" or (child == "1" and change is not pre_hook) else 1)
    change(layer.get_submodule(child))
    torch.testing.assert_close(layer(x), z, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_global_hooks_see_the_children() -> None:
    layer, x = block(), image()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer[0] in seen and layer[1] in seen
    assert folds(layer, x)


@torch.no_grad()
def test_parametrizations() -> None:
    for parametrize in (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ):
        layer, x = block(), image()
        layer(x)
        layer.to(memory_format=torch.contiguous_format)
        parametrize(layer[0])
        assert_stock(layer, x, layer(x))
        assert not folds(layer, x)


@torch.no_grad()
def test_subclasses_of_the_convolution() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    conv = filled(Doubled(8, 12, 3))
    norm = filled(BatchNormAct2d(12)).eval()
    x = image()
    torch.testing.assert_close(conv_norm_act(conv, norm, x), norm(conv(x)))


@torch.no_grad()
def test_padding_that_is_not_zeros() -> None:
    for mode in ("reflect", "circular", "replicate"):
        conv = filled(nn.Conv2d(8, 12, 3, padding=1, padding_mode=mode))
        norm = filled(BatchNormAct2d(12)).eval()
        x = image()
        torch.testing.assert_close(conv_norm_act(conv, norm, x), norm(conv(x)))


@torch.no_grad()
def test_batch_statistics_in_evaluation() -> None:
    norm = BatchNormAct2d(12, track_running_stats=False).eval()
    conv = filled(nn.Conv2d(8, 12, 3))
    x = image()
    expected = F.relu(F.batch_norm(conv(x), None, None, norm.weight, norm.bias, True))
    torch.testing.assert_close(conv_norm_act(conv, norm, x), expected)


def test_made_in_inference_mode() -> None:
    """Such parameters have no version; a change of theirs could not be seen."""
    with torch.inference_mode():
        layer, x = block(), image()
        layer(x)
        layer[0].weight.mul_(2)
        assert_stock(layer, x, layer(x))


@torch.no_grad()
def test_the_reference_folds_nothing() -> None:
    layer, x = block(), image()
    layer(x)
    with resops.backend("reference"):
        assert not folds(layer, x)
    with resops.backend("native"):
        assert folds(layer, x)
    with resops.backend("triton"), pytest.raises(resops.BackendError):
        layer(x)


@torch.no_grad()
def test_wrong_inputs() -> None:
    """The composition raises, in torch's words."""
    layer, x = block(), image()
    layer(x)
    with pytest.raises(RuntimeError, match="to have 8 channels, but got 7 channels instead"):
        layer(x[:, :7])
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(x[0])
    with pytest.raises(RuntimeError, match=r"Input type .* should be the same"):
        layer(x.double())
    for residual in (torch.ones(2, 12, 7, 5), torch.ones(1, 12, 7, 6), torch.ones(12)):
        with pytest.raises(RuntimeError, match="residual should have the size"):
            layer(x, residual)
    layer[1].weight = nn.Parameter(torch.ones(11))
    with pytest.raises(RuntimeError, match="weight should contain 12 elements"):
        layer(x)


# ---- around it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_autocast(residual_dtype: torch.dtype | None) -> None:
    layer, x = block(), image()
    residual = None if residual_dtype is None else torch.randn(2, 12, 7, 6).to(residual_dtype)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, residual)
        expected = stock(layer, x, residual)
        assert folds(layer, x, residual)
    assert y.dtype == expected.dtype
    # Two roundings to bfloat16 of values of some units.
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-5)
    again = layer(x)
    assert again.dtype == torch.float32 and torch.equal(again, full)


@torch.no_grad()
def test_threads_share_a_layer() -> None:
    layer, x = block(), image()
    expected = layer(x)
    wrong: list[Any] = []

    def work(own: Tensor) -> None:
        with torch.no_grad():
            for _ in range(50):
                layer.eval()
                y = layer(own)
                if not torch.allclose(y, expected[: len(own)], rtol=1e-5, atol=1e-6):
                    wrong.append(y)

    threads = [threading.Thread(target=work, args=(x[: 1 + i % 2].clone(),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_compiled_and_traced(grad: bool) -> None:
    layer, x = block(), image()
    residual = torch.randn(2, 12, 7, 6)
    with torch.set_grad_enabled(grad):
        layer(x, residual)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(layer, (x, residual)).module()
        others: list[Any] = [compiled, exported]
        if not grad:  # torch.jit.trace does not go into an autograd function
            others.append(torch.jit.trace(layer, (x, residual)))
        # None of them has the folded weights baked in: they see what happens to the parameters.
        layer[0].weight.data.mul_(2)
        layer[1].running_mean.add_(1)
        for other in others:
            torch.testing.assert_close(other(x, residual), stock(layer, x, residual))


@pytest.mark.parametrize(
    ("batch", "size", "apart"), [(1, 4, True), (2, 4, False), (1, 64, False)], ids=str
)
@pytest.mark.parametrize("kernel_size", [1, 3])
@torch.inference_mode()
def test_one_small_image_is_not_worth_a_fold(
    batch: int, size: int, apart: bool, kernel_size: int, native: None
) -> None:
    """The library's convolution and the norm; the same to rounding as the reference."""
    with torch.inference_mode(False):
        layer = Conv2dNormActivation(64, 64, kernel_size).eval()
        x = torch.randn(batch, 64, size, size)
    with counted_calls() as calls:
        y = layer(x)
    assert (calls["batch_norm_forward"] > 0) == apart
    with resops.backend("reference"):
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)  # Winograd's error


# ---- torchvision's layer -------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize("dims", [2, 3])
def test_signature_of_torchvision(dims: int) -> None:
    ours = (Conv2dNormActivation, Conv3dNormActivation)[dims - 2]
    misc = torchvision().ops.misc
    theirs = (misc.Conv2dNormActivation, misc.Conv3dNormActivation)[dims - 2]
    own, stated = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert list(own) == list(stated)
    defaults = {n: p.default for n, p in stated.items() if n != "norm_layer"}
    assert {n: p.default for n, p in own.items() if n != "norm_layer"} == defaults
    assert issubclass(own["norm_layer"].default, stated["norm_layer"].default)


@pytest.mark.models
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"kernel_size": (3, 5), "stride": (1, 2), "dilation": 2},
        {"kernel_size": 5, "padding": 1, "groups": 4, "bias": True},
        {"padding": "same", "activation_layer": nn.SiLU},
        {"activation_layer": None},
        {"activation_layer": nn.GELU, "inplace": None},
        {"activation_layer": nn.Hardswish},
        {"norm_layer": None},
        {"norm_layer": None, "activation_layer": None, "bias": False},
        {"norm_layer": functools.partial(nn.BatchNorm2d, eps=0.1)},
        {"norm_layer": functools.partial(nn.GroupNorm, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_is_torchvisions_layer(kwargs: dict[str, Any], training: bool) -> None:
    if "dilation" in kwargs:
        kwargs = {**kwargs, "dilation": (2, 2)}
    torch.manual_seed(3)
    ours = Conv2dNormActivation(8, 12, **kwargs)
    torch.manual_seed(3)
    theirs = torchvision().ops.Conv2dNormActivation(8, 12, **kwargs)
    assert ours.out_channels == theirs.out_channels
    for (name, a), (other, b) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)  # same keys, same initial weights
    ours.train(training), theirs.train(training)
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@torch.no_grad()
def test_residual_of_every_kind_of_block() -> None:
    x, residual = image(), torch.randn(2, 12, 7, 6)
    cases: list[dict[str, Any]] = [
        {"norm_layer": None},
        {"norm_layer": nn.BatchNorm2d},
        {"norm_layer": None, "activation_layer": None},
        {"norm_layer": functools.partial(BatchNormAct2d, eps=0.1)},
    ]
    for kwargs in cases:
        layer = filled(Conv2dNormActivation(8, 12, **kwargs)).eval()
        z = layer[0](x)
        if kwargs["norm_layer"] is not None:
            n = layer[1]
            z = F.batch_norm(z, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)
        z = z + residual
        expected = z if "activation_layer" in kwargs else F.relu(z)
        torch.testing.assert_close(layer(x, residual), expected, rtol=1e-5, atol=1e-5)
    assert layer[1].eps == 0.1


@torch.no_grad()
def test_appended_layers_run() -> None:
    layer, x = block(), image()
    expected = layer(x) * 3
    layer.append(nn.Upsample(scale_factor=1))
    layer[2].register_forward_hook(lambda m, args, y: y * 3)
    assert torch.equal(layer(x), expected)


def test_three_dimensions() -> None:
    layer = filled(Conv3dNormActivation(4, 6, kernel_size=(1, 3, 3), dilation=(1, 1, 2)))
    x = torch.randn(2, 4, 3, 6, 7)
    assert layer(x).shape == (2, 6, 3, 6, 7)
    with torch.no_grad():
        y = layer.eval()(x)
        torch.testing.assert_close(y, layer[1](layer[0](x)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("norm", [GhostBatchNormAct2d, BatchRenormAct2d])
def test_norms_that_are_batch_norm_in_evaluation(norm: Any) -> None:
    """They are folded too, and only then: in training they are themselves."""
    layer, x = block(norm_layer=norm), image()
    assert_stock(layer, x, layer(x))
    assert folds(layer, x)
    layer.train()
    assert not folds(layer, x)
    layer.eval()
    assert_stock(layer, x, layer(x))
