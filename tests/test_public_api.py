"""The public names, their signatures and docstrings, and the package where a part is missing."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resops
from resops import functional, fusion, models, reference
from resops import nn as layers

ROOT = Path(__file__).resolve().parents[1]

NAMES = {
    resops: [
        "BackendError",
        "backend",
        "checkpoint_context_fn",
        "convert_sync_batchnorm",
        "explain",
        "fold",
        "functional",
        "fuse",
        "fuse_report",
        "fusion",
        "get_backend",
        "models",
        "nn",
        "register_pattern",
        "set_backend",
        "show_env",
        "unfuse",
    ],
    fusion: ["FuseError", "FuseReport", "FusedEntry", "Reason", "SkippedEntry"],
    functional: [
        "basic_block",
        "batch_norm_act",
        "batch_norm_act_max_pool",
        "bottleneck",
        "conv_bn_act",
        "dense_block",
        "double_conv",
        "residual_add",
        "transition",
    ],
    layers: [
        "BatchNormAct1d",
        "BatchNormAct2d",
        "BatchNormAct3d",
        "BatchRenormAct2d",
        "BiasAct",
        "Conv2dNormActivation",
        "Conv3dNormActivation",
        "GhostBatchNormAct2d",
        "GroupNorm1Act",
        "GroupNormAct",
        "InstanceNormAct2d",
        "InstanceNormAct3d",
        "ResDrop",
        "ResidualAdd",
        "ShakeDrop",
        "ShakeShake",
        "StdConv2d",
        "SyncBatchNormAct",
        "create_norm_act",
        "monte_carlo_predictions",
        "precise_statistics",
    ],
    models: [
        "create_model",
        "list_models",
        *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
        *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)),
        *(f"plain{depth}" for depth in (20, 32, 44, 56, 110)),
        *(f"resnetv2_{depth}" for depth in (18, 34, 50, 101, 152, 200)),
        *(f"preact_resnet{depth}" for depth in (110, 164, 1001)),
        *(f"wrn_{name}" for name in ("16_4", "16_8", "22_8", "28_10", "40_4")),
        *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
        *("highway", "highway_conv"),
        *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
        *("densenet_bc_40", "densenet_bc_100"),
        *("unet", "unet_valid", "residual_unet", "unetplusplus", "unet3d", "vnet"),
        *("hourglass", "heatmap_peaks", "fpn", "overlap_tile"),
        *("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
        *("alexnet", "convnext_tiny", "register_model"),
    ],
}

EMPTY = inspect.Parameter.empty
SIGNATURES: dict[str, dict[str, Any]] = {
    "functional.batch_norm_act": {
        "input": EMPTY,
        "running_mean": EMPTY,
        "running_var": EMPTY,
        "weight": None,
        "bias": None,
        "training": False,
        "momentum": 0.1,
        "eps": 1e-5,
        "*": None,
        "residual": None,
        "activation": "relu",
        "negative_slope": 0.01,
        "process_group": None,
    },
    "functional.batch_norm_act_max_pool": {
        "input": EMPTY,
        "running_mean": EMPTY,
        "running_var": EMPTY,
        "weight": None,
        "bias": None,
        "training": False,
        "momentum": 0.1,
        "eps": 1e-5,
        "*": None,
        "kernel_size": EMPTY,
        "stride": None,
        "padding": 0,
        "dilation": 1,
        "ceil_mode": False,
        "activation": "relu",
        "negative_slope": 0.01,
    },
    "functional.residual_add": {
        "input": EMPTY,
        "residual": EMPTY,
        "alpha": 1.0,
        "beta": 1.0,
        "*": None,
        "activation": None,
        "negative_slope": 0.01,
        "alpha_backward": None,
        "beta_backward": None,
    },
    "functional.conv_bn_act": {
        "input": EMPTY,
        "conv_weight": EMPTY,
        "conv_bias": EMPTY,
        "running_mean": EMPTY,
        "running_var": EMPTY,
        "weight": None,
        "bias": None,
        "training": False,
        "momentum": 0.1,
        "eps": 1e-5,
        "*": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "residual": None,
        "activation": "relu",
        "negative_slope": 0.01,
    },
    "nn.BatchNormAct2d": {
        "num_features": EMPTY,
        "eps": 1e-5,
        "momentum": 0.1,
        "affine": True,
        "track_running_stats": True,
        "apply_act": True,
        "act_layer": nn.ReLU,
        "act_kwargs": None,
        "inplace": True,
        "drop_layer": None,
        "device": None,
        "dtype": None,
    },
    "nn.Conv2dNormActivation": {
        "in_channels": EMPTY,
        "out_channels": EMPTY,
        "kernel_size": 3,
        "stride": 1,
        "padding": None,
        "groups": 1,
        "norm_layer": layers.BatchNormAct2d,
        "activation_layer": nn.ReLU,
        "dilation": 1,
        "inplace": True,
        "bias": None,
    },
}
SIGNATURES |= {f"nn.BatchNormAct{n}d": SIGNATURES["nn.BatchNormAct2d"] for n in (1, 3)}


def resolve(path: str) -> Any:
    found: Any = resops
    for name in path.split("."):
        found = getattr(found, name)
    return found


def public_objects() -> Iterator[tuple[str, Any]]:
    for module in NAMES:
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                yield f"{module.__name__}.{name}", thing


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_names(module: Any) -> None:
    for name in NAMES[module]:
        assert hasattr(module, name), name
        assert name in module.__all__, name
    assert module.__doc__


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path: str) -> None:
    """Names, order and defaults, which are those of torch, torchvision and timm."""
    parameters = dict(inspect.signature(resolve(path)).parameters)
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found["*"] = None
        found[name] = parameter.default
    assert list(found.items()) == list(SIGNATURES[path].items())


@pytest.mark.parametrize(("name", "thing"), list(public_objects()))
def test_docstrings_and_type_hints(name: str, thing: Any) -> None:
    assert inspect.getdoc(thing), f"{name} has no docstring"
    function = thing.__init__ if inspect.isclass(thing) else thing
    if not inspect.isfunction(function) or not function.__module__.startswith("resops"):
        return
    signature = inspect.signature(function)
    for parameter in list(signature.parameters.values()):
        if parameter.name != "self":
            assert parameter.annotation is not EMPTY, f"{name}: {parameter.name}"
    assert signature.return_annotation is not EMPTY, name
    if inspect.isclass(thing) and issubclass(thing, nn.Module):
        assert inspect.getdoc(thing.forward), f"{name}.forward has no docstring"


def test_layers_are_what_they_stand_for() -> None:
    for n in (1, 2, 3):
        ours = getattr(layers, f"BatchNormAct{n}d")
        assert issubclass(ours, getattr(nn, f"BatchNorm{n}d"))
    assert issubclass(layers.Conv2dNormActivation, nn.Sequential)
    assert inspect.signature(layers.BatchNormAct2d.forward).parameters["residual"].default is None


def test_definition_has_the_names_of_the_ops() -> None:
    """resops.reference.<op> has a function for every registered op <op>_<phase>, with the same
    arguments in the same order: it is their oracle. (What is registered from Python, for C++ to
    call, is a function of resops.ops.<op>.)"""
    import importlib

    assert reference.__doc__
    ops = [path.stem for path in (ROOT / "csrc").glob("*.cpp")]
    checked = 0
    for schema in torch._C._jit_get_all_schemas():
        if not schema.name.startswith("resops::"):
            continue
        name = schema.name.removeprefix("resops::")
        op = max((op for op in ops if name.startswith(f"{op}_")), key=len)
        if name.endswith("_formulas"):
            home = importlib.import_module(f"resops.ops.{op}")
            function = getattr(home, name.removeprefix(f"{op}_"))
        else:
            function = getattr(importlib.import_module(f"resops.reference.{op}"), name)
        expected = [argument.name for argument in schema.arguments]
        assert list(inspect.signature(function).parameters) == expected, name
        assert inspect.getdoc(function), name
        checked += 1
    assert checked >= 8


# ---- the environment ----------------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_info_command() -> None:
    """python -m resops.info says versions, devices, what was built, and which backend does what."""
    done = subprocess.run(
        [sys.executable, "-m", "resops.info"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for word in (resops.__version__, torch.__version__, "batch_norm", "residual_add", "native"):
        assert word in done.stdout, word


def test_show_env(capsys: pytest.CaptureFixture[str]) -> None:
    from resops.info import environment

    resops.show_env()
    printed = capsys.readouterr().out
    facts = environment()
    assert facts["versions"]["resops"] == resops.__version__ and resops.__version__ in printed
    assert facts["backend"] == "auto"
    assert set(facts["backends"]) >= {"batch_norm", "residual_add"}
    assert "cpu" in facts["backends"]["batch_norm"]["native"]
    triton = facts["backends"]["batch_norm"]["triton"]
    assert triton == "cuda" or triton.startswith("no: Triton cannot be imported")
    assert facts["cpu_capability"] in facts["cpu_capabilities"]


LAZY = """
import sys, torch, resops
loaded = [name for name in sys.modules if name.startswith("resops.models")]
assert not loaded and "models" in dir(resops), loaded
x = torch.rand(1, 2, 8, 8)

