"""Several processes give what one gives that follows the same schedule."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graph_tools.errors import SettingsError
from graph_tools.model import Model, load
from pipeline.generate import Generated, generate
from pipeline.generate.checkpoints import checkpoint_folder
from pipeline.generate.exchange import draw_order
from pipeline.preprocessing import Preprocessing
from pipeline.ranks import ALONE, Ranks
from pipeline.run import preprocessing_of
from pipeline.settings import CheckpointSettings, GenerateSettings, InputSettings

ROOT = Path(__file__).resolve().parents[3]
HALF = Preprocessing(mean=(0.5,), std=(0.5,))

pytestmark = [
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="this torch has no torch.distributed"
    ),
]


def run(model: Model, path: Path, **options: Any) -> Generated:
    small = {"num_images": 18, "batch_size": 4, "iterations": 5, "start": "noise"}
    settings = GenerateSettings(**{**small, **options})
    return generate(model, settings, path, preprocessing=HALF)


@pytest.mark.parametrize(("count", "lanes"), [(1, 1), (7, 1), (7, 2), (8, 4), (2, 4), (9, 4)])
def test_every_batch_has_its_turn_and_every_process_its_work(count: int, lanes: int) -> None:
    order = draw_order(count, lanes, torch.Generator().manual_seed(3))
    assert sorted(order) == list(range(count))
    for place, index in enumerate(order):  # batch i is always in lane i
        assert index % lanes == place % lanes
    again = torch.Generator().manual_seed(3)
    if lanes == 1:
        assert order == torch.randperm(count, generator=again).tolist()


def test_what_was_alone_stays_alone() -> None:
    values = torch.randn(3)
    assert ALONE.gather(values)[0] is values
    assert ALONE.any([True, False]) == [True, False]
    assert ALONE.broadcast_bytes(b"x") == b"x"
    assert all(ALONE.owns(index) for index in range(5))
    assert [Ranks(1, 3).owns(index) for index in range(6)] == [False, True, False] * 2


def test_one_batch_at_a_time_is_what_it_was(small: Model, tmp_path: Path) -> None:
    for lanes in (0, 1):
        run(small, tmp_path / f"{lanes}.npz", parallel_batches=lanes)
    assert (tmp_path / "0.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()


def test_batches_that_advance_together_see_each_other_as_they_were(
    small: Model, tmp_path: Path
) -> None:
    """With statistics of its own a batch does not mind the others; with those of all it does."""
    still = {"flip": False, "padding": 0, "output_weight": 0.0}
    for scope, alike in ((1, True), (0, False)):
        alone, together = (
            run(small, tmp_path / f"{n}.npz", parallel_batches=n, scope=scope, **still)
            for n in (1, 5)
        )
        difference = np.abs(alone.images.load() - together.images.load())
        assert (difference.max() == 0) == alike
        assert difference.mean() < 0.2 * alone.images.load().std()


@pytest.mark.parametrize("method", ["intraq", "genie"])
def test_methods_that_compare_batches_take_one_at_a_time(
    small: Model, tmp_path: Path, method: str
) -> None:
    with pytest.raises(SettingsError):
        run(small, tmp_path / "x.npz", method=method, parallel_batches=2)
    assert list(tmp_path.iterdir()) == [small.source]


def test_batches_are_shared_out_evenly(small: Model, tmp_path: Path) -> None:
    settings = GenerateSettings(parallel_batches=3)
    with pytest.raises(SettingsError, match="evenly among 2 processes"):
        generate(small, settings, tmp_path / "x.npz", ranks=Ranks(0, 2))


class Processes:
    """Two processes as torchrun starts them, but with nobody who ends one when the other dies."""

    def __init__(self, *words: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self.all = [
            subprocess.Popen(
                [sys.executable, "-m", "pipeline.cli", *map(str, words), "--threads", "1"],
                cwd=ROOT,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for rank in range(2)
        ]

    def wait(self) -> list[tuple[int, str, str]]:
        found = []
        for process in self.all:
            out, err = process.communicate(timeout=300)
            found.append((process.returncode, out, err))
        return found

    def kill(self) -> None:
        for process in self.all:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


@pytest.fixture
def started() -> Iterator[list[Processes]]:
    found: list[Processes] = []
    yield found
    for processes in found:
        processes.kill()


SETTINGS = {"num_images": 18, "batch_size": 4, "start": "noise", "parallel_batches": 2}


def words(model: Path, path: Path, *more: object) -> list[object]:
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in SETTINGS.items()]
    given = ["--mean", 0.5, "--std", 0.5, *(word for flag in flags for word in flag)]
    return ["generate", model, "-o", path, *given, *more]


def here(model: Path, path: Path, iterations: int, *, resume: bool = False) -> Generated:
    """What the command line does, in this process."""
    return generate(
        load(model),
        GenerateSettings(**SETTINGS, iterations=iterations),  # type: ignore[arg-type]
        path,
        preprocessing=preprocessing_of(
            load(model), InputSettings(mean=("0.5",), std=("0.5",))
        ),
        checkpoints=CheckpointSettings(resume=resume),
    )


def test_two_processes_give_the_images_and_statistics_of_one(
    digits_models: Path, tmp_path: Path, started: list[Processes]
) -> None:
    model = digits_models / "digits_resnet.onnx"
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    started.append(Processes(*words(model, two, "--iterations", 12, "--json")))
    alone = here(model, one, 12)
    (code, out, err), (other_code, *said) = started[0].wait()
    assert (code, other_code) == (0, 0), err
    assert said == ["", ""]  # only the first one speaks
    assert one.read_bytes() == two.read_bytes()
    found = json.loads(out)
    for name in ("statistics", "history"):
        for row, wanted in zip(found[name], getattr(alone, name), strict=True):
            numbers = {k: v for k, v in asdict(wanted).items() if isinstance(v, float)}
            assert {k: row[k] for k in numbers} == pytest.approx(numbers, rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.npz", "two.npz"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_ends_the_run_with_one_error_and_a_checkpoint(
    digits_models: Path, tmp_path: Path, started: list[Processes], lost: int
) -> None:
    model, path = digits_models / "digits_resnet.onnx", tmp_path / "images.npz"
    long = ["--iterations", 100000, "--checkpoint-every", 2, "--quiet"]
    started.append(Processes(*words(model, path, *long)))
    deadline = time.monotonic() + 200
    while not list(checkpoint_folder(path).glob("stage*-000000004000")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(started[0].all[lost].pid, signal.SIGKILL)
    code, _, err = started[0].wait()[1 - lost]
    assert code == 2
    assert err.startswith("zsq: torchrun: one of the 2 processes ended before its time")
    assert err.count("\n") == 1
    if lost == 1:
        assert "the last good checkpoint is kept" in err
    left = tmp_path / ".images.npz.process1"
    assert left.is_dir() == (lost == 1)  # what was killed cleans up nothing
    with ALONE.own_path(path):
        assert not left.exists()
    kept = sorted(checkpoint_folder(path).glob("stage*"))
    assert len(kept) in (2, 3)
    assert not path.exists()


def test_what_two_processes_kept_one_goes_on_from(
    digits_models: Path, tmp_path: Path, started: list[Processes]
) -> None:
    model = digits_models / "digits_resnet.onnx"
    whole, path = tmp_path / "a.npz", tmp_path / "b.npz"
    more = ["--iterations", 80, "--checkpoint-every", 2, "--quiet"]
    started.append(Processes(*words(model, path, *more)))
    deadline = time.monotonic() + 200
    while not list(checkpoint_folder(path).glob("stage*-000000004000")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(started[0].all[1].pid, signal.SIGINT)  # one process tells the other
    (code, _, err), (other, *said) = started[0].wait()
    assert (code, other) == (130, 130), err
    assert re.fullmatch(
        r"zsq: interrupted: stopped after iteration .*; --resume goes on there\n", err
    )
    assert said == ["", ""]
    result = here(model, path, 80, resume=True)
    assert "went on from the checkpoint" in result.notes[-1]
    here(model, whole, 80)
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]
