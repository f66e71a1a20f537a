"""Whole layers leave while LoRA trains, by LoRA-drop's measure and without its probe.

LoRA-drop (Zhou et al. 2024, https://arxiv.org/abs/2402.07721) measures
``g_i = mean ‖s B_i A_i x‖²`` over tokens, after a probe that is thrown away. Here training
itself is the probe: every ``every`` optimizer steps g is the mean over the attended tokens that
training has seen since the last decision, and the layers with the least share ``g_i / Σ g`` of
their module kind go to rank 0. The sum is over the layers of the kind that are left, so a kind's
last layer has the share 1 and goes after all others.

A method of this package: there is no paper to differ from. Each token's ‖ΔW x‖² is that of the
weights at its step, in eval form (a gate as its fixed diagonal, no dropout of the input).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import AttachReport, kind_of, lora_layers
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.adapters.shrink import check_gates, keep_components
from lightning_peft.errors import UserError
from lightning_peft.pruning.importance import shares_by_kind
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.hooks import say_if_too_short, steps_of
from lightning_peft.strategies.running_sums import RunningSums


class LayerRemoval(AdapterStrategy):
    """LoRA of which the layers that matter least are removed while it trains.

    Args:
        r: Rank.
        keep: Part of the layers that is left at the end, in (0, 1], rounded up.
        every: Optimizer steps between two removals, and before the first.
        count: Layers that leave at each removal.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range.
    """

    changes_ranks = True

    def __init__(
        self, r: int = 8, keep: float = 0.5, every: int = 50, count: int = 1, **lora: Any
    ) -> None:
        super().__init__(r=r, **lora)
        if not 0 < keep <= 1:
            raise UserError(f"keep must lie in (0, 1], got {keep}.")
        for key, value in (("every", every), ("count", count)):
            if value < 1:
                raise UserError(f"{key} must be at least 1, got {value}.")
        self.keep, self.every, self.count = keep, every, count
        # Since the last removal: "squares" ‖ΔW x‖² over "tokens".
        self.sums = RunningSums(of_each=("squares", "tokens"))
        self._watch: observe_inputs | None = None

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach, and watch what enters the layers."""
        report = super().attach(model, initialize)
        check_gates(lora_layers(model).values())
        self._watch = observe_inputs(model, self._add).start()
        return report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch anew, behind the hooks by which an engine makes parameters whole."""
        super().on_train_start(trainer, pl_module)
        if self._watch is not None and self.model is not None:
            self._watch.stop()
            self._watch.start()
            self._say_if_too_short(lora_layers(self.model), trainer)

    def _say_if_too_short(self, layers: dict[str, LoRALinear], trainer: Trainer) -> None:
        events = math.ceil(self._excess(layers) / self.count)
        first = max(1, math.ceil(trainer.global_step / self.every))
        last = (first + events - 1) * self.every
        if events > 0:
            done = f"LayerRemoval leaves {self._target(layers)} of {len(layers)} layers"
            instead = "lower every, or raise count"
            say_if_too_short(steps_of(trainer), done, last, instead, "with more")

    def _target(self, layers: dict[str, LoRALinear]) -> int:
        return math.ceil(self.keep * len(layers) - 1e-9)  # 0.7 of 10 is 7, in floats too

    def _excess(self, layers: dict[str, LoRALinear]) -> int:
        return sum(layer.rank > 0 for layer in layers.values()) - self._target(layers)

    def _add(self, name: str, layer: AdaptedLayer, x: Tensor) -> None:
        if layer.training and isinstance(layer, LoRALinear) and layer.rank:
            squares = layer.delta_sq_norm(x).double().sum()
            self.sums.add(name, "squares", squares)
            self.sums.add(name, "tokens", torch.full_like(squares, len(x)))

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Remove layers if this step is due."""
        layers = lora_layers(model)
        excess = self._excess(layers)
        if excess <= 0:
            if self._watch is not None:
                self._watch.stop()
                self._watch = None
            self.sums.clear()
            return
        if not global_step or global_step % self.every:
            return
        alive = {name: layer for name, layer in layers.items() if layer.rank}
        if not any(distributed.everywhere(bool(self.sums))):
            raise UserError(
                "LayerRemoval has seen no forward pass of the model since the last removal; attach "
                "it to the module that the loss calls."
            )
        importance = self._importance(alive)
        self.sums.clear()
        if not all(map(math.isfinite, importance.values())):
            rank_zero_warn(
                f"no layers were removed at step {global_step}, since what they add to their "
                "outputs is not finite; the target is reached one removal later."
            )
            return
        share = shares_by_kind(importance, kind_of)
        # In the model's order, which decides between equal shares.
        gone = sorted(alive, key=lambda name: share[name])[: min(self.count, excess)]
        distributed.assert_agreement(global_step, dict.fromkeys(gone, 0), "the layers to remove")
        for name in gone:
            keep_components(layers[name], torch.arange(0), optimizer)
            self.note(global_step, name, "removed", 0)

    def _importance(self, layers: dict[str, LoRALinear]) -> dict[str, float]:
        """Mean ‖ΔW x‖² since the last removal, over all processes; 0 where no token came by."""
        if distributed.world_size() > 1:
            devices = {name: next(layer.own_parameters()).device for name, layer in layers.items()}
            zeros = {n: torch.zeros((), dtype=torch.float64, device=d) for n, d in devices.items()}
            self.sums.share({n: {"squares": z, "tokens": z} for n, z in zeros.items()}, "tokens")
        means = {name: self.sums.mean(name, "squares", "tokens") for name in layers}
        return {name: 0.0 if mean is None else mean.item() for name, mean in means.items()}

    def final_parameters(self, model: nn.Module) -> None:
        """None: layers differ in size, and data say which ones stay."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Decisions, and the sums since the last removal, as this process has seen them."""
        return {**super().state_dict(), "sums": self.sums.state()}

    def merge_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The sums of every process; all else is the same on all."""
        return {**super().merge_states(states), "sums_of": [state["sums"] for state in states]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; see :meth:`RunningSums.restore`."""
        super().load_state_dict(state_dict)
        self.sums.restore(state_dict.get("sums_of", [state_dict["sums"]]))
