"""DoRA against PEFT's, and its norm against the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers, merge, save_peft
from lightning_peft.adapters.dropout import InputDropout
from lightning_peft.strategies import DoRA, RankDropout
from lightning_peft.strategies.dora import DoRALinear
from lightning_peft.testing import check_strategy

ALL = ["q_proj", "v_proj", "down_proj"]
ROWS = [3, 40]


DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float64, 1e-12)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_its_formula(bias, p, dtype, tolerance, rows, run_layer, assert_same) -> None:
    torch.manual_seed(0)
    base = nn.Linear(20, 12, bias=bias, dtype=dtype).requires_grad_(False)
    layer = DoRALinear(base, 6, 9, p)
    layer.reset_parameters(False)
    nn.init.uniform_(layer.lora_magnitude, 0.5, 1.5)
    layer.train()

    def formula(x: Tensor) -> Tensor:
        """Equation 5 with the norm detached, and the change from the dropped input."""
        dropped = layer.dropout(x)
        weight = base.weight.to(layer.lora_A.dtype)
        adapted = weight + layer.scaling * layer.lora_B @ layer.lora_A
        directed = (layer.lora_magnitude / adapted.norm(dim=1).detach())[:, None] * adapted
        inside = x.to(weight.dtype), dropped.to(weight.dtype)
        y = inside[0] @ weight.T + inside[1] @ (directed - weight).T
        return (y + base.bias if bias else y).to(dtype)

    x = torch.randn(2, rows, 20, dtype=dtype)
    assert_same(run_layer(layer, layer, x), run_layer(layer, formula, x), tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_and_gradients_are_pefts(dropout, pair, random_batch, gradients) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=ALL, use_dora=True
    )
    strategy = DoRA(r=4, lora_dropout=dropout, target_modules=ALL)
    ours, theirs = pair(strategy, config)
    for name in adapter_layers(ours) if dropout else ():  # one way to draw masks for both
        theirs.get_submodule(f"base_model.model.{name}").lora_dropout["default"] = InputDropout(
            dropout
        )
    batch = random_batch(3)
    torch.testing.assert_close(gradients(ours, batch), gradients(theirs, batch))
    for name, layer in adapter_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        for own, part in (
            (layer.lora_A, other.lora_A.default.weight),
            (layer.lora_B, other.lora_B.default.weight),
            (layer.lora_magnitude, other.lora_magnitude_vector.default.weight),
        ):
            assert own.grad.abs().max() > 0
            torch.testing.assert_close(own.grad, part.grad, rtol=1e-4, atol=1e-6)


def test_the_norm_is_that_of_the_dense_weight() -> None:
    torch.manual_seed(0)
    layer = DoRA(r=3, rank_gate=lambda r: nn.Dropout(0.4)).layer(nn.Linear(12, 20), "q").eval()
    nn.init.normal_(layer.lora_B)
    weight = layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.weight_norm(), weight.norm(dim=1))


def test_it_starts_at_the_base_and_the_magnitude_is_the_weights_norm() -> None:
    layer = DoRA(r=3).layer(base := nn.Linear(12, 20), "q").eval()
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), base(x))
    torch.testing.assert_close(layer.lora_magnitude.detach(), base.weight.detach().norm(dim=1))


def test_the_change_of_the_output_is_that_of_the_dense_weights() -> None:
    torch.manual_seed(0)
    layer = DoRA(r=3).layer(nn.Linear(12, 20), "q").eval()
    nn.init.normal_(layer.lora_B)
    nn.init.uniform_(layer.lora_magnitude, 0.5, 2)
    x = torch.randn(5, 12)
    torch.testing.assert_close(
        layer.delta_sq_norm(x), (x @ layer.delta_weight().T).square().sum(-1)
    )
    torch.testing.assert_close(layer(x) - layer.base(x), x @ layer.delta_weight().T)


def test_merging_and_peft_keep_the_function(tiny_llama, random_batch, logits, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    DoRA(r=4, rank_gate=lambda r: RankDropout(r, 0.5, rescale=False)).attach(model)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
        nn.init.uniform_(layer.lora_magnitude, 0.5, 2)
    expected = logits(model, batch := random_batch(0))
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(model), batch), expected, rtol=1e-5, atol=1e-5)


def test_a_magnitude_for_each_output_is_counted(tiny_llama) -> None:
    model = tiny_llama()
    DoRA(r=4, target_modules=["q_proj", "v_proj"]).attach(model)
    assert trainable_parameters(model) == 2 * (4 * (32 + 32) + 32 + 4 * (32 + 16) + 16)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"lora_dropout": 0.2, "rank_gate": lambda r: RankDropout(r, 0.3)},
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(DoRA(r=4, **arguments))
