"""LoRA-GA: gradients and directions are PEFT's, the scale is the authors', resume is exact."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.adapters import (
    adapter_layers,
    adapter_state_dict,
    load_adapter_state,
    merge,
    save_peft,
    trainable_parameters,
)
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.lora_ga import LoRAGA
from lightning_peft.testing import check_strategy

TARGETS = ["q_proj", "v_proj", "down_proj"]


def attached(strategy: LoRAGA, model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    strategy.attach(model)
    return model.train()


def prepare(strategy: LoRAGA, model: Any, batches: list[Any]) -> None:
    strategy.prepare(model, lambda share: batches, lambda batch: model(**batch).loss)


@pytest.fixture
def batches(random_batch) -> list[Any]:
    return [random_batch(i) for i in range(3)]


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Rows of length one whose largest value is above zero: singular vectors have no sign."""
    rows = vectors / vectors.norm(dim=1, keepdim=True)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()


def test_directions_are_pefts_and_the_scale_the_authors(tiny_llama, batches) -> None:
    pytest.importorskip("peft.tuners.lora.loraga")
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    base = tiny_llama()

    def train_step() -> None:
        for batch in batches:
            base(**batch).loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_loraga(base, config, train_step)
        theirs = get_peft_model(base, config)
    original = tiny_llama()
    strategy = LoRAGA(r=4, lora_alpha=12, target_modules=TARGETS, niter=None)
    prepare(strategy, model := attached(strategy, tiny_llama()), batches)
    for name, layer in adapter_layers(model).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        close = {"rtol": 1e-3, "atol": 2e-3}
        torch.testing.assert_close(unit(A), unit(other.lora_A.default.weight.detach()), **close)
        torch.testing.assert_close(unit(B.T), unit(other.lora_B.default.weight.detach().T), **close)
        scale = layer.out_features**0.25 / 16**0.5
        torch.testing.assert_close(A @ A.T, scale**2 * torch.eye(4), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B.T @ B, scale**2 * torch.eye(4), rtol=1e-4, atol=1e-5)
        weight = original.get_submodule(name).weight.detach()
        torch.testing.assert_close(layer.base.weight, weight - 3.0 * B @ A, rtol=1e-4, atol=1e-6)


def test_the_first_step_is_the_best_that_rank_allows(tiny_llama, batches) -> None:
    strategy = LoRAGA(r=4, lora_alpha=4, niter=None)
    prepare(strategy, model := attached(strategy, tiny_llama()), batches)
    plain = tiny_llama()
    for batch in batches:
        model(**batch).loss.backward()
        plain(**batch).loss.backward()
    for name, layer in adapter_layers(model).items():
        gradient = plain.get_submodule(name).weight.grad
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        best = left[:, :8] * values[:8] @ right[:8]
        # What a step of gradient descent changes of s B A, s = 1, divided by its rate.
        step = layer.lora_B.grad @ layer.lora_A + layer.lora_B @ layer.lora_A.grad
        expected = best * layer.out_features**0.5 / 16
        assert (step - expected).norm() < 1e-3 * expected.norm()


def test_the_randomised_decomposition_finds_nearly_the_same_start(tiny_llama, batches) -> None:
    spaces = []
    for niter in (None, 8):
        strategy = LoRAGA(r=2, niter=niter, target_modules=TARGETS)
        prepare(strategy, model := attached(strategy, tiny_llama()), batches)
        spaces.append([m.lora_A.T @ m.lora_A for m in adapter_layers(model).values()])
    for exact, fast in zip(*spaces, strict=True):
        assert (exact - fast).norm() < 0.05 * exact.norm()


def test_the_sample_is_of_all_data_and_no_longer_than_asked(tiny_llama, batches) -> None:
    strategy, seen = LoRAGA(r=4, batches=2), []
    model = attached(strategy, tiny_llama())

    def loss(batch: Any) -> torch.Tensor:
        seen.append(batch)
        return model(**batch).loss

    shares: list[float] = []
    strategy.prepare(model, lambda share: shares.append(share) or batches, loss)
    assert shares == [1.0]
    assert [id(b) for b in seen] == [id(b) for b in batches[:2]]
    prepare(strategy, model, [])  # a second call changes nothing


