"""Load time by number of nodes, and peak memory by bytes of weights.

Times are those of the processor. Each measurement runs in a process of its own, because the peak
of a process never falls::

    python benchmarks/large.py
    python benchmarks/large.py --nodes 500 1000 2000 5000 --gigabytes 0.5 2.4

Prints two tables and writes benchmarks/results/large.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "large.json"


def deep_network(path: Path, num_nodes: int, channels: int = 4) -> None:
    """Write residual blocks, BatchNormalization kept, with the shape chains of exporters."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def add(op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], output, **attributes))
        return output

    def weight(name: str, *shape: int, low: float = -0.2, high: float = 0.2) -> str:
        values = rng.uniform(low, high, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(values, name))
        return name

    def number(name: str, value: int | list[int]) -> str:
        array = numpy_helper.from_array(np.array(value, np.int64))
        return add("Constant", [], name, value=array)

    x = add("Conv", ["x", weight("stem.w", channels, 3, 3, 3)], "stem", pads=[1] * 4)
    block = 0
    while len(nodes) < num_nodes - 3:
        block += 1
        b = f"block{block}"
        w = weight(f"{b}.w", channels, channels, 3, 3)
        y = add("Conv", [x, w], f"{b}.conv", pads=[1] * 4)
        statistics = [
            weight(f"{b}.{name}", channels, low=low, high=low + 0.1)
            for name, low in (("g", 0.1), ("b", 0.0), ("m", 0.0), ("v", 1.0))
        ]
        y = add("BatchNormalization", [y, *statistics], f"{b}.bn")
        x = add("Add", [add("Relu", [y], f"{b}.relu"), x], f"{b}.add")
        if block % 5 == 0:  # x.view(x.size(0), channels, 8, 8)
            size = add(
                "Gather", [add("Shape", [x], f"{b}.shape"), number(f"{b}.i", 0)], f"{b}.n"
            )
            size = add("Unsqueeze", [size, number(f"{b}.axes", [0])], f"{b}.n1")
            rest = number(f"{b}.rest", [channels, 8, 8])
            x = add(
                "Reshape", [x, add("Concat", [size, rest], f"{b}.to", axis=0)], f"{b}.view"
            )
            x = add("Identity", [x], f"{b}.out")
    x = add("Flatten", [add("GlobalAveragePool", [x], "pool")], "flat")
    add("Gemm", [x, weight("head", channels, 10)], "out")
    _save(path, nodes, weights, [3, 8, 8], 10)


def wide_network(path: Path, channels: int, layers: int) -> int:
    """Write a chain of 1x1 convolutions with external data; return the bytes of weights."""
    rng = np.random.default_rng(0)
    size = 4 * channels * channels
    values = rng.standard_normal((channels, channels), np.float32) / np.float32(channels**0.5)
    with path.with_suffix(".bin").open("wb") as file:
        for _ in range(layers):
            file.write(values.data)
    nodes = [helper.make_node("Conv", ["x", "stem"], ["t0"], "stem")]
    stem = rng.standard_normal((channels, 3, 1, 1), np.float32)
    weights = [numpy_helper.from_array(stem, "stem")]
    for i in range(layers):
        tensor = TensorProto(
            name=f"w{i}",
            data_type=TensorProto.FLOAT,
            dims=[channels, channels, 1, 1],
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": f"{path.stem}.bin", "offset": size * i, "length": size}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
        nodes.append(helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"c{i}"], f"conv{i}"))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"t{i + 1}"], f"relu{i}"))
    nodes.append(helper.make_node("GlobalAveragePool", [f"t{layers}"], ["pool"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pool"], ["out"], "flat"))
    _save(path, nodes, weights, [3, 2, 2], channels)
    return size * layers


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    image: list[int],
    classes: int,
) -> None:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *image])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", classes])],
        weights,
    )
    opset = [helper.make_opsetid("", 17)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    )


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far, mapped files included."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_stages(path: Path) -> dict[str, Any]:
    """Time each stage on one network."""
    from graph_tools.model import load, save
    from graph_tools.prepare import prepare_for_quantization
    from graph_tools.qdq import write_qdq
    from graph_tools.torch_graph import TorchGraph
    from pipeline.images import ImageWriter, open_images
    from pipeline.quantize import quantize
    from pipeline.settings import QuantizeSettings, VerifySettings
    from pipeline.verify import verify

    seconds: dict[str, float] = {}
    start = time.process_time()

    def lap(stage: str) -> None:
        nonlocal start
        seconds[stage] = round(time.process_time() - start, 2)
        start = time.process_time()

    model = load(path)
    lap("load")
    num_nodes = len(model.proto.graph.node)
    TorchGraph(model.proto)
    lap("torch graph")
    network = prepare_for_quantization(model)
    lap("prepare")
    shape = model.input.shape
    with ImageWriter(path.with_suffix(".npz"), count=2, shape=shape) as writer:
        writer.append(np.random.default_rng(0).standard_normal((2, *shape), np.float32))
    images = open_images(path.with_suffix(".npz"), shape=shape)
    start = time.process_time()
    plan = quantize(network, images, QuantizeSettings()).plan
    lap("quantize")
    written = path.with_suffix(".q.onnx")
    save(write_qdq(network, plan), written)
    lap("write")
    verify(written, images, VerifySettings())
    lap("verify")
    return {"num_nodes": num_nodes, "seconds": seconds}


