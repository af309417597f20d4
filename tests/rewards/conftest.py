"""Requests in one line."""

import pytest

from aa_jax.rewards.base import Request


@pytest.fixture(scope="session")
def ask():
    """`ask(response, reference, **meta)` -> Request."""

    def make(response, reference=None, prompt="question", **meta):
        return Request(prompt, response, reference, meta)

    return make
