"""A Qwen2-VL folder: placeholders, pixels and positions of images and videos, up to the batch."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from aa_jax.data.collate import Shapes, collate, plan_shapes
from aa_jax.data.example import Example, InvalidRow, Media, Part, message
from aa_jax.data.loader import pack
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.data.video import read_frames, video_info
from aa_jax.errors import CheckpointError, DataError, MediaError


@pytest.fixture(scope="module")
def qwen(kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen_vl")
    images, ids = kit.save_qwen_vl(folder)
    return folder, images, ids, Processor.from_pretrained(folder)


def turn(text, *kinds):
    return message("user", text, [Part(kind, index=i) for i, kind in enumerate(kinds)])


def test_prompt_is_the_template_with_one_token_per_feature(qwen, kit):
    _, images, ids, processor = qwen
    pictures = (kit.random_image(0, 40, 60), kit.random_image(1, 20, 16))
    example = Example((turn("what digits?", "image", "image"),), ("three",), pictures, "t:1")
    got = encode_example(example, processor)
    grids, text = [], "<|im_start|>user\n"
    for picture in pictures:
        made = images(picture, return_tensors="np")
        grids.append(made["image_grid_thw"][0])
        text += "<|vision_start|>" + "<|image_pad|>" * (grids[-1].prod() // 4) + "<|vision_end|>"
    text += "what digits?<|im_end|>\n<|im_start|>assistant\n"
    expected = processor.tokenizer(text, add_special_tokens=False).input_ids
    np.testing.assert_array_equal(got.prompt, expected)
    places = got.prompt == ids["<|image_pad|>"]
    np.testing.assert_array_equal(got.feature_index[places], np.arange(places.sum()))
    pixels = [images(picture, return_tensors="np")["pixel_values"] for picture in pictures]
    np.testing.assert_array_equal(got.media["pixel_values"], np.concatenate(pixels))
    np.testing.assert_array_equal(got.media["grid_thw"], grids)
    assert got.next_position == got.positions[-1].max() + 1 < len(got.prompt)
    assert encode_example(example, processor, pixels=False).sizes == got.sizes


def test_a_batch_of_free_sizes(qwen, kit):
    """Prompt | chosen | rejected with two images, beside a text-only row."""
    _, _, _, processor = qwen
    pictures = (kit.random_image(0, 40, 60), kit.random_image(1, 20, 16))
    seen = Example((turn("see?", "image", "image"),), ("yes", "no no"), pictures)
    plain = Example((turn("hello"),), ("a", "b"))
    items = [encode_example(e, processor) for e in (seen, plain)]
    shapes = plan_shapes(items, "preference")
    assert shapes.patches == items[0].patches and shapes.patch_numbers == 3 * 2 * 16
    batch = collate(items, shapes, "preference", batch_rows=3)
    assert batch["positions"].shape == (3, shapes.length, 3)
    assert batch["media"]["pixel_values"].shape == (3, shapes.patches, 96)
    np.testing.assert_array_equal(batch["media"]["grid_thw"][1:], 0)
    prompt, after = len(items[0].prompt), items[0].next_position
    np.testing.assert_array_equal(batch["positions"][0, :prompt], items[0].positions)
    at = prompt
    for response in items[0].responses:  # both go on where the prompt ended
        steps = after + np.arange(len(response))
        span = batch["positions"][0, at : at + len(response)]
        np.testing.assert_array_equal(span, np.stack([steps] * 3, -1))
        at += len(response)
    text_only = collate(items[1:], plan_shapes(items[1:], "preference"), "preference")
    assert text_only["positions"].ndim == 2 and "media" not in text_only
    narrow = Shapes(64, 8, images=2, patches=4, patch_numbers=96)
    with pytest.raises(DataError, match="patches of 96 numbers, .* Raise patches in the shapes"):
        collate(items[:1], narrow, "preference")


def test_packing_counts_patches(qwen, kit):
    _, _, _, processor = qwen
    one = Example((turn("see?", "image"),), ("yes",), (kit.random_image(0),))
    item = encode_example(one, processor)
    sizes = [item.sizes] * 4
    wide = Shapes(400, 40, images=4, patches=2 * item.patches, patch_numbers=96)
    assert sorted(map(len, pack(sizes, wide))) == [2, 2]
    batch = collate([[item, item]], wide, "supervised")
    half = item.patches
    pixels = batch["media"]["pixel_values"][0]
    np.testing.assert_array_equal(pixels[:half], pixels[half:])
    assert batch["feature_index"].max() == 2 * (half // 4) - 1
    length = len(item.prompt) + len(item.responses[0])
    positions = batch["positions"][0]
    np.testing.assert_array_equal(positions[:length], positions[length : 2 * length])


def film(frames=8, rate=4, height=24, width=32):
    """Frames of one grey each, brighter and brighter, losslessly encoded."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        video = container.add_stream("ffv1", rate=rate)
        video.width, video.height, video.pix_fmt = width, height, "bgr0"
        for i in range(frames):
            picture = Image.new("RGB", (width, height), (20 * i, 20 * i, 20 * i))
            for packet in video.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in video.encode():
            container.mux(packet)
    return stream.getvalue()


