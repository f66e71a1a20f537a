"""A step on the GPU is the CPU's, in each precision, and leaves everything on the device."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from every_strategy import STRATEGIES
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.testing import random_batch, tiny_llama

STEPS = 6


def train(name: str, device: torch.device, precision: str = "float32") -> dict[str, Any]:
    """Losses and ΔW of a few steps, and the model and optimizer that are left."""
    strategy, model = STRATEGIES[name](), tiny_llama()
    torch.manual_seed(1)
    strategy.attach(model)
    if precision == "bfloat16":
        for layer in adapter_layers(model).values():
            layer.base.bfloat16()
    model.to(device).train()
    autocast: Any = contextlib.nullcontext()
    if precision != "float32":
        autocast = torch.autocast(device.type, torch.bfloat16)

    def batch(seed: int) -> dict[str, Tensor]:
        return move_data_to_device(random_batch(seed), device)

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3)

    with autocast:
        strategy.prepare(
            model, lambda ratio: [batch(100), batch(101)], lambda b: model(**b).loss, adamw
        )
    optimizer = strategy.make_optimizer(model.train(), adamw)
    losses = []
    for step in range(STEPS):
        with autocast:
            loss = model(**batch(step)).loss + strategy.penalty(model)
        loss.backward()
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step)
        optimizer.zero_grad()
        losses.append(float(loss))
    with torch.no_grad():
        deltas = {n: layer.delta_weight().cpu() for n, layer in adapter_layers(model).items()}
    done = {"losses": losses, "deltas": deltas, "decisions": strategy.decisions}
    return {**done, "model": model, "optimizer": optimizer}


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-4), ("autocast", 2e-2), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_losses_and_weights_are_the_cpus(
    name: str, precision: str, tolerance: float, device: torch.device
) -> None:
    if device.type == "cpu" and precision != "float32" and not name.startswith("Pruned"):
        pytest.skip("without a GPU one family shows that the test works")
    ours, expected = (train(name, d, precision) for d in (device, torch.device("cpu")))
    assert ours["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    if precision != "float32":
        return  # AdamW's first steps are of one size, whatever the gradient's: signs decide
    assert ours["deltas"].keys() == expected["deltas"].keys()
    for layer, delta in expected["deltas"].items():
        assert float((ours["deltas"][layer] - delta).norm()) <= 1e-2 * float(delta.norm()) + 1e-6
    removed = [[(d["step"], d["layer"]) for d in run["decisions"]] for run in (ours, expected)]
    assert removed[0] == removed[1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_everything_stays_on_the_device(name: str, device: torch.device) -> None:
    done = train(name, device)
    held = [*done["model"].parameters(), *done["model"].buffers()]
    assert {tensor.device.type for tensor in held} == {device.type}
    parameters: dict[nn.Parameter, dict[str, Any]] = done["optimizer"].state
    for parameter, state in parameters.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                assert value.device == parameter.device, key
