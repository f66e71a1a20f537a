"""Adapted causal language models: loss on target tokens, tests by generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_peft.errors import UserError
from lightning_peft.models.generation import generate
from lightning_peft.models.loading import load_causal_lm
from lightning_peft.models.loss import TargetLoss, target_logits, token_loss
from lightning_peft.models.sharded_loading import LoadsWhole, stored_causal_lm
from lightning_peft.modules.answering import AnsweringModule, mean_loss
from lightning_peft.modules.likelihood import reference_losses
from lightning_peft.modules.predictions import PredictionWriter
from lightning_peft.modules.window import Batch


class CausalLMModule(AnsweringModule):
    """Trains and tests an adapted causal language model.

    The data module gives batches with ``input_ids``, ``attention_mask``, ``labels`` (all (batch,
    tokens)) and ``num_target_tokens`` (see :mod:`lightning_peft.modules.window`), and with
    ``position_ids`` where records are packed; for tests it says how answers are generated
    (``decoding``, ``follow_up``) and scored (``judge``, ``score``).

    Args:
        kwargs: The arguments of :class:`AdaptedModule`.
    """

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(model_name_or_path, **kwargs)
        self.val_loss, self.val_accuracy = MeanMetric(), MeanMetric()
        self._target_loss = TargetLoss()

    def load_base(self) -> Any:
        """Load the base model, in training mode."""
        return load_causal_lm(self.source())

    def load_shapes(self) -> Any:
        """The base with its values still in their files."""
        if type(self).load_base is not CausalLMModule.load_base:
            raise LoadsWhole(f"{type(self).__name__} has a load_base of its own")
        return stored_causal_lm(self.source())

    def setup(self, stage: str) -> None:
        """Refuse data with labels instead of texts."""
        data = self.data_module()
        if hasattr(data, "label_names"):
            raise UserError(
                f"{type(self).__name__} answers in texts, but {type(data).__name__} has labels; "
                "take SequenceClassificationModule."
            )

    # Training and validation.

    def target_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropy over target tokens, and their count; logits are not kept."""
        return self._target_loss(self.model, batch)

    def on_validation_start(self) -> None:
        """Begin with normal tensors; ``trainer.validate`` leaves inference tensors behind."""
        self.val_loss.reset()
        self.val_accuracy.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss over target tokens, and the share of responses that are right token by token.

        With the true response before it each token is right exactly if greedy decoding gives that
        response, so ``val_accuracy`` is that of greedy answers that match to the letter.
        """
        logits, targets = target_logits(self.model, batch)
        total, count = token_loss(logits, targets)
        right = ((logits.argmax(-1) == targets) | (targets == -100)).all(-1)
        self.val_loss.update(total / count.clamp_min(1), weight=count)
        self.val_accuracy.update(right.float())
        metrics = {"val_loss": self.val_loss, "val_accuracy": self.val_accuracy}
        self.log_dict(metrics, prog_bar=True, on_epoch=True, batch_size=len(batch["input_ids"]))

    # Testing by generation.

    @torch.no_grad()
    def answer(self, batch: Batch, writer: PredictionWriter) -> list[Any]:
        """Generate, judge and write the answers to one batch of prompts."""
        data = self.data_module()
        asked: Batch | None = writer.unanswered(batch)
        turns: list[list[str]] = []
        while asked is not None:
            turns.append(generate(self.model, asked, data.decoding(batch["task"]), data.encoder))
            follow_up = data.follow_up(asked, turns[-1])
            if follow_up is None:
                writer.write(asked, turns, self._reference_losses(asked))
            asked = follow_up
        return [output for turn in turns for output in turn]

    def _reference_losses(self, asked: Batch) -> list[dict[str, float | int]] | None:
        """What the loss per token is made of; None where a task has no references."""
        find = getattr(self.data_module(), "reference_batches", None)
        batches = list(find(asked)) if find is not None else []
        records = len(asked["index"])
        return reference_losses(self.model, batches, records, self.device) if batches else None

    def named_scores(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """By task, and metric where there are several; the mean loss, and that of first metrics."""
        scored = {task: metrics for task, metrics in scores.items() if metrics}
        named = {
            f"{task}/{metric}" if len(metrics) > 1 else task: value
            for task, metrics in scored.items()
            for metric, value in metrics.items()
        }
        first = [next(iter(metrics.values())) for metrics in scored.values()]
        average = {"average": sum(first) / len(first)} if first else {}
        return {**named, **mean_loss(scored), **average}
