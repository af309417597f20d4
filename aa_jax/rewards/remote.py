"""A reward asked of a server over HTTP: batched, retried, and defined when nobody answers."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from aa_jax.errors import ConfigError
from aa_jax.rewards.base import Request, Result, RewardError
from aa_jax.rewards.wire import request_to_json, result_from_json

log = logging.getLogger(__name__)

_BUSY = (408, 425, 429)  # and 5xx: the server may answer later; other 4xx: it never will


class HttpReward:
    """Asks a reward server (`aa_jax.rewards.server`, or one with align-anything's protocol).

    ==========================  ===================================================================
    no connection, no answer    asked again `retries` times, after `backoff`, 2·`backoff`, … seconds
    in time, 5xx, 429           (or the server's Retry-After); then `when_down` decides
    other 4xx, nonsense         raised at once: the set-up is wrong, see the message
    ==========================  ===================================================================

    Args:
      url: e.g. "http://127.0.0.1:8600/rewards".
      batch_size: requests per call.
      workers: calls at a time.
      timeout: seconds a call may take.
      retries: further attempts after the first.
      backoff: seconds before the first of them; doubles, and varies by a quarter so that many
        clients do not come back at once.
      when_down: "mask" makes the samples invalid ("server down", counted and logged); "raise" ends
        the run.
      token_env: environment variable that holds the server's token.
      protocol: "results" (this library's) or "rewards" (align-anything's: {prompts, responses} →
        {rewards}, text only).

    Raises:
      ConfigError: an option out of range, a token that would travel readable, or a variable that
        is not set.
    """

    overlaps = True

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 64,
        workers: int = 4,
        timeout: int | float = 100.0,
        retries: int = 3,
        backoff: int | float = 1.0,
        when_down: str = "mask",
        token_env: str | None = None,
        protocol: str = "results",
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url is {url!r}; write http://host:port/rewards.")
        if when_down not in ("mask", "raise") or protocol not in ("results", "rewards"):
            raise ConfigError(
                f"when_down is {when_down!r} (mask or raise), protocol {protocol!r} (results or "
                "rewards)."
            )
        if batch_size < 1 or workers < 1 or timeout <= 0 or retries < 0 or backoff < 0:
            raise ConfigError(
                f"batch_size={batch_size}, workers={workers} and timeout={timeout} must be "
                f"positive, retries={retries} and backoff={backoff} not negative."
            )
        here = is_loopback(parts.hostname)
        self._headers = {"Content-Type": "application/json"}
        if token_env:
            if parts.scheme == "http" and not here:
                raise ConfigError(
                    f"the token would travel to {parts.hostname} readable by anyone between: use "
                    "https, or a tunnel to a loopback address."
                )
            self._headers["Authorization"] = f"Bearer {token_from(token_env)}"
        self.url, self.batch_size, self.timeout = url, batch_size, float(timeout)
        self.retries, self.backoff = retries, float(backoff)
        self.when_down, self.protocol = when_down, protocol
        handlers: list[Any] = [_NoRedirect()]
        if here:  # a proxy would look for the server on its own machine
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="http-reward")

    def __call__(self, requests: Sequence[Request]) -> list[Any]:
        some = [requests[i : i + self.batch_size] for i in range(0, len(requests), self.batch_size)]
        return [result for batch in self._threads.map(self._ask, some) for result in batch]

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _ask(self, requests: Sequence[Request]) -> list[Any]:
        if self.protocol == "results":
            question: dict[str, Any] = {"requests": [request_to_json(r) for r in requests]}
        else:
            question = {
                "prompts": [r.text for r in requests], "responses": [r.response for r in requests]
            }  # fmt: skip
        body = json.dumps(question).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._read(self._send(body), len(requests))
            except _Later as error:
                if attempt == self.retries:
                    return self._give_up(error, len(requests))
                pause = self.backoff * 2**attempt * random.uniform(0.75, 1.25)
                pause = min(max(pause, error.wait), 60.0)
                log.info("%s: %s; asking again in %.1f s", self.url, error, pause)
                time.sleep(pause)
        raise AssertionError

    def _send(self, body: bytes) -> bytes:
        asked = urllib.request.Request(self.url, body, self._headers, method="POST")
        try:
            with self._opener.open(asked, timeout=self.timeout) as reply:
                return reply.read()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode(errors="replace").strip()
            if error.code in _BUSY or error.code >= 500:
                raise _Later(f"HTTP {error.code} {said[:200]}", _seconds(error)) from None
            raise RewardError(f"{self.url} refuses with HTTP {error.code}: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise _Later(f"{type(reason).__name__}: {reason}") from None

    def _read(self, reply: bytes, count: int) -> list[Any]:
        try:
            values = json.loads(reply)[self.protocol]
            found = [result_from_json(value) for value in values]
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(
                f"{self.url} answers with something else than {{{self.protocol!r}: [...]}} "
                f"({type(error).__name__}: {error}): {reply[:200]!r}"
            ) from None
        if len(found) != count:
            raise RewardError(f"{self.url} gave {len(found)} rewards for {count} requests.")
        return found

    def _give_up(self, error: _Later, count: int) -> list[Result]:
        detail = f"{self.url} did not answer in {self.retries + 1} attempts, last: {error}"
        if self.when_down == "raise":
            raise RewardError(f"{detail}. Start the server and run the same command again.")
        return [Result.invalid("server down", detail)] * count


class _Later(Exception):
    """Worth another attempt, not before ``wait`` seconds."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token elsewhere; it is an error (3xx is not in `_BUSY`)."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _seconds(error: urllib.error.HTTPError) -> float:
    try:
        return float(error.headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0


def is_loopback(host: str) -> bool:
    """Whether an address stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_from(variable: str) -> str:
    """A token out of the environment, so that it stands in no config and no log.

    Raises:
      ConfigError: the variable is not set.
    """
    if not (token := os.environ.get(variable, "").strip()):
        raise ConfigError(
            f"token_env names the environment variable {variable}, which is not set: export "
            f"{variable}=... in the shell that starts this."
        )
    return token
