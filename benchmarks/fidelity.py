"""How well agreement on images without labels tells the accuracy that quantization costs.

Every network is quantized by every setting. Measured on each file, against the float network:

    calibration  agreement (same class) and SQNR on the images it was calibrated with
    held-out     likewise on 64 images that DGH made with another seed
    prior        likewise on synthetic natural images, which no network had a say in
    drop         float top-1 minus quantized top-1 on labelled test images, in points

`pipeline/fidelity.toml`, from which reports estimate the drop, is fitted to these cells; the error
of an estimate is that of networks left out of the fit, one at a time.

Run from the repository root; the real networks and images are expected in ../shared:

    python benchmarks/fidelity.py --keep-images DIR
    python benchmarks/fidelity.py --tables-only --fit

Cells are kept in benchmarks/results/fidelity.json and not measured again (--fresh: all are). The
table goes to fidelity.md, the plot to fidelity.png beside it; --fit writes the constants.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import CASES, RESULTS, ROOT, SHARED, bits_of, model_path
from cells import Cell, run_cells, write_text

from graph_tools.model import load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.reading import read_proto
from pipeline.drop import SMALL, Power, drop_of
from pipeline.evaluate.datasets import open_dataset
from pipeline.evaluate.sessions import open_session
from pipeline.fidelity import measure_fidelity, prior_batches
from pipeline.generate import generate
from pipeline.images import ImageSet, open_images
from pipeline.quantize import quantize
from pipeline.settings import GenerateSettings, QuantizeSettings

HELD_OUT = 64
NEAREST = ("W8A8", "W4A8", "W3A8", "W8A4", "W4A4", "W2A4")
LEARNED = {
    "cifar10_resnet20": (("W4A8", "adaround"), ("W4A4", "brecq"), ("W2A4", "brecq")),
    "mlperftiny_resnet8_cifar10_tf2onnx_bn": (("W4A4", "adaround"), ("W2A4", "adaround")),
    "mcunet_cifar10_32": (("W4A8", "adaround"),),
}


@dataclass(frozen=True, kw_only=True)
class Key:
    network: str
    scheme: str
    rounding: str = "nearest"
    images: str = "dgh"

    def __str__(self) -> str:
        return "/".join((self.network, self.scheme, self.rounding, self.images))


def planned(networks: list[str]) -> Iterator[Key]:
    for name in networks:
        for scheme in NEAREST:
            yield Key(network=name, scheme=scheme)
        yield Key(network=name, scheme="W8A8", images="noise")
        yield Key(network=name, scheme="W4A8", images="noise")
    for name in networks:
        for scheme, rounding in LEARNED.get(name, ()):
            yield Key(network=name, scheme=scheme, rounding=rounding)


def images_of(name: str, method: str, seed: int, folder: Path) -> ImageSet:
    """Images by a method and a seed, kept in ``folder``."""
    case, path = CASES[name], folder / f"{name}.{method}.{seed}.npz"
    model = load(model_path(name))
    if not path.exists():
        count = case.num_images if seed == 0 else HELD_OUT
        settings = GenerateSettings(method=method, num_images=count, seed=seed)
        generate(model, settings, path, preprocessing=case.preprocessing)
    return open_images(path, shape=model.input.shape)


@functools.lru_cache(maxsize=1)
def test_images(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All labelled images of a network, decoded once: [N, ...] float32 and [N] labels."""
    case = CASES[name]
    entry = load(model_path(name)).input
    batches = list(
        open_dataset(SHARED / "data" / case.test).batches(entry, case.preprocessing, 256)
    )
    return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])


@functools.lru_cache(maxsize=8)
def predictions(path: Path, name: str, threads: int) -> np.ndarray:
    session = open_session(path, threads=threads)
    images = test_images(name)[0]
    size = session.batch_size
    found = [
        session.scores(images[i : i + size]).argmax(1) for i in range(0, len(images), size)
    ]
    return np.concatenate(found)


def measure(key: Key, folder: Path, threads: int) -> Cell:
    start = time.perf_counter()
    name, case = key.network, CASES[key.network]
    weights, activations = bits_of(key.scheme)
    settings = QuantizeSettings(
        weights=weights, activations=activations, rounding=key.rounding
    )
    model = load(model_path(name))
    calibration = images_of(name, key.images, 0, folder)
    held_out = images_of(name, "dgh", 1, folder)
    quantization = quantize(prepare_for_quantization(model), calibration, settings)
    network = quantization.model
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "q.onnx"
        save(write_qdq(network, quantization.plan), path)
        right = {
            file: predictions(file, name, threads) == test_images(name)[1]
            for file in (model_path(name), path)
        }
        written = read_proto(path)[0]
    float_top1, top1 = (100 * float(found.mean()) for found in right.values())
    sources = (
        ("calibration", calibration.batches(16)),
        ("held-out", held_out.batches(16, limit=HELD_OUT)),
        ("prior", prior_batches(model, case.preprocessing, case.num_images, 0)),
    )
    found = [
        measure_fidelity(
            network.proto, written, network.outputs, batches, kind, threads=threads
        )
        for kind, batches in sources
    ]
    return {
        "float_top1": float_top1,
        "top1": top1,
        "drop": float_top1 - top1,
        "test_images": len(test_images(name)[1]),
        "test_agreement": float(
            (
                predictions(model_path(name), name, threads)
                == predictions(path, name, threads)
            ).mean()
        ),
        "fidelity": {
            f.kind: {"agreement": f.agreement, "sqnr_db": f.sqnr_db, "images": f.images}
            for f in found
        },
        "seconds": time.perf_counter() - start,
    }


