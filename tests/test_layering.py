from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("generate", "quantize", "verify", "export", "evaluate", "report")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_graph_tools_never_imports_pipeline():
    for path in (ROOT / "graph_tools").rglob("*.py"):
        assert not [n for n in imported(path) if n.split(".")[0] == "pipeline"], path


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_one_floor_do_not_import_each_other(room):
    others = tuple(f"pipeline.{other}" for other in ROOMS if other != room)
    above = ("pipeline.run", "pipeline.cli", "pipeline.record")
    for path in (ROOT / "pipeline" / room).rglob("*.py"):
        assert not [n for n in imported(path) if n.startswith((*others, *above))], path


def test_only_the_command_line_prints():
    for package in ("graph_tools", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name == "cli.py":
                continue
            nodes = ast.walk(ast.parse(path.read_text()))
            calls = [node for node in nodes if isinstance(node, ast.Call)]
            assert not [c for c in calls if getattr(c.func, "id", "") == "print"], path
