"""What happens to a run in which something goes wrong: little is lost, and one line says what."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graph_tools.errors import DataError, GenerationError, ZsqError
from graph_tools.model import Model
from pipeline.generate import Generated, generate
from pipeline.generate.checkpoints import checkpoint_folder
from pipeline.generate.network import Network
from pipeline.preprocessing import Preprocessing
from pipeline.settings import CheckpointSettings, GenerateSettings
from pipeline.stopping import Interrupted, deferred_stop, terminable

HALF = Preprocessing(mean=(0.5,), std=(0.5,))
ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("unmeasured")


def run(
    model: Model,
    path: Path,
    *,
    every: int = 1,
    resume: bool = False,
    on_step: Callable[[int], object] = lambda done: None,
    **options: Any,
) -> Generated:
    small = {"num_images": 10, "batch_size": 4, "iterations": 6, "start": "noise"}
    return generate(
        model,
        GenerateSettings(**{**small, **options}),
        path,
        preprocessing=HALF,
        on_step=lambda done, total, terms: on_step(done),
        checkpoints=CheckpointSettings(checkpoint_every=every, resume=resume),
    )


def snapshots(path: Path) -> list[str]:
    return sorted(entry.name[-12:] for entry in checkpoint_folder(path).glob("stage*"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def at(step: int, action: Callable[[], object]) -> Callable[[int], object]:
    return lambda done: action() if done == step else None


@pytest.mark.parametrize("method", ["dgh", "genie"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_behind_the_step(
    small: Model, tmp_path: Path, method: str, sent: signal.Signals
) -> None:
    path = tmp_path / "images.npz"
    run(small, path, method=method)
    expected = digest(path)
    path.unlink()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="--resume goes on there"):
        run(
            small,
            path,
            method=method,
            every=0,  # none would be written yet
            on_step=at(8, lambda: os.kill(os.getpid(), sent)),
        )
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not path.exists()
    steps: list[int] = []
    run(small, path, method=method, every=0, resume=True, on_step=steps.append)
    assert steps[0] == 9 if method == "dgh" else steps
    assert digest(path) == expected


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, reached = [100.0], []

    def work() -> None:
        with deferred_stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
            now[0] += 0.1  # the same one, which the parent passed on
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("twice at once")
            now[0] += 1.0
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the second one")

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["twice at once"]


def test_a_signal_that_comes_twice_at_once_ends_the_command_once() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    reached = []

    def work() -> None:
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["cleaned up"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_request_that_nobody_meets_ends_the_block() -> None:
    reached = []

    def work() -> None:
        with deferred_stop():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached


class Poison:
    """Makes the network's outputs not finite from one call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.active, self.name, run = False, name, Network.run

        def poisoned(network: Network, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            values = run(network, *args, **kwargs)
            if self.active:
                values[self.name] = values[self.name] * float("nan")
            return values

        monkeypatch.setattr(Network, "run", poisoned)


@pytest.mark.parametrize(
    ("name", "said"),
    # n2: where the input of bn2 is seen once it is folded.
    [("n2", "node 'bn2': values that are not"), ("g", "tensor 'g': the loss")],
)
def test_a_loss_that_is_not_finite_names_the_layer_and_the_checkpoint(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    path, poison = tmp_path / "images.npz", Poison(monkeypatch, name)
    with pytest.raises(GenerationError, match=said) as error:
        run(small, path, on_step=at(8, lambda: setattr(poison, "active", True)))
    kept = checkpoint_folder(path) / "stage000001-000000002000"
    assert f"the last good checkpoint is kept: {kept}" in str(error.value)
    assert not path.exists()
    poison.active = False
    run(small, path, resume=True)


def test_canvases_that_are_not_finite_are_no_good_checkpoint(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "images.npz"
    # The last step of iteration 3 leads nowhere: its rate is infinite.
    options = {"num_images": 4, "learning_rate": 0.5}
    from pipeline.generate import loop

    move = loop._move

    def bad(batch: Any, optimizer: str, rate: float, steps_before: int) -> None:
        move(batch, optimizer, float("inf") if steps_before == 2 else rate, steps_before)

    monkeypatch.setattr(loop, "_move", bad)
    with pytest.raises(GenerationError, match="000000002000"):
        run(small, path, **options)
    assert snapshots(path) == ["000000001000", "000000002000"]


def out_of_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> None:
    run = Network.run

    def limited(network: Network, values: torch.Tensor, **kwargs: Any) -> Any:
        if len(values) > most:
            raise error
        return run(network, values, **kwargs)

    monkeypatch.setattr(Network, "run", limited)


CPU_FULL = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 256 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_FULL = RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")


ONEDNN_FULL = RuntimeError("could not create a primitive")


@pytest.mark.parametrize(
    "error",
    [CPU_FULL, CUDA_FULL, ONEDNN_FULL, MemoryError()],
    ids=["cpu", "cuda", "onednn", "python"],
)
def test_batches_that_do_not_fit_are_halved(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "images.npz"
    run(small, path, batch_size=2)
    wanted = digest(path)
    with monkeypatch.context() as patch:
        out_of_memory(patch, 2, error)
        result = run(small, path, batch_size=8)
    halved = [text for text in result.warnings if "memory ran out" in text]
    assert [text.split()[-1] for text in halved] == ["4", "2"]
    assert digest(path) == wanted


def test_a_run_with_halved_batches_goes_on(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "images.npz"
    run(small, path, batch_size=4)
    wanted = digest(path)
    out_of_memory(monkeypatch, 4, CPU_FULL)
    with pytest.raises(Interrupted):
        run(
            small,
            path,
            batch_size=8,
            on_step=at(8, lambda: os.kill(os.getpid(), signal.SIGINT)),
        )
    monkeypatch.undo()
    steps: list[int] = []
    run(small, path, batch_size=8, resume=True, on_step=steps.append)
    assert steps[0] == 9
    assert digest(path) == wanted


def test_memory_for_not_even_one_image(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory(monkeypatch, 0, CPU_FULL)
    with pytest.raises(ZsqError, match="not even a single image"):
        run(small, tmp_path / "images.npz")
    assert list(tmp_path.iterdir()) == [small.source]


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Lets no file grow beyond so many bytes: what a full disk is like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    small: Model, tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    path = tmp_path / "images.npz"
    run(small, path)
    wanted = digest(path)
    path.unlink()
    with pytest.raises(DataError, match="File too large") as error:
        run(small, path, on_step=at(8, lambda: file_limit(2000)))
    file_limit(resource.RLIM_INFINITY)
    assert "the last good checkpoint is kept" in str(error.value)
    assert snapshots(path) == ["000000001000", "000000002000"]
    assert not list(tmp_path.glob(".*.tmp"))
    run(small, path, resume=True)
    assert digest(path) == wanted


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    small: Model, tmp_path: Path
) -> None:
    steps: list[int] = []
    with pytest.raises(DataError, match="no folder can be made there"):
        run(small, tmp_path / "nowhere" / "images.npz", on_step=steps.append)
    assert not steps


def zsq(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *map(str, words)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_leaves_checkpoints_behind(
    digits_models: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    """As a user does it: the signal goes to the whole group, so that the command gets it twice."""
    model, path = digits_models / "digits_resnet.onnx", tmp_path / "images.npz"
    words = ["generate", model, "-o", path, "--num-images", 8, "--batch-size", 4]
    words += ["--iterations", 100000, "--checkpoint-every", 2, "--quiet"]
    with zsq(*words) as process:
        deadline = time.monotonic() + 200
        while not list(checkpoint_folder(path).glob("stage*-000000006000")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, sent)
        _, err = process.communicate(timeout=100)
    assert not path.exists()
    left = checkpoint_folder(path)
    kept = len(list(left.glob("stage*")))
    if sent == signal.SIGKILL:
        assert process.returncode == -sent
        assert kept in (2, 3)  # it may come between writing one and removing another
    else:
        assert process.returncode == 130, err
        assert err.startswith("zsq: interrupted: stopped after iteration ")
        assert err.endswith("; --resume goes on there\n")
        assert err.count("\n") == 1
        assert kept == 2
        assert not (left / "work").exists()
