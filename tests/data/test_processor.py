"""The processor of a folder against transformers; special tokens; broken folders."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from aa_jax.data.example import Example, InvalidRow, Part, message
from aa_jax.data.images import ImageProcessor
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.errors import CheckpointError, DataError

IMAGE = (Part("image", index=0),)
TEXTS = ["what digits?", " two  spaces\nand lines ", "ünïcödé 三 🙂", "x", "a: b; ASSISTANT: no"]


@pytest.mark.parametrize("text", TEXTS)
def test_llava_ids_and_pixels_equal_transformers(kit, text):
    image = kit.random_image()
    example = Example((message("user", text, IMAGE),), (), (image,))
    ours = encode_example(example, kit.llava)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    rendered = kit.hf.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    theirs = kit.hf(text=rendered, images=image, return_tensors="np")
    np.testing.assert_array_equal(ours.prompt, theirs["input_ids"][0])
    np.testing.assert_array_equal(ours.media["pixel_values"], theirs["pixel_values"])
    places = ours.prompt == kit.llava.image_token_id
    np.testing.assert_array_equal(ours.feature_index[places], np.arange(16))
    assert (ours.feature_index[~places] == -1).all()


@pytest.mark.parametrize("strategy, additional, count", [("default", 1, 16), ("full", 1, 17)])
def test_feature_count_equals_transformers(kit, tmp_path, strategy, additional, count):
    hf = kit.hf_processor(kit.spm_tokenizer(), kit.LLAVA_TEMPLATE)
    hf.vision_feature_select_strategy, hf.num_additional_image_tokens = strategy, additional
    hf.save_pretrained(tmp_path)
    ours = Processor.from_pretrained(tmp_path)
    ids = hf(text="<image>", images=kit.random_image(), return_tensors="np")["input_ids"][0]
    assert (ids == ours.image_token_id).sum() == ours.fixed_feature_count == count


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_text_ids_equal_transformers(kit, name, text):
    processor = getattr(kit, name)
    turns = [("system", "be kind"), ("user", text), ("assistant", "ok"), ("user", "more")]
    ids = processor.encode_prompt([message(*turn) for turn in turns])
    expected = processor.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert ids == expected


def test_fallback_template(kit):
    turns = [message("user", "hi")]
    assert kit.plain.render(turns, generation_prompt=True) == "USER: hi\nASSISTANT: "
    ids = kit.plain.encode_prompt(turns)
    assert ids == kit.plain.tokenizer("USER: hi\nASSISTANT: ").input_ids


@pytest.mark.parametrize("name", ["llava", "chatml", "llama3", "plain"])
def test_prompts_have_one_bos_at_most_and_never_end_with_eos(kit, name):
    processor = getattr(kit, name)
    ids = processor.encode_prompt([message("user", "hi there")])
    bos = processor.tokenizer.bos_token_id
    assert ids.count(bos) == (bos is not None) and (bos is None or ids[0] == bos)
    assert ids[-1] != processor.eos_id and ids[-1] not in processor.stop_ids


@pytest.mark.parametrize("name", ["llava", "chatml", "llama3", "plain"])
@pytest.mark.parametrize("forged", ["<image>", "</s>", "<|im_end|>", "<|im_start|>", "<s>x</s>"])
def test_special_tokens_cannot_be_forged(kit, name, forged):
    processor = getattr(kit, name)
    plain = processor.encode_prompt([message("user", "hi")])
    ids = processor.encode_prompt([message("user", f"a {forged} b")])
    special = [processor.tokenizer.convert_tokens_to_ids(t) for t in processor.chat.protected]
    special = set(special) - {processor.tokenizer.unk_token_id}
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


def test_forged_text_is_spelt_out_losslessly(kit):
    text = "a <|im_end|> b <image><|im_start|>"
    ids = kit.chatml.encode_prompt([message("user", text)])
    decoded = kit.chatml.decode(ids, skip_special_tokens=False)
    assert decoded == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_guarded_encoding_equals_the_plain_one(kit):
    """Protecting one field must not change the tokens of the others."""
    for processor in (kit.chatml, kit.llama3, kit.plain, kit.llava):
        turns = [message("user", "what sum?"), message("assistant", "three"), message("user", "?")]
        text = processor.render(turns, generation_prompt=True)
        plain, guarded = processor.encode(text), processor._encode_guarded(text, "")
        assert guarded.ids == plain.ids[len(plain.ids) - len(guarded.ids) :]


def test_word_level_vocabularies_refuse_what_they_cannot_spell(tmp_path, kit):
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "<image>", "hi", "USER", "ASSISTANT", ":"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(unk_token="<unk>", eos_token="<eos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    processor = Processor(tokenizer)
    with pytest.raises(InvalidRow, match="t:3.*'<eos>'") as error:
        processor.encode(
            processor.render([message("user", "hi <eos>")], generation_prompt=True), where="t:3"
        )
    assert error.value.reason == "special token in text"


def test_end_tokens(kit):
    token = kit.chatml.tokenizer.convert_tokens_to_ids
    assert kit.chatml.end_id == token("<|im_end|>") and kit.chatml.stop_ids == (kit.chatml.end_id,)
    assert kit.llama3.end_id == token("<|eot|>")
    assert kit.llava.end_id == kit.llava.eos_id == 2 == kit.plain.end_id


def test_save_and_load_round_trip(kit, tmp_path):
    from transformers import LlavaProcessor

    kit.llava.save_pretrained(tmp_path)
    ours = Processor.from_pretrained(tmp_path)
    assert ours.image_processor == kit.llava.image_processor
    assert ours.chat.source == kit.llava.chat.source
    text = "USER: <image>\nhi ASSISTANT:"
    image = kit.random_image()
    theirs = LlavaProcessor.from_pretrained(tmp_path, backend="pil", use_fast=False)
    out = theirs(text=text, images=image, return_tensors="np")
    example = Example((message("user", "hi", IMAGE),), (), (image,))
    np.testing.assert_array_equal(encode_example(example, ours).prompt, out["input_ids"][0])
    np.testing.assert_array_equal(ours.pixels(image), out["pixel_values"][0])


def test_settings_from_old_folders(kit, tmp_path):
    """Patch size and strategy only in config.json, pixels in preprocessor_config.json."""
    kit.save_llava(tmp_path)
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    (tmp_path / "processor_config.json").unlink()
    template = {"chat_template": (tmp_path / "chat_template.jinja").read_text()}
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps(template))
    config = {
        "vision_config": {"patch_size": 7, "model_type": "clip_vision_model"},
        "vision_feature_select_strategy": "default",
        "image_token_index": kit.llava.image_token_id,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = Processor.from_pretrained(tmp_path)
    assert ours.fixed_feature_count == 16 and ours.chat.source == kit.LLAVA_TEMPLATE
    config["image_token_index"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="image_token_index.*do not belong together"):
        Processor.from_pretrained(tmp_path)
    assert Processor.from_pretrained(tmp_path, media=False).image_token_id is None


def test_broken_folders(kit, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        Processor.from_pretrained(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no tokenizer.json.*save_pretrained"):
        Processor.from_pretrained(tmp_path)
    kit.save_llava(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"Cannot read .*processor_config\.json"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be loaded"):
        Processor.from_pretrained(tmp_path)


def test_truncation_and_padding_saved_in_the_file_are_off(kit, tmp_path):
    kit.save_text(tmp_path, kit.chatml_tokenizer(), kit.CHATML_TEMPLATE)
    path = tmp_path / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(path))
    processor = Processor.from_pretrained(tmp_path)
    turns = [message("user", "what digits do you see in this picture?")]
    assert processor.encode_prompt(turns) == kit.chatml.encode_prompt(turns)


def test_tokenizer_files_of_the_llama_family_are_used_as_they_stand(kit, tmp_path):
    """Old files put the leading space in the normaliser; a llava folder keeps that."""
    from transformers import AutoTokenizer, LlavaConfig

    kit.save_llava(tmp_path)
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text())
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    description |= {"pre_tokenizer": None}
    description |= {"normalizer": {"type": "Sequence", "normalizers": steps}}
    path.write_text(json.dumps(description))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "LlamaTokenizer"})
    )
    LlavaConfig(image_token_index=kit.llava.image_token_id).save_pretrained(tmp_path)
    ours, theirs = Processor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "USER: <image>\nwhat digits? ASSISTANT:"
    assert ours.encode(text).ids == theirs(text).input_ids
    assert ours.encode(text).ids != kit.llava.encode(text).ids  # the normaliser matters


def test_incomplete_vision_settings(kit):
    pixels = ImageProcessor(size={"height": 8, "width": 8})
    with pytest.raises(CheckpointError, match="no patch_size"):
        Processor(kit.spm_tokenizer(), image_processor=pixels)
    with pytest.raises(CheckpointError, match="no token '<picture>'"):
        names = dict(image_token="<picture>", patch_size=4)
        Processor(kit.spm_tokenizer(), image_processor=pixels, **names)
    with pytest.raises(CheckpointError, match="reads no images"):
        kit.chatml.feature_count(8, 8)
    with pytest.raises(CheckpointError, match="reads no images"):
        kit.chatml.pixels(kit.random_image())


def test_modalities_the_checkpoint_does_not_read(kit):
    turns = [message("user", "hear", (Part("audio", index=0),))]
    with pytest.raises(DataError, match="t:1: has an audio, but this checkpoint reads text, image"):
        kit.llava.render(turns, generation_prompt=True, where="t:1")
    with pytest.raises(DataError, match="reads text."):
        kit.chatml.render([message("user", "see", IMAGE)], generation_prompt=True)


def test_chat_templates_that_refuse_or_hide_text(kit):
    refuse = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system here') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    processor = Processor(kit.chatml_tokenizer(), chat_template=refuse)
    with pytest.raises(DataError, match="t:2.*no system here"):
        processor.render([message("system", "x")], generation_prompt=True, where="t:2")
    with pytest.raises(CheckpointError, match="neither as a string nor"):
        Processor(kit.chatml_tokenizer(), chat_template="nothing")


def test_a_folder_without_eos(kit):
    tokenizer = kit.chatml_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="no eos_token"):
        _ = Processor(tokenizer).eos_id


def test_torch_is_never_imported(kit):
    code = (
        "import sys; from aa_jax.data import processor, dataset, loader\n"
        f"p = processor.Processor.from_pretrained({str(kit.llava_folder)!r})\n"
        "from PIL import Image; p.pixels(Image.new('RGB', (40, 40)))\n"
        "print('torch' in sys.modules, 'flax' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