@torch.compile(fullgraph=True, backend="eager")
def peaks(x):
    return resops.models.heatmap_peaks(x, stride=4)

assert all(torch.equal(a, b) for a, b in zip(peaks(x), resops.models.heatmap_peaks(x, stride=4)))
from resops import models
from resops.models import resnet20
assert models is resops.models is sys.modules["resops.models"] and models.resnet20 is resnet20
try:
    resops.model
except AttributeError as error:
    assert str(error) == "module 'resops' has no attribute 'model'"
else:
    raise AssertionError("there is no resops.model")
"""


def test_models_are_imported_when_they_are_asked_for() -> None:
    """They take longer than the rest of the package; also where a compiled function asks first."""
    done = python(LAZY)
    assert done.returncode == 0, done.stderr


WITHOUT_NATIVE = """
import sys
{block}
import torch, resops
from resops.functional import batch_norm_act
x = torch.randn(4, 3, 5, 5, requires_grad=True)
mean, var = torch.zeros(3), torch.ones(3)
y = batch_norm_act(x, mean, var, training=True, residual=x.detach())
y.sum().backward()
m, v = torch.zeros(3), torch.ones(3)
z = torch.relu(torch.nn.functional.batch_norm(x, m, v, training=True) + x)
assert torch.equal(y, z) and torch.equal(m, mean) and x.grad is not None
try:
    with resops.backend("native"):
        batch_norm_act(x, mean, var)
