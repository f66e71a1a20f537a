"""VeRA (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454): trained vectors, frozen matrices.

``y = W x + b ⊙ B (d ⊙ A x)``, equation 2: one pair of random matrices, frozen and shared by all
layers, and for each layer the trained vectors d (r,), which starts at 0.1, and b (d_out,), which
starts at 0. Where layers differ in shape each takes the first rows and columns, as in PEFT, so the
seed of the projection gives PEFT's matrices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.adapted import PeftForm
from lightning_peft.adapters.attach import AttachReport, match_targets
from lightning_peft.adapters.gates import RankScale, chain, gate_diagonal
from lightning_peft.adapters.placement import adapter_device
from lightning_peft.adapters.scaled import ScaledLinear
from lightning_peft.strategies.base import AdapterStrategy


class VeRALinear(ScaledLinear):
    """A linear adapted by trained vectors around shared, frozen matrices.

    Args:
        base: The linear to adapt.
        projection: A (r, at least d_in) and B (at least d_out, r), frozen.
        seed: By which the projection was drawn.
        lora: The arguments of :class:`LoRALinear`.
    """

    def __init__(
        self,
        base: nn.Module,
        *lora: Any,
        projection: tuple[nn.Parameter, nn.Parameter],
        seed: int,
        **more: Any,
    ) -> None:
        super().__init__(base, *lora, start=0.0, **more)
        self.lora_A, self.lora_B = projection
        self.seed = seed

    @property
    def active_A(self) -> Tensor:
        """This layer's part of the shared A, (rank, d_in)."""
        return self.lora_A[: self.rank, : self.in_features]

    @property
    def active_B(self) -> Tensor:
        """This layer's part of the shared B, (d_out, rank)."""
        return self.lora_B[: self.out_features, : self.rank]

    def components(self) -> list[tuple[nn.Parameter, int]]:
        """None: a component's slices of A and B are all layers'."""
        return []

    def peft(self) -> PeftForm:
        """PEFT's VeRA: the two vectors, and the projection saved with them."""
        assert self.gate is not None
        return PeftForm(
            tensors={
                "vera_lambda_d": gate_diagonal(self.gate, self.rank),
                "vera_lambda_b": self.output_scale.detach() * self.scaling,
            },
            config={
                "peft_type": "VERA",
                "r": self.rank,
                "projection_prng_key": self.seed,
                "save_projection": True,
                "vera_dropout": 0.0,
            },
            shared={"vera_A": self.lora_A.detach(), "vera_B": self.lora_B.detach()},
        )


class VeRA(AdapterStrategy):
    """Trained vectors around one pair of frozen random matrices.

    Args:
        r: Rank of the projection; large, since a component costs one number for each layer.
        lora_alpha: Numerator of the scaling; r when None, since the paper scales by b alone.
        d_initial: What d starts at.
        projection_prng_key: Seed of the projection, which is saved with the adapter.
        lora: The arguments that all strategies share.
    """

    def __init__(
        self,
        r: int = 256,
        lora_alpha: float | None = None,
        d_initial: float = 0.1,
        projection_prng_key: int = 0,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, lora_alpha=r if lora_alpha is None else lora_alpha, **lora)
        self.d_initial, self.projection_prng_key = d_initial, projection_prng_key
        self._projection: tuple[nn.Parameter, nn.Parameter] | None = None

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Draw the projection for the widest targets, and attach as every strategy does."""
        matched = match_targets(
            model, self.target_modules, self.exclude_modules, self.modules_to_save
        )
        linears = [model.get_submodule(n) for names in matched.values() for n in names]
        wide, tall = (max(int(getattr(m, key)) for m in linears) for key in _SIZES)
        drawn = draw_projection(self.r, wide, tall, self.projection_prng_key)
        device = adapter_device(next(linears[0].parameters()))
        A, B = (nn.Parameter(matrix.to(device), requires_grad=False) for matrix in drawn)
        self._projection = A, B
        return super().attach(model, initialize)

    def gate(self, r: int) -> nn.Module:
        """The vector d, before what every strategy may have there."""
        return chain(RankScale(r, self.d_initial), super().gate(r))

    def layer(self, base: nn.Module, name: str) -> VeRALinear:
        """Vectors around the shared projection."""
        assert self._projection is not None
        return VeRALinear(
            base,
            projection=self._projection,
            seed=self.projection_prng_key,
            **self.lora_arguments(name=name, r=self.r),  # one rank, since all have one projection
        )

    def initialize(self, layer: VeRALinear) -> None:
        """Nothing: the projection is drawn, d and b are at their start."""


_SIZES = ("in_features", "out_features")


def draw_projection(r: int, d_in: int, d_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """The frozen matrices, Kaiming-uniform with gain √2, by a generator of their own, as in PEFT.

    Args:
        r: Rank.
        d_in: Width of the widest layer.
        d_out: Outputs of the layer with most.
        seed: Of the generator.

    Returns:
        A (r, d_in) and B (d_out, r).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    made = []
    for shape in ((r, d_in), (d_out, r)):
        bound = math.sqrt(2) * math.sqrt(3 / shape[1])
        made.append(torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator))
    return made[0], made[1]
