"""Every network that is at hand: does it load, does it compute the same, how fast is an engine.

Run from the repository root, by default over the real networks in ../shared/models and over
the exported zoo of tests/exporters, which is made in a temporary folder:

    python benchmarks/zoo.py                 # TorchGraph
    python benchmarks/zoo.py --engine ort    # OrtGraph, in the environment of onnxruntime-training

Prints a markdown table and writes benchmarks/results/zoo.json. Results of the two engines are
merged there, by file. The deviation is the engine's largest from unoptimized onnxruntime on the
original file for Gaussian images, relative to the largest value of each output and absolute (a
Sigmoid far in its tail is off by 1e-7, which is much of its 1e-5).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from graph_tools.batchnorm import find_batch_norms
from graph_tools.equivalence import largest_difference, run_model
from graph_tools.errors import DynamicShapeError, ZsqError
from graph_tools.model import Model, load
from graph_tools.reading import read_proto

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
FREE_SHAPE = (1, 3, 320, 320)  # of files that leave height and width open
MAX_PIXELS = 8 * 224 * 224  # in a batch
SECONDS = 0.5  # at least, for each speed

Engine = Callable[[onnx.ModelProto, list[str]], Callable[[torch.Tensor], dict[str, Any]]]


def engine_named(name: str) -> Engine:
    if name == "torch":
        from graph_tools.torch_graph import TorchGraph

        return lambda proto, outputs: TorchGraph(proto, outputs=outputs)
    from graph_tools.ort_graph import OrtGraph  # its environment is not everyone's

    return lambda proto, outputs: OrtGraph(proto, outputs=outputs)  # type: ignore[no-any-return]


def load_any(path: Path) -> tuple[Model, float]:
    """Load a file, at a usual size if it leaves the size open; also return the seconds."""
    start = time.perf_counter()
    try:
        model = load(path)
    except DynamicShapeError:
        start = time.perf_counter()
        model = load(path, input_shape=FREE_SHAPE)
    return model, time.perf_counter() - start


def float_outputs(model: Model) -> list[str]:
    return [
        value.name
        for value in model.proto.graph.output
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]


def deviation(model: Model, path: Path, engine: Engine) -> tuple[float, float] | None:
    """Return the engine's largest deviation from the file, relative and absolute.

    None if onnxruntime does not run the file.
    """
    original, _ = read_proto(path)
    outputs, names = float_outputs(model), [value.name for value in original.graph.output]
    sizes = [size for size in (model.input.batch, model.fixed_batch) if size]
    for batch in sizes or (1, 2, 3, 4):
        rng = np.random.default_rng(0)
        images = rng.normal(size=(batch, *model.input.shape)).astype(np.float32)
        try:
            results = run_model(original, {model.input.name: images}, threads=1)
        except RuntimeError:
            continue
        expected = dict(zip(names, results, strict=True))
        values = engine(model.proto, outputs)(torch.from_numpy(images))
        actual = {name: values[name].detach().cpu().numpy() for name in outputs}
        relative = largest_difference(
            [actual[name] for name in outputs], [expected[name] for name in outputs]
        )
        absolute = max(float(np.abs(actual[n] - expected[n]).max()) for n in outputs)
        return relative, absolute
    return None


def per_second(work: Callable[[], object], images: int) -> float:
    """Return the images a second of `work`, which takes `images` at once; best of its runs."""
    work()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return images / best


def speeds(model: Model, engine: Engine) -> tuple[int, float, float]:
    """Return batch size and images a second forward, and forward and back to the image."""
    pixels = model.input.height * model.input.width
    batch = model.fixed_batch or max(1, min(32, MAX_PIXELS // pixels))
    outputs = float_outputs(model)
    running = engine(model.proto, outputs)
    images = torch.randn(batch, *model.input.shape)

    def forward() -> None:
        with torch.no_grad():
            running(images)

    def both() -> None:
        leaf = images.clone().requires_grad_()
        values = running(leaf)
        sum(values[name].sum() for name in outputs).backward()  # type: ignore[union-attr]

    return batch, per_second(forward, batch), per_second(both, batch)


def measure(path: Path, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is true of the file and what is true of the engine on it."""
    model, seconds = load_any(path)
    facts = {
        "load_seconds": round(seconds, 2),
        "num_batch_norms": len(find_batch_norms(model)),
        "num_nodes": len(model.proto.graph.node),
        "fixed_batch": model.fixed_batch,
    }
    found = deviation(model, path, engine)
    batch, forward, both = speeds(model, engine)
    return facts, {
        "deviation": None if found is None else float(f"{found[0]:.3g}"),
        "absolute_deviation": None if found is None else float(f"{found[1]:.3g}"),
        "batch": batch,
        "forward_per_second": round(forward, 1),
        "forward_backward_per_second": round(both, 1),
    }


def zoo_files(folder: Path) -> Iterator[Path]:
    """Export the zoo: each network kept and folded by TorchScript, some by dynamo."""
    sys.path.insert(0, str(ROOT))  # the tests are not installed
    from tests.exporters.export import Export, export
    from tests.exporters.networks import ZOO

    dynamo = ("plain", "shufflenet", "detector", "yolo", "vit", "unet_bilinear")
    for network, entry in ZOO.items():
        newest, oldest = max(17, entry.opset), entry.opset
        yield export(Export(network=network, exporter="script", opset=newest), folder)
        kept = Export(
            network=network, exporter="script", opset=oldest, keep=False, free="none"
        )
        yield export(kept, folder)
        if network in dynamo:
            try:
                yield export(Export(network=network, exporter="dynamo", opset=20), folder)
            except ImportError as error:
                print(f"{network} was not exported by dynamo: {error}")


def row(name: str, facts: dict[str, Any], results: dict[str, Any]) -> str:
    shown = " | ".join(
        "-" if results[key] is None else f"{results[key]:.1e}"
        for key in ("deviation", "absolute_deviation")
    )
    return (
        f"| {name} | {facts['load_seconds']:.2f} | {facts['num_batch_norms']} | {shown} | "
        f"{results['batch']} | {results['forward_per_second']:,.0f} | "
        f"{results['forward_backward_per_second']:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, default=ROOT.parent / "shared" / "models"
    )
    parser.add_argument("--engine", choices=["torch", "ort"], default="torch")
    parser.add_argument("--no-zoo", action="store_true", help="only the files of the folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = engine_named(args.engine)
    merged = json.loads(args.output.read_text()) if args.output.exists() else {}
    files = merged.setdefault("files", {})
    print(
        "| network | load s | BN | relative | absolute | batch | forward/s | forward+backward/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        real = sorted(args.folder.glob("*.onnx"))
        paths = [*real, *(() if args.no_zoo else zoo_files(Path(made)))]
        for path in paths:
            entry = files.setdefault(path.stem, {})
            try:
                facts, results = measure(path, engine)
            except (ZsqError, RuntimeError) as error:
                entry[args.engine] = {"error": str(error)[:300]}
                print(f"| {path.stem} | {str(error)[:100]} |", flush=True)
                continue
            entry.update(facts)
            entry[args.engine] = results
            print(row(path.stem, facts, results), flush=True)
    merged.setdefault("runs", {})[args.engine] = {
        "threads": 1,
        "cpu": platform.processor() or platform.machine(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(merged, indent=1) + "\n")


if __name__ == "__main__":
    main()
