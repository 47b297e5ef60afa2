"""Top-1 of power-of-two files by calibration images: generated, noise, real.

Noise comes in two kinds: ``noise`` is the tool's own (pixels around middle gray, in the model's
input range), ``normal`` is N(0, 1) in the model's input units, which flatters noise where the
input is normalized to about that.

Run from the repository root; the real networks and images are expected in ../shared:

    python benchmarks/accuracy.py --networks cifar10_resnet20 --seeds 0 1 2
    python benchmarks/accuracy.py --networks cifar10_resnet20 --weights 4 --rounding adaround

Prints a markdown table and writes benchmarks/results/accuracy.json, one row a cell, or for another
scheme a file named after it, such as accuracy_w4a8_adaround.json; cells that the file holds already
are not run again (--fresh runs all). With --keep-images DIR images are made once for all schemes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graph_tools.model import load
from pipeline.evaluate.classification import evaluate_classification
from pipeline.evaluate.datasets import open_dataset
from pipeline.images import ImageWriter
from pipeline.preprocessing import Preprocessing
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
RESULTS = Path(__file__).resolve().parent / "results"
IMAGENET = ("0.485", "0.456", "0.406"), ("0.229", "0.224", "0.225")


@dataclass(frozen=True, kw_only=True)
class Case:
    mean: tuple[str, ...]
    std: tuple[str, ...]
    test: str
    calibration: str
    num_images: int


CIFAR = {"test": "cifar10_test_dev.zip", "calibration": "cifar10_train.zip", "num_images": 256}
CASES = {
    "cifar10_resnet20": Case(mean=IMAGENET[0], std=IMAGENET[1], **CIFAR),
    "cifar10_resnet56": Case(mean=IMAGENET[0], std=IMAGENET[1], **CIFAR),
    "mcunet_cifar10_32": Case(mean=IMAGENET[0], std=IMAGENET[1], **CIFAR),
    "mlperftiny_resnet8_cifar10_tf2onnx_bn": Case(
        mean=("0",), std=("0.00392156862745098",), **CIFAR
    ),
    "mobilenet_v1_025_224_imagenet": Case(
        mean=("0.5",),
        std=("0.5",),
        test="imagenet_dev.zip",
        calibration="imagenet_dev.zip",
        num_images=64,
    ),
}


def normal_noise(model: Path, folder: Path, count: int, seed: int) -> Path:
    shape = load(model).input.shape
    with ImageWriter(folder / "normal.npz", count=count, shape=shape) as writer:
        rng = np.random.default_rng(seed)
        writer.append(rng.standard_normal((count, *shape)).astype(np.float32))
    return folder / "normal.npz"


def run_cell(name: str, images: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    model = SHARED / "models" / f"{name}.onnx"
    test = open_dataset(SHARED / "data" / case.test)
    given = Preprocessing(mean=tuple(map(float, case.mean)), std=tuple(map(float, case.std)))
    kept = None
    if args.keep_images is not None and images in ("dgh", "noise"):
        args.keep_images.mkdir(parents=True, exist_ok=True)
        kept = args.keep_images / f"{name}.{images}.{seed}.npz"
    start = time.perf_counter()
    if images == "float":
        accuracy = evaluate_classification([model], test, given)[0]
        return {"top1": accuracy.top1, "seconds": time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as folder:
        job = QuantizeJob(
            model=model,
            output=Path(folder) / "q.onnx",
            data=SHARED / "data" / case.calibration if images == "real" else None,
            images=normal_noise(model, Path(folder), case.num_images, seed)
            if images == "normal"
            else kept
            if kept is not None and kept.exists()
            else None,
            input=InputSettings()
            if args.guess
            else InputSettings(mean=case.mean, std=case.std),
            generation=GenerateSettings(
                method="noise" if images == "noise" else "dgh",
                num_images=case.num_images,
                seed=seed,
                **({"iterations": args.iterations} if args.iterations else {}),
            ),
            quantization=QuantizeSettings(
                weights=args.weights,
                activations=args.activations,
                rounding=args.rounding,
                rounding_iterations=args.rounding_iterations,
                bias_correction="none" if args.no_bias_correction else "empirical",
            ),
            verification=VerifySettings(max_images=args.verify_images),
        )
        result = quantize_file(job)
        seconds = time.perf_counter() - start
        if kept is not None and not kept.exists():
            shutil.copyfile(result.folder / "images.npz", kept)
        accuracy = evaluate_classification([job.output], test, given)[0]
    return {
        "top1": accuracy.top1,
        "seconds": seconds,
        "times": result.report["times"],
        "passed": result.proof.passed,
        "sqnr_db": [output["sqnr_db"] for output in result.report["quantization"]["outputs"]],
    }


def run_cells(
    args: argparse.Namespace,
    run: Callable[[str, str, int], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
) -> dict[str, dict[str, Any]]:
    """Run the cells that the results file does not hold yet; it is written after each."""
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    cells: dict[str, dict[str, Any]] = {}
    if args.output.exists() and not args.fresh:
        cells = json.loads(args.output.read_text())
    for name in args.networks:
        for images in args.images:
            for seed in args.seeds if images != "float" else [0]:
                key = f"{name}/{images}/{seed}"
                if key not in cells:
                    cells[key] = run(name, images, seed)
                    args.output.write_text(json.dumps(cells, indent=1) + "\n")
                    print(f"{key}: {describe(cells[key])}", flush=True)
    return cells


def print_table(cells: dict[str, dict[str, Any]], names: list[str]) -> None:
    columns = ("float", "real", "dgh", "noise", "normal")
    print(
        "\n| network | float | real | dgh | noise | N(0,1) | dgh - float | dgh - real | dgh s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        found = {
            c: [v for k, v in cells.items() if k.split("/")[:2] == [name, c]] for c in columns
        }
        means = {c: statistics.mean(v["top1"] for v in f) for c, f in found.items() if f}

        def show(
            c: str, found: dict[str, Any] = found, means: dict[str, float] = means
        ) -> str:
            if c not in means:
                return "-"
            tops = [v["top1"] for v in found[c]]
            spread = f" +-{statistics.stdev(tops):.2f}" if len(tops) > 1 else ""
            return f"{means[c]:.2f}{spread}"

        gaps = [
            f"{means['dgh'] - means[c]:+.2f}" if {"dgh", c} <= set(means) else "-"
            for c in ("float", "real")
        ]
        seconds = [v["seconds"] for v in found["dgh"]]
        took = f"{statistics.mean(seconds):.0f}" if seconds else "-"
        print(f"| {name} | {' | '.join(map(show, columns))} | {' | '.join(gaps)} | {took} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--images", nargs="+", default=["float", "real", "noise", "normal", "dgh"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--iterations", type=int, default=0)
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--activations", type=int, default=8)
    parser.add_argument("--rounding", default="nearest")
    parser.add_argument("--rounding-iterations", type=int, default=0)
    parser.add_argument("--keep-images", type=Path, help="folder")
    parser.add_argument("--no-bias-correction", action="store_true")
    parser.add_argument("--guess", action="store_true", help="do not give mean and std")
    parser.add_argument("--verify-images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.output is None:
        scheme = f"_w{args.weights}a{args.activations}_{args.rounding}"
        args.output = RESULTS / f"accuracy{scheme if scheme != '_w8a8_nearest' else ''}.json"
    cells = run_cells(
        args,
        lambda name, images, seed: run_cell(name, images, seed, args),
        lambda cell: f"{cell['top1']:.2f} ({cell['seconds']:.0f} s)",
    )
    print_table(cells, args.networks)


if __name__ == "__main__":
    main()
