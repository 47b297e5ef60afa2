"""What a target demands of the quantization: settings, operators, the form of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import onnx

from graph_tools.digests import stamp
from graph_tools.errors import SettingsError
from graph_tools.model import Model
from graph_tools.opset import to_older_opset
from pipeline.settings import QuantizeSettings
from pipeline.target_profiles import Rules, TargetProfile

__all__ = ["in_form", "not_taken", "settings_for", "with_batch"]

_DEMANDS = (
    "bias_storage",
    "container",
    "fused_sums",
    "scheme",
    "signedness",
    "weight_granularity",
    "weight_scale",
    "zero_point",
)
_NAMED = 3  # nodes of an operator that a warning names


def settings_for(profile: TargetProfile, settings: QuantizeSettings) -> QuantizeSettings:
    """Set what the target demands and the user left open.

    Raises:
        SettingsError: the user asked for what the target does not take.
    """
    rules = profile.rules or Rules()
    defaults = {field.name: field.default for field in fields(QuantizeSettings)}
    demanded: dict[str, Any] = {}
    for name in _DEMANDS:
        wanted, given = getattr(rules, name), getattr(settings, name)
        if wanted and given != wanted:
            if given != defaults[name]:
                raise _conflict(profile, name, given, f"takes {wanted} only")
            demanded[name] = wanted
    _check_widths(profile, rules, settings)
    return replace(settings, **demanded) if demanded else settings


def _check_widths(profile: TargetProfile, rules: Rules, settings: QuantizeSettings) -> None:
    for name, allowed, index in (
        ("weights", rules.weights, 1),
        ("activations", rules.activations, 2),
    ):
        if not allowed:
            continue
        takes = f"takes {name} of {', '.join(allowed)} bits only"
        given = getattr(settings, name)
        if str(given) not in allowed:
            raise _conflict(profile, name, given, takes)
        for text, entry in zip(settings.bits, settings.widths(), strict=True):
            if entry[index] is not None and str(entry[index]) not in allowed:
                raise _conflict(profile, "bits", text, takes)
    if rules.weights == ("8",) and settings.target_size:
        raise _conflict(
            profile, "target_size", settings.target_size, "takes 8-bit weights only"
        )


def _conflict(profile: TargetProfile, field: str, given: object, takes: str) -> SettingsError:
    option = "--" + field.replace("_", "-")
    return SettingsError(
        f"target {profile.name} {takes}",
        where=f"{option} {given}",
        hint="leave it out, or choose another --target",
    )


def not_taken(
    profile: TargetProfile, model: Model, absorbed: Sequence[str] = ()
) -> Iterator[str]:
    """Say in a line for each operator which nodes the target does not take.

    Args:
        profile: the target.
        model: the network that is written.
        absorbed: nodes that are not.
    """
    rules = profile.rules or Rules()
    found: dict[str, list[str]] = {}
    for node in model.proto.graph.node:
        if rules.operators and node.name not in absorbed:
            if node.op_type not in rules.operators:
                found.setdefault(node.op_type, []).append(node.name)
    for op_type, names in found.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        listed = ", ".join(names[:_NAMED]) + more
        yield f"target {profile.name} is not known to take {op_type} (node {listed})"
    if rules.layout and model.input.layout != rules.layout:
        yield f"target {profile.name} takes images in {rules.layout}, not {model.input.layout}"


def with_batch(profile: TargetProfile, model: Model) -> Model:
    """Fix the batch to 1 where the target wants that; a batch the file declares stays."""
    rules = profile.rules or Rules()
    if not rules.static_batch or model.input.batch is not None:
        return model
    return replace(model, input=replace(model.input, batch=1))


def in_form(profile: TargetProfile, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Bring a written file to the newest opset that the target takes.

    Raises:
        TargetError: a node has no such form.
    """
    rules = profile.rules or Rules()
    if not rules.opset:
        return proto
    older = to_older_opset(proto, rules.opset, where=f"target {profile.name}")
    stamp(older)  # nodes have other forms now
    return older
