"""LoRA-XS (Bałazy et al. 2024, https://arxiv.org/abs/2405.17604): r² trained values for each layer.

``y = W x + s B R A x``. With ``W = U S Vᵀ``, ``A = S_r V_rᵀ`` and ``B = U_r`` are frozen at the r
largest singular values. R (r, r) between them trains and starts at ``N(0, σ²)``, σ = 10⁻⁵, so that
the layer is its base to rounding.

Deviations: the authors' code decomposes Wᵀ into ``(U S) Vᵀ`` and takes the first factor for A, so
the singular values stand in A, as here. Read for ``W x`` instead, the same formula puts them into B
(PEFT's TinyLoRA does). Both reach the same matrices, at other speeds along R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.dense import dense_weight
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.errors import UserError
from lightning_peft.pruning.singular_vectors import truncated_svd
from lightning_peft.strategies.base import AdapterStrategy


class XSLinear(LoRALinear):
    """LoRA of frozen factors with a trained matrix between: ``y = W x + s B R gate(A x)``.

    Everything else sees ``B R`` in B's place, and so does PEFT, for which this is plain LoRA.

    Args:
        base: The linear to adapt.
        lora: The arguments of :class:`LoRALinear`.
    """

    def __init__(self, base: nn.Module, *lora: Any, **more: Any) -> None:
        super().__init__(base, *lora, **more)
        for matrix, _ in super().components():
            matrix.requires_grad_(False)
        like, _ = super().components()[0]
        self.lora_R = nn.Parameter(like.new_zeros(self.r, self.r))

    def reset_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Nothing is drawn: A and B are the weight's (:meth:`start_at`)."""

    @torch.no_grad()
    def start_at(self, factor_B: Tensor, factor_A: Tensor) -> None:
        """Set the frozen factors, (d_out, r) and (r, d_in)."""
        for (matrix, _), value in zip(super().components(), (factor_A, factor_B), strict=True):
            matrix.copy_(value)

    @property
    def active_B(self) -> Tensor:
        """B R, (d_out, r)."""
        return super().active_B @ self.lora_R

    def components(self) -> list[tuple[nn.Parameter, int]]:
        """None: R mixes them all."""
        return []


class LoRAXS(AdapterStrategy):
    """A trained r x r matrix between the singular vectors of each weight.

    Args:
        r: Rank; a layer trains its square.
        lora_alpha: Numerator of the scaling; r when None.
        sigma: Standard deviation at which R starts; not below 0.
        niter: Iterations of a randomised decomposition, seconds instead of minutes for a large
            model; None for the exact one.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range; at attach, if a weight has fewer than r
            singular values.
    """

    needs = frozenset({"weights at attach"})
    layer_class = XSLinear

    def __init__(
        self,
        r: int = 16,
        lora_alpha: float | None = None,
        sigma: float = 1e-5,
        niter: int | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, lora_alpha=r if lora_alpha is None else lora_alpha, **lora)
        if not 0 <= sigma < 1:
            raise UserError(f"sigma must lie in [0, 1), got {sigma}.")
        if niter is not None and niter < 1:
            raise UserError(f"niter must be at least 1, got {niter}.")
        self.sigma, self.niter = sigma, niter

    def initialize(self, layer: XSLinear) -> None:
        """Freeze the factors at the weight's singular vectors, and draw R."""
        if layer.lora_R.is_meta:
            return
        left, values, right = truncated_svd(dense_weight(layer.base), layer.r, self.niter)
        layer.start_at(left, values[:, None] * right)
        nn.init.normal_(layer.lora_R, std=self.sigma)
