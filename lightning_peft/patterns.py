"""Regular expressions that a user gives: matched as ``re`` does, in bounded time.

``re`` cannot be interrupted, and takes exponential time for some expressions, such as ``(a+)+$``.
The library ``regex`` takes a limit of time. Where the two read an expression differently (fuzzy
constraints, POSIX classes), it is rewritten so that ``regex`` reads what ``re`` does.
"""

from __future__ import annotations

import re
import time
import warnings
from typing import Any

import regex

from lightning_peft.errors import UserError

SECONDS = 2.0  # of matching, for one expression and all names together
_LONGEST = 100  # characters of an expression in an error
_REPEAT = re.compile(r"\{(\d*)(,?)(\d*)\}")


class Pattern:
    """A user's regular expression.

    Args:
        text: As given.
        key: Where it stands, for errors.
        around: What is matched, with ``{}`` in the place of the text.

    Raises:
        UserError: If it is no regular expression.
    """

    def __init__(self, text: str, key: str, around: str = "{}") -> None:
        self.text, self.key = text, key
        whole = around.replace("{}", text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sets that other languages nest
                re.compile(whole)
                self._compiled = regex.compile(as_regex_reads(whole))
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            # A position would be that in what stands around the text too.
            reason = getattr(error, "msg", reason)
            raise UserError(f"{key}: {self} is not a regular expression: {reason}.") from error
        self._left = SECONDS

    def __str__(self) -> str:
        """As shown in errors."""
        text = self.text
        return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + " …")

    def match(self, name: str) -> Any:
        """Match the begin of a name; a match, or None.

        Raises:
            UserError: If it takes too long.
        """
        return self._within("match", name)

    def fullmatch(self, name: str) -> Any:
        """Match a whole name; a match, or None.

        Raises:
            UserError: If it takes too long.
        """
        return self._within("fullmatch", name)

    def _within(self, how: str, name: str) -> Any:
        began = time.thread_time()
        try:
            return getattr(self._compiled, how)(name, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise UserError(
                f"{self.key}: the regular expression {self} takes longer than {SECONDS:g} s; a "
                "repetition of a repetition, as in (a+)+, does that, and a plain one would do."
            ) from None
        finally:
            self._left -= time.thread_time() - began


def as_regex_reads(text: str) -> str:
    """An expression of ``re``, so written that ``regex`` reads the same.

    Args:
        text: A valid expression of ``re``.
    """
    parts: list[str] = []
    place, in_set = 0, False
    while place < len(text):
        step = 1
        part = text[place]
        if part == "\\":
            step = 2
            if text.startswith(r"\N{", place):  # a character by its name
                step = text.index("}", place) - place + 1
            part = text[place : place + step]
        elif in_set:
            in_set = part != "]"
            part = r"\[" if part == "[" else part
        elif part == "[":
            # A bracket that comes first stands for itself.
            first = re.compile(r"\[\^?\]?").match(text, place)
            assert first is not None
            part, in_set = first.group(), True
            step = len(part)
        elif part == "{":
            repeat = _REPEAT.match(text, place)
            if repeat and (repeat[1] or repeat[2]):
                step = len(repeat.group())
                part = f"{{{repeat[1] or 0}{repeat[2]}{repeat[3]}}}"
            else:
                part = r"\{"
        parts.append(part)
        place += step
    return "".join(parts)