def describe(cell: Cell) -> str:
    shares = "  ".join(
        f"{kind} {100 * found['agreement']:.1f} % {found['sqnr_db']:.1f} dB"
        for kind, found in cell["fidelity"].items()
    )
    return (
        f"{cell['float_top1']:.2f} -> {cell['top1']:.2f}  {shares} ({cell['seconds']:.0f} s)"
    )


Points = dict[str, np.ndarray]


def points_of(cells: dict[str, Cell]) -> Points:
    """The cells as arrays: what `pipeline.drop` reads, and what it should say."""
    found = {
        kind: np.array([1 - c["fidelity"][kind]["agreement"] for c in cells.values()])
        for kind in ("calibration", "held-out", "prior")
    }
    keys = [key.split("/") for key in cells]
    return {
        **found,
        "drop": np.array([cell["drop"] for cell in cells.values()]),
        "network": np.array([network for network, *_ in keys]),
        "matched": np.array([images == "dgh" for *_, images in keys]),
    }


def fit(shares: np.ndarray, drop: np.ndarray) -> Power:
    """Gain and power with the least error: absolute, and of the logarithm of 1 + points.

    The logarithm makes a point count more where little is lost.
    """
    gains, powers = np.arange(40, 101, 1.0)[:, None, None], np.arange(1, 4.01, 0.05)[:, None]
    guess = gains * shares**powers
    logs = np.abs(np.log1p(guess) - np.log1p(np.maximum(drop, 0)))
    error = (logs + 0.02 * np.abs(guess - drop)).sum(axis=2)
    gain, power = np.unravel_index(error.argmin(), error.shape)
    return Power(gain=float(gains[gain, 0, 0]), power=round(float(powers[power, 0]), 2))


def fit_both(points: Points, chosen: np.ndarray) -> tuple[Power, Power]:
    """From calibration images that match the network, and from prior images."""
    matched = chosen & points["matched"]
    return (
        fit(points["calibration"][matched], points["drop"][matched]),
        fit(points["prior"][chosen], points["drop"][chosen]),
    )


def guesses(
    points: Points, fits: tuple[Power, Power], *, held_out: bool = False
) -> np.ndarray:
    rows = zip(
        points["calibration"],
        points["prior"],
        points["held-out"],
        points["matched"],
        strict=True,
    )
    return np.array(
        [
            drop_of(
                *fits,
                calibration=c,
                prior=p,
                held_out=h if held_out else None,
                matched=bool(m),
            )
            for c, p, h, m in rows
        ]
    )


def left_out(points: Points, *, held_out: bool = False) -> np.ndarray:
    """Estimates of each network by constants that were fitted to the others."""
    found = np.zeros(len(points["drop"]))
    for name in set(points["network"]):
        own = points["network"] == name
        found[own] = guesses(points, fit_both(points, ~own), held_out=held_out)[own]
    return found


def constants_of(points: Points, estimates: np.ndarray) -> dict[str, Any]:
    """What `pipeline/fidelity.toml` holds."""
    fits = fit_both(points, np.ones(len(estimates), bool))
    drop, matched = points["drop"], points["matched"]
    scaled = np.abs(estimates - drop) / (1 + estimates)
    networks = sorted(set(points["network"]))
    models = [load(model_path(name)) for name in networks]
    classes = [
        int(m.proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value) for m in models
    ]
    sizes = [max(m.input.height, m.input.width) for m in models]
    return {
        "calibration": fits[0],
        "prior": fits[1],
        "error_generated": round(float(np.quantile(scaled[matched], 0.8)), 3),
        "error_other": round(float(np.quantile(scaled[~matched], 0.8)), 3),
        "cells": len(drop),
        "networks": len(networks),
        "correlation": round(float(np.corrcoef(estimates, drop)[0, 1]), 3),
        "mean_error": round(float(np.abs(estimates - drop).mean()), 2),
        "mean_error_small": round(float(np.abs(estimates - drop)[drop < SMALL].mean()), 2),
        "classes": [min(classes), max(classes)],
        "sizes": [min(sizes), max(sizes)],
    }


NOTE = """\
# How `pipeline.drop` makes an accuracy drop of agreement without labels. Written by
#
#     python benchmarks/fidelity.py --fit
#
# from benchmarks/results/fidelity.json; the errors are of networks left out of the fit, one at a
# time, which is also what correlation and mean_error (points of top-1) are of.
"""