def test_a_video_file_is_sampled_and_placed(kit, tmp_path):
    """8 frames at 4 per second, 2 per second wanted: frames 0, 2, 4, 6, two per patch; at 3
    tokens per second and a second per patch the times are 0 and 3."""
    images, ids = kit.save_qwen_vl(tmp_path, tokens_per_second=3)
    (tmp_path / "video_preprocessor_config.json").write_text(
        '{"min_pixels": 64, "max_pixels": 1024, "fps": 2}'
    )
    processor = Processor.from_pretrained(tmp_path)
    (tmp_path / "film.mkv").write_bytes(film())
    example = Example((turn("count", "video"),), (), (Media("video", path="film.mkv"),), "t:2")
    item = encode_example(example, processor, root=str(tmp_path), pixels=False)
    data = Example(example.messages, (), (Media("video", data=film()),), "t:2")
    got = encode_example(data, processor)
    assert got.sizes == item.sizes
    np.testing.assert_array_equal(got.media["grid_thw"], [[2, 6, 8]])
    places = got.prompt == ids["<|video_pad|>"]
    assert places.sum() == 2 * 6 * 8 // 4
    start = int(np.argmax(places))
    assert sorted(set((got.positions[places, 0] - start).tolist())) == [0, 3]
    pixels = got.media["pixel_values"].reshape(2, -1, 3, 2, 4, 4)
    for i, number in enumerate((0, 2, 4, 6)):
        grey = images(Image.new("RGB", (32, 24), (20 * number,) * 3), return_tensors="np")
        expected = grey["pixel_values"].reshape(-1, 3, 2, 4, 4)[:, :, 0]
        np.testing.assert_array_equal(pixels[i // 2, :, :, i % 2], expected)


def test_decoded_frames_need_no_file(qwen):
    frames = np.zeros((3, 16, 24, 3), np.uint8)
    frames[1] = 50
    media = Media("video", array=frames, sampling_rate=2)
    info = video_info(media)
    assert (info.frames, info.rate, info.height, info.width) == (3, 2.0, 16, 24)
    assert np.asarray(read_frames(media, [1])[0]).max() == 50
    with pytest.raises(MediaError, match=r"t:4: decoded video frames must be .* \[2, 3\] uint8"):
        video_info(Media("video", array=np.zeros((2, 3), np.uint8)), where="t:4")


def test_bad_videos_name_the_row(tmp_path):
    with pytest.raises(MediaError, match="t:5: cannot read the video, 4 bytes"):
        video_info(b"none", where="t:5")
    with pytest.raises(MediaError, match="t:6: video file 'no.mp4' is not at"):
        video_info("no.mp4", root=str(tmp_path), where="t:6")
    with pytest.raises(MediaError, match="t:6: expected a video, found an Image"):
        video_info(Image.new("RGB", (8, 8)), where="t:6")
    for shape in ((0, 8, 8, 3), (3, 8, 0, 3)):
        with pytest.raises(MediaError, match="t:6: decoded video frames must be"):
            video_info(
                Media("video", array=np.zeros(shape, np.uint8), sampling_rate=2), where="t:6"
            )
    with pytest.raises(MediaError, match="t:7: the video ends before frame 9"):
        read_frames(film(), [0, 9], where="t:7")


def test_wrong_rows_and_folders_are_refused(qwen, kit, tmp_path):
    folder, _, ids, processor = qwen
    wide = Example((turn("see", "image"),), ("x",), (kit.random_image(0, 2, 900),), "t:8")
    with pytest.raises(InvalidRow, match="t:8: 2 x 900 pixels"):
        encode_example(wide, processor)
    sound = Example((turn("hear", "audio"),), ("x",), (Media("audio", data=b"x"),), "t:9")
    with pytest.raises(DataError, match="t:9: has an audio, but this checkpoint reads text, image"):
        encode_example(sound, processor)
    swapped = kit.QWEN_VL_TEMPLATE.replace("<|video_pad|>", "<|image_pad|>")
    other = Processor.from_pretrained(folder, chat_template=swapped)
    frames = Media("video", array=np.zeros((2, 16, 16, 3), np.uint8), sampling_rate=1)
    clip = Example((turn("see", "video"),), ("x",), (frames,), "t:10")
    with pytest.raises(MediaError, match="t:10: its media are video, but .* placeholders for imag"):
        encode_example(clip, other)
    kit.save_qwen_vl(tmp_path)
    config = (tmp_path / "config.json").read_text()
    wrong = config.replace(f'"video_token_id": {ids["<|video_pad|>"]}', '"video_token_id": 3')
    (tmp_path / "config.json").write_text(wrong)
    with pytest.raises(CheckpointError, match="says video_token_id 3, but .*'<|video_pad|>'"):
        Processor.from_pretrained(tmp_path)


def test_saved_folder_is_the_same_processor(qwen, kit, tmp_path):
    _, _, _, processor = qwen
    processor.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert again.image_processor == processor.image_processor
    example = Example((turn("see", "image"),), ("x",), (kit.random_image(4),))
    left, right = (encode_example(example, p) for p in (processor, again))
    np.testing.assert_array_equal(left.prompt, right.prompt)
    np.testing.assert_array_equal(left.media["pixel_values"], right.media["pixel_values"])
