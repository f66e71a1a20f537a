r"""Answers of mathematics: how they are found in a text, and how those that are numbers are judged.

Answers that are expressions are judged in `equivalence`. The rules are those of

* MetaMath (arXiv 2309.12284; https://github.com/meta-math/MetaMath, ``eval_gsm8k.py`` and
  ``eval_math.py``) for GSM8K and MATH: the answer follows the last ``The answer is: ``;
* MATH (arXiv 2103.03874; https://github.com/hendrycks/math, ``modeling/dataset/util.py``) for the
  box around a gold answer;
* LLM-Adapters (arXiv 2304.01933; https://github.com/AGI-Edgerunners/LLM-Adapters, ``evaluate.py``)
  for its arithmetic tasks and AQuA: the last number, or the first letter of a choice.

Kept although they misread, since published scores were taken so:

* MetaMath reads a number up to its second separator: ``1,200,000`` and ``1,200.75`` are 1200. The
  same number without separators is read whole, and so is every gold answer.
* Its rounding is Python's, a half to the even neighbour: ``2.5`` is 2.
* LLM-Adapters removes all commas, so that ``3,4`` is 34, and takes the first capital A to E
  wherever it stands: ``Both`` is B.

Deviations: fractions and decimals are rounded exactly, not as floats, and a zero denominator is
ignored however it is written. ``\fbox{5}`` and ``\boxed 5`` are boxes; MetaMath's evaluator finds
no gold answer in them, and every prediction wrong.
"""

from __future__ import annotations

import re
from fractions import Fraction

from lightning_peft.errors import UserError

MARKER = "The answer is: "
TOLERANCE = 0.001

# MetaMath writes ``[-+]?\d*[.,/]?\d+``, which takes the same texts, some in quadratic time.
_METAMATH_NUMBER = re.compile(r"[-+]?(?:\d+(?:[.,/]\d+)?|[.,/]\d+)")
_LLM_ADAPTERS_NUMBER = re.compile(r"-?\d+\.?\d*")


# Gold answers -------------------------------------------------------------------------------------


def gsm8k_gold(answer: str, place: str = "A GSM8K record") -> str:
    """Return what follows ``#### `` in a GSM8K answer, without commas; ``place`` names it."""
    _, found, gold = answer.rpartition("#### ")
    if not found:
        end = answer[-60:]
        raise UserError(
            f"{place} has an answer that does not end in '#### ' and a number, but in {end!r}."
        )
    return gold.replace(",", "").strip()


def boxed(solution: str) -> str | None:
    r"""Return the content of the last box in a MATH solution.

    Args:
        solution: Text with ``\boxed{...}`` or, where it has none, ``\fbox{...}``.

    Returns:
        What stands between the box's braces. After a box without braces, ``$\boxed 5$``, it is what
        stands before the next ``$``. None where there is no box, or its brace is never closed (an
        earlier box is not looked for).
    """
    for command in ("\\boxed", "\\fbox"):
        _, found, after = solution.rpartition(command)
        if found:
            break
    else:
        return None
    after = after.lstrip()
    if not after.startswith("{"):
        return after.partition("$")[0].strip() or None
    depth = 0
    for end, character in enumerate(after):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return after[1:end]
    return None


# MetaMath -----------------------------------------------------------------------------------------


def after_marker(output: str) -> str | None:
    """Return what follows the last ``The answer is: ``; None without one."""
    _, found, after = output.rpartition(MARKER)
    return after if found else None


def extract_gsm8k(output: str) -> str | None:
    """Return the first number after the last marker, as written: ``-3``, ``1,080``, ``7/2``."""
    found = _METAMATH_NUMBER.search(after_marker(output) or "")
    return found.group() if found else None


def same_integer(extracted: str, expected: str) -> bool:
    """Compare two numbers, fractions evaluated, after rounding."""
    number = _rounded(extracted)
    return number is not None and number == _rounded(expected)


def extract_math(output: str) -> str | None:
    """Return what follows the last marker up to a full stop that ends a line, or to the end."""
    after = after_marker(output)
    if after is None:
        return None
    return after.split(".\n")[0].strip().removesuffix(".").strip()


def _rounded(text: str) -> int | None:
    text = text.replace(",", "")
    if not _METAMATH_NUMBER.fullmatch(text):
        return None
    try:
        return round(Fraction(text))
    except ZeroDivisionError:
        return _rounded(text.partition("/")[0])
    except ValueError:  # a fraction without a numerator, or more digits than Python reads
        return None


# LLM-Adapters -------------------------------------------------------------------------------------


def last_number(output: str) -> str | None:
    """Return the last number of a text whose commas are removed."""
    found = _LLM_ADAPTERS_NUMBER.findall(output.replace(",", ""))
    return found[-1] if found else None


def same_number(extracted: str, expected: str) -> bool:
    """Compare two numbers within 0.001."""
    try:
        difference = float(extracted.replace(",", "")) - float(expected.replace(",", ""))
    except ValueError:
        return False
    return abs(difference) <= TOLERANCE


def first_choice(output: str) -> str | None:
    """Return the first capital letter from A to E, AQuA's choices."""
    found = re.search("[A-E]", output)
    return found.group() if found else None
