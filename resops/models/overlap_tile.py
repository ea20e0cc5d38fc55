"""Overlap-tile inference (Ronneberger, Fischer and Brox, "U-Net", 2015, section 2 and Figure 2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def overlap_tile(
    model: nn.Module,
    image: Tensor,
    tile_size: int | Sequence[int],
    *,
    margin: int | None = None,
    out: Tensor | None = None,
    progress: Callable[[Any], Any] = iter,
) -> Tensor:
    """The output of a network for an image of any size, tile after tile.

    Each tile is computed from itself and a margin around it. Beyond the border of the image the
    margin is its mirror image, so that there is an output for every pixel, also of a network of
    valid convolutions. Only one tile at a time goes to the model's device: ``image`` and ``out``
    may be memory-mapped files.

    The tiles fit without a seam, and the result is that of one large tile, for networks of
    convolutions and norms in evaluation with running statistics, if ``tile_size`` is a multiple of
    the network's total stride (16 for the U-Net of the paper) and nothing outside the margin
    reaches the tile. Instance norm and bilinear upsampling look at a whole tile.

    Args:
        model: takes (N, C, *spatial), and returns the middle of the image with other channels;
            in evaluation.
        image: (N, C, *spatial), with any number of spatial dimensions.
        tile_size: of the output of one call, the same for every dimension, or one each.
        margin: pixels on each side of a tile; None for ``model.margin``.
        out: where to write, (N, classes, *spatial); None for a new tensor beside ``image``.
        progress: called with the list of tiles, of which it iterates: ``tqdm.tqdm`` shows a bar.

    Returns:
        (N, classes, *spatial), of the size of ``image``.

    Raises:
        ValueError: an image without spatial dimensions or pixels; a tile_size or margin that is no
            size; no margin at all; a model whose output is smaller than a tile, or not in the
            middle of it; an ``out`` of another size.
    """
    spatial = tuple(image.shape[2:])
    tile = (tile_size,) * len(spatial) if isinstance(tile_size, int) else tuple(tile_size)
    if margin is None:
        margin = getattr(model, "margin", None)
        if not isinstance(margin, int):
            raise ValueError(f"margin has to be given: {type(model).__name__} has none of its own")
    if not spatial or 0 in image.shape:
        raise ValueError(
            f"image must be (N, C, *spatial) and not empty, but got {tuple(image.shape)}"
        )
    if len(tile) != len(spatial) or min(tile) < 1 or margin < 0:
        raise ValueError(
            f"tile_size must be positive in {len(spatial)} dimensions, and margin not negative, "
            f"but got {tile_size} and {margin}"
        )
    device = next((p.device for p in model.parameters()), image.device)
    starts = list(itertools.product(*(range(0, n, t) for n, t in zip(spatial, tile, strict=True))))
    for start in progress(starts):
        block = mirrored_block(
            image, [(s - margin, s + t + margin) for s, t in zip(start, tile, strict=True)]
        )
        y = _middle(model(block.to(device)), block.shape[2:], tile, margin)
        if out is None:
            out = y.new_empty((*y.shape[:2], *spatial), device=image.device)
        if out.shape != (*y.shape[:2], *spatial):
            expected = (*y.shape[:2], *spatial)
            raise ValueError(f"out must be of size {expected}, but got {tuple(out.shape)}")
        target = out[_place(start, (s + t for s, t in zip(start, tile, strict=True)))]
        target.copy_(y[_place((0,) * len(spatial), target.shape[2:])])
    assert out is not None
    return out


def _place(begins: Iterable[int], ends: Iterable[int]) -> tuple[slice, ...]:
    """An index of these positions in every sample and channel."""
    return slice(None), slice(None), *(slice(*pair) for pair in zip(begins, ends, strict=True))


def _middle(y: Tensor, block: Sequence[int], tile: Sequence[int], margin: int) -> Tensor:
    """The tile in the output of the network for a block around it."""
    begins: list[int] = []
    for output, size, wanted in zip(y.shape[2:], block, tile, strict=True):
        before = margin - (size - output) // 2
        if (size - output) % 2 or before < 0 or before + wanted > output:
            raise ValueError(
                f"of a tile of {wanted} with a margin of {margin} the network returns {output}: "
                "take a larger margin, or a tile_size that is a multiple of its stride"
            )
        begins.append(before)
    return y[_place(begins, (begin + n for begin, n in zip(begins, tile, strict=True)))]


def mirrored_block(image: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """A part of an image that may reach beyond it, where the image is mirrored at its border pixels
    (which are not repeated), as often as needed.

    Args:
        image: (N, C, *spatial).
        bounds: first position and the one after the last, for every spatial dimension.
    """
    index: list[Any] = [slice(None), slice(None)]
    for i, ((begin, end), size) in enumerate(zip(bounds, image.shape[2:], strict=True)):
        period = max(2 * (size - 1), 1)  # there and back
        positions = torch.arange(begin, end, device=image.device) % period
        positions = torch.minimum(positions, period - positions) if size > 1 else positions * 0
        index.append(positions.view(-1, *[1] * (len(bounds) - 1 - i)))
    return image[tuple(index)]
