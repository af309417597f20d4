"""Any stored form of an image decodes to the same RGB pixels; damage names file and row."""

import base64
import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from aa_jax.data import media
from aa_jax.data.example import Example, Media, Part, message
from aa_jax.errors import MediaError


def test_every_form_gives_the_same_pixels(kit, tmp_path):
    image = kit.random_image()
    data = kit.image_bytes(image)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "a.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    forms = [
        data,
        bytearray(data),
        str(path),
        path,
        "images/a.png",
        {"bytes": data, "path": None},
        {"bytes": None, "path": "images/a.png"},
        {"bytes": data, "path": "elsewhere.png"},
        image,
        np.asarray(image),
        f"data:image/png;base64,{text}",
        text,
    ]
    for form in forms:
        got = media.decode_image(form, root=str(tmp_path), where="t:0")
        assert got.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(got), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1", "RGB", "RGBA"])
def test_opaque_modes_equal_transformers(kit, mode):
    image = kit.random_image().convert(mode)
    expected = convert_to_rgb(image, return_numpy=True)
    np.testing.assert_array_equal(np.asarray(media.to_rgb(image)), expected)


def test_transparent_images_equal_what_transformers_loads(kit, tmp_path):
    from transformers.image_utils import load_image

    image = kit.random_image().convert("RGBA")
    image.putalpha(kit.random_image(3).convert("L").resize(image.size))
    path = tmp_path / "a.png"
    path.write_bytes(kit.image_bytes(image))
    got = media.decode_image(str(path))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(load_image(str(path))))


def test_alpha_is_dropped_not_blended():
    image = Image.new("RGBA", (2, 2), (200, 10, 20, 0))
    assert media.to_rgb(image).getpixel((0, 0)) == (200, 10, 20)


def test_transparent_palette_does_not_warn(kit):
    image = kit.random_image().quantize(16)
    data = kit.image_bytes(image, transparency=bytes([0, 128]))
    got = media.decode_image(data)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled(kit, mode):
    values = np.array([[0, 257, 65535], [128 * 257, 100, 1]], np.uint16)
    data = kit.image_bytes(Image.fromarray(values), "PNG")
    image = Image.open(io.BytesIO(data))
    got = np.asarray(media.to_rgb(image.convert(mode) if mode == "I" else image))
    np.testing.assert_array_equal(got[..., 0], [[0, 1, 255], [128, 0, 0]])


def test_orientation_is_applied_as_in_transformers(kit, tmp_path):
    from transformers.image_utils import load_image

    image = kit.random_image(0, 40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    path.write_bytes(kit.image_bytes(image, exif=exif))
    got = media.decode_image(str(path))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(load_image(str(path))))
    assert media.image_size(str(path)) == (60, 40) == (got.height, got.width)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_size_of_a_turned_image_is_that_of_its_pixels(form, kit):
    """PIL turns a TIFF file by itself; an image that came opened is turned like any other."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = kit.image_bytes(kit.random_image(0, 40, 60), form, exif=exif)
    for value in (data, Image.open(io.BytesIO(data))):
        assert media.image_size(value) == (60, 40)
        got = media.decode_image(value)
        assert (got.height, got.width) == (60, 40)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_opened_image_that_is_to_be_turned_has_a_key_of_its_own(form, kit):
    """Opened images hold the same numbers whichever way up they are."""
    exif, image = Image.Exif(), kit.random_image(0, 40, 40)
    exif[0x0112] = 6
    files = kit.image_bytes(image, form), kit.image_bytes(image, form, exif=exif)
    opened = [Image.open(io.BytesIO(data)) for data in files]
    keys = [media.media_key([("image", value)]) for value in opened]
    assert keys[0] != keys[1]
    found = [np.asarray(media.decode_image(value)) for value in opened]
    assert not np.array_equal(*found)


def test_broken_exif_is_decoded_without_a_word_and_without_touching_the_filters(kit, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words" * 10
    data = bytearray(kit.image_bytes(kit.random_image(), "JPEG", exif=exif))
    data[data.index(b"Exif") + 6 + 8] = 255  # as many tags as no file has
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Image.open(path).getexif()
    assert "Corrupt EXIF" in str(said[0].message)
    program = f"""
