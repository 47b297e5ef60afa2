"""What schemes, widths, free weight scales and containers cost: top-1, file size, proof.

Run from the repository root; the real networks and images are expected in ../shared:

    python benchmarks/schemes.py --networks cifar10_resnet20 --seeds 0 1 --keep-images DIR

Weights are rounded to nearest, biases corrected. Calibration images are those that
benchmarks/accuracy.py keeps in DIR, generated there if missing. Every cell with weights of 4 bits
is written in both containers, which must give the same outputs, element by element. Prints a
markdown table and writes benchmarks/results/schemes.json; cells that it holds already are not run
again (--fresh runs all).
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from accuracy import CASES, RESULTS, SHARED, model_path
from cells import add_shard, run_cells

from graph_tools.errors import TargetError
from graph_tools.model import load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.quantizer import Plan
from pipeline.evaluate.classification import evaluate_classification
from pipeline.evaluate.datasets import open_dataset
from pipeline.images import open_images
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)

SCHEMES: dict[str, dict[str, Any]] = {
    "W8A16": {"weights": 8, "activations": 16},
    "W8A8": {"weights": 8, "activations": 8},
    "W8A8 free": {"weights": 8, "activations": 8, "weight_scale": "free"},
    "W4A8": {"weights": 4, "activations": 8},
    "W4A8 free": {"weights": 4, "activations": 8, "weight_scale": "free"},
    "W4A8 academic": {"weights": 4, "activations": 8, "scheme": "academic"},
    "W4A4": {"weights": 4, "activations": 4},
    "W4A4 free": {"weights": 4, "activations": 4, "weight_scale": "free"},
    "W4A4 academic": {"weights": 4, "activations": 4, "scheme": "academic"},
}


def in_int4(model: Path, folder: Path, path: Path, images: Path) -> dict[str, Any]:
    """Write the plan in ``folder`` into 4-bit types, too; compare with the file ``path``."""
    network = prepare_for_quantization(load(model))
    other = path.with_name("int4.onnx")
    try:
        save(write_qdq(network, Plan.load(folder / "plan.json"), container="int4"), other)
    except TargetError as error:
        return {"refused": str(error)}
    outputs: list[list[np.ndarray[Any, Any]]] = []
    for file in (path, other):
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        batches = open_images(images).batches(64)
        outputs.append([y for x in batches for y in session.run(None, {name: x})])
    differing = sum(int(np.sum(a != b)) for a, b in zip(*outputs, strict=True))
    return {
        "bytes": other.stat().st_size,
        "elements": sum(y.size for y in outputs[0]),
        "differing": differing,
    }


def run_cell(name: str, scheme: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    model, given = model_path(name), case.preprocessing
    test = open_dataset(SHARED / "data" / case.test)
    args.keep_images.mkdir(parents=True, exist_ok=True)
    kept = args.keep_images / f"{name}.{args.source}.{seed}.npz"
    with tempfile.TemporaryDirectory() as folder:
        job = QuantizeJob(
            model=model,
            output=Path(folder) / "q.onnx",
            images=kept if kept.exists() else None,
            input=InputSettings(mean=case.mean, std=case.std),
            generation=GenerateSettings(num_images=case.num_images, seed=seed),
            quantization=QuantizeSettings(**SCHEMES[scheme]),
            verification=VerifySettings(max_images=args.verify_images),
            threads=args.threads,
        )
        result = quantize_file(job)
        if not kept.exists():
            shutil.copyfile(result.folder / "images.npz", kept)
        cell = {
            "top1": evaluate_classification([job.output], test, given)[0].top1,
            "images": args.source,
            "bytes": job.output.stat().st_size,
            "proof": {
                key: value
                for key, value in result.proof.to_dict().items()
                if key in ("passed", "elements", "differing", "images", "stepwise")
            },
            "accumulator_bits": max(entry.bits for entry in result.proof.accumulators),
            "simulation_exact": all(e.simulation_exact for e in result.proof.accumulators),
            "integer_kernels": result.report["proof"]["kernels"]["num_integer"],
            "seconds": result.report["times"],
        }
        if job.quantization.weights == 4:
            cell["int4"] = in_int4(model, result.folder, job.output, kept)
    return cell


def print_table(cells: dict[str, dict[str, Any]]) -> None:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, cell in cells.items():
        name, scheme, _ = key.split("/")
        found.setdefault((name, scheme), []).append(cell)
    print(
        "\n| network | scheme | top-1 | proof: differing | accumulators | int8 kB | int4 kB |"
    )
    print("|---|---|---|---|---|---|---|")
    for (name, scheme), rows in found.items():
        tops = [row["top1"] for row in rows]
        spread = f" ± {statistics.stdev(tops):.2f}" if len(tops) > 1 else ""
        differing = sum(row["proof"]["differing"] for row in rows)
        elements = sum(row["proof"]["elements"] for row in rows)
        four = rows[0].get("int4", {})
        size = "refused" if "refused" in four else "-"
        if "bytes" in four:
            size = f"{four['bytes'] / 1000:.0f}"
        print(
            f"| {name} | {scheme} | {statistics.mean(tops):.2f}{spread} | {differing:,} of "
            f"{elements:,} | {max(row['accumulator_bits'] for row in rows)} bits | "
            f"{rows[0]['bytes'] / 1000:.0f} | {size} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", default=["cifar10_resnet20"], choices=list(CASES)
    )
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--source", default="dgh", help="which of the images kept in DIR")
    parser.add_argument("--keep-images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--verify-images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "schemes.json")
    add_shard(parser)
    args = parser.parse_args()
    runs = {
        f"{name}/{scheme}/{seed}": functools.partial(run_cell, name, scheme, seed, args)
        for name in args.networks
        for scheme in args.schemes
        for seed in args.seeds
    }
    cells = run_cells(
        args.output,
        runs,
        lambda cell: f"{cell['top1']:.2f} {cell.get('int4', '')}",
        fresh=args.fresh,
        part=args.shard,
    )
    print_table(cells)


if __name__ == "__main__":
    main()