def measure_load(path: Path) -> dict[str, Any]:
    """Load one network, then run it in torch, forward and back to one image."""
    import onnx_graphsurgeon  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch

    from graph_tools.model import load
    from graph_tools.torch_graph import TorchGraph

    before, start = peak_bytes(), time.process_time()
    model = load(path)
    seconds = round(time.process_time() - start, 2)
    image = torch.zeros(1, *model.input.shape, requires_grad=True)
    outputs = TorchGraph(model.proto)(image)
    torch.autograd.backward([value.sum() for value in outputs.values()])
    assert image.grad is not None
    return {"seconds": seconds, "before": before, "peak": peak_bytes()}


def measure_quantize(path: Path) -> dict[str, Any]:
    """Run ``zsq quantize --method noise --num-images 2`` on one network."""
    from pipeline.cli import main as zsq

    start = time.process_time()
    options = ["--method", "noise", "--num-images", "2", "--threads", "1", "--quiet"]
    code = zsq(["quantize", str(path), *options])
    return {
        "seconds": round(time.process_time() - start, 2),
        "peak": peak_bytes(),
        "exit code": code,
    }


MEASURES = {"stages": measure_stages, "load": measure_load, "quantize": measure_quantize}


def in_a_child(measure: str, path: Path) -> dict[str, Any]:
    """Run one of `MEASURES` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", measure, "--path", str(path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="*", default=[500, 1000, 2000, 5000])
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[1.2, 2.4])
    parser.add_argument("--channels", type=int, default=8192)
    parser.add_argument("--measure", choices=list(MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.path)))
        return
    deep, wide = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        stages = ("load", "torch graph", "prepare", "quantize", "write", "verify")
        if options.nodes:
            print(f"| nodes | {' | '.join(stages)} |")
            print("|---" * (len(stages) + 1) + "|")
        for count in options.nodes:
            deep_network(path, count)
            row = in_a_child("stages", path)
            deep.append({**row, "num_nodes_of_file": count})
            times = " | ".join(f"{row['seconds'][stage]:.1f}" for stage in stages)
            print(f"| {count} | {times} |", flush=True)
        if options.gigabytes:
            print(
                "\n| weights, MB | load, s | peak, MB | of weights | quantize, s | peak, MB |"
            )
            print("|---|---|---|---|---|---|")
        for gigabytes in options.gigabytes:
            layers = round(gigabytes * 1e9 / (4 * options.channels**2))
            size = wide_network(path, options.channels, max(1, layers))
            loaded, done = in_a_child("load", path), in_a_child("quantize", path)
            wide.append({"bytes": size, "load": loaded, "quantize": done})
            print(
                f"| {size / 1e6:.0f} | {loaded['seconds']:.1f} | {loaded['peak'] / 1e6:.0f} | "
                f"{loaded['peak'] / size:.2f} | {done['seconds']:.1f} | "
                f"{done['peak'] / 1e6:.0f} |",
                flush=True,
            )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"deep": deep, "wide": wide}, indent=1) + "\n")


if __name__ == "__main__":
    main()
