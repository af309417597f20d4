"""Audio from files and columns, and log-mel features against transformers."""

import base64
import io

import numpy as np
import pytest
import soundfile
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import load_audio

from aa_jax.data.audio import audio_length, decode_audio
from aa_jax.data.audio_features import AudioProcessor, load_audio_processor
from aa_jax.data.example import InvalidRow, Media
from aa_jax.errors import CheckpointError, MediaError


def tone(samples, channels=1, seed=0):
    noise = np.random.default_rng(seed).normal(size=(samples, channels)) * 0.1
    return np.clip(noise, -0.9, 0.9).astype(np.float32)


def encoded(samples, rate, form="WAV", subtype=None):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=form, subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("rate", "channels", "form", "subtype"),
    [(16000, 1, "WAV", "PCM_16"), (44100, 2, "WAV", "PCM_24"), (8000, 1, "FLAC", None),
     (22050, 2, "OGG", None), (48000, 3, "WAV", "FLOAT")],
)  # fmt: skip
def test_files_are_decoded_as_transformers_does(rate, channels, form, subtype, tmp_path):
    """Mixed down, resampled, to the sample; from bytes, a path, a data URL; length from the
    header."""
    data = encoded(tone(4321, channels), rate, form, subtype)
    path = tmp_path / "clip"
    path.write_bytes(data)
    expected = load_audio(str(path), sampling_rate=16000, backend="soundfile")
    url = "data:audio/wav;base64," + base64.b64encode(data).decode()
    for value in (data, str(path), {"bytes": data, "path": None}, url, Media("audio", data=data)):
        found = decode_audio(value, 16000)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        assert audio_length(value, 16000) == len(expected)
    np.testing.assert_array_equal(decode_audio("clip", 16000, root=str(tmp_path)), expected)


def test_decoded_columns():
    """Arrays as datasets hands them out: either axis order, floats or integers."""
    samples = tone(900, 2)
    mono = samples.mean(axis=1)
    for array in (samples, samples.T, samples.astype(np.float64)):
        found = decode_audio({"array": array, "sampling_rate": 16000}, 16000)
        np.testing.assert_allclose(found, mono, atol=1e-7)
    integers = np.rint(mono * 32768).astype(np.int16)
    found = decode_audio({"array": integers, "sampling_rate": 16000}, 16000)
    np.testing.assert_array_equal(found, integers / np.float32(32768))
    assert audio_length({"array": mono, "sampling_rate": 44100}, 16000) == 327  # ceil(326.5)


BAD = {
    "text": (b"this is not audio at all, only text", "cannot decode.*35 bytes.*WAV"),
    "empty": (encoded(np.zeros((0, 1)), 16000), "no samples"),
    "nan": ({"array": np.array([0.0, np.nan]), "sampling_rate": 16000}, "NaN"),
    "loud": ({"array": np.array([0.0, 3000.0]), "sampling_rate": 16000}, "3000.*look like int"),
    "bytes": ({"array": np.zeros(9, np.uint8), "sampling_rate": 16000}, "type uint8"),
    "cube": ({"array": np.zeros((2, 3, 4)), "sampling_rate": 16000}, r"shape \(2, 3, 4\)"),
    "no rate": (Media("audio", array=np.zeros(9)), "without a sampling rate"),
    "null rate": ({"array": np.zeros(9), "sampling_rate": None}, "without a sampling rate"),
    "image": (Media("image", data=b"x"), "expected audio, found image"),
    "cut": (encoded(tone(500), 16000)[:-100], "truncated.*1000 bytes of samples, 900 are"),
    "cut flac": (encoded(tone(50000), 16000, "FLAC")[:20000], "truncated|cannot decode"),
    "no data": (encoded(tone(500), 16000)[:30], "without samples|cannot decode"),
    "null": (None, "nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_clips_name_their_row(case):
    value, words = BAD[case]
    with pytest.raises(MediaError, match=f"rows.jsonl:7.*({words})"):
        decode_audio(value, 16000, where="rows.jsonl:7")


SETTINGS = {
    "qwen2-audio": dict(feature_size=128),
    "one second": dict(feature_size=80, chunk_length=1),
    "uneven hop": dict(feature_size=16, chunk_length=1, hop_length=150, sampling_rate=16000),
    "another rate": dict(
        feature_size=8, chunk_length=1, sampling_rate=22050, n_fft=512, hop_length=256
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_features_are_transformers(name):
    """Bit for bit those of its numpy path, in silence, noise and at the chunk's very end; the
    attention mask's length too."""
    settings = SETTINGS[name]
    ours, theirs = AudioProcessor(**settings), WhisperFeatureExtractor(**settings)
    lengths = [1, 399, 1000, ours.samples - 250, ours.samples + 1000]
    lengths = [lengths[2]] if name == "qwen2-audio" else lengths
    for length in lengths:
        wave = tone(length, seed=length)[:, 0]
        padded = np.pad(wave[: ours.samples], (0, max(0, ours.samples - length)))
        expected = theirs._np_extract_fbank_features(padded[None], "cpu")[0]
        found = ours(wave, truncate=True)
        assert found.dtype == np.float32 and found.shape == (ours.feature_size, ours.frames)
        np.testing.assert_array_equal(found, expected)
        batch = theirs(
            wave, sampling_rate=ours.sampling_rate, return_attention_mask=True, return_tensors="np"
        )
        assert batch["attention_mask"].sum() == ours.frame_count(length)
        np.testing.assert_allclose(found, batch["input_features"][0], atol=1e-4)


def test_feature_count_is_the_towers():
    """transformers' `_get_feat_extract_output_lengths`, for every length of clip."""
    processor = AudioProcessor(chunk_length=1)
    for samples in range(321, 16001, 7):
        frames = -(-samples // 160)
        after_conv = (frames - 1) // 2 + 1
        assert processor.feature_count(samples) == (after_conv - 2) // 2 + 1
    with pytest.raises(InvalidRow, match="row 3: .*320 samples long.*too short"):
        processor.feature_count(320, "row 3")
    with pytest.raises(InvalidRow, match="row 3: .*lasts 1.5 s, the model hears 1 s"):
        processor.feature_count(24000, "row 3")
    with pytest.raises(InvalidRow, match="lasts 1.5 s"):
        processor(np.zeros(24000, np.float32))


def test_settings_of_a_folder(tmp_path):
    theirs = WhisperFeatureExtractor(feature_size=20, chunk_length=3)
    theirs.save_pretrained(tmp_path)
    ours = load_audio_processor(tmp_path)
    assert ours == AudioProcessor(feature_size=20, chunk_length=3)
    assert AudioProcessor.from_dict(ours.to_dict()) == ours
    again = WhisperFeatureExtractor(**ours.to_dict())
    assert again.to_dict()["nb_max_frames"] == ours.frames
    assert load_audio_processor(tmp_path / "nothing") is None
    with pytest.raises(CheckpointError, match="dither to 0.1"):
        AudioProcessor.from_dict({**ours.to_dict(), "dither": 0.1}, "folder")
    with pytest.raises(CheckpointError, match="'SpeechT5FeatureExtractor'"):
        AudioProcessor.from_dict({"feature_extractor_type": "SpeechT5FeatureExtractor"})
