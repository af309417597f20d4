"""Tokenizer, chat template, image and audio processor of a Hugging Face checkpoint folder.

``tokenizer.json`` is used as it stands, as the model was trained with it. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from aa_jax.data.audio_chat import AUDIO_TOKEN, QWEN2_AUDIO_TEMPLATE
from aa_jax.data.audio_features import AudioProcessor, load_audio_processor
from aa_jax.data.chat import CLOSE, OPEN, ChatTemplate
from aa_jax.data.example import InvalidRow, Message, message
from aa_jax.data.images import ImageProcessor, load_image_processor, read_json
from aa_jax.errors import CheckpointError

_GUARD_OPEN, _GUARD_CLOSE = "\ufdd2", "\ufdd3"
_UNCOUNTED_CLS = ("clip_vision_model", "clip")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids and the characters [start, end) each stands for."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class Processor:
    """Everything between an Example and token ids or pixels.

    Args:
      tokenizer: a Hugging Face fast tokenizer (``transformers.PreTrainedTokenizerFast``).
      chat_template: Jinja source; None falls back to ``USER: ...`` lines.
      image_processor: how pixels are made; None for a text model.
      image_token: the special token that stands for an image.
      patch_size: edge of a vision patch, pixels.
      vision_feature_select_strategy: ``default`` drops the tower's first token, ``full`` keeps it.
      num_additional_image_tokens: tokens the tower adds to its patches (CLS: 1).
      audio_processor: how log-mel features are made; None for a model that does not hear.
      audio_token: the special token that stands for an audio clip.

    Raises:
      CheckpointError: an image processor without image token or patch size, or an audio processor
        without audio token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        image_processor: ImageProcessor | None = None,
        image_token: str = "<image>",
        patch_size: int | None = None,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 1,
        audio_processor: AudioProcessor | None = None,
        audio_token: str = AUDIO_TOKEN,
    ):
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A file may have been saved with either switched on; lengths are decided in one place.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.image_processor = image_processor
        self.image_token = image_token if image_processor else None
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.audio_processor = audio_processor
        self.audio_token = audio_token if audio_processor else None
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        named = (tokenizer.bos_token, tokenizer.eos_token, self.image_token, self.audio_token)
        special |= {t for t in named if t}
        # A turn may end with a token that is added but not marked special.
        self._added = re.compile(
            r"(\s*)(" + "|".join(re.escape(t.content) for t in added if t.content.strip()) + ")"
            if added
            else r"(?!)()"
        )
        self.image_token_id: int | None = None
        self.audio_token_id: int | None = None
        placeholders = {}
        if image_processor is not None:
            if patch_size is None:
                raise CheckpointError(
                    "The checkpoint makes pixels but gives no patch_size: it belongs into "
                    "processor_config.json, or vision_config of config.json."
                )
            self.image_token_id = self._placeholder_id("image", image_token)
            placeholders["image"] = image_token
        if audio_processor is not None:
            self.audio_token_id = self._placeholder_id("audio", audio_token)
            placeholders["audio"] = audio_token
        self.chat = ChatTemplate(tokenizer, chat_template, placeholders, sorted(special))
        end = self.split_end(self._tail())[2]
        if end and end not in special:
            self.chat = ChatTemplate(tokenizer, chat_template, placeholders, [*special, end])

    def _placeholder_id(self, kind: str, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise CheckpointError(
                f"The tokenizer has no token {token!r} to stand for an {kind}; add it as a special "
                f"token, or name the right one as {kind}_token in processor_config.json."
            )
        return index

    # From and to a folder -------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, media: bool = True, chat_template: str | None = None
    ) -> Processor:
        """Loads a checkpoint folder.

        Args:
          folder: with ``tokenizer.json``; for image and audio models also
            ``preprocessor_config.json``, or a ``processor_config.json`` that holds the processor.
          media: False reads a multimodal folder as a text model.
          chat_template: replaces the folder's own.

        Raises:
          CheckpointError: a file is missing, damaged or of an unsupported kind.
        """
        from transformers import PreTrainedTokenizerFast

        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            what = "is not a folder" if not folder.is_dir() else "has no tokenizer.json"
            raise CheckpointError(
                f"{folder} {what}. Download the whole checkpoint; if it only has a slow tokenizer "
                "(tokenizer.model), convert it once with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        except Exception as error:  # tokenizers raises bare Exception for a damaged file
            raise CheckpointError(f"{folder}/tokenizer.json cannot be loaded: {error}.") from error
        settings: dict[str, Any] = {}
        if media and (image_processor := load_image_processor(folder)) is not None:
            settings = _vision_settings(folder)
            settings["image_processor"] = image_processor
        source = chat_template or _chat_source(folder, tokenizer)
        if media and (audio_processor := load_audio_processor(folder)) is not None:
            settings |= _named(folder, ("audio_token",)) | {"audio_processor": audio_processor}
            # The tokenizer's own template is for text alone; transformers does not use it either.
            source = chat_template or _chat_source(folder, None) or QWEN2_AUDIO_TEMPLATE
        processor = cls(tokenizer, chat_template=source, **settings)
        processor._check_media_tokens(folder)
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder so that this class and transformers read it back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.chat_template = self.chat.source
        self.tokenizer.save_pretrained(str(folder))
        if self.audio_processor is not None:
            named = {"processor_class": "Qwen2AudioProcessor", "audio_token": self.audio_token}
            _write(folder / "processor_config.json", named)
            _write(folder / "preprocessor_config.json", self.audio_processor.to_dict())
        if self.image_processor is None:
            return
        processor = {
            "processor_class": "LlavaProcessor",
            "image_token": self.image_token,
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
            "num_additional_image_tokens": self.num_additional_image_tokens,
        }
        _write(folder / "processor_config.json", processor)
        _write(folder / "preprocessor_config.json", self.image_processor.to_dict())

    def _check_media_tokens(self, folder: Path) -> None:
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        for kind in ("image", "audio"):
            own, token = getattr(self, f"{kind}_token_id"), getattr(self, f"{kind}_token")
            index = config.get(f"{kind}_token_index", config.get(f"{kind}_token_id"))
            if None not in (own, index) and index != own:
                raise CheckpointError(
                    f"{path} says {kind}_token_index {index}, but the tokenizer's {token!r} is "
                    f"{own}: tokenizer and model do not belong together."
                )

    # Text -----------------------------------------------------------------------------------------

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """What the tokenizer puts before a text by itself (BOS, or nothing)."""
        plain = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for i in range(len(full) - len(plain) + 1):
            if full[i : i + len(plain)] == plain:
                return full[:i]
        return []

    @property
    def eos_id(self) -> int:
        """The tokenizer's end-of-sequence token."""
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError(
                "The tokenizer names no eos_token, so answers could not end. Set eos_token in "
                "tokenizer_config.json."
            )
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Fills rows; masked everywhere, so any valid id does."""
        return self.tokenizer.pad_token_id or 0

    @functools.cached_property
    def end_id(self) -> int:
        """The token that ends an assistant turn: the template's, else eos."""
        end = self.split_end(self._tail())[2]
        return self._backend.token_to_id(end) if end else self.eos_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Where sampling stops: the turn's end token and eos."""
        ids = {self.end_id, self.tokenizer.eos_token_id} - {None}
        return tuple(sorted(ids))

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def split_end(self, tail: str) -> tuple[str, str, str]:
        """Text after an answer -> (text before its end token, rest, end token or "")."""
        match = self._added.match(tail)
        return (match[1], tail[match.end() :], match[2]) if match else ("", tail, "")

    def _tail(self) -> str:
        """What the template writes after an assistant's answer."""
        turns = (message("user", "a"), message("assistant", "\ufdd5"))
        return self.chat.render(turns, generation_prompt=False).rpartition("\ufdd5")[2]

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool, where: str = ""
    ) -> str:
        """The conversation as text; see ``ChatTemplate.render``."""
        return self.chat.render(messages, generation_prompt=generation_prompt, where=where)

    def encode(self, text: str, *, start: bool = True, where: str = "") -> Tokens:
        """Rendered (protected) text -> tokens; media placeholders stay single tokens.

        Args:
          text: from ``render``.
          start: put the tokenizer's own prefix (BOS) in front, unless the text begins with it.
          where: ``file:row`` for the error.

        Raises:
          InvalidRow: a field holds the text of a special token which this vocabulary cannot spell
            in any other way.
        """
        if OPEN in text:
            tokens = self._encode_guarded(text, where)
        else:
            encoding = self._backend.encode(text, add_special_tokens=False)
            starts, ends = zip(*encoding.offsets, strict=True) if encoding.ids else ((), ())
            tokens = Tokens(encoding.ids, list(starts), list(ends))
        bos = self.tokenizer.bos_token
        prefix = [] if not start or (bos and text.startswith(bos)) else self.prefix_ids
        zeros = [0] * len(prefix)
        return Tokens(prefix + tokens.ids, zeros + tokens.starts, zeros + tokens.ends)

    def encode_prompt(self, messages: Sequence[Message], where: str = "") -> list[int]:
        """A conversation -> the ids a sampler starts from, media placeholders not expanded."""
        return self.encode(self.render(messages, generation_prompt=True, where=where)).ids

    def decode(self, ids: Iterable[Any], *, skip_special_tokens: bool = True) -> str:
        """Token ids -> text."""
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def _guarded(self) -> tuple[Any, dict[int, int]]:
        """A tokenizer whose special tokens are spelt between two noncharacters, and its id map."""
        from tokenizers import AddedToken, Tokenizer

        description = json.loads(self._backend.to_str())
        added = description["added_tokens"]
        description |= {"added_tokens": [], "post_processor": None}
        guarded, ids = Tokenizer.from_str(json.dumps(description)), {}
        for token in added:
            content = token["content"]
            if content in self.chat.protected:
                content = f"{_GUARD_OPEN}{content}{_GUARD_CLOSE}"
            flags = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized")}
            guarded.add_tokens([AddedToken(content, special=token["special"], **flags)])
            ids[guarded.token_to_id(content)] = token["id"]
        return guarded, ids

    def _encode_guarded(self, text: str, where: str) -> Tokens:
        guarded, ids = self._guarded
        pieces, origin, at = [], [], 0
        edges = [(m.start(), m.end(), True) for m in self.chat.specials(text)]
        edges += [(m.start(), m.end(), False) for m in re.finditer(f"{OPEN}\\d+{CLOSE}", text)]
        for begin, end, special in sorted(edges):
            pieces.append(text[at:begin])
            origin.extend(range(at, begin))
            piece = text[begin:end]
            piece = f"{_GUARD_OPEN}{piece}{_GUARD_CLOSE}" if special else self.chat.reveal(piece)
            pieces.append(piece)
            origin.extend([begin] * len(piece))
            at = end
        pieces.append(text[at:])
        origin.extend(range(at, len(text) + 1))
        encoding = guarded.encode("".join(pieces), add_special_tokens=False)
        # Unknown is how some vocabularies spell such text; any other special id would be a forgery.
        forged = {self._backend.token_to_id(token) for token in self.chat.protected}
        forged -= {self.tokenizer.unk_token_id}
        if found := [i for i in encoding.ids if i in forged and i not in ids]:
            token = self._backend.id_to_token(found[0])
            raise InvalidRow(
                "special token in text",
                f"{where or 'A row'}: a field holds the text {token!r}, a special token that this "
                "vocabulary has no other spelling for. Remove it from the data.",
            )
        return Tokens(
            [ids.get(i, i) for i in encoding.ids],
            [origin[start] for start, _ in encoding.offsets],
            [origin[end] for _, end in encoding.offsets],
        )

    # Images ---------------------------------------------------------------------------------------

    def feature_count(self, height: int, width: int) -> int:
        """Tokens an image of this input size takes in the text."""
        if self.image_processor is None or self.patch_size is None:
            raise CheckpointError("This checkpoint reads no images.")
        height, width = self.image_processor.output_size(height, width)
        count = (height // self.patch_size) * (width // self.patch_size)
        count += self.num_additional_image_tokens
        return count - (self.vision_feature_select_strategy == "default")

    @property
    def fixed_feature_count(self) -> int | None:
        """Tokens per image when every image takes the same number, else None."""
        if self.image_processor is None or self.image_processor.fixed_size is None:
            return None
        return self.feature_count(*self.image_processor.fixed_size)

    def pixels(self, image: Image.Image) -> Float[np.ndarray, "3 H W"]:
        """RGB image -> normalised pixels."""
        if self.image_processor is None:
            raise CheckpointError("This checkpoint reads no images.")
        return self.image_processor(image)


def _vision_settings(folder: Path) -> dict[str, Any]:
    """Image token, patch size and which tower outputs count, from either config file."""
    names = ("image_token", "patch_size", "vision_feature_select_strategy")
    settings = _named(folder, (*names, "num_additional_image_tokens"))
    if (folder / "config.json").is_file():
        model = read_json(folder / "config.json")
        vision = model.get("vision_config") or {}
        if "patch_size" in vision:
            settings.setdefault("patch_size", vision["patch_size"])
        if strategy := model.get("vision_feature_select_strategy"):
            settings.setdefault("vision_feature_select_strategy", strategy)
        if "model_type" in vision:
            cls_token = int(vision["model_type"] in _UNCOUNTED_CLS)
            settings.setdefault("num_additional_image_tokens", cls_token)
    return settings


def _named(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Those of the settings that processor_config.json gives."""
    path = folder / "processor_config.json"
    config = read_json(path) if path.is_file() else {}
    return {name: config[name] for name in names if config.get(name) is not None}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _chat_source(folder: Path, tokenizer: Any) -> str | None:
    """The chat template: its own file, the processor's, or the tokenizer's (if one is given)."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            if source := read_json(folder / name).get("chat_template"):
                return source
    source = None if tokenizer is None else tokenizer.chat_template
    return source.get("default") if isinstance(source, dict) else source
