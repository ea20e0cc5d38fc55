"""Dense blocks of torchvision and timm as one op."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resops
from resops.fusion import Reason, measured
from tests.dispatch import counted_calls
from tests.fusion.blocks import assert_near, assert_same_state, assert_same_step, filled, reasons
from tests.torchvision_ops import timm, torchvision

pytestmark = pytest.mark.models
PACKAGES = ("torchvision", "timm")


def dense_block(package: str, **kwargs: Any) -> nn.Module:
    """Three layers of 8 new channels after 16, in float64."""
    args = {"bn_size": 2, "growth_rate": 8, "drop_rate": 0.0, **kwargs}
    if package == "torchvision":
        block = torchvision().models.densenet._DenseBlock(3, 16, **args)
    else:
        block = timm().models.densenet.DenseBlock(3, 16, **args)
    return filled(block.double())


def transition(package: str) -> nn.Module:
    """From 16 channels to 8, in float64."""
    if package == "torchvision":
        block = torchvision().models.densenet._Transition(16, 8)
    else:
        block = timm().models.densenet.DenseTransition(16, 8)
    return filled(block.double())


def image(pixels: int = 8) -> Tensor:
    return torch.randn(2, 16, pixels, pixels, dtype=torch.float64)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DENSE_BLOCK", "DENSE_LAYER", "TRANSITION"):
        monkeypatch.setattr(measured, name, measured.LeastPixels(0, 0))


def runs_as_one_op(block: nn.Module, x: Tensor) -> bool:
    with counted_calls() as calls:
        copy.deepcopy(block)(x)  # whose statistics may change
    assert calls["aten::cat"] == 0 or calls["dense_block_apply"] == 0
    return calls["dense_block_apply"] > 0


@pytest.mark.parametrize("package", PACKAGES)
def test_equals_its_layers(package: str, any_size: None, native: None) -> None:
    plain = dense_block(package)
    fused = resops.fuse(copy.deepcopy(plain))
    (entry,) = resops.fuse_report(fused).fused
    assert entry.pattern == "DenseBlock" and len(entry.modules) == 6
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image().contiguous(memory_format=layout)
        for training in (True, False):
            fused.train(training), plain.train(training)
            assert runs_as_one_op(fused, x)
            assert fused(x).stride() == plain(x).stride()
            assert_same_step(fused, plain, x)
            with torch.no_grad():
                for _ in range(2):  # the second time with what was folded
                    assert_near(fused(x), plain(x))
    folded = resops.fold(plain)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 3
    assert_near(folded(x), plain(x))
    assert list(resops.unfuse(fused).state_dict()) == list(plain.state_dict())
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("package", PACKAGES)
def test_transition_equals_its_layers(package: str, any_size: None, native: None) -> None:
    plain = transition(package)
    fused = resops.fuse(copy.deepcopy(plain))
    (entry,) = resops.fuse_report(fused).fused
    assert entry.pattern == "DenseTransition" and entry.modules == ("norm",)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = image(7).contiguous(memory_format=layout)  # the pool leaves out a row and a column
        for training in (True, False):
            fused.train(training), plain.train(training)
            assert runs_as_one_op(fused, x)
            assert fused(x).stride() == plain(x).stride()
            assert_same_step(fused, plain, x)
            with torch.no_grad():
                assert_near(fused(x), plain(x))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other) is type(fused) and runs_as_one_op(other, x)
    (path,) = resops.explain(fused, x).paths
    assert (path.path, path.pattern, path.why) == ("native", "DenseTransition", "")
    with pytest.raises(RuntimeError, match="Output size is too small"):  # PyTorch's
        fused(image(1))


@pytest.mark.parametrize("package", PACKAGES)
def test_changes_of_a_transition_are_seen(package: str, any_size: None, native: None) -> None:
    def other_pool(block: Any) -> None:
        block.pool.kernel_size = 3

    def other_convolution(block: Any) -> None:
        block.conv.padding = (1, 1)

    def hook(block: Any) -> None:
        block.conv.register_forward_hook(lambda *args: None)

    for change in (other_pool, other_convolution, hook):
        plain = transition(package)
        fused = resops.fuse(copy.deepcopy(plain))
        assert runs_as_one_op(fused, image())
        for block in (fused, plain):
            change(block)
        assert not runs_as_one_op(fused, image())
        assert_same_step(fused, plain, image())
        assert resops.explain(fused, image()).paths[0].why


@pytest.mark.parametrize("package", PACKAGES)
def test_explain_says_why_a_block_runs_layer_by_layer(
    package: str, any_size: None, native: None
) -> None:
    for kind in (dense_block, transition):
        fused = resops.fuse(kind(package))
        (path,) = resops.explain(fused, image()).paths
        assert (path.path, path.why) == ("native", "")
    fused = resops.fuse(dense_block(package))
    fused.denselayer2.norm1.eps = 1e-3  # type: ignore[union-attr]
    (path,) = resops.explain(fused, image()).paths
    assert path.path == "layer by layer, native" and path.why.startswith("eps differs")
    assert not runs_as_one_op(fused, image())
    fused.denselayer2.norm1.eps = 1e-5  # type: ignore[union-attr]
    fused.denselayer2.norm1.momentum = 0.7  # type: ignore[union-attr]
    (path,) = resops.explain(fused, image()).paths
    assert (path.path, path.why) == ("native", "")  # each norm has a momentum of its own
    fused.denselayer3.norm1.eval()  # type: ignore[union-attr]
    (path,) = resops.explain(fused, image()).paths
    assert path.path == "layer by layer, native" and "in training" in path.why


@pytest.mark.parametrize("package", PACKAGES)
def test_small_images_go_to_the_original_layers(
    package: str, native: None, one_thread: None
) -> None:
    plain = dense_block(package)
    fused = resops.fuse(copy.deepcopy(plain))
    small, large = image(4), image(32)
    assert measured.DENSE_BLOCK.without <= 2 * 32 * 32
    assert runs_as_one_op(fused, large) and not runs_as_one_op(fused, small)
    assert_same_step(fused, plain, small)
    (path,) = resops.explain(fused, small).paths
    assert path.path == "original forward"
    assert path.why.startswith(Reason.MEASURED_SLOWER.value) and "32 pixels" in path.why
    (path,) = resops.explain(fused, large).paths
    assert (path.path, path.pattern) == ("native", "DenseBlock")
    with resops.backend("native"):  # asked for by name
        assert runs_as_one_op(fused, small)
    torch.set_num_threads(2)  # which one_thread takes back
    with torch.no_grad():
        assert runs_as_one_op(fused, image(48)) and not runs_as_one_op(fused, large)


def hook(block: Any) -> None:
    block.denselayer2.conv1.register_forward_hook(lambda *args: None)


def checkpointing(block: Any) -> None:
    block.denselayer1.memory_efficient = block.denselayer1.grad_checkpointing = True


def dropout(block: Any) -> None:
    block.denselayer3.drop_rate = 1.0  # of everything


def other_convolution(block: Any) -> None:
    block.denselayer1.conv2.dilation, block.denselayer1.conv2.padding = (2, 2), (2, 2)


CHANGES = (hook, checkpointing, dropout, other_convolution)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("package", PACKAGES)
def test_changes_after_fuse_are_seen(
    package: str, change: Any, any_size: None, native: None
) -> None:
    plain = dense_block(package)
    fused = resops.fuse(copy.deepcopy(plain))
    x = image()
    assert runs_as_one_op(fused, x)
    for block in (fused, plain):
        change(block)
    assert not runs_as_one_op(fused, x)
    assert_same_step(fused, plain, x)
    assert resops.explain(fused, x).paths[0].why


@pytest.mark.parametrize(
    "kwargs",
    [{"drop_rate": 0.5}, {"memory_efficient": True}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_changes_the_layers_is_left_as_it_is(kwargs: Any) -> None:
    fused = resops.fuse(dense_block("torchvision", **kwargs))
    assert set(reasons(fused).values()) == {"UNTRACEABLE"}


def test_a_filtered_norm_leaves_the_layers(any_size: None, native: None) -> None:
    """The block is no single op then, but each of its layers may be."""
    plain = dense_block("torchvision")
    fused = resops.fuse(
        copy.deepcopy(plain), module_filter_fn=lambda m, name: name != "denselayer1.norm2"
    )
    assert reasons(fused) == {"denselayer1.norm2": "FILTERED"}
    patterns = {entry.pattern for entry in resops.fuse_report(fused).fused}
    assert patterns == {"BN+ReLU+Conv", "Conv+BN+ReLU"}
    assert not runs_as_one_op(fused, image())
    assert_same_step(fused, plain, image())


@pytest.mark.parametrize("package", PACKAGES)
def test_copies_and_transforms(package: str, any_size: None, native: None) -> None:
    plain = dense_block(package)
    fused = resops.fuse(copy.deepcopy(plain))
    x = image()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other) is type(fused) and runs_as_one_op(other, x)
    for block in (fused, plain):
        block.eval()
    state = {k: v.detach() for k, v in plain.named_parameters()}

    def loss(block: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(block, parameters, (x,))
        return y.square().sum()

    grads = [torch.func.grad(lambda p, b=b: loss(b, p))(state) for b in (fused, plain)]
    for name, ours in grads[0].items():
        assert_near(ours, grads[1][name])
    exported = torch.export.export(fused, (x,)).module()
    assert_near(exported(x), plain(x))


def test_compile(any_size: None, native: None) -> None:
    torch._dynamo.reset()
    plain = dense_block("torchvision")
    fused = resops.fuse(copy.deepcopy(plain))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        fused.train(training), plain.train(training)
        x = image()
        y, expected = compiled(x), plain(x)
        assert_near(y, expected)
        for a, b in zip(
            torch.autograd.grad(y.square().sum(), list(fused.parameters())),
            torch.autograd.grad(expected.square().sum(), list(plain.parameters())),
            strict=True,
        ):
            assert_near(a, b)
    assert_same_state(fused, plain)
