"""Cells of a benchmark: each measured once, kept in one JSON file that several runs may share."""

from __future__ import annotations

import argparse
import fcntl
import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from graph_tools.errors import ZsqError

Cell = dict[str, Any]


def shard(text: str) -> tuple[int, int]:
    """``1/4``: the second of four parts."""
    try:
        index, count = (int(word) for word in text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0/4")
    return index, count


def add_shard(parser: argparse.ArgumentParser) -> None:
    """Let several processes or machines share the cells: each takes every n-th one."""
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N")


def read_cells(path: Path) -> dict[str, Cell]:
    return json.loads(path.read_text()) if path.exists() else {}


def write_text(path: Path, text: str) -> None:
    """Write a file so that no reader finds half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def store_cell(path: Path, key: str, cell: Cell) -> None:
    """Add a cell to the file, keeping those that another process added meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cells = read_cells(path) | {key: cell}
        write_text(path, json.dumps(dict(sorted(cells.items())), indent=1) + "\n")


def run_cells(
    path: Path,
    runs: Mapping[str, Callable[[], Cell]],
    describe: Callable[[Cell], str],
    *,
    fresh: bool = False,
    part: tuple[int, int] = (0, 1),
) -> dict[str, Cell]:
    """Run the cells that the file does not hold (``fresh``: all); it is written after each.

    Args:
        path: of the file.
        runs: what measures each cell.
        describe: a cell in a line.
        fresh: see above.
        part: which of them, as `shard` gives it.

    Returns:
        All cells of the file.
    """
    for key, run in islice(runs.items(), part[0], None, part[1]):
        if fresh or key not in read_cells(path):
            try:
                cell = run()
            except ZsqError as error:  # the other cells may do
                print(f"{key}: {error}", flush=True)
                continue
            print(f"{key}: {describe(cell)}", flush=True)
            store_cell(path, key, cell)
    return read_cells(path)
