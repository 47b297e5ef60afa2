"""What each way of making images costs: image-iterations a second, and peak memory.

Every method runs on the same network, in a process of its own, because the peak of a process never
falls. One process that makes nothing tells what torch and the network take by themselves; a first
step, not timed, sees to warm caches. Speed is given by the clock and by CPU time, which does not
mind what else runs on the machine. Run from the repository root::

    python benchmarks/generators.py
    python benchmarks/generators.py --model ../shared/models/cifar10_resnet20.onnx --iterations 5

Prints a table and writes benchmarks/results/generators.json.
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
RESULT = ROOT / "benchmarks" / "results" / "generators.json"
NOTHING = "nothing"


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make images in this process; return speed and peak resident memory."""
    import resource
    import time

    import torch

    from graph_tools.model import load
    from pipeline.generate import generate
    from pipeline.settings import GenerateSettings

    if options.threads:
        torch.set_num_threads(options.threads)
    model = load(options.model)
    row: dict[str, Any] = {"method": method, "seed": options.seed}
    if method != NOTHING:
        with tempfile.TemporaryDirectory() as folder:
            for iterations in (1, options.iterations):
                settings = GenerateSettings(
                    method=method,  # type: ignore[arg-type]
                    num_images=options.num_images,
                    batch_size=options.batch_size,
                    iterations=iterations,
                    seed=options.seed,
                )
                start = time.process_time()
                result = generate(model, settings, Path(folder) / "images.npz")
        steps = options.num_images * len(result.history)
        row["seconds"] = round(result.seconds, 2)
        row["cpu_seconds"] = round(time.process_time() - start, 2)
        row["image_iterations_per_second"] = round(steps / result.seconds, 1)
        row["image_iterations_per_cpu_second"] = round(steps / row["cpu_seconds"], 1)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {**row, "peak_mb": round(peak / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "digits_resnet.onnx")
    parser.add_argument(
        "--methods", nargs="+", default=["dgh", "zeroq", "dsg", "intraq", "prior"]
    )
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.methods[0], options)))
        return
    print(
        f"{options.model.name}, {options.num_images} images, {options.iterations} iterations"
    )
    print("| method | image-iterations/s | by CPU time | seconds | peak memory, MB |")
    print("|---|---|---|---|---|")
    columns = ("image_iterations_per_second", "image_iterations_per_cpu_second", "seconds")
    rows = []
    for method in (NOTHING, *options.methods):
        command = [sys.executable, __file__, "--one", "--methods", method]
        for name in ("model", "num_images", "iterations", "batch_size", "threads", "seed"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        rows.append(row := json.loads(done.stdout.splitlines()[-1]))
        words = [method, *(row.get(name, "-") for name in columns), row["peak_mb"]]
        print("| " + " | ".join(map(str, words)) + " |", flush=True)
    names = ("num_images", "iterations", "batch_size", "threads", "seed")
    facts = {"model": options.model.name, **{name: getattr(options, name) for name in names}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
