"""What every strategy inherits: attaching, being called, and saying so when it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.adapters import LoRALinear, adapter_layers, keep_components
from lightning_peft.strategies import AdapterStrategy, LoRA, StepMask

# Being called.


# Attaching.


def test_attaching_freezes_the_base_and_gives_each_layer_its_own_adapter(tiny_llama) -> None:
    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    LoRA(r=3, lora_alpha=5, target_modules=["q_proj"]).attach(model)
    after = {n.replace(".base", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[n], value) for n, value in before.items())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    layers = adapter_layers(model)
    assert trained == {f"{name}.lora_{side}" for name in layers for side in "AB"}
    assert [x.scaling for x in layers.values()] == [5 / 3] * 2
    first, second = layers.values()
    assert not torch.equal(first.lora_A, second.lora_A)


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert LoRA(r=6).lora_alpha == 12
    assert LoRA(r=6, lora_alpha=1).lora_alpha == 1


def test_attaching_twice_is_an_error(two_linears) -> None:
    strategy, model = LoRA(r=2), two_linears()
    strategy.attach(model)
    with pytest.raises(ValueError, match="this LoRA is attached already; make one for each model"):
        strategy.attach(two_linears())
    with pytest.raises(ValueError, match="the model has adapters already"):
        LoRA(r=2).attach(model)


def test_saved_modules_train_whole_and_without_adapters(tiny_llama) -> None:
    model = tiny_llama()
    LoRA(r=2, modules_to_save=["lm_head", "1.mlp", "norm"]).attach(model)
    full = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    mlp = {f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    assert full == mlp | {"lm_head.weight", "model.norm.weight"}
    assert not any("1.mlp" in name for name in adapter_layers(model))


def test_a_saved_module_that_is_not_there_changes_nothing(two_linears) -> None:
    model = two_linears()
    with pytest.raises(ValueError, match="modules_to_save: 'score' matches no module"):
        LoRA(r=2, modules_to_save=["score"]).attach(model)
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"lora_dropout": 1}, r"lora_dropout must lie in \[0, 1\), got 1"),
        ({"lora_dropout": -0.5}, r"lora_dropout must lie in \[0, 1\), got -0.5"),
    ],
)
def test_wrong_numbers_are_refused_at_once(arguments, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        LoRA(**arguments)


# Overriding.


def test_a_gate_is_all_that_a_new_method_needs(two_linears) -> None:
    class HalfDrop(AdapterStrategy):
        def gate(self, r: int) -> nn.Module:
            assert r == 3
            return nn.Dropout(0.5)

    model = two_linears()
    HalfDrop(r=3).attach(model)
    gates = [layer.gate for layer in adapter_layers(model).values()]
    assert [type(gate) for gate in gates] == [nn.Dropout] * 2
    assert gates[0] is not gates[1]


def test_a_layer_and_its_start_can_be_replaced(two_linears) -> None:
    class Scaled(LoRALinear):
        pass

    class Own(AdapterStrategy):
        def layer(self, base: nn.Module, name: str) -> LoRALinear:
            return Scaled(base, self.r, self.lora_alpha)

        def initialize(self, layer: LoRALinear) -> None:
            nn.init.constant_(layer.lora_A, 0.5)

    model = two_linears()
    Own(r=2).attach(model)
    for layer in adapter_layers(model).values():
        assert type(layer) is Scaled
        assert (layer.lora_A == 0.5).all()


def test_a_form_alone_is_said_in_one_line_and_a_rank_by_layer_in_two(two_linears) -> None:
    class Scaled(LoRALinear):
        pass

    class OwnForm(AdapterStrategy):
        layer_class = Scaled

    class OwnRanks(OwnForm):
        def layer(self, base: nn.Module, name: str) -> LoRALinear:
            return Scaled(base, **self.lora_arguments(r={"0": 1, "2": 3}[name]))

    given = {"lora_alpha": 6, "lora_dropout": 0.5, "use_rslora": True, "rank_gate": StepMask}
    for strategy, ranks in ((OwnForm(r=2, **given), [2, 2]), (OwnRanks(r=2, **given), [1, 3])):
        strategy.attach(model := two_linears())
        layers = adapter_layers(model).values()
        assert [type(layer) for layer in layers] == [Scaled, Scaled]
        assert [layer.rank for layer in layers] == ranks
        assert [len(layer.gate.mask) for layer in layers] == ranks
        assert [layer.scaling for layer in layers] == [6 / r**0.5 for r in ranks]
        assert {layer.dropout.p for layer in layers} == {0.5}


def test_the_optimizer_is_given_what_trains_with_its_names_in_the_models_order(two_linears) -> None:
    seen: list[str] = []

    class Remembers(AdapterStrategy):
        def optimizer(self, named_parameters: Any, default: Any) -> Any:
            named = list(named_parameters)
            seen.extend(name for name, _ in named)
            return super().optimizer(named, default)

    model, strategy = two_linears(), Remembers(r=2, modules_to_save=["2"])
    strategy.attach(model)
    optimizer = strategy.make_optimizer(model, lambda params: torch.optim.SGD(params, 0.1))
    assert seen == ["0.lora_A", "0.lora_B", "2.weight", "2.bias"]
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(model.get_parameter(name)) for name in seen]
    assert strategy.final_parameters(model) == 2 * (4 + 4) + 2 * 4 + 2


def test_decisions_survive_a_checkpoint_and_are_no_alias() -> None:
    strategy = LoRA(r=2)
    strategy.note(3, "q", "removed", 1)
    state = strategy.state_dict()
    strategy.note(4, "q", "removed", 0)
    other = LoRA(r=2)
    other.load_state_dict(state)
    assert other.decisions == [{"step": 3, "layer": "q", "event": "removed", "rank": 1}]
    other.note(5, "k", "removed", 1)
    assert len(state["decisions"]) == 1


def test_defaults_do_nothing(two_linears) -> None:
    model, strategy = two_linears(), LoRA(r=2)
    strategy.attach(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = strategy.make_optimizer(model, torch.optim.SGD)
    assert isinstance(optimizer, torch.optim.SGD)
    strategy.prepare(model, lambda share: [], lambda batch: torch.zeros(()))
    strategy.before_step(model, optimizer, 0)
    strategy.after_step(model, optimizer, 0)
    assert strategy.penalty(model) == 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_strategy_can_remove_at_any_step_by_hand(two_linears, optimizer_of, backward) -> None:
    class Halving(AdapterStrategy):
        def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
            super().after_step(model, optimizer, global_step)
            for layer in adapter_layers(model).values():
                keep_components(layer, torch.arange(layer.rank // 2), optimizer)

    model, strategy = two_linears(), Halving(r=4)
    strategy.attach(model)
    optimizer = optimizer_of(model)
    ranks = []
    for step in range(4):
        backward(model)
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step)
        optimizer.zero_grad()
        ranks.append(adapter_layers(model)["0"].rank)
    assert ranks == [2, 1, 0, 0]
