"""Experiments of the papers that look at images: statistics, outputs, features, pictures, cost."""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from accuracy import CASES, model_path
from cells import Cell
from paper_sources import METHODS, images_of, parsed
from paper_tables import draw, levels, pivot, save

from graph_tools.batchnorm import find_batch_norms
from graph_tools.model import Model
from graph_tools.torch_graph import TorchGraph
from pipeline.generate.heads import find_heads
from pipeline.generate.quantized import last_linear
from pipeline.generate.statistics import SiteTargets
from pipeline.images import ImageSet

Plan = Iterator[tuple[str, Callable[[], Cell]]]

_GRID = 8  # pictures in a row


def _made(
    source: str, at: dict[str, Any], args: argparse.Namespace
) -> tuple[Model, ImageSet, dict[str, Any]]:
    return images_of(
        source,
        at["network"],
        at["seed"],
        num_images=args.num_images,
        iterations=at.get("iterations", args.iterations),
        keep=args.keep_images,
    )


def _observed(model: Model, images: ImageSet, tensors: list[str]) -> dict[str, np.ndarray]:
    """All values of tensors, images first."""
    graph, size = TorchGraph(model.proto, outputs=tensors), model.fixed_batch or 32
    found: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    for batch in images.batches(size):
        whole = np.resize(batch, (size, *batch.shape[1:])) if model.fixed_batch else batch
        with torch.no_grad():
            values = graph(torch.from_numpy(whole))
        for name in tensors:
            found[name].append(values[name][: len(batch)].numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def statistics_cell(source: str, at: dict[str, Any], args: argparse.Namespace) -> Cell:
    model, images, facts = _made(source, at, args)
    sites = find_batch_norms(model)
    targets = SiteTargets(sites, torch.device("cpu"))
    graph, sums = TorchGraph(model.proto, outputs=targets.tensors), targets.zero()
    size = model.fixed_batch or 32
    for batch in images.batches(size):
        if len(batch) < size and model.fixed_batch:
            continue  # a batch filled up would count images twice
        with torch.no_grad():
            sums = sums + targets.measure(graph(torch.from_numpy(batch)))
    mean, std = (list(column) for column in zip(*targets.errors(sums), strict=True))
    return {"at": {**at, "images": source}, "mean": mean, "std": std, **facts}


def outputs_cell(source: str, at: dict[str, Any], args: argparse.Namespace) -> Cell:
    model, images, facts = _made(source, at, args)
    head = find_heads(model)[0]
    logits = _observed(model, images, [head])[head].reshape(images.count, -1)
    counts, edges = np.histogram(logits, bins=60)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return {
        "at": {**at, "images": source},
        "span": float((logits.max(1) - logits.min(1)).mean()),
        "low": float(logits.min()),
        "high": float(logits.max()),
        "std": float(logits.std()),
        "top_share": float(shares.max(1).mean()),
        "classes": len(np.unique(logits.argmax(1))),
        "counts": counts.tolist(),
        "edges": edges.tolist(),
        **facts,
    }


def tsne_cell(sources: list[str], at: dict[str, Any], args: argparse.Namespace) -> Cell:
    from sklearn.manifold import TSNE

    features, kinds = [], []
    for source in sources:
        model, images, _ = _made(source, at, args)
        tensor = last_linear(model).features
        values = _observed(model, images, [tensor])[tensor].reshape(images.count, -1)
        features.append(values)
        kinds += [source] * len(values)
    rows = np.concatenate(features)
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argmin(1)
    alike = {
        source: float(np.mean([kinds[nearest[i]] == source for i in _where(kinds, source)]))
        for source in sources
    }
    perplexity = min(30.0, (len(rows) - 1) / 3)
    places = TSNE(perplexity=perplexity, random_state=at["seed"]).fit_transform(rows)
    return {"at": at, "kinds": kinds, "places": places.tolist(), "own_kind": alike}


def _where(kinds: list[str], source: str) -> list[int]:
    return [index for index, kind in enumerate(kinds) if kind == source]


def grid_cell(source: str, at: dict[str, Any], args: argparse.Namespace) -> Cell:
    model, images, facts = _made(source, at, args)
    preprocessing = CASES[at["network"]].preprocessing
    pixels = preprocessing.invert(images.load(_GRID), model.input.layout)
    folder = args.output / "grids"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{at['network']}.{source}.{at['iterations'] or 'default'}.{at['seed']}.png"
    plt.imsave(folder / name, np.concatenate(list(pixels), 1).squeeze())
    return {"at": {**at, "images": source}, "file": name, **facts}


def cost_cell(source: str, at: dict[str, Any], args: argparse.Namespace) -> Cell:
    """Two runs in processes of their own; their difference is the cost of the steps."""
    method, settings = parsed(source)
    case, runs = CASES[at["network"]], []
    count = args.num_images or case.num_images
    for iterations in args.steps:
        flags = {"method": method, **settings, "num_images": count, "iterations": iterations}
        words = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "images.npz")
            model = str(model_path(at["network"]))
            command = ["generate", model, "-o", target, *words, "--quiet"]
            command += ["--mean", ",".join(case.mean), "--std", ",".join(case.std)]
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.cli", *command, "--seed", str(at["seed"])],
                stdout=subprocess.DEVNULL,
            )
            _, status, used = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{source}: exit status {status}")
            runs.append((used.ru_utime + used.ru_stime, used.ru_maxrss / 1024))
    steps = (args.steps[1] - args.steps[0]) * count
    return {
        "at": {**at, "images": source},
        "rate": steps / max(runs[1][0] - runs[0][0], 1e-9),
        "megabytes": max(memory for _, memory in runs),
        "cpu_seconds": [seconds for seconds, _ in runs],
    }


