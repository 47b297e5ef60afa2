"""The documentation says what is true: its code runs, its links, commands and flags exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import typing
from pathlib import Path

import pytest

from docs import hooks
from pipeline.cli import _COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def test_the_tutorial_runs(digits_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(digits_models / "digits_resnet.onnx", "digits.onnx")
    text = (DOCS / "tutorial.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "tutorial.md", "exec"), names)
    assert Path("digits.w8a8/report.html").is_file()


def test_every_page_is_in_the_navigation():
    named = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", hooks.on_page_markdown(page.read_text())):
        assert target.startswith("http") or (DOCS / target).is_file(), target
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (DOCS / target).exists(), target


def flags(kind: type) -> set[str]:
    hints = typing.get_type_hints(kind)
    found = set()
    for field in dataclasses.fields(kind):
        flag = field.name.replace("_", "-")
        found |= {f"--{flag}", f"--no-{flag}"}
        if dataclasses.is_dataclass(hints[field.name]):
            found |= flags(hints[field.name])
    return found


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_commands_and_flags_exist(page):
    text = page.read_text()
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(
        r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    others = {"--extra-index-url", "--help", "--targets", "--data", "--find-links"}
    known = set().union(*map(flags, _COMMANDS.values())) | others
    lines = [line for block in code for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        for command, rest in re.findall(r"\bzsq ([a-z]+)\b([^#]*)", line):
            assert command in _COMMANDS, line
            own = flags(_COMMANDS[command]) | others
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", rest):
                assert flag in own, line
        if line.startswith("--"):
            assert line.split()[0].split("=")[0].rstrip(",/") in known, line


def test_the_interface_is_documented_from_the_source():
    page = hooks.on_page_markdown((DOCS / "api.md").read_text())
    for call in ("load", "generate_images", "quantize_model", "write_qdq", "verify_model"):
        assert f"### {call}\n" in page
    assert "| `num_images` | `0` | How many images to make" in page
    assert "{{" not in page
    assert "zsq quantize" in hooks.on_page_markdown((DOCS / "commands.md").read_text())


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_is_configured():
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), strict=True)
    assert config.theme.name == "material"
