"""Planted bugs, each with the tests that must catch it. tests/lanes/mutation.py plants and runs.

``original`` is text that occurs exactly once in the file, an expression; ``mutated`` is what stands
there instead while the bug is active. ``statement`` marks a C++ statement. A bug in several places
is a tuple of edits. The first seven are the classical ones; then come those that other
kernels had in the wild, and that other suites did not see.
"""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    file: str
    original: str
    mutated: str
    statement: bool = False


class Mutant(NamedTuple):
    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


KERNELS = "csrc/cpu/batch_norm_kernels.cpp"
DRIVER = "csrc/cpu/batch_norm.cpp"
CHECKS = "csrc/common/tensor_checks.h"
ACTIVATION = "csrc/cpu/activation.h"
SIMD = "csrc/cpu/simd.h"
POOL_KERNELS = "csrc/cpu/batch_norm_act_max_pool_kernels.cpp"
POOL_DRIVER = "csrc/cpu/batch_norm_act_max_pool.cpp"
OP = "resops/ops/batch_norm.py"
NODE = "csrc/autograd/batch_norm.cpp"

NUMERICS = "tests/ops/test_batch_norm_numerics.py"
SHAPES = "tests/ops/test_batch_norm_shapes.py"
LAYOUTS = "tests/ops/test_batch_norm_layouts.py"
AUTOGRAD = "tests/ops/test_batch_norm_autograd.py"
STATE = "tests/ops/test_batch_norm_state.py"
DISPATCH = "tests/ops/test_batch_norm_dispatch.py"
CONCURRENCY = "tests/ops/test_batch_norm_concurrency.py"
ARGUMENTS = "tests/ops/test_batch_norm_arguments.py"
OPINFO = "tests/ops/test_opinfo.py"
NODES = "tests/ops/test_autograd_nodes.py"
POOL = "tests/ops/test_batch_norm_act_max_pool.py"
DENSE_PHASES = "tests/ops/test_dense_block_phases.py"


def bug(name: str, edits: Edit | tuple[Edit, ...], *tests: str) -> Mutant:
    return Mutant(name, (edits,) if isinstance(edits, Edit) else edits, tests)


