"""What a component is worth and how survivors make up for it, from all that is known of a matrix.

One name for each criterion and recovery, over the functions of :mod:`.scores` and :mod:`.recovery`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_peft.pruning import linalg, recovery, scores


@dataclass(frozen=True)
class Matrices:
    """Adapters of one shape and what was seen of them since the last removal.

    Attributes:
        B: (n, d_out, r).
        A: (n, r, d_in).
        grad_B: (n, d_out, r).
        grad_A: (n, r, d_in).
        C: Second moment E[z zᵀ] of the rank activations, (n, r, r); None where it was not watched.
        H_B: Mean of grad_Bᵀ grad_B over steps, (n, r, r); None where it was not summed.
        H_A: Mean of grad_A grad_Aᵀ over steps, (n, r, r); likewise.
    """

    B: Tensor
    A: Tensor
    grad_B: Tensor
    grad_A: Tensor
    C: Tensor | None = None
    H_B: Tensor | None = None
    H_A: Tensor | None = None

    def select(self, members: Sequence[int]) -> Matrices:
        """Some of the n matrices."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        known = {name: value[members] for name, value in values.items() if value is not None}
        return Matrices(**known)


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # the strategy sums what its criterion and recovery need
    return tensor


# Criteria: of matrices, eps (added to the diagonal of H, absolute) and damping (relative).


def gradient(m: Matrices, eps: float, damping: float) -> Tensor:
    """PrunedLoRA's score, (n, r)."""
    return scores.gradient_score(m.B, m.grad_B, m.A, m.grad_A, eps)


def llm_pruner_element1(m: Matrices, eps: float, damping: float) -> Tensor:
    """LLM-Pruner's first-order sum over elements, (n, r)."""
    return scores.llm_pruner_element1(m.B, m.grad_B, m.A, m.grad_A)


def llm_pruner_element2(m: Matrices, eps: float, damping: float) -> Tensor:
    """LLM-Pruner's second-order sum over elements, (n, r)."""
    return scores.llm_pruner_element2(m.B, m.grad_B, m.A, m.grad_A)


def llm_pruner_taylor2(m: Matrices, eps: float, damping: float) -> Tensor:
    """LLM-Pruner's second-order score of whole components, (n, r)."""
    return scores.llm_pruner_taylor2(m.B, m.grad_B, m.A, m.grad_A)


def wanda(m: Matrices, eps: float, damping: float) -> Tensor:
    """Wanda's weights times activations, (n, r)."""
    return scores.wanda_score(m.B, _known(m.C))


def sparsegpt(m: Matrices, eps: float, damping: float) -> Tensor:
    """SparseGPT's error of the layer's output, (n, r)."""
    return scores.sparsegpt_score(m.B, _known(m.C), damping)


def magnitude(m: Matrices, eps: float, damping: float) -> Tensor:
    """‖B_j‖ ‖A_j‖, (n, r)."""
    return scores.magnitude_score(m.B, m.A)


def random(m: Matrices, eps: float, damping: float) -> Tensor:
    """Drawn from torch's global stream, (n, r)."""
    return scores.random_score(m.B)


Criterion = Literal[
    "gradient",
    "llm_pruner_element1",
    "llm_pruner_element2",
    "llm_pruner_taylor2",
    "wanda",
    "sparsegpt",
    "magnitude",
    "random",
]
CRITERIA: dict[str, Callable[[Matrices, float, float], Tensor]] = {
    name: globals()[name] for name in get_args(Criterion)
}
WATCH_ACTIVATIONS = ("wanda", "sparsegpt")

# Recoveries: changes of B (n, d_out, r) and A (n, r, d_in); what is removed may take any value.


def activation_change(m: Matrices, gone: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Least squares on the layer's own output, for removed components (n, k)."""
    change = recovery.activation_recovery(m.B, _known(m.C), gone, damping)
    return change, torch.zeros_like(m.A)


def gradient_change(
    m: Matrices, gone: Tensor, damping: float, max_ratio: float
) -> tuple[Tensor, Tensor]:
    """The minimiser of the second-order model, for removed components (n, k), bounded."""
    H_B, H_A = linalg.damped(_known(m.H_B), damping), linalg.damped(_known(m.H_A), damping)
    change_B = recovery.gradient_recovery(m.B, m.grad_B, H_B, gone, max_ratio)
    change_A = recovery.gradient_recovery(m.A.mT, m.grad_A.mT, H_A, gone, max_ratio)
    return change_B, change_A.mT
