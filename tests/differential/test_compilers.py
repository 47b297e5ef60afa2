"""Random graphs and networks on real compilers: the interpreter's integers, each of them.

$ZSQ_DIFFERENTIAL_CASES says how many of each kind, 30 if it says nothing. What a compiler is known
to compute otherwise is left out; tests/pipeline/targets/test_compilers.py has a small file each.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from graph_tools.quantized_graph import QuantizedGraph
from pipeline.settings import QuantizeSettings
from pipeline.target_profiles import load_profile
from pipeline.target_rules import settings_for
from pipeline.verify.causes import known_causes
from tests.differential.compilers import is_refused, merged, not_exact
from tests.differential.random_graphs import chooser, images_for, random_graph
from tests.differential.runs import in_onnxruntime
from tests.differential.test_written_files import written
from tests.pipeline.targets.installed import installed

CASES = int(os.environ.get("ZSQ_DIFFERENTIAL_CASES", "30"))
TARGETS = ["iree", "openvino", "tvm"]
_FILE = 20  # graphs in one


def files(
    models: Iterable[tuple[int, onnx.ModelProto]],
) -> Iterator[dict[int, onnx.ModelProto]]:
    """Groups of one input shape."""
    groups: dict[bytes, dict[int, onnx.ModelProto]] = defaultdict(dict)
    for key, model in models:
        shape = model.graph.input[0].SerializeToString()
        groups[shape][key] = model
        if len(groups[shape]) == _FILE:
            yield groups.pop(shape)
    yield from groups.values()


def assert_exact(name: str, models: Iterable[tuple[int, onnx.ModelProto]]) -> None:
    engine, check = installed(name, timeout=1800), load_profile(name).verify
    compared = 0
    wrong = []
    taken = (
        (key, model)
        for key, model in models
        if not is_refused(name, model) and not known_causes(check, QuantizedGraph(model))
    )
    for group in files(taken):
        compared += len(group)
        wrong += [f"{key}: {row.note()}" for key, row in not_exact(engine, group, check)]
    assert not wrong
    assert compared >= CASES // 3


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_random_graphs(name: str) -> None:
    assert_exact(
        name, ((s, random_graph(chooser(s), wide=False, batch=1)) for s in range(CASES))
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TARGETS, "rknn"])
def test_files_of_random_networks(name: str, tmp_path: Path) -> None:
    """As `zsq quantize --target` writes them."""
    settings = settings_for(load_profile(name), QuantizeSettings(weight_range="7bit"))
    networks = ((seed, written(seed, tmp_path, settings)[0]) for seed in range(CASES))
    if name == "openvino":  # with PRelu rare elements are a step apart: README, Limits
        networks = ((s, m) for s, m in networks if not _has(m, "PRelu"))
    assert_exact(name, networks)


def _has(model: onnx.ModelProto, operator: str) -> bool:
    return any(node.op_type == operator for node in model.graph.node)


def test_graphs_compute_the_same_in_one_file() -> None:
    group = next(iter(files((s, random_graph(chooser(s), batch=1)) for s in range(300))))
    assert len(group) > 5
    images = images_for(next(iter(group.values())), count=1)
    together = in_onnxruntime(merged(group.values()), images, optimize=False)
    alone = [
        (f"g{index}_{name}", values)
        for index, model in enumerate(group.values())
        for name, values in in_onnxruntime(model, images, optimize=False).items()
    ]
    assert [name for name, _ in alone] == list(together)
    for name, values in alone:
        np.testing.assert_array_equal(together[name], values)
