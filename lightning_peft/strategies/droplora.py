"""DropLoRA (Zhang 2025, https://arxiv.org/abs/2508.17337): a random mask over the rank dimension.

``y = W x + s · B (M ⊙ A x)`` in training (equation 2), plain LoRA in eval.

The paper's equation draws one mask for each layer and iteration; the authors' code, which gave the
published numbers, is ``nn.Dropout`` on the rank activations: a draw for each token and component,
rescaled. These are different methods, so ``mask`` says which. The paper writes Bernoulli(p) with p
the "pruning probability"; its text and code drop with probability p, and so does this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.shrink import replace_tensor
from lightning_peft.strategies.base import AdapterStrategy

Mask = Literal["token", "sample", "batch", "step", "learned"]


class RankDropout(nn.Module):
    """A random mask over components, drawn from torch's global stream; the identity in eval.

    Args:
        r: Rank.
        p: Probability of dropping a component, in [0, 1).
        mask: What one draw covers: a ``token``, a ``sample`` (all tokens of one sequence), a
            ``batch`` (one forward), or an optimizer ``step`` with all its micro-batches.
        rescale: Divide what is kept by 1 - p, so that the mean over draws is the unmasked
            activation.

    Raises:
        ValueError: If ``p`` lies outside [0, 1) or ``mask`` is none of these.
    """

    mask: Tensor

    def __init__(
        self,
        r: int,
        p: float = 0.3,
        mask: Literal["token", "sample", "batch", "step"] = "token",
        rescale: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must lie in [0, 1), got {p}.")
        if mask not in ("token", "sample", "batch", "step"):
            raise ValueError(f"mask must be token, sample, batch, step or learned, got {mask!r}.")
        self.p, self.per = p, mask
        self.kept_value = 1 / (1 - p) if rescale else 1.0
        if mask == "step":
            # A buffer, since it outlives a forward: recomputation and resume must find the same
            # draw.
            self.register_buffer("mask", self._draw(torch.empty(r)))

    def _draw(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).bernoulli_(1 - self.p).mul_(self.kept_value)

    @property
    def new_step(self) -> Callable[[], None]:
        """Draw the mask of the next optimizer step; only a step mask has this, and needs it."""
        if self.per != "step":
            raise AttributeError(f"a {self.per} mask has no new_step")
        return self._redraw

    def _redraw(self) -> None:
        self.mask.copy_(self._draw(self.mask))

    def keep(self, indices: Tensor) -> None:
        """Lose the components that are not at ``indices``."""
        if self.per == "step":
            self.mask = self.mask[indices.to(self.mask.device)]

    def forward(self, z: Tensor) -> Tensor:
        """Mask rank activations.

        Args:
            z: (..., r); with ``sample`` the first dimension is the batch.

        Returns:
            (..., r).
        """
        if not self.training or self.p == 0:
            return z
        if self.per == "step":
            return z * self.mask.to(z.dtype)
        shape = {
            "token": z.shape,
            "sample": (z.shape[0], *(1 for _ in z.shape[1:-1]), z.shape[-1]),
            "batch": z.shape[-1:],
        }[self.per]
        return z * self._draw(z.new_empty(shape))

    def extra_repr(self) -> str:
        """What ``print(model)`` tells."""
        return f"p={self.p}, mask={self.per}"


class LearnedRankMask(nn.Module):
    """The authors' undocumented learned mask: a logit for each component.

    A component is kept where sigmoid(logit) ≥ 0.5; the gradient passes straight through to the
    sigmoid; what is kept is divided by the kept share. Logits start at 0, so all are kept. As in
    the authors' code the mask is off in eval, and the logits are trained like any other parameter.

    Args:
        r: Rank.
    """

    def __init__(self, r: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(r))

    def keep(self, indices: Tensor) -> None:
        """Lose the components that are not at ``indices``."""
        indices, grad = indices.to(self.logits.device), self.logits.grad
        kept = self.logits.detach()[indices]
        replace_tensor(self.logits, kept, None if grad is None else grad[indices])

    def forward(self, z: Tensor) -> Tensor:
        """Mask rank activations, (..., r) to (..., r)."""
        if not self.training:
            return z
        soft = self.logits.sigmoid()
        hard = (soft >= 0.5).to(soft.dtype)
        mask = hard.detach() + soft - soft.detach()
        return z * (mask / hard.mean().clamp_min(1e-8)).to(z.dtype)


class DropLoRA(AdapterStrategy):
    """LoRA with a random mask between A and B.

    Args:
        r: Rank.
        p: Probability of dropping a component, in [0, 1); the paper's best is 0.3. Unused by the
            learned mask.
        mask: What one draw covers: ``token`` (the authors' code, and the default, since the
            published numbers used it), ``sample``, ``batch``, ``step`` (the paper's equation), or
            ``learned``.
        rescale: Divide what is kept by 1 - p.
        lora: The arguments that all strategies share.

    Raises:
        ValueError: If ``p`` lies outside [0, 1) or ``mask`` is none of these.
    """

    def __init__(
        self,
        r: int = 8,
        p: float = 0.3,
        mask: Mask = "token",
        rescale: bool = True,
        **lora: Any,
    ) -> None:
        gate = (
            LearnedRankMask
            if mask == "learned"
            else functools.partial(RankDropout, p=p, mask=mask, rescale=rescale)
        )
        with torch.random.fork_rng(devices=[]):
            gate(1)  # a wrong value is told now, not at attach
        super().__init__(r=r, rank_gate=gate, **lora)
