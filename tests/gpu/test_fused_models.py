"""Fused models where only a GPU can show them: graphs, GradScaler, NCCL, DDP, FSDP2.

RESOPS_TEST_DEVICE=cpu runs the part of this file that needs no CUDA, with gloo, to try the tests
themselves. tests/distributed has several processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import resops
from tests.dispatch import counted_calls
from tests.fusion.blocks import filled, small_net
from tests.gpu import test_gpu
from tests.gpu.test_gpu import DEVICE, ON_GPU, needs_gpu

pytestmark = test_gpu.pytestmark


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """By name: on a GPU ``auto`` does not take these kernels yet."""
    with (
        resops.backend("native"),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        yield


@pytest.fixture
def process_group() -> Iterator[Any]:
    """Of this process alone."""
    distributed: Any = torch.distributed
    name = "nccl" if ON_GPU else "gloo"
    distributed.init_process_group(name, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()


def pair(layout: Any = torch.channels_last) -> tuple[nn.Sequential, nn.Sequential]:
    """A fused model and the same one that is not."""
    torch.manual_seed(0)
    plain = filled(small_net()).to(DEVICE, memory_format=layout)
    return resops.fuse(copy.deepcopy(plain)), plain


def image(samples: int = 8) -> Tensor:
    x = torch.randn(samples, 3, 10, 12, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers after one step."""
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.detach().clone() for t in (y, *grads, *model.buffers())]


def assert_near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """To what TF32, which both models' convolutions may use, leaves after a few layers. Some
    gradients are zero but for rounding: of a bias before a norm, which has no scale of its own."""
    scale = max(float(b.abs().max()) for b in theirs if b.is_floating_point())
    for a, b in zip(ours, theirs, strict=True):
        own = float(b.abs().max()) if b.is_floating_point() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * own + 1e-4 * scale)


def test_a_step_equals_the_plain_models() -> None:
    fused, plain = pair()
    x = image()
    with counted_calls() as calls:
        ours = outputs(fused, x)
    assert calls["batch_norm_forward"] == 5 and calls["aten::native_batch_norm"] == 0
    assert_near(ours, outputs(plain, x))
    fused.eval(), plain.eval()
    with torch.no_grad():
        assert_near([fused(x)], [plain(x)])


@needs_gpu
def test_replay_of_a_graph() -> None:
    """A training step is captured once and replayed: outputs, gradients, running statistics."""
    fused, _ = pair()
    eager = copy.deepcopy(fused)
    x = image()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            outputs(fused, x)
    torch.cuda.current_stream().wait_stream(side)
    fused.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(x)
        y.square().sum().backward()
    fused.load_state_dict(eager.state_dict())
    for scale in (1.0, 0.5):
        x.mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        grads = [p.grad for p in fused.parameters()]
        for replayed, expected in zip(
            [y, *grads, *fused.buffers()], outputs(eager, x), strict=True
        ):
            assert replayed is not None and torch.equal(replayed, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_grad_scaler(dtype: torch.dtype) -> None:
    """No overflow, every parameter moves, and the loss is that of the plain model."""
    losses = []
    for model in pair():
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=128.0)
        before = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(1)
        for _ in range(2):
            with torch.autocast(DEVICE, dtype):
                loss = model(image()).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 128.0
        # Of a bias before a norm the gradient is zero but for rounding.
        names = [n for n, _ in model.named_parameters() if not n.endswith(("conv1.bias", "2.bias"))]
        moved = dict(zip(dict(model.named_parameters()), before, strict=True))
        parameters = dict(model.named_parameters())
        assert all(not torch.equal(parameters[n], moved[n]) for n in names if "weight" in n)
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) <= 0.02 * abs(losses[1])  # 16 bits, twice through the model


def test_synchronised_norms_and_ddp(process_group: Any) -> None:
    fused, plain = pair()
    parallel = DistributedDataParallel(resops.convert_sync_batchnorm(fused))
    assert {e.pattern.split("BN")[0] for e in resops.fuse_report(fused).fused} >= {"Sync"}
    x = image()
    assert_near(outputs(parallel, x), outputs(plain, x))


def test_fsdp2(process_group: Any) -> None:
    """Sharded after fuse: a step in bf16, and the parameters' gradients are there."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    fused, plain = pair(torch.contiguous_format)  # FSDP takes no other parameters
    mesh = torch.distributed.device_mesh.init_device_mesh(DEVICE, (1,))
    fully_shard(fused[3], mesh=mesh)
    fully_shard(fused, mesh=mesh)
    assert isinstance(fused, FSDPModule)
    x = image()
    with counted_calls() as calls:
        y = fused(x)
    assert calls["batch_norm_forward"] == 5 and calls["aten::native_batch_norm"] == 0
    expected = plain(x)
    assert_near([y.detach()], [expected.detach()])
    y.square().sum().backward(), expected.square().sum().backward()
    sharded: list[Any] = [p.grad for p in fused.parameters()]
    whole: list[Any] = [p.grad for p in plain.parameters()]
    assert_near([grad.full_tensor() for grad in sharded], whole)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    narrow: Any = fully_shard(resops.fuse(copy.deepcopy(plain)), mesh=mesh, mp_policy=policy)
    assert narrow(x).dtype == torch.bfloat16
