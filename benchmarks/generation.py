"""How fast images are made: image-iterations a second, peak memory, share of the GEMM peak.

Three contestants in turn, in the same run, each in a process of its own (the peak memory of a
process never falls), several rounds; the table gives medians and the smallest and largest ratio::

    zsq          this project, from the ONNX file
    published    the loop of DGH's published code in plain torch: hooks on the BatchNormalization
                 modules, one forward and one backward pass, totals summed over the other batches
    algorithm 1  the paper's: a second forward pass after each step refreshes the statistics

All make the same number of images in the same batches, with the same loss, RAdam, flip, crop and
blur. An image-iteration is one image through one step. GEMM peak: a product of two square float32
matrices in the same process; arithmetic is counted by torch's FlopCounterMode, forward and backward
to the pixels. Run from the repository root::

    python benchmarks/generation.py
    python benchmarks/generation.py --networks resnet18 --batch-sizes 16 --rounds 3
    python benchmarks/generation.py --networks resnet18 --device cuda

Prints a table and writes benchmarks/results/generation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "generation.json"
CONTESTANTS = ("zsq", "published", "algorithm 1")
NETWORKS = ("resnet20", "resnet18", "resnet50", "mobilenetv2")
BATCHES = 2
"""Batches of each contestant: enough that there are others whose statistics count."""


def gemm_peak(device: str, size: int = 2048) -> float:
    """Return FLOP/s of a float32 matrix product."""
    import torch

    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best = 0.0
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def image_flops(name: str) -> float:
    """Return the arithmetic of one image-iteration: forward, and backward to the pixels."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from models.paper_networks import SIDES, build

    network = build(name)
    images = torch.randn(2, 3, SIDES[name], SIDES[name], requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    return counter.get_total_flops() / len(images)


class Clock:
    """Times steps, without the first ones."""

    def __init__(self, device: str, skip: int) -> None:
        self.device, self.skip, self.count = device, skip, 0
        self.start = self.cpu = 0.0

    def tick(self) -> None:
        self.count += 1
        if self.count == self.skip:
            _wait(self.device)
            self.start, self.cpu = time.perf_counter(), time.process_time()

    def rates(self, batch_size: int) -> dict[str, float]:
        _wait(self.device)
        images = (self.count - self.skip) * batch_size
        return {
            "rate": images / (time.perf_counter() - self.start),
            "cpu_rate": images / (time.process_time() - self.cpu),
        }


def run_zsq(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Make images with this project, and time its steps."""
    from graph_tools.model import load
    from models.paper_networks import build, export
    from pipeline.generate import generate
    from pipeline.settings import GenerateSettings

    path = folder / "network.onnx"
    export(build(options.networks[0]), options.networks[0], path)
    size = options.batch_sizes[0]
    clock = Clock(options.device, skip=BATCHES)
    found: dict[str, float] = {}

    def on_step(done: int, total: int, terms: Any) -> None:
        clock.tick()
        if done == total:
            found.update(clock.rates(size))

    generate(
        load(path),
        GenerateSettings(
            method="dgh",
            num_images=BATCHES * size,
            batch_size=size,
            iterations=options.steps + 1,
            device=options.device,
            start="noise",
        ),
        folder / "images.npz",
        on_step=on_step,
    )
    return found


def run_plain(options: argparse.Namespace, *, refresh: bool) -> dict[str, float]:
    """The published loop in plain torch; ``refresh``: the paper's second forward pass."""
    import torch
    from torch import nn

    from models.paper_networks import SIDES, build

    name, size, device = options.networks[0], options.batch_sizes[0], options.device
    network, side = build(name).to(device), SIDES[name]
    margin = 32 if side > 64 else 8
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    seen: list[tuple[Any, Any]] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        values = inputs[0]
        seen.append((values.mean((0, 2, 3)), values.square().mean((0, 2, 3))))

    for layer in layers:
        layer.register_forward_hook(hook)
    sigma = 1.25
    taps = torch.exp(-(torch.arange(-1.0, 2.0) ** 2) / (2 * sigma**2))
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    kernel = kernel.expand(3, 1, 3, 3).contiguous().to(device)
    low, high = -0.45 / 0.226, 0.55 / 0.226

    def render(canvas: Any) -> Any:
        top, left, flip = torch.rand(3).tolist()
        if flip < 0.5:
            canvas = canvas.flip(3)
        canvas = nn.functional.conv2d(canvas, kernel, padding=1, groups=3)
        top, left = int(top * (margin + 1)), int(left * (margin + 1))
        view = canvas[:, :, top : top + side, left : left + side]
        return view + (view.clamp(low, high) - view).detach()

    def observe(canvas: Any) -> tuple[list[tuple[Any, Any]], Any]:
        seen.clear()
        logits = network(render(canvas))
        return list(seen), logits

    torch.manual_seed(0)
    shape = (size, 3, side + margin, side + margin)
    canvases = [
        torch.randn(shape, device=device).clamp_(low, high).requires_grad_()
        for _ in range(BATCHES)
    ]
    optimizers = [torch.optim.RAdam([canvas], lr=16.0) for canvas in canvases]
    schedules = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=20)
        for o in optimizers
    ]
    stored = []
    with torch.no_grad():
        stored = [observe(canvas)[0] for canvas in canvases]
    clock = Clock(device, skip=BATCHES)
    for _ in range(options.steps + 1):
        for index, canvas in enumerate(canvases):
            own, logits = observe(canvas)
            others = [stored[i] for i in range(BATCHES) if i != index]
            loss = torch.zeros((), device=device)
            for site, layer in enumerate(layers):
                mean = own[site][0] + sum(other[site][0] for other in others)
                square = own[site][1] + sum(other[site][1] for other in others)
                mean, square = mean / BATCHES, square / BATCHES
                std = (square - mean.square() + 1e-6).sqrt()
                target = (layer.running_var + 1e-6).sqrt()
                loss = loss + (mean - layer.running_mean).square().mean()
                loss = loss + 10 * (std - target).square().mean()
            loss = loss / len(layers)
            stretched = -(logits.amax(1) - logits.amin(1)).mean()
            optimizers[index].zero_grad()
            (loss + 1e-3 * stretched).backward()
            optimizers[index].step()
            schedules[index].step(float(loss.detach()))
            if refresh:
                with torch.no_grad():
                    stored[index] = observe(canvas)[0]
            else:
                stored[index] = [(a.detach(), b.detach()) for a, b in own]
            clock.tick()
    return clock.rates(size)


