"""A removal event factorises once for each shape, and does not wait for the device more often."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.strategies import PrunedLoRA


class Counter(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def calls_of_an_event(depth: int, r: int, prune_count: int) -> dict[str, int]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)) for _ in range(depth)]
    model = nn.Sequential(*blocks)
    strategy = PrunedLoRA(r=r, target_r=1, prune_every=1, prune_count=prune_count)
    strategy.attach(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(4, 8)).square().sum().backward()
    with Counter() as counter:
        strategy.before_step(model, optimizer, 0)
    return counter.calls


def test_one_factorisation_of_b_and_one_of_a_for_each_shape() -> None:
    for depth in (1, 4):
        calls = calls_of_an_event(depth, r=6, prune_count=2)
        assert calls["linalg_cholesky_ex"] == 4  # two shapes


def test_waiting_for_the_device_grows_with_neither_layers_nor_components() -> None:
    waits = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")
    counts = [
        sum(calls_of_an_event(depth, r, count).get(name, 0) for name in waits)
        for depth, r, count in ((1, 4, 1), (4, 12, 6))
    ]
    assert counts[0] == counts[1] <= 1
