"""``check_strategy`` passes for our strategies, and names the broken promise of broken ones."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
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


@pytest.mark.parametrize("strategy", KEPT_PROMISES.values(), ids=KEPT_PROMISES.keys())
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


# Broken ones.


class Noise(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rand_like(z)


class Tanh(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(2 * z)


class OwnGenerator(nn.Module):
    """Draws from its own stream in forward."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(0)

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rand(z.shape, generator=self.random) if self.training else z


class HiddenScale(nn.Module):
    """Trained, but with a part that no buffer holds."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, z: Tensor) -> Tensor:
        self.seen += self.training
        return z * (1 + self.seen)


class IdleParameter(nn.Module):
    def __init__(self, r: int) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(r))

    def forward(self, z: Tensor) -> Tensor:
        return z


class IdleModule(AdapterStrategy):
    """Adds a module that nothing uses."""

    def attach(self, model: nn.Module, initialize=True) -> Any:
        report = super().attach(model)
        model.idle = nn.Linear(2, 2)
        return report


class NonzeroB(AdapterStrategy):
    def initialize(self, layer: Any) -> None:
        layer.reset_parameters(False)


class Forgetful(AdapterStrategy):
    """Counts steps of its own, and forgets the count on resume."""

    count = 0

    def before_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        self.count += 1
        if self.count > 8:
            for layer in adapter_layers(model).values():
                layer.lora_B.grad.mul_(2)  # AdamW notices a change of scale, not a scale


class Unfreezing(AdapterStrategy):
    def attach(self, model: nn.Module, initialize=True) -> Any:
        report = super().attach(model)
        model.get_submodule("model.norm").requires_grad_(True)
        return report


class WritesTheBase(AdapterStrategy):
    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        super().after_step(model, optimizer, global_step)
        for layer in adapter_layers(model).values():
            layer.base.weight.mul_(0.99)


class OldMoments(AdapterStrategy):
    """Shrinks parameter and gradient, but not the optimizer's state."""

    def before_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        if global_step == 4:
            for layer in adapter_layers(model).values():
                for parameter, dim in layer.components():
                    grad = parameter.grad.narrow(dim, 0, 2)
                    parameter.grad = None
                    parameter.data = parameter.data.narrow(dim, 0, 2)
                    parameter.grad = grad
                layer.rank = 2


class OtherParameter(AdapterStrategy):
    """Puts a new parameter in the old one's place, which no optimizer knows."""

    def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        super().after_step(model, optimizer, global_step)
        if global_step == 4:
            for layer in adapter_layers(model).values():
                layer.lora_A = nn.Parameter(layer.lora_A.detach()[:2])
                layer.lora_B = nn.Parameter(layer.lora_B.detach()[:, :2])
                layer.rank = 2


class Opaque:
    pass


class OpaqueState(AdapterStrategy):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "thing": Opaque()}


class Exploding(AdapterStrategy):
    def penalty(self, model: nn.Module) -> Tensor:
        return sum(layer.lora_B.exp().sum() for layer in adapter_layers(model).values()) * float(
            "inf"
        )


class CountsForwards(AdapterStrategy):
    """A statistic that recomputation counts twice."""

    def attach(self, model: nn.Module, initialize=True) -> Any:
        report = super().attach(model)
        self.forwards = 0
        next(iter(adapter_layers(model).values())).register_forward_hook(self._count)
        return report

    def _count(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.forwards += layer.training

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "forwards": self.forwards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.forwards = state_dict["forwards"]


class Unfolded(AdapterStrategy):
    """Its layers forget their gate when they are merged or exported."""

    def attach(self, model: nn.Module, initialize=True) -> Any:
        report = super().attach(model)
        for layer in adapter_layers(model).values():
            layer.register_forward_hook(lambda layer, args, y: 2 * y - layer.base(*args))
        return report


BROKEN = {
    "random in eval": (LoRA(r=4, rank_gate=lambda r: Noise()), "eval is random"),
    "no diagonal": (LoRA(r=4, rank_gate=lambda r: Tanh()), "merged and unmerged differ"),
    "own generator": (LoRA(r=4, rank_gate=OwnGenerator), "torch's global stream"),
    "hidden state in a gate": (LoRA(r=4, rank_gate=HiddenScale), "after save and load the logits"),
    "idle parameter": (
        LoRA(r=4, rank_gate=IdleParameter),
        r"gate\.idle trains, but had no gradient other than zero in 12 optimizer",
    ),
    "idle module": (
        IdleModule(r=4),
        r"idle\.weight trains, but had no gradient other than zero in 3 optimizer",
    ),
    "start": (NonzeroB(r=4), "after attach the model differs from its base"),
    "forgotten state": (
        Forgetful(r=4),
        "saved after 2 steps and resumed ends with another .*lora_",
    ),
    "trains the base": (Unfreezing(r=4), r"the base's model\.norm\.weight trains"),
    "writes the base": (WritesTheBase(r=4), r"training changed the base's .*q_proj\.base\.weight"),
    "old moments": (OldMoments(r=4), r"exp_avg of .*lora_A has shape \(4, 32\), .* \(2, 32\)"),
    "unknown parameter": (OtherParameter(r=4), "is none of the optimizer's parameters"),
    "opaque state": (OpaqueState(r=4), "plain values and tensors only"),
    "infinite loss": (Exploding(r=4), "the first loss in training is inf"),
    "recomputation": (CountsForwards(r=4), "activation checkpointing changes state_dict"),
    "outside of the factors": (Unfolded(r=4), "merged and unmerged differ"),
}


@pytest.mark.parametrize(("strategy", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_promise_is_named(strategy: AdapterStrategy, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_strategy(strategy)


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


def test_two_processes_agree() -> None:
    # Their masks differ, their averaged gradients do not.
    check_strategy(Pruned(recovery="gradient", allocation="global", rank_gate=step_mask), ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["token", "learned"])
def test_two_processes_agree_under_droplora(mask: Any) -> None:
    check_strategy(DropLoRA(r=4, mask=mask, lora_dropout=0.1), ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["wanda", "random"])
def test_two_processes_agree_on_what_each_sees_for_itself(criterion: Any) -> None:
    check_strategy(Pruned(criterion=criterion), ranks=2)


def test_what_cannot_be_pickled_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be sent to another process .*no lambda"):
        check_strategy(LoRA(r=2, rank_gate=lambda r: Noise()), ranks=2)


def test_a_class_from_main_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = type("Mine", (AdapterStrategy,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Mine", mine, raising=False)
    with pytest.raises(ValueError, match="Mine uses a class or function from __main__"):
        check_strategy(mine(r=2), ranks=2)
