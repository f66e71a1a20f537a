"""Judging against a server on the loopback that speaks the chat protocol, well or badly."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_peft.commands import judge as command
from lightning_peft.commands.judge import Chat, EndpointError, judge
from lightning_peft.datamodules.conversation.mt_bench import answer_line

KEY = "sk-very-secret"
TEMPLATES = {
    "single-v1": "Rate: {question} {answer}",
    "single-v1-multi-turn": "Rate: {question_1} {answer_1} {question_2} {answer_2}",
    "single-math-v1": "Check: {question} {ref_answer_1} {answer}",
    "single-math-v1-multi-turn": "Check: {question_1} {ref_answer_1} {answer_1} "
    "{question_2} {ref_answer_2} {answer_2}",
}
CATEGORIES = {81: "writing", 111: "math", 141: "stem"}
RATINGS = {(81, 1): 9.0, (81, 2): 6.5, (111, 1): 2.0, (111, 2): 1.0, (141, 1): 7.0, (141, 2): 4.0}
ALL = list(RATINGS)
CONTENTS = {  # of the user's message, by the templates above
    (81, 1): "Rate: Q81.1? A81.1!",
    (81, 2): "Rate: Q81.1? A81.1! Q81.2? A81.2!",
    (111, 1): "Check: Q111.1? R111.1 A111.1!",
    (111, 2): "Check: Q111.1? R111.1 A111.1! Q111.2? R111.2 A111.2!",
    (141, 1): "Rate: Q141.1? A141.1!",
    (141, 2): "Rate: Q141.1? A141.1! Q141.2? A141.2!",
}
Action = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Follows the script of its server, one action for each request, and then rates."""

    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            request = {"path": self.path, "headers": dict(self.headers), "body": body}
            self.server.requests.append(request)
            action = self.server.script.pop(0) if self.server.script else rate
        self.body = body
        action(self)

    def reply(self, status: int, content: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: list[Action]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests = script, []  # type: ignore[var-annotated]
        self.lock, self.released = threading.Lock(), threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def asked(self) -> list[tuple[int, int]]:
        """Questions and turns in the order in which they were asked for."""
        return [asked_by(request["body"]) for request in self.requests]

    def handle_error(self, *args: Any) -> None:
        pass

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


def asked_by(body: dict[str, Any]) -> tuple[int, int]:
    return next(key for key in ALL if CONTENTS[key] == body["messages"][-1]["content"])


# What a server may do.


def say(text: str | None) -> Action:
    reply = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
    return lambda handler: handler.reply(200, json.dumps(reply))


def rate(handler: Handler) -> None:
    say(f"Rating: [[{RATINGS[asked_by(handler.body)]}]]")(handler)


def fail(status: int, message: str = "no", **headers: str) -> Action:
    content = json.dumps({"error": {"message": message}})
    return lambda handler: handler.reply(status, content, **headers)


def garble(handler: Handler) -> None:
    handler.reply(200, "<html>Bad\ngateway</html>")


def hang(handler: Handler) -> None:
    handler.server.released.wait()
    handler.close_connection = True


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def go_down(handler: Handler) -> None:
    """Ends the whole server in the middle of a request."""
    handler.close_connection = True
    handler.server.close()


# Fixtures.


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeServer]]:
    """Starts a server with a script."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[FakeServer] = []

    def start(*script: Action) -> FakeServer:
        servers.append(FakeServer(list(script)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody sleeps; this is for how long they would have."""
    seconds: list[float] = []

    def sleep(self: Chat, duration: float) -> None:
        if duration:
            seconds.append(duration)
        if self.stopped.is_set():
            raise command.Stopped

    monkeypatch.setattr(Chat, "sleep", sleep)
    return seconds


