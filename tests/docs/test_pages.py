"""The documentation says what is true: its code runs, its links and commands exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_tutorial_runs(digits_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(digits_models / "digits_resnet.onnx", "digits.onnx")
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.M | re.S
    )
    assert len(blocks) > 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "tutorial.md", "exec"), names)
    assert Path("digits.w8a8/report.html").is_file()
