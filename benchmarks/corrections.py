"""What each correction is worth: top-1 of files rounded to nearest, corrections one by one.

Run from the repository root; the real networks and images are expected in ../shared:

    python benchmarks/corrections.py --seeds 0 1 --images-folder FOLDER

Calibration images named NETWORK.IMAGES.SEED.npz (such as cifar10_resnet20.dgh.0.npz) are taken from
--images-folder where they are there; real ones are otherwise drawn, and others left out. No network
here has smooth activations, so one is trained on scikit-learn's digits first: DigitsMobileNet with
hard-swish in place of ReLU6 (seconds; the file stays beside the results of --work).

Prints a markdown table and writes benchmarks/results/corrections.json, one row a cell; cells that
the file holds already are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import CASES, RESULTS, SHARED, Case

from graph_tools.compare import compare_tensors
from graph_tools.equalization import equalize_channels
from graph_tools.model import Model, load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.shift_negative import find_shiftable
from pipeline.evaluate.classification import evaluate_classification
from pipeline.evaluate.datasets import open_dataset
from pipeline.images import ImageSet, open_images
from pipeline.preprocessing import Preprocessing
from pipeline.quantize import quantize
from pipeline.run import copy_dataset
from pipeline.settings import QuantizeSettings

ROOT = Path(__file__).resolve().parent.parent
SWISH = "digits_hardswish"
NETWORKS = (
    "cifar10_resnet20",
    "mcunet_cifar10_32",
    "mlperftiny_resnet8_cifar10_tf2onnx_bn",
    "mobilenet_v1_025_224_imagenet",
    SWISH,
)
SCHEMES = ((8, 8), (4, 8), (4, 4))
CORRECTIONS: dict[str, dict[str, Any]] = {
    "off": {"bias_correction": "none"},
    "bias, analytic": {"bias_correction": "analytic"},
    "bias, empirical (default)": {},
    "second moments": {"second_moment_correction": True},
    "equalization alone": {"bias_correction": "none", "equalization": True},
    "equalization": {"equalization": True},
    "outliers beyond 24 alone": {"bias_correction": "none", "outlier_z": 24.0},
    "outliers beyond 6": {"outlier_z": 6.0},
    "shift alone": {"bias_correction": "none", "shift_negative": True},
    "shift": {"shift_negative": True},
}


def hard_swish_digits(work: Path) -> tuple[Path, Case]:
    """The trained network, and where its digits are (as ``Case.test`` and ``calibration``)."""
    sys.path.insert(0, str(ROOT / "models"))
    import numpy as np
    import train_digits
    from architectures import DigitsMobileNet

    model, training, test = (
        work / f"{SWISH}{end}" for end in (".onnx", ".train.npz", ".test.npz")
    )
    if not model.exists():
        torch.manual_seed(0)
        network = DigitsMobileNet()
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ReLU6):
                    setattr(module, name, torch.nn.Hardswish())
        train_digits.spread_batch_norms(network)
        digits, _ = train_digits.load_split()
        train_digits.train(network, digits, epochs=train_digits.EPOCHS, seed=0)
        np.savez(training, images=digits.images, labels=digits.labels)
        train_digits.write_held_out(test)
        train_digits.export(network, model, {})
    case = Case(
        mean=("0.5",), std=("0.5",), test=str(test), calibration=str(training), num_images=256
    )
    return model, case


def calibration(
    name: str, images: str, seed: int, model: Model, case: Case, args: argparse.Namespace
) -> ImageSet | None:
    if args.images_folder is not None:
        kept = args.images_folder / f"{name}.{images}.{seed}.npz"
        if kept.exists():
            return open_images(kept)
    if images != "real":
        return None
    given = Preprocessing(mean=tuple(map(float, case.mean)), std=tuple(map(float, case.std)))
    path = args.work / f"{name}.{images}.{seed}.npz"
    data = SHARED / "data" / case.calibration
    return copy_dataset(data, model, given, path, count=case.num_images, seed=seed)


def run_row(
    name: str,
    images: str,
    seed: int,
    scheme: tuple[int, int],
    missing: list[str],
    args: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Cells of one network, images, seed and scheme; the test images are read once for all."""
    path, case = SHARED / "models" / f"{name}.onnx", CASES.get(name)
    if case is None:
        path, case = hard_swish_digits(args.work)
    given = Preprocessing(mean=tuple(map(float, case.mean)), std=tuple(map(float, case.std)))
    model = load(path)
    chosen = calibration(name, images, seed, model, case, args)
    if chosen is None:
        return {}
    prepared = prepare_for_quantization(model)
    cells: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for correction in missing:
            changes = CORRECTIONS[correction]
            if "shift_negative" in changes and not find_shiftable(prepared):
                continue
            settings = QuantizeSettings(weights=scheme[0], activations=scheme[1], **changes)  # type: ignore[arg-type]
            start = time.perf_counter()
            network = equalize_channels(prepared) if settings.equalization else prepared
            result = quantize(network, chosen, settings, seed=seed)
            seconds = time.perf_counter() - start
            written = write_qdq(result.model, result.plan)
            files[correction] = Path(folder) / f"{len(files)}.onnx"
            save(written, files[correction])
            cells[correction] = {"seconds": seconds}
            if name == SWISH:  # whose accuracy alone says little
                output = prepared.outputs[0]
                compared = compare_tensors(
                    prepared.proto, written, {output: output}, chosen.batches(64)
                )
                cells[correction]["sqnr_db"] = compared[output].sqnr_db
        test = open_dataset(SHARED / "data" / case.test)
        accuracies = evaluate_classification(
            [*files.values()], test, given, threads=1, limit=args.test_images or None
        )
        for correction, accuracy in zip(files, accuracies, strict=True):
            cells[correction]["top1"] = accuracy.top1
    return cells


