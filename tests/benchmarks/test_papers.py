"""The frame of the papers' experiments: names, plans, shards, tables and plots."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pipeline.generate.methods import METHODS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("accuracy", "cells", "papers", "paper_sources", "paper_tables")
MODULES = (*MODULES, "paper_accuracy", "paper_images")


@pytest.fixture(scope="module")
def papers() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("papers")
    for name in MODULES:
        sys.modules.pop(name, None)


def arguments(papers: ModuleType, name: str, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    papers.EXPERIMENTS[name].arguments(parser)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    return parser.parse_args(words)


def test_sources_are_read_back_and_every_method_is_one(papers: ModuleType) -> None:
    sources = sys.modules["paper_sources"]
    assert set(sources.METHODS) == set(METHODS)
    for method, settings in (
        ("dgh", {}),
        ("dgh", {"scope": 1, "start": "noise", "flip": False, "output_weight": 0.5}),
        ("real", {}),
    ):
        assert sources.parsed(sources.named(method, **settings)) == (method, settings)
    with pytest.raises(SystemExit, match="none of"):
        sources.parsed("nothing[scope=1]")


def test_plans_have_a_cell_for_each_combination_and_seed(papers: ModuleType) -> None:
    expected = {
        "ablation": 2 * 2 * 8 * 2,  # schemes, starts, parts, seeds
        "scope": 3 * 2 * 2,
        "refresh": 2 * 3 * 2 * 2,
        "bits": 6 * (len(METHODS) + 2) * 2,
        "methods": 2 * 2 * (len(METHODS) + 2) * 2,
        "sadag": 2 * 5 * 2,
        "budget": 25 * 2,
        "statistics": (len(METHODS) + 2) * 2,
        "outputs": (len(METHODS) + 2) * 2,
        "tsne": 2,
        "grids": 2 * 3 * 2,
        "cost": (len(METHODS) - 1) * 2,
    }
    assert set(papers.EXPERIMENTS) == set(expected)
    for name, count in expected.items():
        keys = [key for key, _ in papers.EXPERIMENTS[name].plan(arguments(papers, name))]
        assert len(keys) == len(set(keys)) == count, name


def test_the_ablation_takes_away_what_it_says(papers: ModuleType) -> None:
    plan = papers.EXPERIMENTS["ablation"].plan(
        arguments(papers, "ablation", "--images", "dgh", "--schemes", "W4A4", "--seeds", "0")
    )
    sources = {run.args[1]["parts"]: run.args[0] for _, run in plan}
    assert sources["SAS+IP+ODSL"] == "dgh"
    assert sources["SAS+ODSL"] == "dgh[blur=0,flip=false,padding=0]"
    assert sources["IP"] == "dgh[output_weight=0,scope=1]"


def test_shards_share_the_cells(papers: ModuleType, tmp_path: Path) -> None:
    done = []

    def plan(args: argparse.Namespace) -> Iterator[tuple[str, object]]:
        for index in range(7):
            at = {"network": "net", "seed": index, "images": "dgh"}
            yield str(index), lambda at=at: done.append(at["seed"]) or {"at": at, "rate": 1.0}

    experiment = papers.Experiment(
        arguments=lambda parser: None,
        plan=plan,
        table=lambda cells: f"{len(cells)} cells\n",
        plot=lambda cells, path: None,
        describe=str,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(papers.EXPERIMENTS, "some", experiment)
        for part, so_far in (("0/3", 3), ("1/3", 5), ("1/3", 5), ("2/3", 7)):
            args = argparse.Namespace(
                output=tmp_path,
                shard=sys.modules["cells"].shard(part),
                tables_only=False,
                fresh=False,
            )
            assert papers.run("some", args) == f"{so_far} cells\n"
    assert sorted(done) == list(range(7))
    for wrong in ("3/3", "1", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError):
            sys.modules["cells"].shard(wrong)


def accuracy_cells() -> dict[str, dict]:
    return {
        f"{images}/{seed}": {
            "at": {
                "network": "net",
                "scheme": "W4A4",
                "variant": "full",
                "rounding": "brecq",
                "images": images,
                "seed": seed,
            },
            "top1": top1,
        }
        for images, seed, top1 in (("dgh", 0, 70.0), ("dgh", 1, 72.0), ("real", 0, 75.0))
    }


def test_tables_have_means_and_spreads(papers: ModuleType, tmp_path: Path) -> None:
    experiment = papers.EXPERIMENTS["methods"]
    lines = experiment.table(accuracy_cells()).splitlines()
    assert "| dgh | 71.00 ± 1.41 (2) |" in lines
    assert "| real | 75.00 |" in lines
    experiment.plot(accuracy_cells(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_real_images_are_shifted_within_their_values(papers: ModuleType) -> None:
    augmented, rng = sys.modules["paper_sources"]._augmented, np.random.default_rng(0)
    image = np.arange(3 * 16 * 8, dtype=np.float32).reshape(3, 16, 8)
    changed = [augmented(image, (1, 2), rng) for _ in range(8)]
    assert all(new.shape == image.shape for new in changed)
    assert all(np.isin(new, [*image.ravel(), image.mean()]).all() for new in changed)
    assert len({new.tobytes() for new in changed}) > 3
