"""Responses that draw: how they are sampled, and what of them a reward sees."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aa_jax.errors import ConfigError, ModelError
from aa_jax.models import Model
from aa_jax.models.chameleon.tokenizer import load_tokenizer, to_uint8
from aa_jax.rewards.base import PICTURE
from aa_jax.sampling import ImageSpans

_ROWS = 32  # images decoded at once


class Painter:
    """Image tokens of responses as pictures.

    Args:
      model: a Chameleon.
      processor: its `Processor`.
      path: folder of its image tokenizer with a decoder, or run folder of `launch/tokenizer.py`.

    Raises:
      ConfigError: the model writes no images, or there is no tokenizer.
      ModelError: the tokenizer has no decoder, or other codes than the model's vocabulary.
    """

    def __init__(self, model: Model, processor: Any, path: str | None):
        images = getattr(model.config, "images", None)
        if images is None or processor.image_tokens is None or not images.code_tokens:
            raise ConfigError(
                "sampling.images is 'one', but this model writes no images as tokens: leave it out."
            )
        if path is None:
            raise ConfigError(
                "sampling.images is 'one': give sampling.image_tokenizer, the folder of the image "
                "tokenizer whose decoder draws what the policy writes."
            )
        folder = Path(path)
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        tokenizer, params = load_tokenizer(folder)
        if not tokenizer.has_decoder:
            raise ModelError(
                f"{folder} has no decoder, so nothing it encodes can be drawn. Use the folder that "
                "launch/tokenizer.py wrote, or a published tokenizer with its decoder."
            )
        codes = tokenizer.config.num_embeddings
        if len(images.code_tokens) != codes:
            raise ModelError(
                f"The model's vocabulary names {len(images.code_tokens)} image tokens, but the "
                f"image tokenizer {folder} has {codes} codes; use the one it was trained with."
            )
        length = processor.image_tokens.length
        side = round(length**0.5)
        self._images, self._processor, self._grid = images, processor, (side, length // side)
        self._decode = jax.jit(lambda found: tokenizer.decode(params, found))
        self.spans = ImageSpans(
            image_ids=images.token_ids, begin_id=images.begin_id, end_id=images.end_id,
            length=length, eos_ids=tuple(processor.stop_ids),
            vocab_size=jax.eval_shape(model.head, model.abstract()).shape[0],
            min_images=1, max_images=1,
        )  # fmt: skip

    def read(
        self, responses: Sequence[Sequence[int] | np.ndarray]
    ) -> list[tuple[str, tuple[np.ndarray, ...]]]:
        """(text with `PICTURE` in the places of its pictures, pictures [H, W, 3] uint8) of each.

        Args:
          responses: tokens, whole images only, as `spans` lets them be sampled.
        """
        texts, owners, found = [], [], []
        for index, tokens in enumerate(responses):
            pieces = []
            for kind, ids in self.spans.split(tokens):
                if kind == "image":
                    owners.append(index)
                    found.append(self._images.codes(ids).reshape(self._grid))
                pieces.append(PICTURE if kind == "image" else self._processor.decode(ids))
            texts.append(" ".join(piece for piece in pieces if piece))
        pictures: list[list[np.ndarray]] = [[] for _ in texts]
        for owner, picture in zip(owners, self._drawn(found), strict=True):
            pictures[owner].append(picture)
        return [(text, tuple(own)) for text, own in zip(texts, pictures, strict=True)]

    def _drawn(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        drawn: list[np.ndarray] = []
        for start in range(0, len(codes), _ROWS):
            some = np.stack(codes[start : start + _ROWS])
            rows = np.zeros((_ROWS, *self._grid), np.int32)
            rows[: len(some)] = some
            drawn += list(to_uint8(np.asarray(self._decode(rows)))[: len(some)])
        return drawn
