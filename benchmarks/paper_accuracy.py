"""Experiments of the papers that end in an accuracy: a file quantized with images, evaluated."""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from accuracy import CASES, bits_of, held_out, model_path
from cells import Cell
from paper_sources import METHODS, images_of, named, parsed
from paper_tables import draw, pivot, save

from pipeline.evaluate.classification import evaluate_classification
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)

Plan = Iterator[tuple[str, Callable[[], Cell]]]
Rows = Iterator[tuple[str, dict[str, Any]]]
"""(source of the images, what the cell is at)"""


def accuracy_cell(source: str, at: dict[str, Any], args: argparse.Namespace) -> Cell:
    """Make images, quantize with them, evaluate.

    Args:
        source: see `paper_sources`.
        at: network, scheme, variant, rounding, seed; and what the experiment adds.
        args: the flags.
    """
    network, seed = at["network"], at["seed"]
    case = CASES[network]
    weights, activations = bits_of(at["scheme"])
    quantization = QuantizeSettings(
        weights=weights,  # type: ignore[arg-type]
        activations=activations,  # type: ignore[arg-type]
        scheme=at["variant"],
        rounding=at["rounding"],
    )
    keep = args.keep_images
    num_images = at.get("num_images", args.num_images)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        _, images, facts = images_of(
            source,
            network,
            seed,
            num_images=num_images,
            iterations=at.get("iterations", args.iterations),
            keep=keep if keep is not None else Path(folder) / "images",
            quantization=quantization,
        )
        job = QuantizeJob(
            model=model_path(network),
            output=Path(folder) / "q.onnx",
            images=images.path,
            input=InputSettings(mean=case.mean, std=case.std),
            generation=GenerateSettings(seed=seed),
            quantization=quantization,
            verification=VerifySettings(max_images=16, interpreter_images=0),
        )
        result = quantize_file(job)
        seconds = time.perf_counter() - start
        accuracy = evaluate_classification(
            [job.output], held_out(case, seed, num_images), case.preprocessing
        )[0]
    return {
        "at": {**at, "images": source},
        "top1": accuracy.top1,
        "passed": result.proof.passed,
        "seconds": seconds,
        "quantize_seconds": result.report["times"]["quantize"],
        **facts,
    }


def _key(source: str, at: dict[str, Any]) -> str:
    words = [str(value) for name, value in at.items() if name != "seed"]
    return "/".join([*words, source, str(at["seed"])])


def _planned(args: argparse.Namespace, rows: Callable[[], Rows]) -> Plan:
    """The cells of ``rows`` for all networks, schemes, variants, roundings and seeds."""
    for seed, network, scheme, variant, rounding in product(
        args.seeds, args.networks, args.schemes, args.variants, args.rounding
    ):
        for source, extra in rows():
            bits_of(extra.get("scheme", scheme))
            parsed(source)
            at = {
                "network": network,
                "scheme": scheme,
                "variant": variant,
                "rounding": rounding,
                "seed": seed,
                **extra,
            }
            yield _key(source, at), functools.partial(accuracy_cell, source, at, args)


def _arguments(
    schemes: list[str], variants: list[str], rounding: list[str], images: list[str]
) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--networks", nargs="+", default=["cifar10_resnet20"], choices=list(CASES)
        )
        parser.add_argument("--schemes", nargs="+", default=schemes, metavar="W4A8")
        parser.add_argument("--variants", nargs="+", default=variants, metavar="full")
        parser.add_argument("--rounding", nargs="+", default=rounding)
        parser.add_argument("--images", nargs="+", default=images, metavar="METHOD[SETTINGS]")

    return add


def plan_ablation(args: argparse.Namespace) -> Plan:
    """DGH without and with its three parts: global statistics, image prior, stretched outputs."""
    off: dict[str, dict[str, Any]] = {
        "SAS": {"scope": 1},
        "IP": {"padding": 0, "blur": 0, "flip": False},
        "ODSL": {"output_weight": 0},
    }

    def rows() -> Rows:
        for source in args.images:
            method, settings = parsed(source)
            for used in product((False, True), repeat=3):
                parts = [part for part, use in zip(off, used, strict=True) if use]
                missing: dict[str, Any] = {}
                for part in set(off) - set(parts):
                    missing |= off[part]
                start = settings.get("start", "natural")
                name = named(method, **{**settings, **missing})
                yield name, {"parts": "+".join(parts) or "none", "start": start}

    return _planned(args, rows)


