"""The command ``python -m bench``: resops against PyTorch on this machine.

Without a subcommand: the main job. It checks outputs first, then times what passed, trains on
digits, prints tables and writes JSON and a PNG, in under four minutes on two cores.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench import environment
from bench.models import stock_densenet, stock_resnet

RESULTS = environment.ROOT / "bench" / "results"
KINDS = {
    "main": "checks, ResNet-18 and -50, every BatchNorm of ResNet-50, digits (the default)",
    "ops": "every BatchNorm shape and residual_add; --full: all shapes beyond the caches too",
    "models": "training step and inference of ResNets; --full: all five, more batch sizes",
    "densenet": "training step and inference of DenseNet-121; bytes moved and saved",
    "fuse": "resops.fuse on models of torchvision, timm and MONAI; host time of a call",
    "families": "a network of each family: training, inference, saved bytes; --models: of some",
    "compare": "the checks alone: twins on real images, layers, training on digits",
    "roofline": "the memory bandwidth of this machine",
    "show": "print the newest results, or those of the file given",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compare resops with PyTorch on this machine. Needs a clone of the repository.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="jobs:\n" + "\n".join(f"  {name:<10}{text}" for name, text in KINDS.items()),
    )
    parser.add_argument("kind", nargs="?", default="main", choices=KINDS, metavar="job")
    parser.add_argument("file", nargs="?", type=Path, help="results file, for show")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument(
        "--threads", help="comma-separated numbers of threads (default: 1 and all cores)"
    )
    parser.add_argument("--batch", type=int, help="images per batch (default: see the job's notes)")
    parser.add_argument(
        "--dtypes", help="comma-separated, of fp32, bf16, fp16 (default: fp32,bf16)"
    )
    parser.add_argument("--seconds", type=float, help="seconds per comparison")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: to try the job, not to quote"
    )
    parser.add_argument("--full", action="store_true", help="the whole sweep of ops or models")
    parser.add_argument(
        "--models",
        default="",
        help="models, densenet, families: comma-separated names, such as resnet50",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "max-autotune"),
        help="models, densenet, families: time torch.compile as well, in this mode",
    )
    parser.add_argument(
        "--noise", action="store_true", help="random images in place of photographs"
    )
    parser.add_argument("--markdown", action="store_true", help="show: tables for a README")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    if options.file is not None and options.kind != "show":
        parser.error("a results file goes with `show` only")
    try:
        options.threads = options.threads and tuple(int(t) for t in options.threads.split(","))
        if options.threads and min(options.threads) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--threads takes numbers such as 1,2, but got {options.threads!r}")
    options.dtypes = tuple(options.dtypes.split(",")) if options.dtypes else ()
    if unknown := set(options.dtypes) - {"fp32", "bf16", "fp16"}:
        parser.error(f"--dtypes takes fp32, bf16 and fp16, but got {', '.join(sorted(unknown))}")
    options.models = tuple(filter(None, options.models.split(",")))
    stock = stock_densenet if options.kind == "densenet" else stock_resnet
    unknown = set(options.models) - set(stock.CONFIGURATIONS)
    if unknown and options.kind != "families":
        names = ", ".join(stock.CONFIGURATIONS)
        parser.error(f"--models takes {names}, but got {', '.join(sorted(unknown))}")
    if options.batch is not None and options.batch < 2:
        parser.error(f"--batch must be at least 2, but got {options.batch}")
    return options


def show(options: argparse.Namespace) -> int:
    from bench import report, table

    path = options.file or report.newest(options.output)
    if path is None:
        print(f"There are no complete results in {options.output}: run `make bench`.")
        return 1
    try:
        results = report.load(path)
    except (OSError, ValueError) as error:
        print(f"{path} cannot be read: {error}")
        return 1
    if options.markdown:
        print("\n\n".join(table.markdown(part) for part in table.sections(results)))
    else:
        print(f"{path}\n{table.render(results)}")
    return 0


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; the exit status: 0, 1 for a failed check or an error, 130 for an interruption."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.kind == "show":
        return show(options)
    began = time.monotonic()
    environment.restart_with_allocator_settings(list(arguments))
    try:
        import resops  # noqa: F401
        from bench import jobs
    except ImportError as error:
        print(f"The benchmark cannot start: {error}. Run `make bench`, or `pip install -e .`")
        return 1
    from bench.images import NoImages
    from bench.report import ResultsError

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        return jobs.run(options, began)
    except (ResultsError, NoImages, jobs.BadOptions) as error:
        print(error)
        return 1
    except KeyboardInterrupt:  # a second one, while the tables of the first are printed
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
