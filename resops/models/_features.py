"""Feature maps of a network in place of its logits: ``features_only`` and ``out_indices``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class FeatureMap(NamedTuple):
    """One of the feature maps of a network.

    Attributes:
        module: qualified name of the module whose output it is.
        channels: C of its (N, C, H, W).
        reduction: the image's height and width divided by the map's, up to rounding.
    """

    module: str
    channels: int
    reduction: int


class Backbone(nn.Module):
    """A network that returns logits, or the feature maps that :meth:`keep_features` asked for.

    A subclass lists its maps in ``feature_info``, shallow ones first, has its children in the order
    in which they are called, and defines ``forward_features``, ``forward_head`` and
    ``forward_intermediates``.
    """

    feature_info: tuple[FeatureMap, ...]  # of the maps that forward can return
    out_indices: tuple[int, ...] | None = None  # those that it returns; None for logits

    def keep_features(self, out_indices: Sequence[int] | None = None) -> None:
        """Let ``forward`` return feature maps, and remove the modules that these do not need.

        The modules that stay keep their names: a checkpoint of the whole network loads with
        ``strict=False``.

        Args:
            out_indices: of ``feature_info``, in any order, which becomes that of the maps; negative
                ones count from its end; None for all.

        Raises:
            ValueError: an index that there is not, or the same one twice.
        """
        count = len(self.feature_info)
        asked = tuple(range(count)) if out_indices is None else tuple(out_indices)
        indices = tuple(i + count if i < 0 else i for i in asked)
        known = all(0 <= i < count for i in indices)
        if not indices or not known or len(set(indices)) != len(indices):
            raise ValueError(
                f"out_indices must be different indices of the {count} feature maps, from 0 to "
                f"{count - 1}, but got {list(asked)}"
            )
        _remove_after(self, self.feature_info[max(indices)].module)
        self.out_indices = indices
        self.feature_info = tuple(self.feature_info[i] for i in indices)

    def forward_features(self, x: Tensor) -> Tensor:
        """What the head takes."""
        raise NotImplementedError

    def forward_head(self, x: Tensor) -> Tensor:
        """The logits, (N, num_classes)."""
        raise NotImplementedError

    def forward_intermediates(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps with these indices of the whole network's ``feature_info``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(N, in_chans, H, W) to the logits, or to the feature maps."""
        if self.out_indices is None:
            return self.forward_head(self.forward_features(x))
        return self.forward_intermediates(x, self.out_indices)


def _remove_after(module: nn.Module, name: str) -> None:
    """Remove what is called after the submodule ``name``."""
    first, _, rest = name.partition(".")
    if rest:
        _remove_after(module.get_submodule(first), rest)
    names = [child for child, _ in module.named_children()]
    for child in names[names.index(first) + 1 :]:
        delattr(module, child)
