"""LoRA-drop (Zhou et al. 2024, https://arxiv.org/abs/2402.07721): LoRA where it matters.

1. Probe: train ordinary LoRA on a sample of the training set for a few epochs, and throw it away.
2. Importance of layer i: ``g_i = mean ‖s B_i A_i x‖²`` over the sample's non-padding tokens, as a
   share of its module kind's sum.
3. From the most important on, layers keep their own LoRA until their shares reach the threshold;
   the others of that kind share one.
4. Train from the start under that layout.

The paper leaves open how tokens of an example are put together: here their mean, padding left out.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft import distributed
from lightning_peft.adapters.attach import AttachReport, kind_of, lora_layers, make_report
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.state import adapter_state_dict
from lightning_peft.atomic import write_text
from lightning_peft.errors import MissingFile, UserError
from lightning_peft.pruning.importance import layers_to_keep, shares
from lightning_peft.runs import run_folder
from lightning_peft.strategies.base import AdapterStrategy, Loss, Sample
from lightning_peft.strategies.layer_importance import measure_importance
from lightning_peft.strategies.signatures import MakeOptimizer

Layout = dict[str, dict[str, Any]]
Ablation = Literal["without_share", "inverse", "random", "top_k"]


class LoRADrop(AdapterStrategy):
    """LoRA on the layers whose output matters, one shared LoRA for the rest of each kind.

    In a plain loop call :meth:`prepare` after ``attach``, before the optimizer is made.

    Args:
        r: Rank.
        threshold: T, in (0, 1]: layers keep their own LoRA until their shares of the kind's
            importance reach it.
        sample_ratio: Share of the training set that the probe sees, in (0, 1].
        probe_epochs: Passes of the probe over its sample, at least 1.
        max_probe_steps: Upper bound of the probe's optimizer steps, for samples that do not end.
        layout: File of an earlier probe (``layout.json`` of its run), used instead of probing.
        ablation: Of the paper's Table 7: ``without_share`` (the rest has no LoRA), ``inverse`` (the
            least important keep theirs), ``random``, ``top_k`` (the layers nearest the output); the
            last three keep as many layers as LoRA-drop itself and share the rest.
        lora: The arguments that all strategies share.

    Raises:
        UserError: If a number lies outside its range, or ``ablation`` is none of these.
    """

    instead_of_data = (
        "give model.adapter.layout the layout.json of an earlier probe, such as that of a run on "
        "one device, with DDP or ZeRO-2 and --trainer.max_steps 1"
    )

    def __init__(
        self,
        r: int = 8,
        threshold: float = 0.9,
        sample_ratio: float = 0.1,
        probe_epochs: int = 3,
        max_probe_steps: int | None = None,
        layout: str | None = None,
        ablation: Ablation | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(r=r, **lora)
        for key, value in (("threshold", threshold), ("sample_ratio", sample_ratio)):
            if not 0 < value <= 1:
                raise UserError(f"{key} must lie in (0, 1], got {value}.")
        for key, count in (("probe_epochs", probe_epochs), ("max_probe_steps", max_probe_steps)):
            if count is not None and count < 1:
                raise UserError(f"{key} must be at least 1, got {count}.")
        if ablation not in (None, "without_share", "inverse", "random", "top_k"):
            raise UserError(
                f"ablation must be without_share, inverse, random or top_k, got {ablation!r}."
            )
        self.threshold, self.sample_ratio, self.probe_epochs = threshold, sample_ratio, probe_epochs
        self.max_probe_steps, self.ablation = max_probe_steps, ablation
        self.layout_file = layout
        # For each layer its importance, its share of its kind, and its role: kept, shared or
        # removed.
        self.layout: Layout = {}

    def attach(self, model: nn.Module, initialize: bool = True) -> AttachReport:
        """Attach as every strategy does, under the layout of the file if one is given."""
        layout = _read_layout(Path(self.layout_file)) if self.layout_file else None
        report = super().attach(model, initialize)
        if layout is None:
            return report
        self.apply(model, layout)
        return make_report(model, report.strategy, report.matched)

    @property
    def looks_at_data(self) -> bool:
        """Unless a layout is given."""
        return not (self.layout or self.layout_file)

    def prepare(
        self,
        model: nn.Module,
        sample: Sample,
        loss: Loss,
        optimizer: MakeOptimizer = torch.optim.AdamW,
        accumulate: int = 1,
    ) -> None:
        """Probe, unless a layout is known already, and share layers accordingly.

        With several processes each probes with its own batches: gradients are averaged, and
        importances are means over all tokens, so that all find one layout.
        """
        if self.layout:
            return
        fresh = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
        devices = {t.device.index for t in fresh.values() if t.is_cuda}
        # Training after a probe sees the random stream that it would see under a given layout.
        with torch.random.fork_rng(devices=sorted(devices)):
            batches = sample(self.sample_ratio)
            self._train(model, batches, loss, optimizer, accumulate)
            limit = self.max_probe_steps and self.max_probe_steps * accumulate
            importance = measure_importance(model, itertools.islice(batches, limit), loss)
            layout = self.decide(importance, lora_layers(model))
        roles = _roles(layout)
        distributed.assert_agreement(0, roles, "LoRA-drop's layout")
        model.load_state_dict(fresh, strict=False)
        model.zero_grad(set_to_none=True)
        self.apply(model, layout)

    def _train(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss,
        optimizer: MakeOptimizer,
        accumulate: int,
    ) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        updates = optimizer(trained)
        was_training, step = model.training, 0
        model.train()
        for _ in range(self.probe_epochs):
            for window in _windows(batches, accumulate):
                if step == self.max_probe_steps:
                    break
                for batch in window:
                    ((loss(batch) + self.penalty(model)) / len(window)).backward()
                distributed.average_gradients(trained)
                self.before_step(model, updates, step)
                updates.step()
                self.after_step(model, updates, step)
                updates.zero_grad()
                step += 1
        model.train(was_training)
        if step == 0:
            raise UserError(f"the probe's sample is empty at sample_ratio {self.sample_ratio}.")

    def decide(self, importance: dict[str, float], layers: dict[str, LoRALinear]) -> Layout:
        """Which layers keep their own LoRA.

        Args:
            importance: g by layer, in the model's order.
            layers: The layers by name; only those of one kind and one shape can share.

        Returns:
            The layout.
        """
        kinds: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, layer in layers.items():
            kinds[_alike(name, layer)].append(name)
        layout: Layout = {}
        for names in kinds.values():
            values = [importance[name] for name in names]
            kept = {names[i] for i in self._kept(values)}
            rest = "removed" if self.ablation == "without_share" else "shared"
            for name, value, share in zip(names, values, shares(values), strict=True):
                role = "kept" if name in kept else rest
                layout[name] = {"importance": value, "share": share, "role": role}
        return layout

    def _kept(self, importance: list[float]) -> list[int]:
        chosen = layers_to_keep(importance, self.threshold)
        k, n = len(chosen), len(importance)
        if self.ablation == "inverse":
            return sorted(range(n), key=lambda i: importance[i])[:k]
        if self.ablation == "random":
            return distributed.from_first(torch.randperm(n))[:k].tolist()
        if self.ablation == "top_k":
            return list(range(n - k, n))
        return chosen

    def apply(self, model: nn.Module, layout: Layout) -> None:
        """Share and remove layers as a layout says.

        Args:
            model: The adapted model.
            layout: Must name exactly the adapted layers.

        Raises:
            UserError: If it names others.
        """
        layers = lora_layers(model)
        differing = sorted(layout.keys() ^ layers.keys())
        if differing:
            where = "the model" if differing[0] in layout else "the layout"
            raise UserError(
                f"the LoRA-drop layout is of other layers: {differing[0]} is not in {where} "
                f"({len(differing)} differ); probe again, or give the target_modules of that probe."
            )
        leaders: dict[tuple[Any, ...], LoRALinear] = {}
        for name, layer in layers.items():
            role = layout[name]["role"]
            if role == "removed":
                model.set_submodule(name, layer.base)
                self.note(0, name, "removed", 0)
            elif role == "shared":
                layer.share_with(leaders.setdefault(_alike(name, layer), layer))
                self.note(0, name, "shared", layer.rank)
        self.layout = layout

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout into the run's folder, for later runs to use."""
        folder = run_folder(trainer)  # on every rank, since finding it is a broadcast
        if self.layout and trainer.is_global_zero and trainer.loggers and folder is not None:
            write_text(folder / "layout.json", json.dumps(self.layout, indent=2) + "\n")

    def restructure(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take the layout from a checkpoint instead of probing again."""
        if not self.layout:
            self.apply(model, state["layout"])
        elif _roles(self.layout) != _roles(state["layout"]):
            raise UserError(
                "the checkpoint was trained under another LoRA-drop layout than this model's; give "
                "its run's layout.json as model.adapter.layout, or set trainer.ckpt_path before "
                "trainer.fit(), so that nothing is probed."
            )

    def final_parameters(self, model: nn.Module) -> int | None:
        """None before the probe, which decides on the layers that share."""
        return super().final_parameters(model) if self.layout else None

    def state_dict(self) -> dict[str, Any]:
        """Decisions and the layout."""
        return {**super().state_dict(), "layout": self.layout}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.layout = state_dict["layout"]


def _alike(name: str, layer: LoRALinear) -> tuple[Any, ...]:
    """The same for layers that can share: of one kind, shape, rank and scaling."""
    shape = (layer.out_features, layer.in_features, layer.r)
    return kind_of(name), *shape, layer.scaling


def _windows(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Batches in groups of an optimizer step's; the last may be short."""
    stream = iter(batches)
    while window := list(itertools.islice(stream, size)):
        yield window


def _roles(layout: Layout) -> dict[str, str]:
    return {name: entry["role"] for name, entry in layout.items()}


def _read_layout(path: Path) -> Layout:
    if not path.is_file():
        raise MissingFile(f"layout: {path} does not exist; give the layout.json of an earlier run.")
    try:
        layout = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"layout: {path} is not JSON: {error}.") from error
    roles = {"kept", "shared", "removed"}
    if not isinstance(layout, dict) or not all(
        isinstance(entry, dict) and entry.get("role") in roles for entry in layout.values()
    ):
        raise UserError(
            f"layout: {path} does not give a role (kept, shared, removed) for each layer."
        )
    return layout
