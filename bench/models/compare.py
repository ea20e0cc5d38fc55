"""Twins: a resops model and the stock model with the same weights must compute the same.

Both are compared with the stock model in float64 on real images, in the spirit of rule R
(tests/accuracy.py), and never with each other: the resops model may be ``K`` times as far from the
truth as channels-last eager PyTorch at the same dtype is, plus a floor of some roundings that pays
for errors of eager that are small by luck. K is 3, not rule R's 2, since a network amplifies the
rounding of its first layers: two honest arrangements of the same sums end at distances from the
truth that differ by more than a factor of 2. Measured for ResNet-50 in training, fp32: eager
channels-last 8e-5, eager contiguous 6e-6, resops 8e-6; in evaluation 6e-7, 5e-7 and 8e-7. Of the
bf16 networks eager is at 9e-3 in evaluation and resops at 12e-3: there the weights into which the
norms are folded are rounded, not the norms' outputs.

Compared are the logits in evaluation and in training, the loss, and the running statistics after
one training step. Gradients of a whole ReLU network are not: one activation that changes its sign
moves them by 1e-2. They are checked layer by layer, on the inputs that the layers of the network
really get (``check_layers``), and here only to be there and finite.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from bench.models.stock_resnet import BasicBlock, Bottleneck, ResNet, create_stock_model
from bench.ops import batch_norm
from bench.session import DTYPES, Session, channels_last
from bench.shapes import BatchNormShape
from bench.timing import threads

K = 3.0
CLASSES = 10  # more than the bundled images, each of which is a class
# Relative rounding of one operation; floors are some of these.
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


@dataclass(frozen=True)
class Twins:
    """The same network three times."""

    stock: nn.Module
    ours: nn.Module
    exact: nn.Module  # float64

    @classmethod
    def create(cls, name: str, images: Tensor) -> Twins:
        """A stock ResNet and the same of resops."""
        torch.manual_seed(0)
        stock: nn.Module = create_stock_model(name, CLASSES).to(images.device)

        def create(twin: nn.Module) -> nn.Module:
            return resops.models.create_model(name, num_classes=CLASSES).to(images.device)

        return cls.of(stock, images, create)

    @classmethod
    def of(
        cls,
        stock: nn.Module,
        images: Tensor,
        create: Callable[[nn.Module], nn.Module],
        in_channels_last: bool = True,
    ) -> Twins:
        """Random weights; running statistics from one batch, so that evaluation is meaningful.

        The state is copied with ``strict=True`` in both directions.

        Args:
            create: makes ours, of a copy of ``stock`` where it likes.
        """
        norms = [m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)]
        with torch.no_grad():
            for norm in norms:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.1)
                norm.momentum = 0.5
            stock.train()(images)
        for norm in norms:
            norm.momentum = 0.1
        ours = create(copy.deepcopy(stock))
        ours.load_state_dict(stock.state_dict(), strict=True)
        stock.load_state_dict(ours.state_dict(), strict=True)
        exact = copy.deepcopy(stock).double()
        if in_channels_last:
            stock, ours = (channels_last(model, images.device) for model in (stock, ours))
        return cls(stock, ours, exact)


@contextlib.contextmanager
def autocast(device: torch.device, dtype: str) -> Iterator[None]:
    """Mixed precision as it is used in training; nothing for fp32."""
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        yield


def inference_copy(model: nn.Module, dtype: str) -> nn.Module:
    """The model as it is used for inference: in evaluation, all of it in the given dtype."""
    return copy.deepcopy(model).eval().to(DTYPES[dtype])


@dataclass
class Outcome:
    """What one model computes: logits in evaluation, then one training step's results."""

    eval_logits: Tensor
    train_logits: Tensor
    loss: Tensor
    running: dict[str, tuple[Tensor, Tensor]]  # norm layer -> mean, var
    bad_gradients: list[str]


def outcome(model: nn.Module, images: Tensor, labels: Tensor, dtype: str | None) -> Outcome:
    """Run a copy of ``model``; dtype None is float64, without the backward pass."""
    exact = dtype is None
    inference = copy.deepcopy(model).eval() if dtype is None else inference_copy(model, dtype)
    with torch.inference_mode():
        eval_logits = inference(images.to(next(inference.parameters()).dtype)).double()
    model = copy.deepcopy(model).train()
    with torch.set_grad_enabled(not exact):
        if dtype is None:
            logits = model(images.double())
            loss = F.cross_entropy(logits, labels)
        else:
            with autocast(images.device, dtype):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
    bad = []
    if not exact:
        loss.backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            if grad is None or not bool(grad.isfinite().all()) or not bool(grad.any()):
                bad.append(name)
    running = {
        name: (module.running_mean.double().clone(), module.running_var.double().clone())
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        and module.running_mean is not None
        and module.running_var is not None
    }
    return Outcome(eval_logits, logits.detach().double(), loss.detach().double(), running, bad)


def logits_error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def running_error(got: Outcome, exact: Outcome) -> float:
    """The largest error of a layer: of the mean in standard deviations, of the variance relative.

    Both as a root mean square over the channels.
    """
    worst = 0.0
    for name, (mean, var) in exact.running.items():
        got_mean, got_var = got.running[name]
        for error in ((got_mean - mean) / var.sqrt(), (got_var - var) / var):
            worst = max(worst, float(error.square().mean().sqrt()))
    return worst


