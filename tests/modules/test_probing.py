"""What a strategy sees of the data before training, alone and among several processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.distributed import processes
from lightning_peft.modules.probing import Probe, Shares, prepare_strategy
from lightning_peft.strategies import AdapterStrategy, LoRA
from lightning_peft.testing import tiny_llama


class Fake:
    """What a probe needs of a module: loss 3 w over 4 targets a batch."""

    def __init__(self, data: Any = None) -> None:
        self.adapter, self.device = LoRA(), torch.device("cpu")
        self.model = nn.Linear(1, 1, bias=False)
        self.trainer = SimpleNamespace(datamodule=data)

    def transfer_batch_to_device(self, batch: Any, device: Any, index: int) -> Any:
        return batch

    def target_loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return 3 * self.model.weight.sum(), torch.tensor(4)


def test_each_process_has_every_second_batch_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    batches: Any = ["a", "b", "c"]
    for rank, expected in ((0, ["a", "c"]), (1, ["b", None])):
        monkeypatch.setattr(processes, "process_index", lambda rank=rank: rank)
        shares = Shares(batches)
        assert list(shares) == list(shares) == expected


def test_the_sample_is_the_data_modules() -> None:
    data = SimpleNamespace(probe_dataloader=lambda ratio: [ratio, 2 * ratio])
    assert list(Probe(Fake(data)).sample(0.25)) == [0.25, 0.5]
    for none in (None, SimpleNamespace()):
        with pytest.raises(ValueError, match=r"LoRA looks at a sample .* probe_dataloader\(ratio"):
            Probe(Fake(none)).sample(0.25)


def test_the_loss_is_the_mean_over_targets() -> None:
    module = Fake()
    loss = Probe(module).loss({})
    loss.backward()
    assert module.model.weight.grad.item() == 0.75  # type: ignore[union-attr]
    assert float(loss) == pytest.approx(0.75 * module.model.weight.item())


def test_a_process_without_a_batch_has_gradients_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    # The other process has four targets: two each on average, which all divide by.
    monkeypatch.setattr(processes, "mean", lambda count: (count + 4) / 2)
    module = Fake()
    loss = Probe(module).loss(None)
    loss.backward()
    assert float(loss) == module.model.weight.grad.item() == 0.0  # type: ignore[union-attr]


def test_a_strategy_is_given_the_run_as_it_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looks(AdapterStrategy):
        def prepare(self, *given: Any) -> None:
            self.given = given

    said: list[str] = []
    monkeypatch.setattr("lightning_peft.modules.probing.rank_zero_info", said.append)
    module: Any = Fake()
    module.adapter, module.model, module.make_optimizer = Looks(r=2), tiny_llama(), torch.optim.SGD
    module.adapter.attach(module.model)
    engine = SimpleNamespace(root_device=module.device)
    module.trainer = SimpleNamespace(strategy=engine, accumulate_grad_batches=3)
    moved: list[Any] = []
    module.to = moved.append
    prepare_strategy(module)
    model, _, loss, optimizer, accumulate = module.adapter.given
    assert (model, optimizer, accumulate) == (module.model, torch.optim.SGD, 3)
    assert callable(loss)
    assert (moved, said) == ([module.device], [])  # nothing changed, so nothing is said
