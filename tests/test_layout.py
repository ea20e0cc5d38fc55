"""The house: every op has all its homes, and imports run one way (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = ("setup.py", "csrc", "resops", "triton_kernels", "tests", "bench", "CMakeLists.txt")

# Modules beside the ops in a folder, that several of them share.
SHARED = {
    "resops/ops": {
        "__init__",
        "activation_source",
        "batch_norm_prelu",
        "conv_bn_act_convolution",
        "conv_bn_act_gpu",
        "conv_bn_act_phases",
        "conv_bn_act_slices",
        "convolution",
        "convolution_table",
        "dense_block_passes",
        "recomputed_input",
        "residual_block",
        "residual_block_arguments",
        "residual_block_passes",
        "sync_batch_norm",
    },
    "resops/reference": {"__init__", "activation", "conv_norm", "layout"},
    "csrc/cuda": {"batch_norm_slab", "device"},
}
# Ops that are made of other ops, and so have no kernel of their own.
COMPOSED = {"basic_block", "bottleneck", "double_conv"}
# Functions that are another op with fixed arguments.
SPECIAL_CASES = {"transition"}


def stems(folder: str, pattern: str = "*.py") -> set[str]:
    found = {path.stem for path in (ROOT / folder).glob(pattern)}
    return found - SHARED.get(folder, set())


OPS = sorted(stems("resops/ops"))


# ---- homes --------------------------------------------------------------------------------------


def test_top_level_names() -> None:
    for name in TOP_LEVEL:
        assert (ROOT / name).exists(), name


def test_ops_are_found() -> None:
    assert {"batch_norm", "batch_norm_act_max_pool", "residual_add", "conv_bn_act"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_homes(op: str) -> None:
    """One snake_case stem, the same in every folder."""
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", op)
    homes = [f"resops/reference/{op}.py", f"resops/ops/{op}.py", f"docs/math/{op}.md"]
    if op not in COMPOSED:
        homes += [f"csrc/{op}.cpp", f"csrc/cpu/{op}.cpp"]
        homes += [f"csrc/cpu/{op}_kernels.cpp", f"csrc/cpu/{op}_kernels.h"]
        homes += [f"csrc/cuda/{op}.{ending}" for ending in ("h", "cuh", "cu")]
        homes += [f"csrc/cuda/bindings/{op}.cpp", f"tests/simt/kernels/{op}.cpp"]
    missing = [home for home in homes if not (ROOT / home).is_file()]
    assert not missing, missing
    assert list((ROOT / "tests/ops").glob(f"test_{op}*.py")), f"no tests/ops/test_{op}*.py"


@pytest.mark.parametrize(
    ("folder", "pattern", "ending"),
    [
        ("resops/reference", "*.py", ""),
        ("csrc", "*.cpp", ""),
        ("csrc/cpu", "*_kernels.cpp", "_kernels"),
        ("csrc/cuda", "*.cu", ""),
        ("csrc/cuda/bindings", "*.cpp", ""),
        ("docs/math", "*.md", ""),
    ],
)
def test_nothing_lives_without_its_op(folder: str, pattern: str, ending: str) -> None:
    """The other way round: no kernel, definition or derivation of an op that does not exist. A part
    of an op's kernels may have a file of its own, <op>_<part>_kernels.cpp."""
    found = {s.removesuffix(ending) for s in stems(folder, pattern)} - {"extension"}
    if ending:
        found = {s for s in found if not any(s.startswith(f"{op}_") for op in OPS)}
    assert found <= set(OPS), found - set(OPS)


def test_public_functions_and_layers_of_the_ops() -> None:
    """An op <op> is reached as functional.<op> (batch_norm as batch_norm_act)."""
    import resops.functional

    names = {"batch_norm_act" if op == "batch_norm" else op for op in OPS}
    functions = {name for name in resops.functional.__all__ if name.islower()}
    assert names | SPECIAL_CASES == functions


def test_no_drawer_for_everything() -> None:
    """No utils that grows, no helpers, misc, common.py or numbered versions."""
    for folder in ("resops", "triton_kernels", "bench", "tests", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                assert not re.search(r"(^|_)(utils?|helpers?|misc)$|_v\d+$", path.stem), path


def test_ops_of_the_native_table_are_registered() -> None:
    """_dispatch's table and the compiled module agree on which ops there are."""
    import torch

    from resops import _dispatch

    kernels = {stem for stem in stems("csrc", "*.cpp") if stem != "extension"}
    assert set(_dispatch._KERNELS["native"]) == kernels
    registered = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("resops::")}
    for op in kernels:
        assert any(name.startswith(f"resops::{op}_") for name in registered), op