def check_twins(
    session: Session,
    name: str,
    dtype: str,
    twins: Twins,
    images: Tensor,
    labels: Tensor,
    exact: Outcome,
) -> bool:
    """Every comparison of this page for one network and dtype; True if all passed."""
    stock, ours = (outcome(m, images, labels, dtype) for m in (twins.stock, twins.ours))
    unit, label, good = UNIT[dtype], f"{name} {dtype}", True

    def held(what: str, error: float, eager: float, floor: float) -> None:
        nonlocal good
        limit = K * eager + floor
        detail = f"distance from float64: resops {error:.3g}, eager {eager:.3g}, limit {limit:.3g}"
        good &= session.check(f"{label} {what}", error <= limit, error / limit, detail, label)

    pairs = {
        "logits, evaluation": (ours.eval_logits, stock.eval_logits, exact.eval_logits),
        "logits, training": (ours.train_logits, stock.train_logits, exact.train_logits),
    }
    for what, (mine, theirs, truth) in pairs.items():
        held(what, logits_error(mine, truth), logits_error(theirs, truth), 8 * unit)
    # A change of all logits by d at most changes the cross entropy by 2 d at most.
    slack = 2 * float((stock.train_logits - exact.train_logits).abs().max())
    error = float((ours.loss - exact.loss).abs())
    held("loss", error, slack, 8 * unit * float(exact.loss))
    error, eager = (running_error(o, exact) for o in (ours, stock))
    held("running statistics after a step", error, eager, 8 * 2.0**-24)
    bad = ", ".join(ours.bad_gradients)
    detail = f"missing, zero or not finite: {bad}" if bad else "every parameter has one"
    what = f"{label} gradients, finite and not 0"
    return good & session.check(what, not bad, None, detail, label)


def layer_inputs(model: nn.Module, images: Tensor) -> dict[BatchNormShape, batch_norm.Inputs]:
    """What the first BatchNorm of every kind gets in a training forward pass of a stock ResNet.

    The gradient of the output is random.
    """
    model = copy.deepcopy(model).train()
    found: dict[BatchNormShape, batch_norm.Inputs] = {}
    identity: dict[nn.Module, Tensor] = {}

    def record(norm: nn.Module, relu: bool, block: nn.Module | None = None) -> None:
        assert isinstance(norm, nn.BatchNorm2d)

        def before_norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().clone()
            _, channels, height, width = x.shape
            kind = BatchNormShape(channels, height, width, block is not None, relu)
            if kind in found:
                return
            assert norm.running_mean is not None and norm.running_var is not None
            found[kind] = batch_norm.Inputs(
                x,
                None if block is None else identity[block].detach().clone(),
                norm.weight.detach().clone(),
                norm.bias.detach().clone(),
                norm.running_mean.clone(),
                norm.running_var.clone(),
                torch.randn_like(x),
                relu,
            )

        norm.register_forward_pre_hook(before_norm)

    def before_block(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].clone()
        assert isinstance(block, BasicBlock | Bottleneck)
        identity[block] = x if block.downsample is None else block.downsample(x)

    assert isinstance(model, ResNet)
    record(model.bn1, relu=True)
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            block.register_forward_pre_hook(before_block)
            norms = [m for m in block.children() if isinstance(m, nn.BatchNorm2d)]
            for norm in norms:
                record(norm, relu=True, block=block if norm is norms[-1] else None)
            if block.downsample is not None:
                record(block.downsample[1], relu=False)
    with torch.no_grad():
        model(images)
    return found


def check_layers(session: Session, name: str, model: nn.Module, images: Tensor) -> None:
    """Rule R, forward and backward, for every kind of BatchNorm on its real inputs."""
    for kind, inputs in layer_inputs(model, images).items():
        for dtype in session.dtypes:
            cast = {
                field: None if (t := getattr(inputs, field)) is None else t.to(DTYPES[dtype])
                for field in ("x", "residual", "grad_y")
            }
            case = replace(inputs, **cast)  # type: ignore[arg-type]
            batch_norm.check(session, case, f"{kind.label} {dtype}", group=f"layers of {name}")


def run(
    session: Session,
    names: Sequence[str],
    batch: int,
    layers_of: str | None,
    load_images: Callable[[int], tuple[Tensor, Tensor]],
) -> set[str]:
    """Check networks and, of one, the layers; one step of the progress bar each.

    Returns:
        the cases "<name> <dtype>" that passed, and so may be timed.
    """
    passed: set[str] = set()
    images, labels = load_images(batch)
    images, labels = images.to(session.device), labels.to(session.device) % CLASSES
    for name in names:
        with session.step(f"checking {name}") as in_time, threads(session.threads[-1]):
            if not in_time:
                continue
            twins = Twins.create(name, images)
            exact = outcome(twins.exact, images, labels, None)
            for dtype in session.dtypes:
                if check_twins(session, name, dtype, twins, images, labels, exact):
                    passed.add(f"{name} {dtype}")
            if name == layers_of:
                check_layers(session, name, twins.stock, images)
    return passed
