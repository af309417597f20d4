"""Small real tokenizers and checkpoint folders, built on the spot."""

import functools
import io
import json
import types

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "USER: what digits do you see in this picture? ASSISTANT: three, seven and one.",
    "the sum of the digits is eleven; hello world, how are you today?",
    "system You are a helpful assistant. user assistant\n the largest digit is nine 0123456789",
] * 4

# The form of llava-hf/llava-1.5: images first, a space after each text, no end token, no BOS.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_VL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)


def _wrap(tokenizer, **names):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@functools.cache
def _spm():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=["▁"],
        show_progress=False,
    )
    pieces = [word for text in CORPUS for word in text.replace(" ", " |").split("|")]
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer.to_str()


@functools.cache
def _byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
        + ["<|bos|>", "<|head|>", "<|/head|>", "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer.to_str()


def spm_tokenizer():
    """Llama-like: metaspace BPE, BOS added by the tokenizer."""
    return _wrap(
        Tokenizer.from_str(_spm()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


def chatml_tokenizer():
    """Qwen-like: byte-level BPE, no BOS, turns end with <|im_end|>."""
    return _wrap(
        Tokenizer.from_str(_byte_level()), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def llama3_tokenizer():
    """Llama-3-like: the tokenizer adds BOS, and the template writes it too."""
    tokenizer = Tokenizer.from_str(_byte_level())
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", bos)]
    )
    return _wrap(tokenizer, bos_token="<|bos|>", eos_token="<|eot|>")


def pil_image_processor(size=28):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    edges = {"height": size, "width": size}
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=edges)


def hf_processor(tokenizer, template, size=28, patch=7):
    """A transformers LlavaProcessor: the other side of the parity tests."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        pil_image_processor(size),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def save_llava(folder, tokenizer=None, template=LLAVA_TEMPLATE, size=28, patch=7):
    """Writes a checkpoint folder the way transformers does; returns the HF processor."""
    processor = hf_processor(tokenizer or spm_tokenizer(), template, size, patch)
    processor.save_pretrained(folder)
    return processor


def save_qwen_vl(folder, tokens_per_second=None, template=QWEN_VL_TEMPLATE, **settings):
    """A Qwen2-VL checkpoint folder without weights; 4-pixel patches, 2 x 2 of them a feature."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = chatml_tokenizer()
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    save_text(folder, tokenizer, template)
    pixels = {"min_pixels": 64, "max_pixels": 1024, "patch_size": 4, **settings}
    images = Qwen2VLImageProcessorPil(**pixels)
    images.save_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
    kind = "qwen2_vl" if tokens_per_second is None else "qwen2_5_vl"
    config = {
        "model_type": kind,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {"patch_size": 4},
    }
    if tokens_per_second is not None:
        config["vision_config"]["tokens_per_second"] = tokens_per_second
    (folder / "config.json").write_text(json.dumps(config))
    return images, ids


def save_text(folder, tokenizer, template):
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def random_image(seed=0, height=40, width=60):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_bytes(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """Builders, and processors that were loaded from folders."""
    from aa_jax.data.processor import Processor

    def text_processor(name, tokenizer, template):
        folder = tmp_path_factory.mktemp(name)
        save_text(folder, tokenizer, template)
        return Processor.from_pretrained(folder)

    folder = tmp_path_factory.mktemp("llava")
    hf = save_llava(folder)
    return types.SimpleNamespace(
        hf=hf,
        llava_folder=folder,
        llava=Processor.from_pretrained(folder),
        chatml=text_processor("chatml", chatml_tokenizer(), CHATML_TEMPLATE),
        llama3=text_processor("llama3", llama3_tokenizer(), LLAMA3_TEMPLATE),
        plain=text_processor("plain", spm_tokenizer(), None),
        plain_bytes=text_processor("plain_bytes", chatml_tokenizer(), None),
        spm_tokenizer=spm_tokenizer,
        chatml_tokenizer=chatml_tokenizer,
        save_llava=save_llava,
        save_text=save_text,
        save_qwen_vl=save_qwen_vl,
        QWEN_VL_TEMPLATE=QWEN_VL_TEMPLATE,
        hf_processor=hf_processor,
        random_image=random_image,
        image_bytes=image_bytes,
        LLAVA_TEMPLATE=LLAVA_TEMPLATE,
        CHATML_TEMPLATE=CHATML_TEMPLATE,
    )
