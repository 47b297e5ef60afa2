"""Optimizers and learning rate schedules as tensors and plain numbers, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_optimizer", "optimizer_facts", "optimizer_tensors"]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's running means; names are ``parameter.mean``."""
    state = optimizer.state_dict()["state"]
    return {f"{place}.{key}": value for place in state for key, value in state[place].items()}


def optimizer_facts(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return an optimizer's numbers, such as its rates."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    return groups


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    facts: list[dict[str, Any]],
) -> None:
    """Put a state back.

    Args:
        optimizer: of the same parameters.
        tensors: as `optimizer_tensors` gave them.
        facts: as `optimizer_facts` gave them; they may have been JSON.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, _, key = name.partition(".")
        state.setdefault(int(place), {})[key] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in facts]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