def write(path: Path, lines: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def answer_lines(letter: str, name: str, ends: str) -> list[dict[str, Any]]:
    return [
        answer_line(i, name, [f"{letter}{i}.1{ends}", f"{letter}{i}.2{ends}"]) for i in CATEGORIES
    ]


@pytest.fixture
def files(tmp_path: Path) -> SimpleNamespace:
    """Three questions of two turns, in the layout of FastChat, and answers to them."""
    data_dir = tmp_path / "mt_bench"
    questions = [
        {"question_id": i, "category": category, "turns": [f"Q{i}.1?", f"Q{i}.2?"]}
        for i, category in CATEGORIES.items()
    ]
    prompts = [
        {"name": name, "system_prompt": f"You are {name}.", "prompt_template": template}
        for name, template in TEMPLATES.items()
    ]
    write(data_dir / "question.jsonl", questions)
    write(data_dir / "judge_prompts.jsonl", prompts)
    write(data_dir / "reference_answer" / "gpt-4.jsonl", answer_lines("R", "gpt-4", ""))
    write(tmp_path / "answers.jsonl", answer_lines("A", "mine", "!"))
    output = tmp_path / "answers.judgments.jsonl"
    return SimpleNamespace(answers=tmp_path / "answers.jsonl", data_dir=data_dir, output=output)


def run(files: SimpleNamespace, server: FakeServer, **arguments: Any) -> dict[str, Any]:
    given = {"model": "the-judge", "workers": 1, **arguments}
    return judge(files.answers, files.data_dir, server.endpoint, **given)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def judged(path: Path) -> list[tuple[int, int]]:
    return [(line["question_id"], line["turn"]) for line in lines_of(path)]


def without_time(path: Path) -> list[dict[str, Any]]:
    """Lines in the order of the questions, but for when they were written."""
    lines = sorted(lines_of(path), key=lambda line: (line["question_id"], line["turn"]))
    return [{key: line[key] for key in line if key != "tstamp"} for line in lines]


MEANS = {  # by hand: 18 / 3, 11.5 / 3, 29.5 / 6
    "turn_1": 6.0,
    "turn_2": pytest.approx(3.8333333333333335),
    "both": pytest.approx(4.916666666666667),
    "categories": {"writing": 7.75, "math": 1.5, "stem": 5.5},
    "judgments": 6,
    "invalid": 0,
}


# What is asked and what comes out.


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


# Errors that pass.


def test_retry_after_is_waited_for(files: SimpleNamespace, serve: Any, slept: list[float]) -> None:
    server = serve(rate, fail(429, Retry_After="7"))
    assert run(files, server)["both"] == MEANS["both"]
    assert slept == [7.0]
    assert server.asked() == [ALL[0], ALL[1], *ALL[1:]]
    assert judged(files.output) == ALL


def test_back_off_doubles_with_jitter(
    files: SimpleNamespace, serve: Any, slept: list[float]
) -> None:
    """What a Retry-After says in another way than seconds is no reason to wait less."""
    server = serve(fail(500), fail(503, Retry_After="soon"), fail(408), fail(429, Retry_After="0"))
    assert run(files, server)["both"] == MEANS["both"]
    assert len(slept) == 4
    assert all(2**i / 2 <= seconds <= 2**i for i, seconds in enumerate(slept))
    assert len(server.requests) == 10


@pytest.mark.parametrize("action", [garble, hang_up, fail(200), fail(529)])
def test_broken_replies_are_asked_for_again(
    files: SimpleNamespace, serve: Any, slept: list[float], action: Action
) -> None:
    server = serve(action)
    assert run(files, server) == {**MEANS, "output": str(files.output)}
    assert len(slept) == 1
    assert server.asked() == [ALL[0], *ALL]


def test_silence_is_an_error(files: SimpleNamespace, serve: Any, slept: list[float]) -> None:
    """A server that is slow by itself is asked again too, so only the result is certain."""
    server = serve(hang)
    assert run(files, server, timeout=0.3, max_retries=50)["both"] == MEANS["both"]
    assert slept
    assert server.asked()[:2] == [ALL[0], ALL[0]]
    assert judged(files.output) == ALL


# Errors that do not pass.


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404])
def test_refusal_ends_in_one_sentence(
    files: SimpleNamespace,
    serve: Any,
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    """With the server's message, but without the key, even if that is part of it."""
    other = serve()
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(rate, fail(status, f"Not\nwith {KEY}.", Location=other.endpoint))
    with pytest.raises(EndpointError) as error:
        run(files, server, api_key_env="JUDGE_KEY")
    assert str(error.value) == (
        f"{server.endpoint}: HTTP {status} Not with ***. "
        f"1 of 6 judgments are in {files.output}; a further run adds the rest."
    )
    assert len(server.requests) == 2
    assert not other.requests
    assert not slept
    assert judged(files.output) == ALL[:1]


def test_errors_that_stay_end_too(files: SimpleNamespace, serve: Any, slept: list[float]) -> None:
    server = serve(rate, rate, *[garble] * 3)
    with pytest.raises(
        EndpointError, match="no chat completion but <html>Bad gateway</html>. 2 of"
    ):
        run(files, server, max_retries=2)
    assert len(slept) == 2
    assert server.asked() == [*ALL[:2], *[ALL[2]] * 3]


def test_quota_of_a_day_is_not_waited_for(
    files: SimpleNamespace, serve: Any, slept: list[float]
) -> None:
    server = serve(fail(429, "come back tomorrow", Retry_After="86400"))
    with pytest.raises(EndpointError, match=r"HTTP 429 come back tomorrow. 0 of 6 judgments"):
        run(files, server)
    assert not slept


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


def test_one_failure_stops_the_other_workers(files: SimpleNamespace, serve: Any) -> None:
    """One that waits for half a minute leaves at once."""
    server = serve(fail(503, Retry_After="500"), fail(401))
    with pytest.raises(EndpointError, match="HTTP 401"):
        run(files, server, workers=2)
    assert len(server.requests) == 2


# What is judged already.


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


# The limit of the rate, and the command.


def test_rate_is_that_of_all_workers(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go out 20 seconds apart, also the one that repeats another."""
    clock = SimpleNamespace(time=100.0, waited=[])

    def sleep(self: Chat, seconds: float) -> None:
        clock.waited.append(seconds)
        clock.time += seconds

    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: clock.time))
    monkeypatch.setattr(command.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(Chat, "sleep", sleep)
    server = serve(say("a"), fail(500), say("b"), say("c"))
    chat = Chat(server.endpoint, "m", None, 5, requests_per_minute=3.0, timeout=60.0)
    assert [chat.complete([{}]) for _ in range(2)] == ["a", "b"]
    assert clock.waited == [0.0, 20.0, 1.0, 19.0]
    clock.time += 50.0
    assert chat.complete([{}]) == "c"
    assert clock.waited[4:] == [0.0]


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
