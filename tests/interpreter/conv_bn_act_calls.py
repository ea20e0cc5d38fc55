"""Calls of the Triton conv_bn_act under Triton's interpreter, on CPU tensors.

Run by test_conv_bn_act.py in a process of its own, since TRITON_INTERPRET counts when Triton is
imported. Shapes are tiny, and so are the tiles, so that every call has several of them.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resops import tune
from resops.reference import conv_bn_act as reference
from tests.interpreter.kernels import guarded_memory, import_kernels
from tests.interpreter.test_conv_bn_act import ACTIVATIONS, GEOMETRIES, NAMES
from tests.ops.conv_phases_oracle import ConvCase, random_case
from tests.tensors import Guarded, guarded, in_layout, lazy_zeros

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = torch.channels_last

kernels = import_kernels("conv_bn_act")
tiles = import_kernels("tiles")


def run(case: ConvCase, tile: tuple[int, int, int] = (32, 16, 16)) -> dict[str, Tensor]:
    """Our outputs; a write outside of an output or into an input is an error."""
    names = [name for name, t in vars(case).items() if isinstance(t, Tensor)]
    tensors = [*case.inputs, *(getattr(case, name) for name in names)]
    before = [t.clone() for t in tensors]
    with guarded_memory(), tiles.forced(tiles.Tile(*tile, 4, 2)):
        ours = case.run(kernels)
    for t, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)
    return ours


def check(case: ConvCase, tile: tuple[int, int, int] = (32, 16, 16)) -> dict[str, Tensor]:
    """Rule R; tensors of several dimensions are channels-last."""
    ours = run(case, tile)
    case.check(ours)
    for name in ("y", "g", "grad_weight"):
        assert ours[name].is_contiguous(memory_format=LAST), name
    return ours


def geometry(name: str) -> None:
    """Without a prologue and with one, in two of the dtypes; channels that fill no tile."""
    kernel, stride, padding, dilation = GEOMETRIES[name]
    turn = list(GEOMETRIES).index(name)
    shapes: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    taps = kernel[0] * kernel[1]
    # The interpreter takes its time for every step of a sum: many taps, large tiles, one dtype. Two
    # tiles of rows where the stride is 1.
    tile = (32, 16, 16) if taps <= 4 else (32, 32, 32)
    size = (2, 19, 5, 4) if max(stride) == 1 else (2, 19, 7, 6)
    if taps >= 25:
        size = (1, 19, 7, 6) if taps == 25 else (1, 3, 11, 10)
    prologues = (None, ("relu", "silu")[turn % 2]) if taps < 25 else ("relu",)
    for i, prologue in enumerate(prologues):
        dtype = DTYPES[(turn + i) % 3]
        case = random_case(size, 18, kernel, dtype, prologue=prologue, addend=True, **shapes)
        check(replace(case, statistics=True), tile)


def prologue_and_epilogue(activation: str) -> None:
    """The activation before and after the convolution; every subset of the epilogue."""
    for i, (bias, residual) in enumerate(itertools.product([False, True], repeat=2)):
        case = random_case(
            (2, 17, 3, 5),
            20,
            ((1, 1), (2, 1))[i % 2],
            DTYPES[i % 3],
            prologue=activation,
            bias=bias,
            residual=residual,
            addend=residual,
            activation=activation,
            padding=((0, 0), (1, 0))[i % 2],
        )
        if bias:
            case = replace(case, conv_bias=torch.randn(20).to(case.dtype))
        check(case)


def slices() -> None:
    """Several inputs, of any widths, give what the definition gives of their concatenation."""
    for widths, kernel in (
        ((5, 20), (1, 1)),
        ((8,) * 6, (1, 1)),
        ((5, 20), (1, 3)),
        ((16, 1, 17), (2, 1)),
    ):
        padding = (kernel[0] // 2, kernel[1] // 2)
        size = (2, sum(widths), 3, 3)
        check(random_case(size, 7, kernel, slices=widths, prologue="relu", padding=padding))


def parts_of_wider_tensors() -> None:
    """They are read where they are, and nothing of what is around them: that is NaN."""
    wide = torch.full((2, 40, 4, 5), math.nan).contiguous(memory_format=LAST)
    for first, size in ((0, 16), (3, 20), (24, 16)):
        case = random_case((2, size, 4, 5), 9, (1, 3), prologue="relu", padding=(0, 1))
        wide[:] = math.nan
        wide[:, first : first + size] = case.x
        part = wide[:, first : first + size]
        assert kernels.by_pixel(part)[0] is part
        ours, dense = check(replace(case, inputs=[part]), (64, 16, 32)), run(case, (64, 16, 32))
        for name, t in ours.items():
            assert torch.equal(t, dense[name]), name


def every_layout() -> None:
    """Any strides, and other ones for each operand; no NaN of the gaps comes in."""
    names = (
        "channels_last",
        "padded_channels_last",
        "contiguous",
        "every_second",
        "all_reversed",
        "expanded_batch",
    )
    for i in range(len(names)):
        case = random_case(
            (2, 5, 3, 4), 6, (1, 2), residual=True, addend=True, prologue="silu", padding=(0, 1)
        )
        memory: list[Guarded] = []

        def placed(t: Tensor | None, j: int, i: int = i, memory: list[Guarded] = memory) -> Tensor:
            assert t is not None
            memory.append(guarded(t, names[(i + j) % len(names)]))
            return memory[-1].tensor

        check(
            replace(
                case,
                inputs=[placed(case.inputs[0], 0)],
                conv_weight=placed(case.conv_weight, 1),
                residual=placed(case.residual, 2),
                grad_y=placed(case.grad_y, 3),
                addend=placed(case.addend, 4),
            )
        )
        for m in memory:
            m.assert_untouched()


def offsets_beyond_2_31() -> None:
    """Pixels 2^30 elements apart, read where they are: gigabytes of addresses, a few pages."""
    step = 2**30 + 16

    def far(t: Tensor) -> Tensor:
        memory = lazy_zeros(2 * step + t.size(1), t.dtype)
        view = memory.as_strided(t.shape, (3 * step, 1, 3 * step, step)).copy_(t)
        assert kernels.by_pixel(view)[0] is view
        return view

    near = random_case((1, 4, 1, 3), 5, (1, 3), torch.float16, prologue="relu", padding=(0, 1))
    case = replace(near, inputs=[far(near.x)], grad_y=far(near.grad_y))
    with tiles.forced(tiles.Tile(16, 16, 16, 4, 2)):
        ours, expected = case.run(kernels), near.run(kernels)
    for name, t in ours.items():
        assert torch.equal(t, expected[name]), name


def one_pixel_in_either_layout() -> None:
    """Sizes of 1, whose strides mean nothing."""
    for size in ((3, 20, 1, 1), (1, 1, 3, 4), (1, 5, 1, 7), (4, 1, 1, 1)):
        case = random_case(size, 3, prologue="relu", statistics=True)
        for layout in ("contiguous", "channels_last"):
            check(replace(case, inputs=[in_layout(case.x, layout)]))


def large_means() -> None:
    """Statistics of values far from 0, where E[y^2] - E[y]^2 fails."""
    for offset in (1e2, 1e4):
        case = random_case((3, 8, 5, 5), 6, statistics=True, bias=True)
        assert case.conv_bias is not None
        check(replace(case, conv_bias=offset * torch.tensor([1.0, -1, 1, -1, 1, 0])))


def many_tiles() -> None:
    """More tiles than the first stage of a merge takes together."""
    case = random_case((5, 3, 16, 16), 4, prologue="relu", statistics=True)
    check(case)


def nan_and_infinity() -> None:
    """They reach what they are a part of, through every activation, and nothing else."""
    piecewise = ("identity", "relu", "leaky_relu")  # of -inf the others may make a NaN
    for value, activation in [
        *((math.nan, activation) for activation in ACTIVATIONS),
        *((math.inf, activation) for activation in piecewise),
    ]:
        clean = random_case(
            (2, 6, 3, 4), 5, (1, 2), prologue=activation, activation=activation, padding=(0, 1)
        )
        clean = replace(clean, scale=torch.rand(6) + 0.5)
        x = clean.x.clone()
        x[1, 2, 0, 0] = value
        case = replace(clean, inputs=[x])
        ours, defined, expected = run(case), case.run(reference), run(clean)
        for name in ("y", "g", "sum_g", "grad_weight"):
            assert torch.equal(ours[name].isnan(), defined[name].isnan()), (name, value, activation)
        untouched = defined["y"].isfinite() & clean.run(reference)["y"].isfinite()
        untouched[1, :, :2, :2] = False
        assert torch.equal(ours["y"][untouched], expected["y"][untouched])


def zero_and_nan_at_relu() -> None:
    """The gradient passes where the argument of relu is NaN, and not where it is 0 or -0."""
    x = torch.tensor([math.nan, 0.0, -0.0, 1.0, -1.0, math.inf]).view(-1, 1, 1, 1)
    one, zero = torch.ones(1), torch.zeros(1)
    weight = torch.ones(1, 1, 1, 1)
    geometry: Any = ([1, 1], [0, 0], [1, 1])
    with tiles.forced(tiles.Tile(16, 16, 16, 4, 2)):
        g, *_ = kernels.conv_bn_act_backward_data(
            torch.full_like(x, 2.0),
            weight,
            list(x.shape),
            *(x, one, zero, "relu", 0.0, None, None, None),
            *geometry,
        )
    assert torch.equal(g.flatten(), torch.tensor([2.0, 0.0, 0.0, 2.0, 0.0, 2.0]))


def same_bits_every_time() -> None:
    case = random_case((2, 20, 4, 5), 18, (1, 2), prologue="relu", statistics=True, padding=(0, 1))
    first = run(case)
    for name, t in run(case).items():
        assert torch.equal(t, first[name]), name


def any_number_of_parts() -> None:
    """The gradient of the weight, its pixels cut into any number of parts."""
    case = random_case((3, 5, 7, 9), 6, (1, 3), torch.float16, prologue="relu", padding=(0, 1))
    before = kernels._parts
    try:
        for parts in (1, 2, 5, 11):
            kernels._parts = lambda *_, parts=parts: parts
            with guarded_memory(), tiles.forced(tiles.Tile(32, 16, 16, 4, 2)):
                case.check(case.backward_weight(kernels))
    finally:
        kernels._parts = before


def any_tile() -> None:
    case = random_case((2, 40, 3, 5), 37, (1, 2), prologue="relu", statistics=True, padding=(0, 1))
    for tile in ((32, 16, 64), (16, 64, 32), (64, 32, 16)):
        check(case, tile)
    with guarded_memory():  # as the table has it
        case.check(case.run(kernels))


def strides_without_zeros_between() -> None:
    """Of what the gradient of the input of a strided convolution allocates, only that gradient and
    the copy of x in channels-last are larger than the gradient of the output: no zeros are put
    between its pixels."""
    case = random_case((2, 5, 12, 12), 6, (3, 3), prologue="relu", stride=(2, 2), padding=(1, 1))
    with guarded_memory() as made, tiles.forced(tiles.Tile(32, 16, 16, 4, 2)):
        found = case.backward_data(kernels)
    case.check(found)
    large = [t.tensor.shape for t in made if t.tensor.numel() > case.grad_y.numel()]
    assert set(large) == {case.x.shape}, large


def every_entry_of_the_table() -> None:
    """Each tile in the phase that it is there for, alone; a tile of several classes that differ in
    their columns only, once."""
    entries = {(bits, *name.split()[:3], tile) for (_, bits, name), tile in tiles.TABLE.items()}
    assert len(entries) > 40
    for bits, phase, taps, prologue, tile in sorted(entries, key=str):
        kernel, padding = ((1, 1), (0, 0)) if taps == "1x1" else ((3, 3), (1, 1))
        dtype = torch.float16 if bits == 16 else torch.float32
        before = "relu" if prologue == "prologue" else None
        case = random_case(
            (1, 20, 3, 4), 18, kernel, dtype, prologue=before, statistics=True, padding=padding
        )
        with tiles.forced(tile):
            case.check(getattr(case, phase)(kernels))


def tuner() -> None:
    """It takes the fastest tile that is right, and none that is wrong or does not run."""
    small, large, wrong, broken = (tiles.Tile(rows, 16, 16, 4, 2) for rows in (16, 32, 64, 128))
    shape = tune.Shape(5, 3, 6)
    genuine = {name: getattr(kernels, f"conv_bn_act_{name}") for name in tiles.PASSES}
    times = {small: 2.0, large: 1.0, wrong: 0.1, broken: 0.0}

    def launch(name: str, *arguments: Any) -> Any:
        if tiles._forced == broken:
            raise RuntimeError("out of registers")
        result = genuine[name](*arguments)
        if tiles._forced == wrong:  # in one element
            (result if name == "backward_weight" else result[0])[-1, -1, -1, -1] += 0.25
        return result

    for name in tiles.PASSES:
        setattr(kernels, f"conv_bn_act_{name}", functools.partial(launch, name))
    messages: list[str] = []
    try:
        table = tune.tune(
            [shape],
            2,
            torch.float32,
            torch.device("cpu"),
            lambda call: (call(), times[tiles._forced])[1],
            list(times),
            messages.append,
        )
    finally:
        for name in tiles.PASSES:
            setattr(kernels, f"conv_bn_act_{name}", genuine[name])
    expected = {
        (0, 32, tune.class_of(shape, phase, prologue)): large
        for phase in tiles.PASSES
        for prologue in (False, True)
    }
    assert table == expected, table
    for words in ("does not run: out of registers", "is wrong for Shape(channels=5"):
        assert sum(words in message for message in messages) == len(expected), messages


def tuner_in_16_bits() -> None:
    """The check before the timing lets an honest tile pass: 3x3, stride 2. (Not in bfloat16, to
    which the interpreter truncates.)"""
    tile, shape = tiles.Tile(32, 32, 32, 4, 2), tune.Shape(5, 4, 4, 3, 2)
    messages: list[str] = []
    table = tune.tune(
        [shape], 2, torch.float16, torch.device("cpu"), lambda _: 1.0, [tile], messages.append
    )
    assert len(table) == 6 and set(table.values()) == {tile}, messages


def empty() -> None:
    """No image at all: nothing in y and g, zeros elsewhere."""
    case = random_case((0, 5, 3, 4), 6, (3, 3), prologue="relu", statistics=True, padding=(1, 1))
    ours, defined = run(case), case.run(reference)
    for name, t in ours.items():
        assert torch.equal(t, defined[name]), name


def refused() -> None:
    """One sentence for each, before a kernel runs."""
    good = random_case((2, 4, 5, 5), 6, (3, 3), prologue="relu")
    x, weight = good.x, good.conv_weight

    def raises(error: type[Exception], text: str, case: ConvCase, *phases: str) -> None:
        for phase in phases or ("forward", "backward_data", "backward_weight"):
            with pytest.raises(error, match=text):
                getattr(case, phase)(kernels)

    def changed(**fields: Any) -> ConvCase:
        return replace(good, **fields)

    other = torch.ones(3)
    raises(NotImplementedError, "torch.float64", good.wide())
    raises(NotImplementedError, "mish", changed(prologue="mish"))
    raises(NotImplementedError, "mish", changed(activation="mish"), "forward")
    raises(ValueError, "groups", changed(conv_weight=weight[:, :2]), "forward", "backward_weight")
    raises(ValueError, "groups", changed(inputs=[x[:, :2]]), "forward", "backward_weight")
    raises(ValueError, "stride should be two", changed(stride=(0, 1)))
    raises(ValueError, "stride should be two", changed(stride=(1, 1, 1)))
    raises(ValueError, "padding should be two", changed(padding=(-1, 0)))
    raises(ValueError, "dilation should be two", changed(dilation=(1, 0)))
    raises(ValueError, "smaller than the kernel", changed(dilation=(4, 4)))
    raises(ValueError, "scale should be torch.float32 of size", changed(scale=other))
    raises(ValueError, "shift should be torch.float32", changed(shift=torch.ones(4).half()))
    raises(ValueError, "scale and shift must", changed(shift=None))
    raises(
        ValueError, "without scale", changed(scale=None, shift=None), "forward", "backward_weight"
    )
    raises(ValueError, "grad_y should be", changed(grad_y=good.grad_y[:1]), "backward_data")
    raises(ValueError, "grad_y should be", changed(grad_y=good.grad_y.half()), "backward_weight")
    raises(ValueError, "conv_weight should be", changed(conv_weight=weight.half()), "forward")
    raises(ValueError, "residual should be", changed(residual=x), "forward")
    raises(ValueError, "conv_bias should be", changed(conv_bias=other), "forward")
    raises(ValueError, "addend should be", changed(addend=x[:1]), "backward_data")
    raises(ValueError, "mean should be", changed(mean=other), "backward_data")
    raises(ValueError, "mean and invstd", changed(mean=None), "backward_data")
    raises(ValueError, "statistics", changed(statistics=True, activation="relu"), "forward")
    raises(ValueError, "statistics", changed(statistics=True, residual=good.grad_y), "forward")
    raises(ValueError, "at least one tensor", changed(inputs=[]), "forward")
    raises(ValueError, r"inputs\[1\] should be", changed(inputs=[x[:, :2], x[:1, 2:]]), "forward")
    three = changed(inputs=[x[..., 0]], conv_weight=weight[..., 0])
    raises(NotImplementedError, "two spatial dimensions", three, "forward")


CALLS: dict[str, Callable[[], None]] = {
    f"geometry-{name}": functools.partial(geometry, name) for name in GEOMETRIES
}
CALLS |= {
    f"prologue_and_epilogue-{activation}": functools.partial(prologue_and_epilogue, activation)
    for activation in ACTIVATIONS
}
CALLS |= {
    call.__name__: call
    for call in (
        slices,
        parts_of_wider_tensors,
        every_layout,
        offsets_beyond_2_31,
        one_pixel_in_either_layout,
        large_means,
        many_tiles,
        nan_and_infinity,
        zero_and_nan_at_relu,
        same_bits_every_time,
        any_number_of_parts,
        any_tile,
        every_entry_of_the_table,
        strides_without_zeros_between,
        tuner,
        tuner_in_16_bits,
        empty,
        refused,
    )
}
assert set(CALLS) == set(NAMES)
