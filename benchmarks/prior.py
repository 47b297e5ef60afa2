"""Top-1 of networks without BatchNormalization, by calibration images: W8A8 and W4A8, nearest.

Every network is folded first, so that nothing in it tells of the training data. The images:

    prior      the tool's own, `--method prior`: synthetic images adapted to the network
    synthetic  what prior starts from: dead leaves and gratings, not adapted
    noise      Gaussian noise, `--method noise`
    real       as many training images

Both bit widths are calibrated with the same images. Run from the repository root; the real
networks and images are expected in ../shared:

    python benchmarks/prior.py --networks cifar10_resnet20_folded --seeds 0 1 2 3 4

Prints a markdown table and writes benchmarks/results/prior.json, one row a cell; cells that the
file holds already are not run again (--fresh runs all).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import CASES, RESULTS, SHARED, model_path
from cells import add_shard, run_cells

from graph_tools.batchnorm import fold_batch_norms
from graph_tools.model import load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from pipeline.evaluate.classification import evaluate_classification
from pipeline.evaluate.datasets import open_dataset
from pipeline.generate import generate
from pipeline.quantize import quantize
from pipeline.run import copy_dataset
from pipeline.settings import GenerateSettings, QuantizeSettings

NETWORKS = {"cifar10_resnet20_folded": CASES["cifar10_resnet20"], **CASES}
IMAGES = ("float", "prior", "synthetic", "noise", "real")
WIDTHS = (8, 4)


def run_cell(name: str, images: str, seed: int, threads: int) -> dict[str, Any]:
    case = NETWORKS[name]
    given = case.preprocessing
    test = open_dataset(SHARED / "data" / case.test)
    path = model_path(name)
    if images == "float":
        top1 = evaluate_classification([path], test, given, threads=threads)[0].top1
        return {f"w{width}": top1 for width in WIDTHS}
    model = fold_batch_norms(load(path))
    network = prepare_for_quantization(model)
    cell: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file, quantized = Path(folder) / "images.npz", Path(folder) / "q.onnx"
        start = time.perf_counter()
        if images == "real":
            calibration = copy_dataset(
                SHARED / "data" / case.calibration,
                model,
                given,
                file,
                count=case.num_images,
                seed=seed,
            )
        else:
            # One step of no length leaves the synthetic images as they are.
            still = {"iterations": 1, "learning_rate": 1e-12} if images == "synthetic" else {}
            method = "noise" if images == "noise" else "prior"
            settings = GenerateSettings(
                method=method, num_images=case.num_images, seed=seed, **still
            )
            calibration = generate(model, settings, file, preprocessing=given).images
        cell["seconds"] = time.perf_counter() - start
        for width in WIDTHS:
            plan = quantize(network, calibration, QuantizeSettings(weights=width)).plan
            save(write_qdq(network, plan, metadata={}), quantized)
            accuracy = evaluate_classification([quantized], test, given, threads=threads)
            cell[f"w{width}"] = accuracy[0].top1
    return cell


def print_table(cells: dict[str, dict[str, Any]], names: list[str]) -> None:
    print(f"\n| network | weights | {' | '.join(IMAGES)} | prior - float | prior - noise |")
    print("|---" * (len(IMAGES) + 4) + "|")
    for name in names:
        for width in WIDTHS:
            found = {
                images: [
                    cell[f"w{width}"]
                    for key, cell in cells.items()
                    if key.split("/")[:2] == [name, images]
                ]
                for images in IMAGES
            }
            means = {images: statistics.mean(tops) for images, tops in found.items() if tops}

            def show(images: str, found: Any = found, means: Any = means) -> str:
                if images not in means:
                    return "-"
                tops = found[images]
                spread = f" ± {statistics.stdev(tops):.2f}" if len(tops) > 1 else ""
                return f"{means[images]:.2f}{spread}"

            gaps = [
                f"{means['prior'] - means[images]:+.2f}"
                if {"prior", images} <= set(means)
                else "-"
                for images in ("float", "noise")
            ]
            print(
                f"| {name} | {width} | {' | '.join(map(show, IMAGES))} | {' | '.join(gaps)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS)
    )
    parser.add_argument("--images", nargs="+", default=list(IMAGES), choices=IMAGES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "prior.json")
    add_shard(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = {
        f"{name}/{images}/{seed}": functools.partial(
            run_cell, name, images, seed, args.threads
        )
        for name in args.networks
        for images in args.images
        for seed in (args.seeds if images != "float" else [0])
    }
    cells = run_cells(
        args.output,
        runs,
        lambda cell: f"{cell['w8']:.2f} {cell['w4']:.2f}",
        fresh=args.fresh,
        part=args.shard,
    )
    print_table(cells, args.networks)


if __name__ == "__main__":
    main()
