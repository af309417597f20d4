"""Example -> token ids with exact response spans.

The prompt's ids are those a sampler starts from. A response's ids are what the model has to
generate after them: the answer and its end token, nothing else. They are cut out of one
tokenisation of prompt and answer together by character offsets; nothing is tokenised apart and
counted, so merges across the border cannot shift the span.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from aa_jax.data.audio import audio_length, decode_audio
from aa_jax.data.example import Example, InvalidRow, Message
from aa_jax.data.media import image_size
from aa_jax.data.processor import Processor, Tokens
from aa_jax.errors import DataError, MediaError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What fits. None means no limit.

    Attributes:
      max_length: prompt and one response together, tokens (media features count as tokens).
      max_prompt_length: the prompt alone; a longer prompt drops the example, it is never cut.
      max_response_length: one response and its end token.
      truncate_response: cut a response that is too long at its end (it then has no end token)
        instead of dropping the example.
      train_on: ``last`` trains the responses; ``all`` also the earlier assistant turns of a
        supervised example (with the end token the template gives them, if it gives them one).
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    truncate_response: bool = False
    train_on: str = "last"

    def __post_init__(self):
        if self.train_on not in ("last", "all"):
            raise DataError(f"train_on={self.train_on!r} is not one of 'last', 'all'.")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What an example needs: prompt, response and extra trained tokens, images of which size, and
    the shapes of its other media arrays."""

    prompt: int
    responses: tuple[int, ...] = ()
    trained: int = 0
    images: int = 0
    image_size: tuple[int, int] | None = None
    media: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example as numbers.

    Attributes:
      prompt: [P] int32 ids, media placeholders expanded to one id per feature.
      responses: [R_s] int32 ids of each response with its end token.
      ended: whether each response kept its end token (False: it was cut).
      feature_index: [P] int32, which media feature stands at this token; -1 is text.
      trained: [P] bool, prompt tokens to train as well (earlier assistant turns).
      images: I, number of images.
      media: arrays for the tower, one entry per item in front: ``pixel_values`` [I, 3, H, W], or
        ``input_features`` [A, mels, frames] and ``feature_lengths`` [A]; empty when only lengths
        were asked for.
      where: ``file:row``.
      meta: copied from the example.
      image_size: (height, width) of the pixels, None without images.
      media_shapes: of the arrays in ``media`` other than pixels, known without decoding.
    """

    prompt: Int[np.ndarray, " P"]
    responses: tuple[np.ndarray, ...]
    ended: tuple[bool, ...]
    feature_index: Int[np.ndarray, " P"]
    trained: Bool[np.ndarray, " P"]
    images: int
    media: Mapping[str, np.ndarray]
    where: str = ""
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    media_shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def sizes(self) -> Sizes:
        """Lengths alone."""
        responses = tuple(map(len, self.responses))
        trained, prompt = int(self.trained.sum()), len(self.prompt)
        return Sizes(
            prompt, responses, trained, self.images, self.image_size, dict(self.media_shapes)
        )


@dataclasses.dataclass(frozen=True)
class MediaArrays:
    """The media of a prompt: features per item in order of appearance, arrays and their shapes."""

    counts: list[int]
    arrays: dict[str, np.ndarray]
    images: int = 0
    image_size: tuple[int, int] | None = None
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    kind: str = "image"


NO_LIMITS = Limits()


def encode_example(
    example: Example,
    processor: Processor,
    limits: Limits = NO_LIMITS,
    *,
    pixels: bool = True,
    root: str | None = None,
) -> Encoded:
    """Tokenises an example.

    Args:
      example: the conversation; with ``pixels`` its images must be decoded.
      processor: of the checkpoint.
      limits: lengths, and which turns are trained.
      pixels: False leaves ``media`` empty (for measuring lengths without decoding).
      root: folder of relative media paths, needed for audio files and, without ``pixels``, images.

    Raises:
      InvalidRow: too long or empty; the reason is counted by the caller.
      MediaError: placeholders and media do not match.
      DataError: the checkpoint cannot express the conversation.
    """
    where = example.where
    text = processor.render(example.messages, generation_prompt=True, where=where)
    tokens = processor.encode(text, where=where)
    trained = np.zeros(len(tokens.ids), bool)
    if limits.train_on == "all":
        trained = _earlier_turns(example, processor, text, tokens)
    media = _media(example, processor, pixels, root)
    ids = np.asarray(tokens.ids, np.int32)
    repeats, feature_index = _expand(ids, media.counts, processor, where)
    prompt = np.repeat(ids, repeats)
    responses, ended = [], []
    features = f"{sum(media.counts)} of them {media.kind} features"
    _check_prompt(len(prompt), features, limits, bool(example.responses), where)
    for response in example.responses:
        answer = _response_ids(example, response, processor, text, tokens)
        answer, whole = _fit(answer, len(prompt), limits, where)
        responses.append(np.asarray(answer, np.int32))
        ended.append(whole)
    return Encoded(
        prompt,
        tuple(responses),
        tuple(ended),
        feature_index,
        np.repeat(trained, repeats),
        media.images,
        media.arrays,
        where,
        dict(example.meta),
        media.image_size,
        media.shapes,
    )


def _response_ids(
    example: Example, response: Message, processor: Processor, prompt_text: str, prompt: Tokens
) -> list[int]:
    """The ids to be generated after the prompt: answer and end token."""
    where = example.where
    if response.media:
        kinds = ", ".join(sorted({part.type for part in response.media}))
        raise DataError(
            f"{where or 'An example'}: the response holds {kinds}, which this checkpoint does not "
            "write as tokens. Use a model that generates it, or a text-answer template."
        )
    if not response.text.strip():
        raise InvalidRow("empty response", f"{where}: the response is empty.")
    region, ends = _region(example.messages, response, processor, prompt_text, where)
    full = processor.encode(prompt_text + region, where=where)
    n = len(prompt.ids)
    if full.ids[:n] == prompt.ids and full.starts[n:] and full.starts[n] >= len(prompt_text):
        answer = full.ids[n:]
    else:
        answer = _continuation(region, processor, where)
    return answer if ends else [*answer, processor.eos_id]


def _region(
    messages: Sequence[Message],
    response: Message,
    processor: Processor,
    prompt_text: str,
    where: str,
) -> tuple[str, bool]:
    """What follows the prompt up to the end token, and whether the end token is part of it.

    The template may write something before the answer (a space) and after it (a space, the end of
    the turn, a newline). What comes after the end token is not generated; without an end token of
    the template, eos follows the answer directly.
    """
    full = processor.render((*messages, response), generation_prompt=False, where=where)
    content = processor.chat.protect(response.text)
    if not full.startswith(prompt_text):
        # The template writes another header for a finished turn; the sampler's header counts.
        at = full.rfind(content)
        tail = full[at + len(content) :] if at >= 0 else ""
        lead = ""
    else:
        rest = full[len(prompt_text) :]
        at = rest.find(content)
        if at < 0 and (at := rest.find(content.strip())) >= 0:
            content = content.strip()
        if at < 0:
            raise DataError(
                f"{where or 'An example'}: the chat template rewrites the assistant's text, so its "
                "tokens cannot be found. Pass a chat_template that shows the text as it is."
            )
        lead, tail = rest[:at], rest[at + len(content) :]
    space, _, end = processor.split_end(tail)
    return (lead + content + space + end, True) if end else (lead + content, False)


# Characters that stand alone in practically every vocabulary: nothing merges with them.
_BORDERS = ("\n", "|", ".", ":", "\t", "#", "\x00")


def _continuation(region: str, processor: Processor, where: str) -> list[int]:
    """Ids of a text that continues a prompt whose last token would merge with it."""
    for border in _BORDERS:
        tokens = processor.encode(border + region, start=False, where=where)
        first = next((i for i, end in enumerate(tokens.ends) if end > len(border)), None)
        if first is not None and tokens.starts[first] >= len(border):
            return tokens.ids[first:]
    raise DataError(
        f"{where or 'An example'}: the answer cannot be separated from the prompt in this "
        "tokenizer. End the generation prompt of the chat template with a special token."
    )


def _earlier_turns(
    example: Example, processor: Processor, text: str, tokens: Tokens
) -> Bool[np.ndarray, " N"]:
    """Marks the tokens of earlier assistant turns, each with its end token."""
    marked = np.zeros(len(tokens.ids), bool)
    for k, turn in enumerate(example.messages):
        if turn.role != "assistant" or not turn.text.strip():
            continue
        before = example.messages[:k]
        start = processor.render(before, generation_prompt=True, where=example.where)
        region, _ = _region(before, turn, processor, start, example.where)
        if not text.startswith(start + region):
            raise DataError(
                f"{example.where or 'An example'}: the chat template shows earlier assistant turns "
                "differently from the last one, so they cannot be trained as they were generated. "
                "Use train_on='last'."
            )
        begin, end = len(start), len(start) + len(region)
        for i, (a, b) in enumerate(zip(tokens.starts, tokens.ends, strict=True)):
            marked[i] |= a < end and b > begin
    return marked


def _media(example: Example, processor: Processor, pixels: bool, root: str | None) -> MediaArrays:
    """Features per item of the prompt, and the arrays they are made of."""
    where = example.where or "An example"
    used = [part for message in example.messages for part in message.media]
    for part in used:
        if not 0 <= part.index < len(example.media):
            raise MediaError(
                f"{where}: a message refers to media {part.index}, but the example holds "
                f"{len(example.media)}."
            )
    kinds = {part.type for part in used}
    items = [example.media[part.index] for part in used]
    if kinds == {"audio"} and processor.audio_processor is not None:
        return _audio(items, processor, pixels, root, example.where)
    if kinds - {"image"} or (kinds and processor.image_processor is None):
        raise DataError(
            f"{where}: this checkpoint's processor does not read {' and '.join(sorted(kinds))}. "
            "Use a model for this modality."
        )
    return _images(items, processor, pixels, root, example.where)


def _images(
    items: Sequence[Any], processor: Processor, pixels: bool, root: str | None, where: str
) -> MediaArrays:
    counts, arrays, sizes = [], [], set()
    for item in items:
        if pixels:
            arrays.append(processor.pixels(item))
            given = (item.height, item.width)
        elif processor.fixed_feature_count is None:
            given = image_size(item, root=root, where=where)
        else:
            given = (1, 1)  # any size gives the same
        counts.append(processor.feature_count(*given))
        sizes.add(processor.image_processor.output_size(*given))
    if len(sizes) > 1:
        raise MediaError(
            f"{where or 'An example'}: its images have different sizes after processing: "
            f"{sorted(sizes)}. One batch needs one size: set do_center_crop, or a fixed height and "
            "width, in preprocessor_config.json."
        )
    media = {"pixel_values": np.stack(arrays)} if arrays else {}
    return MediaArrays(counts, media, len(counts), next(iter(sizes), None))


def _audio(
    items: Sequence[Any], processor: Processor, pixels: bool, root: str | None, where: str
) -> MediaArrays:
    """Log-mel features, cut behind what the tower reads of the longest clip."""
    extractor = processor.audio_processor
    rate, clips, lengths = extractor.sampling_rate, [], []
    for item in items:
        if pixels:
            clips.append(decode_audio(item, rate, root=root, where=where))
            lengths.append(len(clips[-1]))
        else:
            lengths.append(audio_length(item, rate, root=root, where=where))
    try:
        counts = [extractor.feature_count(samples, where) for samples in lengths]
    except MediaError as error:
        raise InvalidRow("audio too long or too short", str(error)) from error
    frames = [extractor.frame_count(samples) for samples in lengths]
    width = extractor.width(max(frames))
    shapes = {
        "input_features": (len(items), extractor.feature_size, width),
        "feature_lengths": (len(items),),
    }
    arrays = {}
    if pixels:
        made = [extractor(clip, where=where)[:, :width] for clip in clips]
        arrays = {
            "input_features": np.stack(made),
            "feature_lengths": np.asarray(frames, np.int32),
        }
    return MediaArrays(counts, arrays, shapes=shapes, kind="audio")


def _expand(
    ids: Int[np.ndarray, " N"], counts: Sequence[int], processor: Processor, where: str
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " P"]]:
    """How often each id is repeated, and the feature that stands at each repeated id."""
    repeats = np.ones(len(ids), np.int64)
    kinds = [k for k in ("image", "audio") if getattr(processor, f"{k}_token_id") is not None]
    at = np.flatnonzero(np.isin(ids, [getattr(processor, f"{k}_token_id") for k in kinds]))
    if len(at) != len(counts):
        names = " or ".join(repr(getattr(processor, f"{k}_token")) for k in kinds) or "at all"
        what = " or ".join(f"{kind}s" if kind == "image" else "clips" for kind in kinds) or "media"
        raise MediaError(
            f"{where or 'An example'}: {len(counts)} {what}, but the chat template writes "
            f"{len(at)} placeholders {names}. Use the chat template that belongs to this "
            "checkpoint."
        )
    if len(at):
        repeats[at] = counts
    is_media = np.zeros(len(ids), bool)
    is_media[at] = True
    is_media = np.repeat(is_media, repeats)
    index = np.where(is_media, np.cumsum(is_media) - 1, -1)
    return repeats, index.astype(np.int32)


def _check_prompt(length: int, features: str, limits: Limits, answered: bool, where: str) -> None:
    allowed = limits.max_prompt_length
    name = "max_prompt_length"
    if allowed is None and limits.max_length is not None:
        # Room for one answer token and its end.
        allowed, name = limits.max_length - 2 * answered, "max_length"
    if allowed is not None and length > allowed:
        raise InvalidRow(
            "prompt too long",
            f"{where or 'An example'}: the prompt has {length} tokens ({features}), "
            f"{allowed} fit. A prompt is never cut; raise {name}.",
        )


def _fit(answer: list[int], prompt: int, limits: Limits, where: str) -> tuple[list[int], bool]:
    """Cuts or refuses a response that is too long."""
    room = [
        limits.max_response_length,
        None if limits.max_length is None else limits.max_length - prompt,
    ]
    allowed = min((r for r in room if r is not None), default=len(answer))
    if len(answer) <= allowed:
        return answer, True
    if limits.truncate_response and allowed > 0:
        return answer[:allowed], False
    raise InvalidRow(
        "response too long",
        f"{where or 'An example'}: the response has {len(answer)} tokens after a prompt of "
        f"{prompt}; {allowed} fit. Raise max_length or max_response_length, or set "
        "truncate_response=True to cut it at its end.",
    )
