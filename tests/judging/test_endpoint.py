"""A request that fails is sent again where that may help, and ends in one sentence elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from chat_server import ALL, KEY, MEANS, Action, fail, garble, hang, hang_up, judged, rate, run, say

from lightning_peft.judging import endpoint
from lightning_peft.judging.endpoint import Chat, EndpointError


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


def test_one_failure_stops_the_other_workers(files: SimpleNamespace, serve: Any) -> None:
    """One that waits for half a minute leaves at once."""
    server = serve(fail(503, Retry_After="500"), fail(401))
    with pytest.raises(EndpointError, match="HTTP 401"):
        run(files, server, workers=2)
    assert len(server.requests) == 2


def test_rate_is_that_of_all_workers(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go out 20 seconds apart, also the one that repeats another."""
    clock = SimpleNamespace(time=100.0, waited=[])

    def sleep(self: Chat, seconds: float) -> None:
        clock.waited.append(seconds)
        clock.time += seconds

    monkeypatch.setattr(endpoint, "time", SimpleNamespace(monotonic=lambda: clock.time))
    monkeypatch.setattr(endpoint.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(Chat, "sleep", sleep)
    server = serve(say("a"), fail(500), say("b"), say("c"))
    chat = Chat(server.endpoint, "m", None, 5, requests_per_minute=3.0, timeout=60.0)
    assert [chat.complete([{}]) for _ in range(2)] == ["a", "b"]
    assert clock.waited == [0.0, 20.0, 1.0, 19.0]
    clock.time += 50.0
    assert chat.complete([{}]) == "c"
    assert clock.waited[4:] == [0.0]
