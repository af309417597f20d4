"""Tokenizer, chat template, image and audio processor of a Hugging Face checkpoint folder.

``tokenizer.json`` is used as it stands, as the model was trained with it. Nothing here needs torch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from aa_jax.data.anyres import AnyresProcessor
from aa_jax.data.audio_chat import AUDIO_TOKEN, QWEN2_AUDIO_TEMPLATE
from aa_jax.data.audio_features import AudioProcessor, load_audio_processor
from aa_jax.data.chat import CLOSE, OPEN, ChatTemplate
from aa_jax.data.example import InvalidRow, Message, message
from aa_jax.data.folder import (
    audio_settings,
    chat_source,
    patch_settings,
    vision_settings,
    write_json,
)
from aa_jax.data.image_tokens import (
    CHAMELEON_TEMPLATE,
    Encoder,
    ImageTokens,
    image_token_settings,
)
from aa_jax.data.images import ImageProcessor, load_image_processor, read_json
from aa_jax.data.media import image_size
from aa_jax.data.mrope import Grid
from aa_jax.data.patches import PatchProcessor, sample_frames
from aa_jax.data.prepared import Prepared, Tokens
from aa_jax.data.video import read_frames, video_info
from aa_jax.errors import CheckpointError, DataError

_GUARD_OPEN, _GUARD_CLOSE = "\ufdd2", "\ufdd3"


class Processor:
    """Everything between an Example and token ids or pixels.

    Args:
      tokenizer: a Hugging Face fast tokenizer (``transformers.PreTrainedTokenizerFast``).
      chat_template: Jinja source; None falls back to ``USER: ...`` lines.
      image_processor: how pixels are made; None for a text model. A `PatchProcessor` reads
        images and videos of any size (Qwen2-VL).
      image_token: the special token that stands for an image.
      video_token: the one that stands for a video, with a `PatchProcessor`.
      media_borders: tokens around a placeholder where the folder has no chat template.
      patch_size: edge of a vision patch, pixels.
      vision_feature_select_strategy: ``default`` drops the tower's first token, ``full`` keeps it.
      num_additional_image_tokens: tokens the tower adds to its patches (CLS: 1).
      audio_processor: how log-mel features are made; None for a model that does not hear.
      audio_token: the special token that stands for a clip.
      image_tokens: how images are written as tokens of the text (Chameleon).

    Raises:
      CheckpointError: an image processor without image token or patch size, or an audio processor
        without audio token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        image_processor: ImageProcessor | PatchProcessor | AnyresProcessor | None = None,
        image_token: str = "<image>",
        video_token: str | None = None,
        media_borders: tuple[str, str] = ("", ""),
        patch_size: int | None = None,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 1,
        audio_processor: AudioProcessor | None = None,
        audio_token: str = AUDIO_TOKEN,
        image_tokens: ImageTokens | None = None,
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
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self.packs_patches = isinstance(image_processor, PatchProcessor)
        self.video_token = video_token if self.packs_patches else None
        self.audio_processor, self.image_tokens = audio_processor, image_tokens
        self.audio_token = audio_token if audio_processor else None
        kinds = ("image", "video", "audio")
        # What stands for a medium of each kind the checkpoint reads.
        self.media_tokens = {k: t for k in kinds if (t := getattr(self, f"{k}_token"))}
        named = (tokenizer.bos_token, tokenizer.eos_token, *self.media_tokens.values())
        special |= {token for token in named if token}
        # A turn may end with a token that is added but not marked special.
        self._added = re.compile(
            r"(\s*)(" + "|".join(re.escape(t.content) for t in added if t.content.strip()) + ")"
            if added
            else r"(?!)()"
        )
        self.placeholder_ids = {
            kind: self._placeholder_id(kind, token) for kind, token in self.media_tokens.items()
        }
        sized = patch_size or image_tokens or self.packs_patches
        if image_processor is not None and not sized:
            raise CheckpointError(
                "The checkpoint makes pixels but gives no patch_size: it belongs into "
                "processor_config.json, or vision_config of config.json."
            )
        self._borders = media_borders
        placeholders = {
            kind: media_borders[0] + token + media_borders[1]
            for kind, token in self.media_tokens.items()
        }
        self.chat = ChatTemplate(tokenizer, chat_template, placeholders, sorted(special))
        end = self.split_end(self._tail())[2]
        if end and end not in special:
            self.chat = ChatTemplate(tokenizer, chat_template, placeholders, [*special, end])

    def _placeholder_id(self, kind: str, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise CheckpointError(
                f"The tokenizer has no token {token!r} to stand for an {kind}; add it as a special "
                f"token, or name the right one as {kind}_token in processor_config.json."
            )
        return found

    @property
    def image_token_id(self) -> int | None:
        """The token that stands for a feature of an image; None for a text model."""
        return self.placeholder_ids.get("image")

    @property
    def audio_token_id(self) -> int | None:
        """The token that stands for a feature of a clip; None for a model that does not hear."""
        return self.placeholder_ids.get("audio")

    # From and to a folder -------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        media: bool = True,
        chat_template: str | None = None,
        image_encoder: Encoder | None = None,
    ) -> Processor:
        """Loads a checkpoint folder.

        Args:
          folder: with ``tokenizer.json``; for image and audio models also
            ``preprocessor_config.json``, or a ``processor_config.json`` that holds the processor.
          media: False reads a multimodal folder as a text model.
          chat_template: replaces the folder's own.
          image_encoder: makes the images of a Chameleon folder tokens, see `ImageTokens`.

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
            packed = isinstance(image_processor, PatchProcessor)
            settings = (patch_settings if packed else vision_settings)(folder)
            if getattr(image_processor, "name", "") == "ChameleonImageProcessor":
                backend = tokenizer.backend_tokenizer
                settings = image_token_settings(folder, backend, image_encoder)
            settings["image_processor"] = image_processor
        source = chat_template or chat_source(folder, tokenizer)
        if "image_tokens" in settings and source is None and tokenizer.sep_token:
            source = CHAMELEON_TEMPLATE
        if media and (audio_processor := load_audio_processor(folder)) is not None:
            settings |= audio_settings(folder) | {"audio_processor": audio_processor}
            # The tokenizer's own template is for text alone; transformers does not use it either.
            source = chat_template or chat_source(folder, None) or QWEN2_AUDIO_TEMPLATE
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
            made = self.audio_processor.to_dict()
            write_json(folder, {"processor_config.json": named, "preprocessor_config.json": made})
        if self.image_processor is None:
            return
        if self.packs_patches:
            self._save_patches(folder)
            return
        tiled = isinstance(self.image_processor, AnyresProcessor)
        processor = {
            "processor_class": f"Llava{'Next' * tiled}Processor",
            "image_token": self.image_token,
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
            "num_additional_image_tokens": self.num_additional_image_tokens,
        }
        if self.image_tokens is not None:
            processor = {
                "processor_class": "ChameleonProcessor",
                "image_token": self.image_token,
                "image_seq_length": self.image_tokens.length,
            }
        files = {
            "processor_config.json": processor,
            "preprocessor_config.json": self.image_processor.to_dict(),
        }
        write_json(folder, files)

    def _save_patches(self, folder: Path) -> None:
        seconds = self.image_processor.tokens_per_second is not None
        name = "Qwen2_5_VLProcessor" if seconds else "Qwen2VLProcessor"
        files = {
            "preprocessor_config.json": self.image_processor.to_dict(),
            "video_preprocessor_config.json": self.image_processor.video_dict(),
        }
        write_json(folder, {k: v | {"processor_class": name} for k, v in files.items()})

    def _check_media_tokens(self, folder: Path) -> None:
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        for kind, found in self.placeholder_ids.items():
            name = f"{kind}_token_index" if f"{kind}_token_index" in config else f"{kind}_token_id"
            index, token = config.get(name), self.media_tokens[kind]
            if index is not None and index != found:
                raise CheckpointError(
                    f"{path} says {name} {index}, but the tokenizer's {token!r} is {found}: "
                    "tokenizer and model do not belong together."
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

    # Media ----------------------------------------------------------------------------------------

    def prepare(
        self, kind: str, item: Any, *, pixels: bool, root: str | None = None, where: str = ""
    ) -> Prepared:
        """An image, video or clip -> what the tower and the text need of it.

        Args:
          kind: ``image``, ``video`` or ``audio``.
          item: for ``pixels`` a decoded image; otherwise any reference to one. Videos and audio
            are read here.
          pixels: False works out lengths alone.
          root: folder of relative paths.
          where: ``file:row`` for errors.

        Raises:
          DataError: the checkpoint does not read this kind.
          InvalidRow: an image of impossible proportions, a clip too long or too short.
        """
        if kind not in self.placeholder_ids:
            raise DataError(
                f"{where or 'An example'}: this checkpoint's processor reads no {kind}. Use a "
                "model for this modality."
            )
        if kind == "video":
            return self._prepare_video(item, pixels, root, where)
        if kind == "audio":
            count, frames, made = self.audio_processor.prepare(
                item, features=pixels, root=root, where=where
            )
            return Prepared(count, pixels=made, frames=frames)
        if pixels:
            given = (item.height, item.width)
        elif self.fixed_feature_count is None:
            given = image_size(item, root=root, where=where)
        else:
            given = (1, 1)  # any size gives the same
        if isinstance(self.image_processor, AnyresProcessor):
            return self.image_processor.prepare(item if pixels else None, given, self.patch_size)
        if not self.packs_patches:
            size = self.image_processor.output_size(*given)
            made, count = self.image_processor(item) if pixels else None, self.feature_count(*given)
            ids = None if self.image_tokens is None else self.image_tokens.ids(made, where)
            return Prepared(count, size=size, pixels=made, ids=ids)
        grid = self.image_processor.grid(*given, where=where)
        made = self.image_processor(item, grid) if pixels else None
        return Prepared(self._features(grid), grid=grid, pixels=made)

    def _prepare_video(self, item: Any, pixels: bool, root: str | None, where: str) -> Prepared:
        make = self.image_processor
        info = video_info(item, root=root, where=where)
        taken = sample_frames(info.frames, info.rate, make.video, make.temporal_patch_size)
        seconds = info.frames / info.rate / len(taken)
        grid = make.video_grid(len(taken), seconds, (info.height, info.width), where)
        made = None
        if pixels:
            frames = read_frames(item, taken.tolist(), root=root, where=where)
            made = make.patches(frames, grid)
        return Prepared(self._features(grid), grid=grid, pixels=made)

    def _features(self, grid: Grid) -> int:
        return grid.features(self.image_processor.merge_size)

    def feature_count(self, height: int, width: int) -> int:
        """Tokens an image of this input size takes in the text."""
        if self.packs_patches:
            return self._features(self.image_processor.grid(height, width))
        if self.image_tokens is not None:
            return self.image_tokens.length + 2
        if self.image_processor is None or self.patch_size is None:
            raise CheckpointError("This checkpoint reads no images.")
        if isinstance(self.image_processor, AnyresProcessor):
            return self.image_processor.prepare(None, (height, width), self.patch_size).count
        height, width = self.image_processor.output_size(height, width)
        count = (height // self.patch_size) * (width // self.patch_size)
        count += self.num_additional_image_tokens
        return count - (self.vision_feature_select_strategy == "default")

    @property
    def fixed_feature_count(self) -> int | None:
        """Tokens per image when every image takes the same number, else None."""
        if self.image_processor is None or self.packs_patches:
            return None
        if self.image_processor.fixed_size is None:
            return None
        return self.feature_count(*self.image_processor.fixed_size)

    def pixels(self, image: Image.Image) -> Float[np.ndarray, "*shape"]:
        """RGB image -> normalised pixels [3, H, W], or its patches [N, K]."""
        if self.image_processor is None:
            raise CheckpointError("This checkpoint reads no images.")
        return self.prepare("image", image, pixels=True).pixels
