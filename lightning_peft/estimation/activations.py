"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.estimation.forward import FlashOnMeta, forward
from lightning_peft.modules.adapted import AdaptedModule


def measure_activations(
    module: AdaptedModule, rows: int, tokens: int, targets: int | None = None
) -> int:
    """Bytes that a forward pass on the meta device keeps for the backward pass.

    With activation checkpointing, each block keeps its input, and one block at a time the rest.

    Args:
        module: With its adapted model.
        rows: Of a micro-batch.
        tokens: Of each row.
        targets: Positions of each row that go through the output layer; all when None.
    """
    model: Any = module.model
    blocks = _blocks(model) if module.gradient_checkpointing else []
    inside: list[int] = []
    inputs: list[int] = []
    # A gate that is watched computes with all components: which it would choose are values.
    gates = [layer.gate for layer in adapter_layers(model).values() if layer.gate is not None]
    watches = [gate.register_forward_hook(lambda *_: None) for gate in gates]
    with FlashOnMeta(), saved_bytes(model) as saved, _watch_blocks(blocks, saved, inside, inputs):
        forward(module, rows, tokens, tokens if targets is None else targets)
        total = sum(saved.values())
    for watch in watches:
        watch.remove()
    return total - sum(inside) + sum(inputs) + max(inside, default=0)


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Count what autograd saves, by storage, without parameters and buffers, which stay anyway.

    Args:
        model: Whose tensors are not counted.

    Yields:
        Bytes by storage, as they come.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that is gone would give its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in found:
            found[storage._cdata] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor.detach()  # itself, it would keep the graph that keeps it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    alive.clear()


def _blocks(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _watch_blocks(
    blocks: list[nn.Module], saved: dict[int, int], inside: list[int], inputs: list[int]
) -> Iterator[None]:
    """Note what each block saves, and the size of its input."""
    before: list[int] = []

    def enter(block: nn.Module, arguments: Any, named: Any) -> None:
        before.append(sum(saved.values()))
        hidden = arguments[0] if arguments else named["hidden_states"]
        inputs.append(hidden.untyped_storage().nbytes())

    def leave(block: nn.Module, arguments: Any, output: Any) -> None:
        inside.append(sum(saved.values()) - before.pop())

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
