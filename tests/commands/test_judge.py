"""The command judges a file and prints the means; a wrong option is one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_server import say

from lightning_peft.commands import judge as command


def test_command_prints_the_means(
    files: SimpleNamespace, serve: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = serve(say("?"))
    words = {
        "answers": files.answers,
        "data_dir": files.data_dir,
        "endpoint": f"{server.endpoint}/",
        "model": "1",
        "workers": 1,
        "output": tmp_path / "new" / "out.jsonl",
    }
    command.main([f"--{key}={value}" for key, value in words.items()])
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()[:-1]] == [
        ["turn", "1", "4.50"],
        ["turn", "2", "3.83"],
        ["both", "4.10"],
        ["writing", "6.50"],
        ["math", "1.50"],
        ["stem", "5.50"],
    ]
    assert out.splitlines()[-1] == f"1 of 6 in {words['output']} have no rating"
    assert "judging" in err
    assert {request["body"]["model"] for request in server.requests} == {"1"}
    assert server.requests[0]["path"] == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workers=x"], "workers: 'x' is no int."),
        (["--answer=a"], "answer is unknown; did you mean answers?"),
        (["--answers=a", "--data_dir=b", "--endpoint=c"], "arguments are required: model"),
    ],
)
def test_wrong_options_get_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        command.main(words)
    assert "\n" not in str(error.value)
