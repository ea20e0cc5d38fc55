"""What was fused, what was not, and why: in words that say what to do about it."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why a norm was left as it is. ``hint`` says what can be done."""

    HOOKS = "hooks"
    PARAMETRIZED = "parametrized"
    SUBCLASS = "subclass"
    SHARED = "shared"
    DROPOUT_BETWEEN = "dropout between"
    UNSUPPORTED_NORM = "unsupported norm"
    UNSUPPORTED_ACTIVATION = "unsupported activation"
    UNSUPPORTED_LAYOUT = "unsupported layout"
    UNSUPPORTED_DTYPE = "unsupported dtype"
    UNSUPPORTED_DEVICE = "unsupported device"
    BACKEND_MISSING = "backend missing"
    MEASURED_SLOWER = "measured slower"
    FILTERED = "filtered"
    UNTRACEABLE = "untraceable"
    MODES_DIFFER = "training and evaluation differ"
    NOT_CALLED = "not called"
    NOTHING_BESIDE = "nothing beside it"
    ALREADY_FUSED = "already fused"
    NOT_FUSED = "not fused"

    @property
    def hint(self) -> str:
        """What the user can do."""
        return _HINTS[self]


_HINTS = {
    Reason.HOOKS: "hooks see the values between the layers, which a fused op does not make; remove "
    "them before fuse, or put them on the block",
    Reason.PARAMETRIZED: "call torch.nn.utils.parametrize.remove_parametrizations first",
    Reason.SUBCLASS: "a subclass may compute something else; use the class of torch itself, or "
    "describe the block with resops.register_pattern",
    Reason.SHARED: "the module stands in several places of the model; give each place its own",
    Reason.DROPOUT_BETWEEN: "a dropout stands between the norm and the activation; without it, or "
    "after the activation, they can be one op",
    Reason.UNSUPPORTED_NORM: "there is no fused op for this norm with these settings; fused are "
    "nn.BatchNorm1d to 3d, nn.InstanceNorm1d to 3d, nn.GroupNorm and timm's BatchNormAct2d",
    Reason.UNSUPPORTED_ACTIVATION: "fused are ReLU, LeakyReLU, PReLU with one slope, SiLU, "
    "GELU (exact) and Identity",
    Reason.UNSUPPORTED_LAYOUT: "parameters must be strided tensors",
    Reason.UNSUPPORTED_DTYPE: "parameters must be float32, bfloat16, float16 or float64",
    Reason.UNSUPPORTED_DEVICE: "parameters must be on a CPU, a CUDA or the meta device",
    Reason.BACKEND_MISSING: "the chosen backend cannot compute this norm; "
    "resops.set_backend('auto') can",
    Reason.MEASURED_SLOWER: "on images this small PyTorch's own layers were faster; "
    "resops.set_backend('native') takes the fused ones",
    Reason.FILTERED: "module_filter_fn returned False",
    Reason.UNTRACEABLE: "the forward of its block cannot be followed; describe the block with "
    "resops.register_pattern",
    Reason.MODES_DIFFER: "the forward of its block does other things in evaluation, or without "
    "gradients or under autocast, than in training; move the difference into a layer",
    Reason.NOT_CALLED: "the forward of its block does not call it, or not with one tensor only",
    Reason.NOTHING_BESIDE: "no convolution, addition or activation is beside it; a norm alone is "
    "one op already",
    Reason.ALREADY_FUSED: "nothing to do: this layer of resops is one op already",
    Reason.NOT_FUSED: "call resops.fuse(model)",
}


@dataclass(frozen=True)
class FusedEntry:
    """Norms of one block that were fused in one way.

    Attributes:
        name: qualified name of the block whose forward was replaced ("" for the model itself).
        modules: qualified names of the norms.
        pattern: such as "Conv+BN+ReLU".
        backend: which kernels compute it where the parameters now are.
    """

    name: str
    modules: tuple[str, ...]
    pattern: str
    backend: str


@dataclass(frozen=True)
class SkippedEntry:
    """Norms that were left as they are.

    Attributes:
        name: qualified name of the block that holds them ("" for the model itself).
        modules: qualified names of the norms.
        reason: why.
        hint: what can be done, and what exactly was found.
    """

    name: str
    modules: tuple[str, ...]
    reason: Reason
    hint: str


@dataclass(frozen=True)
class FuseReport:
    """Every norm of a model, in exactly one entry of ``fused`` or ``skipped``."""

    fused: tuple[FusedEntry, ...]
    skipped: tuple[SkippedEntry, ...]

    def __str__(self) -> str:
        done = sum(len(entry.modules) for entry in self.fused)
        left = sum(len(entry.modules) for entry in self.skipped)
        lines = [f"{done} of {done + left} norms fused"]
        patterns = Counter[tuple[str, str]]()
        for fused in self.fused:
            patterns[fused.pattern, fused.backend] += len(fused.modules)
        width = max((len(pattern) for pattern, _ in patterns), default=0)
        for (pattern, backend), count in patterns.most_common():
            lines.append(f"  {count:4d}  {pattern:{width}}  {backend}")
        reasons: dict[tuple[Reason, str], list[str]] = {}
        for skipped in self.skipped:
            reasons.setdefault((skipped.reason, skipped.hint), []).extend(skipped.modules)
        if reasons:
            lines.append(f"{left} left as they are")
        for (reason, hint), modules in reasons.items():
            shown = ", ".join(modules[:3]) + (", ..." if len(modules) > 3 else "")
            lines += [f"  {len(modules):4d}  {reason.value}: {shown}", f"        {hint}"]
        return "\n".join(lines)
