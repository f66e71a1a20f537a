"""What a run will take, from the model's configuration alone: no weight is read or downloaded.

The model is built on the meta device, adapted, and run forward and through one optimizer step
there: shapes without values. What autograd would keep for the backward pass is counted as it is
saved, so that the estimate follows the model's own code, gates and masks included.

Not counted: what a kernel needs for itself, gradients of activations, the allocator's waste,
communication buffers, and the CUDA context (about half a gigabyte).
"""

from __future__ import annotations

import gc
import io
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_peft.adapters import adapter_layers, adapter_state_dict, trainable_parameters
from lightning_peft.adapters.peft_format import peft_state
from lightning_peft.errors import UserError
from lightning_peft.models.loss import chunked_loss, last_hidden, plain_head
from lightning_peft.modules.adapted import AdaptedModule
from lightning_peft.modules.classification import SequenceClassificationModule
from lightning_peft.modules.meta import meta_base

# Bytes of a weight: nf4 with double quantization (4 bits, 8 for each 64 values, 32 for each 256 of
# these), int8 (8 bits, 32 for each row, which hardly count).
QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class Estimate:
    """Counts of values, and sizes in bytes on one device without sharding.

    Attributes:
        total: Parameters of the adapted model.
        trainable: Those that train at the start.
        trainable_end: Those that train at the end; None where only data decide.
        base: Bytes of what does not train, buffers included.
        trained: Bytes of what trains.
        gradients: Bytes of its gradients.
        optimizer: Bytes of the optimizer's state.
        activations: Bytes that the forward pass of one micro-batch keeps for the backward pass.
        checkpoint: Bytes of a checkpoint's file at the start's ranks, without what a strategy keeps
            beside its tensors.
        export: Bytes of the weights that a run leaves to take away; None where only data decide.
    """

    total: int
    trainable: int
    trainable_end: int | None
    base: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    checkpoint: int
    export: int | None

    def per_device(self, devices: int = 1, zero_stage: int = 0) -> dict[str, float]:
        """Bytes of each kind on one of several devices.

        Args:
            devices: Among which ZeRO shards.
            zero_stage: 1 shards the optimizer's state, 2 also gradients, 3 also all parameters.

        Raises:
            UserError: If there is no such stage, or no device.
        """
        if zero_stage not in (0, 1, 2, 3):
            raise UserError(f"zero_stage must be 0, 1, 2 or 3, got {zero_stage}.")
        if devices < 1:
            raise UserError(f"devices must be at least 1, got {devices}.")
        parts = {
            "weights": (self.base + self.trained, 3),
            "gradients": (self.gradients, 2),
            "optimizer": (self.optimizer, 1),
            "activations": (self.activations, 4),
        }
        return {k: size / (devices if zero_stage >= s else 1) for k, (size, s) in parts.items()}


def estimate(module: AdaptedModule, rows: int, tokens: int, targets: int | None = None) -> Estimate:
    """Estimate a run.

    Args:
        module: As instantiated from a configuration, its model not loaded.
        rows: Of a micro-batch.
        tokens: Of each row.
        targets: Positions of each row that go through the output layer; all when None.

    Returns:
        The estimate.

    Raises:
        UserError: If there is no configuration of the model, or the strategy refuses it.
    """
    model = meta_base(module)
    module.adapter.attach(model, initialize=False)
    module.model = model
    trained = [p for p in model.parameters() if p.requires_grad]
    start = trainable_parameters(model, include_saved=True)
    state = optimizer_state(module, trained)
    kept = list(adapter_state_dict(model).values())
    activations = measure_activations(module, rows, tokens, targets)
    base, trained_bytes = _base_bytes(model, getattr(module, "quantization", None)), nbytes(trained)
    total = sum(p.numel() for p in model.parameters())
    # Shrinking needs parameters that nobody else holds, as an optimizer's cycle does until then.
    del trained
    gc.collect()
    end = module.adapter.final_parameters(model)  # may shrink the model
    return Estimate(
        total=total,
        trainable=start,
        trainable_end=end,
        base=base,
        trained=trained_bytes,
        gradients=trained_bytes,
        optimizer=value_bytes(state),
        activations=activations,
        checkpoint=nbytes(kept) + value_bytes(state) + _overhead([*kept, *state]),
        export=None if end is None else _export_bytes(model),
    )


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, storage that several share once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def value_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors' own values, where a meta tensor is a view of what a real one is a copy."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def optimizer_state(module: AdaptedModule, trained: list[nn.Parameter]) -> list[Tensor]:
    """The tensors of the optimizer's state after one step with the module's own optimizer."""
    optimizer = module.adapter.make_optimizer(module.model, _on_meta(module.make_optimizer))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    # Without the hooks of step, by which a strategy finds out that it was not called.
    step = type(optimizer).step
    getattr(step, "__wrapped__", step)(optimizer)
    for parameter in trained:
        parameter.grad = None
    found = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in found if isinstance(value, Tensor)]


def _on_meta(make: OptimizerCallable) -> OptimizerCallable:
    """An optimizer's step without its fused kernel, which meta tensors have none of."""

    def made(params: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = make([nn.Parameter(torch.zeros(1))])
        if not optimizer.defaults.get("fused"):
            return make(params)
        optimizer.param_groups[0].update(params=list(params), fused=False)
        return optimizer

    return made


# Activations.


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
    with _FlashOnMeta(), saved_bytes(model) as saved, _watch_blocks(blocks, saved, inside, inputs):
        _forward(module, rows, tokens, tokens if targets is None else targets)
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


def _forward(module: AdaptedModule, rows: int, tokens: int, targets: int) -> None:
    """Loss of a micro-batch of padded rows, as the module computes it but for values."""
    model: Any = module.model
    with torch.device("meta"):
        # In the form that attention takes: the usual one is looked into, which has no values here.
        mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
        inputs = {"input_ids": torch.zeros(rows, tokens, dtype=torch.long), "attention_mask": mask}
        if isinstance(module, SequenceClassificationModule):
            hidden = getattr(model, model.base_model_prefix)(**inputs)[0]
            logits = _head_logits(model, hidden)
        elif (head := plain_head(model)) is not None:
            hidden, _ = last_hidden(model, torch.zeros(0, dtype=torch.long), **inputs)
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


class _FlashOnMeta(TorchFunctionMode):
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


# Sizes.


def _base_bytes(model: nn.Module, quantization: str | None) -> int:
    """Bytes of what does not train; linears in few bits where the base is quantized."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    total = nbytes([*frozen, *model.buffers()])
    if quantization is None:
        return total
    output = getattr(model, "get_output_embeddings", lambda: None)()
    weights = [
        m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not output and not m.weight.requires_grad
    ]
    return (
        total - nbytes(weights) + round(sum(w.numel() for w in weights) * QUANTIZED[quantization])
    )


def _overhead(tensors: list[Tensor]) -> int:
    """Bytes of a checkpoint's file beside its values: names, zip entries, random state."""
    buffer = io.BytesIO()
    names = {
        f"model.model.layers.{i:08}.self_attn.q_proj.lora_A": torch.zeros(1) for i in range(64)
    }
    torch.save(names, buffer)
    return 64_000 + len(tensors) * len(buffer.getvalue()) // 64


def _export_bytes(model: Any) -> int:
    """Bytes of the safetensors file that a run leaves."""
    tensors = peft_state(model) if adapter_layers(model) else model.state_dict()
    header = {
        name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [10**7, 10**7]}
        for name, t in tensors.items()
    }
    return (
        value_bytes(tensors.values())
        + 8
        + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8
    )
