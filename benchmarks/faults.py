"""Inject faults into ``zsq generate`` and see what is lost.

A run is killed, interrupted, starved of disk or memory, or fed with values that are not finite, at
random points; then the same command goes on with ``--resume``. Nothing is lost if the images are,
byte by byte, those of a run that nothing disturbed::

    python benchmarks/faults.py                     # about ten minutes on two busy cores
    python benchmarks/faults.py --times 100 --only kill

Prints a table and writes benchmarks/results/faults.json. A full disk is a small tmpfs where one can
be mounted (as root on Linux), else a limit on the size of files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "faults.json"
ZSQ = (sys.executable, "-m", "pipeline.cli")

# Runs zsq with a network whose outputs are not finite from the given call on.
NOT_FINITE = """
import sys
from pipeline.generate.network import Network
run, left = Network.run, [int(sys.argv.pop(1))]
def poisoned(network, *args, **kwargs):
    values = run(network, *args, **kwargs)
    left[0] -= 1
    name = next(iter(values))
    return {**values, name: values[name] * float("nan")} if left[0] < 0 else values
Network.run = poisoned
from pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Row:
    """What became of one kind of fault.

    Args:
        fault: in words.
        times: how often it was injected.
        as_promised: how often exit code and message were those that are promised.
        resumed: how often a run that had a checkpoint went on from it.
        same_bytes: how often the images in the end were those of the undisturbed run.
        said: what the command said, once.
        notes: what else is to be known.
    """

    fault: str
    times: int = 0
    as_promised: int = 0
    resumed: int = 0
    same_bytes: int = 0
    said: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Ended:
    code: int
    said: str


class Bench:
    """One command, its undisturbed result, and how long that takes."""

    def __init__(self, model: Path, folder: Path, options: argparse.Namespace) -> None:
        self.model, self.folder, self.random = model, folder, random.Random(options.seed)
        self.options = options
        start = time.monotonic()
        ended = self.run(self.folder / "whole.npz")
        self.seconds = time.monotonic() - start
        if ended.code:
            raise SystemExit(ended.said)
        self.expected = digest(self.folder / "whole.npz")

    def words(self, path: Path, every: int, *more: object) -> list[str]:
        options = self.options
        words = ["generate", self.model, "-o", path, "--threads", 1]
        words += ["--num-images", options.num_images, "--batch-size", options.batch_size]
        words += ["--iterations", options.iterations, "--checkpoint-every", every, *more]
        return [str(word) for word in words]

    def start(
        self,
        path: Path,
        *more: object,
        every: int = 5,
        command: tuple[str, ...] = ZSQ,
        quiet: bool = True,
        limit: Callable[[], None] | None = None,
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, *self.words(path, every, *more), *["--quiet"] * quiet],
            cwd=ROOT,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=limit,
        )

    def run(self, path: Path, *more: object, **how: Any) -> Ended:
        with self.start(path, *more, **how) as process:
            _, said = process.communicate()
        return Ended(process.returncode, said.strip())

    def go_on(self, path: Path, row: Row, *more: object) -> None:
        """Go on to the end and compare."""
        row.resumed += bool(snapshots(path))
        ended = self.run(path, "--resume", *more)
        if ended.code == 0 and digest(path) == self.expected:
            row.same_bytes += 1
        elif ended.code:
            row.notes.append(ended.said)

    def new(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder)) / "images.npz"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshots(path: Path) -> list[Path]:
    return sorted(path.with_name(f".{path.name}.checkpoint").glob("stage*-*"))


