"""``check_strategy`` passes for our strategies, and leaves everything else as it was."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import testing
from lightning_peft.errors import UserError
from lightning_peft.strategies import (
    AdapterStrategy,
    DropLoRA,
    LearnedRankMask,
    LoRA,
    LoRADrop,
    PrunedLoRA,
    RankDropout,
    StepMask,
)
from lightning_peft.testing import check_strategy

Pruned = functools.partial(PrunedLoRA, r=6, target_r=2, prune_every=3)
step_mask = functools.partial(StepMask, p=0.3)

KEPT_PROMISES = {
    "lora": LoRA(r=4),
    "rslora": LoRA(r=4, use_rslora=True, lora_alpha=3),
    "dropout": LoRA(r=4, lora_dropout=0.2),
    "gaussian, q and v": LoRA(
        r=4, init_lora_weights="gaussian", target_modules=["q_proj", "v_proj"]
    ),
    "saved modules": LoRA(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "gate": LoRA(r=4, rank_gate=RankDropout),
    **{
        f"droplora, {mask}": DropLoRA(r=4, mask=mask)
        for mask in ("token", "sample", "batch", "step", "learned")
    },
    "droplora, not rescaled": DropLoRA(r=4, mask="step", rescale=False, lora_dropout=0.1),
    **{
        f"pruned by {criterion}": Pruned(criterion=criterion)
        for criterion in (
            "gradient",
            "llm_pruner_element1",
            "llm_pruner_element2",
            "llm_pruner_taylor2",
            "wanda",
            "sparsegpt",
            "magnitude",
            "random",
        )
    },
    "pruned, gradient recovery": Pruned(recovery="gradient"),
    "pruned, activation recovery": Pruned(criterion="sparsegpt", recovery="activation"),
    "pruned globally": Pruned(allocation="global", recovery="gradient", min_r=0),
    "pruned globally, activations": Pruned(
        allocation="global", criterion="wanda", recovery="activation"
    ),
    "pruned to nothing": Pruned(target_r=0, min_r=0),
    "pruned under a step mask": Pruned(rank_gate=step_mask),
    "pruned under a learned mask": Pruned(rank_gate=LearnedRankMask, use_rslora=True),
    **{
        f"lora-drop, {ablation}": LoRADrop(r=4, threshold=0.6, ablation=ablation)
        for ablation in (None, "without_share", "inverse", "random", "top_k")
    },
    "lora-drop under a step mask": LoRADrop(r=4, threshold=0.6, rank_gate=step_mask),
}


# Each of a kind that takes the same way through the code as another one; not in CI.
ALIKE = {
    "rslora",
    "droplora, sample",
    "droplora, batch",
    "pruned by llm_pruner_element1",
    "pruned by llm_pruner_element2",
    "pruned by llm_pruner_taylor2",
    "pruned by magnitude",
    "lora-drop, inverse",
    "lora-drop, random",
    "lora-drop, top_k",
}


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(strategy, marks=pytest.mark.long if name in ALIKE else (), id=name)
        for name, strategy in KEPT_PROMISES.items()
    ],
)
def test_our_strategies_keep_their_promises(strategy: AdapterStrategy) -> None:
    check_strategy(strategy)
    assert strategy.model is None


def test_a_factory_does_as_well() -> None:
    check_strategy(lambda: LoRA(r=2, target_modules="all-linear"))
    check_strategy(LoRA)


def test_the_random_stream_stays_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    check_strategy(DropLoRA(r=2))
    assert torch.equal(torch.rand(1), expected)


def test_the_first_strategy_being_gone_does_not_stop_the_second() -> None:
    # A hook of a strategy that no longer exists once broke the optimizer's step of the next.
    for _ in range(2):
        check_strategy(DropLoRA(r=2, mask="step"))


def test_an_attached_strategy_is_refused(tiny_llama: Any) -> None:
    strategy = LoRA(r=2)
    strategy.attach(tiny_llama())
    with pytest.raises(ValueError, match="attached already"):
        check_strategy(strategy)


# A strategy without adapters.


class Full(AdapterStrategy):
    def attach(self, model: nn.Module, initialize=True) -> Any:
        self.model = model
        model.requires_grad_(True)


def test_a_strategy_without_adapters_is_served() -> None:
    check_strategy(Full())


# Several processes.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, []), ({"processes": 1}, []), ({"processes": 3}, [3]), ({"ranks": 2}, [2])],
)
def test_processes_have_two_names(arguments, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    for check in ("start", "training", "eval", "resume", "export", "recomputation", "fit"):
        monkeypatch.setattr(testing, f"check_{check}", lambda *args: SimpleNamespace(save=bytes))
    monkeypatch.setattr(testing, "check_processes", lambda make, count: asked.append(count))
    check_strategy(LoRA(r=2), **arguments)
    assert asked == expected


def test_several_processes_take_no_device() -> None:
    with pytest.raises(UserError, match="device 'cuda' is for processes=1; several train on the"):
        check_strategy(LoRA(r=4), processes=2, device="cuda")
