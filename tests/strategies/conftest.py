"""What tests of several strategies build."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies import PrunedLoRA


@pytest.fixture
def two_linears() -> Any:
    """Makes a small model, always the same: ``two_linears()``."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    return make


@pytest.fixture
def optimizer_of() -> Any:
    """Makes AdamW over what trains in a model."""
    return lambda model: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01
    )


@pytest.fixture
def backward() -> Any:
    """Runs a random batch through such a model, backward included."""
    return lambda model: model(torch.randn(8, 4)).square().mean().backward()


class Loop:
    """A plain training loop that keeps what brute force needs to know."""

    def __init__(self, strategy: PrunedLoRA, make: Any, batches: Any, seed: int = 0) -> None:
        self.strategy, self.model, self.batches = strategy, make(), batches
        torch.manual_seed(seed)
        strategy.attach(self.model)
        self.layers = adapter_layers(self.model)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=0.01
        )
        self.before: dict[str, dict[str, Tensor]] = {}
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self.z: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(functools.partial(self._look, name))

    def _look(self, name: str, layer: Any, args: tuple[Tensor]) -> None:
        if layer.training:
            x = args[0].detach()[self.mask]
            self.z[name].append(x @ layer.active_A.detach().T)

    def backward(self, seed: int) -> None:
        batch = self.batches(seed)
        self.mask = batch["attention_mask"].bool()
        self.model(**batch).loss.backward()

    def update(self, step: int) -> None:
        self.before = {
            name: {
                "B": layer.active_B.detach().clone(),
                "A": layer.active_A.detach().clone(),
                "grad_B": layer.lora_B.grad.clone(),
                "grad_A": layer.lora_A.grad.clone(),
            }
            for name, layer in self.layers.items()
        }
        self.strategy.before_step(self.model, self.optimizer, step)
        self.after = {
            name: (layer.active_B.detach().clone(), layer.active_A.detach().clone())
            for name, layer in self.layers.items()
        }
        self.optimizer.step()
        self.strategy.after_step(self.model, self.optimizer, step)
        self.optimizer.zero_grad()

    def step(self, step: int) -> None:
        self.backward(step)
        self.update(step)

    def ranks(self) -> list[int]:
        return [layer.rank for layer in self.layers.values()]


@pytest.fixture
def loop(tiny_llama, random_batch) -> Any:
    """Runs a strategy in a plain loop: ``loop(strategy, seed)``."""
    return lambda strategy, seed=0: Loop(strategy, tiny_llama, random_batch, seed)


def gap(W: Tensor, G: Tensor) -> Tensor:
    """The score's half for W (d, r), a component at a time, by solving instead of inverting."""
    W, G = W.double(), G.double()
    H = G.T @ G + 1e-6 * torch.eye(W.shape[1], dtype=torch.float64)
    newton = torch.linalg.solve(H, G.T).T
    values = []
    for j in range(W.shape[1]):
        unit = torch.zeros(W.shape[1], dtype=torch.float64)
        unit[j] = 1
        values.append(0.5 * (W - newton)[:, j].square().sum() / torch.linalg.solve(H, unit)[j])
    return torch.stack(values)


def brute_force_score(criterion: str, m: dict[str, Tensor], z: list[Tensor]) -> Tensor:
    B, A, gB, gA = (m[k].double() for k in ("B", "A", "grad_B", "grad_A"))
    wB, wA = B * gB, A * gA
    if criterion == "gradient":
        return gap(B, gB) + gap(A.T, gA.T)
    if criterion == "llm_pruner_element1":
        return wB.abs().sum(0) + wA.abs().sum(1)
    if criterion == "llm_pruner_element2":
        return wB.square().sum(0) + wA.square().sum(1)
    if criterion == "llm_pruner_taylor2":
        return (wB - wB**2 / 2).abs().sum(0) + (wA - wA**2 / 2).abs().sum(1)
    if criterion == "magnitude":
        return B.norm(dim=0) * A.norm(dim=1)
    tokens = torch.cat(z).double()
    C = tokens.T @ tokens / len(tokens)
    if criterion == "wanda":
        return C.diagonal().sqrt() * B.norm(dim=0)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
    return B.square().sum(0) / torch.linalg.inv(C).diagonal()


@pytest.fixture
def brute_force() -> Any:
    """Scores by loops: ``brute_force(criterion, matrices, rank activations)``."""
    return brute_force_score
