"""The same integers on every compiler: networks x {W8A8, W4A8} x targets, against the interpreter.

Run from the repository root; the real networks and images are expected in ../shared, the compilers
in their environments (`zsq targets install`):

    python -m benchmarks.targets --images 200

The networks are calibrated with noise (what calibrates them does not matter for exactness) and
compared on real images. Cells that are in benchmarks/results/targets.json are not measured again.
OpenVINO is measured twice on CPUs with AVX-512: as it is, and held to AVX2, where 8-bit kernels
saturate; and on files that are made for it (`zsq quantize --target openvino --weight-range 7bit`).
RKNN is measured on files that are made for it, too (`--target rknn`).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from benchmarks.cells import Cell, add_shard, read_cells, run_cells, write_text
from benchmarks.proof import CASES, CIFAR, ROOT, SHARED, STANDARD, source
from graph_tools.model import load
from pipeline.images import ImageSet, ImageWriter, open_images
from pipeline.preprocessing import Preprocessing
from pipeline.run import QuantizeJob, copy_dataset, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)
from pipeline.verify.agreement import compare_targets

RESULTS = ROOT / "benchmarks" / "results" / "targets.json"
OWN: dict[str, dict[str, Any]] = {"openvino": {"weight_range": "7bit"}, "rknn": {}}
SCHEMES: dict[str, dict[str, Any]] = {"W8A8": {}, "W4A8": {"weights": 4}}
NETWORKS = {
    "digits_resnet": CASES["digits_resnet"],
    "digits_mobilenet": CASES["digits_mobilenet"],
    "mlperftiny_resnet8_cifar10_tf2onnx_bn": CASES["mlperftiny_resnet8_cifar10_tf2onnx_bn"],
    "cifar10_resnet20": CASES["cifar10_resnet20"],
    "cifar10_resnet20_folded": CASES["cifar10_resnet20_folded"],
    "cifar10_mobilenetv2": (STANDARD, CIFAR, ""),
    "mcunet_cifar10_32": CASES["mcunet_cifar10_32"],
    "cifar10_resnet56": CASES["cifar10_resnet56"],
    "mobilenet_v1_025_224_imagenet": CASES["mobilenet_v1_025_224_imagenet"],
    "yunet_n_dynamic": CASES["yunet_n_dynamic"],
    "ultraface_rfb320": CASES["ultraface_rfb320"],
    "yolo_fastestv2_coco": CASES["yolo_fastestv2_coco"],
}


def quantized(name: str, scheme: str, folder: Path, own: str = "") -> Path:
    """The quantized file; ``own``: the target it is made for, `OWN` what goes with it."""
    output = folder / f"{name}.{scheme.lower()}{own and '.' + own}.onnx"
    settings = QuantizeSettings(**SCHEMES[scheme], **OWN.get(own, {}))
    if not output.exists():
        (mean, std), _, shape = NETWORKS[name]
        quantize_file(
            QuantizeJob(
                model=source(name),
                output=output,
                input=InputSettings(mean=mean, std=std, input_shape=shape),
                generation=GenerateSettings(method="noise", num_images=64),
                quantization=settings,
                target=own or "onnxruntime",
                verification=VerifySettings(max_images=1),
                threads=1,
            )
        )
    return output


def real_images(name: str, count: int, folder: Path) -> ImageSet:
    (mean, std), data, shape = NETWORKS[name]
    model = load(source(name), input_shape=InputSettings(input_shape=shape).shape())
    path = folder / "images.npz"
    if data:
        preprocessing = Preprocessing(mean=tuple(map(float, mean)), std=tuple(map(float, std)))
        return copy_dataset(
            SHARED / "data" / data, model, preprocessing, path, count=count, seed=0
        )
    gray = np.rint(load_digits().images[-count:, None] * (255 / 16)) / 255
    digits = (gray - float(mean[0])) / float(std[0])
    with ImageWriter(path, count=count, shape=model.input.shape) as writer:
        writer.append(digits.astype(np.float32))
    return open_images(path)


def measure(name: str, scheme: str, args: argparse.Namespace) -> Cell:
    started = time.perf_counter()
    path = quantized(name, scheme, args.files)
    settings = VerifySettings(max_images=args.images, threads=1, timeout=args.timeout)
    with tempfile.TemporaryDirectory() as folder:
        images = real_images(name, args.images, Path(folder))
        found = compare_targets(path, images, settings, args.targets).to_dict()
        if args.targets in ("all", "openvino"):
            rows = _openvino(path, images, settings) if args.targets == "all" else []
            rows = [row for row in rows if row["target"] != "openvino"]
            rows += _own(_openvino, "openvino", name, scheme, images, settings, args)
            found["rows"] += rows
        if args.targets in ("all", "rknn"):
            found["rows"] += _own(_rknn, "rknn", name, scheme, images, settings, args)
    found["model"] = path.name
    kept = read_cells(args.results).get(f"{name} {scheme}")
    if kept is not None and args.targets != "all":  # of these targets alone
        rows = {row["target"]: row for row in (*kept["rows"], *found["rows"])}
        found = kept | {"rows": list(rows.values())}
    return found | {"wall_seconds": round(time.perf_counter() - started, 1)}


Rows = list[dict[str, Any]]


def _own(
    run: Callable[[Path, ImageSet, VerifySettings], Rows],
    target: str,
    name: str,
    scheme: str,
    images: ImageSet,
    settings: VerifySettings,
    args: argparse.Namespace,
) -> Rows:
    """The rows of a target on the file that is made for it."""
    rows = run(quantized(name, scheme, args.files, target), images, settings)
    return [
        row | {"target": row["target"].replace(target, f"{target}, its file")} for row in rows
    ]


def _rknn(path: Path, images: ImageSet, settings: VerifySettings) -> Rows:
    rows: Rows = compare_targets(path, images, settings, "rknn").to_dict()["rows"]
    return rows


def _openvino(path: Path, images: ImageSet, settings: VerifySettings) -> Rows:
    """OpenVINO as it is, and held to AVX2 on CPUs that can do more."""
    found = compare_targets(path, images, settings, "openvino").to_dict()
    rows: Rows = found["rows"]
    if "avx512bw" in found["cpu"]["flags"]:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # read by oneDNN in OpenVINO
        narrow = compare_targets(path, images, settings, "openvino").to_dict()
        del os.environ["ONEDNN_MAX_CPU_ISA"]
        rows = rows + [_narrow(row) for row in narrow["rows"]]
    return rows


def _narrow(row: dict[str, Any]) -> dict[str, Any]:
    explained = {"verdict": "explained", "cause": "saturation (held to AVX2)"}
    name = f"{row['target']} (AVX2)"
    return row | {"target": name} | (explained if row["differing"] else {})


def describe(cell: Cell) -> str:
    parts = [f"{row['target']} {_entry(row)}" for row in cell["rows"]]
    return f"{cell['images']} images: {', '.join(parts)} ({cell['wall_seconds']:.0f} s)"


def _entry(row: dict[str, Any]) -> str:
    if row["verdict"] in ("skipped", "refused"):
        return row["verdict"]
    if not row["differing"]:
        return "0"
    share = 100 * row["share"]
    return (
        f"{share:.0f} %, {row['largest_steps']:.3g}"
        if share >= 1
        else f"{share:.2g} %, {row['largest_steps']:.3g}"
    )


def table(cells: dict[str, Cell]) -> str:
    names: list[str] = []
    for cell in cells.values():
        names += [row["target"] for row in cell["rows"] if row["target"] not in names]
    lines = [
        f"| network | bits | images | {' | '.join(names)} |",
        "|" + "---|" * (3 + len(names)),
    ]
    for name in NETWORKS:
        for scheme in SCHEMES:
            if (cell := cells.get(f"{name} {scheme}")) is not None:
                rows = {row["target"]: _entry(row) for row in cell["rows"]}
                entries = " | ".join(rows.get(target, "-") for target in names)
                lines.append(f"| {name} | {scheme} | {cell['images']} | {entries} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS)
    )
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--targets", default="all")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--files", type=Path, help="folder that keeps the quantized files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true")
    add_shard(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.files = args.files or Path(folder)
        args.files.mkdir(parents=True, exist_ok=True)
        runs = {
            f"{name} {scheme}": partial(measure, name, scheme, args)
            for name in args.networks
            for scheme in args.schemes
        }
        cells = run_cells(args.results, runs, describe, fresh=args.fresh, part=args.shard)
    text = table(cells)
    write_text(args.results.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
