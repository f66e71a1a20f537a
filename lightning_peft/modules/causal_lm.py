"""Adapted causal language models: loss on target tokens, tests by generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lightning_peft.errors import UserError
from lightning_peft.models.generation import generate
from lightning_peft.models.loading import load_causal_lm
from lightning_peft.models.loss import chunked_loss, last_hidden, plain_head, token_loss
from lightning_peft.models.packing import model_inputs, one_row
from lightning_peft.models.sharded_loading import LoadsWhole, stored_causal_lm
from lightning_peft.modules.adapted import AdaptedModule, Batch
from lightning_peft.modules.predictions import PredictionWriter


class CausalLMModule(AdaptedModule):
    """Trains and tests an adapted causal language model.

    The data module gives batches with ``input_ids``, ``attention_mask``, ``labels`` (all (batch,
    tokens)) and ``num_target_tokens``, and with ``position_ids`` where records are packed; for
    tests it says how answers are generated (``decoding``, ``follow_up``) and scored (``judge``,
    ``score``).

    Args:
        kwargs: The arguments of :class:`AdaptedModule`.
    """

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(model_name_or_path, **kwargs)
        self.val_loss, self.val_accuracy = MeanMetric(), MeanMetric()
        self._writer: PredictionWriter | None = None
        # Whether the loss can do without logits; the first batch tells.
        self._chunks: bool | None = None

    def load_base(self) -> Any:
        """Load the base model, in training mode."""
        return load_causal_lm(**self.how_to_load())

    def load_shapes(self) -> Any:
        """The base with its values still in their files."""
        if type(self).load_base is not CausalLMModule.load_base:
            raise LoadsWhole(f"{type(self).__name__} has a load_base of its own")
        return stored_causal_lm(**self.how_to_load())

    def setup(self, stage: str) -> None:
        """Refuse data with labels instead of texts."""
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "label_names"):
            raise UserError(
                f"{type(self).__name__} answers in texts, but {type(data).__name__} has labels; "
                "take SequenceClassificationModule."
            )

    # Training and validation.

    def _answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (batch, kept, vocabulary) and targets (batch, kept).

        Only positions at which some row has a target go through the output layer.
        """
        batch = one_row(batch, self.model.config)
        labels = batch["labels"][:, 1:]
        positions = (labels != -100).any(0).nonzero()[:, 0]
        output = self.model(**model_inputs(batch), use_cache=False, logits_to_keep=positions)
        return output.logits.float(), labels[:, positions]

    def target_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropy over target tokens, and their count; logits are not kept."""
        head = None if self._chunks is False else plain_head(self.model)
        if head is None:
            return token_loss(*self._answers(batch))
        batch = one_row(batch, self.model.config)
        labels = batch["labels"][:, 1:]
        rows, positions = (labels != -100).nonzero(as_tuple=True)
        probe = positions[: 0 if self._chunks else 1]
        hidden, logits = last_hidden(self.model, probe, **model_inputs(batch))
        if self._chunks is None:
            # Some models do more to their logits than the output layer does: a scale, a cap.
            alone = F.linear(hidden[:, probe], head.weight, head.bias)
            self._chunks = torch.allclose(logits, alone, rtol=1e-2, atol=1e-3)
            if not self._chunks:
                return self.target_loss(batch)
        return chunked_loss(hidden[rows, positions], head, labels[rows, positions]), (
            torch.tensor(len(rows), device=labels.device)
        )

    def on_validation_start(self) -> None:
        """Begin with normal tensors; ``trainer.validate`` leaves inference tensors behind."""
        self.val_loss.reset()
        self.val_accuracy.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss over target tokens, and the share of responses that are right token by token.

        With the true response before it each token is right exactly if greedy decoding gives that
        response, so ``val_accuracy`` is that of greedy answers that match to the letter.
        """
        logits, targets = self._answers(batch)
        total, count = token_loss(logits, targets)
        right = ((logits.argmax(-1) == targets) | (targets == -100)).all(-1)
        self.val_loss.update(total / count.clamp_min(1), weight=count)
        self.val_accuracy.update(right.float())
        metrics = {"val_loss": self.val_loss, "val_accuracy": self.val_accuracy}
        self.log_dict(metrics, prog_bar=True, on_epoch=True, batch_size=len(batch["input_ids"]))

    # Testing by generation.

    def on_test_start(self) -> None:
        """Open the predictions, and go on with those of an interrupted test."""
        if not self._adapted and self.trainer.ckpt_path is None:
            rank_zero_warn(
                "neither a checkpoint nor an adapter was given: this scores the bare base model "
                "(--ckpt_path last, or --model.peft_path FOLDER)."
            )
        self._open_predictions()

    def on_predict_start(self) -> None:
        """Open the predictions, and go on with those of an interrupted run."""
        self._open_predictions()

    def _open_predictions(self) -> None:
        trainer = self.trainer
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        weights = str(trainer.ckpt_path or self.peft_path or self.model_name_or_path)
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._writer = PredictionWriter(folder, data, weights, trainer.global_rank)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generate, judge and write the answers to one batch of prompts."""
        self.predict_step(batch, batch_idx, dataloader_idx)

    @torch.no_grad()
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Any]:
        """Generate, judge and write the answers to one batch of prompts."""
        assert self._writer is not None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        asked: Batch | None = self._writer.unanswered(batch)
        turns: list[list[str]] = []
        while asked is not None:
            turns.append(generate(self.model, asked, data.decoding(batch["task"]), data.encoder))
            follow_up = data.follow_up(asked, turns[-1])
            if follow_up is None:
                self._writer.write(asked, turns)
            asked = follow_up
        return [output for turn in turns for output in turn]

    def on_test_epoch_end(self) -> None:
        """Put the predictions together, score each task, and say all scores."""
        assert self._writer is not None
        scores = {task: found for task, found in self._writer.finish().items() if found}
        if not scores:  # such as conversations, which are judged elsewhere
            rank_zero_info(f"no scores; the answers are in {self._writer.folder}")
            return
        first = [next(iter(metrics.values())) for metrics in scores.values()]
        scores["average"] = {"": sum(first) / len(first)}
        lines = []
        for task, metrics in scores.items():
            for metric, value in metrics.items():
                name = f"{task}/{metric}" if len(metrics) > 1 else task
                self.log(f"test/{name}", value, rank_zero_only=True)
                lines.append(f"  {name:28}{value:.4f}")
        rank_zero_info("\n".join(["scores", *lines]))

    def on_predict_epoch_end(self) -> None:
        """Put the predictions together."""
        assert self._writer is not None
        self._writer.finish(score=False)
