"""Inference against what compiles or deploys a network: torch.compile, ONNX Runtime and OpenVINO.

    python -m bench.models.runtimes [--models resnet18,resnet50,densenet121,unet] [--threads 1]

The stock model, in evaluation, in float32: eager in channels-last; ``torch.compile`` with freezing;
ONNX Runtime and OpenVINO, from the package index (``pip install onnx onnxruntime openvino``), on
the same images. All of them are timed alternately with resops, with the same number of threads. One
that is not installed is left out, with a sentence. Each one's outputs are compared with those of
the stock model in float64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

import resops
from bench import environment, timing
from bench.models import densenet, resnet
from bench.models.compare import inference_copy
from bench.models.stock_unet import StockUNet
from bench.session import EAGER, RESOPS, channels_last

MODELS = ("resnet18", "resnet50", "densenet121", "unet")
BATCH, SIZE = {"unet": 1}, {"unet": 256}  # of others: 4 and 224
# Of the outputs, relative to float64, in the Euclidean norm: what Winograd's algorithm may add in
# 20 to 120 layers.
ALLOWED = 1e-3
Call = Callable[[], object]


class NotInstalled(RuntimeError):
    """A provider's package is not there; the message says which, and how to get it."""


def create(name: str) -> dict[str, nn.Module]:
    """The stock model and ours, with one state; channels-last."""
    device = torch.device("cpu")
    if name.startswith("densenet"):
        models = densenet.create(name, device)
        return {EAGER: models[EAGER], RESOPS: models[RESOPS]}
    if name != "unet":
        return resnet.create_pair(name, device)
    torch.manual_seed(0)
    models = {EAGER: StockUNet(), RESOPS: resops.models.create_model(name)}
    models[RESOPS].load_state_dict(models[EAGER].state_dict(), strict=True)
    return {k: channels_last(model, device) for k, model in models.items()}


def eager(model: nn.Module, images: Tensor, threads: int) -> Call:
    return resnet.inference(model, images, "fp32")


def compiled(model: nn.Module, images: Tensor, threads: int) -> Call:
    """torch.compile, its constants folded (freezing)."""
    import torch._inductor.config as inductor

    frozen = inference_copy(model, "fp32")
    torch._dynamo.reset()
    with inductor.patch(freezing=True), torch.no_grad():
        run = torch.compile(frozen)
        run(images)  # compiles, under this setting

    def forward() -> object:
        with torch.no_grad():
            return run(images)

    return forward


def _onnx_file(model: nn.Module, images: Tensor, folder: str) -> Path:
    try:
        import onnx  # noqa: F401  (torch's exporter asks for it)
    except ImportError:
        raise NotInstalled("onnx is not installed: pip install onnx") from None
    path = Path(folder) / "model.onnx"
    plain = inference_copy(model, "fp32").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    torch.onnx.export(plain, (images.contiguous(),), str(path), dynamo=False)
    return path


def onnxruntime(model: nn.Module, images: Tensor, threads: int) -> Call:
    try:
        import onnxruntime as ort
    except ImportError:
        raise NotInstalled("onnxruntime is not installed: pip install onnxruntime") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = _onnx_file(model, images, folder)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: session.run(None, feed)[0]


def openvino(model: nn.Module, images: Tensor, threads: int) -> Call:
    try:
        import openvino as ov
    except ImportError:
        raise NotInstalled("openvino is not installed: pip install openvino") from None
    plain = inference_copy(model, "fp32").to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    converted = ov.convert_model(plain, example_input=images.contiguous())
    converted.reshape(list(images.shape))
    # Not the narrower type that it takes by itself where the processor has one.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = ov.compile_model(converted, "CPU", settings).create_infer_request()
    feed = images.contiguous().numpy()
    return lambda: request.infer([feed], share_inputs=True)[0]


PROVIDERS: dict[str, Callable[[nn.Module, Tensor, int], Call]] = {
    EAGER: eager,
    "compile + freezing": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def error(output: object, exact: Tensor) -> float:
    """Distance from the truth, relative to it."""
    y = output if isinstance(output, Tensor) else torch.from_numpy(numpy.asarray(output))
    return float((y.double() - exact).norm() / exact.norm())


def measure(name: str, threads: int, seconds: float) -> dict[str, object]:
    """Milliseconds of every provider, and the ratio of each one's time to that of resops."""
    torch.manual_seed(1)
    batch, size = BATCH.get(name, 4), SIZE.get(name, 224)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    models = create(name)
    with torch.inference_mode():
        exact = inference_copy(models[EAGER], "fp32").double()(images.double())
    calls = {RESOPS: resnet.inference(models[RESOPS], images, "fp32")}
    for provider, prepare in PROVIDERS.items():
        try:
            calls[provider] = prepare(models[EAGER], images, threads)
        except NotInstalled as missing:
            print(f"{provider} is left out: {missing}", file=sys.stderr)
    errors = {k: error(call(), exact) for k, call in calls.items()}
    if not max(errors.values()) <= ALLOWED:
        raise AssertionError(f"{name}: outputs are wrong: {errors}, allowed is {ALLOWED}")
    found = timing.alternate(calls, budget_s=seconds, min_rounds=5, warmup=2)
    others = {k: found.ratio(k, RESOPS).median for k in calls if k != RESOPS}
    rivals = {k: ratio for k, ratio in others.items() if k != EAGER}
    return {
        "model": name,
        "batch": batch,
        "size": size,
        "threads": threads,
        "ms": {k: round(found.milliseconds(k).median, 2) for k in calls},
        "over resops": {k: round(ratio, 3) for k, ratio in others.items()},
        "over resops, the best rival": round(min(rivals.values()), 3) if rivals else None,
        "errors": {k: float(f"{e:.1e}") for k, e in errors.items()},
        "rounds": found.milliseconds(RESOPS).rounds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models.runtimes")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each model")
    options = parser.parse_args(arguments)
    with timing.threads(options.threads):
        for name in options.models.split(","):
            print(json.dumps(measure(name, options.threads, options.seconds)), flush=True)
    return 0


if __name__ == "__main__":
    environment.restart_with_allocator_settings(sys.argv[1:], "bench.models.runtimes")
    sys.exit(main())
