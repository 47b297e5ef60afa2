"""Compilers in virtual environments of their own, so that none touches the user's.

An environment is a folder named like its target, below ``~/.cache/onnx-zsq/targets`` or below
``$ZSQ_TARGETS``. It counts as installed once it holds ``installed.json``, which is written last:
what an interrupted installation leaves behind is removed by the next.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graph_tools.errors import TargetError
from pipeline.target_profiles import Install, TargetProfile

__all__ = [
    "Environment",
    "environments_folder",
    "find_environment",
    "how_to_get",
    "install_environment",
    "missing_commands",
]

_MARK = "installed.json"
OnLine = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An installed compiler.

    Attributes:
        folder: the virtual environment.
        version: of the compiler.
        outdated: it was installed from other requirements than the profile has now.
    """

    folder: Path
    version: str
    outdated: bool = False

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return _python_of(self.folder)


def environments_folder() -> Path:
    """Return the folder of all environments; it need not exist."""
    given = os.environ.get("ZSQ_TARGETS")
    return Path(given) if given else Path.home() / ".cache" / "onnx-zsq" / "targets"


def find_environment(profile: TargetProfile) -> Environment | None:
    """Return a target's environment, None if it is not installed or needs none."""
    folder = environments_folder() / profile.name
    if profile.install is None or not _python_of(folder).exists():
        return None
    try:
        mark = json.loads((folder / _MARK).read_text())
        outdated = mark["requirements"] != list(profile.install.requirements)
        return Environment(folder=folder, version=str(mark["version"]), outdated=outdated)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def how_to_get(profile: TargetProfile) -> str:
    """Say how a target that is not installed is installed."""
    install = profile.install
    if install is None:
        return "nothing to install"
    words = [f"`zsq targets install {profile.name}`"]
    words += [f"needs Python {install.python}"] if install.python else []
    words += [f"needs {command}" for command in install.needs]
    return ", ".join([*words, install.note] if install.note else words)


def missing_commands(install: Install) -> tuple[str, ...]:
    """Return the commands that the compiler needs and the path lacks."""
    return tuple(command for command in install.needs if shutil.which(command) is None)


def install_environment(
    profile: TargetProfile, *, force: bool = False, on_line: OnLine | None = None
) -> Environment:
    """Make a target's environment; one that is there already is left as it is.

    Args:
        profile: the target.
        force: make it anew.
        on_line: called with each line that pip prints.

    Raises:
        TargetError: nothing to install, no Python that fits, a command that is missing, or pip
            failed; what was made by then is removed.
    """
    install = profile.install
    if install is None:
        raise TargetError("has nothing to install", where=profile.name)
    found = find_environment(profile)
    if found is not None and not found.outdated and not force:
        return found
    if missing := missing_commands(install):
        raise TargetError(
            f"needs {', '.join(missing)}, which is not on the path",
            where=profile.name,
            hint="install it first",
        )
    python = _find_python(install, profile.name)
    folder = environments_folder() / profile.name
    shutil.rmtree(folder, ignore_errors=True)
    done = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _run([python, "-m", "venv", str(folder)], profile.name, on_line)
        with tempfile.TemporaryDirectory(prefix="zsq-") as work:
            wanted = Path(work) / "requirements.txt"
            wanted.write_text("\n".join(install.requirements) + "\n")
            pip = [str(_python_of(folder)), "-m", "pip", "install", "--no-input"]
            options = ["--disable-pip-version-check", "--progress-bar", "off"]
            options += ["--no-deps"] if install.no_deps else []
            _run([*pip, *options, "-r", str(wanted)], profile.name, on_line)
        version = _version(folder, install, profile.name)
        mark = {"version": version, "requirements": list(install.requirements)}
        (folder / _MARK).write_text(json.dumps(mark, indent=1) + "\n")
        done = True
    except OSError as error:
        raise TargetError(
            f"cannot be installed: {error.strerror or error}",
            where=str(folder),
            hint="set ZSQ_TARGETS to a writable folder",
        ) from error
    finally:
        if not done:
            shutil.rmtree(folder, ignore_errors=True)
    return Environment(folder=folder, version=version)


def _python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _run(command: Sequence[str], name: str, on_line: OnLine | None) -> None:
    """Run a command, line by line; its last errors become the message."""
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.strip())
                if on_line is not None:
                    on_line(line.strip())
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        errors = [line for line in lines if line.lower().startswith("error")]
        said = " ".join((errors or lines)[-3:])[:400] or f"exit code {process.returncode}"
        raise TargetError(
            f"cannot be installed: {said}",
            where=name,
            hint="nothing was left behind; check the network and the room on the disk",
        )


def _version(folder: Path, install: Install, name: str) -> str:
    package = re.split(r"[\[\s<>=!~@;]", install.requirements[0])[0]
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    found = subprocess.run(
        [str(_python_of(folder)), "-I", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise TargetError(f"pip did not install {package}", where=name)
    return found.stdout.strip()


def _find_python(install: Install, name: str) -> str:
    """This Python, or another one on the path, that the compiler has wheels for."""
    if _allows(install.python, sys.version_info[:2]):
        return sys.executable
    for minor in range(20, 7, -1):
        found = (
            shutil.which(f"python3.{minor}") if _allows(install.python, (3, minor)) else None
        )
        if found and _works(found, minor):
            return found
    raise TargetError(
        f"needs Python {install.python}, this is {sys.version_info[0]}.{sys.version_info[1]}",
        where=name,
        hint="put such a Python on the path",
    )


def _works(python: str, minor: int) -> bool:
    code = f"import sys, venv; sys.exit(sys.version_info[:2] != (3, {minor}))"
    return (
        subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    )


def _allows(rule: str, version: tuple[int, int]) -> bool:
    """Whether ``>=3.9,<3.13`` allows a version."""
    for part in filter(None, (part.strip() for part in rule.split(","))):
        found = re.fullmatch(r"(>=|<=|<|>|==)\s*(\d+)\.(\d+)", part)
        if found is None:
            raise TargetError(f"'{rule}' is no range of Python versions")
        bound = int(found[2]), int(found[3])
        allowed = {
            ">=": version >= bound,
            "<=": version <= bound,
            "<": version < bound,
            ">": version > bound,
            "==": version == bound,
        }
        if not allowed[found[1]]:
            return False
    return True
