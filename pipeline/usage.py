"""What people read who do not know the commands yet: the overview, and errors of usage."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from graph_tools.errors import SettingsError

__all__ = ["overview", "usage_error"]

_GROUPS: Mapping[str, Mapping[str, str]] = {
    "Start with": {
        "quantize": "make a proved power-of-two integer network of MODEL, without data",
        "evaluate": "accuracy of models, float or quantized, on labelled images",
    },
    "Look": {
        "inspect": "what a model holds, and what stands in the way",
        "compare": "SQNR of two models, tensor by tensor",
        "view": "the graphs side by side, and the report",
    },
    "Piece by piece": {
        "generate": "calibration images from the model alone",
        "verify": "prove a quantized file bit by bit, here and in other compilers",
        "sweep": "a grid of bits, rounding and methods, with a plot",
        "expose": "the model with its BatchNormalization inputs as outputs",
    },
    "Hand on": {
        "export": "the dialect of a compiler, by its own converter",
        "targets": "list compilers and chips, install compilers",
    },
    "Shell": {
        "completions": "completions for bash, zsh and fish",
    },
}


def overview(commands: Mapping[str, type]) -> str:
    """The text of ``zsq --help``: one line a command, in groups.

    Args:
        commands: dataclasses by name; one that has no line here gets that of its docstring.
    """
    groups = {title: dict(lines) for title, lines in _GROUPS.items()}
    listed = {name for lines in groups.values() for name in lines}
    groups["Shell"] |= {
        name: (kind.__doc__ or "").split("\n")[0].rstrip(".")
        for name, kind in commands.items()
        if name not in listed
    }
    text = [
        "usage: zsq COMMAND [OPTIONS]",
        "",
        "Quantize exported ONNX networks to powers of two, without data.",
    ]
    for title, lines in groups.items():
        rows = [f"  {name:<13}{line}" for name, line in lines.items() if name in commands]
        text += ["", title, *rows] if rows else []
    text += [
        "",
        "zsq COMMAND --help lists its options. Every command takes --config FILE.toml,",
        "--json, --quiet, --threads and --debug.",
    ]
    return "\n".join(text)


def usage_error(
    text: str, arguments: Sequence[str], commands: Collection[str]
) -> SettingsError:
    """Make one line of what tyro says about words that it cannot read.

    Args:
        text: its message, frame included.
        arguments: the words after ``zsq``.
        commands: names of the commands.
    """
    text = " ".join("".join(c if c not in "╭╮╰╯│─" else " " for c in text).split())
    text = re.sub(r" ?-{5,}", "", text).split(" For full helptext")[0]
    first = arguments[0] if arguments else ""
    hint = f"see zsq {first} --help" if first in commands else "see zsq --help"
    if not first:
        return SettingsError(f"no subcommand given; one of {', '.join(commands)}", hint=hint)
    if first not in commands:
        near = difflib.get_close_matches(first, list(commands), n=1)
        ask = f"did you mean {near[0]}?" if near else hint
        return SettingsError(f"there is no command '{first}'", hint=ask)
    if found := re.search(r"invalid choice '(.*?)' for argument '(.*?)'.*?\((.*?)\)", text):
        choices = found[3].replace("'", "").rstrip(",")
        return SettingsError(
            f"'{found[1]}' is not one of {choices}", where=found[2], hint=hint
        )
    if found := re.search(
        r"Unrecognized options: ?(.*?)(?: Perhaps you meant: (\S+)|$)", text
    ):
        words = found[1].split(", ")
        flag = next((word for word in words if word.startswith("-")), words[0])
        kind = "option" if flag.startswith("-") else "argument"
        ask = f"did you mean {found[2]}?" if found[2] and kind == "option" else hint
        return SettingsError(f"{first} has no {kind} {flag}", hint=ask)
    if found := re.search(r"Error parsing (\S+): (.*?)(?: Argument helptext|$)", text):
        return SettingsError(found[2], where=found[1], hint=hint)
    text = re.sub(r"^(Required options|Invalid choice|Parsing error) (?=\S)", "", text)
    return SettingsError(text.rstrip("."), hint=hint)
