"""Top-1 under a size budget: bits of each layer chosen by ``--target-size`` against one width.

Activations have 8 bits; sizes are those of the packed weights, 1.0x being 8 bits. Also says
whether generated images rank the layers as real ones do: Spearman's correlation of the measured
sensitivities, for each width over the layers. Run from the repository root; the real networks and
images are expected in ../shared:

    python benchmarks/mixed_precision.py --networks cifar10_resnet20 --keep-images DIR
    python benchmarks/mixed_precision.py --rounding adaround --targets 0.375x --widths 3

Prints markdown tables and writes benchmarks/results/mixed_precision.json, one entry a cell; cells
that the file holds already are not run again (--fresh runs all).
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path

import numpy as np
from accuracy import CASES, RESULTS, Key, float_cell, quantized_cell
from cells import Cell, add_shard, run_cells


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of ranks; no ties are expected."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


def print_accuracy(cells: dict[str, Cell], names: list[str]) -> None:
    print("\n| network | rounding | size | bits | dgh | real |")
    print("|---|---|---|---|---|---|")
    rows: dict[tuple[str, str, float, str], dict[str, list[float]]] = {}
    for text, cell in cells.items():
        key = Key.parse(text)
        if key.network not in names or key.scheme == "float":
            continue
        if "mixed_precision" in cell:
            size, bits = float(cell["settings"]["target_size"].strip("x")), "mixed"
        else:
            size, bits = cell["settings"]["weights"] / 8, f"all {cell['settings']['weights']}"
        row = rows.setdefault((key.network, key.rounding, size, bits), {})
        row.setdefault(key.images, []).append(cell["top1"])
    for name in names:
        if f"{name}/float" in cells:
            print(f"| {name} | float | | | {cells[f'{name}/float']['top1']:.2f} | |")
        found = sorted((k for k in rows if k[0] == name), key=lambda k: (k[1], -k[2], k[3]))
        for key in found:
            shown = [
                f"{statistics.mean(rows[key][i]):.2f}" if i in rows[key] else "-"
                for i in ("dgh", "real")
            ]
            print(f"| {name} | {key[1]} | {key[2]:g}x | {key[3]} | {' | '.join(shown)} |")


def print_ranks(cells: dict[str, Cell], names: list[str]) -> None:
    print("\n| network | images | 8 bits | 4 bits | 3 bits | 2 bits |")
    print("|---|---|---|---|---|---|")
    for name in names:
        found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        for text, cell in cells.items():
            key = Key.parse(text)
            if key.network == name and "mixed_precision" in cell:
                layers = cell["mixed_precision"]["layers"]
                found[f"{key.images} {key.seed}"] = {
                    weight: {str(b): e for b, e in layer["errors"].items()}
                    for weight, layer in layers.items()
                }
        kinds = sorted(found)
        for first, second in ((a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :]):
            correlations = [
                spearman(
                    [layer[bits] for layer in found[first].values()],
                    [layer[bits] for layer in found[second].values()],
                )
                for bits in ("8", "4", "3", "2")
            ]
            shown = " | ".join(f"{value:.2f}" for value in correlations)
            print(f"| {name} | {first}, {second} | {shown} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["cifar10_resnet20", "mcunet_cifar10_32"]
    parser.add_argument("--networks", nargs="+", default=known, choices=list(CASES))
    parser.add_argument(
        "--targets", nargs="*", default=["0.75x", "0.6x", "0.5x", "0.4x", "0.375x"]
    )
    parser.add_argument("--widths", nargs="*", type=int, default=[8, 4, 3])
    parser.add_argument("--rounding", default="nearest")
    parser.add_argument("--images", nargs="+", default=["dgh", "real"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--keep-images", type=Path, help="folder")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "mixed_precision.json")
    add_shard(parser)
    args = parser.parse_args()
    args.iterations, args.guess, args.verify_images = 0, False, 64
    runs = {}
    for name in args.networks:
        runs[f"{name}/float"] = functools.partial(float_cell, name)
        for seed in args.seeds:
            for images in args.images:
                part = {"network": name, "rounding": args.rounding, "images": images}
                for target in args.targets:
                    key = Key(
                        **part, scheme="W8A8", variant=f"full,target_size={target}", seed=seed
                    )
                    settings = {"target_size": target}
                    runs[str(key)] = functools.partial(quantized_cell, key, settings, args)
                for width in args.widths:
                    key = Key(**part, scheme=f"W{width}A8", variant="full", seed=seed)
                    runs[str(key)] = functools.partial(quantized_cell, key, {}, args)
    cells = run_cells(
        args.output,
        runs,
        lambda cell: f"{cell['top1']:.2f} ({cell['seconds']:.0f} s)",
        fresh=args.fresh,
        part=args.shard,
    )
    print_accuracy(cells, args.networks)
    print_ranks(cells, args.networks)


if __name__ == "__main__":
    main()
