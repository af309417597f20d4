"""Which tokens may come next: image spans of exact length, and tokens that never may.

A constraint is a small automaton per row that runs inside the compiled decode loop. It takes
tokens away before sampling; the log-probabilities a sampler reports stay those of the whole
vocabulary, like those under top-k.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from aa_jax.errors import ConfigError, DataError


@runtime_checkable
class Constraint(Protocol):
    """What `aa_jax.sampling.make_sampler` asks of a constraint; all but `check` are pure."""

    def check(self, max_new_tokens: int) -> None:
        """Raises ConfigError when no response of this length can satisfy it."""

    def start(self, tokens: Int[Array, "B T"], last: Int[Array, "B"]) -> Any:
        """The state after prompts whose last tokens stand at ``last``."""

    def allowed(self, state: Any, room: Int[Array, ""]) -> Bool[Array, "B V"]:
        """What may come next; ``room`` tokens can still be written, this one included."""

    def advance(self, state: Any, token: Int[Array, "B"]) -> Any:
        """The state after one more token per row."""


def _mask(ids: Sequence[int], vocab_size: int, what: str) -> np.ndarray:
    mask = np.zeros(vocab_size, bool)
    ids = np.asarray(sorted(ids), np.int64)
    if ids.size and not (0 <= ids[0] and ids[-1] < vocab_size):
        raise ConfigError(
            f"{what} lie between {ids[0]} and {ids[-1]}, but the vocabulary has {vocab_size} "
            "tokens; take them from the model's own config."
        )
    mask[ids] = True
    return mask


@dataclasses.dataclass(frozen=True)
class Forbid:
    """Tokens that are never written, e.g. image tokens where only text is wanted.

    With a Chameleon's image tokens this is what transformers does in every forward pass.

    Attributes:
      ids: the tokens.
      vocab_size: V, rows of the model's head.

    Raises:
      ConfigError: a token outside the vocabulary.
    """

    ids: tuple[int, ...]
    vocab_size: int

    def __post_init__(self):
        _mask(self.ids, self.vocab_size, "The forbidden tokens")

    def check(self, max_new_tokens: int) -> None:
        """Any length will do."""

    def start(self, tokens: Int[Array, "B T"], last: Int[Array, "B"]) -> Int[Array, "B"]:
        """See `Constraint`; the state is only there to say how many rows there are."""
        return jnp.zeros_like(last)

    def allowed(self, state: Int[Array, "B"], room: Int[Array, ""]) -> Bool[Array, "B V"]:
        """See `Constraint`."""
        open_ = jnp.asarray(~_mask(self.ids, self.vocab_size, ""))
        return jnp.broadcast_to(open_[None, :], (state.shape[0], self.vocab_size))

    def advance(self, state: Int[Array, "B"], token: Int[Array, "B"]) -> Int[Array, "B"]:
        """See `Constraint`."""
        return state


@dataclasses.dataclass(frozen=True)
class ImageSpans:
    """Interleaved text and images: every image is begin, exactly ``length`` image tokens, end.

    An image is only begun when it can be finished and an end-of-sequence token still fits, so a
    response that is cut by its length limit holds whole images only. A prompt may end inside an
    image (most simply with the begin token: then the response starts with the image).

    Attributes:
      image_ids: tokens that are pieces of images.
      begin_id: stands before them.
      end_id: stands after them.
      length: tokens of an image.
      eos_ids: tokens that end a response.
      vocab_size: V, rows of the model's head.
      max_images: most images of a response; None leaves it to the length limit.
      min_images: images a response must hold before it may end. Text before them may be cut short
        to leave room.

    Raises:
      ConfigError: tokens outside the vocabulary or with two roles, or counts that contradict.
    """

    image_ids: tuple[int, ...]
    begin_id: int
    end_id: int
    length: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_images: int | None = None
    min_images: int = 0

    def __post_init__(self):
        _mask(self.image_ids, self.vocab_size, "The image tokens")
        others = (self.begin_id, self.end_id, *self.eos_ids)
        _mask(others, self.vocab_size, "Begin, end and end-of-sequence tokens")
        if len({*others}) < 2 + len({*self.eos_ids}) or {*others} & {*self.image_ids}:
            raise ConfigError(
                f"begin_id {self.begin_id}, end_id {self.end_id}, eos_ids {self.eos_ids} and the "
                "image tokens must all be different tokens."
            )
        if self.length < 1 or not self.image_ids or not self.eos_ids:
            raise ConfigError(
                f"An image needs tokens: length is {self.length}, there are {len(self.image_ids)} "
                f"image tokens and {len(self.eos_ids)} end-of-sequence tokens."
            )
        if not 0 <= self.min_images <= (self.min_images if self._open else self.max_images):
            raise ConfigError(
                f"min_images is {self.min_images} and max_images {self.max_images}; give "
                "0 <= min_images <= max_images."
            )

    @property
    def _open(self) -> bool:
        return self.max_images is None

    def check(self, max_new_tokens: int) -> None:
        """See `Constraint`."""
        needed = self.min_images * (self.length + 2) + 1
        if max_new_tokens < needed:
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens}, but {self.min_images} images of "
                f"{self.length} tokens and the end of the response need {needed}."
            )

    def start(self, tokens: Int[Array, "B T"], last: Int[Array, "B"]) -> dict[str, Array]:
        """See `Constraint`.

        Returns:
          left: [B] image tokens still due, 0 when the end token is, -1 in text.
          images: [B] images begun in the response (one the prompt began counts).
        """
        steps = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        real = steps <= last[:, None]

        def latest(token: int) -> Int[Array, "B"]:
            return jnp.max(jnp.where(real & (tokens == token), steps, -1), axis=1)

        begun = latest(self.begin_id)
        inside = begun > latest(self.end_id)
        left = jnp.where(inside, jnp.maximum(self.length - (last - begun), 0), -1)
        return {"left": left.astype(jnp.int32), "images": inside.astype(jnp.int32)}

    def allowed(self, state: dict[str, Array], room: Int[Array, ""]) -> Bool[Array, "B V"]:
        """See `Constraint`."""
        left, images = state["left"][:, None], state["images"][:, None]
        ids = np.arange(self.vocab_size)
        is_image = _mask(self.image_ids, self.vocab_size, "")
        is_begin, is_end = ids == self.begin_id, ids == self.end_id
        is_eos = np.isin(ids, self.eos_ids)
        plain = ~(is_image | is_begin | is_end | is_eos)
        shape = (left.shape[0], self.vocab_size)

        def rows(mask: np.ndarray) -> Bool[Array, "B V"]:
            return jnp.broadcast_to(jnp.asarray(mask)[None], shape)

        whole = self.length + 2
        more = room >= whole + 1
        if not self._open:
            more = more & (images < self.max_images)
        owed = jnp.maximum(self.min_images - images, 0)
        # With no more room than the images owed and the end need, text must make way.
        now = (owed > 0) & (room <= owed * whole + 1)
        text = rows(plain) & ~now | rows(is_begin) & more | rows(is_eos) & (owed == 0)
        return jnp.where(left > 0, rows(is_image), jnp.where(left == 0, rows(is_end), text))

    def advance(self, state: dict[str, Array], token: Int[Array, "B"]) -> dict[str, Array]:
        """See `Constraint`."""
        begun = (state["left"] < 0) & (token == self.begin_id)
        left = jnp.where(begun, self.length, jnp.maximum(state["left"] - 1, -1))
        return {"left": left, "images": state["images"] + begun.astype(jnp.int32)}

    def split(
        self, ids: Sequence[int] | np.ndarray, where: str = ""
    ) -> list[tuple[str, np.ndarray]]:
        """A response in pieces: ("text", ids) and ("image", its `length` tokens), in order.

        Args:
          ids: tokens of one response, with or without its end token.
          where: which response, for the error.

        Raises:
          DataError: an image is not exactly begin, `length` image tokens, end; or a piece of an
            image stands outside.
        """
        ids = np.asarray(ids, np.int64)
        is_image, pieces, at, text = np.isin(ids, self.image_ids), [], 0, 0
        while at < len(ids):
            if ids[at] == self.begin_id:
                stop = at + 1 + self.length
                if (
                    stop >= len(ids)
                    or not is_image[at + 1 : stop].all()
                    or ids[stop] != self.end_id
                ):
                    raise self._broken(ids, at, where)
                if at > text:
                    pieces.append(("text", ids[text:at]))
                pieces.append(("image", ids[at + 1 : stop]))
                at = text = stop + 1
            elif is_image[at] or ids[at] == self.end_id:
                raise self._broken(ids, at, where)
            else:
                at += 1
        return [*pieces, ("text", ids[text:])] if text < len(ids) else pieces

    def _broken(self, ids: np.ndarray, at: int, where: str) -> DataError:
        return DataError(
            f"{where or 'A response'}: token {at} ({ids[at]}) is no whole image: each is "
            f"{self.begin_id}, {self.length} image tokens, {self.end_id}. Sample with this "
            "constraint, or drop the response."
        )
