"""What all-linear leaves out, and what no adapter reaches, is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.reach import computes_otherwise, left_out, output_names, unreached
from lightning_peft.errors import UserError
from lightning_peft.strategies import LoRA


class Router(nn.Linear):
    """As Llama-4's: scores, and which expert has the highest."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Named(nn.Linear):
    """A subclass that computes what a linear does."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = Router(8, 4), Named(8, 8)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))


def block_model() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(16, 8)
    model.layers = nn.ModuleList([Block(), Block()])
    model.score = nn.Linear(8, 2)
    return model


def test_a_linear_with_a_forward_of_its_own_is_left_out_and_named() -> None:
    model = block_model()
    report = LoRA(r=2, target_modules="all-linear").attach(model)
    assert list(adapter_layers(model)) == ["layers.0.up", "layers.1.up"]
    assert report.left_out == left_out(model) == ["layers.0.router", "layers.1.router"]
    line = "  left out, since they compute no plain linear: layers.0.router, layers.1.router"
    assert line in str(report).splitlines()
    assert not computes_otherwise(Named(2, 2))


def test_weights_that_no_adapter_reaches_are_counted_by_kind() -> None:
    model = block_model()
    report = LoRA(r=2, target_modules="all-linear").attach(model)
    assert output_names(model) == {"score"}
    assert report.unreached == unreached(model, {"score"})
    assert report.unreached == {"layers.experts": 512, "layers.router": 64}
    share = 100 * (512 + 64) / report.total
    line = f"  frozen without an adapter: {share:.0f} % (layers.experts 512, layers.router 64)"
    assert line in str(report).splitlines()


def test_targets_that_are_named_are_not_told_what_else_there_is(tiny_llama) -> None:
    report = LoRA(r=2, target_modules=["q_proj"]).attach(tiny_llama())
    assert (report.left_out, report.unreached) == ([], {})
    everywhere = LoRA(r=2, target_modules="all-linear").attach(tiny_llama())
    assert everywhere.unreached == {}
    assert "frozen" not in str(everywhere)


def test_experts_in_one_parameter_are_told_from_a_wrong_name() -> None:
    with pytest.raises(UserError) as error:
        LoRA(r=2, target_modules=["experts"]).attach(block_model())
    assert str(error.value) == (
        "target_modules: 'experts' names layers.0.experts, 4 matrices in one parameter and no "
        "module, as experts are kept; only torch.nn.Linear can be adapted."
    )
