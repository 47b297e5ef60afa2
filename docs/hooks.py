"""What mkdocs does with a page before it is rendered.

``{{ README: Limits }}`` becomes that section of the README, so that nothing stands twice;
``{{ calls }}`` and ``{{ settings NAME }}`` become the documentation of the Python interface,
read from the source. Links to files outside of ``docs`` become their names.
"""

from __future__ import annotations

import ast
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill a page in; called by mkdocs."""
    markdown = re.sub(r"\{\{ README: (.+?) \}\}", lambda found: section(found[1]), markdown)
    markdown = re.sub(r"\{\{ calls (\S+) \}\}", lambda found: calls(found[1]), markdown)
    markdown = re.sub(r"\{\{ settings (\w+) \}\}", lambda found: settings(found[1]), markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", r"\1 (`\2`)", markdown)


def section(title: str) -> str:
    """A section of the README, its links seen from ``docs``."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    body = dict(zip(parts[1::2], parts[2::2], strict=True))[title]
    return re.sub(r"\]\((?!http|#)", "](../", body).replace("](../docs/", "](").strip()


def calls(path: str) -> str:
    """The public functions of a module: signature and docstring."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    lines = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            head = f"{node.name}({ast.unparse(node.args)}){result}"
            head = textwrap.fill(head, 88, subsequent_indent="    ")
            doc = ast.get_docstring(node) or ""
            lines += [f"### {node.name}", "", "```text", head, "", doc, "```", ""]
    return "\n".join(lines)


def settings(name: str) -> str:
    """The fields of a settings class: default and meaning."""
    tree = ast.parse((ROOT / "pipeline" / "settings.py").read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    rows = ["| field | default | |", "|---|---|---|"]
    for node, following in pairwise(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(following, ast.Expr):
            continue
        said = " ".join(str(ast.literal_eval(following.value)).split()).replace("|", "\\|")
        default = ast.unparse(node.value) if node.value else ""
        rows.append(f"| `{ast.unparse(node.target)}` | `{default}` | {said} |")
    return "\n".join(rows)
