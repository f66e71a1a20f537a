"""Which heads and channels leave together: a model without them computes what masks would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_peft.adapters.groups import Member, changes, groups_of, refusal, refuse_fixed, shrink
from lightning_peft.errors import UserError
from lightning_peft.strategies import LoRA

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(kind: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SHAPE | changes)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.arange(3, 13)[None]).logits


def some(count: int, seed: int) -> Tensor:
    """Half of the groups."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2].sort().values


def test_a_head_is_a_key_value_head_with_its_query_heads(tiny_llama) -> None:
    groups = groups_of(tiny_llama())
    assert [*groups] == [f"model.layers.{i}.{n}" for n in ("self_attn", "mlp") for i in (0, 1)]
    attention, mlp = groups["model.layers.1.self_attn"], groups["model.layers.1.mlp"]
    assert (attention.kind, attention.count, mlp.kind, mlp.count) == ("heads", 2, "channels", 48)
    name = "model.layers.1.self_attn"
    assert attention.members == (
        Member(f"{name}.q_proj", 0, 16),
        Member(f"{name}.k_proj", 0, 8),
        Member(f"{name}.v_proj", 0, 8),
        Member(f"{name}.o_proj", 1, 16),
    )
    assert [member.dim for member in mlp.members] == [0, 0, 1]
    assert {member.size for member in mlp.members} == {1}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {"num_key_value_heads": 4}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}),
        ("Mistral", {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}),
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Gemma2", {}),
        ("SmolLM3", {}),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_without_them_a_model_computes_what_masks_would(kind, more, adapted, tmp_path) -> None:
    model, masked = model_of(kind, **more), model_of(kind, **more)
    for each in (model, masked) if adapted else ():
        torch.manual_seed(1)
        LoRA(r=2, init_lora_weights=False, target_modules=r".*(v|o|up|down)_proj").attach(each)
    groups, before = groups_of(model), logits(model)
    kept = {name: some(each.count, i) for i, (name, each) in enumerate(groups.items())}
    for name, each in groups.items():
        last = each.members[-1]
        open_ = torch.zeros(each.count, last.size)
        open_[kept[name]] = 1
        masked.get_submodule(last.name).register_forward_pre_hook(
            lambda module, args, open_=open_: (args[0] * open_.flatten(),)
        )
    shrink(model, kept)
    torch.testing.assert_close(logits(model), logits(masked), rtol=0, atol=1e-5)
    assert (logits(model) - before).abs().max() > 1e-3
    assert {name: each.count for name, each in groups_of(model).items()} == {
        name: each.count // 2 for name, each in groups.items()
    }
    if not adapted:
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        assert sum(p.numel() for p in loaded.parameters()) < sum(
            p.numel() for p in masked.parameters()
        )


def test_one_kind_may_leave_alone_and_the_configuration_says_so(tiny_llama) -> None:
    model = tiny_llama()
    shrink(model, {f"model.layers.{i}.mlp": torch.arange(5) for i in (0, 1)})
    config = model.config
    assert (config.intermediate_size, config.num_attention_heads) == (5, 4)
    assert model.model.layers[0].mlp.intermediate_size == 5
    shrink(model, {f"model.layers.{i}.self_attn": torch.tensor([i]) for i in (0, 1)})
    assert (config.intermediate_size, config.num_attention_heads) == (5, 2)
    assert (config.num_key_value_heads, config.head_dim) == (1, 8)
    assert changes(model, {}) == {}


def test_llamas_configuration_wants_heads_that_divide_the_hidden_size() -> None:
    model = model_of("Llama", num_attention_heads=8, num_key_value_heads=4)
    reasons = [refusal(model.config, changes(model, {"heads": left})) for left in (1, 2, 3, 4)]
    said = "The hidden size (32) is not a multiple of the number of attention heads (6)"
    assert reasons == [None, None, said, None]
    other = model_of("Mistral", num_attention_heads=8, num_key_value_heads=4)
    assert refusal(other.config, changes(other, {"heads": 3})) is None
    assert refusal(other.config) is None


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), "its configuration has no num_hidden_layers"),
        (
            lambda: model_of("Phi3"),
            "0 of its 2 layers have q_proj, k_proj, v_proj, o_proj",  # qkv_proj
        ),
        (
            lambda: model_of("Mixtral"),
            "0 of its 2 layers have gate_proj, up_proj, down_proj",  # experts
        ),
        (
            lambda: model_of("Olmo2"),  # a norm over all heads together
            "model.layers.0.self_attn is not of the sizes of its configuration",
        ),
    ],
)
def test_another_layout_is_refused(model, reason) -> None:
    made = model()
    with pytest.raises(UserError) as error:
        groups_of(made)
    assert str(error.value) == (
        f"heads and channels can leave a model of LLaMA's layout only, and {type(made).__name__} "
        f"is none ({reason}); give a LLaMA, Mistral or Qwen model, or a method that leaves the "
        "base as it is."
    )


def test_sizes_that_the_configuration_does_not_say_are_another_layout(tiny_llama) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 47)
    with pytest.raises(UserError, match=r"layers.1.mlp is not of the sizes of its configuration"):
        groups_of(model)


def test_quantized_and_shared_weights_are_refused(tiny_llama) -> None:
    model = tiny_llama()
    groups = groups_of(model)
    refuse_fixed(model, groups)
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(UserError) as error:
        refuse_fixed(model, groups)
    assert str(error.value) == (
        "model.layers.0.mlp.up_proj shares its weight with another module, which would lose rows "
        "or columns too; untie them."
    )
    model = tiny_llama()
    packed = torch.zeros(8, 1, dtype=torch.uint8)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UserError) as error:
        refuse_fixed(model, groups)
    assert str(error.value) == (
        "model.layers.0.self_attn.q_proj is a Linear, which rows and columns cannot leave: give "
        "model.quantization: null, or a method that leaves the base as it is."
    )


def test_a_configuration_of_no_known_class_that_cannot_be_made_anew_is_refused() -> None:
    config: Any = SimpleNamespace(to_dict=lambda: {"a": 1})
    assert refusal(config) is None

    class Strict:
        def __init__(self, **entries: int) -> None:
            if "a" in entries:
                raise ValueError("Class validation error:\n    ValueError: too few.")

        def to_dict(self) -> dict[str, int]:
            return {}

    assert refusal(Strict()) is None
    assert refusal(Strict(), {"a": 1}) == "too few"
