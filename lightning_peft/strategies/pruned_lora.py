"""PrunedLoRA (2025, https://arxiv.org/abs/2510.00192): from a high rank to a low one.

Every ``prune_every`` optimizer steps, after the backward pass and before the step, the components
with the lowest score leave every matrix: parameters, gradients and moments get smaller. Score and
recovery of the survivors come from a second-order model of the loss (``pruning/``).

Deviations from the published code: its recovery does not run as written (an r × r inverse times a
d-vector), and its removal is a mask, which saves nothing. The default recovery was measured.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import AttachReport, lora_layers
from lightning_peft.adapters.growth import match_ranks
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.adapters.shrink import check_gates, keep_components
from lightning_peft.errors import UserError
from lightning_peft.pruning import allotment, criteria, linalg, schedule
from lightning_peft.strategies.base import AdapterStrategy
from lightning_peft.strategies.hooks import say_if_too_short, steps_of
from lightning_peft.strategies.running_sums import RunningSums

Recovery = Literal["none", "gradient", "activation"]
Allocation = Literal["matrix", "global"]
Layers = dict[str, LoRALinear]
Gradients = dict[str, tuple[Tensor, Tensor]]
Group = tuple[list[str], criteria.Matrices]


class PrunedLoRA(AdapterStrategy):
    """LoRA whose rank falls from ``r`` to ``target_r`` while it trains.

    Args:
        r: Initial rank.
        target_r: Final rank of every matrix; with global allocation their mean.
        start_step: Optimizer step (0-based) of the first removal.
        prune_every: Optimizer steps between removals (K1).
        prune_count: Components that each matrix loses at a removal, or loses on average with global
            allocation (K2).
        criterion: What a component is worth: ``gradient`` (the paper's), or one that it is compared
            with: ``llm_pruner_element1``, ``llm_pruner_element2``, ``llm_pruner_taylor2``,
            ``wanda``, ``sparsegpt``, ``magnitude``, ``random``.
        recovery: How survivors make up for the removed: ``none``, ``gradient`` (the minimiser of
            the second-order model, with H averaged since the last removal, damped and bounded), or
            ``activation`` (least squares on the layer's own output).
        allocation: ``matrix`` (each loses the same number, the paper) or ``global`` (the lowest
            over all).
        min_r: With global allocation no matrix falls below this rank.
        eps: Added to the diagonal of H in the score, absolute.
        damping: Added to the diagonal of H or C in a recovery, relative to its mean.
        max_ratio: Bound of a gradient recovery's change, relative to the norm of what was removed.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range, or a choice is none of those.
    """

    changes_ranks = True

    def __init__(
        self,
        r: int = 32,
        target_r: int = 8,
        start_step: int = 0,
        prune_every: int = 10,
        prune_count: int = 2,
        criterion: criteria.Criterion = "gradient",
        recovery: Recovery = "none",
        allocation: Allocation = "matrix",
        min_r: int = 1,
        eps: float = 1e-6,
        damping: float = 0.01,
        max_ratio: float = 1.0,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, **lora)
        if not 0 <= target_r <= r:
            raise UserError(f"target_r must lie between 0 and r = {r}, got {target_r}.")
        if allocation == "global" and not 0 <= min_r <= target_r:
            raise UserError(f"min_r must lie between 0 and target_r = {target_r}, got {min_r}.")
        for key, choice, choices in (
            ("criterion", criterion, get_args(criteria.Criterion)),
            ("recovery", recovery, get_args(Recovery)),
            ("allocation", allocation, get_args(Allocation)),
        ):
            if choice not in choices:
                raise UserError(f"{key} must be one of {', '.join(choices)}, got {choice!r}.")
        self.target_r, self.start_step = target_r, start_step
        self.prune_every, self.prune_count = prune_every, prune_count
        for key, least in (("start_step", 0), ("prune_every", 1), ("prune_count", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key} must be at least {least}, got {getattr(self, key)}.")
        self.criterion, self.recovery, self.allocation = criterion, recovery, allocation
        self.min_r, self.eps, self.damping, self.max_ratio = min_r, eps, damping, max_ratio
        # Since the last removal: "C" of z zᵀ over "tokens", "H_B" and "H_A" over "steps".
        self.sums = RunningSums(of_each=("C", "tokens"))
        self._watch: observe_inputs | None = None

    @property
    def _watches_activations(self) -> bool:
        return self.criterion in criteria.WATCH_ACTIVATIONS or self.recovery == "activation"

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach, and watch activations where criterion or recovery need them."""
        report = super().attach(model, initialize)
        check_gates(lora_layers(model).values())
        self._watch_activations(model)
        return report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch anew, behind the hooks by which an engine makes parameters whole."""
        super().on_train_start(trainer, pl_module)
        if self.model is not None:
            self._say_if_too_short(lora_layers(self.model), steps_of(trainer))
        if self._watch is not None:
            self._watch.stop()
            self._watch.start()

    def _say_if_too_short(self, layers: Layers, steps: int | None) -> None:
        ranks = [layer.r for layer in layers.values()]
        # The highest rank is the last at the target; with global allocation all are, on average.
        r = sum(ranks) / len(ranks) if self.allocation == "global" else max(ranks)
        plan = (r, self.target_r, self.start_step, self.prune_every, self.prune_count)
        last = schedule.last_event_step(*plan)
        if last is not None:
            done = f"PrunedLoRA reaches target_r = {self.target_r}"
            instead = "lower start_step or prune_every, or raise prune_count"
            end = f"at rank {schedule.rank_at((steps or 0) - 1, *plan):g}"
            say_if_too_short(steps, done, last, instead, end)

    def _watch_activations(self, model: nn.Module) -> None:
        if self._watches_activations:
            self._watch = observe_inputs(model, self._add_activations).start()

    def _add_activations(self, name: str, layer: AdaptedLayer, x: Tensor) -> None:
        if not (layer.training and isinstance(layer, LoRALinear)):
            return
        A = layer.active_A
        z = nn.functional.linear(x.to(A.dtype), A)  # (tokens, rank)
        self.sums.add(name, "C", z.T @ z)
        self.sums.add(name, "tokens", torch.tensor(float(len(z)), device=z.device))

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Remove components if this step is due."""
        layers = lora_layers(model)
        lowest = -self.target_r if self.allocation == "global" else 0
        excess = sum(max(layer.rank - self.target_r, lowest) for layer in layers.values())
        if excess <= 0:
            if self._watch is not None:
                self._watch.stop()
                self._watch = None
            return
        due = schedule.prune_due(global_step, self.start_step, self.prune_every)
        if not due and self.recovery != "gradient":
            return
        grads = {name: layer.whole_gradients() for name, layer in layers.items()}
        if not nn.utils.get_total_norm([g for pair in grads.values() for g in pair]).isfinite():
            # A step that a gradient scaler skips, or one that ends the run: no ground to decide on.
            if due:
                rank_zero_warn(
                    f"no components were removed at step {global_step}, since its gradients are "
                    "not finite; the target is reached one removal later."
                )
            return
        if self.recovery == "gradient":
            for name, (grad_A, grad_B) in grads.items():
                self.sums.add(name, "H_B", linalg.gram(grad_B))
                self.sums.add(name, "H_A", linalg.gram(grad_A.mT))
                self.sums.add(name, "steps", torch.tensor(1.0))
        if due:
            self._share_activations(layers)
            self._remove(layers, grads, optimizer, global_step, excess)

    def _share_activations(self, layers: Layers) -> None:
        """Add up over processes what each has seen of the activations."""
        if distributed.world_size() == 1 or not self._watches_activations:
            return
        zeros = {}
        for name, layer in layers.items():
            A = layer.active_A
            C = A.detach().new_zeros(layer.rank, layer.rank)
            zeros[name] = {"C": C, "tokens": torch.zeros((), device=A.device)}
        self.sums.share(zeros, count="tokens")

    def _remove(
        self, layers: Layers, grads: Gradients, optimizer: Optimizer, step: int, excess: int
    ) -> None:
        groups = [(names, self._stack(layers, names, grads)) for names in _same_shape(layers)]
        scored = {
            name: score
            for names, matrices in groups
            for name, score in zip(names, self._score(matrices), strict=True)
        }
        # In the model's order, which decides between equal scores.
        removed = self._choose({name: scored[name] for name in layers}, excess)
        gone_by_layer = {name: gone.tolist() for name, gone in removed.items()}
        distributed.assert_agreement(step, gone_by_layer, "the components to remove")
        for group in groups if self.recovery != "none" else ():
            self._recover(layers, group, removed)
        for name, gone in removed.items():
            if len(gone):
                keep_components(layers[name], linalg.survivors(gone, layers[name].rank), optimizer)
                self.note(step, name, "removed", layers[name].rank)
        self.sums.clear()

    def _score(self, matrices: criteria.Matrices) -> Tensor:
        score = criteria.CRITERIA[self.criterion](matrices, self.eps, self.damping)
        # Processes draw differently, and must remove alike.
        return distributed.from_first(score) if self.criterion == "random" else score

    def _choose(self, scored: dict[str, Tensor], excess: int) -> dict[str, Tensor]:
        """Which components leave, by layer, (k,) each."""
        if self.allocation == "global":
            count = min(self.prune_count * len(scored), excess)
            chosen = schedule.select_global(list(scored.values()), count, self.min_r)
            return dict(zip(scored, chosen, strict=True))
        return {
            name: schedule.select_per_matrix(s, min(self.prune_count, len(s) - self.target_r))
            for name, s in scored.items()
        }

    def _stack(self, layers: Layers, names: list[str], grads: Gradients) -> criteria.Matrices:
        """Matrices of one shape and what was summed over them, each with a leading dimension."""
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for name in names:
            own = *layers[name].whole(), *grads[name]
            for key, value in zip(("A", "B", "grad_A", "grad_B"), own, strict=True):
                parts[key].append(value)
            for key, count in (("C", "tokens"), ("H_B", "steps"), ("H_A", "steps")):
                mean = self.sums.mean(name, key, count)
                if mean is None and key == "C" and self.sums and self._watches_activations:
                    # No forward visited this layer (an idle expert), though others were.
                    mean = own[0].new_zeros(len(own[0]), len(own[0]))
                if mean is not None:
                    parts[key].append(mean)
        if self._watches_activations and "C" not in parts:
            raise RuntimeError(
                f"criterion {self.criterion!r} or recovery {self.recovery!r} needs the activations "
                "of a forward pass in training mode since the last removal, and saw none."
            )
        return criteria.Matrices(**{key: torch.stack(tensors) for key, tensors in parts.items()})

    def _recover(self, layers: Layers, group: Group, removed: dict[str, Tensor]) -> None:
        names, matrices = group
        # With global allocation the counts differ, and with them the shapes.
        by_count: dict[int, list[int]] = defaultdict(list)
        for i, name in enumerate(names):
            if len(removed[name]):
                by_count[len(removed[name])].append(i)
        for members in by_count.values():
            gone = torch.stack([removed[names[i]] for i in members])
            own = matrices.select(members)
            if self.recovery == "activation":
                changes = criteria.activation_change(own, gone, self.damping)
            else:
                changes = criteria.gradient_change(own, gone, self.damping, self.max_ratio)
            for i, change_B, change_A in zip(members, *changes, strict=True):
                layers[names[i]].add_to_whole(change_A, change_B)

    def final_parameters(self, model: nn.Module) -> int:
        """The count at ``target_r``; for ``global`` see :func:`.allotment.even_ranks`."""
        layers = lora_layers(model).values()
        most = [layer.rank for layer in layers]
        ranks = [min(rank, self.target_r) for rank in most]
        if self.allocation == "global":
            ranks = allotment.even_ranks(most, self.target_r * len(most))
        match_ranks(zip(layers, ranks, strict=True))
        return super().final_parameters(model)  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Decisions, and the sums since the last removal, as this process has seen them."""
        return {**super().state_dict(), "sums": self.sums.state()}

    def merge_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Activation sums of every process; all else is the same on all."""
        return {**super().merge_states(states), "sums_of": [state["sums"] for state in states]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; see :meth:`RunningSums.restore`."""
        super().load_state_dict(state_dict)
        self.sums.restore(state_dict.get("sums_of", [state_dict["sums"]]))


def _same_shape(layers: Layers) -> list[list[str]]:
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, layer in layers.items():
        groups[layer.out_features, layer.in_features, layer.rank].append(name)
    return list(groups.values())