def _planned(args: argparse.Namespace, cell: Callable[..., Cell]) -> Plan:
    steps = getattr(args, "at_iterations", None) or [None]
    for seed, network, source, iterations in product(
        args.seeds, args.networks, args.images, steps
    ):
        parsed(source)
        at = {"network": network, "seed": seed}
        if iterations is not None:
            at["iterations"] = iterations
        key = "/".join(map(str, (network, source, *list(at.values())[1:])))
        yield key, functools.partial(cell, source, at, args)


def plan_statistics(args: argparse.Namespace) -> Plan:
    """How far images are from the statistics of each layer: real ones, augmented, each method's."""
    return _planned(args, statistics_cell)


def plan_outputs(args: argparse.Namespace) -> Plan:
    """What the networks' outputs are on real images and on each method's."""
    return _planned(args, outputs_cell)


def plan_tsne(args: argparse.Namespace) -> Plan:
    """t-SNE of what the last layer reads (needs scikit-learn)."""
    for seed, network in product(args.seeds, args.networks):
        at = {"network": network, "seed": seed}
        yield (
            f"{network}/{','.join(args.images)}/{seed}",
            functools.partial(tsne_cell, args.images, at, args),
        )


def plan_grids(args: argparse.Namespace) -> Plan:
    """Pictures after given numbers of iterations."""
    return _planned(args, grid_cell)


def plan_cost(args: argparse.Namespace) -> Plan:
    """Image-iterations a second (CPU time) and peak memory of each method."""
    return _planned(args, cost_cell)


def _arguments(
    images: list[str], further: Callable[[argparse.ArgumentParser], None] | None = None
) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--networks", nargs="+", default=["cifar10_resnet20"], choices=list(CASES)
        )
        parser.add_argument("--images", nargs="+", default=images, metavar="METHOD[SETTINGS]")
        if further is not None:
            further(parser)

    return add


def _grid_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at-iterations", nargs="+", type=int, default=[100, 1000, 10000])


def _cost_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", nargs=2, type=int, default=[8, 24], metavar="ITERATIONS")


def _mean_of(name: str) -> Callable[[Cell], float]:
    return lambda cell: float(np.mean(cell[name]))


def _tables(title: str, values: dict[str, Callable[[Cell], float]], digits: int = 3) -> Any:
    """A table with a column for each value."""

    def table(cells: dict[str, Cell]) -> str:
        columns = {
            f"{key}/{name}": {"at": {**cell["at"], "value": name}, "is": value(cell)}
            for key, cell in cells.items()
            for name, value in values.items()
        }
        return pivot(
            columns,
            title=title,
            tables=("network",),
            row="images",
            column="value",
            value=lambda cell: float(cell["is"]),
            digits=digits,
        )

    return table


def _plot_layers(cells: dict[str, Cell], path: Path) -> None:
    """Error of the mean by layer, one line for each kind of images, the first seed."""
    networks = levels(cells, "network")
    _, axes = plt.subplots(
        2, len(networks), figsize=(5 * len(networks), 6), squeeze=False, layout="constrained"
    )
    for column, network in enumerate(networks):
        drawn = set()
        for cell in cells.values():
            at = cell["at"]
            if at["network"] != network or at["images"] in drawn:
                continue
            drawn.add(at["images"])
            for row, name in enumerate(("mean", "std")):
                axes[row][column].semilogy(cell[name], label=at["images"], linewidth=1)
                axes[row][column].set_title(f"{network}: error of the {name}", fontsize=9)
        axes[1][column].set_xlabel("BatchNormalization node")
        axes[0][column].legend(fontsize=6)
    axes[0][0].set_ylabel("sigmas")
    save(path)


def _plot_outputs(cells: dict[str, Cell], path: Path) -> None:
    networks = levels(cells, "network")
    _, axes = plt.subplots(
        1, len(networks), figsize=(5 * len(networks), 3.6), squeeze=False, layout="constrained"
    )
    for panel, network in zip(axes[0], networks, strict=True):
        drawn = set()
        for cell in cells.values():
            at = cell["at"]
            if at["network"] != network or at["images"] in drawn:
                continue
            drawn.add(at["images"])
            edges, counts = np.array(cell["edges"]), np.array(cell["counts"], float)
            density = counts / counts.sum() / np.diff(edges)
            panel.plot((edges[1:] + edges[:-1]) / 2, density, label=at["images"], linewidth=1)
        panel.set_title(network, fontsize=9)
        panel.set_xlabel("output")
        panel.legend(fontsize=6)
    save(path)


