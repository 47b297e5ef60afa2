"""What is known of each compiler and chip: one file of data in ``pipeline/targets``.

A file is named like its target, ``openvino.toml``. ``title`` says what it is; ``[install]`` how its
compiler gets an environment of its own, ``[verify]`` what the proof may expect of it, ``[rules]``
which files it takes. Each table is optional: a target without ``[install]`` needs nothing besides
this package, one without ``[verify]`` can neither run nor compile a network here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

from graph_tools.errors import SettingsError

__all__ = [
    "Check",
    "Install",
    "Rules",
    "TargetProfile",
    "load_profile",
    "profile_names",
]

_FOLDER = files("pipeline") / "targets"


@dataclass(frozen=True, kw_only=True)
class Install:
    """How a target's compiler is installed.

    Attributes:
        requirements: for pip, with exact versions; the first one's version is the target's.
        python: versions of Python that have its wheels, as in ``>=3.9,<3.13``; "" for any.
        needs: commands that must be on the path besides, such as java.
        note: a line for who installs it, such as its size.
        no_deps: the requirements are all that is needed; pip adds nothing.
    """

    requirements: tuple[str, ...]
    python: str = ""
    needs: tuple[str, ...] = ()
    note: str = ""
    no_deps: bool = False


@dataclass(frozen=True, kw_only=True)
class Check:
    """What the proof may expect of a target.

    Attributes:
        steps: largest difference from the integer interpreter that is no failure; 0: exact; -1:
            any, its arithmetic is another one.
        cause: why it may differ, "" where it may not.
        saturates: on x64 CPUs without VNNI its 8-bit kernels add pairs of products in 16 bits,
            which saturate where weights take 8 bits: no difference is a failure there.
        fuses_add: it fuses a convolution with the Add behind it, and then does not round where
            the quantizer between them would: no difference is a failure where there is one.
        quirks: names of what it computes otherwise besides (`pipeline.verify.causes`): no
            difference is a failure where a file has them.
        opset: newest that it reads; the copy that it gets says so. 0: any.
        converts: its converter compiles the file here, and nothing runs it.
    """

    steps: int = 0
    cause: str = ""
    saturates: bool = False
    fuses_add: bool = False
    quirks: tuple[str, ...] = ()
    opset: int = 0
    converts: bool = False


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which files a target takes; what is empty or 0 is left to the user.

    Attributes:
        operators: those it takes; empty where it is not known, or all.
        signedness: ``signed``: no unsigned integers.
        zero_point: ``zero``: no other one; ``middle``: signed tensors are uint8 around 128;
            ``below``: around 126, weights around -2.
        weight_granularity: ``channel`` or ``tensor``: scales of a weight.
        bias_storage: ``int32`` or ``float``.
        fused_sums: ``yes``: it does not round between a convolution and the sum behind it.
        weight_scale: ``pot``: powers of two alone.
        container: ``int8``: no narrower type.
        scheme: ``full``: every tensor that crosses an operator is quantized.
        weights: bits that weights may have; ``activations`` likewise.
        opset: newest opset.
        static_batch: the batch is 1.
        layout: of the image, NCHW or NHWC.
        note: a line for the user: what has not been run, where the rules are from.
    """

    operators: tuple[str, ...] = ()
    signedness: str = ""
    zero_point: str = ""
    weight_granularity: str = ""
    bias_storage: str = ""
    fused_sums: str = ""
    weight_scale: str = ""
    container: str = ""
    scheme: str = ""
    weights: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    opset: int = 0
    static_batch: bool = False
    layout: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TargetProfile:
    """One target.

    Attributes:
        name: as on the command line and of its file.
        title: what it is, in a few words.
        install: how its compiler is installed; None if it needs none.
        verify: what the proof may expect; None if it cannot run networks here.
        rules: which files it takes; None if any that this package writes.
    """

    name: str
    title: str
    install: Install | None = None
    verify: Check | None = None
    rules: Rules | None = None

    @property
    def note(self) -> str:
        """What whoever quantizes for it must know; "" if nothing."""
        return self.rules.note if self.rules is not None else ""


def profile_names() -> tuple[str, ...]:
    """Return the names of all targets, sorted."""
    found = (entry.name for entry in _FOLDER.iterdir())
    return tuple(sorted(name[:-5] for name in found if name.endswith(".toml")))


def load_profile(name: str) -> TargetProfile:
    """Read a target's file.

    Raises:
        SettingsError: there is no target of that name; the message lists those there are.
    """
    names = profile_names()
    if name not in names:
        raise SettingsError(
            f"there is no target '{name}'",
            where="target",
            hint=f"there are {', '.join(names)}",
        )
    return read_profile(_FOLDER / f"{name}.toml")


def read_profile(path: Traversable) -> TargetProfile:
    """Read a profile from any file.

    Raises:
        SettingsError: not TOML, a key that no table has, or a value of another type.
    """
    where = path.name
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot be read: {error}", where=where) from error
    tables = {"install": Install, "verify": Check, "rules": Rules}
    if unknown := sorted(set(data) - {"title", *tables}):
        raise SettingsError(f"unknown key '{unknown[0]}'", where=where)
    if not isinstance(data.get("title"), str):
        raise SettingsError("has no title", where=where)
    parts: dict[str, Any] = {
        key: _table(kind, data[key], f"{where} [{key}]")
        for key, kind in tables.items()
        if key in data
    }
    return TargetProfile(name=where.removesuffix(".toml"), title=data["title"], **parts)


_T = TypeVar("_T")


def _table(kind: type[_T], values: Any, where: str) -> _T:
    if not isinstance(values, Mapping):
        raise SettingsError("is no table", where=where)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise SettingsError(f"unknown key '{unknown[0]}'", where=where)
    given: dict[str, Any] = {}
    for key, value in values.items():
        given[key] = value = tuple(value) if isinstance(value, list) else value
        default = known[key].default
        wanted = tuple if default is MISSING else type(default)
        if type(value) is not wanted or (
            wanted is tuple and not all(isinstance(word, str) for word in value)
        ):
            raise SettingsError(f"{key} is not what it should be", where=where)
    try:
        return kind(**given)
    except TypeError as error:
        raise SettingsError(f"is incomplete: {error}", where=where) from error