import threading, warnings
from aa_jax.data import media
before = list(warnings.filters)
work = lambda: [media.decode_image({str(path)!r}) for _ in range(50)]
threads = [threading.Thread(target=work) for _ in range(8)]
_ = [t.start() for t in threads], [t.join() for t in threads]
assert warnings.filters == before
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr


def test_truncated_and_foreign_bytes(kit):
    data = kit.image_bytes(kit.random_image(), "JPEG")
    with pytest.raises(MediaError, match=r"train\.parquet:7: cannot decode the image"):
        media.decode_image(data[: len(data) // 2], where="train.parquet:7")
    with pytest.raises(MediaError, match="t:1: cannot decode"):
        media.decode_image(b"not an image", where="t:1")
    with pytest.raises(MediaError, match="t:1: not an image"):
        media.image_size(b"not an image", where="t:1")
    data = kit.image_bytes(kit.random_image())[:-30]  # the header of a PNG file is whole
    with pytest.raises(MediaError, match="t:1: not an image that can be read, .*truncated"):
        media.image_size(data, where="t:1")
    with pytest.raises(MediaError, match="t:1: cannot decode the image.*truncated"):
        media.decode_image(Image.open(io.BytesIO(data)), where="t:1")


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "nothing"),
        (b"", "empty bytes"),
        ("", "empty str"),
        ({"bytes": None, "path": None}, "no content"),
        ({"bytes": "text"}, r"a mapping with \{'bytes': 'str'\}"),
        ({"path": 3}, r"a mapping with \{'path': 'int'\}"),
        ("~nobody/a.png", "media_root"),
        (3.5, "a float"),
        ("http://example.org/a.png", "Download"),
        ("missing.png", "media_root"),
    ],
)
def test_missing_media_say_what_is_wrong(value, words, tmp_path):
    with pytest.raises(MediaError, match=f"t:4.*{words}"):
        media.decode_image(value, root=str(tmp_path), where="t:4")


@pytest.mark.parametrize(
    "value, words",
    [
        (Image.new("RGB", (0, 5)), "5 x 0 pixels"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "NaN pixels"),
        (Image.fromarray(np.full((2, 2), 0.5, np.float32)), "real numbers up to 0.5; .* black"),
        (np.zeros((4, 4, 3)), r"array \[4, 4, 3\] float64; an image is"),
        (np.zeros((3, 40, 60), np.uint8), r"array \[3, 40, 60\] uint8; an image is"),
    ],
)
def test_pixels_that_are_none(value, words):
    with pytest.raises(MediaError, match=f"t:5: .*{words}"):
        media.decode_image(value, where="t:5")


def test_audio_and_video_stay_encoded(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"xx")
    parts = [Part("audio", index=0), Part("video", index=1), Part("audio", index=2)]
    wave = {"array": np.zeros(4), "sampling_rate": 16000}
    raw = [
        media.reference({"bytes": b"RIFF", "path": "a.wav"}, "audio"),
        media.reference("v.mp4", "video"),
        media.reference(wave, "audio"),
    ]
    example = Example((message("user", "hear", parts),), (), tuple(raw), "t:0")
    audio, video, samples = media.decode(example, str(tmp_path)).media
    assert audio.data == b"RIFF" and media.read_bytes(audio) == b"RIFF"
    assert video.path == str(tmp_path / "v.mp4") and media.read_bytes(video) == b"xx"
    assert samples.sampling_rate == 16000
    gone = Example(example.messages, (), (Media("video", path="gone.mp4"),), "t:9")
    with pytest.raises(MediaError, match="t:9: video file"):
        media.decode(gone, str(tmp_path))
