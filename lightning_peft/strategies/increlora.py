"""IncreLoRA (Zhang et al. 2023, https://arxiv.org/abs/2308.12043): ranks grow where they matter.

Every layer begins as ``ΔW = s P Λ Q`` of a small rank. Its sensitivity ``Σ|ΔW ⊙ ∂L/∂ΔW|`` is
smoothed at each step, as is its uncertainty; every ``incre_interval`` steps the ``top_h`` layers
with the largest product of both get more components, until the budget is reached. Beside each layer
a reserve learns in advance: its P and Q train while its Λ is held at 1e-5. A layer that is chosen
begins to train its reserve's Λ, and gets another reserve. Written by the authors' code
(FeiyuZhang98/IncreLoRA, ``increlora.py``), whose arguments keep their names here.

Deviations: the scaling is lora_alpha / r of the start, where the code divides by the rank as it
grows (and so makes ΔW smaller when a layer is chosen). ``∂L/∂ΔW`` is that before dropout. The code
looks at a window's last micro-batch; here the sensitivity is summed over micro-batches and averaged
over processes, since the exact one would keep a dense gradient of every matrix. Equal scores cannot
exceed the budget, and ``max_r`` bounds a layer. At the end reserves are removed, where the code
leaves them with Λ = 0. The code restarts the whole schedule of the learning rate for what is new;
here new parameters warm up, from zero over ``lr_warmup`` steps, to the run's learning rate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.gates import RankScale, chain, rank_scale
from lightning_peft.adapters.growth import add_components, match_ranks
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.shrink import check_gates, keep_components
from lightning_peft.errors import UserError
from lightning_peft.pruning import exchange, sensitivity
from lightning_peft.pruning.allotment import even_ranks
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.change_sensitivity import ChangeSensitivity
from lightning_peft.strategies.hooks import say_if_too_short, steps_of
from lightning_peft.strategies.triplets import DIMS, orthogonality_penalty, triplet
from lightning_peft.strategies.warm_up import WarmUp

RESERVED = 1e-5  # Λ of a reserve
STD = 0.02  # of P and Q at their start
LEAST = {"init_warmup": 0, "incre_interval": 1, "top_h": 1, "incre_rank_num": 1, "lr_warmup": 0}
Layers = dict[str, LoRALinear]


class Reserving(RankScale):
    """Λ, whose last ``reserve`` values are held at 1e-5 and do not train."""

    reserved: Tensor

    def __init__(self, r: int, start: float) -> None:
        super().__init__(r, start)
        # A buffer, since it belongs to the tensors wherever they are saved; a number beside it,
        # since a GPU would be waited for.
        self.register_buffer("reserved", torch.tensor(0))
        self.reserve = 0

    def hold(self, reserve: int) -> None:
        """Hold the last ``reserve`` values from now on."""
        self.reserve = reserve
        self.reserved.fill_(reserve)

    def after_loading(self) -> None:
        """Hold as many as were saved."""
        self.reserve = int(self.reserved)

    def forward(self, z: Tensor) -> Tensor:
        """Scale rank activations, (..., r) to (..., r)."""
        used = self.values[: z.shape[-1] - self.reserve]
        held = used.new_full((self.reserve,), RESERVED)
        return z * torch.cat([used, held]).to(z.dtype)


class IncreLoRA(AdapterStrategy):
    """LoRA in the form of a singular value decomposition, whose ranks grow up to a budget.

    Args:
        r: Initial rank of every layer.
        target_r: Final rank, on average over the layers.
        init_warmup: Optimizer steps before the first growth.
        incre_interval: Optimizer steps between two growths, which come at its multiples.
        top_h: Layers that grow at once.
        incre_rank_num: Components that each of them gets; half of ``target_r`` when None.
        advance_learn: Whether a reserve beside each layer learns in advance. Otherwise new
            components begin with P and Q as at the start and Λ zero.
        lr_warmup: Optimizer steps in which the learning rate of new parameters rises from zero;
            ``incre_interval`` when None, none at 0.
        max_r: The most components of a layer; 8 times ``target_r`` when None. With several
            processes every layer is made with room for as many.
        beta1: Smoothing of the sensitivity, in (0, 1).
        beta2: Smoothing of its uncertainty, in (0, 1).
        orth_reg_weight: Weight of the penalty ``‖PᵀP - I‖_F``, ``‖QQᵀ - I‖_F``, averaged over the
            matrices.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range.
    """

    needs = frozenset({"whole weights"})
    changes_ranks = True

    def __init__(
        self,
        r: int = 1,
        target_r: int = 2,
        init_warmup: int = 1000,
        incre_interval: int = 1000,
        top_h: int = 2,
        incre_rank_num: int | None = None,
        advance_learn: bool = True,
        lr_warmup: int | None = None,
        max_r: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.1,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, **lora)
        self.target_r, self.init_warmup, self.incre_interval = target_r, init_warmup, incre_interval
        self.top_h, self.advance_learn = top_h, advance_learn
        self.incre_rank_num = max(target_r // 2, 1) if incre_rank_num is None else incre_rank_num
        self.lr_warmup = incre_interval if lr_warmup is None else lr_warmup
        self.max_r = 8 * target_r if max_r is None else max_r
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        for key, least in (("target_r", "r"), ("max_r", "target_r")):
            given, bound = getattr(self, key), getattr(self, least)
            if given < bound:
                raise UserError(f"{key} must be at least {least} = {bound}, got {given}.")
        for key, bound in LEAST.items():
            if getattr(self, key) < bound:
                raise UserError(f"{key} must be at least {bound}, got {getattr(self, key)}.")
        for key, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise UserError(f"{key} must lie in (0, 1), got {beta}.")
        self.seen, self.warm_up = ChangeSensitivity(), WarmUp(self.lr_warmup)
        # Smoothed sensitivity and its uncertainty, (layers,) in the model's order.
        self.averages = [torch.zeros(0), torch.zeros(0)]

    def gate(self, r: int) -> nn.Module:
        """The singular values Λ, before what every strategy may have there."""
        return chain(Reserving(r, 0.0), super().gate(r))

    def layer(self, base: nn.Module, name: str) -> nn.Module:
        """A layer that may grow."""
        return LoRALinear(base, **self.lora_arguments(name=name), max_r=self.max_r)

    @torch.no_grad()
    def initialize(self, layer: LoRALinear) -> None:
        """P and Q normal with standard deviation 0.02, Λ zero, and the first reserve behind."""
        gate, used = _gate(layer), layer.rank
        if self.advance_learn:
            gate.hold(min(self.incre_rank_num, self.max_r - used))
            A, B = layer.active_A.detach(), layer.active_B.detach()
            rows = A.new_zeros(gate.reserve, layer.in_features)
            add_components(layer, rows, B.new_zeros(layer.out_features, gate.reserve))
        gate.values[used : layer.rank] = RESERVED
        for matrix in (layer.active_A, layer.active_B):
            # A draw of its own, which does not depend on the room that an engine leaves.
            matrix.copy_(STD * torch.randn(matrix.shape, device=matrix.device))

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach, and watch how much the layers' changes matter."""
        report = super().attach(model, initialize)
        layers = lora_layers(model)
        check_gates(layers.values())
        self.averages = [torch.zeros(len(layers)), torch.zeros(len(layers))]
        self.seen.start(layers)
        return report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if the run is too short for the budget."""
        super().on_train_start(trainer, pl_module)
        if self.model is not None:
            self._say_if_too_short(lora_layers(self.model), steps_of(trainer))

    def _say_if_too_short(self, layers: Layers, steps: int | None) -> None:
        left = self.target_r * len(layers) - sum(layer.r for layer in layers.values())
        events = math.ceil(left / (min(self.top_h, len(layers)) * self.incre_rank_num))
        first = self.init_warmup // self.incre_interval + 1
        if events > 0:
            done = f"IncreLoRA reaches target_r = {self.target_r} at the earliest"
            instead = "lower init_warmup or incre_interval, or raise top_h or incre_rank_num"
            last = (first + events - 1) * self.incre_interval
            say_if_too_short(steps, done, last, instead, "below, with its reserves")

    def penalty(self, model: nn.Module) -> Tensor | float:
        """How far P and Q, reserves among them, are from orthonormal ones."""
        return self.orth_reg_weight * orthogonality_penalty(model)

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Update the importance, and let layers grow if this step is due."""
        layers = lora_layers(model)
        if self._left(layers) > 0:
            self._update(layers)
            if global_step > self.init_warmup and global_step % self.incre_interval == 0:
                self._grow(layers, optimizer, global_step)
        if self._left(layers) <= 0:
            self.seen.stop()
            for layer in layers.values():
                if _gate(layer).reserve:
                    keep_components(layer, torch.arange(_used(layer)), optimizer)
                    _gate(layer).hold(0)
        for name, layer in layers.items():
            for key, parameter in triplet(layer).items():
                self.warm_up.before(f"{name}.{key}", parameter, DIMS[key], layer.rank, global_step)

    def after_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Give new parameters the learning rate of their own."""
        super().after_step(model, optimizer, global_step)
        self.warm_up.after()

    def _left(self, layers: Layers) -> int:
        """How many components the budget has left."""
        return self.target_r * len(layers) - sum(map(_used, layers.values()))

    def _update(self, layers: Layers) -> None:
        found = self.seen.take(layers)
        before = [old.to(found) for old in self.averages]
        smoothed = sensitivity.smooth(found, before[0], before[1], self.beta1, self.beta2)
        finite = found.isfinite().all()  # else a gradient scaler skips this step
        self.averages = [
            torch.where(finite, new, old) for new, old in zip(smoothed, before, strict=True)
        ]

    def _grow(self, layers: Layers, optimizer: Optimizer, step: int) -> None:
        scores = (self.averages[0] * self.averages[1]).tolist()
        ranks, left = [_used(layer) for layer in layers.values()], self._left(layers)
        given = exchange.grown(scores, ranks, self.top_h, self.incre_rank_num, self.max_r, left)
        decided = dict(zip(layers, given, strict=True))
        distributed.assert_agreement(step, decided, "the components to add")
        for name, count in decided.items():
            if count:
                self._add(name, layers[name], count, optimizer, step)
                self.note(step, name, "added", _used(layers[name]))

    def _add(
        self, name: str, layer: LoRALinear, count: int, optimizer: Optimizer, step: int
    ) -> None:
        """Put components into use, and new ones into the reserve if there is one."""
        before, used = layer.rank, _used(layer) + count
        reserve = min(self.incre_rank_num, self.max_r - used) if self.advance_learn else 0
        new = used + reserve - before
        Q = distributed.from_first(STD * torch.randn(new, layer.in_features))
        P = distributed.from_first(STD * torch.randn(layer.out_features, new))
        add_components(layer, Q, P, optimizer, gate=RESERVED if self.advance_learn else 0.0)
        _gate(layer).hold(reserve)
        self.warm_up.begin(f"{name}.values", used - count, used, step)
        for key in ("P", "Q"):
            self.warm_up.begin(f"{name}.{key}", before, layer.rank, step)

    def final_parameters(self, model: nn.Module) -> int:
        """The count of ``target_r`` components for each layer; see :func:`even_ranks`."""
        layers = lora_layers(model).values()
        most, least = [self.max_r] * len(layers), [layer.r for layer in layers]
        ranks = even_ranks(most, self.target_r * len(layers), least)
        match_ranks(zip(layers, ranks, strict=True))
        return super().final_parameters(model)  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Decisions, the smoothed importance, and which components warm up."""
        return {
            **super().state_dict(),
            "averages": list(self.averages),
            "born": {key: dict(born) for key, born in self.warm_up.born.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.averages = list(state_dict["averages"])
        self.warm_up.born = {key: dict(born) for key, born in state_dict["born"].items()}


def _gate(layer: LoRALinear) -> Reserving:
    gate = rank_scale(layer.gate)
    assert isinstance(gate, Reserving)
    return gate


def _used(layer: LoRALinear) -> int:
    return layer.rank - _gate(layer).reserve
