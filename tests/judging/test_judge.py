"""Judgments are asked for once each, kept as they come, and taken up where they stopped."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_server import (
    ALL,
    CONTENTS,
    KEY,
    MEANS,
    answer_lines,
    go_down,
    hang_up,
    judged,
    lines_of,
    rate,
    run,
    say,
    without_time,
    write,
)

from lightning_peft.datamodules.conversation.mt_bench import answer_line
from lightning_peft.errors import UserError
from lightning_peft.judging.endpoint import EndpointError
from lightning_peft.judging.judge import judge


def test_means_of_all_judgments(
    files: SimpleNamespace, serve: Any, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    assert run(files, server, api_key_env="JUDGE_KEY") == {**MEANS, "output": str(files.output)}
    assert server.asked() == ALL
    assert not slept
    names = ["single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn"]
    names += names[:2]
    for request, key, name in zip(server.requests, ALL, names, strict=True):
        assert request["path"] == "/v1/chat/completions"
        assert request["headers"]["Authorization"] == f"Bearer {KEY}"
        assert request["headers"]["Content-Type"] == "application/json"
        assert request["body"] == {
            "model": "the-judge",
            "messages": [
                {"role": "system", "content": f"You are {name}."},
                {"role": "user", "content": CONTENTS[key]},
            ],
            "temperature": 0,
            "max_tokens": 2048,
        }
    line = lines_of(files.output)[3]
    assert len(line.pop("digest")) == 64
    assert line.pop("tstamp") > 1e9
    assert line == {
        "question_id": 111,
        "category": "math",
        "model": "mine",
        "judge": "the-judge",
        "prompt": "single-math-v1-multi-turn",
        "turn": 2,
        "score": 1.0,
        "judgment": "Rating: [[1.0]]",
    }
    assert KEY not in files.output.read_text()


def test_no_key_is_sent_unless_it_is_named(
    files: SimpleNamespace, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve()
    run(files, server)
    assert all("Authorization" not in request["headers"] for request in server.requests)


def test_workers_judge_everything_once(files: SimpleNamespace, serve: Any) -> None:
    server = serve()
    assert run(files, server, workers=4) == {**MEANS, "output": str(files.output)}
    assert sorted(server.asked()) == ALL
    assert sorted(judged(files.output)) == ALL


def test_reply_without_rating_is_counted_and_final(files: SimpleNamespace, serve: Any) -> None:
    server = serve(say("I like it: 9 of 10."), say(None))
    found = run(files, server)
    assert (found["invalid"], found["judgments"]) == (2, 6)
    assert (found["turn_1"], found["turn_2"], found["both"]) == (4.5, 2.5, 3.5)
    assert found["categories"]["writing"] is None
    lines = without_time(files.output)  # several may be ready, and be written, at once
    assert [(line["score"], line["judgment"]) for line in lines[:2]] == [
        (None, "I like it: 9 of 10."),
        (None, ""),
    ]
    assert run(files, serve()) == found
    assert len(lines_of(files.output)) == 6


@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted_run_goes_on(
    files: SimpleNamespace, serve: Any, slept: list[float], workers: int, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    run(files, serve(), output=whole)
    server = serve(rate, rate, rate, go_down, *[hang_up] * 9)
    with pytest.raises(EndpointError, match=r" 3 of 6 judgments are in .*; a further run adds"):
        run(files, server, workers=workers, max_retries=2)
    kept = judged(files.output)
    assert len(kept) == 3
    again = serve()
    assert run(files, again, workers=workers) == {**MEANS, "output": str(files.output)}
    assert sorted(again.asked()) == sorted(set(ALL) - set(kept))
    assert without_time(files.output) == without_time(whole)
    assert run(files, serve()) == {**MEANS, "output": str(files.output)}


def test_half_a_line_is_dropped(files: SimpleNamespace, serve: Any) -> None:
    run(files, serve())
    whole = files.output.read_text()
    files.output.write_text(whole[:-20])
    server = serve()
    assert run(files, server)["both"] == MEANS["both"]
    assert server.asked() == ALL[-1:]
    assert files.output.read_text().splitlines()[:5] == whole.splitlines()[:5]
    assert judged(files.output) == ALL


def test_other_answers_and_judges_are_judged(files: SimpleNamespace, serve: Any) -> None:
    """A new second answer needs its turn judged, and the old judgment has no part in the means."""
    run(files, serve())
    lines = answer_lines("A", "mine", "!")
    lines[0] = answer_line(81, "mine", ["A81.1!", "new"])
    write(files.answers, lines)
    server = serve(say("[[10]]"))
    found = run(files, server)
    assert len(server.requests) == 1
    assert (found["judgments"], found["categories"]["writing"]) == (6, 9.5)
    assert len(lines_of(files.output)) == 7
    write(files.answers, answer_lines("A", "mine", "!"))
    unused = serve()
    assert run(files, unused)["both"] == MEANS["both"]
    assert not unused.requests
    other = serve()
    assert run(files, other, model="other")["both"] == MEANS["both"]
    assert other.asked() == ALL


def test_foreign_file_is_left_alone(files: SimpleNamespace, serve: Any) -> None:
    server = serve()
    before = files.answers.read_text() + "no line break"
    files.output.write_text(before)
    with pytest.raises(ValueError, match=r"judgments.jsonl, line 1 is no judgment; name another"):
        run(files, server)
    assert files.output.read_text() == before
    assert not server.requests


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"workers": 0}, "workers is 0; it has to be 1 or more."),
        ({"max_retries": -1}, "max_retries is -1; it has to be 0 or more."),
        ({"timeout": 0.0}, "timeout is 0.0; it has to be 0.01 or more."),
        (
            {"requests_per_minute": 0.0},
            "requests_per_minute is 0.0; it has to be 0.01 or more.",
        ),
        ({"api_key_env": "NO_SUCH_KEY"}, "variable 'NO_SUCH_KEY' holds no key."),
        ({"api_key_env": "BAD_KEY"}, "variable 'BAD_KEY' holds no key."),
        ({"endpoint": "localhost:8000/v1"}, "endpoint 'localhost:8000/v1' is no address like"),
        ({"endpoint": "file:///etc"}, "endpoint 'file:///etc' is no address like"),
        ({"endpoint": "http://me:word@host/v1"}, "endpoint 'host/v1' is no address like"),
    ],
)
def test_wrong_arguments_get_one_sentence(
    files: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.setenv("BAD_KEY", f"{KEY}\nX: y")
    given = {"endpoint": "http://127.0.0.1:1", "model": "m", **arguments}
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        judge(files.answers, files.data_dir, **given)
    assert KEY not in str(error.value)
    assert "word" not in str(error.value)
    assert not files.output.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="not a POSIX system")
def test_a_second_judge_of_one_file_is_refused(files: SimpleNamespace, serve: Any) -> None:
    run(files, serve())
    before = files.output.read_bytes()
    program = (
        "import sys; from lightning_peft.atomic import hold\n"
        f"file = open({str(files.output)!r}, 'ab+'); print(hold(file), flush=True)\n"
        "sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)  # type: ignore[call-overload]
    assert other.stdout.readline() == "True\n"
    server = serve()
    sentence = f"output {files.output} is being written by another judge; wait for its end, or name"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)} another file.$"):
        run(files, server, model="other")
    assert files.output.read_bytes() == before
    assert not server.requests
    other.communicate()
    assert run(files, server, model="other")["both"] == MEANS["both"]


def test_what_a_judge_writes_is_held_to_the_end(
    files: SimpleNamespace, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is opened once: to close it a second time would let it go."""
    seen: list[str] = []
    opened = Path.open

    def watch(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        seen.extend([mode] * (self == files.output))
        return opened(self, mode, *args, **kwargs)

    run(files, serve())
    monkeypatch.setattr(Path, "open", watch)
    assert run(files, serve()) == {**MEANS, "output": str(files.output)}
    assert seen == ["ab+"]


def test_a_file_that_cannot_be_written_is_named(
    files: SimpleNamespace, serve: Any, tmp_path: Path
) -> None:
    for output, reason in (
        (tmp_path, "Is a directory"),
        (files.answers / "a.jsonl", "Not a directory|File exists"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        server = serve()
        sentence = (
            rf"^output {re.escape(str(output))} cannot be written \(({reason})\); name another"
        )
        with pytest.raises(UserError, match=sentence):
            run(files, server, output=output)
        assert not server.requests
