"""What is measured: a LLaMA of a given shape, frozen or adapted, and one training step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """Of a model and a batch; the defaults are the shape that the targets are stated for."""

    layers: int = 6
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    vocabulary: int = 1024
    batch: int = 4
    tokens: int = 256
    r: int = 32
    dtype: torch.dtype = torch.float32

    def but(self, **changes: Any) -> Shape:
        """The same shape but for some values."""
        return replace(self, **changes)


TINY = Shape(layers=2, hidden=32, intermediate=48, heads=2, vocabulary=64, batch=2, tokens=16, r=8)


def llama(shape: Shape) -> Any:
    """A LLaMA with random weights, the same for every call, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(4096, shape.tokens),
    )
    return LlamaForCausalLM(config).to(shape.dtype).train()


def batch_of(shape: Shape) -> dict[str, Tensor]:
    """Random tokens, each a target."""
    ids = torch.randint(
        shape.vocabulary,
        (shape.batch, shape.tokens),
        generator=torch.Generator().manual_seed(1),
    )
    return {"input_ids": ids, "labels": ids}


def loss_of(model: Any, batch: dict[str, Tensor], **inputs: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, the same computation for every case."""
    inputs = inputs or {"input_ids": batch["input_ids"]}
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def floor_step(model: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and backward to the inputs with every weight frozen: no training is cheaper."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def step() -> None:
        loss_of(model, batch, inputs_embeds=embedded).backward()
        assert embedded.grad is not None
        assert embedded.grad.norm() > 0
        embedded.grad = None

    return step


def train_step(
    model: Any,
    batch: dict[str, Tensor],
    strategy: Any = None,
    optimizer: Optimizer = torch.optim.AdamW,
    loss: Callable[[Any, dict[str, Tensor]], Tensor] = loss_of,
) -> Callable[[], None]:
    """A whole training step of an adapted model, optimizer included; gradients must be alive.

    Args:
        model: Whose parameters with ``requires_grad`` train.
        batch: The same for every step.
        strategy: Called before and after the optimizer's step, where it is ours.
        optimizer: Makes the optimizer.
        loss: Of model and batch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = optimizer(parameters) if strategy is None else strategy.make_optimizer(model, optimizer)
    steps = 0

    def step() -> None:
        nonlocal steps
        total = loss(model, batch)
        if strategy is not None:
            total = total + strategy.penalty(model)
        total.backward()
        # A thousandth of a step, and the same for every case.
        norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        assert 0 < float(norm) < float("inf"), f"the gradient's norm is {float(norm)}"
        if strategy is not None:
            strategy.before_step(model, made, steps)
        made.step()
        if strategy is not None:
            strategy.after_step(model, made, steps)
        made.zero_grad()
        steps += 1

    step.model, step.optimizer = model, made  # type: ignore[attr-defined]
    return step


def ours(
    shape: Shape, name: str = "LoRA", optimizer: Optimizer = torch.optim.AdamW, **arguments: Any
) -> Callable[[], None]:
    """A step of one of this package's strategies.

    Args:
        shape: Of model and batch.
        name: The strategy's class.
        optimizer: Makes the optimizer.
        arguments: Its arguments beside rank and targets.
    """
    from lightning_peft import strategies

    model = llama(shape)
    arguments = {"r": shape.r, "target_modules": TARGETS, **arguments}
    strategy = getattr(strategies, name)(**arguments)
    strategy.attach(model)
    return train_step(model, batch_of(shape), strategy, optimizer)


def in_module(shape: Shape) -> Callable[[], None]:
    """A step of LoRA with the loss of the package's module, which makes no logits."""
    from lightning_peft.modules.causal_lm import CausalLMModule
    from lightning_peft.strategies import LoRA

    adapter = LoRA(r=shape.r, target_modules=TARGETS)
    module = CausalLMModule("tiny_llama", adapter=adapter)
    module.model = llama(shape)
    adapter.attach(module.model)
    batch = batch_of(shape)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        total, count = module.target_loss(batch)
        return total / count

    return train_step(module.model, batch, adapter, loss=loss)


def peft(shape: Shape, kind: str = "LoraConfig", **arguments: Any) -> Callable[[], None]:
    """A step of PEFT's equivalent."""
    import peft as library

    arguments = {"r": shape.r, "target_modules": TARGETS, **arguments}
    if kind == "LoraConfig":
        arguments.setdefault("lora_alpha", 2 * shape.r)
    model = library.get_peft_model(llama(shape), getattr(library, kind)(**arguments))
    return train_step(model, batch_of(shape))


def floor(shape: Shape) -> Callable[[], None]:
    """A step of the frozen model."""
    return floor_step(llama(shape), batch_of(shape))


def full(shape: Shape) -> Callable[[], None]:
    """A step of full fine-tuning."""
    return train_step(llama(shape), batch_of(shape))
