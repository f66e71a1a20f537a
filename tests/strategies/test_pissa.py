"""PiSSA: the product and the residual are PEFT's, and the base loses exactly what A and B hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.adapters import adapter_layers, merge, save_peft
from lightning_peft.strategies import PiSSA, RankDropout
from lightning_peft.testing import check_strategy


@pytest.mark.parametrize("lora_alpha", [4, 8])
def test_the_product_and_the_residual_are_pefts(lora_alpha, tiny_llama) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=lora_alpha, target_modules=targets, init_lora_weights="pissa"
    )
    theirs = peft.get_peft_model(tiny_llama(), config)
    ours = tiny_llama()
    PiSSA(r=4, lora_alpha=lora_alpha, target_modules=targets).attach(ours)
    for name, layer in adapter_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        product = other.lora_B.default.weight @ other.lora_A.default.weight
        close = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, product, **close)
        torch.testing.assert_close(layer.base.weight, other.base_layer.weight, **close)


def test_it_starts_at_the_best_approximation_of_its_rank() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 20)
    weight = base.weight.detach().clone()
    strategy = PiSSA(r=3)
    layer = strategy.layer(base, "q")
    strategy.initialize(layer)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = left[:, :3] * values[:3] @ right[:3]
    torch.testing.assert_close((layer.lora_B @ layer.lora_A).detach(), best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.base.weight.detach(), weight - best, rtol=1e-4, atol=1e-5)
    assert layer.delta_weight().abs().max() < 1e-6


def test_the_randomised_decomposition_leaves_nearly_the_least_residual(tiny_llama) -> None:
    # The parts themselves need not agree where singular values are close together.
    exact, fast = tiny_llama(), tiny_llama()
    PiSSA(r=4).attach(exact)
    torch.manual_seed(0)
    PiSSA(r=4, niter=16).attach(fast)
    for one, other in zip(
        adapter_layers(exact).values(), adapter_layers(fast).values(), strict=True
    ):
        least, residual = (m.base.weight.detach().norm().item() for m in (one, other))
        assert least <= residual * (1 + 1e-6)
        assert residual < 1.01 * least


def test_it_is_exported_against_the_original_base(
    tiny_llama, random_batch, logits, tmp_path
) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    PiSSA(r=4).attach(model)
    for layer in adapter_layers(model).values():
        with torch.no_grad():
            layer.lora_B += 0.2 * torch.randn_like(layer.lora_B)
    expected = logits(model, batch := random_batch(0))
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(model), batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"niter": 4}, {"lora_dropout": 0.2, "rank_gate": lambda r: RankDropout(r, 0.3)}],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(PiSSA(r=4, **arguments))


def test_wrong_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match="niter must be at least 1, got 0"):
        PiSSA(niter=0)