def measure(contestant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in this process."""
    import resource

    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    peak = gemm_peak(options.device)
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        if contestant == "zsq":
            row = run_zsq(options, Path(folder))
        else:
            row = run_plain(options, refresh=contestant == "algorithm 1")
    peak = max(peak, gemm_peak(options.device))
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if options.device != "cpu":
        memory = torch.cuda.max_memory_allocated()
    return {**row, "gemm_gflops": peak / 1e9, "peak_mb": memory / 1e6}


def compare(network: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """All contestants in turn, several rounds."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.rounds):
        for contestant in CONTESTANTS:
            command = [sys.executable, __file__, "--one", contestant]
            command += ["--networks", network, "--batch-sizes", str(size)]
            for flag in ("steps", "threads", "device"):
                command += [f"--{flag}", str(getattr(options, flag))]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            rounds[contestant].append(json.loads(done.stdout.splitlines()[-1]))
    flops = image_flops(network)
    peak = max(row["gemm_gflops"] for rows in rounds.values() for row in rows)
    found: dict[str, Any] = {
        "network": network,
        "batch_size": size,
        "gflop_an_image_iteration": flops / 1e9,
        "gemm_gflops": peak,
    }
    for contestant, rows in rounds.items():
        rates = [row["rate"] for row in rows]
        ratios = [a["rate"] / b["rate"] for a, b in zip(rounds["zsq"], rows, strict=True)]
        found[contestant] = {
            "rate": statistics.median(rates),
            "rates": rates,
            "cpu_rate": statistics.median(row["cpu_rate"] for row in rows),
            "share_of_gemm_peak": statistics.median(rates) * flops / 1e9 / peak,
            "peak_mb": max(row["peak_mb"] for row in rows),
            "zsq_is_faster_by": statistics.median(ratios),
            "ratios": ratios,
        }
    return found


def line(row: dict[str, Any], contestant: str) -> str:
    cell = row[contestant]
    ratios = f"{min(cell['ratios']):.2f} to {max(cell['ratios']):.2f}"
    faster = "-" if contestant == "zsq" else f"{cell['zsq_is_faster_by']:.2f} ({ratios})"
    words = [
        row["network"],
        row["batch_size"],
        contestant,
        f"{cell['rate']:.1f}",
        f"{100 * cell['share_of_gemm_peak']:.0f} %",
        f"{cell['peak_mb']:.0f}",
        faster,
    ]
    return "| " + " | ".join(map(str, words)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20"], choices=NETWORKS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[128])
    parser.add_argument("--steps", type=int, default=10, help="timed, of each batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    print("| network | batch | | image-iterations/s | of GEMM peak | peak MB | zsq / it |")
    print("|---|---|---|---|---|---|---|")
    facts = {name: getattr(options, name) for name in ("steps", "rounds", "threads", "device")}
    for network in options.networks:
        for size in options.batch_sizes:
            row = {**compare(network, size, options), **facts}
            store(options.output, row)
            for contestant in CONTESTANTS:
                print(line(row, contestant), flush=True)


def store(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file, in place of an older one of the same network and batch size."""

    def name(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["network"], entry["batch_size"], entry["device"]

    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else []
    found = [entry for entry in found if name(entry) != name(row)]
    path.write_text(json.dumps([*found, row], indent=2) + "\n")


if __name__ == "__main__":
    main()
