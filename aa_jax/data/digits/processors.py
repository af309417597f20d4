"""Processor folders of the small checkpoints of this world, one per family beside LLaVA's.

Word-level tokenizers over the world's words, as in :mod:`tokenizer`, with the special tokens and
turns of the family.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aa_jax.data.audio_features import AudioProcessor
from aa_jax.data.digits import film
from aa_jax.data.digits.images import CELL, check_max_digits
from aa_jax.data.digits.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, WORDS
from aa_jax.data.image_tokens import BEGIN, END
from aa_jax.data.patches import PatchProcessor, VideoSettings
from aa_jax.data.processor import Processor

# Words of the orders to make media, of the reading of Align-Anything's system prompt, and roles.
MORE_WORDS = tuple("draw dial animate one to every digit reverse say".split()) + tuple(
    "You helpful assistant. system user assistant".split()
)
QWEN_TOKENS = (
    ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
    + ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    + ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
)
CHAMELEON_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", BEGIN, END)
# ChatML; media stand in front of the text, each between the tokens of its family.
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|> ' }}"
    "{% elif part['type'] == 'video' %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|> ' }}"
    "{% elif part['type'] == 'audio' %}{{ '<|audio_bos|><|AUDIO|><|audio_eos|> ' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def words(special: Sequence[str]) -> list[str]:
    """A family's vocabulary in the order of its ids."""
    return list(dict.fromkeys((*special, *WORDS, *MORE_WORDS)))


def _tokenizer(special: Sequence[str], roles: dict[str, str], template: str, prefix: bool) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    table = {word: index for index, word in enumerate(words(special))}
    backend = Tokenizer(models.WordLevel(table, unk_token=roles["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    if prefix:
        bos = roles["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, table[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        chat_template=template,
        **roles,
    )


def _qwen(template: str = _CHATML) -> Any:
    roles = {"pad_token": "<|pad|>", "eos_token": "<|im_end|>", "unk_token": "<|unk|>"}
    return _tokenizer(QWEN_TOKENS, roles, template, prefix=False)


def write_text_processor(folder: str | Path) -> Path:
    """A Llama with the turns and words of the small LLaVA: digits in the text."""
    roles = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL_TOKENS,
                     strict=False))  # fmt: skip
    tokenizer = _tokenizer(SPECIAL_TOKENS, roles, CHAT_TEMPLATE, prefix=True)
    return _save(Processor(tokenizer, chat_template=CHAT_TEMPLATE), folder)


def write_audio_processor(folder: str | Path, *, mels: int = 64, seconds: int = 1) -> Path:
    """A Qwen2-Audio; ``seconds`` is the chunk a clip is padded to (three digits last 0.44 s)."""
    made = AudioProcessor(feature_size=mels, chunk_length=seconds)
    return _save(Processor(_qwen(), chat_template=_CHATML, audio_processor=made), folder)


def write_video_processor(folder: str | Path) -> Path:
    """A Qwen2-VL of 4-pixel patches, four to a feature, at two frames per second."""
    area = (film.SIDE**2, film.SIDE**2)
    made = PatchProcessor(
        patch_size=CELL // 2,
        merge_size=2,
        pixels=area,
        video=VideoSettings(pixels=area, fps=float(film.RATE), min_frames=film.LEAST_FRAMES),
        image_mean=(0.0,) * 3,
        image_std=(0.5,) * 3,
    )
    processor = Processor(
        _qwen(), chat_template=_CHATML, image_processor=made, image_token="<|image_pad|>",
        video_token="<|video_pad|>", media_borders=("<|vision_start|>", "<|vision_end|>"),
    )  # fmt: skip
    return _save(processor, folder)


def write_image_token_processor(folder: str | Path, max_digits: int = 3, *, patch: int = 4) -> Path:
    """A Chameleon whose images are ``8 * max_digits`` pixels and a token per ``patch`` pixels."""
    check_max_digits(max_digits)
    side = CELL * max_digits
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = _tokenizer(CHAMELEON_TOKENS, roles, CHAT_TEMPLATE, prefix=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    size = {"height": side, "width": side}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "ChameleonImageProcessor",
            "do_resize": False,
            "size": size,
            "crop_size": size,
        },
        "processor_config.json": {
            "processor_class": "ChameleonProcessor",
            "image_token": "<image>",
            "image_seq_length": (side // patch) ** 2,
        },
    }
    for name, settings in files.items():
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def _save(processor: Processor, folder: str | Path) -> Path:
    processor.save_pretrained(folder)
    return Path(folder)
