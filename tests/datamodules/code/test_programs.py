from __future__ import annotations

import pytest

from lightning_peft.datamodules.code.programs import (
    MBPP_IDS,
    extract_code,
    humaneval_program,
    mbpp_program,
)


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("    return 1\n", "    return 1\n"),
        ("Here:\n```python\ndef f():\n    pass\n```\nDone.", "def f():\n    pass\n"),
        ("```Python\nx = 1\n```\n```python\ny = 2\n```", "x = 1\n"),
        ("```bash\npip install a\n```\n```\nx = 1\n```\n```py\ny = 2\n```", "y = 2\n"),
        ("```bash\npip install a\n```\n```\nx = 1\n```", "x = 1\n"),
        ("x = '''\n```json\n{}\n```\n'''", "x = '''\n```json\n{}\n```\n'''"),
        ("```python\nx = 1\ny = ", "x = 1\ny = "),
        ("x = 1\nif __name__ == '__main__':\n    f()\n", "x = 1\n"),
        ("x = 1\n# Example usage:\nprint(x)", "x = 1\n"),
        ("x = 1\nassert x == 1\ny = 2", "x = 1\n"),
        ("x = 1\nassert(x == 1)", "x = 1\n"),
        ("x = 1\nassertion = 2\n", "x = 1\nassertion = 2\n"),
        ("def f(x):\n    assert x\n    return x\n", "def f(x):\n    assert x\n    return x\n"),
        ("```python\nx = 1\n\n# Example usage\nf()\n```\nassert 1", "x = 1\n\n"),
        ("", ""),
    ],
)
def test_code_is_taken_out_of_a_generation(output: str, code: str) -> None:
    assert extract_code(output) == code


def test_the_lists_of_mbpp() -> None:
    assert (len(MBPP_IDS["mbpp"]), len(MBPP_IDS["mbpp_evalplus"])) == (500, 378)
    plus = sorted(MBPP_IDS["mbpp_evalplus"])
    assert (plus[:8], plus[-3:], sum(plus)) == ([2, 3, 4, 6, 7, 8, 9, 11], [807, 808, 809], 156254)
    assert {83, 115, 117, 143, 783}.isdisjoint(plus)  # of those that version 0.2.0 removed


def test_programs() -> None:
    tests = "def check(candidate):\n    assert candidate(3) == 1\n    assert candidate(8) == 4\n"
    body, whole = "    return x // 2\n", "def half(x):\n    return x // 2\n"
    stub = "import math\n\n\ndef half(x: int) -> int:\n    '''Round {down}.'''\n"
    problem = {"prompt": stub, "entry_point": "half", "test": tests}
    assert humaneval_program(body, problem) == f"{stub}{body}\n{tests}\ncheck(half)\n"
    assert humaneval_program(whole, problem) == f"{stub}\n{whole}\n{tests}\ncheck(half)\n"
    setup = {"test_setup_code": "root = Node(1)", "test_list": ["assert f(root)", "assert f(1)"]}
    assert mbpp_program("class Node: …", setup) == (
        "class Node: …\nroot = Node(1)\nassert f(root)\nassert f(1)\n"
    )
