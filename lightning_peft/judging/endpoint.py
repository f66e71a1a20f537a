"""A model behind an endpoint of the OpenAI chat protocol, asked by several threads."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import random
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from lightning_peft.errors import UserError

ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d+)?(/[\w./~%:-]*)?", re.ASCII | re.I)
LONGEST_WAIT = 600.0  # seconds; what asks for more, such as the quota of a day, is down


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
