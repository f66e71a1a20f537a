"""Watching how much each adapted layer changes its output, and at what rank, during training.

Importance of layer i is ``g_i = mean ‖ΔW_i x‖²`` over the attended tokens of a training batch, ΔW
in eval form (no dropout, no mask) and against the original weight; its share is ``g_i / Σ g`` over
the layers of its kind (LoRA-drop, https://arxiv.org/abs/2402.07721, over a sample there, over one
batch here). Methods that train the weights themselves have ‖ΔW_i‖_F instead, which the column
``measure`` tells apart.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import adapter_layers, kind_of
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.atomic import write_atomically
from lightning_peft.errors import UserError
from lightning_peft.pruning.importance import shares_by_kind
from lightning_peft.reports.records import DECISIONS, IMPORTANCE, Row, read_table
from lightning_peft.strategies.base import AdapterStrategy


class LayerImportance(Callback):
    """Write each layer's mean ‖ΔWx‖², its share within its kind, and its rank.

    Every ``every_n_steps`` optimizer steps the training forward of the step's first micro-batch is
    watched; there is no second forward, and nothing is hooked in between. Into the run's folder go
    ``importance.csv`` (row by row), and at the end of the fit ``decisions.csv`` (what the strategy
    removed or shared, and when) and ``importance.png``. Shares also go to the trainer's loggers,
    except to those that write ``metrics.csv``. Each process measures its own batch, the sums are
    over all of them, and the first process writes.

    Args:
        every_n_steps: Optimizer steps between measurements, at least 1; step 0 is measured.

    Raises:
        UserError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise UserError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._folder: Path | None = None
        self._measures = False
        self._watch: observe_inputs | None = None
        self._last_step = -1
        # Sum over tokens, number of tokens and rank, by layer, of the batch that is being watched.
        self._seen: dict[str, tuple[Tensor, int, int]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file, or go on in that of the interrupted run."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast: on every rank
        self._last_step, self._measures = -1, True
        if trainer.is_global_zero:
            self._folder = folder
            begin_file(folder / "importance.csv", trainer.global_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch this batch if it opens the window of a step that is due."""
        step = trainer.global_step
        if not self._measures or step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        self._seen = {}
        self._watch = observe_inputs(_adapted_model(trainer, pl_module), self._add).start()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """The forward pass is over: record it, before anything is recomputed or removed."""
        self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a batch that had no backward pass (a step that returned None)."""
        self._record(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the decisions and draw the picture; also of a run killed after its last step."""
        # A broadcast: on every rank, also where the first has its folder already.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if self._folder is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            undrawn = (folder / "importance.csv").is_file() and not (
                folder / "importance.png"
            ).is_file()
            self._folder = folder if undrawn and trainer.is_global_zero else None
        self._close(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave a picture of what was seen until then."""
        self._stop_watching()
        self._close(trainer)

    def _add(self, name: str, layer: AdaptedLayer, x: Tensor) -> None:
        # In the middle of a forward under autocast, which would compute this in half precision.
        with torch.autocast(x.device.type, enabled=False):
            total = layer.delta_sq_norm(x).float().sum()
        before, tokens, _ = self._seen.get(name, (0, 0, 0))
        self._seen[name] = (total + before, tokens + len(x), rank_of(layer))

    def _stop_watching(self) -> bool:
        if self._watch is None:
            return False
        self._watch.stop()
        self._watch = None
        return True

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._stop_watching():
            return
        model, measure = _adapted_model(trainer, pl_module), "output"
        if adapter_layers(model):
            self._seen = seen_by_all(model, self._seen)
        else:
            self._seen, measure = _weight_changes(trainer), "weight"
        if self._folder is None:
            return
        if not self._seen:
            _say_why_nothing_was_seen(model, self._last_step)
            return
        rows = importance_rows(self._last_step, self._seen, measure)
        self._seen = {}
        with (self._folder / "importance.csv").open("a", encoding="utf-8", newline="") as file:
            file.write(csv_text(rows, IMPORTANCE))
        shares = {f"importance/{row['layer']}": row["share"] for row in rows}
        for logger in trainer.loggers:
            # Hundreds of columns, most cells empty, would make metrics.csv unreadable.
            if not isinstance(logger, CSVLogger):
                logger.log_metrics(shares, step=self._last_step)

    def _close(self, trainer: Trainer) -> None:
        folder, self._folder, self._measures = self._folder, None, False
        if folder is None:
            return
        strategy = _strategy(trainer)
        try:
            decisions = [] if strategy is None else strategy.decisions
            text = ",".join(DECISIONS) + "\n" + csv_text(decisions, DECISIONS)
            write_atomically(folder / "decisions.csv", lambda path: path.write_text(text))
            if (folder / "importance.csv").read_bytes().count(b"\n") > 1:  # rows, not only names
                self.draw(folder, title="" if strategy is None else type(strategy).__name__)
        except Exception as error:  # a picture that fails must not take a trained adapter with it
            rank_zero_warn(f"importance.png was not drawn: {error}")

    def draw(self, folder: Path, title: str) -> None:
        """Draw the picture of a run's folder."""
        from lightning_peft.reports.pictures import save_importance

        save_importance(folder, title=title)


def rank_of(layer: AdaptedLayer) -> int:
    """A layer's rank; of a form without ranks the highest that its change may have."""
    return min(layer.in_features, layer.out_features) if layer.rank is None else layer.rank


def seen_by_all(
    model: nn.Module, seen: dict[str, tuple[Tensor, int, int]]
) -> dict[str, tuple[Tensor, int, int]]:
    """What all processes have seen of the layers together.

    Args:
        model: The adapted model.
        seen: By layer: sum of ‖ΔWx‖² (scalar), number of tokens, rank.

    Returns:
        The same, over all processes; layers that none has seen are left out.
    """
    if distributed.world_size() == 1:
        return seen
    layers = adapter_layers(model)
    device = next((total.device for total, _, _ in seen.values()), torch.device("cpu"))
    zero = torch.zeros((), device=device)
    sums = torch.stack([seen[n][0].to(device) if n in seen else zero for n in layers]).double()
    counts = torch.tensor([seen[n][1] if n in seen else 0 for n in layers], device=device).double()
    sums, counts = distributed.total([sums, counts])
    return {
        name: (sums[i], int(counts[i]), rank_of(layer))
        for i, (name, layer) in enumerate(layers.items())
        if counts[i]
    }


def importance_rows(
    step: int, seen: Mapping[str, tuple[Tensor, int, int]], measure: str = "output"
) -> list[Row]:
    """Rows of ``importance.csv`` for one step.

    Args:
        step: Optimizer step.
        seen: By layer, in the model's order: sum of ‖ΔWx‖² (scalar), number of tokens, rank.
        measure: What was summed, one of ``MEASURES``.

    Returns:
        A row for each layer; shares are NaN where an importance is not finite.
    """
    device = next(iter(seen.values()))[0].device
    # One transfer for all layers: each would otherwise make the host wait.
    means = torch.stack([total.to(device) / max(tokens, 1) for total, tokens, _ in seen.values()])
    importance = dict(zip(seen, means.tolist(), strict=True))
    if all(math.isfinite(value) for value in importance.values()):
        share = shares_by_kind(importance, kind_of)
    else:
        share = dict.fromkeys(importance, math.nan)
    return [
        {
            "step": step,
            "layer": name,
            "kind": kind_of(name),
            "rank": rank,
            "importance": importance[name],
            "share": share[name],
            "measure": measure,
        }
        for name, (_, _, rank) in seen.items()
    ]


def csv_text(rows: Sequence[Row], columns: Iterable[str]) -> str:
    """Rows as lines of a csv file, without the line of names; floats with nine digits.

    Args:
        rows: The rows.
        columns: Names in order.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        values = (row[name] for name in columns)
        writer.writerow([f"{v:.9g}" if isinstance(v, float) else v for v in values])
    return text.getvalue()


def begin_file(path: Path, global_step: int) -> None:
    """Start ``importance.csv``, or keep of an earlier one what a resumed run does not measure.

    Args:
        path: The file.
        global_step: Optimizer steps made already; 0 starts anew.
    """
    kept = read_table(path, IMPORTANCE) if global_step > 0 and path.is_file() else []
    rows = [row for row in kept if row["step"] < global_step]
    text = ",".join(IMPORTANCE) + "\n" + csv_text(rows, IMPORTANCE)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def _strategy(trainer: Trainer) -> AdapterStrategy | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, AdapterStrategy)), None)


def _weight_changes(trainer: Trainer) -> dict[str, tuple[Tensor, int, int]]:
    """What methods without adapters have to show: the change itself may have any rank."""
    strategy = _strategy(trainer)
    if strategy is None or strategy.model is None:
        return {}
    found = {}
    for name, change in strategy.weight_changes(strategy.model).items():
        weight: Tensor = strategy.model.get_submodule(name).weight  # type: ignore[assignment]
        found[name] = (change, 1, min(weight.shape))
    return found


def _adapted_model(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    """The module whose forward runs the adapted layers, and in which decisions name them."""
    strategy = _strategy(trainer)
    for model in (strategy.model if strategy else None, getattr(pl_module, "model", None)):
        if isinstance(model, nn.Module) and adapter_layers(model):
            return model
    return pl_module


def _say_why_nothing_was_seen(model: nn.Module, step: int) -> None:
    if adapter_layers(model):
        rank_zero_warn(
            f"LayerImportance saw no adapted layer at step {step}: training_step must call the "
            f"adapted {type(model).__name__} itself, as model(...), not its parts."
        )
    else:
        rank_zero_info("LayerImportance has nothing to watch: the model has no adapted layers.")
