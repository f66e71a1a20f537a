"""``lightning-peft judge``: have a language model rate answers to MT-Bench.

Any endpoint of the OpenAI chat protocol serves. As in FastChat, a judge answers at temperature 0
and in at most 2048 tokens. Judgments are kept as they come, and none is asked for twice.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import queue
import random
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from lightning_peft.errors import UserError

ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d+)?(/[\w./~%:-]*)?", re.ASCII | re.I)
LONGEST_WAIT = 600.0  # seconds; what asks for more, such as the quota of a day, is down


def main(words: list[str]) -> None:
    """Judge the answers in a file and print the means.

    Args:
        words: The command's options.

    Raises:
        UserError: As `judge` does, and for options that it does not take.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="lightning-peft judge", description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_function_arguments(judge)
    try:
        options = parser.parse_args(words)
    except argparse.ArgumentError as error:
        from lightning_peft.settings.diagnosis import diagnose, shorten

        raise UserError(diagnose(parser, words, Path()) or shorten(str(error))) from error
    found = judge(**options.as_dict())
    turns = {name.replace("_", " "): found[name] for name in ("turn_1", "turn_2", "both")}
    for name, mean in {**turns, **found["categories"]}.items():
        print(f"{name:12}{'none' if mean is None else f'{mean:.2f}'}")
    print(f"{found['invalid']} of {found['judgments']} in {found['output']} have no rating")


def judge(
    answers: str | Path,
    data_dir: str | Path,
    endpoint: str,
    model: str,
    api_key_env: str | None = None,
    output: str | Path | None = None,
    max_retries: int = 5,
    requests_per_minute: float | None = None,
    workers: int = 4,
    timeout: float = 300.0,
) -> dict[str, Any]:
    """Have a model judge a file of answers.

    Args:
        answers: File of answers in FastChat's format, as a test on MT-Bench leaves it.
        data_dir: Folder with question.jsonl, judge_prompts.jsonl and reference_answer/, which holds
            one file, or one that is named after the judge.
        endpoint: Address that /chat/completions is added to, such as http://localhost:8000/v1.
        model: The judge, as the endpoint names it.
        api_key_env: Environment variable that holds the endpoint's key. None sends no key.
        output: File that judgments are appended to. None is X.judgments.jsonl beside X.jsonl.
        max_retries: How often a request is sent again after an error that may pass.
        requests_per_minute: Limit for all workers together. None is no limit.
        workers: Number of requests under way at a time.
        timeout: Seconds of the endpoint's silence that are an error.

    Returns:
        What `mt_bench.means` returns, and ``output``.

    Raises:
        MissingFile: If a file is missing.
        UserError: If an argument or a file is wrong.
        EndpointError: If the endpoint is down or refuses a request; what was judged is kept.
    """
    from lightning_peft.datamodules.conversation.mt_bench import judge_tasks, means

    least = {"max_retries": 0, "requests_per_minute": 0.01, "workers": 1, "timeout": 0.01}
    given = (max_retries, requests_per_minute, workers, timeout)
    for (name, low), value in zip(least.items(), given, strict=True):
        if value is not None and not value >= low:
            raise UserError(f"{name} is {value}; it has to be {low} or more.")
    if not ADDRESS.fullmatch(endpoint):
        shown = endpoint.rpartition("@")[2]  # no password
        raise UserError(f"endpoint {shown!r} is no address like http://localhost:8000/v1.")
    key = None if api_key_env is None else os.environ.get(api_key_env, "").strip()
    # Other characters cannot stand in a header, and the error about that would show the key.
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError(f"api_key_env: the environment variable {api_key_env!r} holds no key.")
    chat = Chat(endpoint, model, key, max_retries, requests_per_minute, timeout)
    file = Path(output or Path(answers).with_suffix(".judgments.jsonl"))
    tasks, judgments = judge_tasks(Path(data_dir), Path(answers), model), read_judgments(file)
    rest = [task for task in tasks if task["digest"] not in judgments]
    try:
        _judge(chat, rest, judgments, file, workers)
    except EndpointError as error:
        done = sum(task["digest"] in judgments for task in tasks)
        kept = f"{done} of {len(tasks)} judgments are in {file}; a further run adds the rest."
        raise EndpointError(f"{error} {kept}") from error
    return {**means(judgments[task["digest"]] for task in tasks), "output": str(file)}


def read_judgments(file: Path) -> dict[str, dict[str, Any]]:
    """Read judgments by digest: none without a file, nor from a last line that a kill cut off."""
    from lightning_peft.datamodules.conversation.mt_bench import read_lines

    judgments = {}
    for place, line in read_lines(file, partial=False) if file.exists() else ():
        if not {"category", "turn", "score", "digest"} <= line.keys():
            raise UserError(f"{place} is no judgment; name another file as output.")
        judgments[line["digest"]] = line
    return judgments


