"""residual_add against eager PyTorch: y = act(alpha * x + beta * residual) in its usual forms.

Eager is written as a user of each method writes it. Same tensors, channels-last; "backward" asks
for the gradients of x, residual and of alpha where it is a tensor that learns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing
from bench.session import DTYPES, EAGER, RESOPS, Session
from bench.shapes import BatchNormShape

SHAPES = (
    BatchNormShape(256, 56, 56, True, True),
    BatchNormShape(1024, 14, 14, True, True),
)


@dataclass(frozen=True)
class Weighting:
    """One form of the join.

    ``alpha`` makes the weight for an input; None where it is the constant ``constant``, and then
    the third argument of ``eager`` is not looked at.
    """

    name: str
    eager: Callable[[Tensor, Tensor, Tensor], Tensor]
    alpha: Callable[[Tensor], Tensor] | None = None
    beta: float | str = 1.0
    activation: str | None = None
    constant: float = 1.0


def _per_sample(x: Tensor) -> Tensor:
    return torch.rand(x.size(0), 1, 1, 1, device=x.device)


# Sources: He et al. 2015; De and Smith, SkipInit, 2020; Huang et al., stochastic depth, 2016;
# Srivastava et al., highway networks, 2015.
WEIGHTINGS = (
    Weighting("add+relu", lambda x, r, a: F.relu_(x + r), activation="relu"),
    Weighting(
        "rescaled by sqrt(1/2)",
        lambda x, r, a: (x + r) * 0.5**0.5,
        beta=0.5**0.5,
        constant=0.5**0.5,
    ),
    Weighting("learnable scalar", lambda x, r, a: a * x + r, lambda x: torch.rand(1)),
    Weighting(
        "per sample, relu", lambda x, r, a: F.relu_(a * x + r), _per_sample, activation="relu"
    ),
    Weighting(
        "highway gate", lambda x, r, a: a * x + (1 - a) * r, torch.rand_like, beta="complement"
    ),
)


def steps(session: Session, shapes: Sequence[BatchNormShape] = SHAPES) -> int:
    return len(WEIGHTINGS) * len(shapes) * len(session.dtypes)


def run(session: Session, batch: int, shapes: Sequence[BatchNormShape] = SHAPES) -> None:
    """Check and time every weighting at every shape; one step of the progress bar each."""
    for weighting, shape, dtype in itertools.product(WEIGHTINGS, shapes, session.dtypes):
        size = f"{shape.channels}x{shape.height}x{shape.width}"
        with session.step(f"{size} {weighting.name} {dtype}") as in_time:
            if in_time:
                _run_case(session, weighting, shape, dtype, batch)


def _run_case(
    session: Session, weighting: Weighting, shape: BatchNormShape, dtype: str, batch: int
) -> None:
    from resops.functional import residual_add

    device, case = session.device, f"{shape.channels}x{shape.height}x{shape.width} {weighting.name}"
    torch.manual_seed(0)

    def image() -> Tensor:
        whole = torch.randn(batch, shape.height, shape.width, shape.channels, device=device)
        return whole.to(DTYPES[dtype]).permute(0, 3, 1, 2)

    leaves = [image().requires_grad_(), image().requires_grad_()]
    if weighting.alpha is not None:
        alpha = weighting.alpha(leaves[0]).detach().to(device, DTYPES[dtype])
        leaves.append(alpha.requires_grad_(weighting.name != "per sample, relu"))
    grad_y = image()

    def eager() -> Tensor:
        x, residual, *alpha = leaves
        return weighting.eager(x, residual, alpha[0] if alpha else residual)

    def ours() -> Tensor:
        x, residual, *alpha = leaves
        return residual_add(
            x,
            residual,
            alpha[0] if alpha else weighting.constant,
            weighting.beta,
            activation=weighting.activation,
        )

    if not _check(session, weighting, leaves, grad_y, eager, ours, f"{case} {dtype}"):
        return
    wanted = [t for t in leaves if t.requires_grad]
    for direction in ("forward", "backward"):
        calls: dict[str, Callable[[], object]] = {EAGER: eager, RESOPS: ours}
        if direction == "backward":
            calls = {
                name: _backward(forward(), wanted, grad_y)
                for name, forward in ((EAGER, eager), (RESOPS, ours))
            }
        for threads in session.threads:
            with timing.threads(threads):
                found = timing.alternate(calls, budget_s=session.seconds, device=device)
            session.add_timing(
                "residual_add", case, found, threads, direction=direction, dtype=dtype, batch=batch
            )


def _backward(y: Tensor, wanted: list[Tensor], grad_y: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(y, wanted, grad_y, retain_graph=True)


def _check(
    session: Session,
    weighting: Weighting,
    leaves: list[Tensor],
    grad_y: Tensor,
    eager: Callable[[], Tensor],
    ours: Callable[[], Tensor],
    name: str,
) -> bool:
    """Distance from float64, of y and of every gradient, against eager's: K = 2 (3 for 16 bits).

    The gradient is zeroed where the sum is within rounding of zero: the sign there is open.
    """
    exact_leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    x, residual, *alpha = exact_leaves
    a = alpha[0] if alpha else torch.ones((), dtype=torch.float64, device=x.device)
    exact_y = weighting.eager(x, residual, a)
    unit = torch.finfo(grad_y.dtype).eps / 2
    if weighting.activation == "relu":
        with torch.no_grad():
            scaled = a * x
            near = (scaled + residual).abs() <= 8 * unit * (scaled.abs() + residual.abs())
            grad_y.masked_fill_(near, 0)

    def results(y: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        wanted = [t for t in inputs if t.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, wanted, grad)]

    truth = results(exact_y, exact_leaves, grad_y.double())
    factor = 2.0 if grad_y.dtype == torch.float32 else 3.0
    worst = 0.0
    mine, theirs = (results(call(), leaves, grad_y) for call in (ours, eager))
    for got, other, right in zip(mine, theirs, truth, strict=True):
        scale = right.norm().clamp_min(1e-30)
        error, eagers = ((t.double() - right).norm() / scale for t in (got, other))
        share = float(error / (factor * eagers + 2 * unit + 8 * 2.0**-24))
        worst = max(worst, share if share == share else float("inf"))
    detail = f"y and gradients against float64: {worst:.3g} of the allowed error"
    return session.check(name, worst <= 1, worst, detail, "residual_add")
