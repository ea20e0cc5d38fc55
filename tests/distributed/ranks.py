"""Checks that several processes make together, and the processes that make them.

    python -m tests.distributed.ranks <processes> <file of the rendezvous> <rank> <check>...

prints one line of JSON for every check. Every process has the whole data, computes its share, and
gathers the results, which all of them judge: so all fail together, and none waits for another.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import resops
from resops.functional import batch_norm_act
from tests.dispatch import counted_calls
from tests.fusion.blocks import Residual, assert_near, assert_same_state, filled, small_net
from tests.ops.batch_norm_oracle import ACTIVATIONS, BatchNormCase, Outputs, random_case

ROOT = Path(__file__).resolve().parents[2]


def run_checks(processes: int, checks: Sequence[str], folder: Path) -> dict[str, str]:
    """What went wrong in every check, in any process; empty if nothing did."""
    command = [sys.executable, "-m", "tests.distributed.ranks", str(processes)]
    command.append(str(folder / f"rendezvous{processes}"))
    running = [
        subprocess.Popen(
            [*command, str(rank), *checks],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    wrong = dict.fromkeys(checks, "")
    for rank, process in enumerate(running):
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for other in running:
                other.kill()
            raise
        told = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        for report in told:
            wrong[report["check"]] += report["error"]
        for check in set(checks) - {report["check"] for report in told}:
            wrong[check] += f"process {rank} ended before: {err[-2000:]}"
    return wrong


# ---- shares -------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank()


def sizes(total: int, kind: str) -> list[int]:
    """Samples of every process."""
    processes = dist.get_world_size()
    if kind == "even":
        return [total // processes] * processes
    if kind == "empty":  # all but the first and the last have none
        return [total - 1, *[0] * (processes - 2), 1] if processes > 2 else [0, total]
    return [total - processes + 1, *[1] * (processes - 1)]


def share(t: Any, counts: list[int]) -> Any:
    return None if t is None else t.split(counts)[rank()]


def gathered(t: Tensor) -> list[Tensor]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, t.detach())
    return parts


class CountedCollectives:
    """Names of the collectives that run inside."""

    NAMES = ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast")

    def __enter__(self) -> list[str]:
        self.calls: list[str] = []
        self.before = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self.before.items():
            setattr(dist, name, self._counted(name, function))
        return self.calls

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return function(*args, **kwargs)

        return call

    def __exit__(self, *error: object) -> None:
        for name, function in self.before.items():
            setattr(dist, name, function)


# ---- the op -------------------------------------------------------------------------------------


def run_shared(case: BatchNormCase, counts: list[int]) -> Outputs:
    """The outputs of the case on the concatenated batch, from those of all processes."""
    leaves = {
        name: (share(t, counts) if name in ("x", "residual") else t).detach().requires_grad_()
        for name in ("x", "residual", "weight", "bias")
        if (t := getattr(case, name)) is not None
    }
    running_mean, running_var = (None if t is None else t.clone() for t in case.running)
    with CountedCollectives() as calls:
        y = batch_norm_act(
            leaves["x"],
            running_mean,
            running_var,
            leaves.get("weight"),
            leaves.get("bias"),
            case.training,
            case.momentum,
            case.eps,
            residual=leaves.get("residual"),
            activation=case.activation,
            negative_slope=case.negative_slope,
            process_group=dist.group.WORLD,
        )
        assert len(calls) == 1, calls
        y.backward(share(case.grad_y, counts))
        assert len(calls) == 2, calls
    assert y.shape == leaves["x"].shape and y.dtype == leaves["x"].dtype
    out: Outputs = {"running_mean": running_mean, "running_var": running_var}
    out["y"] = torch.cat(gathered(y))
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        parts = gathered(leaf.grad)
        whole = name in ("x", "residual")
        # A gradient is rounded to its dtype once, at the end, in one process too.
        out[f"grad_{name}"] = torch.cat(parts) if whole else torch.stack(parts).double().sum(0)
        if not whole:
            out[f"grad_{name}"] = out[f"grad_{name}"].to(leaf.dtype)  # type: ignore[union-attr]
    for t in (running_mean, running_var):
        if t is not None:
            assert all(torch.equal(t, other) for other in gathered(t)), "processes differ"
    return out


def check_rule_R() -> None:
    for kind in ("even", "uneven", "empty"):
        for i, activation in enumerate(ACTIVATIONS):
            dtype = (torch.float32, torch.bfloat16, torch.float64)[i % 3]
            x = torch.randn(8, 5, 6, 7) * 2 + 3
            if i % 2:
                x = x.contiguous(memory_format=torch.channels_last)
            case = random_case(
                x.to(dtype), seed=i, residual=i in (1, 3), label=f"{kind} {activation}"
            )
            case = replace(case, activation=activation).with_decided_signs()
            case.check(run_shared(case, sizes(8, kind)))


def check_means_far_from_zero() -> None:
    for distance in (1e2, 1e4):
        x = torch.randn(8, 3, 5, 5) + distance * torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
        case = random_case(x, label=f"mean {distance}")
        case.check(run_shared(case, sizes(8, "uneven")))


def check_without_parameters_and_statistics() -> None:
    case = random_case(torch.randn(8, 3, 5, 5), affine=False, running=False)
    case.check(run_shared(case, sizes(8, "uneven")))


def check_images_of_different_sizes() -> None:
    lengths = [3 + 4 * i for i in range(dist.get_world_size())]
    whole = torch.randn(1, 3, sum(lengths), dtype=torch.float64)
    x = whole.split(lengths, dim=2)[rank()].reshape(1, 3, -1, 1)
    mean, var = torch.zeros(2, 3, dtype=torch.float64)
    y = batch_norm_act(x, mean, var, training=True, process_group=dist.group.WORLD)
    expected = torch.relu(torch.nn.functional.batch_norm(whole, None, None, training=True))
    assert_near(y.view(1, 3, -1), expected.split(lengths, dim=2)[rank()])


def check_two_dimensions() -> None:
    """(N, C), as behind a linear layer."""
    case = random_case(torch.randn(9, 5) * 2 + 3, activation="relu").with_decided_signs()
    case.check(run_shared(case, sizes(9, "uneven")))


def check_a_group_of_one() -> None:
    """The plain op, which waits for nobody."""
    groups = [dist.new_group([process]) for process in range(dist.get_world_size())]
    x = torch.randn(3 + rank(), 5, 4, 4, dtype=torch.float64)
    y = batch_norm_act(x, None, None, training=True, process_group=groups[rank()])
    assert_near(y, batch_norm_act(x, None, None, training=True))


def check_nothing_anywhere() -> None:
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    mean, var = torch.full((3,), 0.5), torch.full((3,), 2.0)
    y = batch_norm_act(x, mean, var, training=True, process_group=dist.group.WORLD)
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None
    assert torch.equal(mean, torch.full((3,), 0.5)) and torch.equal(var, torch.full((3,), 2.0))


def check_one_value() -> None:
    """One value is too few, over all processes; a process may have one, or none."""
    group = dist.group.WORLD
    x = torch.randn(int(rank() == 0), 3, 1, 1)
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        batch_norm_act(x, mean, var, training=True, process_group=group)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))
    y = batch_norm_act(torch.randn(1, 3, 1, 1), mean, var, training=True, process_group=group)
    assert y.isfinite().all()


def check_process_groups() -> None:
    """Two groups, each with statistics of its own."""
    processes = dist.get_world_size()
    groups = [dist.new_group(list(range(start, processes, 2))) for start in (0, 1)]
    x = torch.randn(2 * processes, 3, 4, 4, dtype=torch.float64)
    parts = list(x.chunk(processes))
    y = batch_norm_act(parts[rank()], None, None, training=True, process_group=groups[rank() % 2])
    members = torch.cat(parts[rank() % 2 :: 2])
    expected = torch.relu(torch.nn.functional.batch_norm(members, None, None, training=True))
    assert_near(y, expected.chunk(len(parts[rank() % 2 :: 2]))[rank() // 2])


def check_backends() -> None:
    for backend in ("native", "reference"):
        case = random_case(torch.randn(8, 3, 5, 5), residual=True, activation="silu")
        with resops.backend(backend):
            case.check(run_shared(case, sizes(8, "uneven")))


# ---- layers and models --------------------------------------------------------------------------


def check_layer() -> None:
    """Evaluation makes no collective; gradients that nobody asks for neither."""
    layer = resops.nn.SyncBatchNormAct(3)
    with CountedCollectives() as calls:
        layer.eval()(torch.randn(2, 3, 4, 4))
        assert calls == []
        layer.train()(torch.randn(2, 3, 4, 4)).sum().backward()
        assert calls == ["all_gather_into_tensor"], calls


def parallel_step(model: nn.Module, x: Tensor, counts: list[int]) -> DistributedDataParallel:
    """A training step under DDP, whose loss is a sum over the samples of all processes."""
    parallel = DistributedDataParallel(model)
    y = parallel(share(x, counts))
    weights = torch.linspace(0.5, 1.5, x.size(0) * y[0].numel(), dtype=y.dtype)
    weights = share(weights.view(x.size(0), *y.shape[1:]), counts)
    # DDP averages the gradients.
    (dist.get_world_size() * (y * weights).sum()).backward()
    return parallel


def check_ddp() -> None:
    """A fused model under DDP equals the plain one in one process on the whole batch."""
    for kind in ("even", "uneven"):
        torch.manual_seed(1)
        plain = filled(small_net().double())
        model = copy.deepcopy(plain)
        assert resops.convert_sync_batchnorm(resops.fuse(model)) is model
        assert len(resops.fuse_report(model).skipped) == 0
        x = torch.randn(8, 3, 6, 7, dtype=torch.float64)
        parallel = parallel_step(model, x, sizes(8, kind))
        with pytest.raises(ValueError, match="DistributedDataParallel: fuse the model first"):
            resops.fuse(parallel)
        y = plain(x)
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None
            assert_near(ours.grad, theirs.grad)
        assert_same_state(model, plain)


def check_ddp_with_statistics_of_each_process() -> None:
    """Without SyncBatchNorm: fused and plain models under DDP do the same."""
    torch.manual_seed(1)
    plain = filled(small_net().double())
    fused = resops.fuse(copy.deepcopy(plain))
    x = torch.randn(8, 3, 6, 7, dtype=torch.float64)
    for model in (fused, plain):
        parallel_step(model, x, sizes(8, "even"))
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert_near(ours.grad, theirs.grad)
    assert_same_state(fused, plain)


def check_fsdp2() -> None:
    """fully_shard on a fused model: parameters are sharded, and a step gives the same loss."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.manual_seed(1)
    plain = filled(nn.Sequential(Residual(), Residual()).double())
    fused = resops.fuse(copy.deepcopy(plain))
    for block in fused:
        fully_shard(block)
    fully_shard(fused)
    x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
    with counted_calls() as calls:
        y = fused(x)
    assert calls["batch_norm_forward"] == 4  # and not the original forward
    expected = plain(x)
    assert_near(y, expected)
    assert isinstance(fused[0], FSDPModule) and isinstance(fused[0], Residual)
    y.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert_near(ours.grad.full_tensor(), theirs.grad)
    wrapped: Any = fully_shard(Residual())
    with pytest.raises(ValueError, match="FSDP"):
        resops.fuse(wrapped)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def main(processes: int, file: str, number: int, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    store = torch._C._distributed_c10d.FileStore(file, processes)
    dist.init_process_group("gloo", store=store, rank=number, world_size=processes)
    for name in names:
        torch.manual_seed(0)
        error = ""
        try:
            CHECKS[name]()
        except Exception:
            error = f"process {number}: {traceback.format_exc()}"
        print(json.dumps({"check": name, "error": error}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