def _judge(
    chat: Chat, tasks: list[dict[str, Any]], judgments: dict[str, Any], file: Path, workers: int
) -> None:
    """Add judgments to the dictionary and the file as they come."""
    from rich import console, progress

    from lightning_peft.datamodules.conversation.mt_bench import rating

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as lines, ThreadPoolExecutor(workers) as pool:
        lines.seek(0)
        lines.truncate(lines.read().rfind(b"\n") + 1)  # half a line, if a kill left one
        futures = {pool.submit(chat.complete, task.pop("messages")): task for task in tasks}
        # In the order in which they come; as_completed mixes those that are there already.
        finished: queue.SimpleQueue[Future[str]] = queue.SimpleQueue()
        for future in futures:
            future.add_done_callback(finished.put)
        done = (future for _ in futures if (future := finished.get()).exception() is None)
        screen = console.Console(stderr=True)
        try:
            for future in progress.track(done, "judging", len(futures), console=screen):
                said = {"score": rating(future.result()), "judgment": future.result()}
                line = {**futures[future], **said, "tstamp": time.time()}
                lines.write(json.dumps(line).encode() + b"\n")
                lines.flush()
                judgments[line["digest"]] = line
        finally:
            chat.stopped.set()  # or an interrupt would wait for all that is submitted
    for future in futures:
        if not isinstance(future.exception(), Stopped | None):
            future.result()


class EndpointError(UserError):
    """The endpoint is down, or refuses a request."""


class Stopped(Exception):
    """Another request failed."""


class _Failed(Exception):
    """A try has failed: the reason, and after how many seconds another may do better."""


@dataclass
class Chat:
    """A model behind an endpoint, for several threads; when a request of one fails, all stop."""

    endpoint: str
    model: str
    key: str | None = field(repr=False)
    max_retries: int
    requests_per_minute: float | None
    timeout: float
    stopped: threading.Event = field(default_factory=threading.Event)
    _lock: Any = field(default_factory=threading.Lock)
    _slot: float = 0.0

    def complete(self, messages: list[dict[str, str]]) -> str:
        """Return what the model answers.

        Raises:
            EndpointError: If it is refused, or fails too often.
            Stopped: If another request failed.
        """
        asked = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 2048}
        retries = 0
        while True:
            self.sleep(self._until_slot())
            try:
                return self._post(json.dumps(asked).encode())
            except _Failed as error:
                reason, wait = error.args
                if retries == self.max_retries or wait > LONGEST_WAIT:
                    self.stopped.set()
                    raise EndpointError(f"{self.endpoint}: {reason}.") from error
                self.sleep(max(wait, min(60.0, 2.0**retries) * random.uniform(0.5, 1.0)))
            retries += 1

    def sleep(self, seconds: float) -> None:
        """Wait, unless another request has failed or does so meanwhile."""
        if self.stopped.wait(seconds):
            raise Stopped

    def _until_slot(self) -> float:
        with self._lock:
            now = time.monotonic()
            slot = max(now, self._slot)
            self._slot = slot + 60.0 / (self.requests_per_minute or math.inf)
        return slot - now

    def _post(self, body: bytes) -> str:
        # Some endpoints refuse the name that urllib gives itself.
        headers = {"Content-Type": "application/json", "User-Agent": "lightning-peft"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = Request(f"{self.endpoint.rstrip('/')}/chat/completions", body, headers)
        # Nothing here follows redirections, which would take the key to another host.
        opener = OpenerDirector()
        for handler in (ProxyHandler, HTTPHandler, HTTPSHandler):
            opener.add_handler(handler())
        try:
            with opener.open(request, timeout=self.timeout) as reply:
                status, wait, content = reply.status, reply.headers["Retry-After"], reply.read()
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise _Failed(str(getattr(error, "reason", error)), 0.0) from error
        if status != 200:
            passing = status in (408, 429) or status >= 500
            seconds = float(wait) if re.fullmatch(r"\d+", wait or "") else 0.0
            raise _Failed(f"HTTP {status} {self._said(content)}", seconds if passing else math.inf)
        try:
            return str(json.loads(content)["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError) as error:
            raise _Failed(f"no chat completion but {self._said(content)}", 0.0) from error

    def _said(self, content: bytes) -> str:
        """The message of an error's reply, or else all of it, in one line and without the key."""
        text = content.decode(errors="replace")
        with contextlib.suppress(ValueError, LookupError, TypeError):
            text = str(json.loads(content)["error"]["message"])
        return " ".join(text.replace(self.key or "\0", "***").split())[:300].rstrip(".")