def print_table(cells: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    columns = [(name, images) for name in args.networks for images in args.images]
    found: dict[tuple[str, ...], list[float]] = {}
    for key, cell in cells.items():
        name, images, _, scheme, correction = key.split("/")
        found.setdefault((name, images, scheme, correction), []).append(cell["top1"])
        if name == SWISH:
            found.setdefault((name, images, scheme, correction, "dB"), []).append(
                cell["sqnr_db"]
            )
    columns = [c for c in columns if any(key[:2] == c for key in found)]
    print("\n| | correction | " + " | ".join(f"{n} ({i})" for n, i in columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for weights, activations in SCHEMES:
        scheme = f"w{weights}a{activations}"
        for correction in CORRECTIONS:

            def show(
                column: tuple[str, str], scheme: str = scheme, correction: str = correction
            ) -> str:
                tops = found.get((*column, scheme, correction))
                if not tops:
                    return "-"
                decibels = found.get((*column, scheme, correction, "dB"))
                extra = f" ({statistics.mean(decibels):.1f} dB)" if decibels else ""
                return f"{statistics.mean(tops):.2f}{extra}"

            print(f"| {scheme.upper()} | {correction} | {' | '.join(map(show, columns))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--images", nargs="+", default=["real", "dgh"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images-folder", type=Path)
    parser.add_argument("--test-images", type=int, default=2000, help="0 for all")
    parser.add_argument("--work", type=Path, help="folder for what is made on the way")
    parser.add_argument("--output", type=Path, default=RESULTS / "corrections.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.work is None:
        args.work = Path(tempfile.mkdtemp())
    args.work.mkdir(parents=True, exist_ok=True)
    cells: dict[str, dict[str, Any]] = {}
    if args.output.exists():
        cells = json.loads(args.output.read_text())
    for seed in args.seeds:
        for name in args.networks:
            for images in args.images:
                for scheme in SCHEMES:
                    row = f"{name}/{images}/{seed}/w{scheme[0]}a{scheme[1]}"
                    missing = [c for c in CORRECTIONS if f"{row}/{c}" not in cells]
                    if not missing:
                        continue
                    for correction, cell in run_row(
                        name, images, seed, scheme, missing, args
                    ).items():
                        cells[f"{row}/{correction}"] = cell
                        print(f"{row}/{correction}: {cell['top1']:.2f}", flush=True)
                    args.output.write_text(json.dumps(cells, indent=1) + "\n")
    print_table(cells, args)


if __name__ == "__main__":
    main()
