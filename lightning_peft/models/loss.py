"""The loss of a language model without its logits: the output layer and the loss, chunk by chunk.

With a vocabulary of 128,256 the logits of 2,048 tokens take a gigabyte, and their gradient another.
``torch.nn.functional.linear_cross_entropy`` (torch 2.13) computes logits, loss and gradient of the
hidden states for some rows at a time. What remains is the gradient of the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.datamodules.loading.batches import target_positions
from lightning_peft.errors import UserError
from lightning_peft.models.packing import model_inputs, one_row

_CHUNK = 256  # rows; torch's automatic choice is six times slower at a large vocabulary
_COLUMNS = 8  # of the output layer, by which is seen whether its output is the logits
_LOGITS = 2**25  # of a chunk, where the vocabulary is small enough for more rows


class TargetLoss:
    """The loss of a causal language model over a batch's targets, without logits if it can.

    It can where the output layer alone makes the logits. Some models scale or cap them afterwards,
    which shows in the few columns that :func:`head_inputs` computes: they come out of the model as
    they left the layer, to the bit, or the model computes its logits itself from then on. This is
    asked of the first batch, the second, the fourth and so on, and every 256th, since what a cap
    does to small logits may be lost in rounding.

    Attributes:
        without_logits: What the last batch that was asked told; None before the first.
    """

    def __init__(self) -> None:
        self.without_logits: bool | None = None
        self._batches = 0

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Sum of the loss over target tokens, and their count.

        Args:
            model: A causal language model of transformers.
            batch: With ``input_ids``, ``attention_mask`` and ``labels``, (batch, tokens), and with
                ``target_positions`` where its loader has found them.

        Raises:
            UserError: If it is none.
        """
        batch = whole_batch(batch, model.config)
        head = None if self.without_logits is False else plain_head(model)
        if head is None:
            return token_loss(*target_logits(model, batch))
        row = one_row(batch, model.config)
        labels = row["labels"][:, 1:]
        found = batch.get("target_positions")
        if found is None or row is not batch:
            found = target_positions(row["labels"])
        rows, positions = found
        targets = labels[rows, positions]
        hidden, alone, shown = head_inputs(model, head, targets[:_COLUMNS], **model_inputs(row))
        if self._asks(targets) or hidden is None:
            same = (shown == alone) | shown.isnan()  # a run that has broken down tells nothing
            self._note(hidden is not None and bool(same.all()))
        if hidden is None or self.without_logits is False:
            return token_loss(*target_logits(model, batch))
        loss = chunked_loss(hidden[rows, positions], head, targets)
        return loss, torch.tensor(len(rows), device=labels.device)

    def _asks(self, targets: Tensor) -> bool:
        """Whether this batch is one of those that are asked; one without targets tells nothing."""
        self._batches += len(targets) > 0
        seen = self._batches
        return len(targets) > 0 and (seen & (seen - 1) == 0 or seen % 256 == 0)

    def _note(self, alone: bool) -> None:
        if self.without_logits and not alone:
            rank_zero_warn(
                "the model changes its logits behind the output layer, which could not be told "
                "from rounding before; from here on its loss is taken from all of them."
            )
        self.without_logits = alone