def by_signal(bench: Bench, number: signal.Signals, times: int) -> Row:
    """Send a signal to the process group at a random moment; then go on."""
    row = Row(f"{number.name} at a random moment")
    finished = 0
    for turn in range(times):
        path, every = bench.new(), (1, 5)[turn % 2]
        with bench.start(path, every=every) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(bench.random.uniform(0, 1.1 * bench.seconds))
            alive = process.poll() is None
            if alive:
                os.killpg(process.pid, number)
            said = (process.communicate()[1] or "").strip()
        if not alive:
            finished += 1
            continue
        row.times += 1
        promised = -number if number == signal.SIGKILL else 130
        one_line = number == signal.SIGKILL or said.count("\n") == 0
        whole = not path.exists() or digest(path) == bench.expected
        early = (
            process.returncode == -number and not said
        )  # before the command knew of signals
        ended = process.returncode in (promised, 0) and one_line and whole
        row.as_promised += ended or early
        if early and number != signal.SIGKILL:
            row.notes.append(
                "one came while the interpreter started: ended by it, nothing begun"
            )
        elif not ended:
            row.notes.append(f"exit {process.returncode}: {said}")
        if "--resume" in said:
            row.said = said
        bench.go_on(path, row)
    if finished:
        row.notes.append(f"{finished} more runs were over before the signal")
    return row


def damaged(bench: Bench, times: int) -> Row:
    """Kill a run, change one byte of its newest checkpoint, go on."""
    row = Row("one byte of the newest checkpoint changed")
    while row.times < times:
        path = bench.new()
        with bench.start(path, every=1) as process:
            while process.poll() is None and len(snapshots(path)) < 2:
                time.sleep(0.01)
            time.sleep(bench.random.uniform(0, 0.5))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        found = snapshots(path)
        if path.exists() or len(found) < 2:
            continue
        row.times += 1
        victim = bench.random.choice(sorted(found[-1].iterdir()))
        data = bytearray(victim.read_bytes())
        data[bench.random.randrange(len(data))] ^= 1 << bench.random.randrange(8)
        victim.write_bytes(data)
        with bench.start(path, "--resume", quiet=False) as process:
            said = process.communicate()[1]
        row.resumed += 1
        row.as_promised += process.returncode == 0
        row.same_bytes += path.exists() and digest(path) == bench.expected
        told = [line for line in said.splitlines() if "is damaged" in line]
        row.said = told[-1] if told else row.said
    return row


@contextlib.contextmanager
def small_disk(folder: Path, size: int, *, readonly: bool = False) -> Iterator[Path | None]:
    """Mount a small tmpfs; None where that is not allowed."""
    place = folder / "disk"
    place.mkdir(exist_ok=True)
    options = f"size={size}" + (",ro" if readonly else "")
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    can = (
        shutil.which("mount")
        and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    )
    try:
        yield place if can else None
    finally:
        if can:
            subprocess.run(["umount", str(place)], check=True)


