"""What processes ask of each other: on two, and on one, where each is the plain thing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_worker
import keeper_worker
import pytest
import torch
from torch import nn

from lightning_peft import distributed
from lightning_peft.distributed import processes


def ask(name: str, index: int, folder: Path) -> dict[str, Any]:
    keeper_worker.begin()
    parameter, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1), False)
    without = nn.Parameter(torch.ones(1))
    parameter.grad = torch.tensor([1.0, 10.0 * index])
    distributed.average_gradients([parameter, frozen, without])
    distributed.assert_agreement(3, {"a": [1]}, "nothing")
    try:
        distributed.assert_agreement(7, {"a": [1], "b": [0, 1 + index]}, "what to remove")
    except RuntimeError as error:
        said = str(error)
    found = {
        "who": (
            distributed.process_index(),
            distributed.world_size(),
            distributed.is_distributed(),
        ),
        "total": distributed.total([torch.tensor([[1.5, index]]), torch.tensor(2 + index)]),
        "mean": distributed.mean(torch.tensor([0.0, index])),
        "first": distributed.from_first(torch.tensor([5 + index])),
        "everywhere": distributed.everywhere({"process": index}),
        "largest": distributed.largest(3 * index),
        "shared": [*distributed.shared_out("abcde")],
        "gradients": (parameter.grad, frozen.grad, without.grad),
        "said": said,
    }
    distributed.leave(seconds=60)
    return found


def test_two_processes_ask_each_other(tmp_path: Path) -> None:
    results = engine_worker.launch(ask, "processes", tmp_path)
    for index, found in enumerate(results):
        assert found["who"] == (index, 2, True)
        floats, integer = found["total"]
        assert (floats.tolist(), floats.dtype) == ([[3.0, 1.0]], torch.float32)
        assert (integer.tolist(), integer.dtype) == (5, torch.int64)
        assert found["mean"].tolist() == [0.0, 0.5]
        assert found["first"].tolist() == [5]
        assert found["everywhere"] == [{"process": 0}, {"process": 1}]
        assert found["largest"] == 3
        assert found["shared"] == [["a", "c", "e"], ["b", "d", None]][index]
        averaged, frozen, without = found["gradients"]
        assert (averaged.tolist(), frozen, without.tolist()) == ([1.0, 5.0], None, [0.0])
        assert found["said"] == (
            "processes disagree on what to remove at step 7: for b process 0 has [0, 1], process "
            "1 has [0, 2]; decide by what is equal on all (lightning_peft.distributed)."
        )


def test_one_process_does_the_plain_thing() -> None:
    assert (distributed.world_size(), distributed.process_index()) == (1, 0)
    assert not distributed.is_distributed()
    assert distributed.rank is distributed.process_index  # strategies may have the old name
    tensor, parameter = torch.tensor([1.0, 2.0]), nn.Parameter(torch.ones(1))
    assert distributed.total([tensor])[0] is tensor
    assert torch.equal(distributed.mean(tensor), tensor)
    assert distributed.from_first(tensor) is tensor
    assert distributed.everywhere("a") == ["a"]
    assert distributed.largest(4) == 4
    assert [*distributed.shared_out("abc")] == ["a", "b", "c"]
    distributed.average_gradients([parameter])
    assert parameter.grad is None
    distributed.assert_agreement(0, {"a": 1}, "nothing")
    distributed.leave()


def test_processes_that_disagree_are_named_with_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [{"a": [1], "b": [0, 1]}, {"a": [1], "b": [0, 2]}]
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "everywhere", lambda value: held)
    monkeypatch.setattr(processes, "sending_device", lambda: torch.device("cpu"))
    differing = SimpleNamespace(
        all_reduce=lambda tensor, op: tensor.add_(1), ReduceOp=torch.distributed.ReduceOp
    )
    monkeypatch.setattr(processes, "dist", differing)
    with pytest.raises(
        RuntimeError, match=r"at step 7: for b process 0 has \[0, 1\], process 1 has \[0, 2\]"
    ):
        distributed.assert_agreement(7, held[0], "the components to remove")
