"""Environments are made, found, left alone, made anew and removed; pip needs no network here."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from graph_tools.errors import TargetError
from pipeline.environments import find_environment, how_to_get, install_environment
from pipeline.target_profiles import Install, TargetProfile


def wheel(folder: Path, version: str) -> str:
    """A package of one module, as pip takes it."""
    path = folder / f"zsqfake-{version}-py3-none-any.whl"
    info = f"zsqfake-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("zsqfake.py", f"VERSION = {version!r}\n")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: zsqfake\nVersion: {version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return f"zsqfake @ {path.as_uri()}"


def profile(*requirements: str, **install) -> TargetProfile:
    given = Install(requirements=requirements, no_deps=True, **install)
    return TargetProfile(name="fake", title="a fake", install=given)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ZSQ_TARGETS", str(tmp_path / "targets"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "targets"


def test_an_environment_is_made_once_and_anew_when_asked(folder, tmp_path):
    first = profile(wheel(tmp_path, "1.5"))
    lines: list[str] = []
    assert find_environment(first) is None
    made = install_environment(first, on_line=lines.append)
    assert made.version == "1.5"
    assert made.folder == folder / "fake"
    assert any("zsqfake" in line for line in lines)
    assert find_environment(first) == made
    (made.folder / "witness").touch()
    assert install_environment(first) == made
    assert (made.folder / "witness").exists()  # left as it was

    second = profile(wheel(tmp_path, "1.6"))
    found = find_environment(second)
    assert found is not None
    assert found.outdated
    assert install_environment(second).version == "1.6"
    assert not (made.folder / "witness").exists()
    (made.folder / "witness").touch()
    install_environment(second, force=True)
    assert not (made.folder / "witness").exists()


def test_a_failure_leaves_nothing_behind(folder, tmp_path):
    missing = (tmp_path / "zsqfake-9-py3-none-any.whl").as_uri()
    with pytest.raises(TargetError, match="fake: cannot be installed: ") as caught:
        install_environment(profile(f"zsqfake @ {missing}"))
    assert "\n" not in str(caught.value)
    assert not (folder / "fake").exists()


def test_an_interruption_leaves_nothing_behind(folder, tmp_path):
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install_environment(profile(wheel(tmp_path, "1.5")), on_line=stop)
    assert not (folder / "fake").exists()


def test_half_an_environment_is_none(folder):
    half = folder / "fake" / "bin"
    half.mkdir(parents=True)
    (half / "python").touch()
    assert find_environment(profile("zsqfake==1")) is None
    (folder / "fake" / "installed.json").write_text(json.dumps(["garbage"]))
    assert find_environment(profile("zsqfake==1")) is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (TargetProfile(name="fake", title="t"), "nothing to install"),
        (profile("zsqfake==1", needs=("no-such-command",)), "needs no-such-command"),
        (profile("zsqfake==1", python="<3.0"), r"needs Python <3.0, this is 3\."),
        (profile("zsqfake==1", python="three"), "no range of Python versions"),
    ],
)
def test_what_cannot_be_installed_says_why(folder, target, message):
    with pytest.raises(TargetError, match=message):
        install_environment(target)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZSQ_TARGETS", str(tmp_path / "file"))
    with pytest.raises(
        TargetError, match=r"cannot be installed.*ZSQ_TARGETS|nothing was left"
    ):
        install_environment(profile("zsqfake==1"))


def test_how_to_get_names_the_command_and_what_else_it_takes():
    text = how_to_get(profile("zsqfake==1", python=">=3.9", needs=("java",), note="2 GB"))
    assert text == "`zsq targets install fake`, needs Python >=3.9, needs java, 2 GB"
