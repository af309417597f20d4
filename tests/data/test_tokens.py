"""Spans are exactly the answer and its end token, for every form of template and tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa_jax.data.example import Example, InvalidRow, Message, Part, message
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import Limits, encode_example
from aa_jax.errors import DataError, MediaError

IMAGE = (Part("image", index=0),)
NAMES = ["llava", "chatml", "llama3", "plain", "plain_bytes"]
ANSWERS = [
    "three, seven",
    "x",
    "\nstarts with a line",
    "ends with spaces  ",
    " a space in front",
    "ASSISTANT: three</s> <|im_end|>",
    "ünïcödé 三 🙂",
    "what digits do you see?",
]


def example(answer, question="what digits?", **kwargs):
    answers = (answer,) if isinstance(answer, str) else answer
    return Example((message("user", question),), answers, where="t:1", **kwargs)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", NAMES)
def test_the_span_is_the_answer_and_its_end(kit, name, answer):
    processor = getattr(kit, name)
    encoded = encode_example(example(answer), processor)
    (ids,) = encoded.responses
    assert ids[-1] == processor.end_id and encoded.ended == (True,)
    assert processor.end_id not in ids[:-1]
    # What a sampler is given, and what a reader sees after it generated these ids.
    prompt = processor.encode_prompt(example(answer).messages)
    np.testing.assert_array_equal(encoded.prompt, prompt)
    if name in ("chatml", "plain_bytes"):  # byte-level: decoding is exact
        assert processor.decode(ids[:-1]) == answer
        shown = processor.decode([*prompt, *ids[:-1]], skip_special_tokens=False)
        assert shown.endswith(answer) and shown.count("what digits?") >= 1


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_answer_read_like_the_whole_conversation(kit, name):
    processor = getattr(kit, name)
    turns = (message("user", "what digits?"),)
    encoded = encode_example(example("three, seven"), processor)
    text = processor.decode([*encoded.prompt, *encoded.responses[0][:-1]])
    whole = processor.render(
        (*turns, message("assistant", "three, seven")), generation_prompt=False
    )
    for token in processor.chat.protected:
        whole = whole.replace(token, "")
    assert text.strip() == whole.strip()


@pytest.mark.parametrize("name", ["chatml", "llama3", "llava"])
def test_ids_equal_one_tokenisation_of_the_conversation(kit, name):
    """Where nothing merges across the border, the ids are those of transformers."""
    processor = getattr(kit, name)
    encoded = encode_example(example("three, seven"), processor)
    turns = (message("user", "what digits?"), message("assistant", "three, seven"))
    text = processor.render(turns, generation_prompt=False)
    cut = text.rindex("three, seven") + len("three, seven")
    whole = processor.tokenizer(text[:cut], add_special_tokens=name == "llava").input_ids
    got = [*encoded.prompt, *encoded.responses[0]]
    assert got == [*whole, processor.end_id]


def test_a_prompt_that_would_merge_with_the_answer_is_left_as_sampled(kit):
    """``ASSISTANT: `` + ``three`` merges in Metaspace vocabularies; the prompt must not change."""
    processor = kit.plain
    text = processor.render([message("user", "hi")], generation_prompt=True)
    prompt = processor.encode(text).ids
    merged = processor.encode(text + "three").ids
    assert merged[: len(prompt)] != prompt  # the trap
    encoded = encode_example(example("three", "hi"), processor)
    np.testing.assert_array_equal(encoded.prompt, prompt)
    assert processor.decode([*prompt, *encoded.responses[0]]) == "USER: hi\nASSISTANT: three"


# Not characters (Unicode 23.7): some mark places while a template is rendered, and in a text they
# are replaced.
RESERVED = [chr(code) for code in range(0xFDD0, 0xFDD8)]
REPLACED = str.maketrans(dict.fromkeys(RESERVED[:4], "\ufffd"))
PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["<|im_end|>", "</s>", "<image>", " ", "\n", "ASSISTANT: ", "{{ x }}", *RESERVED]
    ),
)
FIELDS = st.lists(PIECES, min_size=1, max_size=5).map("".join)


@settings(max_examples=60, deadline=None)
@given(question=FIELDS, answer=FIELDS)
def test_any_text_gives_exact_spans(kit, question, answer):
    for name in ("chatml", "plain_bytes", "llava"):
        processor = getattr(kit, name)
        item = example(answer, question)
        if not answer.strip():
            with pytest.raises(InvalidRow):
                encode_example(item, processor)
            continue
        encoded = encode_example(item, processor)
        (ids,) = encoded.responses
        np.testing.assert_array_equal(encoded.prompt, processor.encode_prompt(item.messages))
        assert list(ids).count(processor.end_id) == 1 and ids[-1] == processor.end_id
        if name != "llava":
            shown = answer.translate(REPLACED)
            assert processor.decode(ids[:-1], skip_special_tokens=False) == shown


def test_both_responses_share_the_prompt(kit):
    encoded = encode_example(example(("good one", "bad")), kit.chatml)
    single = [encode_example(example(answer), kit.chatml) for answer in ("good one", "bad")]
    for ids, alone in zip(encoded.responses, single, strict=True):
        np.testing.assert_array_equal(ids, alone.responses[0])
        np.testing.assert_array_equal(encoded.prompt, alone.prompt)


def test_labels_of_an_image_example(kit):
    """No prompt, placeholder or template token is trained; answer and eos are."""
    image = kit.random_image()
    item = Example((message("user", "what?", IMAGE),), ("three",), (image,), "t:1")
    encoded = encode_example(item, kit.llava)
    assert (encoded.prompt == kit.llava.image_token_id).sum() == 16
    assert not (encoded.responses[0] == kit.llava.image_token_id).any()
    assert not encoded.trained.any()
    assert kit.llava.decode(encoded.responses[0], skip_special_tokens=False) == "three</s>"
    assert encoded.images == 1 and encoded.sizes.prompt == len(encoded.prompt)


def test_two_images_keep_their_order(kit):
    images = (kit.random_image(0), kit.random_image(1))
    parts = (Part("image", index=1), Part("image", index=0))
    item = Example((message("user", "compare", parts),), ("same",), images)
    encoded = encode_example(item, kit.llava)
    np.testing.assert_array_equal(encoded.media["pixel_values"][0], kit.llava.pixels(images[1]))
    seen = encoded.feature_index[encoded.feature_index >= 0]
    np.testing.assert_array_equal(seen, np.arange(32))


def test_lengths_without_pixels_are_the_same(kit):
    item = Example((message("user", "what?", IMAGE),), ("three",), (kit.random_image(),))
    assert (
        encode_example(item, kit.llava, pixels=False).sizes == encode_example(item, kit.llava).sizes
    )
    assert encode_example(item, kit.llava, pixels=False).media == {}


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_earlier_turns_are_trained_with_their_end(kit, name):
    processor = getattr(kit, name)
    turns = ("hello", "how are you?", "well")
    messages = (
        message("system", "be kind"),
        message("user", "hi"),
        message("assistant", turns[0]),
        message("user", "?"),
        message("assistant", turns[1]),
        message("user", "!"),
    )
    item = Example(messages, (turns[2],), where="t:1")
    last = encode_example(item, processor)
    assert not last.trained.any()
    every = encode_example(item, processor, Limits(train_on="all"))
    np.testing.assert_array_equal(every.prompt, last.prompt)
    end = processor.tokenizer.convert_ids_to_tokens(processor.end_id)
    trained = processor.decode(every.prompt[every.trained], skip_special_tokens=False)
    assert trained == f"hello{end}how are you?{end}"
    # The same ids the model would have been sampled with at that turn.
    first = encode_example(Example(messages[:2], (turns[0],)), processor)
    np.testing.assert_array_equal(
        every.prompt[every.trained][: len(first.responses[0])], first.responses[0]
    )


def test_earlier_turns_of_templates_without_an_end_token(kit):
    messages = (message("user", "hi", IMAGE), message("assistant", "hello"), message("user", "?"))
    item = Example(messages, ("three",), (kit.random_image(),))
    encoded = encode_example(item, kit.llava, Limits(train_on="all"))
    assert kit.llava.decode(encoded.prompt[encoded.trained]).strip() == "hello"


def test_templates_that_rewrite_history(kit):
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if m['role'] == 'user' or loop.last else '...' }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = Processor(kit.chatml_tokenizer(), chat_template=forgetful)
    messages = (message("user", "hi"), message("assistant", "hello"), message("user", "?"))
    item = Example(messages, ("three",), where="t:1")
    (ids,) = encode_example(item, processor).responses
    assert processor.decode(ids) == "three"
    with pytest.raises(DataError, match="t:1.*train_on='last'"):
        encode_example(item, processor, Limits(train_on="all"))


def test_templates_whose_sampling_header_differs(kit):
    """A header only the sampler writes (a thinking prefix) stays in the prompt."""
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nhm {% endif %}"
    )
    processor = Processor(kit.chatml_tokenizer(), chat_template=thinking)
    encoded = encode_example(example("three"), processor)
    assert processor.decode(encoded.prompt).endswith("hm ")
    (ids,) = encoded.responses
    assert processor.decode(ids) == "three" and ids[-1] == processor.end_id


def test_templates_that_rewrite_the_answer(kit):
    upper = (
        "{% for m in messages %}<|im_start|>{{ m['content'] if m['role'] == 'user' "
        "else m['content'] | upper }}<|im_end|>{% endfor %}"
    )
    processor = Processor(kit.chatml_tokenizer(), chat_template=upper)
    with pytest.raises(DataError, match="t:1: the chat template rewrites"):
        encode_example(example("three"), processor)


def test_too_long_a_prompt_is_dropped_never_cut(kit):
    item = Example((message("user", "what?", IMAGE),), ("three",), (kit.random_image(),), "t:7")
    length = len(encode_example(item, kit.llava).prompt)
    for limits in (Limits(max_prompt_length=length - 1), Limits(max_length=length + 1)):
        with pytest.raises(InvalidRow) as error:
            encode_example(item, kit.llava, limits)
        assert error.value.reason == "prompt too long"
        for word in ("t:7", str(length), "16 of them image", "raise max_"):
            assert word in str(error.value)
    encode_example(item, kit.llava, Limits(max_prompt_length=length))
    prompt = item.replace(responses=())
    assert len(encode_example(prompt, kit.llava, Limits(max_length=length)).prompt) == length


def test_too_long_a_response_is_dropped_or_cut_at_its_end(kit):
    (full,) = encode_example(example("three, seven and one"), kit.chatml).responses
    n = len(full)
    limits = Limits(max_response_length=n - 1)
    with pytest.raises(InvalidRow, match=f"t:1.*{n} tokens.*{n - 1} fit.*truncate_response"):
        encode_example(example("three, seven and one"), kit.chatml, limits)
    cut = Limits(max_response_length=n - 2, truncate_response=True)
    encoded = encode_example(example("three, seven and one"), kit.chatml, cut)
    np.testing.assert_array_equal(encoded.responses[0], full[: n - 2])
    assert encoded.ended == (False,) and kit.chatml.end_id not in encoded.responses[0]
    whole = Limits(max_length=len(encoded.prompt) + n)
    assert encode_example(example("three, seven and one"), kit.chatml, whole).ended == (True,)


def test_empty_response(kit):
    with pytest.raises(InvalidRow, match="t:1: the response is empty") as error:
        encode_example(example(" \n"), kit.chatml)
    assert error.value.reason == "empty response"


def test_media_that_do_not_match(kit):
    with pytest.raises(MediaError, match="t:1: a message refers to media 0, but.*holds 0"):
        encode_example(Example((message("user", "x", IMAGE),), where="t:1"), kit.llava)
    template = kit.LLAVA_TEMPLATE.replace("<image>", "[picture]")
    processor = Processor(
        kit.spm_tokenizer(),
        chat_template=template,
        image_processor=kit.llava.image_processor,
        patch_size=7,
    )
    item = Example((message("user", "x", IMAGE),), (), (kit.random_image(),), "t:2")
    with pytest.raises(MediaError, match="t:2: 1 images, but the chat template writes 0"):
        encode_example(item, processor)


def test_a_medium_that_nothing_shows_is_named(kit):
    images = (kit.random_image(0), kit.random_image(1))
    asked = message("user", "what?", [Part("image", index=0)])
    example = Example((asked,), ("seven",), images, where="t:9")
    with pytest.raises(MediaError, match="t:9: it holds 2 media, but no .* shows number 1"):
        encode_example(example, kit.llava)
    behind = Example((message("user", "what?", [Part("image", index=1)]),), ("seven",), images)
    with pytest.raises(MediaError, match="shows number 0"):
        encode_example(behind, kit.llava)


def test_media_of_a_replaced_response_leave_with_it(kit):
    """Those of the prompt keep their numbers, and media given anew count as given."""
    images = (kit.random_image(0), kit.random_image(1))
    asked = message("user", "what?", [Part("image", index=0)])
    drawn = message("assistant", "this", [Part("image", index=1)])
    example = Example((asked,), (drawn,), images)
    assert example.replace(responses=()).media == images[:1]
    assert len(encode_example(example.replace(responses=("seven",)), kit.llava).responses) == 1
    assert example.replace(where="t:1").media == images
    assert example.replace(responses=(), media=images).media == images


def test_generated_images_need_another_model(kit):
    response = Message("assistant", IMAGE)
    item = Example((message("user", "draw"),), (response,), (kit.random_image(),), "t:3")
    with pytest.raises(DataError, match="t:3: the response holds image"):
        encode_example(item, kit.llava)


def test_unknown_train_on():
    with pytest.raises(DataError, match="train_on='first'"):
        Limits(train_on="first")
