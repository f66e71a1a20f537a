"""What a constructor refuses is said with the key of its class."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_peft.errors import UserError
from lightning_peft.settings.keys import (
    KEYS,
    name_refusals,
    refusals_by_class,
    refusals_of,
    sentence,
)
from lightning_peft.strategies import AdapterStrategy, LoRA


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("r must be\n  at least 1.", "data: r must be at least 1."),
        ("data.r is 0.", "data.r is 0."),
        ("data: wrong.", "data: wrong."),
        ("database is wrong.", "data: database is wrong."),
    ],
)
def test_a_sentence_begins_with_its_key_once(text: str, said: str) -> None:
    assert sentence(ValueError(text), "data") == said


@pytest.mark.parametrize("kind", [ValueError, UserError, MisconfigurationException])
def test_a_refusal_becomes_the_users_and_keeps_where_it_comes_from(kind: type[Exception]) -> None:
    error = kind("no")
    with pytest.raises(UserError, match=r"^trainer: no$") as caught, refusals_of("trainer"):
        raise error
    assert caught.value.__cause__ is error


def test_a_bug_stays_one() -> None:
    with pytest.raises(TypeError), refusals_of("trainer"):
        raise TypeError("a bug")


def make(cls: type, **arguments: Any) -> Any:
    return cls(**arguments)


def test_a_refusal_passes_through_what_catches_exceptions() -> None:
    """As jsonargparse does, to try the next type of a union."""
    made = name_refusals(make, AdapterStrategy)
    assert isinstance(made(LoRA, r=2), LoRA)

    @refusals_by_class()
    def make_one_of_a_union() -> None:
        with contextlib.suppress(Exception):
            made(LoRA, r=0)

    with pytest.raises(UserError, match=r"^model.adapter: r must be at least 1"):
        make_one_of_a_union()


def test_a_class_without_a_key_is_made_as_before() -> None:
    assert name_refusals(make, int) is make


def test_a_class_comes_before_its_bases() -> None:
    classes = list(KEYS)
    for i, cls in enumerate(classes):
        assert not any(issubclass(later, cls) for later in classes[i + 1 :])


@pytest.mark.parametrize("cls", [Logger, Precision, Profiler])
def test_a_package_that_is_not_there_is_said_with_the_key(cls: type) -> None:
    def missing(cls: type) -> Any:
        raise ModuleNotFoundError("No wandb. HINT: pip install wandb")

    made = name_refusals(missing, cls)
    with pytest.raises(UserError, match=r"^trainer.\w+: No wandb. HINT"), refusals_by_class():
        made(cls)


def test_a_bug_of_a_constructor_passes_as_it_is() -> None:
    """Else jsonargparse would say of every type of a union that it does not take the value."""
    bug = RuntimeError("a bug")

    def broken(cls: type) -> Any:
        raise bug

    made = name_refusals(broken, AdapterStrategy)

    @refusals_by_class()
    def make_one_of_a_union() -> None:
        with contextlib.suppress(Exception):
            made(LoRA)

    with pytest.raises(RuntimeError) as caught:
        make_one_of_a_union()
    assert caught.value is bug
