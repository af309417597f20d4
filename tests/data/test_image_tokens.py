"""Images as tokens of the text: a Chameleon folder against transformers, questions and answers."""

import numpy as np
import pytest
from transformers import ChameleonProcessor
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from aa_jax.data.collate import collate, plan_shapes
from aa_jax.data.example import Example, Message, Part, message
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import Limits, encode_example
from aa_jax.errors import CheckpointError, DataError, MediaError

LENGTH, FIRST = 4, 300  # tokens of an image; the vocabulary's image tokens follow from here


def encode(pixels):
    """A stand-in for the VQGAN: four tokens that say how bright each quarter is."""
    quarters = pixels.reshape(len(pixels), 3, 2, 14, 2, 14).mean((1, 3, 5)).reshape(-1, LENGTH)
    return FIRST + np.rint((quarters + 1) * 50).astype(np.int32)


@pytest.fixture(scope="module")
def folder(kit, tmp_path_factory):
    """(transformers' processor, the folder it wrote)."""
    tokenizer = kit.spm_tokenizer()
    tokenizer.add_tokens(["<racm3:break>", "<eoss>"], special_tokens=True)
    pixels = ChameleonImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    theirs = ChameleonProcessor(pixels, tokenizer, image_seq_length=LENGTH)
    path = tmp_path_factory.mktemp("chameleon")
    theirs.save_pretrained(path)
    return theirs, path


def test_ids_and_pixels_are_transformers(folder, kit):
    """Two images among the text, behind placeholders, as its own processor writes them."""
    theirs, path = folder
    ours = Processor.from_pretrained(path)
    images = [kit.random_image(0), kit.random_image(1, 50, 30)]
    parts = [
        Part("image", index=0),
        Part("text", text="and"),
        Part("image", index=1),
        Part("text", text="what digits?"),
    ]
    found = encode_example(Example((Message("user", tuple(parts)),), (), tuple(images)), ours)
    text = "USER: <image>\nand<image>\nwhat digits?\nASSISTANT: "
    expected = theirs(
        images=images, text=text, return_for_text_completion=True, return_tensors="np"
    )
    np.testing.assert_array_equal(found.prompt, expected["input_ids"][0])
    np.testing.assert_array_equal(found.media["pixel_values"], expected["pixel_values"])
    places = found.prompt == ours.image_token_id
    np.testing.assert_array_equal(found.feature_index[places], np.arange(2 * LENGTH))
    assert found.images == 2 and (found.feature_index[~places] == -1).all()


def test_a_folder_without_template_writes_turns_as_transformers_does(folder, kit, tmp_path):
    """A question is its parts and the separator; the answer ends with one too."""
    theirs, _ = folder
    tokenizer = kit.spm_tokenizer()
    names = ["<racm3:break>", "<eoss>", "<reserved08706>"]
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.sep_token = "<reserved08706>"
    theirs = ChameleonProcessor(theirs.image_processor, tokenizer, image_seq_length=LENGTH)
    theirs.save_pretrained(tmp_path)
    ours = Processor.from_pretrained(tmp_path)
    image = kit.random_image()
    parts = (Part("image", index=0), Part("text", text="what digits?"))
    found = encode_example(Example((Message("user", parts),), ("three",), (image,)), ours)
    expected = theirs(images=[image], text="<image>what digits?", return_tensors="np")
    np.testing.assert_array_equal(found.prompt, expected["input_ids"][0])
    assert found.responses[0][-1] == ours.end_id == tokenizer.sep_token_id


