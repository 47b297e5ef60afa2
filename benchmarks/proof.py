"""Bit-exactness: onnxruntime unoptimized, optimized, and the integer interpreter, on 200 images.

Run from the repository root; the real networks and images are expected in ../shared:

    python benchmarks/proof.py
    python benchmarks/proof.py --weights 4 --networks cifar10_resnet20

The networks are calibrated with Gaussian noise (what calibrates them does not matter for
exactness) and verified on real images. Prints a markdown table and writes
benchmarks/results/proof.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from graph_tools.model import load
from pipeline.images import ImageWriter, open_images
from pipeline.preprocessing import Preprocessing
from pipeline.run import QuantizeJob, copy_dataset, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)
from pipeline.verify import verify

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
CIFAR, IMAGENET, COCO = "cifar10_test_dev.zip", "imagenet_dev.zip", "coco_dev.zip"
NOISE = 8  # images that calibrate
HALF = ("0.5",), ("0.5",)
STANDARD = ("0.485", "0.456", "0.406"), ("0.229", "0.224", "0.225")
RAW = ("0",), ("0.00392156862745098",)
CASES: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], str, str]] = {
    "cifar10_resnet20": (STANDARD, CIFAR, ""),
    "cifar10_resnet20_folded": (STANDARD, CIFAR, ""),
    "cifar10_resnet56": (STANDARD, CIFAR, ""),
    "mcunet_cifar10_32": (STANDARD, CIFAR, ""),
    "mlperftiny_resnet8_cifar10_tf2onnx_bn": (RAW, CIFAR, ""),
    "mobilenet_v1_025_224_imagenet": (HALF, IMAGENET, ""),
    "yolo_fastestv2_coco": ((("0",), ("1",)), COCO, ""),
    "ultraface_rfb320": ((("0.498",), ("0.502",)), COCO, ""),
    "yunet_n_dynamic": (RAW, COCO, "1,3,320,320"),
    "cifar10_mobilenetv2": (STANDARD, CIFAR, ""),
    "digits_resnet": (HALF, "", ""),
    "digits_mobilenet": (HALF, "", ""),
}


def source(name: str) -> Path:
    """The file of a network, shipped or shared."""
    shipped = ROOT / "models" / f"{name}.onnx"
    return shipped if shipped.is_file() else SHARED / "models" / f"{name}.onnx"


def prove(
    name: str, count: int, quantization: QuantizeSettings, *, interpreted: int
) -> dict[str, Any]:
    (mean, std), data, shape = CASES[name]
    path = source(name)
    settings = InputSettings(mean=mean, std=std, input_shape=shape)
    preprocessing = Preprocessing(mean=tuple(map(float, mean)), std=tuple(map(float, std)))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "q.onnx"
        quantize_file(
            QuantizeJob(
                model=path,
                output=output,
                input=settings,
                generation=GenerateSettings(method="noise", num_images=NOISE),
                quantization=quantization,
                verification=VerifySettings(max_images=1, interpreter_images=0),
            )
        )
        model = load(path, input_shape=settings.shape())
        images = Path(folder) / "verify.npz"
        if data:
            chosen = copy_dataset(
                SHARED / "data" / data, model, preprocessing, images, count=count, seed=0
            )
        else:
            rng = np.random.default_rng(0)
            with ImageWriter(images, count=count, shape=model.input.shape) as writer:
                writer.append(
                    rng.uniform(-1, 1, (count, *model.input.shape)).astype(np.float32)
                )
            chosen = open_images(images)
        proof = verify(
            output, chosen, VerifySettings(max_images=count, interpreter_images=interpreted)
        )
    return summarize(proof.to_dict())


def summarize(proof: dict[str, Any]) -> dict[str, Any]:
    pairs = [t["differences"][0] for t in proof["tensors"] if t["scale"] is not None]
    interpreter = proof["interpreter"]
    runs = list(zip(*(t["differences"] for t in interpreter["tensors"]), strict=True))
    return {
        "passed": proof["passed"],
        "onnxruntime": proof["onnxruntime"],
        "images": proof["images"],
        "elements": proof["elements"],
        "differing": proof["differing"],
        "largest_steps": max(pair["largest_steps"] or 0 for pair in pairs),
        "num_nodes": proof["kernels"]["num_nodes"],
        "num_in_float": len(proof["kernels"]["float"]),
        "in_float": sorted({node["op_type"] for node in proof["kernels"]["float"]}),
        "integer_kernels": proof["kernels"]["integer_kernels"],
        "interpreter": {
            **{
                key: interpreter[key]
                for key in (
                    "images",
                    "elements",
                    "first_difference",
                    "accumulator_bits",
                    "float_nodes",
                    "overflow",
                    "refused",
                )
            },
            "seconds": round(interpreter["seconds"], 2),
            **{
                f"differing_{run[0]['first']}": sum(pair["differing"] for pair in run)
                for run in runs
            },
        },
        "default_differing": sum(
            t["differences"][2]["differing"]
            for t in proof["tensors"]
            if t["scale"] is not None
        ),
        "failures": proof["failures"],
        "warnings": proof["warnings"],
        "seconds": round(proof["seconds"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--interpreted", type=int, help="images of the interpreter")
    parser.add_argument("--weights", type=int, nargs="+", default=[8, 4], choices=[8, 4])
    parser.add_argument("--zero-point", default="auto", choices=["auto", "zero"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/proof.json")
    args = parser.parse_args()
    interpreted = args.images if args.interpreted is None else args.interpreted
    results = {}
    print(
        "| network | bits | images | integers | unoptimized against optimized | interpreter: "
        "images | against unoptimized | against optimized | s an image | not in float | in float |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in args.networks:
        for weights in args.weights:
            settings = QuantizeSettings(weights=weights, zero_point=args.zero_point)
            found = prove(name, args.images, settings, interpreted=interpreted)
            results[f"{name} W{weights}A8"] = found
            it = found["interpreter"]
            told = it["overflow"] or it["refused"]
            print(
                f"| {name} | W{weights}A8 | {found['images']} | {found['elements']:,} | "
                f"{found['differing']} | {it['images']}{told} | "
                f"{it.get('differing_unoptimized', '-')} | "
                f"{it.get('differing_optimized', '-')} | "
                f"{it['seconds'] / max(1, it['images']):.2f} | "
                f"{found['num_nodes'] - found['num_in_float']} of {found['num_nodes']} | "
                f"{' '.join(found['in_float']) or '-'} |",
                flush=True,
            )
            for text in found["failures"]:
                print(f"  {text}", flush=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
