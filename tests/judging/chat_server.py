"""A server on the loopback that speaks the chat protocol, well or badly, and what to judge."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_peft.datamodules.conversation.mt_bench import answer_line
from lightning_peft.judging.endpoint import Chat, Stopped
from lightning_peft.judging.judge import judge

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
            raise Stopped

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
