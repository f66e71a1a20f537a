"""LoRA-XS: its steps are those of the written formula, and PEFT reads it as plain LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaModel

from lightning_peft.adapters import adapter_layers, merge, save_peft, trainable_parameters
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.lora_xs import LoRAXS
from lightning_peft.testing import check_strategy


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("lora_alpha", [None, 9.0])
def test_steps_are_those_of_the_formula(shape, lora_alpha) -> None:
    torch.manual_seed(0)
    base = nn.Linear(*shape).requires_grad_(False)
    strategy = LoRAXS(r=3, lora_alpha=lora_alpha)
    layer = strategy.layer(base, "q")
    strategy.initialize(layer)
    # As the authors write it: (U S) Vᵀ of Wᵀ, the first factor down, the second up.
    left, values, right = torch.linalg.svd(base.weight.T, full_matrices=False)
    down, up = left[:, :3] * values[:3], right[:3]
    R = layer.lora_R.detach().T.clone()
    sign = (layer.lora_A @ down).diagonal().sign()  # singular vectors have none
    R = (sign[:, None] * R * sign).requires_grad_()
    s = 1.0 if lora_alpha is None else 3.0

    def formula(x: torch.Tensor) -> torch.Tensor:
        return base(x) + s * (x @ down @ R @ up)

    target = torch.randn(16, shape[1])
    optimizers = [torch.optim.AdamW([p], lr=0.05) for p in (layer.lora_R, R)]
    for _ in range(6):
        x = torch.randn(16, shape[0])
        losses = [(f(x) - target).square().mean() for f in (layer, formula)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    change = s * (down @ R @ up).T
    assert change.abs().max() > 0.05
    torch.testing.assert_close(layer.delta_weight(), change.detach(), rtol=1e-4, atol=1e-5)


def test_it_starts_at_the_base_with_the_factors_of_its_principal_part(tiny_llama) -> None:
    LoRAXS(r=4).attach(model := tiny_llama())
    values = []
    for layer in adapter_layers(model).values():
        weight = layer.base.weight.detach()
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        with torch.no_grad():
            values.append(layer.lora_R.clone())
            layer.lora_R.copy_(torch.eye(4))
        torch.testing.assert_close(
            layer.delta_weight(), left[:, :4] * singular[:4] @ right[:4], rtol=1e-4, atol=1e-5
        )
        B = layer.lora_B
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=1e-4, atol=1e-5)
    drawn = torch.stack(values)
    assert drawn.std() == pytest.approx(1e-5, rel=0.2)
    assert drawn.abs().max() < 1e-4


def test_the_square_of_the_rank_trains(tiny_llama) -> None:
    strategy = LoRAXS(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    report = strategy.attach(model := tiny_llama())
    assert report.trainable == trainable_parameters(model) == 6 * 4**2
    assert strategy.final_parameters(model) == 6 * 4**2
    strategy = LoRAXS(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    strategy.attach(model := tiny_llama())
    assert trainable_parameters(model) == 2 * (4**2 + 2**2)


def test_peft_reads_it_as_plain_lora(tiny_llama, random_batch, logits, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    LoRAXS(r=4, lora_alpha=8).attach(model := tiny_llama())
    plain = logits(model, batch := random_batch(0))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_R, std=0.2)
    expected = logits(model, batch)
    assert (expected - plain).abs().max() > 0.1
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].r == 4
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(model), batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sigma": -0.1}, r"sigma must lie in \[0, 1\), got -0.1."),
        ({"niter": 0}, "niter must be at least 1, got 0."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, sentence) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        LoRAXS(**arguments)


def test_a_rank_above_the_weights_is_refused(tiny_llama) -> None:
    sentence = "^r = 17 is above the 16 singular values of a 16 x 32 matrix.$"
    with pytest.raises(ValueError, match=sentence):
        LoRAXS(r=17, target_modules=["v_proj"]).attach(tiny_llama())


@pytest.mark.parametrize("r", [4, 25])
def test_a_matrix_trains_the_square_of_the_rank_whatever_its_size(r: int) -> None:
    """As the paper adapts RoBERTa-large: query, value and both output matrices of 24 blocks."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    with torch.device("meta"):
        model = RobertaModel(RobertaConfig(**shape, num_hidden_layers=24))
    LoRAXS(r=r, target_modules=["query", "value", "output.dense"]).attach(model, initialize=False)
    assert trainable_parameters(model) == 24 * 4 * r**2


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param(
            {"sigma": 0.0, "niter": 8, "use_rslora": True, "modules_to_save": ["lm_head"]},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"lora_dropout": 0.2, "rank_gate": lambda r: RankDropout(r, 0.3)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(LoRAXS(r=4, **arguments))


@pytest.mark.slow
def test_two_processes_agree() -> None:
    check_strategy(LoRAXS(r=4), processes=2)
