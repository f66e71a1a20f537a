"""What a user can get wrong in a data module's arguments, each told in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning_peft.assets import resolve_model
from lightning_peft.datamodules.loading.fields import first_line
from lightning_peft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or say in one sentence that there is none.

    It may be given by all names that ``model.model_name_or_path`` takes.

    Code that lies beside a tokenizer is never run, nor is anybody asked whether it may be.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any type, where a file of it is broken
        found = first_line(error)
        if not isinstance(error, OSError | ValueError):
            found = f"{type(error).__name__}: {found}"
        if "custom code" in found:
            raise UserError(
                f"data.tokenizer {name_or_path!r} has a class of its own (auto_map in its "
                "tokenizer_config.json), and code that comes with a tokenizer is never run here; "
                "take one of a class that transformers has."
            ) from error
        raise UserError(
            f"data.tokenizer {name_or_path!r} could not be loaded ({found}); "
            "give a folder with a tokenizer or a name on the hub."
        ) from error


def at_least(least: int, key: str, value: int) -> int:
    """Return a count, or refuse it where it is too small."""
    if value < least:
        raise UserError(f"data.{key} is {value}; it has to be {least} or more.")
    return value


def known(key: str, value: str, names: Iterable[str]) -> str:
    """Return a name, or refuse it where it is none of the known ones."""
    names = list(names)
    if value not in names:
        near = difflib.get_close_matches(value, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}."
        raise UserError(f"data.{key} {value!r} is unknown; {hint}")
    return value
