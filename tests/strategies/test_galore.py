"""GaLore against its authors' package where it is installed, and against AdamW at full rank."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.adapters import trainable_parameters
from lightning_peft.strategies import GaLore
from lightning_peft.strategies.galore import GaLoreAdamW, project, project_back, projector
from lightning_peft.testing import check_strategy


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(16, 12, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :8].cos()).square().mean().backward()
        optimizer.step()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weights_are_those_of_the_authors_optimizer(decay) -> None:
    galore = pytest.importorskip("galore_torch")
    ours, theirs = model(), model()

    def groups(net: nn.Module, **more: Any) -> list[dict[str, Any]]:
        projected = {"rank": 3, "update_proj_gap": 4, "scale": 0.25, **more}
        weights = [net[i].weight for i in (0, 2)]
        rest = [p for p in net.parameters() if all(p is not w for w in weights)]
        return [{"params": weights, **projected}, {"params": rest}]

    arguments = {"lr": 1e-2, "weight_decay": decay, "eps": 1e-6}
    steps(ours, GaLoreAdamW(groups(ours), **arguments), 11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = galore.GaLoreAdamW(
            groups(theirs, proj_type="std"), no_deprecation_warning=True, **arguments
        )
    steps(theirs, optimizer, 11)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_moments_live_in_the_projected_space(shape) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 3, "update_proj_gap": 2, "scale": 1.0}])
    weight.grad = torch.randn(shape)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].numel() == 3 * max(shape)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_gradient_of_low_rank_survives_the_projection(shape) -> None:
    torch.manual_seed(0)
    grad = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    vectors = projector(grad, 3)
    torch.testing.assert_close(
        project_back(project(grad, vectors), vectors, grad.shape), grad, rtol=1e-4, atol=1e-4
    )


def test_without_a_rank_it_is_adamw() -> None:
    ours, theirs = model(), model()
    steps(ours, GaLoreAdamW(ours.parameters(), lr=1e-2, eps=1e-12), 8)
    steps(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, eps=1e-12, weight_decay=0), 8)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_targets_train_and_nothing_else(tiny_llama) -> None:
    base = tiny_llama()
    strategy = GaLore(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    report = strategy.attach(base)
    trained = {n for n, p in base.named_parameters() if p.requires_grad}
    queries = {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert trained == queries | {"lm_head.weight"}
    assert trainable_parameters(base) == report.trainable == 2 * 32 * 32 + 61 * 32
    optimizer = strategy.make_optimizer(
        base, lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.5)
    )
    ranks = [group["rank"] for group in optimizer.param_groups]
    assert ranks == [4, None]
    assert all(group["weight_decay"] == 0.5 for group in optimizer.param_groups)


def test_another_optimizer_is_refused(tiny_llama) -> None:
    strategy = GaLore(r=4)
    strategy.attach(base := tiny_llama())
    with pytest.raises(ValueError, match="model.optimizer is SGD; give torch.optim.AdamW"):
        strategy.make_optimizer(base, lambda p: torch.optim.SGD(p, 0.1))


def test_the_change_of_each_weight_is_measured_from_its_start(tiny_llama) -> None:
    base = tiny_llama()
    before = copy.deepcopy(base)
    strategy = GaLore(r=4, target_modules=["q_proj"])
    strategy.attach(base)
    name = "model.layers.1.self_attn.q_proj"
    with torch.no_grad():
        base.get_submodule(name).weight += 0.5
    changes = strategy.weight_changes(base)
    assert changes[name].item() == pytest.approx(0.5 * 32, rel=1e-5)
    assert changes["model.layers.0.self_attn.q_proj"].item() == 0
    assert torch.equal(
        before.get_submodule(name).weight + 0.5, base.get_submodule(name).weight.detach()
    )


def test_keeps_a_strategys_promises() -> None:
    check_strategy(GaLore(r=4, update_proj_gap=3))
