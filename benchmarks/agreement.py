"""Does the torch simulation predict what the written file predicts? Image by image.

Run from the repository root; the real networks and images are expected in ../shared:

    python benchmarks/agreement.py --images-folder DIR

Each network is quantized (learned rounding at W4A8 and W4A4), the written file is run in
onnxruntime and the plan in torch, both on all test images. DIR holds calibration images as
benchmarks/accuracy.py --keep-images leaves them. Prints a markdown table and writes
benchmarks/results/agreement.json.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

import accuracy
import numpy as np
import torch
from cells import Cell, add_shard, run_cells

from graph_tools.model import load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.torch_graph import TorchGraph
from pipeline.evaluate.datasets import open_dataset
from pipeline.evaluate.sessions import open_session
from pipeline.images import open_images
from pipeline.quantize import quantize
from pipeline.quantize.simulate import simulate_plan
from pipeline.settings import QuantizeSettings

ROUNDING = {"W8A8": "nearest", "W4A8": "adaround", "W4A4": "brecq"}


def run_cell(name: str, scheme: str, images: str, folder: Path) -> Cell:
    case = accuracy.CASES[name]
    network = prepare_for_quantization(load(accuracy.model_path(name)))
    weights, activations = accuracy.bits_of(scheme)
    settings = QuantizeSettings(
        weights=weights,
        activations=activations,
        rounding=ROUNDING[scheme],  # type: ignore[arg-type]
    )
    result = quantize(network, open_images(folder / f"{name}.{images}.0.npz"), settings)
    plan, graph = result.plan, TorchGraph(result.model.proto)
    found = {"images": 0, "other_predictions": 0, "elements": 0, "other_elements": 0}
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "q.onnx"
        save(write_qdq(result.model, plan), path)
        session = open_session(path)
        test = open_dataset(accuracy.SHARED / "data" / case.test)
        for batch, _ in test.batches(session.input, case.preprocessing, 50):
            written = session.scores(batch)
            values = simulate_plan(graph, plan, torch.from_numpy(batch))
            simulated = values[graph.output_names[0]].numpy().reshape(len(batch), -1)
            predictions = written.argmax(axis=1) != simulated.argmax(axis=1)
            found["images"] += len(batch)
            found["other_predictions"] += int(np.sum(predictions))
            found["elements"] += written.size
            found["other_elements"] += int(np.sum(written != simulated))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(accuracy.CASES))
    parser.add_argument("--schemes", nargs="+", default=["W4A8", "W4A4"], choices=ROUNDING)
    parser.add_argument("--images", default="dgh")
    parser.add_argument("--images-folder", type=Path, required=True)
    parser.add_argument("--fresh", action="store_true")
    add_shard(parser)
    args = parser.parse_args()
    runs = {
        f"{name}/{scheme}/{args.images}": functools.partial(
            run_cell, name, scheme, args.images, args.images_folder
        )
        for name in args.networks
        for scheme in args.schemes
    }
    path = accuracy.RESULTS / "agreement.json"
    cells = run_cells(
        path,
        runs,
        lambda cell: f"{cell['other_predictions']} differ",
        fresh=args.fresh,
        part=args.shard,
    )
    print("\n| network, bits, images | images | other predictions | other elements |")
    print("|---|---|---|---|")
    for key, cell in cells.items():
        others = f"{cell['other_elements']} of {cell['elements']}"
        print(f"| {key} | {cell['images']} | {cell['other_predictions']} | {others} |")


if __name__ == "__main__":
    main()