# ---- Python: arrows run one way -----------------------------------------------------------------

# integrations -> {models | fusion} -> nn -> functional -> ops -> _dispatch
# -> {reference | native | triton_kernels}; an import goes to a lower number, or stays inside one
# package. Leaves know nothing of the house.
LEVELS = {
    "resops": 9,
    "resops.info": 8,
    "resops.tune": 8,
    "resops.integrations": 8,
    "resops.models": 7,
    "resops.fusion": 7,
    "resops.nn": 6,
    "resops.functional": 5,
    "resops.ops": 4,
    "resops._dispatch": 3,
    "resops._precision": 3,
    "resops._autograd": 2,
    "resops._magnitude": 2,
    "resops._native": 2,
    "resops._triton": 2,
    "resops.reference": 2,
    "resops.triton_kernels": 1,
    "resops._C": 1,
    "resops._version": 1,
}


def level_of(module: str) -> tuple[str, int]:
    """The part of the house that ``module`` belongs to."""
    name = module
    while name not in LEVELS:
        name = name.rpartition(".")[0]
        assert name != "", f"{module} is in no part of the house"
    assert name != "resops" or module == "resops", f"{module} is in no part of the house"
    return name, LEVELS[name]


def python_files(*folders: str) -> Iterator[tuple[Path, str]]:
    """Every Python file with its module name (triton_kernels is installed inside resops)."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            if parts[0] == "triton_kernels":
                parts.insert(0, "resops")
            yield path, ".".join(parts)


def known_module(name: str) -> bool:
    path = name.split(".")
    if path[:2] == ["resops", "triton_kernels"]:
        path = path[1:]
    place = ROOT.joinpath(*path)
    return place.is_dir() or place.with_suffix(".py").is_file()


def imported_modules(path: Path, module: str) -> Iterator[str]:
    """Absolute names of all modules that a file imports, wherever in the file it does."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")
                anchor = anchor[: len(anchor) - (node.level - 1)]
                base = ".".join([*anchor, base] if base else anchor)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name.startswith("resops") and known_module(name) else base
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def arrows(path: Path, module: str) -> list[str]:
    """What is wrong with the imports of one file of the package."""
    part, level = level_of(module)
    wrong = []
    for target in imported_modules(path, module):
        top = target.split(".")[0]
        if top in ("tests", "bench", "setup"):
            wrong.append(f"{module} imports {target}")
        elif top == "triton_kernels":
            wrong.append(f"{module} imports {target}: only as resops.triton_kernels, relatively")
        elif top == "resops":
            target_part, target_level = level_of(target)
            if target_part != part and target_level >= level:
                wrong.append(f"{module} imports {target}: {part} may not know {target_part}")
    return wrong


def test_arrows_run_one_way() -> None:
    files = list(python_files("resops", "triton_kernels"))
    assert len(files) > 10
    wrong = [message for path, module in files for message in arrows(path, module)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("resops.reference.batch_norm", "from ..ops import batch_norm"),
        ("resops.reference.batch_norm", "from .. import _dispatch"),
        ("resops._dispatch", "from .ops.batch_norm import batch_norm"),
        ("resops.ops.batch_norm", "def f():\n    from .. import functional"),
        ("resops.functional", "import resops.nn.batch_norm"),
        ("resops.nn.batch_norm", "from resops.models import resnet"),
        ("resops._native", "import resops.reference.layout"),
        ("resops.models.resnet", "from tests import tensors"),
        ("resops.ops.batch_norm", "import bench.shapes"),
        ("resops.ops.batch_norm", "import triton_kernels"),
        ("resops.ops.batch_norm", "from triton_kernels.batch_norm import f"),
        ("resops.triton_kernels.batch_norm", "from resops import functional"),
        ("resops.ops.batch_norm", "import importlib\nimportlib.import_module('resops.nn')"),
    ],
)
def test_wrong_arrows_are_seen(module: str, text: str, tmp_path: Path) -> None:
    """The check itself."""
    path = tmp_path / (module.rpartition(".")[2] + ".py")
    path.write_text(text)
    assert arrows(path, module), text


