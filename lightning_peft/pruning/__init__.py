"""The mathematics of pruning: scores, recovery, schedules and layer importance.

Pure functions of tensors, batched over leading dimensions, with torch as the only import. The
strategies hold the state and call them.
"""

from __future__ import annotations

from lightning_peft.pruning.importance import (
    layers_to_keep,
    shares,
    shares_by_kind,
)
from lightning_peft.pruning.linalg import damped, gram, inverse_spd, survivors
from lightning_peft.pruning.recovery import activation_recovery, bounded, gradient_recovery
from lightning_peft.pruning.schedule import (
    last_event_step,
    left_after,
    prune_due,
    rank_at,
    select_global,
    select_per_matrix,
)
from lightning_peft.pruning.scores import (
    gradient_score,
    llm_pruner_element1,
    llm_pruner_element2,
    llm_pruner_taylor2,
    magnitude_score,
    random_score,
    sparsegpt_score,
    wanda_score,
)

__all__ = [
    "activation_recovery",
    "bounded",
    "damped",
    "gradient_recovery",
    "gradient_score",
    "gram",
    "inverse_spd",
    "last_event_step",
    "layers_to_keep",
    "left_after",
    "llm_pruner_element1",
    "llm_pruner_element2",
    "llm_pruner_taylor2",
    "magnitude_score",
    "prune_due",
    "random_score",
    "rank_at",
    "select_global",
    "select_per_matrix",
    "shares",
    "shares_by_kind",
    "sparsegpt_score",
    "survivors",
    "wanda_score",
]
