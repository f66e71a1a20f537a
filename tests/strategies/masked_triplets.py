"""``ΔW = s P Λ Q`` with full-size matrices, of which a mask says what lives; not a test itself.

It shares nothing with the package: ΔW is made dense and has its own gradient, and Adam is written
out, with a learning rate for every component.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.gates import rank_scale

HELD = 1e-5
LEARNING_RATE = 1e-2


class Triplet(nn.Module):
    """A linear with room for ``width`` components, which begin as those of one of our layers."""

    def __init__(self, layer: Any, width: int, held: int = 0) -> None:
        super().__init__()
        self.base, self.scaling = layer.base, layer.scaling
        self.P = nn.Parameter(torch.zeros(layer.out_features, width))
        self.E = nn.Parameter(torch.zeros(width))
        self.Q = nn.Parameter(torch.zeros(width, layer.in_features))
        self.alive = list(range(layer.rank))
        self.held = self.alive[layer.rank - held :]
        self.born = {key: [-1000] * width for key in "PEQ"}
        self.moments = {key: [torch.zeros_like(p), torch.zeros_like(p)] for key, p in self.parts()}
        for slot in self.alive:
            self.copy(slot, layer, slot)

    def parts(self) -> list[tuple[str, nn.Parameter]]:
        return [("P", self.P), ("E", self.E), ("Q", self.Q)]

    def used(self) -> list[int]:
        return [slot for slot in self.alive if slot not in self.held]

    @torch.no_grad()
    def copy(self, slot: int, layer: Any, index: int) -> None:
        """Take a component of ours, with nothing remembered of what stood there."""
        (Q, _), (P, _) = layer.components()
        self.P[:, slot], self.Q[slot] = P[:, index], Q[index]
        self.E[slot] = rank_scale(layer.gate).values[index]
        for key, moments in self.moments.items():
            for moment in moments:
                moment.select(1 if key == "P" else 0, slot).zero_()

    def forward(self, x: Tensor) -> Tensor:
        used = torch.zeros(len(self.E)).index_fill(0, torch.tensor(self.used()), 1.0)
        E = used * self.E
        for slot in self.held:
            E = E + HELD * F.one_hot(torch.tensor(slot), len(E))
        self.change = self.scaling * self.P @ torch.diag(E) @ self.Q
        self.change.retain_grad()
        return F.linear(x, self.base.weight + self.change, self.base.bias)

    def distances(self) -> list[Tensor]:
        """From orthonormal vectors, of P and of Q."""
        P, Q = self.P[:, self.alive], self.Q[self.alive]
        eye = torch.eye(len(self.alive))
        return [(P.T @ P - eye).norm(), (Q @ Q.T - eye).norm()]

    @torch.no_grad()
    def step(self, step: int, factor: Callable[[int, int], float]) -> None:
        """Adam's step number ``step``, from 0; ``factor(step, born)`` of the learning rate."""
        for key, p in self.parts():
            first, second = self.moments[key]
            first.mul_(0.9).add_(0.1 * p.grad)
            second.mul_(0.999).add_(0.001 * p.grad**2)
            rate = torch.tensor([LEARNING_RATE * factor(step, born) for born in self.born[key]])
            rate = rate[:, None] if key == "Q" else rate
            unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            p.sub_(rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8))


def masked_model(make: Callable[[], Any], layers: Any, width: int, held: int = 0) -> Any:
    """The model and its triplets by name, beside a model whose adapted layers are given."""
    model, found = make().requires_grad_(False), {}
    for name, layer in layers.items():
        found[name] = Triplet(layer, width, held)
        model.set_submodule(name, found[name])
    return model, found