def disk_full(bench: Bench, times: int) -> Row:
    """Give less and less room; then go on with enough of it."""
    row = Row("disk full (ENOSPC)")
    with small_disk(bench.folder, 2**30) as disk:
        real = disk is not None
    for turn in range(times):
        path = bench.new()
        if real:
            room = 2**12 * bench.random.randrange(10, 90)
            with small_disk(bench.folder, room) as disk:
                assert disk is not None
                ended = bench.run(disk / path.name, every=1 + turn % 3)
                left = disk / f".{path.name}.checkpoint"
                whole = (disk / path.name).exists()
                if left.is_dir():
                    shutil.copytree(left, path.with_name(left.name))
        else:
            row.fault = "disk full (file size limit)"
            room = bench.random.randrange(2**12, 2**17)
            limits = (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            ended = bench.run(
                path,
                every=1 + turn % 3,
                limit=lambda limits=limits: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
            )
            whole = path.exists()
        if ended.code == 0 and whole:
            row.notes.append(f"{room} bytes were enough")
            continue
        row.times += 1
        row.as_promised += ended.code == 2 and ended.said.count("\n") == 0 and not whole
        if ended.code != 2:
            row.notes.append(f"exit {ended.code} with {room} bytes: {ended.said}")
        row.said = ended.said if "is kept" in ended.said or not row.said else row.said
        bench.go_on(path, row)
    return row


def read_only(bench: Bench, times: int) -> Row:
    """Write to a folder that cannot be written."""
    row = Row("read-only folder")
    for _ in range(times):
        with small_disk(bench.folder, 2**20, readonly=True) as disk:
            folder = disk or bench.new().parent
            folder.chmod(0o500) if disk is None else None
            start = time.monotonic()
            ended = bench.run(folder / "images.npz")
            quick = time.monotonic() - start < bench.seconds
            folder.chmod(0o700) if disk is None else None
        row.times += 1
        row.as_promised += ended.code == 2 and ended.said.count("\n") == 0 and quick
        row.said = ended.said
        path = bench.new()
        bench.go_on(path, row)
    return row


def out_of_memory(bench: Bench, times: int) -> Row:
    """Ask for a batch larger than the address space allows."""
    row = Row("out of memory (address space limited)")
    limit = 2**20 * bench.options.address_space
    for turn in range(times):
        path, large = bench.new(), bench.options.large_batch * 2**turn
        one = ["--num-images", large, "--iterations", 1, "--start", "noise"]
        more = [*one, "--batch-size", large]
        ended = bench.run(
            path,
            *more,
            quiet=False,
            limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        row.times += 1
        row.as_promised += ended.code == 0
        told = [line for line in ended.said.splitlines() if "memory ran out" in line]
        row.said = told[-1] if told else row.said
        if ended.code:
            row.notes.append(ended.said)
            continue
        if not told:
            row.notes.append(f"a batch of {large} fits")
            continue
        same = bench.new()
        bench.run(same, *one, "--batch-size", told[-1].split()[-1])
        row.same_bytes += digest(same) == digest(path)
    row.notes.append("bytes compared with a run whose batches have that size from the start")
    return row


def not_finite(bench: Bench, times: int) -> Row:
    """Make a tensor of the network NaN from some step on; then go on without that."""
    row = Row("NaN in the network")
    steps = bench.options.iterations * -(-bench.options.num_images // bench.options.batch_size)
    for _ in range(times):
        path, call = bench.new(), bench.random.randrange(steps // 4, steps)
        command = (sys.executable, "-c", NOT_FINITE, str(call))
        ended = bench.run(path, every=1, command=command)
        row.times += 1
        row.as_promised += (
            ended.code == 2
            and ended.said.count("\n") == 0
            and "node '" in ended.said
            and str(snapshots(path)[-1]) in ended.said
        )
        row.said = ended.said
        bench.go_on(path, row)
    return row


FAULTS: dict[str, Callable[[Bench, int], Row]] = {
    "kill": lambda bench, times: by_signal(bench, signal.SIGKILL, times),
    "int": lambda bench, times: by_signal(bench, signal.SIGINT, times),
    "term": lambda bench, times: by_signal(bench, signal.SIGTERM, times),
    "damage": damaged,
    "full": disk_full,
    "readonly": lambda bench, times: read_only(bench, min(times, 3)),
    "memory": lambda bench, times: out_of_memory(bench, min(times, 3)),
    "nan": not_finite,
}


def print_table(rows: list[Row]) -> None:
    print(
        "\n| fault | injected | ended as promised | went on from a checkpoint | same bytes |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        cells = row.fault, row.times, row.as_promised, row.resumed, row.same_bytes
        print("| " + " | ".join(map(str, cells)) + " |")
    for row in rows:
        for text in filter(None, [row.said, *row.notes]):
            print(f"{row.fault}: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "digits_resnet.onnx")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--large-batch", type=int, default=32768)
    parser.add_argument("--address-space", type=int, default=2048, help="MiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.model.resolve(), Path(folder), options)
        print(f"{options.model.name}: {bench.seconds:.1f} s undisturbed", flush=True)
        for name in options.only:
            rows.append(FAULTS[name](bench, options.times))
            print(rows[-1], flush=True)
    if options.json.exists():  # faults that were not injected now keep their rows
        known = [Row(**row) for row in json.loads(options.json.read_text())["rows"]]
        new = {row.fault: row for row in rows}
        rows = [new.pop(row.fault, row) for row in known] + list(new.values())
    print_table(rows)
    facts = {
        "model": options.model.name,
        "seconds": round(bench.seconds, 1),
        "settings": {
            name: getattr(options, name)
            for name in ("num_images", "batch_size", "iterations", "times", "seed")
        },
        "rows": [asdict(row) for row in rows],
    }
    options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if any(row.as_promised < row.times for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
