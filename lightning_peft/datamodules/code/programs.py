"""How a solution is taken out of a generation, and the programs it is judged by with its tests.

* HumanEval (arXiv 2107.03374; https://github.com/openai/human-eval, ``execution.py``): the prompt
  ends in the open body of a function, which a completion goes on with; the program is both, the
  tests, and a call of ``check``. A solution that repeats the function's header, as an instructed
  model's does, stands after the prompt instead, which by itself is a whole program: its imports and
  helpers stay, and its function is defined anew.
* MBPP (arXiv 2108.07732): the solution, ``test_setup_code``, and the three assertions.

EvalPlus (https://github.com/evalplus/evalplus) keeps 378 of MBPP's problems in version 0.2.0 of
MBPP+: 399 that its authors had verified (of all 974, not only of the test split) less 21 whose
tests are wrong, which ``tools/mbpp/fix_v011.py`` names. Here they are judged by MBPP's own three
tests; EvalPlus's base tests are these with some corrections, and its further inputs are not used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FENCED = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
ORDER = {"python": 0, "python3": 0, "py": 0, "": 1}  # of a block's mark; others are no solution
AFTER_SOLUTION = re.compile(r"^(?:if __name__|# Example usage|assert\b)", re.MULTILINE)

_EVALPLUS = """
2-4 6-9 11-12 14 16-20 56-59 61-72 74-75 77 79-80 82 84-106 108-109 111 113 116 118-120 123-133
135 137-142 145 160-162 165-168 170-172 222-224 226-227 230 232-235 237-240 242 244-245 247
250-253 255-257 259-262 264-274 276-287 290 292-294 296-297 299-301 305-306 308-312 388-392
394-395 397-398 404-406 409-410 412-415 418-422 424-430 432-433 435-437 439-441 445-448 450-451
453-460 462-463 465 468 470-479 554-560 562-569 572-573 576-581 583 585-594 596-600 602-608
610-612 614-616 618-620 622-624 626 628-633 635 637-639 641 643-644 720-726 728 730-737 739-745
748-755 757-760 762-767 769-773 775 777-778 780-782 784-788 790-794 796-801 803-809
"""


def _numbers(ranges: str) -> frozenset[int]:
    bounds = (part.partition("-") for part in ranges.split())
    return frozenset(n for a, _, b in bounds for n in range(int(a), int(b or a) + 1))


# MBPP's task ids by test set: its test split, and EvalPlus's choice.
MBPP_IDS = {"mbpp": frozenset(range(11, 511)), "mbpp_evalplus": _numbers(_EVALPLUS)}


def extract_code(output: str) -> str:
    """Take the solution out of a generation.

    That is the first fenced block marked as Python, else the first that bears no mark, else all of
    it; a block that was never closed goes to the end. It is cut before the first line that begins
    with ``if __name__``, ``# Example usage`` or ``assert``: indented ones belong to a function.
    """
    blocks = [(ORDER.get(mark.strip().lower(), 2), text) for mark, text in FENCED.findall(output)]
    order, code = min(blocks, key=lambda block: block[0], default=(2, output))
    code = code if order < 2 else output
    cut = AFTER_SOLUTION.search(code)
    return code[: cut.start()] if cut else code


def humaneval_program(code: str, problem: Mapping[str, Any]) -> str:
    """Write the program that ends well where a solution is right.

    Args:
        code: What the model wrote, extracted: the whole function, or only its body.
        problem: With ``prompt``, ``entry_point`` and ``test``.
    """
    prompt, name = problem["prompt"], problem["entry_point"]
    if re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE):
        solution = f"{prompt}\n{code}"
    else:
        solution = f"{prompt}{_body(code)}"
    return f"{solution}\n{problem['test']}\ncheck({name})\n"


def mbpp_program(code: str, problem: Mapping[str, Any]) -> str:
    """Write the program of a solution, its setup (which uses its classes) and its assertions."""
    return "\n".join([code, problem.get("test_setup_code") or "", *problem["test_list"], ""])


def mbpp_prompt(problem: Mapping[str, Any]) -> str:
    """Write a problem as EvalPlus does: a docstring of its text and the first assertion."""
    return f'"""\n{problem["text"].strip()}\n{problem["test_list"][0]}\n"""\n'


def _body(code: str) -> str:
    """Take a function's body: up to the first line that is not indented."""
    first, *rest = code.lstrip("\r\n").split("\n")
    # Decoding may lose leading spaces of the first line.
    if not first.startswith(("    ", "\t")):
        first = f"    {first.lstrip()}"
    lines = [first]
    for line in rest:
        if line.strip() and not line[0].isspace():
            break
        lines.append(line)
    return "\n".join(lines)
