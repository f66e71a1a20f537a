"""One forward pass on the meta device, up to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_peft.models.loss import chunked_loss, head_inputs, plain_head
from lightning_peft.modules.adapted import AdaptedModule
from lightning_peft.modules.classification import SequenceClassificationModule


def forward(module: AdaptedModule, rows: int, tokens: int, targets: int) -> None:
    """Compute the loss of a micro-batch of padded rows, as the module does but for values.

    Args:
        module: With its adapted model on the meta device.
        rows: Of a micro-batch.
        tokens: Of each row.
        targets: Positions of each row that go through the output layer.
    """
    model: Any = module.model
    with torch.device("meta"):
        # In the form that attention takes: the usual one is looked into, which has no values here.
        mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
        inputs = {"input_ids": torch.zeros(rows, tokens, dtype=torch.long), "attention_mask": mask}
        if isinstance(module, SequenceClassificationModule):
            hidden = getattr(model, model.base_model_prefix)(**inputs)[0]
            logits = _head_logits(model, hidden)
        elif (head := plain_head(model)) is not None:
            none = torch.zeros(0, dtype=torch.long)
            hidden, _, _ = head_inputs(model, head, none, **inputs)
            assert hidden is not None
            answers = hidden[:, -targets:].flatten(0, 1)
            chunked_loss(answers, head, torch.zeros(len(answers), dtype=torch.long))
            return
        else:
            logits = model(**inputs, use_cache=False, logits_to_keep=targets).logits
        logits = logits.float().flatten(0, -2)
        F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")


def _head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits (rows, labels) of hidden states (rows, tokens, width)."""
    if hasattr(model, "score"):  # decoders: all positions go through, one of each row is taken
        return model.score(hidden)[:, -1]
    return model.classifier(hidden)


class FlashOnMeta(TorchFunctionMode):
    """Attention as a fused kernel computes it: on meta tensors torch would keep all its weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, attn_mask=mask, scale=kwargs.get("scale"))[0]
