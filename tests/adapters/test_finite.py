"""NaN and infinite values are told apart from numbers."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.adapters.finite import broken, refuse_broken


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([float("-inf")], dtype=torch.bfloat16), "an infinite value"),
        (torch.tensor([float("inf"), float("nan")]), "NaN"),
        (torch.tensor([3e38]), None),
        (torch.tensor([1, 2]), None),
        (torch.empty(0), None),
        (torch.empty(3, device="meta"), None),
        (torch.nn.Parameter(torch.tensor([float("nan")])), "NaN"),
    ],
)
def test_what_is_no_number_is_named(tensor: torch.Tensor, found: str | None) -> None:
    assert broken(tensor.detach()) == found


def test_the_first_broken_tensor_is_named() -> None:
    tensors = {"a": torch.ones(2), "b": torch.tensor([float("inf")]), "c": torch.tensor([0.0])}
    with pytest.raises(ValueError, match="b holds an infinite value, so the model is not written"):
        refuse_broken(tensors, "the model")
    refuse_broken({"a": tensors["a"]}, "the model")
