"""What is written loads in PEFT, and what PEFT writes loads here."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_peft import load_peft, save_peft
from lightning_peft.adapters import LoRALinear, PeftForm, adapter_layers, keep_components
from lightning_peft.adapters.peft_format import alpha_of, peft_state
from lightning_peft.strategies import DropLoRA, LoRA, LoRADrop

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def fill(model: nn.Module) -> nn.Module:
    """Give every B random values, shared ones once."""
    torch.manual_seed(3)
    for parameter in {id(x.lora_B): x.lora_B for x in adapter_layers(model).values()}.values():
        nn.init.normal_(parameter, std=0.2)
    return model


def shrink(model: nn.Module, ranks: dict[str, int]) -> None:
    for name, layer in adapter_layers(model).items():
        for end, rank in ranks.items():
            if name.endswith(end):
                keep_components(layer, torch.randperm(layer.rank)[:rank].sort().values)


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder)


def lora(model: nn.Module) -> None:
    LoRA(r=4, lora_alpha=7, lora_dropout=0.1).attach(model)
    fill(model)


def rslora(model: nn.Module) -> None:
    LoRA(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"]).attach(model)
    fill(model)


def mixed_ranks(model: nn.Module) -> None:
    LoRA(r=6, lora_alpha=5).attach(model)
    fill(model)
    shrink(model, {"0.self_attn.q_proj": 1, "up_proj": 3, "1.mlp.down_proj": 5})


def mixed_ranks_rslora(model: nn.Module) -> None:
    LoRA(r=6, use_rslora=True).attach(model)
    fill(model)
    shrink(model, {"self_attn.k_proj": 2, "1.mlp.gate_proj": 3})


def missing_layers(model: nn.Module) -> None:
    LoRA(r=3).attach(model)
    fill(model)
    shrink(model, {"0.self_attn.q_proj": 0, "1.self_attn.v_proj": 0, "o_proj": 0, "up_proj": 2})


def shared_parameters(model: nn.Module) -> None:
    strategy = LoRADrop(r=3, target_modules=["q_proj", "down_proj"])
    strategy.attach(model)
    entry = {"importance": 1.0, "share": 0.5}
    strategy.apply(model, {name: {**entry, "role": "shared"} for name in adapter_layers(model)})
    fill(model)


def removed_layers(model: nn.Module) -> None:
    strategy = LoRADrop(r=3, target_modules=["q_proj", "down_proj"])
    strategy.attach(model)
    roles = {n: "removed" if "layers.0" in n else "kept" for n in adapter_layers(model)}
    strategy.apply(
        model, {n: {"importance": 1.0, "share": 0.5, "role": r} for n, r in roles.items()}
    )
    fill(model)


def gates(model: nn.Module) -> None:
    DropLoRA(r=4, mask="learned").attach(model)
    fill(model)


def saved_modules(model: nn.Module) -> None:
    saved = ["lm_head", "norm", "1.post_attention_layernorm"]
    LoRA(r=4, target_modules=["q_proj"], modules_to_save=saved).attach(model)
    fill(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)


FORMS = [
    lora,
    rslora,
    mixed_ranks,
    mixed_ranks_rslora,
    missing_layers,
    shared_parameters,
    removed_layers,
    gates,
    saved_modules,
]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_the_same_in_peft_and_here(
    form, tiny_llama, random_batch, logits, tmp_path
) -> None:
    model, batch = tiny_llama(), random_batch(1)
    base = logits(model, batch)
    form(model)
    expected = logits(model, batch)
    assert (expected - base).abs().max() > 0.05
    save_peft(model, tmp_path)
    torch.testing.assert_close(
        logits(in_peft(tiny_llama(), tmp_path), batch), expected, **TOLERANCE
    )
    loaded = load_peft(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, **TOLERANCE)
    alive = {name: x.rank for name, x in adapter_layers(model).items() if x.rank}
    assert {name: x.rank for name, x in adapter_layers(loaded).items()} == alive


def test_the_configuration_is_what_peft_users_expect(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    LoRA(r=6, lora_alpha=12, target_modules=["q_proj", "v_proj"]).attach(model)
    fill(model)
    shrink(model, {"0.self_attn.q_proj": 2})
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    odd = "model.layers.0.self_attn.q_proj"
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"]) == (6, 12)
    assert config["target_modules"] == list(adapter_layers(model))
    assert config["rank_pattern"] == {"^" + re.escape(odd): 2}
    assert config["alpha_pattern"] == {"^" + re.escape(odd): 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_short_name_does_not_match_the_ends_of_longer_ones(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"q": nn.Linear(4, 4), "deep": nn.ModuleDict({"q": nn.Linear(4, 4)})})
        model.forward = lambda x: model["deep"]["q"](model["q"](x))  # type: ignore[method-assign]
        return model

    model, x = make(), torch.randn(3, 4)
    LoRA(r=2, target_modules="q").attach(model)
    fill(model)
    save_peft(model, tmp_path)
    theirs = in_peft(make(), tmp_path).base_model.model
    torch.testing.assert_close(theirs["q"](x), model["q"](x), **TOLERANCE)
    assert isinstance(theirs["deep"]["q"], nn.Linear)


# Refusals.


def test_nothing_to_save_is_refused(tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="no adapter of rank 1 or more"):
        save_peft(model, tmp_path / "a")
    LoRA(r=2, target_modules=["q_proj"]).attach(model)
    shrink(model, {"q_proj": 0})
    with pytest.raises(ValueError, match="no adapter of rank 1 or more"):
        save_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Own(LoRALinear):
    """A form with a configuration of its own, as PEFT would read it."""

    def peft(self) -> PeftForm:
        return PeftForm(
            {"own": self.active_A.detach()},
            config={"peft_type": "OWN", "r": self.rank, "alpha": 1.5 * self.rank},
            shared={"own_shared": torch.ones(2)},
        )


def test_a_form_says_its_own_tensors_and_configuration(tmp_path) -> None:
    names = ("a", "b", "c")
    model = nn.ModuleDict({n: Own(nn.Linear(3, 3), 2, 2) for n in names})
    tensors = peft_state(model)
    own = {f"base_model.model.{name}.own" for name in names}
    assert tensors.keys() == own | {"base_model.own_shared"}
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["alpha"]) == ("OWN", 2, 3.0)
    assert not {"lora_alpha", "rank_pattern", "alpha_pattern"} & config.keys()
    keep_components(model["a"], torch.tensor([1]))  # the first, which is not the rule
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["alpha"]) == (2, 3.0)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"^a": 1}, {"^a": 1.5})


def test_layers_of_two_kinds_are_refused(tmp_path) -> None:
    kinds = {"a": Own(nn.Linear(3, 3), 2, 2), "b": LoRALinear(nn.Linear(3, 3), 2, 2)}
    with pytest.raises(ValueError, match="holds layers of one kind, the model has LoRALinear, Own"):
        save_peft(nn.ModuleDict(kinds), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("value", "what"), [("nan", "NaN"), ("inf", "an infinite value")])
def test_numbers_that_are_none_are_not_saved(value, what, tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    LoRA(r=2, target_modules=["q_proj"], modules_to_save=["norm"]).attach(model)
    layer = next(iter(adapter_layers(model).values()))
    for parameter, name in ((layer.lora_B, "q_proj.lora_B.weight"), (model.model.norm.weight, "n")):
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.flatten()[3] = float(value)
        with pytest.raises(ValueError, match=f"{name}.* holds {what}, so the adapter is not wri"):
            save_peft(model, tmp_path / "a")
        with torch.no_grad():
            parameter.copy_(before)
    assert not (tmp_path / "a").exists()
    layer.scaling = float(value)
    with pytest.raises(ValueError, match="q_proj has the scaling (nan|inf), which must be a"):
        save_peft(model, tmp_path / "a")


def test_a_module_that_peft_would_take_for_a_saved_one_is_saved_too(tmp_path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        names = ("q", "head", "ahead")
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        model.forward = lambda x: model["ahead"](model["head"](model["q"](x)))  # type: ignore[method-assign]
        return model

    model, x = make(), torch.randn(3, 4)
    LoRA(r=2, target_modules=["q"], modules_to_save=["head"]).attach(model)
    fill(model)
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["ahead", "head"]
    torch.testing.assert_close(in_peft(make(), tmp_path).base_model.model(x), model(x), **TOLERANCE)
    torch.testing.assert_close(load_peft(make(), tmp_path)(x), model(x), **TOLERANCE)


def test_an_adapted_output_layer_comes_back_from_pefts_file(
    tiny_llama, random_batch, tmp_path
) -> None:
    """PEFT saves the weight of such a layer too, and has it in its place where it loads it."""
    import peft

    base = tiny_llama()
    with torch.no_grad():
        base.lm_head.weight.add_(0.1)  # of a base that is not the one it is loaded onto
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours, batch = load_peft(tiny_llama(), tmp_path).eval(), random_batch(0)
    torch.testing.assert_close(ours(**batch).logits, theirs.eval()(**batch).logits, **TOLERANCE)
    assert not ours.lm_head.base.weight.requires_grad


@pytest.mark.parametrize("part", ["", "model", "model.layers.1"])
def test_a_compiled_model_is_saved_under_its_plain_names(part: str, tiny_llama, tmp_path) -> None:
    model = tiny_llama()
    saved = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    LoRA(r=3, **saved).attach(model)
    fill(model)
    expected = peft_state(model)
    save_peft(model, tmp_path / "plain")
    if part:
        model.set_submodule(part, torch.compile(model.get_submodule(part)))
    save_peft(model if part else torch.compile(model), tmp_path / "compiled")
    found = load_file(tmp_path / "compiled/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    plain, compiled = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("plain", "compiled")
    )
    assert compiled == plain


def test_a_saved_module_whose_name_ends_an_adapted_ones_is_refused(tmp_path) -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "xq": nn.Linear(4, 4), "v": nn.Linear(4, 4)})
    LoRA(r=2, target_modules="xq|v", modules_to_save=["q"]).attach(model)
    with pytest.raises(ValueError, match="so that q is xq too, which is adapted; rename one"):
        save_peft(model, tmp_path / "a")


def test_a_layer_without_components_does_not_come_back_by_the_end_of_its_name(tmp_path) -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"q": nn.Linear(4, 4), "deep": nn.ModuleDict({"q": nn.Linear(4, 4)})})

    model = make()
    LoRA(r=2, target_modules=["q"]).attach(model)
    keep_components(adapter_layers(model)["deep.q"], torch.arange(0))
    save_peft(model, tmp_path)
    assert isinstance(in_peft(make(), tmp_path).base_model.model["deep"]["q"], nn.Linear)
    assert list(adapter_layers(load_peft(make(), tmp_path))) == ["q"]


@pytest.mark.parametrize(
    ("scaling", "rank", "alpha"), [(2.0, 3, 6), (7 / 6, 6, 7), (0.5, 3, 1.5), (16 / 7, 7, 16)]
)
def test_an_alpha_is_the_shortest_that_gives_the_scaling(scaling, rank, alpha) -> None:
    found = alpha_of(scaling, rank)
    assert (found, type(found)) == (alpha, type(alpha))
    for other in range(1, 400):
        scaling = 1.7 / other**0.5
        assert alpha_of(scaling, other) / other == pytest.approx(scaling, rel=1e-15)
