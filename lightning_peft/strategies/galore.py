"""GaLore (Zhao et al. 2024, https://arxiv.org/abs/2403.03507): full weights, low-rank gradients.

The gradient of each weight is projected onto its r leading singular vectors, AdamW works there, and
its update is projected back: ``W ← W - η scale · P AdamW(Pᵀ G)`` (algorithm 2, Pᵀ on the shorter
side). The projector is computed anew every ``update_proj_gap`` steps; moments are kept, as in the
authors' code.

An optimizer and not an adapter: the weights of the targets train, and ``modules_to_save`` beside
them by plain AdamW. The authors train everything else too, which is ``modules_to_save`` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_peft.errors import UserError
from lightning_peft.strategies.signatures import MakeOptimizer, NamedParameters
from lightning_peft.strategies.trained_weights import TrainedWeights


class GaLore(TrainedWeights):
    """Trains the targets' weights with low-rank optimizer state.

    Args:
        r: Rank of the projected gradients.
        update_proj_gap: Optimizer steps between two projectors (T), at least 1.
        scale: Factor of the update that is projected back.
        target_modules: The linears whose weights train.
        exclude_modules: Taken away from the targets.
        modules_to_save: Modules that train in full beside them, without projection.

    Raises:
        UserError: If ``update_proj_gap`` is below 1; with an optimizer other than AdamW.
    """

    needs = frozenset({"whole weights", "whole steps"})

    def __init__(
        self,
        r: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
    ) -> None:
        super().__init__(target_modules, exclude_modules, modules_to_save, r)
        if update_proj_gap < 1:
            raise UserError(f"update_proj_gap must be at least 1, got {update_proj_gap}.")
        self.update_proj_gap, self.scale = update_proj_gap, scale

    def optimizer(self, named_parameters: NamedParameters, default: MakeOptimizer) -> Optimizer:
        """AdamW with the configured rate, betas, eps and weight decay, on projected gradients."""
        params = [parameter for _, parameter in named_parameters]
        plain = default(params)
        if not isinstance(plain, AdamW):
            raise UserError(
                f"GaLore projects the gradients that AdamW sees, model.optimizer is "
                f"{type(plain).__name__}; give torch.optim.AdamW."
            )
        targets = {id(linear.weight) for linear in self._targets.values()}
        projected = {"rank": self.r, "update_proj_gap": self.update_proj_gap, "scale": self.scale}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if id(p) in targets], **projected},
            {"params": [p for p in params if id(p) not in targets], "rank": None},
        ]
        keys = ("lr", "betas", "eps", "weight_decay")
        return GaLoreAdamW(
            [group for group in groups if group["params"]], **{k: plain.defaults[k] for k in keys}
        )


class GaLoreAdamW(Optimizer):
    """AdamW on projected gradients, as the authors' ``galore_torch.AdamW`` computes it.

    Weight decay follows the update. In groups with a ``rank`` the shorter side of each gradient is
    projected, so that moments are (rank, d_in) where d_out < d_in and (d_out, rank) elsewhere.

    Args:
        params: Parameters, or groups with ``rank``, ``update_proj_gap`` and ``scale``.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "rank": None, "update_proj_gap": 1, "scale": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        done = int(state.get("step", 0))
        if group["rank"] is not None:
            if done % group["update_proj_gap"] == 0:
                state["projector"] = projector(grad, group["rank"])
            grad = project(grad, state["projector"])
        if not done:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["step"] = torch.tensor(float(done + 1))
        beta1, beta2 = group["betas"]
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = math.sqrt(1 - beta2 ** (done + 1)) / (1 - beta1 ** (done + 1))
        update = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
        if group["rank"] is not None:
            update = project_back(update, state["projector"], parameter.shape) * group["scale"]
        parameter.add_(update, alpha=-group["lr"] * correction)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def projector(grad: Tensor, r: int) -> Tensor:
    """The r leading singular vectors of the shorter side.

    Args:
        grad: (d_out, d_in).
        r: Rank.

    Returns:
        Right ones (r, d_in) where d_out ≥ d_in, else left ones (d_out, r).
    """
    left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    tall = grad.shape[0] >= grad.shape[1]
    return (right[:r] if tall else left[:, :r]).to(grad.dtype).contiguous()


def project(grad: Tensor, vectors: Tensor) -> Tensor:
    """A gradient (d_out, d_in) in the vectors' span: (d_out, r) or (r, d_in)."""
    return grad @ vectors.T if grad.shape[0] >= grad.shape[1] else vectors.T @ grad


def project_back(update: Tensor, vectors: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`project` made small, back in the weight's shape."""
    return update @ vectors if shape[0] >= shape[1] else vectors @ update
