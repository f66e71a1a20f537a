"""When components are removed, and which.

Steps are counted from zero: `step` is the number of optimizer steps completed before this one,
Lightning's `global_step` between the backward pass and the optimizer's step, where an event
happens. PrunedLoRA's authors use `prune_every` 10 and `prune_count` 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def prune_due(step: int, start_step: int, prune_every: int) -> bool:
    """Return whether step `start_step + i · prune_every` for some i = 0, 1, … is this one.

    It does not know the target; `rank_at` does.

    Args:
        step: optimizer steps completed before this one.
        start_step: the step of the first event.
        prune_every: optimizer steps from one event to the next.
    """
    return step >= start_step and (step - start_step) % prune_every == 0


def rank_at(
    step: int, r: float, target_r: int, start_step: int, prune_every: int, prune_count: int
) -> float:
    """Return the rank with which the optimizer takes this step, after the step's own event.

    `max(target_r, r − prune_count · events)`: the last event removes only what is left to remove.
    With global allocation it is the mean rank.

    Args:
        step: optimizer steps completed before this one.
        r: the rank at the start; a mean may be a fraction.
        target_r: the rank at the end, at most r.
        start_step: the step of the first event.
        prune_every: optimizer steps from one event to the next.
        prune_count: components removed from a matrix in one event.
    """
    events = 0 if step < start_step else (step - start_step) // prune_every + 1
    return max(target_r, r - prune_count * events)


def last_event_step(
    r: float, target_r: int, start_step: int, prune_every: int, prune_count: int
) -> int | None:
    """Return the step whose event reaches the target, or None where nothing is to be removed.

    Args:
        r: the rank at the start; a mean may be a fraction.
        target_r: the rank at the end.
        start_step: the step of the first event.
        prune_every: optimizer steps from one event to the next.
        prune_count: components removed from a matrix in one event.
    """
    if r <= target_r:
        return None
    events = math.ceil((r - target_r) / prune_count)
    return start_step + (events - 1) * prune_every


def left_after(total: int, ratio: float, event: int, events: int) -> int:
    """Return how many of some groups are left after an event, where the gone share is a cubic.

    `ratio · (1 − (1 − i / n)³)` of them have gone after event i of n, rounded down.

    Args:
        total: groups at the start.
        ratio: the share that has gone at the end, in [0, 1).
        event: i, from 0 (before the first) to `events`.
        events: n.
    """
    gone = ratio * (1 - (1 - event / events) ** 3)
    return total - int(total * gone + 1e-9)  # 0.7 of 10 is 7, in floats too


def select_per_matrix(scores: Tensor, count: int) -> Tensor:
    """Return the `count` lowest scores of each matrix, without a host transfer.

    Ties go to the lower index; NaN counts as the highest score.

    Args:
        scores: `(..., r)`.
        count: how many to remove from each, at most r; none below 1.

    Returns:
        Indices, `(..., count)`, the lowest score first.
    """
    return scores.detach().argsort(dim=-1, stable=True)[..., : max(count, 0)]


def select_global(scores: Sequence[Tensor], total_count: int, min_r: int) -> list[Tensor]:
    """Return the lowest scores over all matrices, leaving each at least `min_r` components.

    Ties go to the earlier matrix, then to the lower index; NaN counts as the highest score. The
    scores come to the host in one transfer, since how many each matrix loses decides shapes.

    Args:
        scores: for each matrix `(r_i,)`; the ranks may differ.
        total_count: how many to remove in all; fewer where the floor allows no more.
        min_r: the floor. A matrix that is already at or below it loses nothing.

    Returns:
        For each matrix the indices to remove, `(k_i,)` and possibly empty, the lowest score first,
        on the device of its scores.
    """
    if not scores:
        return []
    device = scores[0].device
    flat = torch.cat([score.detach().to(device) for score in scores]).cpu()  # (sum of r_i,)
    owners = [(i, j) for i, score in enumerate(scores) for j in range(score.shape[0])]
    spare = [score.shape[0] - min_r for score in scores]
    chosen: list[list[int]] = [[] for _ in scores]
    left = total_count
    for position in flat.argsort(stable=True).tolist():
        if left <= 0:
            break
        matrix, component = owners[position]
        if len(chosen[matrix]) < spare[matrix]:
            chosen[matrix].append(component)
            left -= 1
    return [
        torch.tensor(indices, dtype=torch.int64, device=score.device)
        for indices, score in zip(chosen, scores, strict=True)
    ]
