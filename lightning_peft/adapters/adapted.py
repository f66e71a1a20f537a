"""What everything else asks of an adapted weight, whatever its form.

Attaching, watching, shrinking, merging, saving, exporting and counting know :class:`AdaptedLayer`
only. A new form (another product than LoRA's, a rotation, vectors) is one subclass in one file:
:class:`lightning_peft.adapters.LoRALinear` is the first; ``examples/oft.py`` and
``examples/loha.py`` are two more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import distributed
from lightning_peft.adapters.dense import dense_weight
from lightning_peft.adapters.gates import Gate
from lightning_peft.errors import UserError


@dataclass(frozen=True)
class PeftForm:
    """How PEFT stores one adapted layer.

    Attributes:
        tensors: By what follows the layer's full name (``lora_A.weight``).
        config: Entries of ``adapter_config.json`` beyond plain LoRA's, the same for all layers but
            for ``r`` and ``alpha``; ``peft_type`` among them where it is not ``LORA``.
        shared: What PEFT stores once for all layers, by what follows ``base_model.``.
        scaling: Of LoRA's product, ``alpha / rank`` in PEFT.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: float = 1.0


class AdaptedLayer(nn.Module):
    """A frozen linear with trained parameters beside it.

    A subclass has ``forward`` and :meth:`merged_weight`; everything else has a default that
    follows from these. It must equal its base before training.

    Args:
        base: The linear to adapt, used as it is.

    Attributes:
        r: Rank at the start; None for a form without ranks.
        rank: How many components are alive; None for a form without ranks.
        max_r: How many it may have; None for no more than ``r``.
        shares: Whether another layer trains the same components.
        resized: Whether the base has lost rows or columns, so that the adapter fits no other one.
        gate: What stands on the rank dimension; None where nothing does.
    """

    r: int | None = None
    rank: int | None = None
    max_r: int | None = None
    shares: bool = False
    resized: bool = False

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.gate: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight, which some models read for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """This layer's parameters without its base's."""
        base = {id(p) for p in self.base.parameters()}
        return (p for p in self.parameters() if id(p) not in base)

    @property
    def sharing_key(self) -> int:
        """The same number for layers that share their adapter."""
        return id(next(self.own_parameters(), self))

    # What the layer does, in eval form.

    def merged_weight(self, base_weight: Tensor) -> Tensor:
        """The one weight that does in eval what base and adapter do together.

        Args:
            base_weight: The base's weight as it stands, dense, (d_out, d_in).

        Returns:
            (d_out, d_in), float32 at least.
        """
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """ΔW, the change against the base's weight, in eval form, (d_out, d_in)."""
        weight = dense_weight(self.base)
        return self.merged_weight(weight) - weight

    @torch.no_grad()
    def delta_sq_norm(self, x: Tensor) -> Tensor:
        """‖ΔW x‖² for each token, in eval form.

        Args:
            x: Input, (..., d_in).

        Returns:
            (...,), never negative.
        """
        delta = self.delta_weight()
        return F.linear(x.to(delta.dtype), delta).square().sum(-1)

    # What can be removed, counted and saved.

    def components(self) -> list[tuple[nn.Parameter, int]]:
        """The parameters that hold a slice for each component, with the dimension of that slice."""
        return []

    def features(self, dim: int) -> list[tuple[nn.Parameter, int]]:
        """The parameters that hold a slice for each output (0) or input (1), with its dimension.

        A form that does not say so cannot lose rows and columns.
        """
        raise UserError(
            f"{type(self).__name__} does not say what it holds for each row and column, so that "
            "none can leave."
        )

    def trained_values(self, parameter: nn.Parameter) -> int:
        """How many values of one of this layer's parameters train.

        Fewer than it has where a mask is fixed, or dead components stand behind the living ones.
        """
        shape = distributed.shape(parameter)
        for own, dim in self.components():
            if own is parameter:
                return shape.numel() // max(shape[dim], 1) * (self.rank or 0)
        return shape.numel()

    def before_loading(self, state: Mapping[str, Tensor]) -> None:
        """Make ready for saved tensors, by their names in this layer."""

    def after_loading(self) -> None:
        """Take notice of the tensors that were loaded, and have the gate do so."""
        for part in self.gate.modules() if self.gate is not None else ():
            if isinstance(part, Gate):
                part.after_loading()

    def peft(self) -> PeftForm | None:
        """How PEFT stores this layer; None where PEFT has no such form."""
        return None
