"""What leaves PyTorch: torch.export and ONNX get PyTorch's and ONNX's own operators."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import resops
from tests.fusion.blocks import Residual, assert_near, pair, small_net


def image(samples: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(samples, 3, 6, 7, dtype=dtype)


def other_norms() -> nn.Sequential:
    """Instance, group and PReLU beside what small_net has."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.InstanceNorm2d(4, affine=True),
        nn.PReLU(),
        nn.Conv2d(4, 4, 1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
    )


MODELS = {"batch norms": small_net, "other norms": other_norms}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_export_gives_operators_of_pytorch(name: str, training: bool) -> None:
    fused, plain = pair(MODELS[name]())
    fused.train(training), plain.train(training)
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(fused, (image(),), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    norms = {t for t in targets if "norm" in t}
    assert norms <= {f"aten.{kind}_norm.default" for kind in ("batch", "instance", "group")}
    assert len(norms) == (1 if name == "batch norms" else 2)
    others = {t for t in targets if not t.startswith("aten.")}  # arithmetic of the batch's size
    assert not {t for t in others if "sym" not in t and "built-in function" not in t}, others
    x = image(5)
    assert_near(program.module()(x), plain(x))


def test_export_names_the_arguments() -> None:
    fused, _ = pair(Residual())
    batch = torch.export.Dim("batch", min=2, max=16)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    program = torch.export.export(fused.eval(), (x,), dynamic_shapes={"x": {0: batch}})
    assert program.graph_signature.user_inputs == ("x",)


@pytest.mark.parametrize("deployed", [False, True], ids=["fused", "folded"])
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name: str, deployed: bool) -> None:
    """Operators of ONNX's own domain only, and their values by ONNX's own interpreter."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    fused, plain = pair(MODELS[name](), torch.float32)
    fused.eval(), plain.eval()
    model = resops.fold(fused) if deployed else fused
    program: Any = torch.onnx.export(
        model, (image(dtype=torch.float32),), dynamo=True, verbose=False, optimize=False
    )
    proto = program.model_proto
    onnx.checker.check_model(proto)
    calls = [*proto.graph.node, *(node for f in proto.functions for node in f.node)]
    own = {f.name for f in proto.functions}
    assert {node.domain for node in calls if node.op_type not in own} <= {"", "ai.onnx"}
    assert not [node.op_type for node in calls if "resops" in node.op_type.lower()]
    x = image(dtype=torch.float32)
    (y,) = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double()).numpy()
        eager = plain(x).numpy()
    # Rule R's factor, and a floor of some roundings for errors that are small by luck.
    floor = 64 * 2.0**-24 * np.abs(exact).max()
    assert np.abs(y - exact).max() <= 2 * np.abs(eager - exact).max() + floor
