"""Activations in files: the same numbers, and one clear line when there is no room."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from graph_tools.errors import ZsqError
from graph_tools.prepare import prepare_for_quantization
from graph_tools.torch_graph import TorchGraph
from pipeline.quantize import lockstep as lockstep_module
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.spill import on_disk

RNG = np.random.default_rng(0)
TEXT = (
    "g (float[N,3,32,32] x) => (float[N,8,32,32] y) {"
    " c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, v, b)"
    " y = Add(d, r) }"
)


@pytest.fixture
def graph(make_model):
    weights = {
        "w": RNG.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "v": RNG.normal(size=(8, 8, 3, 3)).astype(np.float32),
        "b": np.zeros(8, np.float32),
    }
    return TorchGraph(prepare_for_quantization(make_model(TEXT, **weights)).proto)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_tensor_in_a_file_is_the_tensor(format):
    value = torch.randn(2, 3, 4, 5).contiguous(memory_format=format)
    copy = on_disk(value)
    assert torch.equal(copy, value)
    assert copy.stride() == value.stride()
    assert copy.data_ptr() != value.data_ptr()
    part = on_disk(value[:, 1:])  # not dense
    assert torch.equal(part, value[:, 1:])


def test_both_networks_are_the_same_in_memory_and_in_files(graph, monkeypatch):
    batches = [torch.from_numpy(RNG.normal(size=(8, 3, 32, 32)).astype("f"))] * 3
    written = []
    monkeypatch.setattr(
        lockstep_module, "on_disk", lambda value: written.append(value) or on_disk(value)
    )
    found, counts = [], []
    for budget, spill in ((2**30, True), (2**20, True), (2**20, False)):
        monkeypatch.setattr(lockstep_module, "MEMORY_BUDGET", budget)
        both = Lockstep(graph, {}, {}, batches, spill=spill)
        written.clear()
        for step in graph.steps:
            both.run(step)
        found.append(both)
        counts.append(len(written))
    in_memory, in_files, fewer = found
    assert in_memory.num_images == in_files.num_images == 24
    assert fewer.num_images < 24
    assert counts == [0, 2 * len(batches) * len(graph.steps), 0]
    for name, values in in_memory.exact.items():
        assert all(map(torch.equal, values, in_files.exact[name]))


def test_a_full_disk_is_one_line_that_says_where(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ZsqError, match="No space left") as caught:
        on_disk(torch.zeros(10))
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())