def test_triton_kernels_is_imported_in_one_way() -> None:
    """From the repository's root a plain ``import triton_kernels`` would make a second copy."""
    for path, module in python_files("resops", "triton_kernels", "tests", "bench"):
        for target in imported_modules(path, module):
            assert target.split(".")[0] != "triton_kernels", f"{path} imports {target}"


# ---- C++ ----------------------------------------------------------------------------------------

INCLUDE = re.compile(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


def includes(path: Path, seen: set[Path] | None = None) -> Iterator[tuple[Path, str]]:
    """All headers that a file includes, through our own headers too, and who includes them."""
    seen = set() if seen is None else seen
    for ours, system in INCLUDE.findall(path.read_text()):
        yield path, ours or system
        if ours:
            candidates = [path.parent / ours, ROOT / "csrc" / ours]  # as the compiler looks
            header = next((h.resolve() for h in candidates if h.is_file()), None)
            if header is not None and header not in seen:
                seen.add(header)
                yield from includes(header, seen)


TORCH_HEADER = re.compile(r"^(ATen|torch|c10|caffe2|pybind11)/")
# Kernels: compiled per instruction set, or as device code; they see pointers and sizes.
KERNELS = [
    *sorted((ROOT / "csrc/cpu").glob("*_kernels.cpp")),
    *sorted((ROOT / "csrc/cuda").glob("*.cu*")),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.name)
def test_kernels_do_not_see_torch(kernel: Path) -> None:
    wrong = [f"{p.name} includes {h}" for p, h in includes(kernel) if TORCH_HEADER.match(h)]
    assert not wrong, wrong


def test_kernels_are_found() -> None:
    assert any(kernel.name == "batch_norm_kernels.cpp" for kernel in KERNELS)


def test_sources_are_globbed() -> None:
    """No source list is written twice: CMakeLists.txt names no op."""
    text = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "setup.py").read_text()
    for op in OPS:
        assert not re.search(rf"\b{op}(_kernels)?\.(cpp|cu|py)\b", text), op


# ---- launches -----------------------------------------------------------------------------------


def test_bindings_set_the_device() -> None:
    """Tensors need not be on the current GPU. A launch needs a stream, and a binding has one only
    from a DeviceCall, which makes the tensors' device the current one for as long as it lives."""
    folder = ROOT / "csrc/cuda/bindings"
    having = [path.name for path in folder.iterdir() if "getStream" in path.read_text()]
    assert having == ["device_call.h"]
    text = (folder / "device_call.h").read_text()
    assert "explicit DeviceCall(const at::Tensor& x) : guard_(x.device())" in text
    assert re.search(r"private:\s+c10::DeviceGuard guard_;", text)


def launches_without_device(path: Path) -> set[str]:
    """Public functions that launch a Triton kernel outside of ``with device_of(...)``, themselves
    or through private ones of the module."""
    launching: set[str] = set()
    calls: list[tuple[str, str]] = []  # outside of device_of: the caller and what it calls

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.With) and any(
            ast.unparse(item.context_expr).startswith("device_of(") for item in node.items
        ):
            return
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Subscript):
                if ast.unparse(node.func.value).endswith("_kernel"):
                    launching.add(function)
            else:
                calls.append((function, ast.unparse(node.func)))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text()), "")
    before = -1
    while before < len(launching):
        before = len(launching)
        launching |= {caller for caller, callee in calls if callee in launching}
    return {name for name in launching if not name.startswith("_")}


LAUNCHERS = [
    path for path in (ROOT / "triton_kernels").glob("*.py") if "_kernel[" in path.read_text()
]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_triton_launches_on_the_device_of_the_tensors(launcher: Path) -> None:
    assert not launches_without_device(launcher)


def test_launches_without_device_are_seen(tmp_path: Path) -> None:
    """The check itself."""
    assert {path.stem for path in LAUNCHERS} >= {"batch_norm", "residual_add", "conv_bn_act"}
    path = tmp_path / "op.py"
    path.write_text(
        "def _merge():\n    merge_kernel[(1,)]()\n"
        "def good(x):\n    with device_of(x):\n        good_kernel[(1,)]()\n        _merge()\n"
        "def bad(x):\n    _merge()\n"
    )
    assert launches_without_device(path) == {"bad"}
