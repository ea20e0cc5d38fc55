"""batch_norm against eager PyTorch, shape by shape.

Eager is what torchvision's ResNets run: ``F.batch_norm``, ``out += identity`` and an in-place
ReLU, channels-last, with gradients recorded. Ours is ``resops.functional.batch_norm_act``. Both
get the same tensors. "forward" is the call in training mode, with its graph; "backward" the
gradients of input, residual, weight and bias for a given gradient of the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resops
import resops.info
from bench import timing
from bench.roofline import Roofline, large_bytes, tensors_moved
from bench.session import DTYPES, EAGER, RESOPS, Session, saved_bytes
from bench.shapes import BANDWIDTH_SHAPES, BatchNormShape
from resops.functional import batch_norm_act
from tests.dispatch import counted_calls, native_calls
from tests.ops.batch_norm_oracle import BatchNormCase, run_functional

CHANNELS_CHECKED = 6  # fewer, but at least two, where these have more values than
VALUES_CHECKED = 2**22
ELEMENTS_AT_ONCE = 2**18  # of a check against eager
DIRECTIONS = ("forward", "backward")


@dataclass
class Inputs:
    """The tensors of one case; parameters and statistics are float32."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    grad_y: Tensor
    relu: bool

    @classmethod
    def random(
        cls, shape: BatchNormShape, batch: int, dtype: torch.dtype, device: torch.device
    ) -> Inputs:
        """Channels-last data with a mean per channel that is not 0."""
        generator = torch.Generator(device).manual_seed(0)
        channels = shape.channels
        size = (batch, shape.height, shape.width, channels)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def image(shift: Tensor | float = 0.0) -> Tensor:
            return normal(*size).add_(shift).to(dtype).permute(0, 3, 1, 2)

        return cls(
            x=image(normal(channels)),
            residual=image() if shape.residual else None,
            weight=normal(channels) * 0.2 + 1,
            bias=normal(channels) * 0.2,
            running_mean=normal(channels),
            running_var=torch.rand(channels, generator=generator, device=device) + 0.5,
            grad_y=image(),
            relu=shape.relu,
        )

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        tensors = (self.x, self.weight, self.bias, self.residual)
        return tuple(t.detach().requires_grad_() for t in tensors if t is not None)

    def case(self) -> BatchNormCase:
        return BatchNormCase(
            x=self.x,
            residual=self.residual,
            weight=self.weight,
            bias=self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            activation="relu" if self.relu else "identity",
            grad_y=self.grad_y,
        )


Forward = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]


def eager_forward(inputs: Inputs) -> Forward:
    """A call that gives y and the leaves x, weight, bias and, where there is one, residual."""
    leaves = inputs.parameters
    running = (inputs.running_mean.clone(), inputs.running_var.clone())

    def forward() -> tuple[Tensor, tuple[Tensor, ...]]:
        x, weight, bias, *residual = leaves
        y = F.batch_norm(x, *running, weight, bias, True, 0.1, 1e-5)
        if residual:
            y += residual[0]
        if inputs.relu:
            y = F.relu_(y)
        return y, leaves

    return forward


def resops_forward(inputs: Inputs) -> Forward:
    leaves = inputs.parameters
    running = (inputs.running_mean.clone(), inputs.running_var.clone())
    activation = "relu" if inputs.relu else None

    def forward() -> tuple[Tensor, tuple[Tensor, ...]]:
        x, weight, bias, *residual = leaves
        y = batch_norm_act(
            x,
            *running,
            weight,
            bias,
            True,
            0.1,
            1e-5,
            residual=residual[0] if residual else None,
            activation=activation,
        )
        return y, leaves

    return forward


FORWARDS = {EAGER: eager_forward, RESOPS: resops_forward}


