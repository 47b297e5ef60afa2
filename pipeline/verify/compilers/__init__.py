"""Runtimes that take a QDQ file, a module each: ``available()``, ``compile()``, ``run()``."""

from __future__ import annotations
