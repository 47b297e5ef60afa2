"""An interrupted run that goes on gives the bytes of one that was never interrupted."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graph_tools.errors import DataError, SettingsError
from graph_tools.model import Model
from pipeline.generate import Generated, generate
from pipeline.generate.checkpoints import checkpoint_folder, open_checkpoints
from pipeline.generate.snapshot import (
    DamagedSnapshotError,
    State,
    read_snapshot,
    write_snapshot,
)
from pipeline.preprocessing import Preprocessing
from pipeline.run import quantizer_of
from pipeline.settings import CheckpointSettings, GenerateSettings, QuantizeSettings

HALF = Preprocessing(mean=(0.5,), std=(0.5,))
pytestmark = pytest.mark.usefixtures("unmeasured")

NEAREST = QuantizeSettings(weights=4, activations=4)


class Killed(BaseException):
    """In place of a signal that nothing survives."""


class Run:
    """Makes images of one network by one method, three batches of them."""

    def __init__(self, model: Model, folder: Path, **options: Any) -> None:
        self.model, self.path = model, folder / "images.npz"
        small = {"num_images": 10, "batch_size": 4, "iterations": 6, "start": "noise"}
        self.settings = GenerateSettings(**{**small, **options})
        self.steps: list[int] = []

    def __call__(self, every: int = 0, *, resume: bool = False, until: int = 0) -> Generated:
        """Run to the end, or be killed in step ``until``."""
        self.steps = []

        def on_step(done: int, total: int, terms: object) -> None:
            self.steps.append(done)
            if done == until:
                raise Killed

        return generate(
            self.model,
            self.settings,
            self.path,
            preprocessing=HALF,
            quantizer=quantizer_of(self.model, NEAREST),
            on_step=on_step,
            checkpoints=CheckpointSettings(checkpoint_every=every, resume=resume),
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def snapshots(self) -> list[Path]:
        return sorted(checkpoint_folder(self.path).glob("stage*"))

    def killed(self, until: int, every: int = 1, *, resume: bool = False) -> None:
        self.path.unlink(missing_ok=True)
        with pytest.raises(Killed):
            self(every, resume=resume, until=until)
        assert not self.path.exists()


METHODS = [
    {"method": "dgh", "start": "natural"},
    {"method": "dgh", "scope": 1, "slack": 0.9, "crop_scale": 0.5},
    {"method": "zeroq"},
    {"method": "dsg"},
    {"method": "intraq"},
    {"method": "prior"},
    {"method": "genie"},
    {"method": "sadag", "iterations": 4},
    {"method": "sadag", "sadag_form": "pixels", "iterations": 4},
    {"method": "dgh", "oversample": 1.5},
]


@pytest.mark.parametrize(
    "options", METHODS, ids=lambda options: "-".join(map(str, options.values()))
)
def test_going_on_gives_the_same_bytes(
    small: Model, tmp_path: Path, options: dict[str, Any]
) -> None:
    run = Run(small, tmp_path, **options)
    whole = run()
    expected, last = run.digest, run.steps[-1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images.npz", "small.onnx"]
    run.killed(until=last * 2 // 5)
    assert run.snapshots
    run.killed(until=last - 2, resume=True)
    again = run(1, resume=True)
    assert run.digest == expected
    assert again.history == whole.history
    assert again.statistics == whole.statistics
    assert "went on from the checkpoint at" in again.notes[-1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images.npz", "small.onnx"]


def test_only_what_was_lost_is_done_again(small: Model, tmp_path: Path) -> None:
    run = Run(small, tmp_path, method="dgh")
    run.killed(until=11)  # the fourth iteration's second batch
    assert [path.name[-6:] for path in run.snapshots] == ["002000", "003000"]
    run(1, resume=True)
    assert run.steps == list(range(10, 19))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    small: Model, tmp_path: Path
) -> None:
    run = Run(small, tmp_path, method="dgh")
    run()
    expected = run.digest
    run.killed(until=11)
    kept = tmp_path / "kept"
    shutil.copytree(checkpoint_folder(run.path), kept)
    for damaged, first in ((1, 7), (2, 1)):  # the newest one; both
        shutil.rmtree(checkpoint_folder(run.path), ignore_errors=True)
        shutil.copytree(kept, checkpoint_folder(run.path))
        for snapshot in run.snapshots[-damaged:]:
            file = snapshot / "batch000001.safetensors"
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.write_bytes(data)
        result = run(1, resume=True)
        assert run.steps[0] == first
        assert sum("is damaged" in warning for warning in result.warnings) == damaged
        assert run.digest == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "setting seed was 0, now it is 1"),
        ({"iterations": 7}, "setting iterations was 6, now it is 7"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    small: Model, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    run = Run(small, tmp_path, method="dgh")
    run.killed(until=8)
    run.settings = replace(run.settings, **change)
    with pytest.raises(SettingsError, match=said) as error:
        run(1, resume=True)
    assert "without --resume" in error.value.hint
    assert run.snapshots  # still there for who gives the settings of then
    run(1)


def test_a_checkpoint_of_other_weights_is_refused(small: Model, tmp_path: Path) -> None:
    run = Run(small, tmp_path, method="dgh")
    run.killed(until=8)
    other = type(small.proto)()
    other.CopyFrom(small.proto)
    tensor = next(t for t in other.graph.initializer if t.name == "b3")
    tensor.raw_data = bytes(reversed(tensor.raw_data))
    run.model = replace(small, proto=other)
    with pytest.raises(SettingsError, match="model weights was"):
        run(1, resume=True)


def test_without_resume_all_is_made_anew(small: Model, tmp_path: Path) -> None:
    run = Run(small, tmp_path, method="dgh")
    run.killed(until=11)
    old = run.snapshots
    run.killed(until=5)
    assert run.steps[0] == 1
    assert not set(old) & set(run.snapshots)
    result = run(1, resume=True)
    assert run.steps[0] == 4
    assert "iteration 1" in result.notes[-1]


def test_going_on_without_a_checkpoint_starts_anew(small: Model, tmp_path: Path) -> None:
    run = Run(small, tmp_path, method="dgh")
    result = run(resume=True)
    assert run.steps[0] == 1
    assert "no checkpoint to go on from" in result.notes[-1]


def test_short_runs_write_no_checkpoint(small: Model, tmp_path: Path) -> None:
    run = Run(small, tmp_path, method="dgh")
    run.killed(until=17, every=0)
    assert list(tmp_path.iterdir()) == [small.source]


def test_what_a_killed_process_left_is_removed(small: Model, tmp_path: Path) -> None:
    run = Run(small, tmp_path, method="dgh")
    run.killed(until=11)
    folder = checkpoint_folder(run.path)
    (folder / "work").mkdir()
    (folder / "work" / "000000").write_bytes(b"canvas")
    (folder / ".stage000001-000000000400.tmp").mkdir()
    (tmp_path / ".images.npz.4711.tmp").write_bytes(b"half")
    run(1, resume=True)
    assert sorted(tmp_path.iterdir()) == sorted([run.path, small.source or run.path])


def test_two_runs_do_not_share_a_file(small: Model, tmp_path: Path) -> None:
    run = Run(small, tmp_path, method="dgh")
    with (
        open_checkpoints(run.path, {}, CheckpointSettings()),
        pytest.raises(DataError, match="another run is writing this file"),
    ):
        run()
    run()


def test_a_snapshot_is_whole_or_absent(tmp_path: Path) -> None:
    values = {"a": torch.randn(5, dtype=torch.float64), "b": torch.arange(3)}
    facts = {"third": 1 / 3, "best": float("inf"), "rows": [{"x": 1e-300}]}
    folder = tmp_path / "one"
    assert write_snapshot(folder, State(facts=facts, parts=[("p", values), ("empty", {})]))
    found = read_snapshot(folder)
    assert found.facts == facts
    assert all(torch.equal(found.part("p")[name], values[name]) for name in values)
    assert found.part("empty") == {}

    bad = State(facts={}, parts=[("p", {"a": torch.tensor([1.0, float("nan")])})])
    assert not write_snapshot(tmp_path / "two", bad)

    def fail() -> Any:
        yield "p", values
        raise Killed

    with pytest.raises(Killed):
        write_snapshot(tmp_path / "three", State(facts={}, parts=fail()))
    assert list(tmp_path.iterdir()) == [folder]

    text = (folder / "state.json").read_text()
    for damage in (text[:-9], text.replace("0.333", "0.334"), "[]", ""):
        (folder / "state.json").write_text(damage)
        with pytest.raises(DamagedSnapshotError):
            read_snapshot(folder)
    (folder / "state.json").write_text(text)
    (folder / "p.safetensors").unlink()
    with pytest.raises(DamagedSnapshotError):
        read_snapshot(folder)
