"""A freshly attached strategy in a plain PyTorch loop."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapters import adapter_layers, adapter_state_dict
from lightning_peft.strategies import AdapterStrategy
from lightning_peft.testing.model import Batch, random_batch, tiny_llama

Make = Callable[[], AdapterStrategy]
CPU = torch.device("cpu")

STEPS = 12
SAVED_AFTER = (2, 7)
LEARNING_RATE = 1e-2
# Relative to the largest logit: what reordered float32 arithmetic may cost, and what is a mistake.
ROUNDING, EXPORT_ROUNDING = 1e-4, 1e-5


class Run:
    """A freshly attached strategy in a plain loop.

    Args:
        make: Makes the strategy.
        seed: Of the random stream when it is attached.
        initialize: False where a saved state is loaded next.
        device: Where it trains.
    """

    def __init__(
        self, make: Make, seed: int = 1, initialize: bool = True, device: torch.device = CPU
    ) -> None:
        self.strategy = make()
        self.name = type(self.strategy).__name__
        self.device = device
        self.model = tiny_llama().to(device)
        self.original = list(self.model.parameters())  # kept alive, so that ids stay theirs
        self.optimizer: Optimizer
        self.saved: dict[int, bytes] = {}
        torch.manual_seed(seed)
        self.strategy.attach(self.model, initialize)
        self.model.train()

    def prepare(self) -> None:
        """What a run does before its first step, unless it resumes."""
        self.strategy.prepare(
            self.model,
            lambda ratio: [self.batch(1000 + i) for i in range(2)],
            lambda batch: self.model(**batch).loss,
            adamw,
        )
        self.model.train()
        self.make_optimizer()

    def make_optimizer(self) -> None:
        """Make it anew, from what trains now."""
        self.optimizer = self.strategy.make_optimizer(self.model, adamw)

    def batch(self, seed: int) -> Batch:
        """A batch, where the model is."""
        return move_data_to_device(random_batch(seed), self.device)

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by full name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def backward(self, seed: int) -> float:
        """Loss of a batch, backward included."""
        loss = self.model(**self.batch(seed)).loss + self.strategy.penalty(self.model)
        loss.backward()
        return loss.item()

    def update(self, step: int) -> None:
        """What follows the backward pass."""
        self.strategy.before_step(self.model, self.optimizer, step)
        self.assert_shapes(f"after before_step at step {step}")
        self.optimizer.step()
        self.strategy.after_step(self.model, self.optimizer, step)
        self.assert_shapes(f"after step {step}")
        self.optimizer.zero_grad()

    def train(self, steps: Iterable[int]) -> None:
        """Whole optimizer steps."""
        for step in steps:
            self.backward(step)
            self.update(step)

    def logits(self) -> Tensor:
        """Logits in eval, (tokens, vocabulary)."""
        return logits_of(self.model)

    def save(self) -> bytes:
        """A checkpoint between two steps."""
        file = io.BytesIO()
        state = {
            "adapter": adapter_state_dict(self.model),
            "strategy": self.strategy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_streams(),
        }
        torch.save(state, file)
        return file.getvalue()

    def assert_shapes(self, when: str) -> None:
        """An optimizer with state of another shape fails late, or (fused) is wrong in silence."""
        if not adapter_layers(self.model):
            return
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            where = names.get(id(parameter), "a removed parameter")
            for key, value in {**state, "gradient": parameter.grad}.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    self.broken(
                        f"{when} {key} of {where} has shape {tuple(value.shape)}, the parameter "
                        f"{tuple(parameter.shape)}; keep_components(layer, indices, optimizer) "
                        "shrinks them together."
                    )

    def broken(self, sentence: str) -> NoReturn:
        """Raise for a broken promise."""
        raise AssertionError(f"{self.name}: {sentence}")


def random_streams() -> list[Tensor]:
    """The state of torch's stream of each device."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpus]


def restore_streams(states: list[Tensor]) -> None:
    """Take back what :func:`random_streams` gave."""
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)


def adamw(params: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of every check."""
    return torch.optim.AdamW(params, lr=LEARNING_RATE)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """Logits in eval at the attended positions, (tokens, vocabulary)."""
    was_training = model.training
    batch = move_data_to_device(random_batch(2000), next(model.parameters()).device)
    model.eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(was_training)
    return logits[batch["attention_mask"].bool()]


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()