def target_logits(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (batch, kept, vocabulary) in float32, and targets (batch, kept) of which -100 is none.

    Only positions at which some row has a target go through the output layer.

    Args:
        model: A causal language model of transformers.
        batch: With ``input_ids``, ``attention_mask`` and ``labels``, (batch, tokens).

    Raises:
        UserError: If it is none.
    """
    batch = one_row(whole_batch(batch, model.config), model.config)
    labels = batch["labels"][:, 1:]
    positions = (labels != -100).any(0).nonzero()[:, 0]
    logits = model(**model_inputs(batch), use_cache=False, logits_to_keep=positions).logits
    if logits.shape[1] != len(positions):  # of a model that takes the option and does not follow it
        logits = logits[:, positions]
    return logits.float(), labels[:, positions]


def row_losses(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Each row's sum of the loss over its targets, and their count, (batch,) each.

    Args:
        model: A causal language model of transformers.
        batch: With ``input_ids``, ``attention_mask`` and ``labels``, (batch, tokens); not packed.
    """
    logits, targets = target_logits(model, batch)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses.sum(1), (targets != -100).sum(1)


def whole_batch(batch: Any, config: Any) -> dict[str, Any]:
    """A batch of anybody's loader as a model and its loss read it.

    Without an ``attention_mask`` every token is one to attend to, unless a row begins or ends in
    what the model pads with: whether that is padding, only a mask can tell.

    Args:
        batch: What the loader gives.
        config: The model's; says what it pads with.

    Raises:
        UserError: If ``input_ids`` or ``labels`` are missing or not of one shape, or the mask is
            missing beside padding.
    """
    wanted = "a loader has to give input_ids, labels and attention_mask, (batch, tokens) each"
    if not isinstance(batch, Mapping):
        raise UserError(f"a batch is a {type(batch).__name__} and no dictionary; {wanted}.")
    for name in ("input_ids", "labels"):
        if not isinstance(batch.get(name), Tensor):
            found = ", ".join(str(key) for key in batch) or "nothing"
            raise UserError(f"a batch has no tensor {name!r}, only {found}; {wanted}.")
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.shape != labels.shape or ids.ndim != 2:
        shapes = f"{tuple(ids.shape)} and labels of {tuple(labels.shape)}"
        raise UserError(f"a batch has input_ids of the shape {shapes}; {wanted}.")
    if batch.get("attention_mask") is not None or "position_ids" in batch:
        return dict(batch)
    pad_id = getattr(config, "pad_token_id", None)
    if pad_id is not None and ids.numel() and bool((ids[:, [0, -1]] == pad_id).any()):
        raise UserError(
            f"a batch has rows that begin or end in {pad_id}, which the model pads with, and no "
            "'attention_mask'; give one, 1 at tokens and 0 at padding."
        )
    return {**batch, "attention_mask": torch.ones_like(ids)}


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over targets, and their count.

    Args:
        logits: (batch, tokens, vocabulary).
        targets: (batch, tokens); -100 is none.
    """
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total, (targets != -100).sum()


def chunked_loss(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy of ``head(hidden)``, float32, without all logits at once.

    Args:
        hidden: (n, d).
        head: The output layer, with (vocabulary, d) weights.
        targets: (n,), all of them targets.
    """
    rows = max(_CHUNK, _LOGITS // head.out_features)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)  # type: ignore[attr-defined]
    # A call for each chunk, since a call gives its sum in the dtype of the hidden states.
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    sums = [
        F.linear_cross_entropy(  # type: ignore[attr-defined]
            h, head.weight, t, linear_bias=head.bias, reduction="sum", options=options
        ).float()
        for h, t in parts
    ]
    return torch.stack(sums).sum() if sums else hidden.float().sum() * 0


def plain_head(model: Any) -> nn.Linear | None:
    """The output layer of a model, where it can be multiplied with by hand.

    None where torch has no such loss, or the layer is adapted, quantized, watched by hooks or
    sharded.

    Args:
        model: A causal language model of transformers.
    """
    head = model.get_output_embeddings()
    if (
        not hasattr(F, "linear_cross_entropy")
        or type(head) is not nn.Linear
        or type(head.weight) not in (nn.Parameter, Tensor)
        or head._forward_hooks
        or head._forward_pre_hooks
        or "forward" in vars(head)  # somebody else's, as accelerate's hooks are
        or hasattr(model, "unshard")  # FSDP gathers the weight in the model's own forward only
    ):
        return None
    return head


def head_inputs(
    model: Any, head: nn.Linear, columns: Tensor, **inputs: Any
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Run a model and take what its output layer reads, wherever in the model it is called.

    While the model runs, the layer gives a few of its columns only.

    Args:
        model: A causal language model of transformers.
        head: Its output layer.
        columns: The columns' tokens, (k,).
        inputs: Of the model.

    Returns:
        Hidden states (batch, tokens, d), or None where the model does not call its output layer
        once, on all positions; the columns as the layer gave them, and as the model did, both
        (batch, tokens, k).
    """
    weight = head.weight.detach()[columns]
    bias = None if head.bias is None else head.bias.detach()[columns]
    read: list[Tensor] = []
    gave: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        read.append(hidden)
        gave.append(F.linear(hidden.detach(), weight, bias))
        return gave[-1]

    head.forward = forward  # type: ignore[assignment, method-assign]
    try:
        shown = model(**inputs, use_cache=False).logits
    finally:
        del head.forward
    if len(read) != 1 or read[0].shape[:-1] != inputs["input_ids"].shape or shown.ndim != 3:
        return None, shown, shown
    # A model may hand them out in another dtype, which alone changes nothing.
    return read[0], gave[0].to(shown.dtype), shown
