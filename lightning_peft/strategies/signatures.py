"""Strategies that were written for earlier signatures run, and are told what to write."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

NamedParameters = Iterable[tuple[str, nn.Parameter]]
# From parameters, or from groups of them (dictionaries with "params"), as torch's optimizers take.
MakeOptimizer = Callable[[Iterable[Any]], Optimizer]


def with_name(layer: Callable[..., nn.Module]) -> Callable[[nn.Module, str], nn.Module]:
    """A strategy's ``layer(base, name)``; one that takes the base alone is called so."""
    if len(_positional(layer)) >= 2:
        return layer
    _say(layer, "layer(self, base)", "layer(self, base, name)")
    return lambda base, name: layer(base)


def with_names(make: Callable[..., Optimizer]) -> Callable[[NamedParameters, Any], Optimizer]:
    """A strategy's ``optimizer(named_parameters, default)``; one that takes ``params`` gets them.

    Args:
        make: The strategy's method.
    """
    if next(iter(_positional(make)), "") not in ("params", "parameters"):
        return make
    _say(make, "optimizer(self, params, default)", "optimizer(self, named_parameters, default)")
    return lambda named, default: make([parameter for _, parameter in named], default)


def _positional(method: Callable[..., Any]) -> list[str]:
    """Names of the arguments that can be given by position."""
    several = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(method).parameters.values()
    star = [f"*{p.name}" for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL] * 2
    return [p.name for p in parameters if p.kind in several] + star


def _say(method: Callable[..., Any], old: str, new: str) -> None:
    owner = type(getattr(method, "__self__", None)).__name__
    warnings.warn(f"{owner}.{old} is the old form; write {new}.", DeprecationWarning, stacklevel=4)