def table(cells: dict[str, Cell], points: Points, estimates: np.ndarray) -> str:
    rows = [
        "# Accuracy lost, and estimated without labels",
        "",
        "Points of top-1; the estimate is by constants fitted to the other networks. Disagreement",
        "in percent and SQNR in dB on calibration, held-out and prior images. Written by",
        "`python benchmarks/fidelity.py`.",
        "",
        "| file | float | drop | estimate | disagreement: calibration, held-out, prior | SQNR |",
        "|---|---|---|---|---|---|",
    ]
    for (key, cell), estimate in zip(cells.items(), estimates, strict=True):
        found = [cell["fidelity"][kind] for kind in ("calibration", "held-out", "prior")]
        shares = ", ".join(f"{100 * (1 - f['agreement']):.1f}" for f in found)
        ratios = ", ".join(f"{f['sqnr_db']:.1f}" for f in found)
        rows.append(
            f"| {key} | {cell['float_top1']:.2f} | {cell['drop']:.2f} | {estimate:.2f} | {shares} "
            f"| {ratios} |"
        )
    rows += ["", "| | cells | correlation | rank correlation | mean error | median error |"]
    rows += ["|---|---|---|---|---|---|"]
    drop, matched = points["drop"], points["matched"]
    everything = np.ones(len(drop), bool)
    with_held_out = left_out(points, held_out=True)
    measures = {
        "estimate, network left out": (estimates, everything),
        "likewise, calibrated with DGH's images": (estimates, matched),
        "likewise, calibrated with noise": (estimates, ~matched),
        f"likewise, drops below {SMALL} points": (estimates, drop < SMALL),
        "with held-out images, too": (with_held_out, everything),
        "with held-out images, calibrated with noise": (with_held_out, ~matched),
    }
    for name, (found, chosen) in measures.items():
        error = np.abs(found - drop)[chosen]
        rows.append(
            f"| {name} | {chosen.sum()} | {_correlation(found[chosen], drop[chosen]):.3f} | "
            f"{_correlation(_ranks(found[chosen]), _ranks(drop[chosen])):.3f} | "
            f"{error.mean():.2f} | {np.median(error):.2f} |"
        )
    for kind in ("calibration", "held-out", "prior"):
        share, ratio = (
            100 * points[kind],
            -np.array([c["fidelity"][kind]["sqnr_db"] for c in cells.values()]),
        )
        for name, found in (("disagreement", share), ("SQNR (negative)", ratio)):
            rows.append(
                f"| {name} on {kind} images | {len(drop)} | {_correlation(found, drop):.3f} | "
                f"{_correlation(_ranks(found), _ranks(drop)):.3f} | - | - |"
            )
    return "\n".join(rows) + "\n"


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def plot(points: Points, estimates: np.ndarray, constants: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")
    line = np.geomspace(0.02, 90, 200)
    error = constants["error_generated"] * (1 + line)
    axes.fill_between(
        line, line - error, line + error, color="tab:gray", alpha=0.18, lw=0,
        label="range given (four of five)",
    )  # fmt: skip
    axes.plot(line, line, color="tab:gray", lw=1)
    for index, name in enumerate(sorted(set(points["network"]))):
        for matched, marker in ((True, "o"), (False, "x")):
            own = (points["network"] == name) & (points["matched"] == matched)
            axes.plot(
                estimates[own], points["drop"][own], marker, color=f"C{index}", ms=6,
                label=name if matched else None,
            )  # fmt: skip
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("symlog", linthresh=1)
    ticks = [0, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_yticks([-1, *ticks], map(str, [-1, *ticks]))
    axes.set_xlim(0, 95)
    axes.set_ylim(-1.2, 95)
    axes.set_xlabel("estimated without labels, network left out of the fit (points of top-1)")
    axes.set_ylabel("measured drop (points of top-1)")
    axes.set_title("crosses: calibrated with noise", fontsize="small")
    axes.legend(fontsize="x-small", loc="upper left")
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write_constants(constants: dict[str, Any]) -> None:
    lines = [
        f"{name} = {{ gain = {value.gain}, power = {value.power} }}"
        if isinstance(value, Power)
        else f"{name} = {value}"
        for name, value in constants.items()
    ]
    write_text(ROOT / "pipeline" / "fidelity.toml", NOTE + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--keep-images", type=Path, default=RESULTS / "images")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--fit", action="store_true", help="write pipeline/fidelity.toml")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--tables-only", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "fidelity.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.keep_images.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Callable[[], Cell]] = {
        str(key): functools.partial(measure, key, args.keep_images, args.threads)
        for key in planned(args.networks)
    }
    cells = run_cells(
        args.output, {} if args.tables_only else runs, describe, fresh=args.fresh
    )
    points = points_of(cells)
    estimates = left_out(points)
    constants = constants_of(points, estimates)
    text = table(cells, points, estimates)
    print(text)
    print("\n".join(f"{name} = {value}" for name, value in constants.items()))
    write_text(args.output.with_suffix(".md"), text)
    plot(points, estimates, constants, args.output.with_suffix(".png"))
    if args.fit:
        write_constants(constants)


if __name__ == "__main__":
    main()
