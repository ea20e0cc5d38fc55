"""What an activation was computed from, for those who need it in a backward pass.

The output y = act( norm(c) ) of a block is a function of c, which the backward pass of the block
keeps anyway, and of vectors. So whoever needs y in a backward pass of its own, a convolution or a
max pooling, keeps c, whose memory is there already, and computes y again
(docs/math/double_conv.md).

The node of y in the autograd graph says what its source is, as long as that is kept: a checkpoint
or an offloading hook takes c away, an operation in place puts another node in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .convolution import Input, Norm


class Recipe(NamedTuple):
    """How an activation is computed from its source, beside tensors."""

    backend: str
    activation: str
    negative_slope: float


class StandIn(torch.autograd.Function):
    """Zeros of the size of x, at x's place in the graph and without its memory.

    A second derivative needs the place of a tensor that is computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


class Source(NamedTuple):
    """An activation as its consumers keep it."""

    recipe: Recipe
    stand_in: Tensor
    c: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def value(self) -> Tensor:
        """The activation; differentiable where a graph is recorded."""
        statistics = (self.mean, self.invstd)
        norm = Norm(
            self.weight,
            self.bias,
            *statistics,
            self.recipe.activation,
            self.recipe.negative_slope,
        )
        y = Input(self.c, norm).value(self.recipe.backend)
        return y + self.stand_in if torch.is_grad_enabled() else y


class Published:
    """What the node of an activation knows about its source.

    It does not keep c alive: whether that is kept is up to the hooks of the graph.
    """

    def __init__(
        self,
        recipe: Recipe,
        y: Tensor,
        c: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self.recipe, self.c = recipe, TensorWeakRef(c)
        self.statistics = (mean, invstd)
        self.affine = [None if t is None else t.detach() for t in (weight, bias)]
        self.versions = self._versions(y)

    def _versions(self, y: Tensor) -> list[int]:
        return [t._version for t in (y, *self.affine) if t is not None]

    def source(self, y: Tensor) -> Source | None:
        """That of ``y``, if it is still what it was computed from."""
        c = self.c()
        if c is None or self._versions(y) != self.versions:
            return None
        return Source(self.recipe, StandIn.apply(y), c, *self.statistics, *self.affine)


def source_of(y: Tensor) -> Source | None:
    """What y was computed from, where a consumer had better keep that."""
    # A compiler decides by itself what to compute again.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _in_checkpoint():
        return None
    published = getattr(y.grad_fn, "published", None)  # nodes of torch have no such attribute
    return published.source(y) if isinstance(published, Published) else None


def _in_checkpoint() -> bool:
    """Whether a checkpoint records this call, or makes it again. Both times it has to keep as many
    tensors of the same sizes, but only once may what y was computed from be there."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (
        hooks is not None
        and getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__
    )


class Kept(NamedTuple):
    """Tensors in the order in which a Function saves them, and what they stand for."""

    recipes: list[Recipe | None]  # of each activation; None of a tensor that is saved as it is
    tensors: list[Tensor | None]

    @classmethod
    def of(cls, activations: Sequence[Tensor], sources: Sequence[Source | None]) -> Kept:
        recipes: list[Recipe | None] = []
        tensors: list[Tensor | None] = []
        for t, source in zip(activations, sources, strict=True):
            recipes.append(None if source is None else source.recipe)
            tensors += [t] if source is None else source[1:]
        return cls(recipes, tensors)


def restored(recipes: Sequence[Recipe | None], saved: list[Any]) -> list[Tensor]:
    """The activations of which a Function saved what :class:`Kept` says; they are taken off the
    front of ``saved``."""
    activations = []
    for recipe in recipes:
        if recipe is None:
            activations.append(saved.pop(0))
        else:
            count = len(Source._fields) - 1
            activations.append(Source(recipe, *saved[:count]).value())
            del saved[:count]
    return activations
