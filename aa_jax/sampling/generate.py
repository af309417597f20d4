"""The decode loop: prompts in, tokens and their full-vocabulary log-probs out.

A sampler is compiled once per shape. Each request carries its own seed, so a request gives the
same text in whatever batch it runs and however often the run was interrupted.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aa_jax import hosts
from aa_jax.errors import ConfigError
from aa_jax.models import caches
from aa_jax.sampling.choose import Choice
from aa_jax.sampling.constraints import Constraint
from aa_jax.sampling.draw import uniforms


class Samples(NamedTuple):
    """What a sampler returns, one row per request.

    Attributes:
      tokens: [B, R] int32, the response with its end token, then `pad_id`.
      logps: [B, R] float32, log-probability of each token under softmax(logits / temperature) over
        the *whole* vocabulary, before any top-k or top-p truncation (greedy: temperature 1); 0 on
        padding. A trainer that scores the same tokens at the same temperature gets these numbers.
      mask: [B, R] float32, 1 on the response and its end token.
      finished: [B] bool, False where the length limit cut the response (no end token).
    """

    tokens: Any
    logps: Any
    mask: Any
    finished: Any


def make_sampler(
    model: Any,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    constraint: Constraint | None = None,
) -> Callable[..., Samples]:
    """Compiles prefill and decode into `sample(params, batch, seeds) -> Samples`.

    Args:
      model: an `aa_jax.models` Model.
      max_new_tokens: R, the longest response including its end token.
      eos_ids: tokens that end a response.
      pad_id: written after the end token.
      temperature: 0 is greedy.
      top_p: nucleus mass in (0, 1]; 1 keeps every token.
      top_k: tokens kept; 0 keeps every token.
      min_p: least probability relative to the highest; 0 keeps every token.
      constraint: takes tokens away before one is chosen, see `aa_jax.sampling.constraints`.

    Returns:
      A jitted function of parameters, a prompt batch (keys `tokens`, `positions`, `intervals`,
      `last_positions`, optionally `feature_index` and `media`) and `seeds` [B] uint32.

    Raises:
      ConfigError: settings outside their range, or a constraint no response can satisfy.
    """
    choose = Choice(temperature, top_p, top_k, min_p)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; at least 1 token must be sampled.")
    if not eos_ids:
        raise ConfigError("eos_ids is empty: a response could never end. Give the tokenizer's.")
    ends = np.asarray(sorted(eos_ids), np.int32)
    if constraint is not None:
        constraint.check(max_new_tokens)

    def pick(logits, uniform, step, state):
        """One token per row and its log-prob: [B, V] -> ([B] int32, [B] float32)."""
        allowed = None
        if constraint is not None:
            allowed = constraint.allowed(state, max_new_tokens - step)
        return choose(logits, uniform[:, step], allowed)

    def sample(params, batch, seeds):
        rows, prompt_length = batch["tokens"].shape
        head, decode = model.head(params), model.decoder(params)
        uniform = uniforms(jnp.asarray(seeds), max_new_tokens)
        features = model.encode_media(params, batch["media"]) if "media" in batch else None
        hidden, cache = model.prefill(params, batch, prompt_length + max_new_tokens, features)
        cache = caches.for_loop(cache)
        last = batch["last_positions"][:, :1, None]
        logits = jnp.take_along_axis(hidden, last, axis=1)[:, 0] @ head.T
        state = None
        if constraint is not None:
            state = constraint.start(batch["tokens"], batch["last_positions"][:, 0])
        token, logp = pick(logits, uniform, jnp.int32(0), state)
        state = None if constraint is None else constraint.advance(state, token)
        is_end = jnp.any(token[:, None] == ends[None, :], axis=-1)
        tokens = jnp.full((rows, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
        logps = jnp.zeros((rows, max_new_tokens), jnp.float32).at[:, 0].set(logp)
        mask = jnp.zeros((rows, max_new_tokens), jnp.float32).at[:, 0].set(1.0)

        def unfinished(carry):
            step, done = carry[0], carry[1]
            return (step < max_new_tokens) & ~jnp.all(done)

        def advance(carry):
            step, done, token, tokens, logps, mask, cache, state = carry
            hidden, cache = decode(token, cache)
            token, logp = pick(hidden @ head.T, uniform, step, state)
            state = None if constraint is None else constraint.advance(state, token)
            token = jnp.where(done, pad_id, token)
            write = jax.lax.dynamic_update_index_in_dim
            tokens = write(tokens, token, step, axis=1)
            logps = write(logps, jnp.where(done, 0.0, logp), step, axis=1)
            mask = write(mask, jnp.where(done, 0.0, 1.0), step, axis=1)
            done = done | jnp.any(token[:, None] == ends[None, :], axis=-1)
            return step + 1, done, token, tokens, logps, mask, cache, state

        carry = (jnp.int32(1), is_end, token, tokens, logps, mask, cache, state)
        _, done, _, tokens, logps, mask, *_ = jax.lax.while_loop(unfinished, advance, carry)
        return Samples(tokens, logps, mask, done)

    return jax.jit(sample)


def generate(
    sampler: Callable[..., Samples], params: Any, batch: dict[str, Any], seeds: Any
) -> Samples:
    """Runs a sampler on a host batch and brings the result back as numpy arrays.

    Rows whose `sequence_mask` is 0 only fill up the batch; the caller drops them.

    Args:
      sampler: from `make_sampler`.
      params: the model's parameters, on whatever mesh they live.
      batch: a prompt batch from `aa_jax.data.collate`.
      seeds: one per row, 0 <= seed < 2**32.

    Returns:
      Samples of numpy arrays.
    """
    keep = ("tokens", "positions", "intervals", "last_positions", "feature_index", "media")
    inputs = {key: batch[key] for key in keep if key in batch}
    return jax.tree.map(hosts.to_host, sampler(params, inputs, np.asarray(seeds, np.uint32)))
