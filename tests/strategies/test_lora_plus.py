"""LoRA+: its groups and steps are PEFT's, and the ratio of rates stays what it is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.modules.optimization import with_schedule
from lightning_peft.strategies import LoRA, RankDropout
from lightning_peft.strategies.lora_plus import LoRAPlus
from lightning_peft.testing import check_strategy

TARGETS = ["q_proj", "v_proj"]
RATE = 1e-3


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=RATE, weight_decay=0.0)


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rates by our names, of a model of ours or of PEFT's."""
    names = {}
    for name, parameter in model.named_parameters():
        for theirs in ("base_model.model.", ".modules_to_save.default", ".default.weight"):
            name = name.replace(theirs, "")
        names[id(parameter)] = name
    return {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}


def test_groups_and_steps_are_pefts(pair, random_batch) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    strategy = LoRAPlus(r=4, target_modules=TARGETS, modules_to_save=["lm_head", "model.norm"])
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["lm_head", "model.norm"]
    )
    ours, theirs = pair(strategy, config)
    pairs = [
        (ours, strategy.make_optimizer(ours, adamw)),
        (
            theirs,
            create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0),
        ),
    ]
    found = [rates(model, optimizer) for model, optimizer in pairs]
    assert found[0] == found[1]
    assert len(found[0]) == 2 * 4 + 2
    for step in range(4):
        for model, optimizer in pairs:
            model(**random_batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    close = {"rtol": 1e-4, "atol": 1e-6}
    for name, layer in adapter_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.lora_A, other.lora_A.default.weight, **close)
        torch.testing.assert_close(layer.lora_B, other.lora_B.default.weight, **close)
    saved = theirs.base_model.model.lm_head.modules_to_save.default.weight
    torch.testing.assert_close(ours.lm_head.weight, saved, **close)


def test_b_and_vectors_learn_faster_and_matrices_do_not(tiny_llama) -> None:
    strategy = LoRAPlus(r=4, lr_ratio=4, modules_to_save=["lm_head", "model.norm"])
    strategy.attach(model := tiny_llama())
    found = rates(model, strategy.make_optimizer(model, adamw))
    fast = {name for name, rate in found.items() if rate == 4 * RATE}
    assert fast == {n for n in found if n.endswith("_B")} | {"model.norm.weight"}
    assert {rate for name, rate in found.items() if name not in fast} == {RATE}


def test_a_ratio_of_one_is_lora(tiny_llama, random_batch) -> None:
    ends = []
    for strategy in (LoRAPlus(r=4, lr_ratio=1.0), LoRA(r=4)):
        torch.manual_seed(0)
        strategy.attach(model := tiny_llama())
        optimizer = strategy.make_optimizer(model, adamw)
        for step in range(3):
            model(**random_batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([layer.delta_weight() for layer in adapter_layers(model).values()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_a_schedule_and_a_resume_keep_the_ratio(name, tiny_llama) -> None:
    strategy = LoRAPlus(r=4, target_modules=TARGETS)
    strategy.attach(model := tiny_llama())
    optimizer = strategy.make_optimizer(model, adamw)
    schedule = with_schedule(optimizer, name, warmup=3, steps=10)["lr_scheduler"]["scheduler"]
    for _ in range(9):
        optimizer.step()
        schedule.step()
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        assert slow > 0
        assert fast == pytest.approx(16 * slow)
    other = strategy.make_optimizer(model, functools.partial(torch.optim.AdamW, lr=1.0))
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [slow, fast]


def test_a_rate_that_is_a_tensor_is_not_changed_for_all(tiny_llama) -> None:
    strategy = LoRAPlus(r=4, target_modules=TARGETS)
    strategy.attach(model := tiny_llama())
    rate = torch.tensor(RATE)
    optimizer = strategy.make_optimizer(model, functools.partial(torch.optim.AdamW, lr=rate))
    slow, fast = (float(group["lr"]) for group in optimizer.param_groups)
    assert (slow, fast) == pytest.approx((RATE, 16 * RATE))


@pytest.mark.parametrize("ratio", [0, -1.0, float("inf"), float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio) -> None:
    sentence = f"^lr_ratio must be a finite number above zero, got {ratio}.$"
    with pytest.raises(ValueError, match=sentence):
        LoRAPlus(lr_ratio=ratio)


def test_an_optimizer_without_a_rate_is_refused(tiny_llama) -> None:
    class Own(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=1.0)
            for group in self.param_groups:
                group["lr"] = None

    strategy = LoRAPlus(r=4)
    strategy.attach(model := tiny_llama())
    sentence = "LoRAPlus multiplies a learning rate, and model.optimizer .Own. has none; give it lr"
    with pytest.raises(ValueError, match=sentence):
        strategy.make_optimizer(model, Own)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param(
            {"modules_to_save": ["lm_head"], "rank_gate": lambda r: RankDropout(r, 0.3)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(LoRAPlus(r=4, **arguments))


@pytest.mark.slow
def test_two_processes_agree() -> None:
    check_strategy(LoRAPlus(r=4), processes=2)