MUTANTS = [
    # ---- the classical seven ---------------------------------------------------------------------
    bug(
        "one-pass variance",
        (
            Edit(
                KERNELS,
                "middle(values[0][lane], values[1][lane], values[2][lane], values[3][lane])",
                "acc(0)",
            ),
            Edit(KERNELS, "sums.recentre(end - begin)", "false"),
            Edit(KERNELS, "is_far(away, total, merged_m2)", "false"),
            Edit(
                KERNELS, "pilot_shift(plane(span.row_begin, i) + span.begin, pilot)", "acc_t<T>(0)"
            ),
            Edit(KERNELS, "is_far(mean[i] - static_cast<double>(s.shift), total, m2[i])", "false"),
        ),
        f"{NUMERICS}::test_mean_of_many_standard_deviations",
    ),
    bug(
        "statistics in the input's dtype",
        (
            Edit(
                DRIVER,
                "out.mean[c] = merged_mean",
                "out.mean[c] = is_half(x.scalar_type())"
                " ? static_cast<double>(static_cast<at::BFloat16>(merged_mean)) : merged_mean",
            ),
            Edit(
                DRIVER,
                "out.m2[c] = merged_m2",
                "out.m2[c] = is_half(x.scalar_type())"
                " ? static_cast<double>(static_cast<at::BFloat16>(merged_m2)) : merged_m2",
            ),
        ),
        f"{NUMERICS}::test_statistics_of_16_bit_data_are_float32",
    ),
    bug(
        "biased running_var",
        Edit(DRIVER, "v /= m - 1", "v /= m"),
        f"{NUMERICS}::test_momentum",
    ),
    bug(
        "rounded mean",
        Edit(
            DRIVER,
            "out.mean[c] = merged_mean",
            "out.mean[c] = static_cast<double>(static_cast<at::BFloat16>(merged_mean))",
        ),
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "a gradient assumed contiguous",
        Edit(DRIVER, "walk.layout.dense(grad_y)", "grad_y"),
        f"{LAYOUTS}::test_strange_strides_of_one_tensor",
    ),
    bug(
        "n+1",
        Edit(DRIVER, "std::max(m, 1.0)", "std::max(m + 1, 1.0)"),
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "eps outside the root",
        Edit(DRIVER, "1 / std::sqrt(v + eps)", "1 / (std::sqrt(v) + eps)"),
        f"{NUMERICS}::test_variance_about_eps",
    ),
    # ---- statistics -----------------------------------------------------------------------------
    bug(
        "momentum=None treated as 0.1",
        Edit("resops/nn/batch_norm.py", "1.0 / float(norm.num_batches_tracked)", "0.1"),
        f"{STATE}::test_momentum_none_is_the_plain_mean",
    ),
    bug(
        "momentum the other way round",
        Edit(
            DRIVER,
            "(1 - momentum) * static_cast<double>(value) + momentum * batch[c]",
            "momentum * static_cast<double>(value) + (1 - momentum) * batch[c]",
        ),
        f"{NUMERICS}::test_momentum",
    ),
    bug(
        "running statistics updated twice",
        Edit(
            DRIVER,
            "update_running(*running_mean, s.mean, momentum)",
            "(update_running(*running_mean, s.mean, momentum),"
            " update_running(*running_mean, s.mean, momentum))",
        ),
        f"{STATE}::test_statistics_are_updated_once",
    ),
    bug(
        "merge without the distance of the means",
        (
            Edit(
                DRIVER,
                "delta * delta * (n * b / (n + b))",
                "0.0",
            ),
        ),
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "last row of a channels-last tensor left out of the statistics",
        Edit(DRIVER, "walk.tail > 0 && full > 0", "false"),
        f"{SHAPES}::test_channel_tail",
    ),
    bug(
        "an outlier in the first place decides the shift",
        (
            Edit(
                KERNELS,
                "middle(values[0][lane], values[1][lane], values[2][lane], values[3][lane])",
                "values[0][lane]",
            ),
            Edit(KERNELS, "sums.recentre(end - begin)", "false"),
            Edit(
                KERNELS,
                "pilot_shift(plane(span.row_begin, i) + span.begin, pilot)",
                "to_acc(plane(span.row_begin, i)[span.begin])",
            ),
        ),
        f"{NUMERICS}::test_first_value_far_from_the_mean",
    ),
    bug(
        "sums in an order that depends on the number of threads",
        Edit(
            DRIVER,
            "std::max({kPieceElements / walk.width, kPieceRows, ceil_div(walk.rows, kMaxPieces)})",
            "std::max({kPieceElements / walk.width, kPieceRows, ceil_div(walk.rows,"
            " static_cast<int64_t>(at::get_num_threads()))})",
        ),
        f"{CONCURRENCY}::test_any_number_of_threads_gives_the_same_bits",
    ),
    # ---- forward --------------------------------------------------------------------------------
    bug(
        "ReLU mask >= instead of >",
        Edit(SIMD, "~(z.r[i] <= acc(0))", "~(z.r[i] < acc(0))"),
        f"{NUMERICS}::test_relu_backward_at_zero_and_nan",
    ),
    bug(
        "NaN dropped by ReLU",
        Edit(
            SIMD,
            "select(passes(z), z, broadcast(acc(0)))",
            "select(greater(z, acc(0)), z, broadcast(acc(0)))",
        ),
        f"{NUMERICS}::test_nan_is_not_swallowed",
    ),
    bug(
        "gradient stopped at NaN",
        Edit(SIMD, "~(z.r[i] <= acc(0))", "z.r[i] > acc(0)"),
        f"{NUMERICS}::test_relu_backward_at_zero_and_nan",
    ),
    bug(
        "residual ignored in the mask",
        Edit(
            KERNELS,
            "to_bits(passes(z))",
            "to_bits(passes(z - load(residual + c, count)))",
        ),
        f"{NUMERICS}::test_residual_flips_the_sign",
    ),
    bug(
        "residual subtracted",
        Edit(KERNELS, "z = z + residuals.pack[i]", "z = z - residuals.pack[i]"),
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "tail element of a row skipped by apply",
        Edit(
            KERNELS,
            "put<kStream>(y + c, out, count)",
            "put<kStream>(y + c, out, count < kLine<T> ? count - 1 : count)",
        ),
        f"{SHAPES}::test_cache_blocking_shapes",
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "tail element of a plane skipped by the statistics",
        Edit(KERNELS, "d = keep(d, count)", "d = keep(d, count - 1)"),
        f"{SHAPES}::test_vector_tail",
    ),
    bug(
        "negative slope taken for positive",
        Edit(
            ACTIVATION,
            "select(passes(z), z, z * broadcast(negative_slope))",
            "select(passes(z), z, z * broadcast(negative_slope < 0 ? -negative_slope"
            " : negative_slope))",
        ),
        f"{NUMERICS}::test_negative_slopes",
    ),
    bug(
        "|weight| for weight",
        Edit(DRIVER, "scale[c] *= gamma[c]", "scale[c] *= std::abs(gamma[c])"),
        f"{NUMERICS}::test_negative_weight",
    ),
    bug(
        "tanh-like gelu",
        Edit(SIMD, "broadcast(0.254829592f)", "broadcast(0.2548f)"),
        f"{NUMERICS}::test_smooth_activations_far_from_zero",
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "bfloat16 rounded towards zero",
        Edit(SIMD, "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16"),
        f"{NUMERICS}::test_16_bit_results_are_rounded_once",
    ),
    bug(
        "float16 rounded towards zero",
        Edit(SIMD, "0xfff + (bits >> 13 & 1)", "0"),
        f"{NUMERICS}::test_16_bit_results_are_rounded_once",
    ),
    bug(
        "float16 subnormals flushed",
        Edit(SIMD, "magnitude += 0.5f", "magnitude = 0.5f"),
        f"{NUMERICS}::test_eps_is_added_in_float32",
        f"{NUMERICS}::test_smooth_activations_far_from_zero",
        f"{NUMERICS}::test_relu_backward_at_zero_and_nan",
    ),
    bug(
        "output always contiguous",
        Edit(
            "csrc/common/memory_layout.h",
            "at::empty_like(x, x.options(), format)",
            "at::empty_like(x, x.options(), at::MemoryFormat::Contiguous)",
        ),
        f"{LAYOUTS}::test_output_strides_are_those_of_torch",
    ),
    # ---- backward -------------------------------------------------------------------------------
    bug(
        "1 % dscale",
        Edit(
            DRIVER,
            "parameter_grad(weight, need_weight, sums.grad_centred)",
            "parameter_grad(weight, need_weight, [&] { for (double& v : sums.grad_centred)"
            " v *= 1.01; return sums.grad_centred; }())",
        ),
        f"{NUMERICS}::test_16_bit_parameters",
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "gradients of weight and bias exchanged",
        Edit(
            DRIVER,
            "parameter_grad(bias, need_bias, sums.grad)",
            "parameter_grad(bias, need_bias, sums.grad_centred)",
        ),
        f"{NUMERICS}::test_bad_tail_is_visible",
    ),
    bug(
        "evaluation formula in training",
        Edit(DRIVER, "mean_grad.push_back(sum / m)", "mean_grad.push_back(0)"),
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "gradient's mean divided by n-1",
        Edit(
            DRIVER, "mean_grad_xhat.push_back(sum / m)", "mean_grad_xhat.push_back(sum / (m - 1))"
        ),
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "NaN of a frozen input reaches its gradient",
        Edit(KERNELS, "a.grad_slope == nullptr", "false"),
        f"{NUMERICS}::test_relu_backward_at_zero_and_nan",
    ),
    bug(
        "leaky slope missing in the gradient",
        Edit(
            ACTIVATION,
            "select(pass, grad_y, grad_y * broadcast(negative_slope))",
            "select(pass, grad_y, broadcast(acc(0)))",
        ),
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "residual's gradient without the mask",
        Edit(KERNELS, "before.pack[i] = g", "before.pack[i] = gs.pack[i]"),
        f"{NUMERICS}::test_residual_flips_the_sign",
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "residual's gradient without the mask, written by the reduction",
        Edit(KERNELS, "before[r].pack[i] = g", "before[r].pack[i] = gs[r].pack[i]"),
        f"{SHAPES}::test_large_gradients_are_those_of_the_phases",
    ),
    bug(
        "silu's gradient without the residual",
        Edit(
            KERNELS,
            "if constexpr (kResidual) z = z + load(residual + rows * a.width + c, count);",
            ";",
            True,
        ),
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "tail element of a plane skipped by backward_reduce",
        Edit(
            KERNELS,
            "sum_grad[i] += horizontal_sum(s)",
            "sum_grad[i] += horizontal_sum(pending % kLanes ? keep(s, kLanes - 1) : s)",
        ),
        f"{NUMERICS}::test_bad_tail_is_visible",
        f"{NUMERICS}::test_rule_R",
    ),
    bug(
        "mask bits of neighbouring planes overlap",
        Edit(DRIVER, "mask_step = ceil_div(spatial, 8)", "mask_step = spatial / 8"),
        f"{NUMERICS}::test_residual_flips_the_sign",
    ),
    # ---- max-pool -------------------------------------------------------------------------------
    bug(
        "max-pool: last of equal maxima taken",
        Edit(
            POOL_KERNELS,
            "row[kw] > best || row[kw] != row[kw]",
            "row[kw] >= best || row[kw] != row[kw]",
        ),
        f"{POOL}::test_maxima_and_indices_are_torchs",
    ),
    bug(
        "max-pool: NaN is no maximum",
        Edit(SIMD, "(a.r[i] > b.r[i]) | (a.r[i] != a.r[i])", "a.r[i] > b.r[i]"),
        f"{POOL}::test_a_nan_in_the_window_is_the_maximum_through_relu",
    ),
    bug(
        "max-pool: padding is 0, not -inf",
        Edit(POOL_KERNELS, "broadcast(-static_cast<acc>(INFINITY))", "broadcast(acc(0))"),
        f"{POOL}::test_maxima_and_indices_are_torchs",
    ),
    bug(
        "max-pool: index counted from the edge of the image",
        Edit(
            POOL_KERNELS,
            "static_cast<acc>(kh * kernel_width + kw)",
            "static_cast<acc>((kh - down.begin) * kernel_width + kw)",
        ),
        f"{POOL}::test_maxima_and_indices_are_torchs",
    ),
    bug(
        "max-pool: gradient of a window one padding too low",
        Edit(POOL_KERNELS, "h + a.padding[0] - oh * a.stride[0]", "h - oh * a.stride[0]"),
        f"{POOL}::test_every_gradient_arrives_once",
    ),
    bug(
        "max-pool: last window over a row forgotten",
        Edit(
            POOL_KERNELS,
            "(h + a.padding[0]) / a.stride[0] + 1",
            "(h + a.padding[0]) / a.stride[0]",
        ),
        f"{POOL}::test_every_gradient_arrives_once",
    ),
    bug(
        "max-pool: means of the gradient over windows, not elements",
        Edit(
            POOL_DRIVER,
            "call.x.size(0) * call.args.height * call.args.width",
            "call.x.size(0) * call.args.out_height * call.args.out_width",
        ),
        f"{POOL}::test_many_bands_and_blocks",
    ),
    bug(
        "max-pool: training formula under frozen statistics",
        Edit(POOL_DRIVER, "training ? &sums : nullptr", "&sums"),
        f"{POOL}::test_rule_R",
    ),
    # ---- checks ---------------------------------------------------------------------------------
    bug(
        "size of a vector not checked",
        Edit(CHECKS, "t.numel() == channels", "true"),
        f"{ARGUMENTS}::test_wrong_call_raises[op_forward_weight_short]",
        f"{ARGUMENTS}::test_wrong_call_raises[op_backward_mean_short]",
    ),
    bug(
        "size of the gradient not checked",
        Edit(CHECKS, "t.sizes() == x.sizes()", "true"),
        f"{ARGUMENTS}::test_wrong_call_raises[op_backward_grad_y_half_batch]",
    ),
    bug(
        "eps of NaN accepted",
        Edit("csrc/batch_norm.cpp", "!training || eps > 0", "!training || !(eps <= 0)"),
        f"{ARGUMENTS}::test_wrong_call_raises[op_forward_eps_nan]",
    ),
    bug(
        "one value per channel accepted",
        Edit("csrc/batch_norm.cpp", "!training || count != 1", "true"),
        f"{SHAPES}::test_training_on_one_value_per_channel_raises",
    ),
    bug(
        "length of the mask not checked",
        Edit("csrc/batch_norm.cpp", "mask->numel() == mask_size", "true"),
        f"{ARGUMENTS}::test_wrong_call_raises[op_backward_mask_short]",
    ),
    # ---- Python ---------------------------------------------------------------------------------
    bug(
        "only calls torch",
        Edit(
            "resops/_dispatch.py",
            'refusal("native", op, x) is None',
            "False",
        ),
        f"{DISPATCH}::test_backends",
        f"{NUMERICS}::test_zero_weight",
    ),
    bug(
        "residual saved although the mask is enough",
        Edit(NODE, "smooth ? given(residual) : Tensor()", "given(residual)"),
        f"{AUTOGRAD}::test_what_is_saved",
    ),
    bug(
        "residual saved by the Function although the mask is enough",
        Edit(OP, "residual if activation in SMOOTH_ACTIVATIONS else None", "residual"),
        f"{NODES}::test_batch_norm",
    ),
    bug(
        "gradient of the weight for the residual's",
        Edit(
            NODE,
            "residual.has_value() << 1 | weight.has_value() << 2",
            "residual.has_value() << 2 | weight.has_value() << 1",
        ),
        f"{NODES}::test_batch_norm",
    ),
    bug(
        "statistics constant in the second derivative",
        Edit(
            OP, "reference.batch_norm_statistics(x)", "reference.batch_norm_statistics(x.detach())"
        ),
        f"{OPINFO}::test_gradcheck",
    ),
    bug(
        "slope of leaky_relu forgotten in the backward pass",
        Edit(NODE, 'ctx->saved_data["negative_slope"].toDouble()', "0.01"),
        f"{NUMERICS}::test_negative_slopes",
    ),
    bug(
        "slope of leaky_relu forgotten in the Function's backward pass",
        Edit(
            OP,
            "(training, eps, activation, negative_slope)",
            "(training, eps, activation, 0.01)",
        ),
        f"{NODES}::test_batch_norm",
    ),
    bug(
        "fake strides of a 3-D channels-last input",
        Edit(
            "resops/reference/layout.py",
            "x.dim() != 3 or x.size(1) <= 1 or x.size(2) <= 1",
            "True",
        ),
        f"{LAYOUTS}::test_fake_strides_are_the_real_ones",
    ),
    bug(
        "folded weights without eps",
        Edit(
            "resops/reference/conv_bn_act.py", "running_var.to(wide) + eps", "running_var.to(wide)"
        ),
        f"{STATE}::test_folding",
    ),
    bug(
        "folded weights never renewed",
        Edit(
            "resops/nn/conv_bn_act.py",
            "kept is None or kept.at != at or kept.settings != settings"
            " or not kept.is_current(sources)",
            "kept is None",
        ),
        f"{STATE}::test_folded_weights_follow_their_sources",
    ),
    # ---- dense_block -----------------------------------------------------------------------------
    bug(
        "mask of a consumer from values that are not centred",
        Edit(
            "csrc/cpu/dense_block_kernels.cpp",
            "passes(z)",
            "passes(pre_activation(a, xs[r].pack[i], at))",
        ),
        f"{DENSE_PHASES}::test_phases_are_the_definition",
    ),
    bug(
        "running variance of a block's consumers biased",
        Edit("csrc/cpu/dense_block.cpp", "v *= unbiased", "v *= 1.0"),
        f"{DENSE_PHASES}::test_running_statistics_of_all_consumers",
    ),
]
