"""The model as it acts: responses to prompts, and what the trainer's own pass says of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aa_jax import hosts, objectives
from aa_jax.data.collate import Batch, Shapes, collate
from aa_jax.data.tokens import Encoded
from aa_jax.models import Model, heads
from aa_jax.sampling import generate, make_sampler
from aa_jax.sharding import batch_devices, pad_rows, put_batch


class Sample(NamedTuple):
    """One sampled response.

    Attributes:
      tokens: int32 ids with the end token, where there is one.
      logps: float32, log-probability of each at sampling time.
      finished: False where the length limit cut it.
    """

    tokens: np.ndarray
    logps: np.ndarray
    finished: bool


class Actor:
    """Samples responses and scores them with the training forward pass.

    Args:
      model: the policy's architecture.
      processor: its `Processor`.
      mesh: device mesh.
      prompt: static shapes of a prompt batch.
      max_new_tokens: longest response, with its end token.
      batch_rows: requests sampled at once.
      temperature: > 0; the trainer scores at the same temperature, so that ratios start at 1.
      top_p: nucleus mass.
      top_k: tokens kept; 0 keeps all.
    """

    def __init__(
        self,
        model: Model,
        processor: Any,
        mesh: jax.sharding.Mesh,
        *,
        prompt: Shapes,
        max_new_tokens: int,
        batch_rows: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ):
        self.model, self.processor, self.mesh = model, processor, mesh
        self.prompt_shapes, self.max_new_tokens = prompt, max_new_tokens
        self.batch_rows, self.temperature = batch_rows, temperature
        self._sample = make_sampler(
            model, max_new_tokens=max_new_tokens, eos_ids=processor.stop_ids,
            pad_id=processor.pad_id, temperature=temperature, top_p=top_p, top_k=top_k,
        )  # fmt: skip
        self._greedy = make_sampler(
            model, max_new_tokens=max_new_tokens, eos_ids=processor.stop_ids,
            pad_id=processor.pad_id, temperature=0.0,
        )  # fmt: skip
        # Sampled at temperature t, a token's probability is softmax(logits / t).
        self._logps = jax.jit(
            lambda params, batch: (
                objectives.token_logps(model, params, batch, temperature=temperature or 1.0).logps
            )
        )
        self._values = jax.jit(lambda params, batch: heads.values(model, params, batch))

    def respond(
        self,
        params: Any,
        prompts: Sequence[Encoded],
        seeds: np.ndarray,
        *,
        greedy: bool = False,
    ) -> list[Sample]:
        """One response per prompt; a prompt given twice is answered twice.

        Args:
          params: of the policy.
          prompts: encoded, without responses.
          seeds: one per prompt, uint32; the same seed gives the same response.
          greedy: take the likeliest token.
        """
        sampler, out = self._greedy if greedy else self._sample, []
        for start in range(0, len(prompts), self.batch_rows):
            some = prompts[start : start + self.batch_rows]
            batch = collate(
                some, self.prompt_shapes, "prompt", batch_rows=self.batch_rows,
                pad_id=self.processor.pad_id,
            )  # fmt: skip
            batch = pad_rows(batch, batch_devices(self.mesh))
            padded = np.zeros(len(batch["tokens"]), np.uint32)
            padded[: len(some)] = seeds[start : start + len(some)]
            found = generate(sampler, params, put_batch(batch, self.mesh), padded)
            for row in range(len(some)):
                n = int(found.mask[row].sum())
                out.append(
                    Sample(found.tokens[row, :n], found.logps[row, :n], bool(found.finished[row]))
                )
        return out

    def text(self, sample: Sample) -> str:
        """The response as text, without its end token."""
        return self.processor.decode(sample.tokens)

    def logps(self, params: Any, batch: Batch, rows: int) -> np.ndarray:
        """Log-probabilities [B, S, R] float32 of a group batch, ``rows`` at a time."""
        return self._in_chunks(self._logps, params, batch, rows)

    def values(self, params: Any, batch: Batch, rows: int) -> np.ndarray:
        """A critic's values [B, S, R] float32 before each token is taken."""
        return self._in_chunks(self._values, params, batch, rows)

    def _in_chunks(self, function: Any, params: Any, batch: Batch, rows: int) -> np.ndarray:
        parts = []
        for start in range(0, len(batch["tokens"]), rows):
            part = jax.tree.map(lambda x, s=start: x[s : s + rows], batch)
            count = len(part["tokens"])
            part = pad_rows(part, max(rows, batch_devices(self.mesh)))
            parts.append(hosts.to_host(function(params, put_batch(part, self.mesh)))[:count])
        return np.concatenate(parts).astype(np.float32)


def with_responses(prompt: Encoded, samples: Sequence[Sample]) -> Encoded:
    """The prompt with what was sampled as its responses."""
    return dataclasses.replace(
        prompt,
        responses=tuple(np.asarray(sample.tokens, np.int32) for sample in samples),
        ended=tuple(sample.finished for sample in samples),
        trained=np.zeros_like(prompt.trained),
    )
