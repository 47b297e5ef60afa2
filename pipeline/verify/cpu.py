"""The instructions of this CPU that decide how 8-bit kernels add."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Cpu", "read_cpu"]

_EXACT = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp")


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """A CPU.

    Attributes:
        machine: architecture, such as x86_64.
        name: model name; "" when it cannot be read.
        vnni: has 8-bit dot products with 32-bit sums; None when it cannot be read.
        flags: the instruction sets among those that matter here.
    """

    machine: str
    name: str
    vnni: bool | None
    flags: tuple[str, ...]

    def describe(self) -> str:
        """A few words for a terminal."""
        vnni = {True: "with 8-bit dot products", False: "without VNNI", None: "flags unknown"}
        return f"{self.name or self.machine}, {vnni[self.vnni]}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields."""
        return {**vars(self), "flags": list(self.flags)}


@cache
def read_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    """Read the CPU's name and flags; where there is no cpuinfo they stay unknown."""
    name, flags = "", None
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in {"flags", "Features"}:
            flags = frozenset(value.split())
    known = tuple(f for f in ("avx2", "avx512bw", *_EXACT) if flags is not None and f in flags)
    return Cpu(
        machine=platform.machine(),
        name=name,
        vnni=None if flags is None else bool(set(known) & set(_EXACT)),
        flags=known,
    )
