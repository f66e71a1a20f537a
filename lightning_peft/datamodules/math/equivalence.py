r"""Whether two answers of MATH are the same: by the published string rule, and by algebra.

`same_math` is the rule of MATH (arXiv 2103.03874; https://github.com/hendrycks/math,
``modeling/math_equivalence.py``) as MetaMath evaluates with it (arXiv 2309.12284;
https://github.com/meta-math/MetaMath, ``util.py``): both texts are normalised in a fixed order of
steps and compared as strings. Equal values in different forms (``0.25`` and ``\frac{1}{4}``) differ
by it. Where steps fail, as on two ``\text{ `` or a ``\sqrt`` at the end, the texts are compared as
they are. Both are kept, since published scores were taken so.

The two sources differ on one step, where ours is MetaMath's: a text with a single slash that does
not divide two integers (``x/2``) fails in MetaMath, so that ``x/2`` and ``x / 2`` differ; the
original leaves it alone. A later version of the original also removes a bare ``%``, and not only
``\%``; MetaMath and we do not.

`equivalent` asks the library `math-verify` (https://github.com/huggingface/Math-Verify) and is
reported beside the rule, not in its place.
"""

from __future__ import annotations

import functools
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from lightning_peft.errors import UserError

# In this order; units are removed between the two.
_BEFORE_UNITS = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_AFTER_UNITS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))
_DOLLAR = re.compile(r"(?<!\\)\$")


# The string rule ----------------------------------------------------------------------------------


def same_math(extracted: str, expected: str) -> bool:
    """Compare two answers by the string rule of MATH."""
    try:
        return normalized(extracted) == normalized(expected)
    except (IndexError, ValueError):
        return extracted == expected


def normalized(text: str) -> str:
    r"""Normalise an answer by the string rule of MATH.

    Raises:
        IndexError: After a ``\frac`` or ``\sqrt`` stands nothing.
        UserError: There are several units, or a single slash that does not divide integers.
    """
    text = _replace(text, _BEFORE_UNITS)
    text = _without_units(text)
    text = _replace(text, _AFTER_UNITS)
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # "k = 5"
        text = sides[1]
    text = _with_braced_roots(text).replace(" ", "")
    text = _with_braced_fractions(text)
    return "\\frac{1}{2}" if text == "0.5" else _slash_as_fraction(text)


def _replace(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def _without_units(text: str) -> str:
    r"""``5\text{ cm}`` -> ``5``: a text that begins with a space is a unit."""
    value, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise UserError("several units")
    return value


def _with_braced_roots(text: str) -> str:
    r"""``\sqrt3`` -> ``\sqrt{3}``."""
    head, *tails = text.split("\\sqrt")
    for tail in tails:
        head += "\\sqrt" + (tail if tail[0] == "{" else f"{{{tail[0]}}}{tail[1:]}")
    return head


def _with_braced_fractions(text: str) -> str:
    r"""``\frac12`` -> ``\frac{1}{2}``, ``\frac1{72}`` -> ``\frac{1}{72}``; not ``\frac{72}1``."""
    head, *tails = text.split("\\frac")
    for tail in tails:
        if tail[0] != "{":
            if len(tail) < 2:
                return text
            denominator = tail[1] if tail[1] == "{" else f"{{{tail[1]}}}"
            tail = f"{{{tail[0]}}}{denominator}{tail[2:]}"
        head += "\\frac" + tail
    return head


def _slash_as_fraction(text: str) -> str:
    r"""``1/2`` -> ``\frac{1}{2}``, for integers as Python writes them."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    numerator, denominator = map(int, parts)
    if text != f"{numerator}/{denominator}":
        return text
    return f"\\frac{{{numerator}}}{{{denominator}}}"


# Algebra ------------------------------------------------------------------------------------------


def require_math_verify() -> None:
    """Say what to install where `math-verify` is not: best before answers are generated."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Symbolic equivalence needs the library math-verify; "
            'install it by pip install "lightning-peft[math]".'
        ) from error


def equivalent(extracted: str, expected: str, seconds: int = 5) -> bool:
    r"""Compare two answers by algebra: ``\sqrt{12}`` and ``2\sqrt{3}`` are equivalent.

    The verdict is the library's, which is lenient where an answer is more than its value: it reads
    units, subscripts (``12_3`` as ``12_4``) and ``\%`` away, and the order of a list.

    It limits its time by SIGALRM, which only a main thread may set (an alarm that was pending there
    is lost). A call from another thread is therefore judged in a child process, started once and
    kept; as with every spawned process, a script has to guard its ``__main__`` then.

    Args:
        extracted: The answer to judge, LaTeX or plain text. What cannot be read, or not in time,
            is not equivalent.
        expected: The gold answer.
        seconds: Limit for each step; there are two of reading and up to four of comparing.
    """
    require_math_verify()
    if threading.current_thread() is threading.main_thread():
        return _verify(extracted, expected, seconds)
    return _judge().submit(_verify, extracted, expected, seconds).result()


def _verify(extracted: str, expected: str, seconds: int) -> bool:
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        target, gold = (parse(_as_latex(t), parsing_timeout=seconds) for t in (extracted, expected))
        return bool(verify(gold, target, timeout_seconds=seconds))  # its order matters
    except (Exception, TimeoutException):  # the latter is a BaseException
        return False


def _as_latex(text: str) -> str:
    """Wrap in dollars, without which the library reads numbers only."""
    return text if _DOLLAR.search(text) else f"${text}$"


@functools.cache
def _judge() -> ProcessPoolExecutor:
    # Spawned, since a forked child could inherit a lock that another thread holds.
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))
