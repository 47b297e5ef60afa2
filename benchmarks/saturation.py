"""What 16-bit pair sums cost on CPUs without VNNI, and what 7-bit weights cost instead.

One network, quantized with the full range of 8-bit weights and with ``--weight-range 7bit``, on
labelled images: top-1 with onnxruntime's precision option and in its default mode. Run from the
repository root; the network and images are expected in ../shared:

    python benchmarks/saturation.py

On a CPU with VNNI nothing saturates. An emulator shows what other CPUs do:

    python benchmarks/saturation.py --emulator "qemu-x86_64 -cpu Haswell"

Prints a markdown table and writes benchmarks/results/saturation.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
MEAN, STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


def outputs(model: Path, images: Path, count: int, *, exact: bool) -> np.ndarray[Any, Any]:
    """Run in this process."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name, found = session.get_inputs()[0].name, []
    batches = np.load(images)["images"][:count]
    for first in range(0, len(batches), 20):
        found.append(session.run(None, {name: batches[first : first + 20]})[0])
    return np.concatenate(found)


def in_emulator(
    emulator: str, model: Path, images: Path, count: int, folder: Path
) -> dict[str, np.ndarray[Any, Any]]:
    """Run in a process of its own, perhaps on another CPU: outputs by mode."""
    target = folder / "outputs.npz"
    command = [*shlex.split(emulator), str(Path(sys.executable).resolve()), __file__]
    subprocess.run(
        [*command, "--run", str(model), str(images), str(target), "--images", str(count)],
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)} | _library_path(),
    )
    with np.load(target) as found:
        return dict(found)


def _library_path() -> dict[str, str]:
    import os

    return {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PATH") if key in os.environ}


def measure(
    network: str, weights: str, count: int, emulator: str, calibration: int
) -> dict[str, Any]:
    from graph_tools.model import load
    from pipeline.cli import main as zsq
    from pipeline.evaluate.datasets import open_dataset
    from pipeline.images import ImageWriter
    from pipeline.preprocessing import Preprocessing

    source = SHARED / "models" / f"{network}.onnx"
    data = SHARED / "data"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target, images = folder / "q.onnx", folder / "images.npz"
        options = ["--mean", MEAN, "--std", STD, "--data", str(data / "cifar10_train.zip")]
        arguments = ["quantize", str(source), "-o", str(target), *options, "--quiet"]
        limits = [
            "--num-images",
            str(calibration),
            "--verify-images",
            "16",
            "--weight-range",
            weights,
        ]
        assert zsq([*arguments, *limits]) in (0, 1)
        proof = json.loads((folder / "q" / "report.json").read_text())["proof"]
        model = load(source)
        dataset = open_dataset(data / "cifar10_test_dev.zip")
        mean, std = (tuple(map(float, text.split(","))) for text in (MEAN, STD))
        labels = []
        with ImageWriter(images, count=count, shape=model.input.shape) as writer:
            for batch, wanted in dataset.batches(
                model.input, Preprocessing(mean=mean, std=std), 64, limit=count, seed=0
            ):
                writer.append(batch)
                labels.append(wanted)
        truth = np.concatenate(labels)
        found = in_emulator(emulator, target, images, count, folder)
    exact, default = found["exact"], found["default"]
    return {
        "top1_exact": 100 * float(np.mean(exact.argmax(1) == truth)),
        "top1_default": 100 * float(np.mean(default.argmax(1) == truth)),
        "changed": 100 * float(np.mean(exact != default)),
        "first_choices": int(np.sum(exact.argmax(1) != default.argmax(1))),
        "images": len(truth),
        "nodes_at_risk": len(proof["saturation"]["nodes_at_risk"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="cifar10_resnet20")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calibration", type=int, default=256, help="real images")
    parser.add_argument("--emulator", default="", help="command that runs Python elsewhere")
    parser.add_argument("--run", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        model, images, target = args.run
        np.savez(
            target,
            exact=outputs(model, images, args.images, exact=True),
            default=outputs(model, images, args.images, exact=False),
        )
        return
    print(
        "| weights | top-1 exact | top-1 default | outputs changed | first choices | at risk |"
    )
    print("|---|---|---|---|---|---|")
    results = {}
    for weights in ("full", "7bit"):
        found = measure(args.network, weights, args.images, args.emulator, args.calibration)
        results[weights] = found
        print(
            f"| {weights} | {found['top1_exact']:.2f} | {found['top1_default']:.2f} | "
            f"{found['changed']:.2f} % | {found['first_choices']} of {found['images']} | "
            f"{found['nodes_at_risk']} layers |",
            flush=True,
        )
    facts = {"network": args.network, "emulator": args.emulator, "weights": results}
    target = ROOT / "benchmarks" / "results" / "saturation.json"
    others = json.loads(target.read_text()) if target.is_file() else []
    same = (facts["network"], facts["emulator"])
    kept = [entry for entry in others if (entry["network"], entry["emulator"]) != same]
    target.write_text(json.dumps([*kept, facts], indent=1) + "\n")


if __name__ == "__main__":
    main()
