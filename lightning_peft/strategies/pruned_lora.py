"""PrunedLoRA (2025, https://arxiv.org/abs/2510.00192): from a high rank to a low one.

Every ``prune_every`` optimizer steps, after the backward pass and before the step, the components
with the lowest score leave every matrix: parameters, gradients and the optimizer's moments get
smaller. The score and the recovery of the survivors come from a second-order model of the loss
(:mod:`lightning_peft.pruning`).

Known deviations from the published code: its recovery does not run as written (an r × r inverse
times a d-vector), and its removal is a mask, which saves neither memory nor time. Which recovery is
the default was measured; see ``docs/methods.md``.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import distributed
from lightning_peft.adapters.attach import AttachReport, adapter_layers
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.adapters.shrink import check_gates, keep_components, match_ranks
from lightning_peft.errors import UserError
from lightning_peft.pruning import linalg, recovery, schedule, scores
from lightning_peft.strategies.base import AdapterStrategy

Criterion = Literal[
    "gradient",
    "llm_pruner_element1",
    "llm_pruner_element2",
    "llm_pruner_taylor2",
    "wanda",
    "sparsegpt",
    "magnitude",
    "random",
]
Recovery = Literal["none", "gradient", "activation"]
Batch = dict[str, Tensor]

# What each criterion makes of a batch of matrices: B (n, d_out, r), A (n, r, d_in), their
# gradients, and the second moment C = E[z zᵀ] (n, r, r) of the rank activations.
_SCORES = {
    "gradient": lambda m, p: scores.gradient_score(m["B"], m["grad_B"], m["A"], m["grad_A"], p.eps),
    "llm_pruner_element1": lambda m, p: scores.llm_pruner_element1(
        m["B"], m["grad_B"], m["A"], m["grad_A"]
    ),
    "llm_pruner_element2": lambda m, p: scores.llm_pruner_element2(
        m["B"], m["grad_B"], m["A"], m["grad_A"]
    ),
    "llm_pruner_taylor2": lambda m, p: scores.llm_pruner_taylor2(
        m["B"], m["grad_B"], m["A"], m["grad_A"]
    ),
    "wanda": lambda m, p: scores.wanda_score(m["B"], m["C"]),
    "sparsegpt": lambda m, p: scores.sparsegpt_score(m["B"], m["C"], p.damping),
    "magnitude": lambda m, p: scores.magnitude_score(m["B"], m["A"]),
    # Processes draw differently, and must remove alike.
    "random": lambda m, p: distributed.from_first(scores.random_score(m["B"])),
}


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
                ``wanda``,
            ``sparsegpt``, ``magnitude``, ``random``.
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

    def __init__(
        self,
        r: int = 32,
        target_r: int = 8,
        start_step: int = 0,
        prune_every: int = 10,
        prune_count: int = 2,
        criterion: Criterion = "gradient",
        recovery: Recovery = "none",
        allocation: Literal["matrix", "global"] = "matrix",
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
        for key, value, least in (
            ("start_step", start_step, 0),
            ("prune_every", prune_every, 1),
            ("prune_count", prune_count, 1),
        ):
            if value < least:
                raise UserError(f"{key} must be at least {least}, got {value}.")
        for key, choice, choices in (
            ("criterion", criterion, tuple(_SCORES)),
            ("recovery", recovery, ("none", "gradient", "activation")),
            ("allocation", allocation, ("matrix", "global")),
        ):
            if choice not in choices:
                raise UserError(f"{key} must be one of {', '.join(choices)}, got {choice!r}.")
        self.target_r = target_r
        self.start_step, self.prune_every, self.prune_count = start_step, prune_every, prune_count
        self.criterion, self.recovery, self.allocation = criterion, recovery, allocation
        self.min_r, self.eps, self.damping, self.max_ratio = min_r, eps, damping, max_ratio
        # Sums since the last removal, by layer: "C" of z zᵀ and its token count, "H_B" and "H_A".
        self.sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._watch: observe_inputs | None = None

    @property
    def _watches_activations(self) -> bool:
        return self.criterion in ("wanda", "sparsegpt") or self.recovery == "activation"

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach, and watch activations where criterion or recovery need them."""
        report = super().attach(model, initialize)
        check_gates(adapter_layers(model).values())
        self._watch_activations(model)
        return report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch anew, behind the hooks by which an engine makes parameters whole."""
        super().on_train_start(trainer, pl_module)
        self._say_if_too_short(trainer.estimated_stepping_batches)
        if self._watch is not None and self.model is not None:
            self._watch.__exit__(None, None, None)
            self._watch_activations(self.model)

    def _say_if_too_short(self, steps: float) -> None:
        plan = (self.r, self.target_r, self.start_step, self.prune_every, self.prune_count)
        last = schedule.last_event_step(*plan)
        if last is not None and last >= steps:
            rank_zero_warn(
                f"PrunedLoRA reaches target_r = {self.target_r} at step {last}, but this run has "
                f"{int(steps)} steps and ends at rank {schedule.rank_at(int(steps) - 1, *plan)}: "
                "lower start_step or prune_every, or raise prune_count."
            )

    def _watch_activations(self, model: nn.Module) -> None:
        if self._watches_activations:
            self._watch = observe_inputs(model, self._add_activations).__enter__()

    def _add_activations(self, name: str, layer: LoRALinear, x: Tensor) -> None:
        if not layer.training:
            return
        z = nn.functional.linear(x.to(layer.lora_A.dtype), layer.active_A)  # (tokens, rank)
        self._add(name, "C", z.T @ z)
        self._add(name, "tokens", torch.tensor(float(len(z)), device=z.device))

    def _add(self, name: str, key: str, value: Tensor) -> None:
        sums = self.sums[name]
        # Sums from a checkpoint come on the CPU.
        sums[key] = sums[key].to(value.device) + value if key in sums else value

    def before_step(self, model: nn.Module, optimizer: Optimizer, global_step: int) -> None:
        """Remove components if this step is due."""
        layers = adapter_layers(model)
        excess = sum(layer.rank for layer in layers.values()) - self.target_r * len(layers)
        if excess <= 0:
            if self._watch is not None:
                self._watch.__exit__(None, None, None)
                self._watch = None
            return
        due = schedule.prune_due(global_step, self.start_step, self.prune_every)
        if not due and self.recovery != "gradient":
            return
        grads = {name: _gradients(layer) for name, layer in layers.items()}
        if not _finite(grads):
            # A step that a gradient scaler skips, or one that ends the run: no ground to decide on.
            if due:
                rank_zero_warn(
                    f"no components were removed at step {global_step}, since its gradients are "
                    "not finite; the target is reached one removal later."
                )
            return
        if self.recovery == "gradient":
            for name, (grad_B, grad_A) in grads.items():
                self._add(name, "H_B", linalg.gram(grad_B))
                self._add(name, "H_A", linalg.gram(grad_A.mT))
                self._add(name, "steps", torch.tensor(1.0))
        if due:
            self._share_activations(layers)
            self._remove(layers, grads, optimizer, global_step, excess)

    def _share_activations(self, layers: dict[str, LoRALinear]) -> None:
        """Add up over processes what each has seen of the activations."""
        if distributed.world_size() == 1 or not self._watches_activations:
            return
        seen = []
        for name, layer in layers.items():
            # A layer that no forward here has visited may have been visited elsewhere.
            sums, like = self.sums[name], layer.lora_A
            sums.setdefault("C", torch.zeros(layer.rank, layer.rank, dtype=like.dtype))
            sums.setdefault("tokens", torch.zeros(()))
            seen += [(sums, key) for key in _ACTIVATIONS]
        shared = distributed.total([sums[key].to(layer.lora_A.device) for sums, key in seen])
        for (sums, key), value in zip(seen, shared, strict=True):
            sums[key] = value
        for name in [name for name in layers if not self.sums[name]["tokens"]]:
            del self.sums[name]["C"], self.sums[name]["tokens"]
            if not self.sums[name]:
                del self.sums[name]

    def _remove(
        self,
        layers: dict[str, LoRALinear],
        grads: dict[str, tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        step: int,
        excess: int,
    ) -> None:
        groups = [(names, self._stack(layers, names, grads)) for names in _same_shape(layers)]
        scored = {
            name: score
            for names, matrices in groups
            for name, score in zip(names, _SCORES[self.criterion](matrices, self), strict=True)
        }
        # In the model's order, which decides between equal scores.
        removed = self._choose({name: scored[name] for name in layers}, excess)
        gone_by_layer = {name: gone.tolist() for name, gone in removed.items()}
        distributed.assert_agreement(step, gone_by_layer, "the components to remove")
        for names, matrices in groups:
            self._recover(layers, names, matrices, removed)
        for name, gone in removed.items():
            if len(gone):
                keep_components(layers[name], linalg.survivors(gone, layers[name].rank), optimizer)
                self.note(step, name, "removed", layers[name].rank)
        self.sums.clear()

    def _choose(self, scored: dict[str, Tensor], excess: int) -> dict[str, Tensor]:
        """Which components leave, by layer, (k,) each."""
        if self.allocation == "global":
            count = min(self.prune_count * len(scored), excess)
            chosen = schedule.select_global(list(scored.values()), count, self.min_r)
            return dict(zip(scored, chosen, strict=True))
        return {
            name: schedule.select_per_matrix(
                score, min(self.prune_count, len(score) - self.target_r)
            )
            for name, score in scored.items()
        }

    def _stack(
        self,
        layers: dict[str, LoRALinear],
        names: list[str],
        grads: dict[str, tuple[Tensor, Tensor]],
    ) -> Batch:
        """Matrices of one shape and what was summed over them, each with a leading dimension."""
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for name in names:
            layer, sums = layers[name], self.sums.get(name, {})
            grad_B, grad_A = grads[name]
            parts["B"].append(distributed.value(layer.lora_B)[:, : layer.rank])
            parts["A"].append(distributed.value(layer.lora_A)[: layer.rank])
            parts["grad_B"].append(grad_B)
            parts["grad_A"].append(grad_A)
            for key, count in (("C", "tokens"), ("H_B", "steps"), ("H_A", "steps")):
                if key in sums:
                    parts[key].append(sums[key] / sums[count].to(sums[key].device))
                elif key == "C" and self.sums and self._watches_activations:
                    # No forward visited this layer (an idle expert), though others were.
                    parts[key].append(layer.lora_A.new_zeros(layer.rank, layer.rank))
        if self._watches_activations and "C" not in parts:
            raise RuntimeError(
                f"criterion {self.criterion!r} or recovery {self.recovery!r} needs the activations "
                "of a forward pass in training mode since the last removal, and saw none."
            )
        return {key: torch.stack(tensors) for key, tensors in parts.items()}

    def _recover(
        self,
        layers: dict[str, LoRALinear],
        names: list[str],
        matrices: Batch,
        removed: dict[str, Tensor],
    ) -> None:
        if self.recovery == "none":
            return
        # With global allocation the counts differ, and with them the shapes.
        by_count: dict[int, list[int]] = defaultdict(list)
        for i, name in enumerate(names):
            by_count[len(removed[name])].append(i)
        for count, members in by_count.items():
            if count:
                part = {key: value[members] for key, value in matrices.items()}
                gone = torch.stack([removed[names[i]] for i in members])
                for i, delta_B, delta_A in zip(
                    members, *self._corrections(part, gone), strict=True
                ):
                    _add_to(layers[names[i]].lora_B, delta_B)
                    _add_to(layers[names[i]].lora_A, delta_A)

    def _corrections(self, m: Batch, gone: Tensor) -> tuple[Tensor, Tensor]:
        """Changes of B (n, d_out, r) and A (n, r, d_in); what is removed may take any value."""
        if self.recovery == "activation":
            change = recovery.activation_recovery(m["B"], m["C"], gone, self.damping)
            return change, torch.zeros_like(m["A"])
        H_B, H_A = linalg.damped(m["H_B"], self.damping), linalg.damped(m["H_A"], self.damping)
        change_B = recovery.gradient_recovery(m["B"], m["grad_B"], H_B, gone, self.max_ratio)
        change_A = recovery.gradient_recovery(m["A"].mT, m["grad_A"].mT, H_A, gone, self.max_ratio)
        return change_B, change_A.mT

    def final_parameters(self, model: nn.Module) -> int:
        """The count at ``target_r`` in every layer; with ``global`` allocation, its mean."""
        match_ranks((layer, self.target_r) for layer in adapter_layers(model).values())
        return super().final_parameters(model)  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """Decisions, and the sums since the last removal, as this process has seen them."""
        return {**super().state_dict(), "sums": {name: dict(s) for name, s in self.sums.items()}}

    def merge_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """Activation sums of every process; all else is the same on all."""
        return {**super().merge_states(states), "sums_of": [state["sums"] for state in states]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        On as many processes each goes on with its own sums, exactly; on another number the first
        goes on with those of all.
        """
        super().load_state_dict(state_dict)
        saved = state_dict.get("sums_of", [state_dict["sums"]])
        if len(saved) == distributed.world_size():
            own = saved[distributed.process_index()]
        else:
            own = _without_activations(state_dict["sums"])
            for sums in saved if distributed.process_index() == 0 else ():
                for name, entry in sums.items():
                    total = own.setdefault(name, {})
                    for key in _ACTIVATIONS:
                        if key in entry:
                            total[key] = entry[key] + total.get(key, 0.0)
        self.sums = defaultdict(dict, {name: dict(entry) for name, entry in own.items()})


