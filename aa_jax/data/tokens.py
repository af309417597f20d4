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

from aa_jax.data.example import Example, InvalidRow, Message, Part
from aa_jax.data.mrope import mrope_positions
from aa_jax.data.prepared import Prepared, Tokens
from aa_jax.data.processor import Processor
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
    where sizes are free, how many patches of how many numbers each; shapes of other media arrays;
    numbers in a position, where patches do not say that they are three.
    """

    prompt: int
    responses: tuple[int, ...] = ()
    trained: int = 0
    images: int = 0
    image_size: tuple[int, int] | None = None
    patches: int = 0
    patch_numbers: int = 0
    media: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    axes: int = 1


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example as numbers.

    Attributes:
      prompt: [P] int32 ids, media placeholders expanded to one id per feature.
      responses: [R_s] int32 ids of each response with its end token.
      ended: whether each response kept its end token (False: it was cut).
      feature_index: [P] int32, which media feature stands at this token; -1 is text.
      trained: [P] bool, prompt tokens to train as well (earlier assistant turns).
      images: I, number of images (and videos), or of their tiles.
      media: arrays for the tower: ``pixel_values`` [I, 3, H, W] float32, or for free sizes
        [N, K] patches and ``grid_thw`` [I, 3]; for audio ``input_features`` [A, mels, frames] and
        ``feature_lengths`` [A]; empty when only lengths were asked for.
      where: ``file:row``.
      meta: copied from the example.
      image_size: (height, width) of the pixels, None without images or where sizes are free.
      positions: [P, 3] rotary positions where they have three axes; None: 0, 1, 2, ...
      next_position: of the first token of a response; None: P.
      patches: number of patches of all images, where sizes are free.
      patch_numbers: numbers in each.
      media_shapes: of the media arrays other than pixels, known without decoding.
      features: number of features its media give; None: one per token that stands for one.
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
    positions: Int[np.ndarray, "P 3"] | None = None
    next_position: int | None = None
    patches: int = 0
    patch_numbers: int = 0
    media_shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    features: int | None = None

    @property
    def sizes(self) -> Sizes:
        """Lengths alone."""
        return Sizes(
            prompt=len(self.prompt),
            responses=tuple(map(len, self.responses)),
            trained=int(self.trained.sum()),
            images=self.images,
            image_size=self.image_size,
            patches=self.patches,
            patch_numbers=self.patch_numbers,
            media=dict(self.media_shapes),
            axes=3 if self.positions is not None and self.media_shapes else 1,
        )


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
      root: folder of relative image paths, needed only for image sizes without ``pixels``.

    Raises:
      InvalidRow: too long or empty; the reason is counted by the caller.
      MediaError: placeholders and media do not match.
      DataError: the checkpoint cannot express the conversation.
    """
    where = example.where
    if unseen := sorted(set(range(len(example.media))) - example.shown):
        raise MediaError(
            f"{where or 'An example'}: it holds {len(example.media)} media, but no message and no "
            f"response shows number {unseen[0]}. Show it with a Part, or leave it out."
        )
    text = processor.render(example.messages, generation_prompt=True, where=where)
    tokens = processor.encode(text, where=where)
    trained = np.zeros(len(tokens.ids), bool)
    if limits.train_on == "all":
        trained = _earlier_turns(example, processor, text, tokens)
    kinds, items = _media(example, processor, pixels, root)
    counts = [item.count for item in items]
    ids = np.asarray(tokens.ids, np.int32)
    repeats, feature_index = _expand(ids, kinds, counts, processor, where)
    prompt = np.repeat(ids, repeats)
    if items and items[0].features is not None:
        made = np.cumsum([0, *(item.made for item in items)])
        order = [item.features + at for item, at in zip(items, made, strict=False)]
        feature_index[feature_index >= 0] = np.concatenate(order)
    if processor.image_tokens is not None:
        spans = [item.ids for item in items]
        prompt, feature_index = processor.image_tokens.fill(prompt, feature_index, spans)
    responses, ended = [], []
    features = f"{sum(counts)} of them {'audio' if 'audio' in kinds else 'image'} features"
    _check_prompt(len(prompt), features, limits, bool(example.responses), where)
    for response in example.responses:
        answer = _response_ids(example, response, processor, text, tokens)
        if response.media:
            answer = _draw(answer, example, response, processor, pixels, root)
        answer, whole = _fit(answer, len(prompt), limits, where)
        responses.append(np.asarray(answer, np.int32))
        ended.append(whole)
    return Encoded(
        prompt,
        tuple(responses),
        tuple(ended),
        feature_index,
        np.repeat(trained, repeats),
        sum((item.tiles or 1) for item in items if _is_picture(item)),
        where=where,
        meta=dict(example.meta),
        **_pixels(items, feature_index, processor, pixels, where),
    )


