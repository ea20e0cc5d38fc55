"""Planted bugs in the Triton kernels, each with the quick call of tests/interpreter that sees it.

Triton's interpreter runs a kernel as Python, so that the switches work inside of kernels too."""

from __future__ import annotations

from tests.lanes.mutants import Edit, Mutant, bug

ACTIVATION = "triton_kernels/activation.py"
BATCH_NORM = "triton_kernels/batch_norm_kernels.py"
RESIDUAL_ADD = "triton_kernels/residual_add.py"
DENSE_BLOCK = "triton_kernels/dense_block.py"
CONV = "triton_kernels/conv_bn_act_kernels.py"
CONV_LAUNCHERS = "triton_kernels/conv_bn_act.py"


def interpreted(op: str, name: str) -> str:
    return f"tests/interpreter/test_{op}.py::test_interpreted[{name}]"


def conv(name: str) -> str:
    return interpreted("conv_bn_act", name)


def batch_norm(name: str) -> str:
    return interpreted("batch_norm", name)


MUTANTS: list[Mutant] = [
    # ---- activation -----------------------------------------------------------------------------
    bug(
        "Triton: NaN dropped by ReLU",
        Edit(ACTIVATION, "tl.where(z <= 0, 0.0, z)", "tl.where(z > 0, z, 0.0)"),
        batch_norm("zero_and_nan_at_relu"),
    ),
    bug(
        "Triton: gradient of leaky_relu without its slope",
        Edit(ACTIVATION, "tl.where(blocked, g * slope, g)", "tl.where(blocked, 0.0, g)"),
        interpreted("residual_add", "rule_R-plain-leaky_relu"),
    ),
    bug(
        "Triton: tail of gelu cancelled",
        Edit(ACTIVATION, "z > -3", "z < 99"),
        batch_norm("gelu_far_below_zero"),
    ),
    # ---- batch_norm -----------------------------------------------------------------------------
    bug(
        "Triton: mask of batch_norm set at 0",
        Edit(BATCH_NORM, "tl.where(z <= 0, 0, 1)", "tl.where(z < 0, 0, 1)"),
        batch_norm("zero_and_nan_at_relu"),
    ),
    bug(
        "Triton: lanes of a cut-off tile counted as full",
        Edit(BATCH_NORM, "tl.where(valid, steps, whole_steps)", "tl.where(valid, steps, steps)"),
        batch_norm("constant_channels"),
        batch_norm("large_means"),
    ),
    bug(
        "Triton: merge of lanes of unequal length as of equal ones",
        Edit(BATCH_NORM, "count / tl.maximum(total, 1.0)", "1.0 / count.shape[AXIS]"),
        batch_norm("large_means"),
    ),
    bug(
        "Triton: merge of lanes without the distance of their means",
        Edit(BATCH_NORM, "m2 + apart * apart * count", "m2"),
        batch_norm("large_means"),
    ),
    bug(
        "Triton: running variance biased",
        Edit(BATCH_NORM, "tl.cast(unbiased, tl.float32)", "1.0"),
        batch_norm("rule_R-relu-channels_last"),
    ),
    bug(
        "Triton: elements past the end of a tensor written",
        Edit(BATCH_NORM, "valid & (column < left)", "valid"),
        batch_norm("rule_R-relu-channels_last"),
    ),
    # ---- residual_add ---------------------------------------------------------------------------
    bug(
        "Triton: complement of alpha added, not subtracted",
        Edit(RESIDUAL_ADD, "1.0 - alpha", "1.0 + alpha"),
        interpreted("residual_add", "rule_R-per_sample_complement-relu"),
    ),
    # ---- dense_block ----------------------------------------------------------------------------
    bug(
        "Triton: mask of a consumer without its bias",
        Edit(
            DENSE_BLOCK,
            "pre_activation(centred, scale, bias) <= 0",
            "pre_activation(centred, scale, 0.0 * bias) <= 0",
        ),
        interpreted("dense_block", "definition-float32-12"),
    ),
    bug(
        "Triton: the sum over consumers stored, not added to",
        Edit(
            DENSE_BLOCK,
            "tl.load(places, mask=valid, other=0.0).to(tl.float32)",
            "0.0 * tl.load(places, mask=valid, other=0.0).to(tl.float32)",
        ),
        interpreted("dense_block", "definition-float32-12"),
    ),
    bug(
        "Triton: last consumer's running statistics left out",
        Edit(
            DENSE_BLOCK,
            "tl.static_range(len(running_mean_ptrs))",
            "tl.static_range(len(channels) - 1)",
        ),
        interpreted("dense_block", "running_statistics-float32"),
    ),
    bug(
        "Triton: running variance of a block's consumers biased",
        Edit(DENSE_BLOCK, "tl.cast(unbiased, tl.float32)", "1.0"),
        interpreted("dense_block", "running_statistics-float32"),
    ),
    # ---- conv_bn_act: forward -------------------------------------------------------------------
    bug(
        "Triton: padding does not stay zero under the prologue",
        Edit(CONV, "tl.where(read[:, None], a, 0.0)", "a"),
        conv("geometry-1x1_padded"),
    ),
    bug(
        "Triton: the table of what is inside leaves the padding out",
        Edit(CONV, "tl.where(across, padding_width, padding_height)", "0"),
        conv("geometry-1x1_padded"),
    ),
    bug(
        "Triton: stride applied to the padding too",
        Edit(
            CONV,
            "out_y * stride_height - padding_height",
            "(out_y - padding_height) * stride_height",
        ),
        conv("geometry-3x3_stride_2"),
    ),
    bug(
        "Triton: channels past the end of a sum taken from the next pixel",
        (
            Edit(
                CONV,
                "inside[:, None] if WHOLE else inside[:, None] & known[None, :]",
                "inside[:, None]",
            ),
            Edit(CONV, "b_valid & known[:, None]", "b_valid"),
        ),
        conv("geometry-1x1_stride_2"),
    ),
    bug(
        "Triton: last pixel of y not written",
        Edit(
            CONV,
            "(row < rows)[:, None] & known[None, :]",
            "(row + 1 < rows)[:, None] & known[None, :]",
        ),
        conv("geometry-1x1_stride_2"),
    ),
    bug(
        "Triton: statistics of values that are not rounded",
        Edit(CONV, "tl.where(valid, y.to(tl.float32), 0.0)", "tl.where(valid, acc, 0.0)"),
        conv("geometry-1x1_stride_2"),
    ),
    bug(
        "Triton: rows that do not exist are in the statistics",
        Edit(CONV, "tl.where(valid, y.to(tl.float32), 0.0)", "y.to(tl.float32)"),
        conv("large_means"),
    ),
    bug(
        "Triton: tiles merged with equal weights",
        Edit(
            CONV,
            "tl.minimum(tl.maximum(rows - tile * TILE_ROWS, 0), TILE_ROWS).to(tl.float32)",
            "tl.where(tile < tiles, TILE_ROWS, 0).to(tl.float32)",
        ),
        conv("large_means"),
    ),
    # ---- conv_bn_act: backward ------------------------------------------------------------------
    bug(
        "Triton: first tap of a residue class reads the first pixel of the next",
        Edit(
            CONV_LAUNCHERS,
            "divmod(residue + padding - first * dilation, stride)",
            "divmod(residue + padding, stride)",
        ),
        conv("geometry-3x3_stride_2"),
    ),
    bug(
        "Triton: gradient of the data without the addend",
        Edit(
            CONV,
            "tl.load(addend_ptr + offsets, mask=valid, other=0.0).to(tl.float32)",
            "0.0",
        ),
        conv("geometry-1x1_stride_2"),
    ),
    bug(
        "Triton: sums of a gradient that is not rounded",
        Edit(CONV, "tl.where(valid, g.to(tl.float32), 0.0)", "tl.where(valid, acc, 0.0)"),
        conv("geometry-1x1_stride_2"),
    ),
    bug(
        "Triton: dilation forgotten in the gradient of the weight",
        Edit(CONV, "tap // TAPS_ACROSS * dilation_height", "tap // TAPS_ACROSS"),
        conv("geometry-3x2_uneven"),
    ),
    bug(
        "Triton: padding is not zero in the gradient of the weight",
        Edit(CONV, "tl.where(read[None, :], a, 0.0)", "a"),
        conv("geometry-1x1_padded"),
    ),
    bug(
        "Triton: tail of a part of the pixels left out",
        Edit(CONV, "range(0, end, DEPTH)", "range(0, end - end % DEPTH, DEPTH)"),
        conv("large_means"),
    ),
    bug(
        "Triton: a slice's gradient written to the first slice's place",
        Edit(CONV, "(first_channel + channel)[:, None]", "channel[:, None]"),
        conv("slices"),
    ),
    bug(
        "Triton: last part of the pixels not added",
        Edit(CONV, "range(parts)", "range(parts - 1)"),
        conv("any_number_of_parts"),
    ),
]
