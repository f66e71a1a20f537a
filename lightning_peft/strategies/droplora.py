"""DropLoRA (Zhang 2025, https://arxiv.org/abs/2508.17337): a random mask over the rank dimension.

``y = W x + s · B (M ⊙ A x)`` in training (equation 2), plain LoRA in eval.

The paper's equation draws one mask for each layer and iteration; the authors' code, which gave the
published numbers, is ``nn.Dropout`` on the rank activations: a draw for each token and component,
rescaled. These are different methods, so ``mask`` says which. The paper writes Bernoulli(p) with p
the "pruning probability"; its text and code drop with probability p, and so does this.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_peft.adapters.dropout import draw
from lightning_peft.adapters.gates import Gate
from lightning_peft.errors import UserError
from lightning_peft.strategies.base import AdapterStrategy, MakeGate

Mask = Literal["token", "sample", "batch", "step", "learned"]


def _check(p: float, mask: str = "token", masks: Sequence[str] = ("token",)) -> None:
    if not 0 <= p < 1:
        raise UserError(f"p must lie in [0, 1), got {p}.")
    if mask not in masks:
        raise UserError(f"mask must be token, sample, batch, step or learned, got {mask!r}.")


class RankDropout(Gate):
    """A random mask over components, drawn at every forward from torch's global stream.

    The identity in eval.

    Args:
        r: Rank.
        p: Probability of dropping a component, in [0, 1).
        mask: What one draw covers: a ``token``, a ``sample`` (all tokens of one sequence), or a
            ``batch`` (one forward).
        rescale: Divide what is kept by 1 - p, so that the mean over draws is the unmasked
            activation.

    Raises:
        UserError: If ``p`` lies outside [0, 1) or ``mask`` is none of these.
    """

    def __init__(
        self,
        r: int,
        p: float = 0.3,
        mask: Literal["token", "sample", "batch"] = "token",
        rescale: bool = True,
    ) -> None:
        super().__init__()
        _check(p, mask, ("token", "sample", "batch"))
        self.p, self.per = p, mask
        self.kept_value = 1 / (1 - p) if rescale else 1.0

    def forward(self, z: Tensor) -> Tensor:
        """Mask rank activations.

        Args:
            z: (..., r); with ``sample`` the first dimension is the batch.

        Returns:
            (..., r).
        """
        if not self.training or self.p == 0:
            return z
        if self.per == "batch":
            return z * self._draw_components(z.shape[-1]).to(z).mul_(self.kept_value)
        one_each = (z.shape[0], *(1 for _ in z.shape[1:-1]), z.shape[-1])
        shape = z.shape if self.per == "token" else one_each
        return z * draw(shape, 1 - self.p, z.device).to(z.dtype).mul_(self.kept_value)

    def choose(self, rank: int) -> tuple[Tensor, float] | None:
        """Draw the components of one forward, where all its tokens share them."""
        if not self.training or (self.p > 0 and self.per != "batch"):
            return None
        if self.p == 0:
            return torch.arange(rank), 1.0
        return self._draw_components(rank).nonzero()[:, 0], self.kept_value

    def _draw_components(self, rank: int) -> Tensor:
        """Ones and zeros, (rank,), on the CPU: finding the ones elsewhere would wait for it."""
        return draw((rank,), 1 - self.p, torch.device("cpu"))

    def extra_repr(self) -> str:
        """What ``print(model)`` tells."""
        return f"p={self.p}, mask={self.per}"


class StepMask(Gate):
    """A random mask over components that holds for one optimizer step; the identity in eval.

    Args:
        r: Rank.
        p: Probability of dropping a component, in [0, 1).
        rescale: Divide what is kept by 1 - p.

    Raises:
        UserError: If ``p`` lies outside [0, 1).
    """

    mask: Tensor

    def __init__(self, r: int, p: float = 0.3, rescale: bool = True) -> None:
        super().__init__()
        _check(p)
        self.p = p
        self.kept_value = 1 / (1 - p) if rescale else 1.0
        # A buffer, since it outlives a forward: recomputation and resume must find the same draw.
        self.register_buffer("mask", torch.empty(r))
        self._found: tuple[Tensor, int, Tensor] | None = None
        self.new_step()

    def new_step(self) -> None:
        """Draw the mask of the next optimizer step on the host, which has to know how many pass."""
        if self.mask.is_meta:
            return
        drawn = torch.empty(self.mask.shape, dtype=self.mask.dtype, device="cpu")
        kept = drawn.bernoulli_(1 - self.p).nonzero()[:, 0]
        self.mask.copy_(drawn.mul_(self.kept_value), non_blocking=True)
        self._found = self.mask, self.mask._version, kept.to(self.mask.device, non_blocking=True)

    def forward(self, z: Tensor) -> Tensor:
        """Mask rank activations, (..., r) to (..., r)."""
        return z * self.mask.to(z.dtype) if self.training else z

    def choose(self, rank: int) -> tuple[Tensor, float] | None:
        """The components of this optimizer step."""
        if not self.training:
            return None
        # Found once for each draw, whoever changed the mask: a step, a removal, a load.
        mask, found = self.mask, self._found
        if found is None or found[0] is not mask or found[1] != mask._version:
            self._found = found = mask, mask._version, mask.nonzero()[:, 0]
        return found[2], self.kept_value

    def extra_repr(self) -> str:
        """What ``print(model)`` tells."""
        return f"p={self.p}"


class LearnedRankMask(Gate):
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

    def forward(self, z: Tensor) -> Tensor:
        """Mask rank activations, (..., r) to (..., r)."""
        if not self.training:
            return z
        soft = self.logits[: z.shape[-1]].sigmoid()  # dead components may stand behind
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
        UserError: If ``p`` lies outside [0, 1) or ``mask`` is none of these.
    """

    def __init__(
        self,
        r: int = 8,
        p: float = 0.3,
        mask: Mask = "token",
        rescale: bool = True,
        **lora: Any,
    ) -> None:
        if "rank_gate" in lora:
            raise UserError(f"{type(self).__name__} brings its own rank_gate; give it to LoRA.")
        _check(0.0 if mask == "learned" else p, mask, get_args(Mask))
        gate: MakeGate
        if mask == "learned":
            gate = LearnedRankMask
        elif mask == "step":
            gate = functools.partial(StepMask, p=p, rescale=rescale)
        else:
            gate = functools.partial(RankDropout, p=p, mask=mask, rescale=rescale)
        super().__init__(r=r, rank_gate=gate, **lora)
        self.p, self.mask, self.rescale = p, mask, rescale
