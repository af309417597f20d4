"""Which tokens of a Chameleon vocabulary are pieces of images, and which codes they stand for."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from aa_jax.errors import MediaError
from aa_jax.models.config import Reader

PREFIX = "IMGIMG"  # then one letter per decimal digit, A for 0, and a Z: IMGIMGBCZ is code 12
PLACEHOLDER, BEGIN, END = "<image>", "<racm3:break>", "<eoss>"
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


@dataclasses.dataclass(frozen=True)
class ImageVocabulary:
    """Image tokens of a vocabulary.

    Attributes:
        token_ids: every image token, ascending.
        code_tokens: the token of each codebook index; empty where the names do not say.
        placeholder_id: the token an image's features replace; None where there is none.
        begin_id: the token before an image's tokens.
        end_id: the token after them.
    """

    token_ids: tuple[int, ...] = ()
    code_tokens: tuple[int, ...] = ()
    placeholder_id: int | None = None
    begin_id: int | None = None
    end_id: int | None = None

    @classmethod
    def read(cls, reader: Reader, vocab_size: int, codes: int) -> "ImageVocabulary":
        """From `vocabulary_map` (and the ids some checkpoints name apart) of a config.json.

        Args:
            reader: of the whole config; collects the problems.
            vocab_size: every id must be below it.
            codes: size of the codebook.
        """
        table = reader.get("vocabulary_map", {})
        whole = isinstance(table, dict) and all(type(v) is int for v in table.values())
        if not whole:
            reader.problem("vocabulary_map", "must map token names to whole numbers")
            return cls()
        tokens = {name: token for name, token in table.items() if str(name).startswith(PREFIX)}
        outside = sorted(name for name, v in tokens.items() if not 0 <= v < vocab_size)
        if outside:
            reader.problem(
                "vocabulary_map", f"gives {outside[0]} an id that {vocab_size} tokens do not have"
            )
        return cls(
            token_ids=tuple(sorted(set(tokens.values()))),
            code_tokens=_by_code(tokens, codes),
            placeholder_id=_special(reader, "image_token_id", table.get(PLACEHOLDER)),
            begin_id=_special(reader, "boi_token_id", table.get(BEGIN)),
            end_id=_special(reader, "eoi_token_id", table.get(END)),
        )

    def codes(self, tokens: Int[np.ndarray, "*batch"]) -> Int[np.ndarray, "*batch"]:
        """Codebook indices of image tokens, on the host: what the tokenizer's decoder reads.

        Raises:
            MediaError: a token is no piece of an image.
        """
        table = np.full(max(self.code_tokens, default=0) + 1, -1, np.int32)
        table[list(self.code_tokens)] = np.arange(len(self.code_tokens))
        tokens = np.asarray(tokens)
        inside = (tokens >= 0) & (tokens < len(table))
        found = np.where(inside, table[np.where(inside, tokens, 0)], -1).astype(np.int32)
        if (found < 0).any():
            raise MediaError(
                f"Token {int(tokens[found < 0].flat[0])} is no piece of an image; give the tokens "
                "between an image's begin and end alone."
            )
        return found


def _special(reader: Reader, name: str, named: int | None) -> int | None:
    """An id that the vocabulary names, and that the config may repeat."""
    value: Any = reader.get(name, named)
    if named is not None and value != named:
        reader.problem(name, f"is {value!r}, but vocabulary_map says {named}")
    return value


def _by_code(tokens: dict[str, int], codes: int) -> tuple[int, ...]:
    """The token of code 0, 1, ...; nothing unless the names cover the codebook."""
    found: dict[int, int] = {}
    for name, token in tokens.items():
        digits = name[len(PREFIX) : -1].translate(_DIGITS)
        if not digits.isascii() or not digits.isdigit():
            return ()
        found[int(digits)] = token
    complete = all(code in found for code in range(codes))
    return tuple(found[code] for code in range(codes)) if complete else ()
