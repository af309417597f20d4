"""Reward servers as real processes behind real sockets, and clients whose server fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aa_jax.data.example import Example, Media, Part, message
from aa_jax.errors import ConfigError
from aa_jax.rewards.base import Request, Result, RewardError, evaluate
from aa_jax.rewards.remote import HttpReward, is_loopback
from aa_jax.rewards.server import RewardServer
from aa_jax.rewards.wire import request_from_json, request_to_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def serve():
    """`serve(reward, **options)` -> a running `RewardServer` of this process."""
    running = []

    def start(reward, **options):
        server = RewardServer(reward, port=0, **options)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def client():
    made = []

    def make(url, **options):
        made.append(HttpReward(url, **{"backoff": 0.01, "timeout": 5.0, **options}))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def length(requests):
    return [Result(float(len(r.response)), parts={"gold": float(r.reference or 0)})
            if r.response else None for r in requests]  # fmt: skip


def test_results_come_back_in_order_whatever_the_batches(serve, client, ask):
    server = serve(length)
    asked = [ask("a" * n, n) for n in (3, 0, 7, 1, 5)]
    scores = evaluate(client(server.url, batch_size=2), asked)
    assert scores.values.tolist() == [3, 0, 7, 1, 5]
    assert scores.valid.tolist() == [True, False, True, True, True]
    assert scores.reasons[1] == "skipped"
    assert scores.parts["gold"][[0, 2]].tolist() == [3, 7] and np.isnan(scores.parts["gold"][1])
    assert server.answered == 5


def test_media_arrive_as_they_were_sent():
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    sound = np.linspace(-1, 1, 9, dtype=np.float32)
    parts = (Part("image", index=0), Part("audio", index=1), Part("video", index=2))
    prompt = Example(
        (message("system", "s"), message("user", "what?", parts)),
        media=(picture, Media("audio", array=sound, sampling_rate=8000),
               Media("video", data=b"film", mime="video/mp4")),
    )  # fmt: skip
    sent = json.dumps(request_to_json(Request(prompt, "r", ["1"], {"n": 3, "no": object()})))
    got = request_from_json(json.loads(sent))
    assert got.example.messages == prompt.messages and got.text == "what?"
    np.testing.assert_array_equal(np.asarray(got.example.media[0]), np.asarray(picture))
    np.testing.assert_array_equal(got.example.media[1].array, sound)
    assert got.example.media[1].sampling_rate == 8000
    assert got.example.media[2] == prompt.media[2]
    assert (got.response, got.reference, got.meta) == ("r", ["1"], {"n": 3})
    with pytest.raises(RewardError, match="references as JSON.*object"):
        request_to_json(Request("p", "r", object()))


def test_the_protocol_of_align_anything(serve, client, ask):
    server = serve(length)
    reward = client(server.url.replace("/rewards", "/get_reward"), protocol="rewards")
    scores = evaluate(reward, [ask("ab"), ask("")])
    assert scores.values.tolist() == [2, 0] and scores.valid.tolist() == [True, False]


def status(url, body=None):
    """The code of a refusal."""
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(url, body)
    error.value.close()
    return error.value.code


def test_only_who_has_the_token_is_answered(serve, client, ask, monkeypatch):
    monkeypatch.setenv("GOOD", "secret")
    monkeypatch.setenv("BAD", "secre")
    server = serve(length, token="secret")
    assert evaluate(client(server.url, token_env="GOOD"), [ask("ab")]).values.tolist() == [2]
    for options in ({}, {"token_env": "BAD"}):
        with pytest.raises(RewardError, match="HTTP 401.*token is missing or wrong"):
            client(server.url, **options)([ask("ab")])
    assert status(server.url.replace("/rewards", "/health")) == 401
    with pytest.raises(ConfigError, match="NOT_THERE, which is not set"):
        client(server.url, token_env="NOT_THERE")
    with pytest.raises(ConfigError, match="readable by anyone.*https"):
        client("http://10.0.0.1/rewards", token_env="GOOD")
    with pytest.raises(ConfigError, match="reached from other machines"):
        RewardServer(length, host="0.0.0.0", port=0)


def test_what_the_server_cannot_use_is_said_and_not_asked_again(serve, client, ask):
    def unusable(requests):
        raise RewardError("no model here")

    server = serve(unusable, most_bytes=2000)
    with pytest.raises(RewardError, match="HTTP 422.*no model here"):
        client(server.url)([ask("a")])
    with pytest.raises(RewardError, match="HTTP 413.*send fewer"):
        client(server.url)([ask("a" * 3000)])
    with pytest.raises(RewardError, match="HTTP 404"):
        client(server.url.replace("/rewards", "/nowhere"))([ask("a")])
    for body, code in ((b"{", 400), (b"[]", 422), (b'{"requests": [{}]}', 422), (b"{}", 400)):
        assert status(server.url, body) == code


@pytest.fixture
def broken():
    """A server that answers with what is left in a list of (code, body, pause in seconds)."""
    answers = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            code, body, pause = answers.pop(0)
            time.sleep(pause)
            self.send_response(code)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # closing waits for them
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", answers
    server.shutdown()
    server.server_close()
    thread.join()


FINE = (200, b'{"results": [2]}', 0)


def test_a_server_that_recovers_is_asked_again(broken, client, ask):
    url, answers = broken
    answers += [(500, b"", 0), (429, b"", 0), (200, b'{"results": [9]}', 0.8), FINE]
    start = time.monotonic()
    scores = evaluate(client(url, retries=3, timeout=0.3), [ask("a")])
    assert scores.values.tolist() == [2] and not answers
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [((200, b"<html>", 0), "something else"), ((200, b'{"results": [1, 2]}', 0), "2 rewards for 1"),
     ((200, b'{"results": [{"value": 1}]}', 0), "something else"), ((302, b"", 0), "HTTP 302"),
     ((400, b"no such", 0), "HTTP 400: no such")],
)  # fmt: skip
def test_nonsense_is_raised_at_once(broken, client, ask, answer, words):
    url, answers = broken
    answers += [answer, FINE]
    with pytest.raises(RewardError, match=words):
        client(url)([ask("a")])
    assert answers == [FINE]


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nobody_there(client, ask, caplog):
    url = f"http://127.0.0.1:{closed_port()}/rewards"
    scores = evaluate(client(url, retries=2), [ask("a"), ask("b")])
    assert not scores.valid.any() and scores.counts["invalid: server down"] == 2
    assert "did not answer in 3 attempts" in caplog.text and "refused" in caplog.text.lower()
    with pytest.raises(RewardError, match="Start the server and run the same command again"):
        client(url, retries=1, when_down="raise")([ask("a")])


def test_a_number_that_json_cannot_hold(serve, client, ask):
    server = serve(lambda requests: [float("nan"), Result(1.0, parts={"x": float("inf")})])
    scores = evaluate(client(server.url), [ask("a"), ask("b")])
    assert scores.valid.tolist() == [False, True] and np.isnan(scores.parts["x"][1])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"url": "127.0.0.1:80"}, "write http"), ({"when_down": "wait"}, "when_down is 'wait'"),
     ({"batch_size": 0}, "batch_size=0"), ({"protocol": "xml"}, "protocol 'xml'")],
)  # fmt: skip
def test_impossible_clients_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        HttpReward(**{"url": "http://127.0.0.1:1/", **options})


def test_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.3.2.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "example.org", "::")))


def test_a_server_process_is_killed_and_comes_back(client, ask, tmp_path):
    """`launch/reward_server.py` as a person starts it: token, SIGKILL in mid-run, SIGTERM."""
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'reward': {'kind': 'exact'}, 'port': 0, 'token_env': 'TOKEN'})\n"
    )
    environment = {**os.environ, "TOKEN": "secret", "JAX_PLATFORMS": "cpu"}

    def start(port):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch/reward_server.py"),
             f"--config={tmp_path}/config.py", f"--config.port={port}"],
            stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
        )  # fmt: skip
        for line in process.stderr:
            if "serving ExactMatch at " in line:
                return process, line.rpartition(" at ")[2].strip()
        raise AssertionError(f"it ended with {process.wait()}")

    process, url = start(0)
    try:
        os.environ["TOKEN"] = "secret"
        asked = [ask("4", "4"), ask("5", "4")]
        reward = client(url, token_env="TOKEN", retries=1)
        assert evaluate(reward, asked).values.tolist() == [1, 0]
        process.kill()
        process.wait()
        assert evaluate(reward, asked).counts["invalid: server down"] == 2
        process.stderr.close()
        process, _ = start(url.rpartition(":")[2].partition("/")[0])
        assert evaluate(reward, asked).values.tolist() == [1, 0]
        process.send_signal(signal.SIGTERM)
        assert "answered 2 requests" in process.stderr.read()
        assert process.wait(timeout=20) == 0
    finally:
        os.environ.pop("TOKEN", None)
        process.kill()
        process.wait()
        process.stderr.close()
