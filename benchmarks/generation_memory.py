"""Peak memory of image generation for few and for many images.

Each count runs in a process of its own, because the peak of a process never falls. The allocator
needs some steps to reach its level, so the smallest count needs enough iterations::

    python benchmarks/generation_memory.py
    python benchmarks/generation_memory.py --model ../shared/models/cifar10_resnet20.onnx

Prints a table and writes benchmarks/results/generation_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "generation_memory.json"


def measure(model: Path, num_images: int, iterations: int, batch_size: int) -> dict[str, Any]:
    """Generate in this process and return its peak resident memory."""
    import resource

    from graph_tools.model import load
    from pipeline.generate import generate
    from pipeline.settings import GenerateSettings

    with tempfile.TemporaryDirectory() as folder:
        settings = GenerateSettings(
            num_images=num_images, iterations=iterations, batch_size=batch_size
        )
        result = generate(load(model), settings, Path(folder) / "images.npz")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "num_images": num_images,
        "peak_mb": round(peak / 1e6, 1),
        "seconds": round(result.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "digits_resnet.onnx")
    parser.add_argument("--num-images", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        row = measure(
            options.model, options.num_images[0], options.iterations, options.batch_size
        )
        print(json.dumps(row))
        return
    rows = []
    for count in options.num_images:
        command = [sys.executable, __file__, "--one", "--model", str(options.model)]
        command += ["--num-images", str(count), "--iterations", str(options.iterations)]
        command += ["--batch-size", str(options.batch_size)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{options.model.name}, {options.iterations} iterations")
    print("| images | peak memory, MB | seconds |")
    print("|---|---|---|")
    for row in rows:
        print(f"| {row['num_images']} | {row['peak_mb']} | {row['seconds']} |")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": options.model.name,
        "iterations": options.iterations,
        "batch_size": options.batch_size,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
