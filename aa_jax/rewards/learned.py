"""Learned rewards and costs: score models that read prompt and response in their own tokens."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from aa_jax import hosts
from aa_jax.data.collate import Shapes, collate, grow, plan_shapes
from aa_jax.data.example import Example, InvalidRow
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.models import heads
from aa_jax.models.chameleon.tokenizer import own_image_encoder
from aa_jax.rewards.base import Request, Result
from aa_jax.sharding import batch_devices, pad_rows, put_batch, shardings


class RewardModel:
    """Scores responses with a model that `heads.save` wrote.

    An empty response gets the lowest score of its batch: it is the policy's doing, so it must not
    be masked.

    Args:
      path: the score model, with its own tokenizer and chat template.
      mesh: device mesh.
      batch_rows: responses scored at once.
      dtype: compute type.
    """

    worst = staticmethod(np.nanmin)

    def __init__(
        self,
        path: str,
        *,
        mesh: jax.sharding.Mesh,
        batch_rows: int = 64,
        dtype: str = "float32",
    ):
        self.model, self.params = heads.load(
            path, dtype=dtype, shardings=lambda m: shardings(m.axes(), m.abstract(), mesh)
        )
        encode = own_image_encoder(self.model, self.params["model"])  # for responses that draw
        self.processor = Processor.from_pretrained(path, image_encoder=encode)
        self.mesh, self.batch_rows = mesh, batch_rows
        self._score = jax.jit(lambda params, batch: heads.score(self.model, params, batch)[:, 0])
        self._shapes: Shapes | None = None

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        """One score per response."""
        return [Result(float(value)) for value in self._answered([r.answered for r in requests])]

    def scores(self, prompts: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
        """[N] float32; an empty text gets the worst score of the others (0 if there is none)."""
        pairs = zip(prompts, texts, strict=True)
        return self._answered([prompt.replace(responses=(text,)) for prompt, text in pairs])

    def _answered(self, examples: Sequence[Example]) -> np.ndarray:
        encoded, rows = [], []
        for index, example in enumerate(examples):
            try:
                encoded.append(encode_example(example, self.processor))
                rows.append(index)
            except InvalidRow as error:
                if error.reason != "empty response":
                    raise
        found = np.full(len(examples), np.nan, np.float32)
        found[rows] = self._scores(encoded) if encoded else []
        # Only empty ones: a model that answers NaN is not silently given the worst score.
        empty = np.ones(len(examples), bool)
        empty[rows] = False
        known = found[np.isfinite(found)]
        worst = self.worst(known) if len(known) else np.float32(0)
        return np.where(empty, worst, found).astype(np.float32)

    def _scores(self, encoded: Sequence) -> np.ndarray:
        needed = plan_shapes(encoded, "supervised", multiple_of=16)
        # A score reads no response slots: as many as tokens, so that they cause no new shape.
        needed = dataclasses.replace(needed, response_length=needed.length)
        shapes = self._shapes = grow(self._shapes, needed)
        out = []
        for start in range(0, len(encoded), self.batch_rows):
            some = encoded[start : start + self.batch_rows]
            batch = collate(
                some, shapes, "supervised", batch_rows=self.batch_rows,
                pad_id=self.processor.pad_id,
            )  # fmt: skip
            batch = pad_rows(batch, batch_devices(self.mesh))
            out.append(
                hosts.to_host(self._score(self.params, put_batch(batch, self.mesh)))[: len(some)]
            )
        return np.concatenate(out)


class CostModel(RewardModel):
    """Scores how harmful responses are: above 0 is unsafe (`aa_jax.losses.cost`).

    An empty response gets the highest cost of its batch: saying nothing is no way out of a limit.
    """

    worst = staticmethod(np.nanmax)
