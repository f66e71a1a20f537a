"""Adapted models that classify a text or give it a score: an encoder or LLaMA under a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.errors import UserError
from lightning_peft.models.loading import load_classifier
from lightning_peft.modules.answering import AnsweringModule
from lightning_peft.modules.predictions import PredictionWriter
from lightning_peft.modules.window import Batch
from lightning_peft.strategies import AdapterStrategy


class SequenceClassificationModule(AnsweringModule):
    """Trains and tests an adapted ``AutoModelForSequenceClassification``.

    The head (RoBERTa's ``classifier``, LLaMA's ``score``) trains in full beside the adapters: it is
    put among the adapter's ``modules_to_save``, so that checkpoints and the exported adapter hold
    it. Classes, or one score under a squared error, are the data module's.

    The data module is a :class:`LabelledDataModule`: it gives batches with ``input_ids``,
    ``attention_mask`` (batch, tokens), ``labels`` (batch,) and ``token_type_ids`` where the
    tokenizer has them, and says ``label_names``, ``pad_id``, ``metrics`` and ``score``.
    ``val_score`` is the first of its metrics.

    Args:
        kwargs: The arguments of :class:`AdaptedModule`.
    """

    bare_base = "the bare base model under a new head"

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(model_name_or_path, **kwargs)
        self.val_loss = MeanMetric()
        self.val_metrics = nn.ModuleDict()
        self._labels: list[str] | None = None
        self._order: list[int] | None = None

    # Building.

    def load_base(self) -> Any:
        """Load the base model under its head, in training mode."""
        data = self.data_module()
        names = list(data.label_names or ["score"]) if data else None
        model, head = load_classifier(
            self.source(), names, regression=data is not None and not data.label_names
        )
        self._labels, self._order = names, _order(model.config, names)
        if data is not None:
            # A decoder finds the last token of each row by what rows are padded with.
            model.config.pad_token_id = data.pad_id
        for name in head:
            in_float32(model.get_submodule(name))
        train_in_full(self.adapter, head)
        return model

    def data_module(self) -> Any:
        """Says the classes, gives the records, and scores the answers; None without a trainer.

        Raises:
            UserError: If it has no classes.
        """
        if self._trainer is None:
            return None
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "label_names"):
            raise UserError(
                f"{type(self).__name__} takes its classes from the data module (label_names), "
                f"which {type(data).__name__} does not have; GlueDataModule is one that has."
            )
        return data

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the labels too."""
        super().on_save_checkpoint(checkpoint)
        pad_id = self.model.config.pad_token_id
        checkpoint["head"] = {"labels": self._labels, "pad_token_id": pad_id}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that labels are the same, or take them from the checkpoint."""
        saved = checkpoint.get("head")
        if saved and self._labels is None:
            self._labels = saved["labels"]
            self.model.config.pad_token_id = saved["pad_token_id"]
            resize_head(self.model, self._labels)
        elif saved and saved["labels"] != self._labels:
            raise UserError(
                f"the checkpoint was trained on {', '.join(saved['labels'])}, data has "
                f"{', '.join(self._labels or [])}; give the task that it was trained on."
            )
        super().on_load_checkpoint(checkpoint)

    # Training and validation.

    def _outputs(self, batch: Batch) -> Tensor:
        """Logits in the data's order of classes, or one score, (batch, classes)."""
        inputs = {name: _given(batch, name) for name in ("input_ids", "attention_mask")}
        # RoBERTa has one type only, and would look up another beyond its table's end.
        if "token_type_ids" in batch and getattr(self.model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch["token_type_ids"]
        logits = self.model(**inputs).logits.float()
        return logits if self._order is None else logits[:, self._order]

    def target_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of cross-entropies or squared errors, and the number of records."""
        return _label_loss(self._outputs(batch), _given(batch, "labels"))

    def on_validation_start(self) -> None:
        """Begin with normal tensors; ``trainer.validate`` leaves inference tensors behind."""
        data = self.data_module()
        sets = data.val_sets if len(data.val_sets) > 1 else []
        self.val_loss.reset()
        metrics = {name: data.metrics() for name in ("all", *sets)}
        self.val_metrics = nn.ModuleDict(metrics).to(self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and predictions."""
        outputs = self._outputs(batch)
        total, count = _label_loss(outputs, batch["labels"])
        self.val_loss.update(total / count, weight=count)
        predicted = _predicted(outputs)
        for number, name in enumerate(self.val_metrics, start=-1):
            own = slice(None) if number < 0 else batch["set"] == number
            if len(predicted[own]):
                self._metrics(name).update(predicted[own], batch["labels"][own])

    def on_validation_epoch_end(self) -> None:
        """Log the loss, the score to select by, and all metrics by name."""
        values = {f"val_{k}": v for k, v in self._metrics("all").compute().items()}
        score = values[f"val_{self.data_module().metric_names[0]}"]
        for name in list(self.val_metrics)[1:]:
            found = self._metrics(name).compute()
            values |= {f"val_{metric}_{name}": value for metric, value in found.items()}
        shown = {"val_loss": self.val_loss.compute(), "val_score": score}
        # Every process has them over all already; Lightning asks for `sync_dist` all the same.
        self.log_dict(shown, prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)

    def _metrics(self, name: str) -> MetricCollection:
        return self.val_metrics[name]  # type: ignore[return-value]

    # Testing.

    @torch.no_grad()
    def answer(self, batch: Batch, writer: PredictionWriter) -> list[Any]:
        """Predict the labels of a batch and write them."""
        asked = writer.unanswered(batch)
        if asked is None:
            return []
        outputs, data = self._outputs(asked), self.data_module()
        shares = outputs.softmax(-1).amax(-1) if outputs.shape[1] > 1 else outputs[:, 0]
        losses = _losses(outputs, asked["labels"])
        columns = (_predicted(outputs), asked["labels"], shares, losses)
        rows = [
            {
                "index": index,
                "output": data.label_text(found),
                "expected": data.label_text(label),
                "score": round(share, 6),
                "loss": loss,
            }
            for index, found, label, share, loss in zip(
                asked["index"], *(column.tolist() for column in columns), strict=True
            )
        ]
        writer.add(asked["task"], rows)
        return [row["output"] for row in rows]


def _given(batch: Batch, name: str) -> Tensor:
    """A tensor of a batch, which anybody's loader may have made."""
    if name not in batch:
        raise UserError(
            f"a batch has no {name!r}, only {', '.join(map(str, batch))}; a loader has to give "
            "input_ids and attention_mask, (batch, tokens), and labels, (batch,)."
        )
    return batch[name]  # type: ignore[no-any-return]


def _label_loss(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    total = _losses(outputs, labels, "sum")
    return total, torch.tensor(len(labels), device=outputs.device)


def _losses(outputs: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
    """Cross-entropies of classes, squared errors of scores."""
    if labels.is_floating_point():
        return F.mse_loss(outputs[:, 0], labels, reduction=reduction)
    return F.cross_entropy(outputs, labels, reduction=reduction)


def _predicted(outputs: Tensor) -> Tensor:
    return outputs.argmax(-1) if outputs.shape[1] > 1 else outputs[:, 0]


def _order(config: Any, names: list[str] | None) -> list[int] | None:
    """Where a model brings a head of the same classes in another order: its place of each class.

    So ``roberta-large-mnli`` begins with contradiction, and GLUE with entailment.
    """
    own = {str(name).lower(): i for i, name in config.id2label.items()}
    if names is None or own.keys() != {name.lower() for name in names}:
        return None
    order = [own[name.lower()] for name in names]
    return None if order == sorted(order) else order


def train_in_full(adapter: AdapterStrategy, head: list[str]) -> None:
    """Put the modules of a head, by name, among those that train and are saved with an adapter."""
    given = adapter.modules_to_save or []
    adapter.modules_to_save = [*given, *(name for name in head if name not in given)]


def in_float32(head: nn.Module) -> None:
    """Let a head train in float32, also over a base in half precision."""
    head.float()
    head.register_forward_pre_hook(_as_float32)


def _as_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def resize_head(model: Any, labels: list[str]) -> None:
    """Give a model's head, which is loaded afterwards, the outputs of some labels."""
    last = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    name, old = last[-1]
    new = nn.Linear(old.in_features, len(labels), old.bias is not None, old.weight.device)
    model.set_submodule(name, new)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: i for i, label in enumerate(labels)}
    model.num_labels = model.config.num_labels
    regression = labels == ["score"]
    model.config.problem_type = "regression" if regression else "single_label_classification"