def test_a_layer_without_a_gradient_starts_as_in_lora(tiny_llama, batches) -> None:
    strategy = LoRAGA(r=4, target_modules=["q_proj"])
    model = attached(strategy, tiny_llama())
    first, second = adapter_layers(model).values()
    before = second.lora_A.detach().clone()
    hidden = model.model.layers[0]

    def loss(batch: Any) -> torch.Tensor:  # of the first block alone
        seen: list[torch.Tensor] = []
        hook = hidden.self_attn.q_proj.register_forward_hook(lambda *call: seen.append(call[2]))
        model(**batch)
        hook.remove()
        return seen[0].square().mean()

    strategy.prepare(model, lambda share: batches, loss)
    assert first.lora_B.any()
    assert not second.lora_B.any()
    assert not second.start_A.any()
    assert torch.equal(second.lora_A, before)


def test_what_is_saved_brings_start_and_base_bit_for_bit(
    tiny_llama, batches, random_batch, logits
) -> None:
    strategy, resumed = LoRAGA(r=4), LoRAGA(r=4)
    prepare(strategy, model := attached(strategy, tiny_llama()), batches)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
    other = tiny_llama()
    resumed.attach(other, initialize=False)
    load_adapter_state(other, adapter_state_dict(model))
    resumed.load_state_dict(strategy.state_dict())
    for one, two in zip(
        adapter_layers(model).values(), adapter_layers(other).values(), strict=True
    ):
        assert torch.equal(one.base.weight, two.base.weight)
    assert torch.equal(logits(model, random_batch(9)), logits(other, random_batch(9)))
    resumed.before_step(other, torch.optim.SGD(other.parameters(), 0.1), 5)


def test_it_is_exported_against_the_original_base(
    tiny_llama, batches, random_batch, logits, tmp_path
) -> None:
    peft = pytest.importorskip("peft")
    strategy = LoRAGA(r=4)
    prepare(strategy, model := attached(strategy, tiny_llama()), batches)
    for layer in adapter_layers(model).values():
        with torch.no_grad():
            layer.lora_B += 0.2 * torch.randn_like(layer.lora_B)
    expected = logits(model, batch := random_batch(0))
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(model), batch), expected, rtol=1e-5, atol=1e-5)


def test_it_trains_as_many_parameters_as_lora(tiny_llama, batches) -> None:
    strategy = LoRAGA(r=4, target_modules=["q_proj", "v_proj"])
    prepare(strategy, model := attached(strategy, tiny_llama()), batches)
    assert trainable_parameters(model) == 2 * 4 * (32 + 32 + 32 + 16)


def test_a_gradient_that_is_no_number_is_refused(tiny_llama, batches) -> None:
    strategy = LoRAGA(r=4, target_modules=["q_proj"])
    model = attached(strategy, tiny_llama())
    first = next(iter(adapter_layers(model)))
    sentence = f"^the gradient of {first} on the sample holds NaN.$"
    with pytest.raises(ValueError, match=sentence):
        strategy.prepare(model, lambda _: batches, lambda b: model(**b).loss * float("nan"))


def test_a_rank_without_enough_singular_vectors_is_refused(tiny_llama) -> None:
    sentence = (
        "^r = 9: LoRAGA takes 18 singular vectors, and model.layers.0.self_attn.v_proj has 16; "
        r"give a rank of at most 8 \(rank_pattern, for this layer alone\), or exclude_modules.$"
    )
    with pytest.raises(ValueError, match=sentence):
        LoRAGA(r=9, target_modules=["v_proj"]).attach(tiny_llama())
    LoRAGA(r=9, rank_pattern={"k_proj|v_proj": 8}).attach(tiny_llama())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"gamma": 0}, "gamma must be a finite number above zero, got 0."),
        ({"batches": 0}, "batches must be at least 1, got 0."),
        ({"niter": 0}, "niter must be at least 1, got 0."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, sentence) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        LoRAGA(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"niter": None, "modules_to_save": ["lm_head"]}, marks=pytest.mark.long),
        pytest.param(
            {"lora_dropout": 0.2, "rank_gate": lambda r: RankDropout(r, 0.3)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(LoRAGA(r=4, **arguments))


@pytest.mark.slow
def test_two_processes_agree() -> None:
    check_strategy(LoRAGA(r=4), processes=2)
