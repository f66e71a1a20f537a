"""Budgets: the rank that gives a run the trainable parameters that all should have; its length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning_peft.comparison.schema import Match
from lightning_peft.errors import UserError
from lightning_peft.modules.meta import meta_base

LARGEST = 1 << 20
LARGEST_START = 1 << 10
Count = Callable[[int], int]


def final_parameters(module: Any, run: str = "", labels: int = 2) -> int:
    """Trainable parameters at the end of a run, counted on the meta device.

    Args:
        module: An adapted module as instantiated from a configuration.
        run: Its name, for the error.
        labels: Outputs of the head of a module that classifies.

    Raises:
        UserError: If only data decide the count.
    """
    model = meta_base(module, labels)
    module.adapter.attach(model, initialize=False)
    count = module.adapter.final_parameters(model)
    if count is None:
        raise UserError(
            f"match.parameters: how many parameters train at the end of {run} is for its data to "
            f"decide; put {run} into match.leave."
        )
    return count


def find_rank(run: str, match: Match, count: Count) -> tuple[int, int]:
    """The rank that comes nearest to a budget, and the parameters that it makes.

    Args:
        run: Name of the run, for the error.
        match: The budget.
        count: Final parameters by rank, which must not fall as the rank rises; raises a
            ``ValueError`` for a rank that is too low or too high for the method.

    Raises:
        UserError: If no rank meets the budget; names those nearest to it. What ``count`` raises, if
            it takes none.
    """
    assert match.parameters is not None
    target, key = match.parameters, match.rank_of.get(run, match.rank)
    counts: dict[int, int] = {}
    high = _smallest(counts, count)
    low = high - 1
    while counts[high] < target and high < LARGEST:
        low, high = high, _beyond(low, high, counts, target)
        try:
            counts[high] = count(high)
        except ValueError:  # beyond what the method takes; the largest that it does is in between
            high = _edge(low, high, counts, count)
            break
        if counts[high] == counts[low]:
            break
    while high - low > 1 and counts[high] >= target:
        middle = _between(low, high, counts, target)
        counts[middle] = count(middle)
        low, high = (middle, high) if counts[middle] < target else (low, middle)
    near = sorted(counts, key=lambda rank: (abs(counts[rank] - target), rank))
    best = near[0]
    if abs(counts[best] - target) > match.tolerance * target:
        if len({counts[rank] for rank in near[:2]}) == 1:
            near = near[:1]
        shown = " and ".join(f"{key} = {rank} has {counts[rank]:,}" for rank in sorted(near[:2]))
        raise UserError(
            f"match.parameters: no {key} gives {run} {target:,} trainable parameters within "
            f"{match.tolerance:.0%}; {shown}. Give another number, a larger match.tolerance, or "
            f"put {run} into match.leave."
        )
    return best, counts[best]


def _beyond(low: int, high: int, counts: dict[int, int], target: int) -> int:
    """Where a count would meet the budget if it rose on as it does, at most 16 times as far.

    A count takes a third of a second. Some rise with the square.
    """
    if low not in counts:
        return 2 * high
    rise = (counts[high] - counts[low]) / (high - low)
    return high + min(max(math.ceil((target - counts[high]) / rise), 1), 15 * high)


def _between(low: int, high: int, counts: dict[int, int], target: int) -> int:
    """Where the line between two counts meets the budget, a rank strictly between them."""
    if low not in counts:
        return (low + high) // 2
    share = (target - counts[low]) / (counts[high] - counts[low])
    return min(max(low + round(share * (high - low)), low + 1), high - 1)


def _smallest(counts: dict[int, int], count: Count) -> int:
    """The lowest rank that a method takes; one that grows takes none below its start."""
    low, high, refusal = 0, 1, None
    while high not in counts:
        try:
            counts[high] = count(high)
        except ValueError as error:
            refusal = refusal or error
            low, high = high, 2 * high
            if high > LARGEST_START:
                raise refusal from None
    return _edge(high, low, counts, count)


def _edge(taken: int, refused: int, counts: dict[int, int], count: Count) -> int:
    """The last rank that a method takes between one that it takes and one that it refuses."""
    while abs(taken - refused) > 1:
        middle = (taken + refused) // 2
        try:
            counts[middle] = count(middle)
            taken = middle
        except ValueError:
            refused = middle
    return taken


def trainer_limits(match: Match | None) -> dict[str, Any]:
    """What matched steps or seconds set, by key.

    Args:
        match: The budget, if there is one.
    """
    found: dict[str, Any] = {}
    if match and match.steps is not None:
        found |= {"trainer.max_steps": match.steps, "trainer.max_epochs": None}
    if match and match.seconds is not None:
        found["trainer.max_time"] = _clock(match.seconds)
    return found


def _clock(seconds: float) -> str:
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    return f"{days:02}:{hours:02}:{minutes:02}:{whole % 60:02}"
