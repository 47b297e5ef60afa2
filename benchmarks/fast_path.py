"""What each part of the fast path gains: one step of DGH with it and without it, in turn.

All ways run in one process, a step of each after the other, many times, so that whatever else the
machine does hits them alike; the table gives the median of the quotients of CPU times. Run from the
repository root::

    python benchmarks/fast_path.py
    python benchmarks/fast_path.py --models ../shared/models/mcunet_cifar10_32.onnx --batch-size 64

Prints a table and adds its rows to benchmarks/results/fast_path.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from graph_tools.batchnorm import find_batch_norms
from graph_tools.model import load
from pipeline.generate import prior as prior_module
from pipeline.generate import statistics as statistics_module
from pipeline.generate.allocator import reused_memory
from pipeline.generate.dgh import dgh_parts
from pipeline.generate.job import Job
from pipeline.generate.loop import _move
from pipeline.generate.statistics import SiteTargets
from pipeline.generate.step import Step
from pipeline.generate.store import open_store
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "fast_path.json"
DEFAULT = ROOT.parent / "shared" / "models" / "cifar10_resnet20.onnx"
Patch = Callable[[], contextlib.AbstractContextManager[Any]]

LACKING = {
    "folded BatchNormalization": "unfolded",
    "channels_last memory": "contiguous",
    "moments in one pass": "var_mean",
    "batches in memory": "files",
    "blur by shifted sums": "convolution",
    "frozen weights": "trainable",
    "two gradients for lambda, not three": "three",
    "(--precision bfloat16)": "bfloat16",
}
"""Parts of the fast path, and what stands for the way without them."""


def plain_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance as torch has them."""
    dims = [axis for axis in range(values.dim()) if axis != 1]
    variance, mean = torch.var_mean(values, dim=dims, correction=0)
    return mean.double(), variance.double()


class PlainBlur:
    """The blur as a convolution of single channels."""

    @staticmethod
    def apply(images: Tensor, center: float, side: float) -> Tensor:
        taps = torch.tensor([side, center, side])
        kernel = torch.outer(taps, taps).expand(images.shape[1], 1, 3, 3)
        return torch.nn.functional.conv2d(images, kernel, padding=1, groups=images.shape[1])


def patch_of(way: str) -> Patch:
    if way == "var_mean":
        return lambda: mock.patch.object(statistics_module, "moments", plain_moments)
    if way == "convolution":
        return lambda: mock.patch.object(prior_module, "_Blur", PlainBlur)
    return contextlib.nullcontext


@contextlib.contextmanager
def stepper(
    model_path: Path, size: int, way: str, folder: Path
) -> Iterator[Callable[[], None]]:
    """Yield what makes one step of one of two batches; with "ratio" before lambda is measured."""
    model, device = load(model_path), torch.device("cpu")
    lowered = "bfloat16" if way == "bfloat16" else "auto"
    settings = GenerateSettings(
        num_images=2 * size,
        batch_size=size,
        blur=1.0,
        precision=lowered,  # type: ignore[arg-type]
    )
    channels = model.input.channels
    preprocessing = Preprocessing(mean=(0.485,) * channels, std=(0.229,) * channels)
    job = Job(model, settings, tuple(find_batch_norms(model)), preprocessing, device)
    objective, _ = dgh_parts(job)
    if way == "unfolded":
        objective = replace(objective, targets=SiteTargets(objective.targets.sites, device))
    network = job.network(objective.heads, folded=way != "unfolded")
    buffers = list(network._graph.buffers())  # type: ignore[attr-defined]
    if way == "contiguous":
        network._format = torch.contiguous_format
        for buffer in buffers:
            buffer.data = buffer.contiguous()
    if way == "trainable":
        for buffer in buffers:
            if buffer.is_floating_point():
                buffer.requires_grad_()
    prior, targets, patch = job.image_prior(), objective.targets, patch_of(way)
    with open_store(
        folder / "images.npz",
        sizes=job.sizes,
        canvas_shape=prior.canvas_shape,
        num_statistics=len(targets.center),
        device=device,
        in_memory=way != "files",
    ) as store:
        for index in range(2):
            store.create(index, prior.start(size, job.generator))
        turn = 0

        def step() -> None:
            nonlocal turn
            turn = 1 - turn
            with patch():
                batch, view = store.get(turn), prior.draw(job.generator, size)
                others = targets.zero()
                one = Step(batch, view, others, network, prior, objective)
                if way in ("two", "three"):
                    one.gradient_ratio()
                if way == "three":
                    one._parts = None
                one.backward(1e-3)
                _move(batch, "radam", 1e-3, 0)
                for buffer in buffers:
                    buffer.grad = None

        yield step


def measure(model: Path, size: int, repeats: int) -> dict[str, Any]:
    """Time all ways in turn."""
    ways = ["", "two", *LACKING.values()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(reused_memory())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        steps = {way: stack.enter_context(stepper(model, size, way, folder)) for way in ways}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + 2):
            for way, step in steps.items():
                start = time.process_time()
                step()
                if repeat > 1:
                    times[way].append(time.process_time() - start)
    rows = {}
    for name, way in LACKING.items():
        usual = times["two" if way == "three" else ""]
        quotients = [slow / fast for slow, fast in zip(times[way], usual, strict=True)]
        if way == "bfloat16":
            quotients = [1 / quotient for quotient in quotients]
        rows[name] = {
            "gain": statistics.median(quotients),
            "quartiles": statistics.quantiles(quotients, n=4)[::2],
        }
    return {
        "model": model.name,
        "batch_size": size,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "image_steps_per_cpu_second": size / statistics.median(times[""]),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", default=[DEFAULT])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = json.loads(options.output.read_text()) if options.output.exists() else []
    for model in options.models:
        row = measure(model, options.batch_size, options.repeats)
        found = [
            old
            for old in found
            if (old["model"], old["batch_size"]) != (row["model"], row["batch_size"])
        ]
        found.append(row)
        print(f"{row['model']}, batches of {row['batch_size']}, {row['threads']} thread(s)")
        print("| part | times faster (quartiles) |")
        print("|---|---|")
        for name, cell in row["rows"].items():
            low, high = cell["quartiles"]
            print(f"| {name} | {cell['gain']:.2f} ({low:.2f} to {high:.2f}) |", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