except resops.BackendError as error:
    print("ERROR", error)
resops.models.create_model("resnet18")(torch.randn(2, 3, 32, 32))
resops.show_env()
"""
NOT_BUILT = "sys.modules['resops._C'] = None"
# A file that is found and does not load: what the loader says where torch's libraries are others.
BROKEN = """
import importlib.abc, importlib.machinery, os
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == "resops._C":
            return importlib.machinery.ModuleSpec(name, self, origin=os.environ["ORIGIN"])
    def create_module(self, spec):
        raise ImportError("undefined symbol: _ZN2at4nope")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize(
    ("block", "content", "message"),
    [
        (NOT_BUILT, b"", "was not built"),
        (BROKEN, b"", "undefined symbol: _ZN2at4nope"),
        (BROKEN, b"resops-built-for-torch=1.13.0;", "was built for torch 1.13.0, running"),
    ],
    ids=["not built", "does not load", "built for another torch"],
)
def test_without_the_extension(block: str, content: bytes, message: str, tmp_path: Path) -> None:
    """Where nothing was compiled, or what was compiled does not load, everything works in plain
    PyTorch, and the missing part is named with what to run."""
    origin = tmp_path / "_C.so"
    origin.write_bytes(content)
    done = python(WITHOUT_NATIVE.format(block=block), ORIGIN=str(origin))
    assert done.returncode == 0, done.stderr
    error = next(line for line in done.stdout.splitlines() if line.startswith("ERROR"))
    assert message in error and "pip install" in error
    assert done.stdout.count(message) >= 2, "show_env says it too"


def test_backend_from_the_environment() -> None:
    done = python("import resops; print(resops.get_backend())", RESOPS_BACKEND="reference")
    assert done.stdout.strip() == "reference", done.stderr
    done = python("import resops", RESOPS_BACKEND="fastest")
    assert done.returncode != 0 and "RESOPS_BACKEND must be one of" in done.stderr


@pytest.mark.usefixtures("native")
def test_cpu_capability_from_the_environment() -> None:
    code = "import resops; print(resops._C.cpu_capability())"
    done = python(code, RESOPS_CPU_CAPABILITY="portable")
    assert done.stdout.strip() == "portable", done.stderr
    done = python(code, RESOPS_CPU_CAPABILITY="neon")
    assert done.returncode != 0 and "RESOPS_CPU_CAPABILITY must be one of" in done.stderr


@pytest.mark.usefixtures("native")
def test_cpu_capabilities() -> None:
    from resops import _C

    names = _C.cpu_capabilities()
    assert names[0] == "portable" and _C.cpu_capability() in names
    with pytest.raises(ValueError, match="must be one of portable, avx2, avx512, avx512_bf16"):
        _C.set_cpu_capability("sse9")
    missing = {"portable", "avx2", "avx512", "avx512_bf16"} - set(names)
    for name in missing:
        with pytest.raises(ValueError, match="cannot run here"):
            _C.set_cpu_capability(name)
    facts = _C.build_info()
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(facts["sanitizer"].split(",")) <= {"none", "address", "undefined", "thread"}
