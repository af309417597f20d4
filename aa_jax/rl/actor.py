"""The model as it acts: responses to prompts, and what the trainer's own pass says of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from aa_jax import hosts, objectives
from aa_jax.data.collate import Batch, Shapes, collate
from aa_jax.data.tokens import Encoded
from aa_jax.errors import ConfigError
from aa_jax.models import Model, heads
from aa_jax.rl.painter import Painter
from aa_jax.sampling import Choice, Forbid, Sample, SlotSampler, Stop
from aa_jax.sampling.constraints import Constraint
from aa_jax.sharding import batch_devices, pad_rows, put_batch


class Actor:
    """Samples responses and scores them with the training forward pass.

    Args:
      model: the policy's architecture.
      processor: its `Processor`.
      mesh: device mesh.
      prompt: static shapes of a prompt batch.
      max_new_tokens: longest response, with its end token.
      batch_rows: samples written at once.
      temperature: > 0; the trainer scores at the same temperature, so that ratios start at 1.
      top_p: nucleus mass.
      top_k: tokens kept; 0 keeps all.
      min_p: least probability relative to the highest; 0 keeps all.
      stop: texts that end a response, besides the end tokens.
      images: "free"; "never" for text answers of a model that can write images; "one" for answers
        that hold exactly one, with any text around it.
      image_tokenizer: folder of an image tokenizer with a decoder, which makes the images of
        "one" pictures that rewards can see.

    Raises:
      ConfigError: `images` is none of these, or "one" without a tokenizer.
      ModelError: the tokenizer is not the model's.
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
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        images: str = "free",
        image_tokenizer: str | None = None,
    ):
        self.model, self.processor, self.mesh = model, processor, mesh
        self.prompt_shapes, self.max_new_tokens = prompt, max_new_tokens
        self.batch_rows, self.temperature = batch_rows, temperature
        self._choices = {False: Choice(temperature, top_p, top_k, min_p), True: Choice(0.0)}
        self._painter = None
        self._constraint: Constraint | None = None
        if images == "never":
            self._constraint = _no_images(model)
        elif images == "one":
            self._painter = Painter(model, processor, image_tokenizer)
            self._constraint = self._painter.spans
        elif images != "free":
            raise ConfigError(f"sampling.images is {images!r}; it must be free, never or one.")
        self._stop = Stop(tuple(stop), processor.decode) if stop else None
        self._samplers: dict[tuple, SlotSampler] = {}
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
        done: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """Samples of every prompt.

        Args:
          params: of the policy.
          prompts: encoded, without responses.
          seeds: [N, G] uint32, one per sample; the same seed gives the same response.
          greedy: take the likeliest token.
          done: called with a prompt's number and its samples as soon as they are there.
        """
        samples = seeds.shape[1]
        slots = min(len(prompts), self.batch_rows)
        lanes = max(1, min(samples, self.batch_rows // slots))
        key = (slots, lanes, samples, greedy)
        if key not in self._samplers:
            self._samplers[key] = SlotSampler(
                self.model, self.mesh, slots=slots, lanes=lanes, samples=samples,
                max_new_tokens=self.max_new_tokens, eos_ids=self.processor.stop_ids,
                choice=self._choices[greedy], stop=self._stop, constraint=self._constraint,
            )  # fmt: skip

        def batch(indices: Sequence[int], rows: int) -> Batch:
            return collate(
                [prompts[i] for i in indices], self.prompt_shapes, "prompt", batch_rows=rows,
                pad_id=self.processor.pad_id,
            )  # fmt: skip

        return self._samplers[key].run(params, len(prompts), batch, seeds, done=done)

    def text(self, sample: Sample) -> str:
        """The response as text, without its end token."""
        return self.processor.decode(sample.tokens)

    @property
    def draws(self) -> bool:
        """Whether responses hold pictures that rewards see."""
        return self._painter is not None

    def read(self, samples: Sequence[Sample]) -> list[tuple[str, tuple[np.ndarray, ...]]]:
        """Text and pictures of every response, see `aa_jax.rewards.base.Request`."""
        if self._painter is not None:
            return self._painter.read([sample.tokens for sample in samples])
        return [(self.text(sample), ()) for sample in samples]

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


def _no_images(model: Model) -> Forbid | None:
    """Takes a model's image tokens away; None where it has none."""
    if not (images := getattr(model.config, "images", None)):
        return None
    marks = [i for i in (images.placeholder_id, images.begin_id, images.end_id) if i is not None]
    vocab = jax.eval_shape(model.head, model.abstract()).shape[0]
    return Forbid(tuple(sorted({*images.token_ids, *marks})), vocab)


def with_responses(prompt: Encoded, responses: Sequence[Sequence[int] | np.ndarray]) -> Encoded:
    """The prompt with the ids of what was sampled as its responses."""
    return dataclasses.replace(
        prompt,
        responses=tuple(np.asarray(ids, np.int32) for ids in responses),
        ended=(True,) * len(responses),
        trained=np.zeros_like(prompt.trained),
    )
