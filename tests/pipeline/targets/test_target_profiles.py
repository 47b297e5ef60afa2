from __future__ import annotations

import re
from pathlib import Path

import pytest

from graph_tools.errors import SettingsError
from pipeline.target_profiles import load_profile, profile_names, read_profile
from pipeline.verify.causes import QUIRKS
from pipeline.verify.compilers.process import RUNNERS
from pipeline.verify.engines import runnable_targets


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_can_be_read_and_pins_its_compiler(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.title
    for requirement in profile.install.requirements[:1] if profile.install else ():
        assert re.fullmatch(r"[\w.\[\]-]+==[\w.+]+", requirement)


def test_what_runs_has_a_runner():
    scripts = {path.stem for path in RUNNERS.glob("*.py")} - {"__init__", "host"}
    assert scripts == set(runnable_targets()) - {"onnxruntime"}


def test_an_unknown_target_lists_those_there_are():
    with pytest.raises(SettingsError, match=r"no target 'nosuch'.*openvino"):
        load_profile("nosuch")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "cannot be read"),
        ("[verify]\n", "has no title"),
        ('title = "t"\ncolor = "red"\n', "unknown key 'color'"),
        ('title = "t"\n[verify]\nstep = 1\n', r"\[verify\]: unknown key 'step'"),
        ('title = "t"\n[verify]\nsteps = "one"\n', "steps is not what it should be"),
        ('title = "t"\n[install]\nrequirements = [1]\n', "requirements is not"),
        ('title = "t"\n[install]\nnote = "n"\n', "is incomplete"),
        ('title = "t"\ninstall = 3\n', "is no table"),
    ],
)
def test_a_faulty_profile_is_one_line(tmp_path: Path, text, message):
    path = tmp_path / "faulty.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        read_profile(path)
    assert "faulty.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quirks_are_known():
    named = {quirk for name in profile_names() for quirk in checks(name)}
    assert named == set(QUIRKS)


def checks(name: str) -> tuple[str, ...]:
    check = load_profile(name).verify
    return () if check is None else check.quirks
