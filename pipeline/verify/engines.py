"""The targets that a file is compared on, and what runs it on each."""

from __future__ import annotations

from collections.abc import Sequence

from graph_tools.errors import SettingsError
from pipeline.environments import find_environment, how_to_get
from pipeline.settings import VerifySettings
from pipeline.target_profiles import Check, TargetProfile, load_profile, profile_names
from pipeline.verify.compilers import onnxruntime as ort
from pipeline.verify.compilers.engine import Engine
from pipeline.verify.compilers.onnxruntime_engine import OnnxruntimeEngine
from pipeline.verify.compilers.process import RUNNERS, ProcessEngine

__all__ = ["engines_of", "parse_targets", "runnable_targets"]

_MODES: tuple[ort.Mode, ...] = ("unoptimized", "optimized", "default")


def runnable_targets() -> tuple[str, ...]:
    """Return the targets that can run a network here, once they are installed."""
    return tuple(name for name, check in _checked().items() if not check.converts)


def _checked() -> dict[str, Check]:
    found = {name: load_profile(name).verify for name in profile_names()}
    return {name: check for name, check in found.items() if check is not None}


def parse_targets(text: str) -> tuple[TargetProfile, ...]:
    """Read ``all`` or ``openvino,iree``.

    Raises:
        SettingsError: a name that is no target, or one that can do nothing with a network here.
    """
    known = tuple(_checked())
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise SettingsError("names no target", where="--targets", hint=f"give all or {known}")
    profiles = [load_profile(name) for name in (known if names == ["all"] else names)]
    for profile in profiles:
        if profile.verify is None:
            raise SettingsError(
                f"'{profile.name}' can neither run nor compile a network here",
                where="--targets",
                hint=f"these can: {', '.join(known)}",
            )
    return tuple(dict.fromkeys(profiles))


def engines_of(
    profile: TargetProfile, settings: VerifySettings
) -> Sequence[tuple[str, Engine | str, Check]]:
    """Return the rows of a target, a name each: an engine, or why there is none."""
    check = profile.verify
    if check is None or check.converts:
        return []
    if profile.name == "onnxruntime":
        saturating = Check(steps=check.steps, saturates=True)
        return [
            (
                f"onnxruntime {mode}",
                OnnxruntimeEngine(mode=mode, threads=settings.threads),
                saturating if mode == "default" else check,
            )
            for mode in _MODES
        ]
    environment = find_environment(profile)
    if environment is None:
        return [(profile.name, f"not installed: {how_to_get(profile)}", check)]
    engine = ProcessEngine(
        name=profile.name,
        version=environment.version,
        python=environment.python,
        script=RUNNERS / f"{profile.name}.py",
        timeout=settings.timeout,
        threads=settings.threads,
        opset=check.opset,
    )
    return [(profile.name, engine, check)]