def backward_call(forward: Forward, grad_y: Tensor) -> Callable[[], object]:
    """The backward pass alone: the graph is made once and kept."""
    y, leaves = forward()
    return lambda: torch.autograd.grad(y, leaves, grad_y, retain_graph=True)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape some images at a time: float32 values of a block stay in the caches."""
    images = max(1, ELEMENTS_AT_ONCE // max(1, tensors[0][:1].numel()))
    yield from zip(*(t.split(images) for t in tensors), strict=True)


def zero_gradient_at_undecided_signs(inputs: Inputs) -> None:
    """Set grad_y to zero where the sign of the ReLU's argument is a matter of rounding.

    The gradient has a step there: either side is right, and no tolerance can be given. Eager
    rounds the norm, the sum and the output to the dtype, so some four of its roundings are allowed
    for; and float32 arithmetic inside, whose sums over M values one after the other are wrong by
    some sqrt(M) roundings.
    """
    if not inputs.relu:
        return
    x = inputs.x
    bias, absolute_bias = inputs.bias.view(-1, 1, 1), inputs.bias.abs().view(-1, 1, 1)
    _, mean, invstd = torch.native_batch_norm(
        x, inputs.weight, inputs.bias, None, None, True, 0.0, 1e-5
    )
    scale, mean = (inputs.weight * invstd).view(-1, 1, 1), mean.view(-1, 1, 1)
    sums = max(2.0**-16, (x.numel() / x.size(1)) ** 0.5 * 2.0**-24)
    unit = 2 * torch.finfo(x.dtype).eps + sums
    others = () if inputs.residual is None else (inputs.residual,)
    for part, grad_y, *residual in _blocks(x, inputs.grad_y, *others):
        normalized = (part.float() - mean) * scale
        # |x - mean| scale + |bias|, and the mean that x * scale + shift cancels
        terms = normalized.abs().add_(absolute_bias + mean.abs() * scale.abs())
        z = normalized.add_(bias)
        if residual:
            z += residual[0]
            terms += residual[0].abs()
        grad_y.masked_fill_(z.abs_() <= terms.mul_(unit), 0)


def relative_distance(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm of ``theirs``."""
    apart = norm = 0.0
    for mine, other in _blocks(ours, theirs):
        wide = other.float()
        apart += float((mine.float() - wide).norm()) ** 2
        norm += float(wide.norm()) ** 2
    return (apart / norm) ** 0.5


def native_is_used(device: torch.device) -> bool:
    """Whether the compiled kernels are what calls on this device should reach."""
    native = resops.info.environment()["backends"]["batch_norm"]["native"].split(", ")
    return device.type in native and resops.get_backend() in ("auto", "native")