def _response_ids(
    example: Example, response: Message, processor: Processor, prompt_text: str, prompt: Tokens
) -> list[int]:
    """The ids to be generated after the prompt: answer and end token."""
    where = example.where
    if drawn := bool(response.media):
        response = _with_marks(response, processor, where)
    if not response.text.strip():
        raise InvalidRow("empty response", f"{where}: the response is empty.")
    region, ends = _region(example.messages, response, processor, prompt_text, where)
    if drawn:
        region = region.replace(_MARK, processor.image_token)
    full = processor.encode(prompt_text + region, where=where)
    n = len(prompt.ids)
    if full.ids[:n] == prompt.ids and full.starts[n:] and full.starts[n] >= len(prompt_text):
        answer = full.ids[n:]
    else:
        answer = _continuation(region, processor, where)
    return answer if ends else [*answer, processor.eos_id]


# Stands for an image of a response while the template is rendered: never assigned by Unicode.
_MARK = "\ufdd6"


def _with_marks(response: Message, processor: Processor, where: str) -> Message:
    """A response as one text, its images marked in their places."""
    kinds = {part.type for part in response.media}
    writes = processor.image_tokens is not None and processor.image_tokens.encode is not None
    if kinds != {"image"} or not writes:
        raise DataError(
            f"{where or 'An example'}: the response holds {', '.join(sorted(kinds))}, which this "
            "checkpoint does not write as tokens. Use a model that generates it (of a Chameleon "
            "folder the processor needs its image_encoder), or a text-answer template."
        )
    pieces = [
        part.text.replace(_MARK, "\ufffd") if part.type == "text" else _MARK
        for part in response.content
    ]
    return Message(response.role, (Part("text", text="".join(pieces)),))


def _draw(
    answer: Sequence[int],
    example: Example,
    response: Message,
    processor: Processor,
    pixels: bool,
    root: str | None,
) -> list[int]:
    """The ids of a response with its images' tokens in place of their placeholders."""
    whole = example.replace(messages=(response,))
    _, items = _media(whole, processor, pixels, root)
    ids = np.asarray(answer, np.int32)
    at = ids == processor.image_token_id
    if at.sum() != len(items):
        raise MediaError(
            f"{example.where or 'An example'}: the response holds {len(items)} images, but the "
            f"chat template keeps {at.sum()} of them. Use the chat template that belongs to this "
            "checkpoint."
        )
    repeats = np.where(at, processor.image_tokens.length + 2, 1)
    places = np.where(np.repeat(at, repeats), 0, -1).astype(np.int32)
    spans = [item.ids for item in items]
    return processor.image_tokens.fill(np.repeat(ids, repeats), places, spans)[0].tolist()


def _is_picture(item: Prepared) -> bool:
    """Whether an item takes pixels to the model: no clip, and no image that is tokens already."""
    return item.frames is None and item.ids is None


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


def _media(
    example: Example, processor: Processor, pixels: bool, root: str | None
) -> tuple[list[str], list[Prepared]]:
    """Kind of each medium of the prompt, and what its tokens and the tower need of it."""
    where = example.where or "An example"
    kinds, items = [], []
    for part in (part for message in example.messages for part in message.media):
        if not 0 <= part.index < len(example.media):
            raise MediaError(
                f"{where}: a message refers to media {part.index}, but the example holds "
                f"{len(example.media)}."
            )
        item = example.media[part.index]
        kinds.append(part.type)
        items.append(
            processor.prepare(part.type, item, pixels=pixels, root=root, where=example.where)
        )
    return kinds, items


