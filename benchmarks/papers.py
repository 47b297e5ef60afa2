"""The experiments of the papers, on our networks: one sub-command each.

    python benchmarks/papers.py methods --networks cifar10_resnet20 --seeds 0 1 2
    python benchmarks/papers.py bits --schemes W4A8 W2A4 --shard 0/4
    python benchmarks/papers.py statistics --tables-only

Each prints a table and leaves NAME.json (the cells), NAME.md (the table) and NAME.png (a plot) in
benchmarks/results/papers. Cells that are there are not run again (--fresh runs them); several runs
may write at the same time, and --shard i/n takes every n-th cell from the i-th on. Methods are
those of --method, by name; settings behind it in brackets, as in ``dgh[scope=1,output_weight=0]``.
The real networks and images are expected in ../shared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from cells import Cell, add_shard, read_cells, run_cells, write_text

matplotlib.use("Agg")

import paper_accuracy
import paper_images

RESULTS = Path(__file__).resolve().parent / "results" / "papers"

Plan = Iterator[tuple[str, Callable[[], Cell]]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One sub-command.

    Args:
        arguments: adds its own flags to those of all.
        plan: the cells that the flags name.
        table: of all cells, markdown.
        plot: draws all cells into a file.
        describe: a cell in a few words.
    """

    arguments: Callable[[argparse.ArgumentParser], None]
    plan: Callable[[argparse.Namespace], Plan]
    table: Callable[[dict[str, Cell]], str]
    plot: Callable[[dict[str, Cell], Path], None]
    describe: Callable[[Cell], str]


EXPERIMENTS: dict[str, Experiment] = {
    name: Experiment(**entry)
    for module in (paper_accuracy, paper_images)
    for name, entry in module.EXPERIMENTS.items()
}


def run(name: str, args: argparse.Namespace) -> str:
    """Run the cells of an experiment that are missing, and write table and plot."""
    experiment, path = EXPERIMENTS[name], args.output / f"{name}.json"
    if not args.tables_only:
        runs = dict(experiment.plan(args))
        run_cells(path, runs, experiment.describe, fresh=args.fresh, part=args.shard)
    cells = read_cells(path)
    if not cells:
        return f"no cells in {path}"
    table = experiment.table(cells)
    write_text(path.with_suffix(".md"), table)
    experiment.plot(cells, path.with_suffix(".png"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="experiment", required=True)
    for name, experiment in EXPERIMENTS.items():
        command = commands.add_parser(name, help=(experiment.plan.__doc__ or "").strip())
        experiment.arguments(command)
        command.add_argument("--seeds", nargs="+", type=int, default=[0])
        command.add_argument("--num-images", type=int, default=0)
        command.add_argument("--iterations", type=int, default=0, help="of generation")
        command.add_argument("--keep-images", type=Path, help="folder: make each only once")
        add_shard(command)
        command.add_argument("--threads", type=int, default=0)
        command.add_argument("--fresh", action="store_true")
        command.add_argument("--tables-only", action="store_true")
        command.add_argument("--output", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(run(args.experiment, args))


if __name__ == "__main__":
    main()