def check(session: Session, inputs: Inputs, name: str, group: str = "batch_norm") -> bool:
    """Rule R (tests/accuracy.py) for the tensors that are then timed.

    The float64 value is computed for a few channels, chosen over the whole width: BatchNorm treats
    each channel alone. All elements of y and grad_x are held to eager's by the norm of the
    difference, relative to that of eager's, to eight roundings of a 16-bit dtype and 2^-13 for
    float32: two results within rule R of the truth are nearer than that, and a wrong or
    skipped part of a tensor is not. And every number of threads has to give the same bits.
    """
    zero_gradient_at_undecided_signs(inputs)
    channels = inputs.x.size(1)
    values = inputs.x.numel() // channels
    few = min(CHANNELS_CHECKED, max(2, VALUES_CHECKED // values), channels)
    picked = torch.linspace(0, channels - 1, few).long()
    picked = picked.to(inputs.x.device)

    def part(t: Tensor) -> Tensor:
        chosen = t.detach()[:, picked] if t.dim() > 1 else t.detach()[picked]
        if t.dim() == 4:
            chosen = chosen.contiguous(memory_format=torch.channels_last)
        return chosen.cpu()

    whole = inputs.case()
    sample = BatchNormCase(
        **{  # type: ignore[arg-type]
            field: part(t)
            for field in (*("x", "residual", "weight", "bias", "running_mean"), "running_var")
            if (t := getattr(whole, field)) is not None
        },
        activation=whole.activation,
        grad_y=part(inputs.grad_y),
    ).with_decided_signs()
    assert sample.grad_y is not None
    inputs.grad_y[:, picked] = sample.grad_y.to(inputs.grad_y.device)

    with counted_calls() as calls:
        ours = run_functional(replace(whole, grad_y=inputs.grad_y))
    own = native_calls(calls)
    try:
        figures = sample.check({k: None if t is None else part(t) for k, t in ours.items()})
        worst = max(figures.values(), key=lambda f: f.share)
        share, detail, passed = worst.share, f"rule R, worst: {worst}", True
    except AssertionError as error:
        share, detail, passed = float("nan"), str(error), False

    for threads in session.threads[1:]:
        with timing.threads(threads):
            again = run_functional(replace(whole, grad_y=inputs.grad_y))
        for output, t in again.items():
            if t is not None and not torch.equal(t, ours[output]):  # type: ignore[arg-type]
                passed = False
                detail = f"{output} has other bits with {threads} threads; {detail}"

    y, leaves = eager_forward(inputs)()
    eager = {"y": y.detach(), "grad_x": torch.autograd.grad(y, leaves[:1], inputs.grad_y)[0]}
    allowed = max(4 * torch.finfo(inputs.x.dtype).eps, 2.0**-13)
    for output, theirs in eager.items():
        mine = ours[output]
        assert mine is not None
        apart = relative_distance(mine, theirs)
        if not apart <= allowed:
            passed = False
            detail = f"{output} differs from eager's by {apart:.2g} of its norm; {detail}"
    if not own and native_is_used(session.device):
        passed, detail = False, f"no native op ran; {detail}"
    ran = ", ".join(f"{op} x{count}" for op, count in own.items()) or "no native op"
    return session.check(name, passed, share, f"{detail}; ran: {ran}", group)


def run(session: Session, batch: int, shapes: Iterable[tuple[BatchNormShape, str]]) -> None:
    """Check and time shapes at a batch size, at every number of threads."""
    for shape, dtype in shapes:
        name = f"{shape.label} {dtype}"
        with session.step(name) as in_time:
            if in_time:
                inputs = Inputs.random(shape, batch, DTYPES[dtype], session.device)
                if check(session, inputs, name):
                    time_case(session, inputs, shape, dtype)


def run_beyond_caches(
    session: Session,
    rooflines: dict[int, Roofline],
    shapes: Iterable[BatchNormShape] = BANDWIDTH_SHAPES,
) -> None:
    """Time shapes at a batch that makes a tensor of ``large_bytes``, against the bare passes."""
    for shape, dtype in itertools.product(shapes, session.dtypes):
        name = f"{shape.label} {dtype}, beyond the caches"
        with session.step(name) as in_time:
            if in_time:
                image = shape.elements_per_image * DTYPES[dtype].itemsize
                batch = -(-large_bytes() // image)
                inputs = Inputs.random(shape, batch, DTYPES[dtype], session.device)
                if check(session, inputs, name):
                    time_case(session, inputs, shape, dtype, rooflines)


def time_case(
    session: Session,
    inputs: Inputs,
    shape: BatchNormShape,
    dtype: str,
    rooflines: dict[int, Roofline] | None = None,
) -> None:
    """Forward and backward at every number of threads; with rooflines, also the bare passes."""
    batch = inputs.x.size(0)
    facts: dict[str, Any] = {"dtype": dtype, "batch": batch}
    forwards = {name: make(inputs) for name, make in FORWARDS.items()}
    if rooflines is None and session.device.type == "cpu":
        there = [inputs.weight, inputs.bias, inputs.running_mean, inputs.running_var]
        kept = {name: saved_bytes(f, iter(there)) for name, f in forwards.items()}
        facts_of_x = {"elements": inputs.x.numel(), "element_bytes": inputs.x.element_size()}
        session.add_saved("batch_norm", shape.label, **kept, **facts_of_x, **facts)
    for direction in DIRECTIONS:
        if direction == "forward":
            calls: dict[str, Callable[[], object]] = dict(forwards)
        else:
            calls = {name: backward_call(f, inputs.grad_y) for name, f in forwards.items()}
        moved = tensors_moved(direction, shape.residual)
        nbytes = inputs.x.numel() * inputs.x.element_size()
        forward_reads = inputs.x if inputs.residual is None else inputs.residual
        other = forward_reads if direction == "forward" else inputs.grad_y
        for threads in session.threads if rooflines is None else rooflines:
            if rooflines is not None:
                passes = rooflines[threads].bare_passes(direction, shape.residual, inputs.x, other)
                calls["limit"] = passes
            with timing.threads(threads):
                found = timing.alternate(calls, budget_s=session.seconds, device=session.device)
            seconds = timing.percentile(found.seconds[RESOPS], 0.5)
            extra: dict[str, Any] = {"gb_per_s": moved * nbytes * 1e-9 / seconds}
            if rooflines is not None:
                extra["limit_share"] = found.ratio("limit", RESOPS).as_dict()
            session.add_timing(
                "batch_norm",
                shape.label,
                found,
                threads,
                direction=direction,
                bytes=moved * nbytes,
                **facts,
                **extra,
            )
