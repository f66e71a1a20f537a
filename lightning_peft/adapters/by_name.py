"""Ranks and alphas that differ by layer, as PEFT's ``rank_pattern`` and ``alpha_pattern`` say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.peft_config import peft_pattern
from lightning_peft.errors import UserError


class ByName:
    """Numbers by pattern: the first that matches a name's end counts, as in PEFT.

    Args:
        key: Of the argument, for errors.
        given: Numbers by pattern: the end of a full name, behind a dot, or a regex of it.

    Raises:
        UserError: If a pattern is no regular expression.
    """

    def __init__(self, key: str, given: Mapping[str, Any] | None) -> None:
        self.key = key
        self.entries = [(peft_pattern(text, key), value) for text, value in (given or {}).items()]

    def of(self, name: str, default: Any) -> Any:
        """The number of a layer.

        Args:
            name: Its full name.
            default: Where no pattern matches.
        """
        return next((value for pattern, value in self.entries if pattern.match(name)), default)

    def check(self, names: Iterable[str]) -> None:
        """Refuse a pattern that matches none of the adapted layers.

        Args:
            names: Their full names.

        Raises:
            UserError: As said.
        """
        names = list(names)
        for pattern, _ in self.entries:
            if not any(pattern.match(name) for name in names):
                near = ", ".join(names[:3]) or "none"
                raise UserError(
                    f"{self.key}: {pattern} matches no adapted layer; there are {near}, …"
                )


def check_alphas(alpha: Any, pattern: Mapping[str, Any] | None) -> None:
    """Refuse what is no numerator of a scaling.

    Args:
        alpha: ``lora_alpha``.
        pattern: ``alpha_pattern``.

    Raises:
        UserError: As said.
    """
    named = {f"alpha_pattern {key!r}": value for key, value in (pattern or {}).items()}
    for key, value in {"lora_alpha": alpha, **named}.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise UserError(f"{key} must be a finite number above zero, got {value!r}.")


def check_patterns(
    strategy: str, ranks: ByName, alphas: ByName, layers: Mapping[str, AdaptedLayer]
) -> None:
    """Refuse patterns that match nothing, or that a method's own layers do not follow.

    Args:
        strategy: The method's name.
        ranks: ``rank_pattern``.
        alphas: ``alpha_pattern``.
        layers: What was made, by full name.

    Raises:
        UserError: As said.
    """
    for pattern in (ranks, alphas):
        pattern.check(layers)
    for name, layer in layers.items():
        wanted = ranks.of(name, layer.r)
        if layer.r != wanted:
            raise UserError(
                f"rank_pattern: {strategy} makes {name} of rank {layer.r} and not {wanted}, since "
                "its ranks follow a rule of its own."
            )
