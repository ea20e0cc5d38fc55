"""An installed resops, used from outside its source tree: ``smoke.py native|cuda|reference``.

Checks where it was imported from, what was installed beside it, that the backend which should be
there is, and that a layer, an op and a model give torch's numbers.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import resops.triton_kernels
import torch
from torch import nn

import resops
from resops import _dispatch, _native

site = Path(resops.__file__).parents[1]
assert site.name == "site", f"resops was imported from {site}"
assert Path(resops.triton_kernels.__file__).parent == site / "resops" / "triton_kernels"
strangers = [entry.name for entry in site.iterdir() if not entry.name.startswith("resops")]
assert not strangers, f"installed at top level: {strangers}"

built = sys.argv[1]
backend = "reference" if built == "reference" else "native"
if backend == "native":
    assert _native.error is None, _native.error
    assert _native.module is not None
    facts = _native.module.build_info()
    assert facts["version"] == resops.__version__
    # No GPU is needed to see that the ops are there for one.
    # The formulas of second derivatives are registered from Python, for every device.
    names = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("resops::")]
    ops = [name for name in names if not name.endswith("_formulas")]
    assert len(ops) >= 8, ops
    # Of convolutions there is the forward pass; a GPU's gradients are cuDNN's, and so are the 1x1
    # convolutions of a dense block.
    convolutions = ("forward_into", "backward_data", "backward_weight", "folded")
    on_cpu_only = {f"resops::conv_bn_act_{phase}" for phase in convolutions}
    on_cpu_only |= {f"resops::dense_block_narrow_{phase}" for phase in ("forward", "backward")}
    for key in ("CPU", "CUDA"):
        for op in ops:
            wanted = key == "CPU" or (built == "cuda" and op not in on_cpu_only)
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key) == wanted, (op, key)
    assert (facts["cuda architectures"] != "none") == (built == "cuda"), facts
    for op, devices in _dispatch._KERNELS["native"].items():
        assert ("cuda" in devices) == (built == "cuda"), op
else:
    assert _native.module is None
    assert "not built" in (_native.error or ""), _native.error
    try:
        with resops.backend("native"):
            resops.functional.residual_add(torch.ones(2, 3), torch.ones(2, 3))
        raise SystemExit("an explicitly chosen backend that is not there must raise")
    except resops.BackendError as error:
        print(f"refused as it should be: {error}")

torch.manual_seed(0)
x = torch.randn(4, 16, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
residual = torch.randn_like(x)
with resops.backend(backend):
    fused, plain = resops.nn.BatchNormAct2d(16), nn.BatchNorm2d(16)
    grad = torch.randn_like(x)
    got = fused(x, residual)
    (got_grad,) = torch.autograd.grad(got, x, grad)
    want = (plain(x) + residual).relu()
    (want_grad,) = torch.autograd.grad(want, x, grad)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grad, want_grad)
    torch.testing.assert_close(fused.running_var, plain.running_var)
    assert fused.state_dict().keys() == plain.state_dict().keys()

    torch.testing.assert_close(
        resops.functional.residual_add(x, residual, 0.5, 2.0), 0.5 * x + 2.0 * residual
    )

    model = resops.models.create_model("resnet18", num_classes=10)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not missing, f"parameters without a gradient: {missing}"
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert twin(torch.randn(2, 3, 64, 64)).isfinite().all()
print(f"resops {resops.__version__}, {built}, with the {backend} backend: works from {site}")
