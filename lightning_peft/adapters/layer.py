"""The adapted linear layer: ``y = W x + s · B gate(A dropout(x))``.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3), with one addition: a *gate*,
any module that stands between A and B and acts on the rank dimension. Pruning ideas live in the
gate or in which components (row ``A_j``, column ``B_j``) exist; the layer itself knows no method.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer, PeftForm
from lightning_peft.adapters.dropout import InputDropout
from lightning_peft.adapters.functional import (
    Kept,
    add_up,
    base_and_down,
    is_plain,
    lora_linear,
    masked,
)
from lightning_peft.adapters.gates import chosen_components, gate_diagonal, widen_gate
from lightning_peft.adapters.placement import adapter_device
from lightning_peft.errors import UserError


def in_autocast(x: Tensor, *lora: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast's own products would have them in, where it is on."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, *lora
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(tensor.to(dtype) for tensor in (x, *lora))


class LoRALinear(AdaptedLayer):
    """A frozen linear with a trained low-rank change beside it.

    Components that are alive stand in front: ``rank`` of them are computed, and where an engine
    cannot change a parameter's size, the rest of ``lora_A`` and ``lora_B`` is dead weight behind
    them.

    Args:
        base: The linear to adapt: ``nn.Linear`` or a subclass (quantized ones too). It is used as
            it is.
        r: Initial rank. 0 is for a layer that gets its first component while it trains.
        lora_alpha: Numerator of the scaling, ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with
            ``use_rslora``; ``lora_alpha`` at r = 0). It stays what it is when ranks change.
        lora_dropout: Probability of dropping an element of the input x, in training.
        use_rslora: Rank-stabilised scaling (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        gate: A module that maps rank activations (..., r) to (..., r); in eval it must be a fixed
            diagonal, since merging and export fold it into B.
        dtype: Of A and B. ``None``: float32 over a half-precision or quantized base, else the
            base's.
        max_r: The most components that it may get
            (:func:`lightning_peft.adapters.add_components`); None for ``r``.

    Raises:
        UserError: If ``r`` is below 0 or above ``max_r``, which is 0, ``lora_dropout`` lies outside
            [0, 1), or ``lora_alpha`` is not a finite number above zero.
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
        max_r: int | None = None,
    ) -> None:
        super().__init__(base)
        self.max_r: int = r if max_r is None else max_r
        if self.max_r < 1:
            raise UserError(
                f"{'r' if max_r is None else 'max_r'} must be at least 1, got {self.max_r}."
            )
        if not 0 <= r <= self.max_r:
            raise UserError(f"r must lie between 0 and max_r ({self.max_r}), got {r}.")
        if not 0 <= lora_dropout < 1:
            raise UserError(f"lora_dropout must lie in [0, 1), got {lora_dropout}.")
        if not 0 < lora_alpha < math.inf:
            raise UserError(f"lora_alpha must be a finite number above zero, got {lora_alpha}.")
        weight = self.weight
        where: dict[str, Any] = {
            "device": adapter_device(weight),
            "dtype": dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32),
        }
        # An engine of several processes keeps sizes: what may grow is made with room.
        width = self.max_r if distributed.is_distributed() else r
        self.lora_A = nn.Parameter(torch.zeros(width, self.in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, width, **where))
        self.r: int = r
        self.rank: int = r
        self.scaling = lora_alpha / (math.sqrt(max(r, 1)) if use_rslora else max(r, 1))
        self.dropout = InputDropout(lora_dropout) if lora_dropout else nn.Identity()
        self.gate = gate.to(self.lora_A.device) if gate is not None else None
        if gate is not None and width > r:
            widen_gate(gate, r, width)
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
        if self.lora_A.is_meta or not self.rank:
            return
        with torch.no_grad():
            A, B = self.active_A, self.active_B
            if init_lora_weights == "gaussian":
                nn.init.normal_(A, std=1 / self.rank)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            if init_lora_weights:
                nn.init.zeros_(B)
            else:  # drawn apart, since a view of wider columns would be filled in another order
                B.copy_(nn.init.kaiming_uniform_(torch.empty_like(B).contiguous(), a=math.sqrt(5)))

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
        return self.adapted(x, self.kept(x))

    def kept(self, x: Tensor) -> Kept | None:
        """What dropout keeps of an input, (..., d_in), drawn now; None where it keeps all."""
        return self.dropout.kept(x) if isinstance(self.dropout, InputDropout) else None

    def adapted(self, x: Tensor, kept: Kept | None) -> Tensor:
        """Compute the layer's output for what dropout keeps of its input.

        Args:
            x: Input, (..., d_in).
            kept: What dropout keeps of it; None for all.

        Returns:
            Output, (..., d_out).
        """
        if torch.compiler.is_compiling():  # a compiler fuses the formula by itself
            return self._formula(x, x if kept is None else masked(x, kept.mask) * kept.scale)
        x, lora_A, lora_B = in_autocast(x, self.active_A, self.active_B)
        scaling, gate = self.scaling, self.gate
        chosen = chosen_components(gate, self.rank)
        if chosen is not None:  # what the gate drops is not computed
            components, factor = chosen[0].to(x.device, non_blocking=True), chosen[1]
            lora_A, lora_B = lora_A.index_select(0, components), lora_B.index_select(1, components)
            scaling, gate = scaling * factor, None
        if gate is None:
            return lora_linear(self.base, x, lora_A, lora_B, scaling, kept)
        y, z = base_and_down(self.base, x, lora_A, kept)  # (n, d_out), (..., rank)
        return add_up(y, gate(z), lora_B, scaling, in_place=is_plain(self.base, x))

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
        """The low-rank product that the layer adds to the *original* weight, in eval form.

        It differs from :meth:`change` only where a method has changed the base. It is all of ΔW
        unless the layer does more than add it (DoRA's magnitude), which then says its own
        :meth:`delta_weight`.

        Returns:
            ``left`` (d_out, k) and ``right`` (k, d_in), detached.
        """
        return self.change()

    def merged_weight(self, base_weight: Tensor) -> Tensor:
        """``W + s B A``, in eval form, (d_out, d_in)."""
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
        """A, whose rows are the components' slices, and B, whose columns are."""
        return [(self.lora_A, 0), (self.lora_B, 1)]

    def features(self, dim: int) -> list[tuple[nn.Parameter, int]]:
        """B, whose rows are the outputs' slices (0), or A, whose columns are the inputs' (1)."""
        return [(self.lora_A, 1)] if dim else [(self.lora_B, 0)]

    def whole(self) -> tuple[Tensor, Tensor]:
        """The living part of A (rank, d_in) and of B (d_out, rank), whole on every process."""
        A, B = distributed.value(self.lora_A), distributed.value(self.lora_B)
        return A[: self.rank], B[:, : self.rank]

    def whole_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of what :meth:`whole` gives, averaged over processes; zeros where none came."""
        found = []
        for parameter in (self.lora_A, self.lora_B):
            grad = distributed.gradient(parameter)
            shape = distributed.shape(parameter)
            found.append(torch.zeros(shape, device=parameter.device) if grad is None else grad)
        return found[0][: self.rank], found[1][:, : self.rank]

    def add_to_whole(self, change_A: Tensor, change_B: Tensor) -> None:
        """Add to what :meth:`whole` gives, under any engine; (rank, d_in) and (d_out, rank)."""
        for parameter, change in ((self.lora_A, change_A), (self.lora_B, change_B)):
            full = distributed.value(parameter).clone()
            full[tuple(slice(n) for n in change.shape)] += change
            distributed.write(parameter, full)

    def share_with(self, other: LoRALinear) -> None:
        """Train another layer's A and B instead of this layer's own; shapes must be equal."""
        self.lora_A, self.lora_B = other.lora_A, other.lora_B
        self.shares = other.shares = True

    @property
    def sharing_key(self) -> int:
        """The same number for layers that share their A."""
        return id(self.lora_A)

    def peft(self) -> PeftForm | None:
        """LoRA, unless a subclass says otherwise."""
        left, right = self.factors()
        kind = type(self)
        plain = (kind.change, kind.factors) == (LoRALinear.change, LoRALinear.factors)
        # B as it is, and not what a scaling and its inverse make of it.
        B = self.active_B.detach() if plain and self.gate is None else left / self.scaling
        tensors = {"lora_A.weight": right, "lora_B.weight": B}
        return PeftForm(tensors, scaling=self.scaling)

    def extra_repr(self) -> str:
        """What ``print(model)`` tells beside the submodules."""
        return f"rank={self.rank}, scaling={self.scaling:g}"
