"""Which layers' LoRA matters: the importance of LoRA-drop (https://arxiv.org/abs/2402.07721).

The importance of layer i is `g_i = E‖s · B_i A_i x‖²` over the tokens of a sample; its share is
`I_i = g_i / Σ g` among the layers of one kind (all query projections, say). The layers at the top
whose shares add up to the threshold T keep a LoRA of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lightning_peft.errors import UserError

_TOLERANCE = 1e-9  # so that shares which add up to T on paper do so in floating point


def shares(importance: Sequence[float]) -> list[float]:
    """Return `I_i = g_i / Σ g`; all zero where every g is zero.

    Args:
        importance: g of the layers of one kind.

    Raises:
        UserError: where a g is negative or not finite.
    """
    for i, value in enumerate(importance):
        if not math.isfinite(value) or value < 0:
            raise UserError(
                f"importance[{i}] is {value}: importance is a mean square, finite and at least 0; "
                "the probe has probably diverged, so lower its learning rate"
            )
    largest = max(importance, default=0.0)
    if largest == 0:
        return [0.0 for _ in importance]
    relative = [value / largest for value in importance]  # the sum itself might overflow
    total = math.fsum(relative)
    return [value / total for value in relative]


def shares_by_kind(importance: Mapping[str, float], kind: Callable[[str], str]) -> dict[str, float]:
    """Return each layer's share among the layers of its kind, in the order given.

    Args:
        importance: g by the layer's full name.
        kind: gives the kind of a full name, such as `q_proj`.
    """
    members: dict[str, list[str]] = {}
    for name in importance:
        members.setdefault(kind(name), []).append(name)
    share: dict[str, float] = {}
    for names in members.values():
        values = shares([importance[name] for name in names])
        share.update(zip(names, values, strict=True))
    return {name: share[name] for name in importance}


def layers_to_keep(importance: Sequence[float], threshold: float) -> list[int]:
    """Return the fewest layers, from the most important on, whose shares reach the threshold.

    Reaching means a sum of at least `threshold − 1e-9`, so that T = 1 keeps every layer with a
    share above rounding, and none with importance zero. Ties go to the lower index. Where all
    importance is zero there is nothing to choose by, and all layers are kept.

    Args:
        importance: g, or the shares, of the layers of one kind.
        threshold: T, above 0 and at most 1; the paper's is 0.9.

    Returns:
        The positions of the layers that keep their own LoRA, the most important first.

    Raises:
        UserError: where the threshold is outside (0, 1] or importance is not finite.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"threshold={threshold}: give a share above 0 and at most 1, such as 0.9")
    share = shares(importance)
    if not any(share):
        return list(range(len(share)))
    order = sorted(range(len(share)), key=lambda i: (-share[i], i))
    kept: list[int] = []
    while math.fsum(share[i] for i in kept) < threshold - _TOLERANCE:
        kept.append(order[len(kept)])
    return kept
