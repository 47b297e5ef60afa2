"""Ways to learn the exponents of the activations: top-1 of the same learned roundings with each.

- ``histograms``: none; exponents as the histograms of the float network give them;
- ``rounded afterwards``: scales learned freely through the whole quantized network (log domain,
  Kullback-Leibler divergence from the float outputs, Adam), then rounded to powers of two;
- ``slopes``: likewise, a power of two at every step, its rounding passed straight through (TQT,
  arXiv 1903.08066);
- ``outputs``: the tool's: whole exponents, one after the other, judged by the outputs.

Run from the repository root; the real networks and images are expected in ../shared:

    python benchmarks/exponents.py --networks cifar10_resnet20 --seeds 0 1 --images-folder DIR

DIR holds images as benchmarks/accuracy.py --keep-images leaves them. Prints a markdown table and
writes benchmarks/results/exponents.json, one row a cell; cells in the file are not run again.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import accuracy
import torch
from cells import Cell, add_shard, run_cells

from graph_tools.model import load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.quantizer import TensorQuantizer
from pipeline.evaluate.classification import evaluate_classification
from pipeline.evaluate.datasets import open_dataset
from pipeline.images import open_images
from pipeline.quantize import quantize, refinement
from pipeline.quantize.exponents import learn_exponents
from pipeline.quantize.lockstep import Lockstep
from pipeline.settings import QuantizeSettings

RATE, STEPS, BATCH = 2e-2, 100, 32
Learner = Callable[..., int]


def learn_nothing(*_: Any, **__: Any) -> int:
    return 0


def learn_by_slopes(
    lockstep: Lockstep,
    linked: Mapping[str, str],
    *,
    in_force: bool,
    fixed: Collection[str] = (),
    on_step: object = None,
) -> int:
    """Descend on all scales at once; ``in_force``: each is a power of two at every step."""
    graph, generator = lockstep.graph, torch.Generator().manual_seed(0)
    images = torch.cat(lockstep.exact[graph.input_names[0]])
    with torch.no_grad():
        wanted = next(iter(graph(images).values())).log_softmax(dim=1)
    roots = {linked.get(name, name) for name in lockstep.tensors}
    exponents = {
        root: torch.tensor(float(lockstep.tensors[root].exponent), requires_grad=True)
        for root in roots
        if root not in fixed
    }
    constants = lockstep.values({name for step in graph.steps for name in step.inputs})

    def quantize(name: str, value: torch.Tensor) -> torch.Tensor:
        quantizer = lockstep.tensors.get(name)
        if quantizer is None:
            return value
        exponent = exponents.get(linked.get(name, name))
        if exponent is None:
            exponent = torch.tensor(float(quantizer.exponent))
        elif in_force:
            exponent = through(exponent, exponent.round())
        scale = torch.exp2(exponent)
        scaled = (value / scale).clamp(quantizer.qmin, quantizer.qmax)
        return through(scaled, scaled.round()) * scale

    optimizer = torch.optim.Adam(exponents.values(), lr=RATE)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        name = graph.input_names[0]
        start = {name: quantize(name, images[rows])}
        values = graph.run_steps(graph.steps, start, constants=constants, hook=quantize)
        found = values[graph.output_names[0]].log_softmax(dim=1)
        loss = (wanted[rows].exp() * (wanted[rows] - found)).sum(dim=1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    changes = 0
    for root, exponent in exponents.items():
        before: TensorQuantizer = lockstep.tensors[root]
        learned = replace(before, exponent=round(float(exponent.detach())))
        changes += learned != before
        lockstep.tensors.update(
            (name, learned) for name in lockstep.tensors if linked.get(name, name) == root
        )
    return changes


def through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, with the gradient of ``value``."""
    return value + (rounded - value).detach()


WAYS: dict[str, Learner] = {
    "histograms": learn_nothing,
    "rounded afterwards": functools.partial(learn_by_slopes, in_force=False),
    "slopes": functools.partial(learn_by_slopes, in_force=True),
    "outputs": learn_exponents,
}


def run_cell(name: str, scheme: str, images: str, way: str, seed: int, folder: Path) -> Cell:
    case, path = accuracy.CASES[name], accuracy.model_path(name)
    network = prepare_for_quantization(load(path))
    changes: list[int] = []

    def learn(*args: Any, **options: Any) -> int:
        changes.append(WAYS[way](*args, **options))
        return changes[0]

    weights, activations = accuracy.bits_of(scheme)
    settings = QuantizeSettings(
        weights=weights, activations=activations, rounding="brecq", learn_exponents=True
    )
    calibration = open_images(folder / f"{name}.{images}.{seed}.npz")
    original, refinement.learn_exponents = refinement.learn_exponents, learn
    try:
        plan = quantize(network, calibration, settings, seed=seed).plan
    finally:
        refinement.learn_exponents = original
    with tempfile.TemporaryDirectory() as work:
        written = Path(work) / "q.onnx"
        save(write_qdq(network, plan), written)
        test = open_dataset(accuracy.SHARED / "data" / case.test)
        top1 = evaluate_classification([written], test, case.preprocessing)[0].top1
    return {"top1": top1, "changed": changes[0]}


def print_table(cells: dict[str, Cell]) -> None:
    rows: dict[tuple[str, ...], dict[str, list[Cell]]] = {}
    for key, cell in cells.items():
        name, scheme, images, way, _ = key.split("/")
        rows.setdefault((name, scheme, images), {}).setdefault(way, []).append(cell)
    print(f"\n| network | bits | images | {' | '.join(WAYS)} |")
    print("|---" * (3 + len(WAYS)) + "|")
    for row, found in rows.items():
        shown = [
            f"{statistics.mean(c['top1'] for c in found[way]):.2f} "
            f"({', '.join(str(c['changed']) for c in found[way])} changed)"
            if way in found
            else "-"
            for way in WAYS
        ]
        print(f"| {' | '.join([*row, *shown])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["cifar10_resnet20"])
    parser.add_argument("--schemes", nargs="+", default=["W4A4"])
    parser.add_argument("--images", nargs="+", default=["real", "dgh"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images-folder", type=Path, required=True)
    parser.add_argument("--fresh", action="store_true")
    add_shard(parser)
    args = parser.parse_args()
    runs = {
        f"{name}/{scheme}/{images}/{way}/{seed}": functools.partial(
            run_cell, name, scheme, images, way, seed, args.images_folder
        )
        for seed in args.seeds
        for name in args.networks
        for scheme in args.schemes
        for images in args.images
        for way in WAYS
    }
    path = accuracy.RESULTS / "exponents.json"
    cells = run_cells(
        path, runs, lambda cell: f"{cell['top1']:.2f}", fresh=args.fresh, part=args.shard
    )
    print_table(cells)


if __name__ == "__main__":
    main()