def plan_scope(args: argparse.Namespace) -> Plan:
    """Accuracy by how many batches share their statistics, with and without stretched outputs."""

    def rows() -> Rows:
        for source, scope, stretched in product(args.images, args.scopes, (True, False)):
            method, settings = parsed(source)
            settings = {**settings, "scope": scope}
            if not stretched:
                settings["output_weight"] = 0
            if args.batch_size:
                settings["batch_size"] = args.batch_size
            extra = {"scope": scope or "all", "outputs": "ODSL" if stretched else "no ODSL"}
            yield named(method, **settings), extra

    return _planned(args, rows)


def plan_refresh(args: argparse.Namespace) -> Plan:
    """Exact gradients over all images every so many iterations (0: never), against their cost."""

    def rows() -> Rows:
        for source, size, refresh in product(args.images, args.batch_sizes, args.refresh):
            method, settings = parsed(source)
            settings = {**settings, "batch_size": size, "refresh": refresh}
            yield named(method, **settings), {"batch size": size, "refresh": refresh}

    return _planned(args, rows)


def _refresh_arguments(parser: argparse.ArgumentParser) -> None:
    _arguments(["W4A8", "W4A4"], ["full"], ["brecq"], ["dgh"])(parser)
    parser.add_argument("--refresh", nargs="+", type=int, default=[0, 1, 10])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16, 64])


def _refresh_tables(cells: dict[str, Cell]) -> str:
    columns: dict[str, tuple[Callable[[Cell], float], int]] = {
        "Top-1": (_top1, 2),
        "Statistics that the images miss, in sigmas": (lambda c: c["statistics_error"], 4),
        "CPU seconds to make the images": (lambda c: c["generation_cpu_seconds"], 0),
    }
    return "\n".join(
        pivot(
            cells,
            title=f"{(plan_refresh.__doc__ or '').strip()} {title}",
            tables=("network", "scheme", "rounding"),
            row="batch size",
            column="refresh",
            value=value,
            digits=digits,
        )
        for title, (value, digits) in columns.items()
    )


def _refresh_plot(cells: dict[str, Cell], path: Path) -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    ways = sorted({(c["at"]["batch size"], c["at"]["refresh"]) for c in cells.values()})
    schemes = sorted({c["at"]["scheme"] for c in cells.values()})
    for size, refresh in ways:
        found = [
            c
            for c in cells.values()
            if (c["at"]["batch size"], c["at"]["refresh"]) == (size, refresh)
        ]
        label = f"batch {size}, every {refresh}" if refresh else f"batch {size}, never"
        cost = [c["generation_cpu_seconds"] for c in found]
        (line,) = axes[0].plot(cost, [c["statistics_error"] for c in found], "o", label=label)
        for scheme, marker in zip(schemes, "o^sv", strict=False):
            drawn = [c for c in found if c["at"]["scheme"] == scheme]
            axes[1].plot(
                [c["generation_cpu_seconds"] for c in drawn],
                [c["top1"] for c in drawn],
                marker,
                color=line.get_color(),
                label=scheme if (size, refresh) == ways[0] else None,
            )
    for axis, name in zip(axes, ("missed, in sigmas", "top-1, %"), strict=True):
        axis.set_xlabel("CPU seconds to make the images")
        axis.set_ylabel(name)
    for axis in axes:
        axis.legend(fontsize=7)
    save(path)


def _scope_arguments(parser: argparse.ArgumentParser) -> None:
    _arguments(["W4A4"], ["full"], ["brecq"], ["dgh"])(parser)
    parser.add_argument("--scopes", nargs="+", type=int, default=[1, 2, 0], help="0: all")
    parser.add_argument("--batch-size", type=int, default=0)


def _images(args: argparse.Namespace) -> Rows:
    for source in args.images:
        yield source, {}


def plan_bits(args: argparse.Namespace) -> Plan:
    """Accuracy by bits of activations (W8) and of weights (A8)."""
    return _planned(args, lambda: _images(args))


def plan_methods(args: argparse.Namespace) -> Plan:
    """All methods, real images and noise, full and academic."""
    return _planned(args, lambda: _images(args))


