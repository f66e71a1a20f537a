"""What a user got wrong is told by its class, and is a ValueError still."""

from __future__ import annotations

from lightning_peft.errors import MissingFile, UserError


def test_a_users_mistake_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)
    assert str(UserError("a is wrong.")) == "a is wrong."


def test_a_missing_file_is_both_and_says_its_sentence_alone() -> None:
    error = MissingFile("x does not exist.")
    assert isinstance(error, UserError)
    assert isinstance(error, FileNotFoundError)
    assert str(error) == "x does not exist."
