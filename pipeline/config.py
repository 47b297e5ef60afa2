"""Settings of a command in a TOML file, read and written by the dataclasses that hold them.

A file holds what flags hold, under the same names: ``weights = 4``, ``num-images = 64``. What
stands in a table named like a command, such as ``[evaluate]``, is for that command only.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from graph_tools.errors import SettingsError

__all__ = ["from_values", "read_values", "repeatable_flags", "to_toml"]

Command = TypeVar("Command")

_NOT_IN_FILES = {"config", "dump_config", "debug"}
_TALK = {"json", "quiet"}  # how a command talks; left out when settings are written
_APPENDED = get_args(tyro.conf.UseAppendAction[tuple[str, ...]])[1]
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setting:
    """A field of a command: its name, its type, and the field that holds its dataclass."""

    name: str
    hint: Any
    group: str

    @property
    def is_repeatable(self) -> bool:
        return get_origin(self.hint) is Annotated and _APPENDED in get_args(self.hint)[1:]


def read_values(path: Path, command: str, commands: Collection[str]) -> dict[str, Any]:
    """Read what a file holds for one command.

    Args:
        path: a TOML file.
        command: its name.
        commands: the names of all commands.

    Returns:
        Values by key, as they stand there; those in the command's own table win.

    Raises:
        SettingsError: the file cannot be read, or has a table that no command is named like.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"cannot be read: {error.strerror}", where=where) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "zsq quantize --dump-config shows what one looks like"
        raise SettingsError(f"is no TOML: {error}", where=where, hint=hint) from error
    values = {key: value for key, value in content.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    for name in tables:
        if name not in commands:
            raise SettingsError(
                f"the table [{name}] is named like no command",
                where=where,
                hint=_nearest(name, commands),
            )
    return values | tables.get(command, {})


def from_values(
    kind: type[Command],
    values: Mapping[str, Any],
    *,
    where: str,
    absent: Any = tyro.MISSING,
    overridden: Collection[str] = (),
) -> Command:
    """Make a command of the values that a file holds.

    Args:
        kind: its dataclass.
        values: by key, with hyphens or underscores.
        where: names the file in errors.
        absent: stands for paths that have no default and are not in the file; other such
            values have to be given as flags.
        overridden: repeatable settings that flags replace.

    Raises:
        SettingsError: an unknown key, with the nearest known one; a value of another type, or
            one that the dataclass refuses.
    """
    known = {setting.name: setting for setting in _settings(kind)}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known or name in _NOT_IN_FILES:
            flags = [other.replace("_", "-") for other in known if other not in _NOT_IN_FILES]
            raise SettingsError(
                f"unknown setting '{key}'", where=where, hint=_nearest(key, flags)
            )
        setting = known[name]
        checked = _checked(setting.hint, value, where=f"{where}: {key}")
        if name not in overridden:
            groups.setdefault(setting.group, {})[name] = checked
    hints = get_type_hints(kind)
    arguments = groups.pop("", {})
    try:
        for group, entries in groups.items():
            arguments[group] = hints[group](**entries)
    except SettingsError as error:
        raise SettingsError(
            error.what, where=f"{where}: {error.where}", hint=error.hint
        ) from error
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in arguments and _is_required(field):
            is_path = hints[field.name] is Path
            arguments[field.name] = absent if is_path else tyro.MISSING
    return kind(**arguments)


def to_toml(command: object, *, absent: Any = None) -> str:
    """Write the settings of a command as a file that `from_values` makes the same one of.

    Args:
        command: an instance of its dataclass.
        absent: values that are this one are left out, as those that are None are.
    """
    lines: list[str] = []
    heading = ""
    for setting in sorted(_settings(type(command)), key=lambda entry: entry.group != ""):
        if setting.name in _NOT_IN_FILES | _TALK:
            continue
        holder = getattr(command, setting.group) if setting.group else command
        value = getattr(holder, setting.name)
        if value is None or value is absent:
            continue
        if setting.group != heading:
            heading = setting.group
            lines += ["", f"# {heading}"]
        lines.append(f"{setting.name.replace('_', '-')} = {_literal(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def repeatable_flags(kind: type) -> dict[str, str]:
    """Flags that may be repeated, and the settings that they add to."""
    return {
        "--" + setting.name.replace("_", "-"): setting.name
        for setting in _settings(kind)
        if setting.is_repeatable
    }


def _settings(kind: type, group: str = "") -> Iterator[_Setting]:
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _settings(hint, field.name)
        else:
            yield _Setting(name=field.name, hint=hint, group=group)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _checked(hint: Any, value: Any, *, where: str) -> Any:
    """The value as its type has it, or an error that names the type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _checked(arguments[0], value, where=where)
    if origin in (Union, types.UnionType):
        (inner,) = [one for one in arguments if one is not type(None)]
        return _checked(inner, value, where=where)
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return value
        listed = ", ".join(json.dumps(choice) for choice in arguments)
        raise SettingsError(f"{_shown(value)} is not one of {listed}", where=where)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_element(arguments[0], item, where=where) for item in items)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise SettingsError(
            f"{_shown(value)} is not {_KINDS.get(hint, 'a path')}", where=where
        )
    return value


def _element(hint: Any, value: Any, *, where: str) -> Any:
    """An element of a list; numbers where words are wanted, as in ``mean = [0.485, 0.456]``."""
    if hint is str and type(value) in (int, float):
        return str(value)
    return _checked(hint, value, where=where)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _literal(value: Any) -> str:
    """A value in TOML; JSON's strings, numbers and booleans are such."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _nearest(name: str, known: Collection[str]) -> str:
    options: Sequence[str] = sorted(known)
    found = difflib.get_close_matches(name.replace("_", "-"), options, n=1, cutoff=0.5)
    return f"did you mean '{found[0]}'?" if found else f"known: {', '.join(options)}"
