"""Shares of a budget of components, by what is known of the layers before training.

`allot` gives each layer its share of the budget by importance, `allot_by_cost` its share of a
budget in which a component of a larger layer costs more (GoRA, https://arxiv.org/abs/2502.12171),
and `allot_highest` counts for each layer how many of its components are among the highest of all
(EVA, https://arxiv.org/abs/2410.07170). Equal inputs give equal ranks on every machine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

from lightning_peft.errors import UserError


def allot(importance: Sequence[float], budget: int, min_r: int, max_r: int) -> list[int]:
    """Return ranks in proportion to importance that sum to the budget.

    The proportional shares `clamp(λ · importance_i, min_r, max_r)`, with the λ for which they sum
    to the budget, are rounded by largest remainder. A layer never gets fewer components than a less
    important one. Equal remainders go to the earlier layer; layers without any importance share
    what the others cannot take.

    Args:
        importance: of each layer, finite and at least 0; only its ratios matter.
        budget: the sum of the ranks.
        min_r: the lowest rank.
        max_r: the highest rank.

    Raises:
        UserError: where the bounds do not allow the budget, or an importance is no such number.
    """
    check_budget(budget, len(importance), min_r, max_r * len(importance))
    shares = _clamped_shares(_weights(importance), budget, min_r, max_r)
    ranks = [math.floor(share) for share in shares]
    # At least as many remainders as are missing are above zero, so that no bound is passed.
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i] - shares[i], i))
    for i in order[: budget - sum(ranks)]:
        ranks[i] += 1
    return ranks


def allot_by_cost(
    importance: Sequence[float], costs: Sequence[float], budget: float, min_r: int, max_r: int
) -> list[int]:
    """Return `clamp(⌊round(budget · share_i) / cost_i⌋, min_r, max_r)`, as GoRA's authors' code.

    The ranks' costs do not sum to the budget: they are rounded down, and clamped without making up
    for it elsewhere.

    Args:
        importance: of each layer, finite and at least 0; without any, all shares are equal.
        costs: of one component of each layer, above 0.
        budget: what all components may cost together.
        min_r: the lowest rank.
        max_r: the highest rank.

    Raises:
        UserError: where an importance is no such number.
    """
    weights = _weights(importance)
    total = sum(weights)
    shares = [float(w / total) if total else 1 / len(weights) for w in weights]
    ranks = [int(round(budget * s) // cost) for s, cost in zip(shares, costs, strict=True)]
    return [min(max(rank, min_r), max_r) for rank in ranks]


def allot_highest(values: Sequence[Sequence[float]], budget: int, min_r: int = 0) -> list[int]:
    """Return how many components of each layer are among the highest of all layers.

    Ties go to the earlier layer.

    Args:
        values: for each layer those of its components, from the highest down.
        budget: the sum of the ranks.
        min_r: so many of each layer are taken first, whatever their values.

    Raises:
        UserError: where there are fewer components than that, or the floor asks for more.
    """
    check_budget(budget, len(values), min_r, sum(len(own) for own in values))
    ranks = [min(min_r, len(own)) for own in values]
    pool = [(-v, i) for i, own in enumerate(values) for v in own[ranks[i] :]]
    for _, i in sorted(pool)[: budget - sum(ranks)]:
        ranks[i] += 1
    return ranks


def even_ranks(most: Sequence[int], budget: int, least: Sequence[int] | None = None) -> list[int]:
    """Return the ranks that are most alike among those that sum to the budget.

    What a method leaves at the end whose budget is over all layers, if it left them alike: the
    right number of components in any case, and the right number of parameters too where layers
    have one size. Where they have not, which layer keeps how many is for the data to say.

    Args:
        most: the most components of each layer.
        budget: the sum of the ranks, as far as the bounds allow it.
        least: the fewest of each; none when None.
    """
    ranks = [0] * len(most) if least is None else list(least)
    able = [(rank, i) for i, rank in enumerate(ranks) if rank < most[i]]
    heapq.heapify(able)
    for _ in range(budget - sum(ranks)):
        if not able:
            break
        rank, i = heapq.heappop(able)  # the lowest; of equal ones the earliest
        ranks[i] = rank + 1
        if ranks[i] < most[i]:
            heapq.heappush(able, (ranks[i], i))
    return ranks


def check_budget(budget: int, layers: int, min_r: int, most: int, hint: str = "") -> None:
    """Refuse a budget that the bounds do not allow.

    Args:
        budget: components in all layers.
        layers: how many there are.
        min_r: the lowest rank of each.
        most: components that all layers may have together.
        hint: what follows the number in the sentence.

    Raises:
        UserError: as said.
    """
    if not layers * min_r <= budget <= most:
        raise UserError(
            f"budget must lie between {layers * min_r} (min_r = {min_r} in each of {layers} "
            f"layers) and {most} (the most that they may have), got {budget}{hint}."
        )


def _weights(importance: Sequence[float]) -> list[Fraction]:
    """Exact numbers, so that no rounding decides between layers."""
    for i, value in enumerate(importance):
        if not math.isfinite(value) or value < 0:
            raise UserError(
                f"importance[{i}] is {value}, and must be finite and at least 0; the loss of the "
                "sample has probably no finite gradient."
            )
    return [Fraction(value) for value in importance]


def _clamped_shares(
    weights: Sequence[Fraction], budget: int, min_r: int, max_r: int
) -> list[Fraction]:
    """`clamp(λ · weight, min_r, max_r)` with the λ for which they sum to the budget.

    Shares of what is left are clamped. If that makes them too many, those that were raised to the
    floor stay there, if too few those that were lowered to the ceiling; the rest is shared again.
    """
    low, high = Fraction(min_r), Fraction(max_r)
    fixed: dict[int, Fraction] = {}
    free = list(range(len(weights)))
    while free:
        left, total = budget - sum(fixed.values()), sum(weights[i] for i in free)
        equal = Fraction(left, len(free))
        share = {i: left * weights[i] / total if total else equal for i in free}
        bounded = {i: min(max(share[i], low), high) for i in free}
        excess = sum(bounded.values()) - left
        done = {i for i in free if not excess or (bounded[i] - share[i]) * excess > 0}
        fixed.update((i, bounded[i]) for i in done)
        free = [i for i in free if i not in done]
    return [fixed[i] for i in range(len(weights))]
