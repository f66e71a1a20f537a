"""Having a model rate the answers of a file; judgments are kept as they come, none asked twice.

The libraries behind MT-Bench are imported where something is judged, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from lightning_peft.atomic import hold
from lightning_peft.errors import UserError
from lightning_peft.judging.endpoint import ADDRESS, Chat, EndpointError, Stopped


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

    _check_counts(max_retries, requests_per_minute, workers, timeout)
    _check_address(endpoint)
    key = _key(api_key_env)
    chat = Chat(endpoint, model, key, max_retries, requests_per_minute, timeout)
    file = Path(output or Path(answers).with_suffix(".judgments.jsonl"))
    tasks = judge_tasks(Path(data_dir), Path(answers), model)
    with _held(file) as lines:
        judgments = read_judgments(file, lines)
        _ask_rest(chat, tasks, judgments, lines, file, workers)
    return {**means(judgments[task["digest"]] for task in tasks), "output": str(file)}


def _check_counts(
    max_retries: int, requests_per_minute: float | None, workers: int, timeout: float
) -> None:
    least = {"max_retries": 0, "requests_per_minute": 0.01, "workers": 1, "timeout": 0.01}
    given = (max_retries, requests_per_minute, workers, timeout)
    for (name, low), value in zip(least.items(), given, strict=True):
        if value is not None and not value >= low:
            raise UserError(f"{name} is {value}; it has to be {low} or more.")


def _check_address(endpoint: str) -> None:
    if not ADDRESS.fullmatch(endpoint):
        shown = endpoint.rpartition("@")[2]  # no password
        raise UserError(f"endpoint {shown!r} is no address like http://localhost:8000/v1.")


def _key(variable: str | None) -> str | None:
    """The endpoint's key from an environment variable, if one is named."""
    key = None if variable is None else os.environ.get(variable, "").strip()
    # Other characters cannot stand in a header, and the error about that would show the key.
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError(f"api_key_env: the environment variable {variable!r} holds no key.")
    return key


@contextlib.contextmanager
def _held(file: Path) -> Iterator[IO[bytes]]:
    """Open the file of judgments, which no other process may write meanwhile."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as lines:
            if not hold(lines):
                raise UserError(
                    f"output {file} is being written by another judge; wait for its end, or name "
                    "another file."
                )
            yield lines
    except OSError as error:
        raise UserError(
            f"output {file} cannot be written ({error.strerror or error}); name another file."
        ) from error


def read_judgments(file: Path, lines: IO[bytes]) -> dict[str, dict[str, Any]]:
    """Read judgments by digest; none from a last line that a kill cut off.

    Args:
        file: Names them in errors.
        lines: The open file. (To open and close it once more would let it go.)

    Raises:
        UserError: If it holds anything else.
    """
    from lightning_peft.datamodules.conversation.mt_bench import lines_in

    judgments = {}
    lines.seek(0)
    for place, line in lines_in(lines.read(), file, partial=False):
        if not {"category", "turn", "score", "digest"} <= line.keys():
            raise UserError(f"{place} is no judgment; name another file as output.")
        judgments[line["digest"]] = line
    return judgments


def _ask_rest(
    chat: Chat,
    tasks: list[dict[str, Any]],
    judgments: dict[str, Any],
    lines: IO[bytes],
    file: Path,
    workers: int,
) -> None:
    """Ask for the judgments that are not there yet."""
    rest = [task for task in tasks if task["digest"] not in judgments]
    try:
        _ask(chat, rest, judgments, lines, workers)
    except EndpointError as error:
        done = sum(task["digest"] in judgments for task in tasks)
        kept = f"{done} of {len(tasks)} judgments are in {file}; a further run adds the rest."
        raise EndpointError(f"{error} {kept}") from error


def _ask(
    chat: Chat,
    tasks: list[dict[str, Any]],
    judgments: dict[str, Any],
    lines: IO[bytes],
    workers: int,
) -> None:
    """Add judgments to the dictionary and the file as they come."""
    from rich import console, progress

    from lightning_peft.datamodules.conversation.mt_bench import rating

    with ThreadPoolExecutor(workers) as pool:
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