_ACTIVATIONS = ("C", "tokens")


def _without_activations(sums: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {n: {k: v for k, v in s.items() if k not in _ACTIVATIONS} for n, s in sums.items()}


def _gradients(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """Gradients of the living part of B (d_out, rank) and A (rank, d_in), over all processes."""
    found = []
    for parameter in (layer.lora_B, layer.lora_A):
        grad = distributed.gradient(parameter)
        shape = distributed.shape(parameter)
        found.append(torch.zeros(shape, device=parameter.device) if grad is None else grad)
    return found[0][:, : layer.rank], found[1][: layer.rank]


def _add_to(parameter: nn.Parameter, change: Tensor) -> None:
    """Add to the front of a parameter."""
    full = distributed.value(parameter).clone()
    full[tuple(slice(n) for n in change.shape)] += change
    distributed.write(parameter, full)


def _finite(grads: dict[str, tuple[Tensor, Tensor]]) -> bool:
    norms = [grad for pair in grads.values() for grad in pair]
    return bool(torch.nn.utils.get_total_norm(norms).isfinite())


def _same_shape(layers: dict[str, LoRALinear]) -> list[list[str]]:
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, layer in layers.items():
        groups[layer.out_features, layer.in_features, layer.rank].append(name)
    return list(groups.values())
