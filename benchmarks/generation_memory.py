"""Peak memory of image generation for few and for many images.

Each count runs in a process of its own, because the peak of a process never falls. The allocator
needs some steps to reach its level, so the smallest count needs enough iterations::

    python benchmarks/generation_memory.py
    python benchmarks/generation_memory.py --model ../shared/models/cifar10_resnet20.onnx
    python benchmarks/generation_memory.py --paper-network resnet50 --chunk-sizes 0 8 4

Prints a table and writes it to benchmarks/results/generation_memory.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "generation_memory.json"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Generate in this process and return its peak resident memory."""
    import resource

    from graph_tools.model import load
    from pipeline.generate import generate
    from pipeline.settings import GenerateSettings

    (num_images,), (chunk_size,) = options.num_images, options.chunk_sizes
    with tempfile.TemporaryDirectory() as folder:
        settings = GenerateSettings(
            num_images=num_images,
            iterations=options.iterations,
            batch_size=options.batch_size,
            chunk_size=chunk_size,
        )
        result = generate(load(options.model), settings, Path(folder) / "images.npz")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "num_images": num_images,
        "chunk_size": chunk_size,
        "peak_mb": round(peak / 1e6, 1),
        "seconds": round(result.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "digits_resnet.onnx")
    parser.add_argument("--num-images", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[0])
    parser.add_argument("--paper-network", help="in place of --model: see models/")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.paper_network:
            options.model = export_network(options.paper_network, Path(folder))
        report(options)


def export_network(name: str, folder: Path) -> Path:
    """Write one of the papers' networks."""
    sys.path.insert(0, str(ROOT / "models"))
    import paper_networks

    path = folder / f"{name}.onnx"
    paper_networks.export(paper_networks.build(name), name, path)
    return path


def report(options: argparse.Namespace) -> None:
    """Run each row in a process of its own, print and write them."""
    rows = []
    for count, chunk in itertools.product(options.num_images, options.chunk_sizes):
        command = [sys.executable, __file__, "--one", "--model", str(options.model)]
        command += ["--num-images", str(count), "--iterations", str(options.iterations)]
        command += ["--batch-size", str(options.batch_size), "--chunk-sizes", str(chunk)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{options.model.name}, {options.iterations} iterations")
    print("| images | at a time | peak memory, MB | seconds |")
    print("|---|---|---|---|")
    for row in rows:
        print(" | ".join(("", *(str(value) for value in row.values()), "")).strip())
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found[options.model.stem] = {
        "iterations": options.iterations,
        "batch_size": options.batch_size,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
