"""Sums since the last decision: means, sharing among processes, and resuming."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_peft import distributed
from lightning_peft.strategies.running_sums import RunningSums


def sums_of(*values: float, layer: str = "q") -> RunningSums:
    """Sums of 2 x 2 matrices that are equal to a value, each of two tokens."""
    sums = RunningSums(of_each=("C", "tokens"))
    for value in values:
        sums.add(layer, "C", torch.full((2, 2), value))
        sums.add(layer, "tokens", torch.tensor(2.0))
    return sums


@pytest.fixture
def processes(monkeypatch):
    """Makes this process one of several: ``processes(rank, count)``."""

    def be(rank: int, count: int) -> None:
        monkeypatch.setattr(distributed, "process_index", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: count)

    return be


def test_a_mean_is_the_sum_over_its_count() -> None:
    sums = sums_of(1.0, 5.0)
    assert torch.equal(sums["q"]["C"], torch.full((2, 2), 6.0))
    assert torch.equal(sums.mean("q", "C", "tokens"), torch.full((2, 2), 1.5))
    assert sums.mean("q", "H_B", "steps") is None
    assert sums.mean("k", "C", "tokens") is None


def test_a_value_that_is_added_is_not_changed_by_the_next() -> None:
    first, sums = torch.ones(2), RunningSums(of_each=())
    sums.add("q", "steps", first)
    sums.add("q", "steps", torch.ones(2))
    assert torch.equal(first, torch.ones(2))
    state = sums.state()
    sums.add("q", "steps", torch.ones(2))
    assert state["q"]["steps"].tolist() == [2, 2]


def test_processes_share_what_each_has_seen(monkeypatch) -> None:
    # q was seen here and there, k only there, v by nobody.
    here, there = sums_of(1.0), {"q": (10.0, 4.0), "k": (7.0, 2.0), "v": (0.0, 0.0)}
    here.add("q", "H_B", torch.ones(1))
    zeros = {name: {"C": torch.zeros(2, 2), "tokens": torch.zeros(())} for name in there}

    def total(tensors: list[Tensor]) -> list[Tensor]:
        other = [value for pair in there.values() for value in pair]
        return [t + value for t, value in zip(tensors, other, strict=True)]

    monkeypatch.setattr(distributed, "total", total)
    here.share(zeros, count="tokens")
    assert list(here) == ["q", "k"]
    assert torch.equal(here.mean("q", "C", "tokens"), torch.full((2, 2), 11 / 6))
    assert torch.equal(here.mean("k", "C", "tokens"), torch.full((2, 2), 3.5))
    assert here["q"]["H_B"] == 1  # equal on all, and not added up


def test_on_as_many_processes_each_goes_on_with_its_own(processes) -> None:
    states = [sums_of(1.0).state(), sums_of(4.0).state()]
    processes(1, 2)
    sums = RunningSums(of_each=("C", "tokens"))
    sums.restore(states)
    assert torch.equal(sums["q"]["C"], states[1]["q"]["C"])
    sums.add("q", "C", torch.ones(2, 2))
    assert torch.equal(states[1]["q"]["C"], torch.full((2, 2), 4.0))


def test_on_another_number_the_first_goes_on_with_those_of_all(processes) -> None:
    states = [sums_of(1.0).state(), sums_of(4.0).state(), sums_of(8.0, layer="k").state()]
    for state in states:
        state.setdefault("q", {})["steps"] = torch.tensor(3.0)  # the same on all
    sums = RunningSums(of_each=("C", "tokens"))
    processes(0, 2)
    sums.restore(states)
    assert torch.equal(sums["q"]["C"], torch.full((2, 2), 5.0))
    assert (sums["q"]["tokens"], sums["q"]["steps"], sums["k"]["tokens"]) == (4, 3, 2)
    processes(1, 2)
    sums.restore(states)
    assert sums == {"q": {"steps": torch.tensor(3.0)}}
