"""Images as tokens of the text (Chameleon): begin, a fixed number of image tokens, end.

With an encoder the tokens are made when the example is read: the row is plain text afterwards, it
packs and shares prefixes, and an image may also be the answer. Without one the image tokens are
placeholders and the pixels go to the model, as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from aa_jax.data.images import read_json
from aa_jax.errors import CheckpointError, MediaError

Encoder = Callable[[Float[np.ndarray, "N 3 H W"]], Any]
BEGIN, END = "<racm3:break>", "<eoss>"
# Published folders hold no template: a turn is its text and images, closed by the separator, which
# is what transformers' processor makes of a question.
CHAMELEON_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ sep_token }}"
    "{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """How a checkpoint writes an image.

    Attributes:
      begin_id: stands before its tokens.
      end_id: stands after them.
      length: image tokens of an image.
      placeholder_id: stands for each of them until they are known.
      encode: pixels [N, 3, H, W] -> tokens of the vocabulary [N, length]; None sends pixels to
        the model.
    """

    begin_id: int
    end_id: int
    length: int
    placeholder_id: int
    encode: Encoder | None = None

    def ids(self, pixels: Float[np.ndarray, "3 H W"] | None, where: str = "") -> np.ndarray | None:
        """The tokens of one image; placeholders without pixels, None without an encoder.

        Raises:
          MediaError: the encoder makes another number of tokens.
        """
        if self.encode is None:
            return None
        if pixels is None:
            return np.full(self.length, self.placeholder_id, np.int32)
        found = np.asarray(self.encode(pixels[None]), np.int32).reshape(-1)
        if len(found) != self.length:
            raise MediaError(
                f"{where or 'An image'}: the image tokenizer makes {len(found)} tokens of pixels "
                f"{pixels.shape[1:]}, the checkpoint's images have {self.length}. Check size and "
                "crop_size in preprocessor_config.json and image_seq_length in "
                "processor_config.json."
            )
        return found

    def fill(
        self,
        tokens: Int[np.ndarray, " T"],
        feature_index: Int[np.ndarray, " T"],
        images: Sequence[np.ndarray | None],
    ) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        """Writes begin, image tokens and end over the expanded placeholders.

        Args:
          tokens: with ``length + 2`` placeholders per image.
          feature_index: >= 0 on exactly those.
          images: tokens of each image (`ids`), or None where the model reads pixels.

        Returns:
          The tokens, and which of them a feature still stands at.
        """
        tokens, index = tokens.copy(), np.full_like(feature_index, -1)
        blocks = np.flatnonzero(feature_index >= 0).reshape(-1, self.length + 2)
        tokens[blocks[:, 0]], tokens[blocks[:, -1]] = self.begin_id, self.end_id
        inner = blocks[:, 1:-1]
        if images and images[0] is not None:
            tokens[inner] = np.stack(images)
        else:
            index[inner] = np.arange(inner.size, dtype=np.int32).reshape(inner.shape)
        return tokens, index


def image_token_settings(folder: Path, backend: Any, encode: Encoder | None) -> dict[str, Any]:
    """Keyword arguments of `Processor` for a Chameleon folder.

    Args:
      folder: with processor_config.json.
      backend: the tokenizers object.
      encode: see `ImageTokens`.

    Raises:
      CheckpointError: the tokenizer lacks one of the tokens.
    """
    path = folder / "processor_config.json"
    config: Mapping[str, Any] = read_json(path) if path.is_file() else {}
    placeholder = config.get("image_token") or "<image>"
    ids = {token: backend.token_to_id(token) for token in (placeholder, BEGIN, END)}
    if missing := [token for token, found in ids.items() if found is None]:
        raise CheckpointError(
            f"{folder}: the tokenizer has no token {missing[0]!r}, which a Chameleon checkpoint "
            "writes around and for images. Use the tokenizer that belongs to it."
        )
    length = int(config.get("image_seq_length") or 1024)
    tokens = ImageTokens(ids[BEGIN], ids[END], length, ids[placeholder], encode)
    return {"image_token": placeholder, "image_tokens": tokens}