def _pixels(
    items: Sequence[Prepared],
    feature_index: Int[np.ndarray, " P"],
    processor: Processor,
    pixels: bool,
    where: str,
) -> dict[str, Any]:
    """The fields of `Encoded` that hold media, and the positions they decide."""
    if items and items[0].frames is not None:
        return _clips(items, processor, pixels)
    if processor.packs_patches:
        merge = processor.image_processor.merge_size
        grids = [item.grid for item in items]
        positions, after = mrope_positions(feature_index, grids, merge, where)
        table = np.array([(g.frames, g.rows, g.columns) for g in grids], np.int32).reshape(-1, 3)
        media = {}
        if pixels and items:
            media = {
                "pixel_values": np.concatenate([item.pixels for item in items]),
                "grid_thw": table,
            }
        return {
            "media": media,
            "positions": positions,
            "next_position": after,
            "patches": sum(grid.patches for grid in grids),
            "patch_numbers": processor.image_processor.patch_numbers,
        }
    if items and items[0].ids is not None:
        return {"media": {}}
    sizes = {item.size for item in items}
    if len(sizes) > 1:
        raise MediaError(
            f"{where or 'An example'}: its images have different sizes after processing: "
            f"{sorted(sizes)}. One batch needs one size: set do_center_crop, or a fixed height "
            "and width, in preprocessor_config.json."
        )
    tiled = bool(items) and items[0].tiles is not None
    join = np.concatenate if tiled else np.stack
    media = {"pixel_values": join([i.pixels for i in items])} if pixels and items else {}
    made = sum(item.made for item in items) if tiled else None
    return {"media": media, "image_size": next(iter(sizes), None), "features": made}


def _clips(items: Sequence[Prepared], processor: Processor, pixels: bool) -> dict[str, Any]:
    """Log-mel features, cut behind what the tower reads of the longest clip."""
    make = processor.audio_processor
    frames = np.asarray([item.frames for item in items], np.int32)
    width = make.width(int(frames.max()))
    shapes = {
        "input_features": (len(items), make.feature_size, width),
        "feature_lengths": (len(items),),
    }
    media = {}
    if pixels:
        made = np.stack([item.pixels[:, :width] for item in items])
        media = {"input_features": made, "feature_lengths": frames}
    return {"media": media, "media_shapes": shapes}


def _expand(
    ids: Int[np.ndarray, " N"],
    kinds: Sequence[str],
    counts: Sequence[int],
    processor: Processor,
    where: str,
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " P"]]:
    """How often each id is repeated, and the feature that stands at each repeated id."""
    repeats = np.ones(len(ids), np.int64)
    known = processor.placeholder_ids
    at = np.flatnonzero(np.isin(ids, list(known.values())))
    if len(at) != len(counts):
        token = " and ".join(map(repr, processor.media_tokens.values()))
        what = "clips" if "audio" in known else "images"
        raise MediaError(
            f"{where or 'An example'}: {len(counts)} {what}, but the chat template writes "
            f"{len(at)} placeholders {token or processor.image_token!r}. Use the chat template "
            "that belongs to this checkpoint."
        )
    if any(ids[place] != known[kind] for place, kind in zip(at, kinds, strict=True)):
        names = {number: kind for kind, number in known.items()}
        written = [names[int(ids[place])] for place in at]
        raise MediaError(
            f"{where or 'An example'}: its media are {', '.join(kinds)}, but the chat template "
            f"writes placeholders for {', '.join(written)}. Use the chat template that belongs to "
            "this checkpoint."
        )
    if len(at):
        repeats[at] = counts
    is_medium = np.zeros(len(ids), bool)
    is_medium[at] = True
    is_medium = np.repeat(is_medium, repeats)
    index = np.where(is_medium, np.cumsum(is_medium) - 1, -1)
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
