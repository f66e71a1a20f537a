"""Gradients of frozen weights, of any format, one at a time and without room for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.attach import adapter_layers
from lightning_peft.errors import UserError

Receive = Callable[[str, Tensor], None]


def each_gradient(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    receive: Receive,
) -> int:
    """Give the gradient of every adapted layer's base weight, for each batch in turn.

    It is ``G = Σ dy xᵀ`` over all tokens, from the layer's input x and the gradient dy of its
    output: the weight's own gradient, as long as the adapter adds nothing (B = 0). The weight takes
    no part, so that it may be frozen or quantized, and a gradient is gone as soon as it has been
    received. Gradients of what trains are thrown away.

    Args:
        model: The adapted model.
        batches: Batches; with several processes None where this one has none left.
        loss: Of one batch, a scalar with gradients.
        receive: Called without gradients with a layer's name and ``G`` (d_out, d_in), float32 at
            least, once for each batch; not for a layer that the loss does not depend on.

    Returns:
        How many batches there were, those that are None among them.
    """
    watch, count = _Watch(receive), 0
    handles = [
        model.register_forward_pre_hook(watch.begin),
        model.register_forward_hook(watch.end, always_call=True),
    ]
    for name, layer in adapter_layers(model).items():
        handles.append(layer.register_forward_hook(watch.of(name)))
    try:
        for batch in batches:
            value = loss(batch)  # of None too: processes compare how many targets they have
            if batch is not None:
                value.backward()
                watch.finish()
            del value  # with the graph, which holds on to the parameters
            model.zero_grad(set_to_none=True)
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    return count


def mean_gradients(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """The mean gradient of every adapted layer's base weight, over the batches of all processes.

    Args:
        model: The adapted model; it is trained while it looks, and left as it was.
        batches: The same number on each process; None where this one has none left.
        loss: Of one batch. Losses are weighted so that their mean over processes is that of all
            targets.

    Returns:
        By layer (d_out, d_in), float32 at least, on the host, since no device holds all of a large
        model's at once; zeros for a layer that the loss does not depend on.

    Raises:
        UserError: If there is no batch.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        gradient = gradient.cpu()
        sums[name] = gradient if name not in sums else sums[name].add_(gradient)

    was_training = model.training
    count = each_gradient(model.train(), batches, loss, add)
    model.train(was_training)
    if not count:
        raise UserError("the sample is empty, so that no gradient can be taken from it.")
    refuse_unseen(bool(sums))
    found = {}
    for name, layer in adapter_layers(model).items():
        seen = sums.pop(name, None)
        if seen is None:  # an idle expert, or a process without a batch
            seen = torch.zeros(layer.out_features, layer.in_features)
        found[name] = distributed.mean(seen).div_(count)
    return found


def refuse_unseen(seen: bool) -> None:
    """Refuse a look at the data in which no adapted layer was used.

    Args:
        seen: Whether this process has seen one.

    Raises:
        UserError: If no process has.
    """
    if not any(distributed.everywhere(seen)):
        raise UserError(
            "no forward pass of the adapted model was seen on the sample; attach the strategy to "
            "the module that the loss calls."
        )


class _Watch:
    """Takes inputs in the forward pass, and their products with output gradients afterwards."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.inside = False
        self.uses: Counter[str] = Counter()
        self.parts: dict[str, Tensor] = {}

    def begin(self, *_: Any) -> None:
        self.inside = True

    def end(self, *_: Any) -> None:
        self.inside = False

    def of(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            # Recomputation under activation checkpointing runs outside the model's forward.
            if not self.inside or not output.requires_grad:
                return
            x = args[0].detach()
            self.uses[name] += 1
            output.register_hook(lambda dy: self.add(name, x, dy))

        return hook

    @torch.no_grad()
    def add(self, name: str, x: Tensor, dy: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            rows, columns = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            gradient = rows.to(dtype).T @ columns.to(dtype)  # (d_out, d_in)
        if name in self.parts:
            gradient += self.parts.pop(name)
        self.uses[name] -= 1
        if self.uses[name]:  # a layer that a forward visits more than once
            self.parts[name] = gradient
        else:
            self.receive(name, gradient)

    @torch.no_grad()
    def finish(self) -> None:
        """Give what waits for uses on which the loss does not depend."""
        for name, gradient in self.parts.items():
            self.receive(name, gradient)
        self.parts.clear()
        self.uses.clear()
