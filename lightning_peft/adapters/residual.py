"""An adapted linear that begins with a part of the base's weight: ``y = (W - s B₀A₀) x + s B A x``.

A and B start at the factors ``A₀``, ``B₀`` of that part, and the base keeps the residual. Against
the original weight the change is ``s (B A - B₀ A₀)``, a LoRA of twice the rank, which is how it is
exported. The factors are saved with the adapter, so that a resumed run, on a base as it was loaded,
takes the same part out of it, bit for bit, without a second factorisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.dense import is_quantized
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.errors import UserError


class ResidualLinear(LoRALinear):
    """LoRA that starts at a part of the base's weight, which the base loses.

    Args:
        base: The linear to adapt; its weight is changed.
        lora: The arguments of :class:`LoRALinear`.

    Raises:
        UserError: If the base is quantized.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, base: nn.Module, *lora: Any, **more: Any) -> None:
        if is_quantized(base):
            raise UserError(
                f"a {type(base).__name__} cannot lose a part of its weight without rounding the "
                "rest to its few levels: give the base in full precision, or another adapter."
            )
        super().__init__(base, *lora, **more)
        self.register_buffer("start_A", torch.zeros_like(self.lora_A))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B))
        self._taken = False
        self.register_load_state_dict_pre_hook(_before)
        self.register_load_state_dict_post_hook(_after)

    @torch.no_grad()
    def start_at(self, factor_B: Tensor, factor_A: Tensor) -> None:
        """Move ``s · factor_B @ factor_A`` from the base to the adapter, before training.

        Args:
            factor_B: (d_out, r).
            factor_A: (r, d_in).
        """
        for parameter, start, value in (
            (self.lora_A, self.start_A, factor_A),
            (self.lora_B, self.start_B, factor_B),
        ):
            parameter.copy_(value)
            start.copy_(value)
        self._take(1)

    @torch.no_grad()
    def _take(self, sign: int) -> None:
        weight: nn.Parameter = self.base.weight  # type: ignore[assignment]
        part = self.scaling * (self.start_B @ self.start_A)
        changed = (distributed.value(weight).to(part.dtype) - sign * part).to(weight.dtype)
        if distributed.is_cut(weight):
            distributed.write(weight, changed)
        else:
            weight.data = changed
        self._taken = sign > 0

    def factors(self) -> tuple[Tensor, Tensor]:
        """The change against the original weight: ``left`` (d_out, 2 r), ``right`` (2 r, d_in)."""
        left, right = self.change()
        lost = -self.scaling * self.start_B
        return torch.cat([left, lost], 1), torch.cat([right, self.start_A])

    def before_loading(self, state: Mapping[str, Tensor]) -> None:
        """Before other factors are loaded, give the base its own back."""
        present = {"start_A": self.start_A, "start_B": self.start_B}
        same = all(torch.equal(state.get(n, p).to(p), p) for n, p in present.items())
        if self._taken and not same:
            self._take(-1)

    def after_loading(self) -> None:
        """Take the part that was loaded out of the base."""
        super().after_loading()
        if not self._taken and bool(self.start_A.any()):
            self._take(1)


def _before(layer: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(layer, ResidualLinear)
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    layer.before_loading(own)


def _after(layer: nn.Module, keys: Any) -> None:
    assert isinstance(layer, ResidualLinear)
    layer.after_loading()
