"""The adapted linear layer: ``y = W x + s · B gate(A dropout(x))``.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3), with one addition: a *gate*,
any module that stands between A and B and acts on the rank dimension. Pruning ideas live in the
gate or in which components (row ``A_j``, column ``B_j``) exist; the layer itself knows no method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import distributed
from lightning_peft.adapters.dropout import InputDropout
from lightning_peft.adapters.functional import add_up, base_and_down, is_plain, lora_linear
from lightning_peft.adapters.gates import chosen_components, gate_diagonal
from lightning_peft.errors import UserError


def in_autocast(x: Tensor, *lora: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast's own products would have them in, where it is on."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, *lora
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(tensor.to(dtype) for tensor in (x, *lora))


_place: ContextVar[torch.device | None] = ContextVar("place", default=None)


@contextmanager
def adapters_on(device: torch.device) -> Iterator[None]:
    """Make adapters of a base on the meta device on another, as if it were loaded there."""
    before = _place.set(device)
    try:
        yield
    finally:
        _place.reset(before)


def adapter_device(weight: Tensor) -> torch.device:
    """Where what stands beside a base's weight is made."""
    place = _place.get()
    return weight.device if place is None or not weight.is_meta else place


class LoRALinear(nn.Module):
    """A frozen linear with a trained low-rank change beside it.

    Components that are alive stand in front: ``rank`` of them are computed, and where an engine
    cannot change a parameter's size, the rest of ``lora_A`` and ``lora_B`` is dead weight behind
    them.

    Args:
        base: The linear to adapt: ``nn.Linear`` or a subclass (quantized ones too). It is used as
            it is.
        r: Initial rank, at least 1.
        lora_alpha: Numerator of the scaling, ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with
            ``use_rslora``). The scaling stays what it is at rank ``r`` when components are removed.
        lora_dropout: Probability of dropping an element of the input x, in training.
        use_rslora: Rank-stabilised scaling (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        gate: A module that maps rank activations (..., r) to (..., r); in eval it must be a fixed
            diagonal, since merging and export fold it into B.
        dtype: Of A and B. ``None``: float32 over a half-precision or quantized base, else the
            base's.

    Raises:
        UserError: If ``r`` is below 1 or ``lora_dropout`` lies outside [0, 1).
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        gate: nn.Module | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise UserError(f"r must be at least 1, got {r}.")
        if not 0 <= lora_dropout < 1:
            raise UserError(f"lora_dropout must lie in [0, 1), got {lora_dropout}.")
        self.base = base
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        weight: Tensor = base.weight  # type: ignore[assignment]
        where: dict[str, Any] = {
            "device": adapter_device(weight),
            "dtype": dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32),
        }
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **where))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **where))
        self.r = self.rank = r
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = InputDropout(lora_dropout) if lora_dropout else nn.Identity()
        self.gate = gate.to(self.lora_A.device) if gate is not None else None
        self.reset_parameters()

    def reset_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Start A and B so that the layer equals its base.

        Args:
            init_lora_weights: As in PEFT. True: A Kaiming-uniform (a = √5), B zero. ``"gaussian"``:
                A normal with standard deviation 1/r, B zero. False: both Kaiming-uniform, which
                changes the function at once and serves tests only.

        Raises:
            UserError: If ``init_lora_weights`` is none of these.
        """
        if init_lora_weights not in (True, False, "gaussian"):
            raise UserError(
                f"init_lora_weights must be true, false or 'gaussian', got {init_lora_weights!r}."
            )
        if self.lora_A.is_meta:
            return
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.lora_A.shape[0])
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init_lora_weights:
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The base's weight, which some models read for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def active_A(self) -> Tensor:
        """The living rows of A, (rank, d_in)."""
        full = self.lora_A.shape[0] == self.rank
        return self.lora_A if full else self.lora_A[: self.rank]

    @property
    def active_B(self) -> Tensor:
        """The living columns of B, (d_out, rank)."""
        full = self.lora_B.shape[1] == self.rank
        return self.lora_B if full else self.lora_B[:, : self.rank]

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``W x + s · B gate(A dropout(x))``.

        Args:
            x: Input, (..., d_in).

        Returns:
            Output, (..., d_out), in the dtype of the base's output.
        """
        if torch.compiler.is_compiling():
            return self._formula(x, self.dropout(x))
        return self._adapted(x, self._draw(x))

    def _draw(self, x: Tensor) -> Tensor | None:
        """What dropout keeps of x, ones and zeros in its shape; None where it keeps all."""
        return self.dropout.mask(x) if isinstance(self.dropout, InputDropout) else None

    def _adapted(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """The layer, with what dropout keeps of its input (ones and zeros, like x)."""
        if torch.compiler.is_compiling():  # a compiler fuses the formula by itself
            return self._formula(x, x)
        x, lora_A, lora_B = in_autocast(x, self.active_A, self.active_B)
        scaling, gate = self.scaling, self.gate
        chosen = chosen_components(gate, self.rank)
        if chosen is not None:  # of what the gate drops nothing is computed
            kept, factor = chosen[0].to(x.device, non_blocking=True), chosen[1]
            lora_A, lora_B = lora_A.index_select(0, kept), lora_B.index_select(1, kept)
            scaling, gate = scaling * factor, None
        drop = self._drop(keep)
        if gate is None:
            return lora_linear(self.base, x, lora_A, lora_B, scaling, *drop)
        y, z = base_and_down(self.base, x, lora_A, *drop)  # (n, d_out), (..., rank)
        return add_up(y, gate(z), lora_B, scaling, in_place=is_plain(self.base, x))

    def _drop(self, keep: Tensor | None) -> tuple[Any, ...]:
        """What the functions are told of dropout: mask, scale of what is kept, application."""
        if keep is None:
            return ()
        assert isinstance(self.dropout, InputDropout)
        return keep, 1 / (1 - self.dropout.p), self.dropout.apply_mask

    def _formula(self, x: Tensor, dropped: Tensor) -> Tensor:
        """The layer as its formula says, for an input and what dropout makes of it."""
        y = self.base(x)
        z = F.linear(dropped.to(self.lora_A.dtype), self.active_A)  # (..., rank)
        if self.gate is not None:
            z = self.gate(z)
        return y + F.linear(z * self.scaling, self.active_B).to(y.dtype)

    def change(self) -> tuple[Tensor, Tensor]:
        """What eval adds to the base as it stands, with scaling and gate folded into the left.

        Returns:
            ``left`` (d_out, rank) and ``right`` (rank, d_in), detached: eval computes
            ``(W + left @ right) x``.
        """
        left = self.active_B.detach() * self.scaling
        if self.gate is not None:
            left = left * gate_diagonal(self.gate, self.rank).to(left)
        return left, self.active_A.detach()

    def factors(self) -> tuple[Tensor, Tensor]:
        """The change against the *original* weight as two matrices, in eval form.

        They differ from :meth:`change` only where a method has changed the base.

        Returns:
            ``left`` (d_out, k) and ``right`` (k, d_in) with ``ΔW = left @ right``, detached.
        """
        return self.change()

    def merged_weight(self, base_weight: Tensor) -> Tensor:
        """The one weight that does in eval what base and adapter do together.

        Args:
            base_weight: The base's weight as it stands, dense, (d_out, d_in).

        Returns:
            (d_out, d_in), float32 at least.
        """
        left, right = self.change()
        return base_weight + left @ right

    def delta_weight(self) -> Tensor:
        """ΔW against the original weight, in eval form, (d_out, d_in)."""
        left, right = self.factors()
        return left @ right

    def delta_sq_norm(self, x: Tensor) -> Tensor:
        """‖ΔW x‖² for each token, in eval form.

        Uses ``‖L z‖² = zᵀ (LᵀL) z`` with the rank × rank Gram matrix: rank² multiplications for
        each token instead of rank · d_out.

        Args:
            x: Input, (..., d_in).

        Returns:
            (...,), never negative.
        """
        left, right = self.factors()
        z = F.linear(x.to(right.dtype), right)  # (..., rank)
        return ((z @ (left.T @ left)) * z).sum(-1).clamp_min(0)

    def components(self) -> list[tuple[nn.Parameter, int]]:
        """The parameters that hold a slice for each component, with the dimension of that slice."""
        return [(self.lora_A, 0), (self.lora_B, 1)]

    def trained_values(self, parameter: nn.Parameter) -> int:
        """How many values of one of this layer's parameters train.

        Fewer than it has where a mask is fixed, or dead components stand behind the living ones.
        """
        shape = distributed.shape(parameter)
        for own, dim in self.components():
            if own is parameter:
                return shape.numel() // max(shape[dim], 1) * self.rank
        return shape.numel()

    def before_loading(self, state: Mapping[str, Tensor]) -> None:
        """Make ready for saved tensors, by their names in this layer."""

    def after_loading(self) -> None:
        """Take notice of the tensors that were loaded."""

    # How PEFT writes it: LoRA, unless a subclass says otherwise.

    def peft_tensors(self) -> dict[str, Tensor]:
        """The tensors that PEFT stores for this layer, by what follows the layer's name."""
        left, right = self.factors()
        return {"lora_A.weight": right, "lora_B.weight": left / self.scaling}

    @staticmethod
    def peft_config(layers: Mapping[str, LoRALinear]) -> dict[str, Any]:
        """What PEFT's configuration says of these layers, by full name, beyond plain LoRA."""
        return {}

    @staticmethod
    def peft_shared(layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
        """What PEFT stores once for all these layers, by what follows ``base_model.``."""
        return {}

    def extra_repr(self) -> str:
        """What ``print(model)`` tells beside the submodules."""
        return f"rank={self.rank}, scaling={self.scaling:g}"
