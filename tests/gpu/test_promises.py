"""Each strategy keeps its promises on the GPU: removal, recomputation, export, bitwise resume."""

from __future__ import annotations

import pytest
import torch
from every_strategy import STRATEGIES

from lightning_peft.testing import check_strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_keeps_its_promises(name: str, device: torch.device) -> None:
    if device.type == "cpu" and name != "PrunedLoRA":
        pytest.skip("tests/testing has them all on the CPU")
    check_strategy(STRATEGIES[name], device=device)
