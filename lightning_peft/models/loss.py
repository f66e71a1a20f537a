"""The loss of a language model without its logits: the output layer and the loss, chunk by chunk.

With a vocabulary of 128,256 the logits of 2,048 tokens take a gigabyte, and their gradient another.
``torch.nn.functional.linear_cross_entropy`` (torch 2.13) computes logits, loss and gradient of the
hidden states for some rows at a time. What remains is the gradient of the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHUNK = 256  # rows; torch's automatic choice is six times slower at a large vocabulary
_LOGITS = 2**25  # of a chunk, where the vocabulary is small enough for more rows


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
        or hasattr(model, "unshard")  # FSDP gathers the weight in the model's own forward only
        or model.base_model is model
    ):
        return None
    return head


def last_hidden(model: Any, keep: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Run a model and take what its output layer reads.

    Args:
        model: A causal language model of transformers.
        keep: Positions whose logits are computed all the same, (k,).
        inputs: Of the model.

    Returns:
        Hidden states (batch, tokens, d), and logits (batch, k, vocabulary).
    """
    seen: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    try:
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    finally:
        handle.remove()
    return seen[-1], logits
