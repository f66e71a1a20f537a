"""Which matrices get components: in IncreLoRA's growth, and in exchange for others in ElaLoRA.

Ties go to the matrix that comes first, so that all processes decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def change_sensitivity(change: Tensor, gradient: Tensor) -> Tensor:
    """`Σ|ΔW ⊙ ∂L/∂ΔW| / √(d_out · d_in)`, IncreLoRA's sensitivity of a matrix, a scalar.

    Args:
        change: ΔW, `(d_out, d_in)`.
        gradient: of the loss by it, `(d_out, d_in)`.
    """
    return (change * gradient).abs().sum() / math.sqrt(change.numel())


def grown(
    scores: Sequence[float], ranks: Sequence[int], top_h: int, count: int, max_r: int, left: int
) -> list[int]:
    """How many components each matrix gets at one event of IncreLoRA.

    Args:
        scores: importance of each matrix.
        ranks: components of each.
        top_h: how many of those that may still grow get some, the most important ones.
        count: for each of them.
        max_r: the most components of a matrix.
        left: what the budget has left for all together.

    Returns:
        For each matrix.
    """
    given = [0] * len(scores)
    able = [i for i, rank in enumerate(ranks) if rank < max_r]
    for i in sorted(able, key=lambda i: -scores[i])[:top_h]:
        given[i] = min(count, max_r - ranks[i], left)
        left -= given[i]
    return given


def falling_count(step: int, b: int, init_warmup: int, final_warmup: int, total_step: int) -> int:
    """How many components ElaLoRA exchanges: `b` less the cube of the time that has passed of it.

    Args:
        step: optimizer step, 0-based.
        b: at the end of the warm-up.
        init_warmup: steps of the warm-up.
        final_warmup: steps of the stabilisation, in which it is 0.
        total_step: optimizer steps of the whole run.
    """
    passed = (step - init_warmup) / (total_step - final_warmup - init_warmup)
    return round(b - b * min(max(passed, 0), 1) ** 3)


def exchanged(
    scores: Sequence[Tensor], count: int, k: int, max_r: int
) -> tuple[list[list[int]], list[int]]:
    """Which components leave which matrix, and how many each gets, at one event of ElaLoRA.

    Each matrix offers its `k` least important components, but never its last one. Of all that are
    offered the `count` least important leave. For each of the `count` most important ones its
    matrix gets one more: a matrix of whose components even the least matters has too few.

    Args:
        scores: importance of the components of each matrix, `(r_i,)`.
        count: how many leave; fewer where fewer are offered, or cannot be put elsewhere.
        k: how many of a matrix may leave, and how many it may get.
        max_r: the most components of a matrix.

    Returns:
        For each matrix the indices of those that leave, increasing, and how many it gets.
    """
    offered = []
    for matrix, score in enumerate(scores):
        own = sorted((value, i) for i, value in enumerate(score.tolist()))
        offered += [(value, matrix, i) for value, i in own[: min(k, len(own) - 1)]]
    for tried in range(min(count, len(offered)), 0, -1):
        removed: list[list[int]] = [[] for _ in scores]
        for _, matrix, i in sorted(offered)[:tried]:
            removed[matrix].append(i)
        added = [0] * len(scores)
        for _, matrix, _ in sorted(offered, key=lambda entry: (-entry[0], entry[1])):
            room = max_r - len(scores[matrix]) + len(removed[matrix]) - added[matrix]
            if room > 0 and sum(added) < tried:
                added[matrix] += 1
        if sum(added) == tried:
            return [sorted(indices) for indices in removed], added
    return [[] for _ in scores], [0] * len(scores)