def plan_sadag(args: argparse.Namespace) -> Plan:
    """SADAG's two forms over the images that they start from, by the weights of its terms."""

    def rows() -> Rows:
        for form, first in (("generator", "genie"), ("pixels", "dgh")):
            if form not in args.forms:
                continue
            yield first, {"form": form, "terms": "warm-up"}
            for matching, diversity in args.weights:
                settings = {"sadag_matching": matching, "sadag_diversity": diversity}
                name = named("sadag", sadag_form=form, **settings)
                yield name, {"form": form, "terms": f"{matching:g}, {diversity:g}"}

    return _planned(args, rows)


def _pair(text: str) -> tuple[float, float]:
    first, second = text.split(",")
    return float(first), float(second)


def _sadag_arguments(parser: argparse.ArgumentParser) -> None:
    _arguments(["W2A4"], ["full"], ["brecq"], [])(parser)
    parser.add_argument("--forms", nargs="+", default=["generator", "pixels"])
    parser.add_argument(
        "--weights",
        nargs="+",
        type=_pair,
        default=[(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)],
        metavar="MATCHING,DIVERSITY",
    )


def plan_budget(args: argparse.Namespace) -> Plan:
    """Accuracy and time by number of images and of iterations."""

    def rows() -> Rows:
        for source in args.images:
            for count, iterations in product(args.counts, args.steps):
                yield source, {"num_images": count, "iterations": iterations}

    return _planned(args, rows)


def _budget_arguments(parser: argparse.ArgumentParser) -> None:
    _arguments(["W4A4"], ["full"], ["brecq"], ["dgh"])(parser)
    parser.add_argument("--counts", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50, 100, 200, 400])


def _top1(cell: Cell) -> float:
    return float(cell["top1"])


def _described(cell: Cell) -> str:
    return f"{cell['top1']:.2f} ({cell['seconds']:.0f} s)"


def _experiment(
    plan: Callable[[argparse.Namespace], Plan],
    arguments: Callable[[argparse.ArgumentParser], None],
    *,
    tables: tuple[str, ...] = ("network", "scheme", "variant", "rounding"),
    row: str,
    column: str,
) -> dict[str, Any]:
    title = (plan.__doc__ or "").strip()

    def table(cells: dict[str, Cell]) -> str:
        text = pivot(
            cells,
            title=f"{title} Top-1",
            tables=tables,
            row=row,
            column=column,
            value=_top1,
        )
        if "num_images" not in (row, column):
            return text
        return (
            text
            + "\n"
            + pivot(
                cells,
                title="Seconds to make the images",
                tables=tables,
                row=row,
                column=column,
                value=lambda cell: cell.get("generation_seconds") or 0.0,
                digits=0,
            )
        )

    def plot(cells: dict[str, Cell], path: Path) -> None:
        draw(cells, path, panels=tables, x=column, line=row, value=_top1, label="top-1, %")

    return {
        "arguments": arguments,
        "plan": plan,
        "table": table,
        "plot": plot,
        "describe": _described,
    }


_ALL = [*METHODS, "real", "normal"]

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "ablation": _experiment(
        plan_ablation,
        _arguments(["W4A4", "W2A4"], ["full"], ["brecq"], ["dgh", "dgh[start=noise]"]),
        tables=("network", "variant", "rounding", "start"),
        row="parts",
        column="scheme",
    ),
    "scope": _experiment(plan_scope, _scope_arguments, row="outputs", column="scope"),
    "refresh": {
        "arguments": _refresh_arguments,
        "plan": plan_refresh,
        "table": _refresh_tables,
        "plot": _refresh_plot,
        "describe": _described,
    },
    "bits": _experiment(
        plan_bits,
        _arguments(
            ["W8A16", "W8A8", "W8A4", "W4A8", "W3A8", "W2A8"], ["full"], ["brecq"], _ALL
        ),
        tables=("network", "variant", "rounding"),
        row="images",
        column="scheme",
    ),
    "methods": _experiment(
        plan_methods,
        _arguments(["W4A4", "W2A4"], ["full", "academic"], ["brecq"], _ALL),
        tables=("network", "rounding", "variant"),
        row="images",
        column="scheme",
    ),
    "sadag": _experiment(plan_sadag, _sadag_arguments, row="form", column="terms"),
    "budget": _experiment(
        plan_budget, _budget_arguments, row="num_images", column="iterations"
    ),
}
