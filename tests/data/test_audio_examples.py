"""Conversations with audio: a Qwen2-Audio folder against transformers' processor, and batches."""

import io

import numpy as np
import pytest
import soundfile
from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

from aa_jax.data.collate import collate, plan_shapes
from aa_jax.data.example import Example, InvalidRow, Media, Part, message
from aa_jax.data.loader import pack
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.errors import CheckpointError, DataError, MediaError

RATE = 16000


def clip(samples, seed=0):
    return (np.random.default_rng(seed).normal(size=samples) * 0.1).astype(np.float32)


def wav(samples, rate=RATE):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype="FLOAT")
    return Media("audio", data=stream.getvalue())


@pytest.fixture(scope="module")
def qwen(kit, tmp_path_factory):
    """(transformers' processor, ours from the folder it wrote, the folder)."""
    tokenizer = kit.chatml_tokenizer()
    names = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer.add_tokens(names, special_tokens=True)
    # As in the published folders: a template for text alone, which must not be used.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    theirs = Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=12, chunk_length=1), tokenizer
    )
    folder = tmp_path_factory.mktemp("qwen2_audio")
    theirs.save_pretrained(folder)
    return theirs, Processor.from_pretrained(folder), folder


def conversation(clips, responses=()):
    """A system turn, the clips one after the other with text between, one question."""
    parts = []
    for index in range(len(clips)):
        parts += [Part("audio", index=index), Part("text", text="what digit?")]
    turns = (message("system", "be kind"), message("user", "hello"), message("assistant", "hi"))
    media = tuple(map(wav, clips))
    return Example((*turns, message("user", "x", parts[:-1])), responses, media, "t:1")


def test_ids_and_features_are_transformers(qwen):
    theirs, ours, _ = qwen
    clips = [clip(9000), clip(321, 1), clip(16000, 2)]
    example = conversation(clips)
    found = encode_example(example, ours)
    content = [
        {"type": "text", "text": p.text} if p.type == "text" else {"type": "audio", "audio": "x"}
        for p in example.messages[-1].content
    ]
    turns = [{"role": m.role, "content": m.text} for m in example.messages[:-1]]
    turns.append({"role": "user", "content": content})
    text = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    expected = theirs(text=[text], audio=clips, sampling_rate=RATE, return_tensors="np")
    np.testing.assert_array_equal(found.prompt, expected["input_ids"][0])
    lengths = expected["feature_attention_mask"].sum(-1)
    np.testing.assert_array_equal(found.media["feature_lengths"], lengths)
    np.testing.assert_allclose(found.media["input_features"], expected["input_features"], atol=1e-4)
    places = found.prompt == ours.audio_token_id
    np.testing.assert_array_equal(found.feature_index[places], np.arange(places.sum()))
    assert (found.feature_index[~places] == -1).all()


def test_lengths_are_known_without_decoding(qwen):
    _, ours, _ = qwen
    example = conversation([clip(5000), clip(2000)], ("three", "seven one"))
    whole, light = encode_example(example, ours), encode_example(example, ours, pixels=False)
    assert whole.sizes == light.sizes and not light.media
    np.testing.assert_array_equal(whole.prompt, light.prompt)
    # 5,000 samples are 32 frames; two more of padding reach into the convolutions.
    assert whole.media["input_features"].shape == (2, 12, 36)


def test_rows_of_several_examples(qwen):
    """Clips of a packed row in order, shorter ones padded; features counted through."""
    _, ours, _ = qwen
    items = [
        encode_example(conversation(clips, ("three",)), ours)
        for clips in ([clip(5000)], [clip(900, 1), clip(16000, 2)], [])
    ]
    shapes = plan_shapes(items, "supervised")
    assert shapes.media == {"input_features": (2, 12, 100), "feature_lengths": (2,)}
    batch = collate(items, shapes, "supervised", batch_rows=4)
    assert batch["media"]["input_features"].shape == (4, 2, 12, 100)
    assert batch["media"]["feature_lengths"].tolist() == [[32, 0], [6, 100], [0, 0], [0, 0]]
    assert batch["media"]["feature_lengths"].dtype == np.int32
    assert (batch["feature_index"][2:] == -1).all()
    import dataclasses

    media = {name: (3, *shape[1:]) for name, shape in shapes.media.items()}
    wide = dataclasses.replace(shapes, length=400, response_length=20, media=media)
    packed = collate([items[:2]], wide, "supervised")
    assert packed["media"]["feature_lengths"].tolist() == [[32, 6, 100]]
    for n, item in enumerate((items[0].media["input_features"], items[1].media["input_features"])):
        at = slice(0, 1) if n == 0 else slice(1, 3)
        width = item.shape[-1]
        np.testing.assert_array_equal(packed["media"]["input_features"][0, at, :, :width], item)
    index = packed["feature_index"][0]
    np.testing.assert_array_equal(index[index >= 0], np.arange((index >= 0).sum()))
    assert pack([item.sizes for item in items], wide) in (
        [(0, 1, 2)], [(0, 2, 1)], [(1, 0, 2)], [(1, 2, 0)], [(2, 0, 1)], [(2, 1, 0)]
    )  # fmt: skip
    with pytest.raises(DataError, match=r"t:1: its row needs input_features of \[3, 12, 100\]"):
        collate([items[:2]], dataclasses.replace(wide, media=shapes.media), "supervised")


def test_what_cannot_be_heard_is_named(qwen, kit):
    _, ours, _ = qwen
    with pytest.raises(InvalidRow, match="t:1: .*lasts 1.1 s, the model hears 1 s") as error:
        encode_example(conversation([clip(18000)]), ours)
    assert error.value.reason == "audio too long"
    with pytest.raises(MediaError, match="t:1: cannot decode the audio clip"):
        broken = conversation([clip(900)]).replace(media=(Media("audio", data=b"no sound"),))
        encode_example(broken, ours)
    image = Example((message("user", "x", [Part("image", index=0)]),), (), (kit.random_image(),))
    with pytest.raises(DataError, match="has an image, but this checkpoint reads text, audio"):
        encode_example(image, ours)
    with pytest.raises(DataError, match="has an audio, but this checkpoint reads text, image"):
        encode_example(conversation([clip(900)]), kit.llava)
    forged = encode_example(Example((message("user", "say <|AUDIO|>"),)), ours)
    assert ours.audio_token_id not in forged.prompt


def test_folders(qwen, kit, tmp_path):
    """Ours is read back by both; a folder whose parts do not belong together is refused."""
    theirs, ours, _ = qwen
    ours.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert again.audio_processor == ours.audio_processor
    example = conversation([clip(5000)])
    np.testing.assert_array_equal(
        encode_example(example, again).prompt, encode_example(example, ours).prompt
    )
    extractor = Qwen2AudioProcessor.from_pretrained(tmp_path).feature_extractor
    assert extractor.to_dict()["nb_max_frames"] == 100
    (tmp_path / "config.json").write_text('{"audio_token_index": 7}')
    with pytest.raises(CheckpointError, match="audio_token_index 7, but.*'<|AUDIO|>'"):
        Processor.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no token '<|AUDIO|>' to stand for an audio"):
        Processor(kit.chatml_tokenizer(), audio_processor=ours.audio_processor)
