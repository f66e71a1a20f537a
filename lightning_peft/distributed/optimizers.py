"""Optimizer state in torch's form, whole, so that it goes from one engine to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.distributed.parameters import KEEPERS, keeper_of


@torch.no_grad()
def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` would be on one device."""
    groups = _groups(optimizer)
    keepers = [keeper_of(p) for group in groups for p in group]
    if all(keeper.plain for keeper in keepers):
        state = optimizer.state_dict()
        # Entries are changed later on; the optimizer's own must not be.
        return {**state, "state": {i: {**entry} for i, entry in state["state"].items()}}
    state = {}
    for index, keeper in enumerate(keepers):
        entry = {**keeper.counters(optimizer), **keeper.moments(optimizer)}
        if entry:
            state[index] = {
                key: v.cpu() if isinstance(v, Tensor) else v for key, v in entry.items()
            }
    first, described = 0, []
    for group, settings in zip(groups, optimizer.param_groups, strict=True):
        own = {key: v for key, v in settings.items() if key != "params"}
        described.append({**own, "params": list(range(first, first + len(group)))})
        first += len(group)
    return {"state": state, "param_groups": described}


@torch.no_grad()
def load_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """Take back what :func:`optimizer_state` gave, written under whatever engine."""
    keepers = [keeper_of(p) for p in parameters_of(optimizer)]
    if all(keeper.plain for keeper in keepers):
        optimizer.load_state_dict(saved)
        return
    for settings, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        settings.update({key: v for key, v in old.items() if key != "params"})
    for index, keeper in enumerate(keepers):
        for key, v in saved["state"].get(index, {}).items():
            if isinstance(v, Tensor) and v.shape == keeper.shape() and v.dim():
                keeper.write_moment(optimizer, key, v)
            else:
                keeper.write_counter(optimizer, key, v)


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    """The model's parameters that an optimizer trains, in the order of its state's indices."""
    return [p for group in _groups(optimizer) for p in group]


def _groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """The model's own parameters by group, where the engine gave the optimizer flat ones too."""
    for keeper in KEEPERS:
        groups = keeper.groups(optimizer)
        if groups is not None:
            return groups
    return [list(group["params"]) for group in optimizer.param_groups]
