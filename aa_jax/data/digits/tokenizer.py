"""A real Hugging Face processor folder for the small LLaVA of this world.

The tokenizer is word-level: the world's texts are written with a space between any two tokens, so
the vocabulary is some eighty words and decoding gives back the text. Templates, special tokens and
image settings follow ``llava-hf/llava-1.5-7b-hf``, so code that reads that folder reads this one.
"""

import json
from pathlib import Path

from aa_jax.data.digits.feedback import REST, STATUSES
from aa_jax.data.digits.images import CELL, check_max_digits
from aa_jax.data.digits.tasks import FACTS
from aa_jax.errors import ConfigError

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
# The order fixes the token ids: append, never insert.
WORDS = (
    ("USER:", "ASSISTANT:", "##Response:", "##Critique:", "##Refinement:", "##Reason:")
    + tuple(str(digit) for digit in range(10))
    + (".", ",", ";", "?")
    + FACTS
    + STATUSES
    + (REST,)
    + tuple("good bad extra form fix add remove use change nothing".split())
    + tuple("the is are and a in of as".split())
    + tuple("give tell me what answer sentence short revise critique this".split())
    + tuple("all asked facts given none not clear safe text broken".split())
    + tuple("response better following rules clarity information".split())
)
# Vicuna's turns as in LLaVA-1.5: media first, then the text; </s> closes an assistant turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join(' ') %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text + '</s>' }}{% endgeneration %}"
    "{% else %}{{ text + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Blank cells become exactly zero; ink has a mean square near one.
IMAGE_MEAN, IMAGE_STD = 0.0, 0.5


def vocabulary() -> list[str]:
    """Tokens in the order of their ids: special tokens first."""
    return list(SPECIAL_TOKENS + WORDS)


def write_processor(
    folder: str | Path, max_digits: int = 3, patch: int = CELL, *, max_length: int = 512
) -> Path:
    """Writes tokenizer, image processor and processor settings that transformers loads.

    Files: tokenizer.json, tokenizer_config.json, chat_template.jinja, preprocessor_config.json,
    processor_config.json. ``AutoTokenizer``, ``LlavaProcessor`` and ``AutoProcessor`` read them.

    Args:
        folder: made if absent.
        max_digits: canvas side in digits; images are ``8 * max_digits`` pixels per side.
        patch: patch side of the vision tower in pixels.
        max_length: ``model_max_length`` of the tokenizer.

    Returns:
        The folder.

    Raises:
        ConfigError: the patches do not tile the canvas.
    """
    from transformers import PreTrainedTokenizerFast

    check_max_digits(max_digits)
    side = CELL * max_digits
    if patch < 1 or side % patch:
        raise ConfigError(
            f"patch {patch} does not tile the canvas of {side} pixels ({max_digits} digits of "
            f"{CELL}). Use a divisor of {side}; {CELL} puts one digit on one patch."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pad, bos, eos, unk, image = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_level(),
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        extra_special_tokens={"image_token": image},
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    # Written by hand: the Python classes' own files differ between transformers releases and
    # between the PIL and torchvision variants, while every release reads these keys.
    size = {"height": side, "width": side}
    image_settings = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": False,
        "size": size,
        "resample": 0,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
    }
    processor_settings = {
        "processor_class": "LlavaProcessor",
        "image_token": image,
        # One class token is added by the tower and dropped again by "default", as in LLaVA-1.5.
        "num_additional_image_tokens": 1,
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
    }
    for name, settings in (
        ("preprocessor_config.json", image_settings),
        ("processor_config.json", processor_settings),
    ):
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def _word_level():
    """The tokenizers object: split at white space, one id per word, <s> in front."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = vocabulary()
    pad, bos, eos, unk, image = SPECIAL_TOKENS
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unk)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, words.index(bos))]
    )
    return tokenizer
