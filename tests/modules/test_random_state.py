"""Random streams go on where they were, and differ between processes."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_peft.modules.random_state import (
    get_random_state,
    offset_random_state,
    set_random_state,
)


def draws() -> list[Any]:
    return [
        torch.rand(3).tolist(),
        [random.random(), random.gauss(0, 1)],
        np.random.rand(3).tolist(),
    ]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def test_all_streams_go_on_from_a_state_that_was_saved() -> None:
    draws()
    file = io.BytesIO()
    torch.save(get_random_state(), file)
    expected = draws()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert draws() == expected


def test_each_process_takes_its_own_state() -> None:
    states = [get_random_state()]
    first = draws()
    states.append(get_random_state())
    second = draws()
    set_random_state(states, 0)
    assert draws() == first
    set_random_state(states, 1)
    assert draws() == second


def test_a_process_that_was_not_there_goes_on_from_the_firsts_offset() -> None:
    states = [get_random_state()]
    found = []
    for rank in (0, 1, 2, 1):
        set_random_state(states, rank)
        found.append(draws())
    assert found[1] == found[3]
    assert all(a != b for a, b in zip(found[0], found[1], strict=True))
    assert all(a != b for a, b in zip(found[1], found[2], strict=True))


def test_the_first_process_goes_on_as_if_alone() -> None:
    state = get_random_state()
    expected = draws()
    set_random_state(state)
    offset_random_state(0)
    assert draws() == expected