def test_images_made_tokens_are_plain_text(folder, kit):
    """The same ids but for the image tokens; nothing else is left of the images."""
    _, path = folder
    plain, ours = (Processor.from_pretrained(path, image_encoder=e) for e in (None, encode))
    image = kit.random_image()
    example = Example((message("user", "what?", (Part("image", index=0),)),), ("three",), (image,))
    left, right = encode_example(example, plain), encode_example(example, ours)
    places = left.feature_index >= 0
    np.testing.assert_array_equal(right.prompt[~places], left.prompt[~places])
    np.testing.assert_array_equal(right.prompt[places], encode(left.media["pixel_values"])[0])
    assert not right.media and right.images == 0 and (right.feature_index == -1).all()
    light = encode_example(example, ours, pixels=False)
    assert light.sizes == right.sizes
    batch = collate([right], plan_shapes([right], "supervised"), "supervised")
    assert "media" not in batch and "feature_index" not in batch


def test_images_as_answers(folder, kit):
    """begin, image tokens, end inside the answer, among its text, with its end token; targets."""
    _, path = folder
    ours = Processor.from_pretrained(path, image_encoder=encode)
    images = tuple(kit.random_image(seed) for seed in range(3))
    drawn = Message(
        "assistant",
        (Part("text", text="three "), Part("image", index=1), Part("image", index=2)),
    )
    asked = message("user", "draw", (Part("image", index=0),))
    example = Example((asked,), (drawn, "no"), images, "t:3")
    found = encode_example(example, ours)
    pixels = np.stack([ours.pixels(image) for image in images])
    spans = [
        [ours.image_tokens.begin_id, *span, ours.image_tokens.end_id] for span in encode(pixels)
    ]
    words = encode_example(example.replace(responses=("three", "no")), ours)
    wanted = [*words.responses[0][:-1], *spans[1], *spans[2], ours.eos_id]
    text = [i for i in found.responses[0].tolist() if ours.decode([i]).strip() or i not in (3, 4)]
    assert found.responses[0].tolist()[-(2 * (LENGTH + 2) + 1) :] == wanted[-(2 * LENGTH + 5) :]
    assert ours.decode(text[: -(2 * (LENGTH + 2) + 1)]).strip() == "three"
    np.testing.assert_array_equal(found.responses[1], words.responses[1])
    start = found.prompt.tolist().index(ours.image_tokens.begin_id)
    assert found.prompt[start : start + LENGTH + 2].tolist() == spans[0]
    light = encode_example(example, ours, pixels=False)
    assert light.sizes == found.sizes
    batch = collate([found], plan_shapes([found], "preference"), "preference")
    assert batch["targets"][0, 0, : len(found.responses[0])].tolist() == found.responses[0].tolist()
    limited = Limits(max_response_length=LENGTH)
    with pytest.raises(DataError, match="t:3: the response has"):
        encode_example(example, ours, limited)


def test_refusals(folder, kit, tmp_path):
    _, path = folder
    image = kit.random_image()
    drawn = Message("assistant", (Part("image", index=0),))
    example = Example((message("user", "draw"),), (drawn,), (image,), "t:3")
    with pytest.raises(DataError, match="t:3: the response holds image.*image_encoder"):
        encode_example(example, Processor.from_pretrained(path))
    with pytest.raises(DataError, match="t:3: the response holds image"):
        encode_example(example, kit.llava)
    few = Processor.from_pretrained(path, image_encoder=lambda pixels: encode(pixels)[:, :3])
    with pytest.raises(MediaError, match="t:3: the image tokenizer makes 3 tokens.*have 4"):
        encode_example(example, few)
    forged = Example((message("user", "a"),), ("\ufdd6 <image>",), (), "t:3")
    ours = Processor.from_pretrained(path, image_encoder=encode)
    assert ours.image_token_id not in encode_example(forged, ours).responses[0]
    theirs = ChameleonProcessor(ChameleonImageProcessorPil(), kit.spm_tokenizer())
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no token '<racm3:break>'"):
        Processor.from_pretrained(tmp_path)


def test_folders_come_back(folder, tmp_path, kit):
    theirs, path = folder
    ours = Processor.from_pretrained(path)
    ours.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert again.image_tokens == ours.image_tokens
    assert again.image_processor == ours.image_processor
    assert ChameleonProcessor.from_pretrained(tmp_path).image_seq_length == LENGTH