def _tsne_table(cells: dict[str, Cell]) -> str:
    lines = [
        "# t-SNE of what the last layer reads",
        "",
        "Share of images whose nearest neighbor in feature space is of their own kind: with as "
        "many of each kind 1 / kinds means that they cannot be told apart.",
        "",
    ]
    for cell in cells.values():
        words = ", ".join(f"{kind} {share:.2f}" for kind, share in cell["own_kind"].items())
        lines.append(f"- {cell['at']['network']}, seed {cell['at']['seed']}: {words}")
    return "\n".join(lines) + "\n"


def _plot_tsne(cells: dict[str, Cell], path: Path) -> None:
    _, axes = plt.subplots(
        1, len(cells), figsize=(4.5 * len(cells), 4.2), squeeze=False, layout="constrained"
    )
    for panel, cell in zip(axes[0], cells.values(), strict=True):
        places = np.array(cell["places"])
        for kind in dict.fromkeys(cell["kinds"]):
            rows = _where(cell["kinds"], kind)
            panel.scatter(*places[rows].T, s=6, label=kind)
        panel.set_title(f"{cell['at']['network']}, seed {cell['at']['seed']}", fontsize=9)
        panel.legend(fontsize=7)
    save(path)


def _grid_table(cells: dict[str, Cell]) -> str:
    lines = [
        "# Pictures by iterations",
        "",
        "| network | images | iterations | seconds | loss, first to last | file |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells.values():
        at, losses = cell["at"], (cell.get("first_loss"), cell.get("last_loss"))
        shown = "-" if None in losses else f"{losses[0]:.3g} to {losses[1]:.3g}"
        seconds = cell.get("generation_seconds")
        words = [
            at["network"],
            at["images"],
            at["iterations"],
            "-" if seconds is None else f"{seconds:.0f}",
            shown,
            cell["file"],
        ]
        lines.append("| " + " | ".join(map(str, words)) + " |")
    return "\n".join(lines) + "\n"


def _plot_grids(cells: dict[str, Cell], path: Path) -> None:
    ordered = sorted(
        cells.values(), key=lambda c: (str(c["at"]["images"]), c["at"]["iterations"])
    )
    _, axes = plt.subplots(
        len(ordered), 1, figsize=(7, 1.1 * len(ordered)), squeeze=False, layout="constrained"
    )
    for panel, cell in zip(axes[:, 0], ordered, strict=True):
        picture = plt.imread(path.parent / "grids" / cell["file"])
        panel.imshow(picture, cmap="gray")
        panel.set_axis_off()
        at = cell["at"]
        panel.set_title(f"{at['network']}: {at['images']}, {at['iterations']}", fontsize=7)
    save(path)


def _plot_cost(cells: dict[str, Cell], path: Path) -> None:
    draw(
        cells,
        path,
        panels=("network",),
        x="images",
        line="seed",
        value=lambda cell: float(cell["rate"]),
        label="image-iterations a second",
    )


def _numbers(*names: str) -> Callable[[Cell], str]:
    return lambda cell: ", ".join(f"{name} {np.mean(cell[name]):.3g}" for name in names)


_ALL = ["real", "augmented", *METHODS]
_OUTPUTS = ("span", "low", "high", "std", "top_share", "classes")

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "statistics": {
        "arguments": _arguments(_ALL),
        "plan": plan_statistics,
        "table": _tables(
            "Error of the statistics, mean over the layers, in sigmas",
            {"mean": _mean_of("mean"), "std": _mean_of("std")},
        ),
        "plot": _plot_layers,
        "describe": _numbers("mean", "std"),
    },
    "outputs": {
        "arguments": _arguments(_ALL),
        "plan": plan_outputs,
        "table": _tables("The networks' outputs", {name: _mean_of(name) for name in _OUTPUTS}),
        "plot": _plot_outputs,
        "describe": _numbers("span", "std"),
    },
    "tsne": {
        "arguments": _arguments(
            ["real", "dgh", *(name for name in ("zeroq",) if name in METHODS)]
        ),
        "plan": plan_tsne,
        "table": _tsne_table,
        "plot": _plot_tsne,
        "describe": lambda cell: str(cell["own_kind"]),
    },
    "grids": {
        "arguments": _arguments(["dgh", "dgh[start=noise]"], _grid_arguments),
        "plan": plan_grids,
        "table": _grid_table,
        "plot": _plot_grids,
        "describe": lambda cell: str(cell["file"]),
    },
    "cost": {
        "arguments": _arguments(
            [name for name in METHODS if name != "noise"], _cost_arguments
        ),
        "plan": plan_cost,
        "table": _tables(
            "Image-iterations a second of CPU time, and peak memory",
            {"a second": _mean_of("rate"), "MB": _mean_of("megabytes")},
            digits=0,
        ),
        "plot": _plot_cost,
        "describe": _numbers("rate", "megabytes"),
    },
}
