"""Serves a reward over HTTP: ``POST /rewards`` and, for align-anything's clients, ``/get_reward``.

    POST /rewards     {"requests": [{prompt | messages, media, response, reference, meta}]}
                      -> {"results": [{value, valid, parts, reason, detail}]}
    POST /get_reward  {"prompts": [...], "responses": [...]} -> {"rewards": [...]}, null if invalid
    GET  /health      -> {"reward": name, "answered": count}

It listens on a loopback address unless told otherwise, and then wants a token.
"""

from __future__ import annotations

import hmac
import json
import logging
import signal
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aa_jax.errors import AaJaxError, ConfigError, DataError
from aa_jax.rewards.base import Request, Reward, guard, name_of
from aa_jax.rewards.remote import is_loopback, token_from
from aa_jax.rewards.wire import request_from_json, result_to_json

log = logging.getLogger(__name__)


class RewardServer(ThreadingHTTPServer):
    """A reward behind a socket; one batch is judged at a time.

    Args:
      reward: see `aa_jax.rewards.base`.
      host: address to listen on.
      port: 0 takes a free one, see `url`.
      token: clients must send it; needed unless the address is a loopback one.
      most_bytes: longest request read.

    Raises:
      ConfigError: an open address without a token, or the port is taken.
    """

    daemon_threads = False  # closing waits for the answers under way

    def __init__(
        self,
        reward: Reward,
        *,
        host: str = "127.0.0.1",
        port: int = 8600,
        token: str | None = None,
        most_bytes: int = 256 << 20,
    ):
        if not is_loopback(host) and not token:
            raise ConfigError(
                f"host {host} can be reached from other machines: set token_env to an environment "
                "variable with a secret, or listen on 127.0.0.1."
            )
        self.reward, self.token, self.most_bytes = reward, token, most_bytes
        self.answered = 0
        self._one_at_a_time = threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}.") from error

    @property
    def url(self) -> str:
        """Where `HttpReward` finds it."""
        host, port = self.server_address[:2]
        return f"http://{host}:{port}/rewards"

    def judge(self, requests: list[Request]) -> list[Any]:
        """Checked results of a batch."""
        with self._one_at_a_time:
            found = guard(self.reward, requests)
            self.answered += len(found)
        return found


def serve(
    reward: Reward, *, host: str = "127.0.0.1", port: int = 8600, token_env: str | None = None
) -> None:
    """Serves until SIGTERM or SIGINT; what is being judged then is still answered.

    Args:
      reward: see `aa_jax.rewards.base`.
      host: address to listen on.
      port: 0 takes a free one.
      token_env: environment variable that holds the token clients must send.
    """
    token = token_from(token_env) if token_env else None
    with RewardServer(reward, host=host, port=port, token=token) as server:

        def leave(number: int, frame: Any) -> None:
            threading.Thread(target=server.shutdown).start()

        before = {n: signal.signal(n, leave) for n in (signal.SIGTERM, signal.SIGINT)}
        log.info("serving %s at %s", name_of(reward), server.url)
        try:
            server.serve_forever(poll_interval=0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    log.info("answered %d requests", server.answered)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 30  # seconds a client may stay silent in the middle of its request

    def do_GET(self) -> None:
        if self.path != "/health":
            self._say(404, {"error": "there are POST /rewards, POST /get_reward, GET /health"})
        elif self._known():
            server = self.server
            self._say(200, {"reward": name_of(server.reward), "answered": server.answered})

    def do_POST(self) -> None:
        answer = {"/rewards": _results, "/get_reward": _rewards}.get(self.path)
        if answer is None:
            self._say(404, {"error": "there are POST /rewards, POST /get_reward, GET /health"})
            return
        if not self._known():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self._say(411, {"error": "Content-Length is missing"})
        elif int(length) > self.server.most_bytes:
            self._say(
                413, {"error": f"more than {self.server.most_bytes} bytes: send fewer at once"}
            )
        else:
            self._answer(answer, self.rfile.read(int(length)))

    def _answer(self, answer: Any, body: bytes) -> None:
        try:
            question = json.loads(body)
            if not isinstance(question, Mapping):
                raise DataError("a question is a JSON mapping.")
            found = answer(self.server, question)
        except (ValueError, KeyError) as error:  # AaJaxError is a ValueError: our words, for them
            what = str(error) if isinstance(error, AaJaxError) else f"not understood: {error!r}"
            self._say(422 if isinstance(error, AaJaxError) else 400, {"error": what})
        except Exception as error:  # the next batch may be fine
            log.exception("a batch could not be judged")
            self._say(500, {"error": f"{type(error).__name__}: {error}"[:500]})
        else:
            self._say(200, found)

    def _known(self) -> bool:
        token = self.server.token
        said = self.headers.get("Authorization", "")
        if token is None or hmac.compare_digest(said.encode(), f"Bearer {token}".encode()):
            return True
        self._say(401, {"error": "the token is missing or wrong; set token_env on both sides"})
        return False

    def _say(self, code: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), format % args)


def _results(server: RewardServer, question: Mapping[str, Any]) -> dict[str, Any]:
    requests = [request_from_json(values) for values in question["requests"]]
    return {"results": [result_to_json(result) for result in server.judge(requests)]}


def _rewards(server: RewardServer, question: Mapping[str, Any]) -> dict[str, Any]:
    prompts, responses = question["prompts"], question["responses"]
    if len(prompts) != len(responses):
        raise DataError(f"{len(prompts)} prompts, but {len(responses)} responses.")
    golds = question.get("references") or [None] * len(prompts)
    requests = [
        Request(str(p), str(r), g) for p, r, g in zip(prompts, responses, golds, strict=True)
    ]
    found = server.judge(requests)
    return {"rewards": [result.value if result.valid else None for result in found]}
