"""The digits as text, tones and films, and answers that are media: makers against readers."""

import io
import json

import datasets
import numpy as np
import pytest
import soundfile
from scipy import signal

from aa_jax.data import sources
from aa_jax.data.dataset import Dataset
from aa_jax.data.digits import (
    Scene,
    dtmf,
    evaluation_prompts,
    film,
    generation,
    load_digits,
    makers,
    parse,
    perfect_response,
    preference_columns,
    preference_rows,
    sample_scene,
    sft_examples,
    write_parquet,
)
from aa_jax.data.digits.scenes import Written, sequence_split
from aa_jax.data.templates import TEMPLATES
from aa_jax.data.video import read_frames, video_info
from aa_jax.errors import DataError

TEMPLATE = {"text": "AA_T2T", "audio": "AA_TA2T", "video": "AA_TV2T", "image": "AA_TI2T"}
ANSWERED = {"T2I": "AA_T2I", "T2A": "AA_T2A", "T2V": "AA_T2V", "TI2TI": "ti2ti_preference"}


def test_keys_have_the_frequencies_of_q23():
    """ITU-T Q.23, figure 1, spelt out."""
    low, high = (697, 770, 852, 941), (1209, 1336, 1477)
    table = {3 * row + column + 1: (low[row], high[column]) for row in range(3)
             for column in range(3)} | {0: (941, 1336)}  # fmt: skip
    assert dtmf.FREQUENCIES == table
    for digit, pair in table.items():
        power = np.abs(np.fft.rfft(dtmf.dial([digit], tone=1.0, pause=0.0)))
        assert sorted(np.argsort(power)[-2:]) == list(pair)  # one second: bins are whole hertz


def test_goertzel_is_the_power_of_a_periodogram():
    samples = np.random.default_rng(0).normal(size=400).astype(np.float32)
    hertz, power = signal.periodogram(samples, dtmf.RATE, detrend=False, scaling="spectrum")
    for bin_ in (3, 17, 60):
        assert dtmf.goertzel(samples, hertz[bin_]) == pytest.approx(power[bin_], rel=1e-5)
    wave = 0.6 * np.sin(2 * np.pi * 800 * np.arange(400) / dtmf.RATE)
    assert dtmf.goertzel(wave, 800) == pytest.approx(0.18, rel=1e-6)


def test_what_is_dialled_is_heard():
    rng = np.random.default_rng(1)
    for _ in range(40):
        digits = tuple(rng.integers(10, size=rng.integers(1, 6)).tolist())
        assert dtmf.listen(dtmf.dial(digits, rng)) == digits
    assert dtmf.listen(dtmf.dial([7, 7, 7])) == (7, 7, 7)
    assert dtmf.listen(rng.normal(size=8000) * 0.3) == () == dtmf.listen(np.zeros(8000))
    one = np.sin(2 * np.pi * 697 * np.arange(3200) / dtmf.RATE)  # one tone alone is no key
    assert dtmf.listen(one) == ()
    samples, rate = soundfile.read(io.BytesIO(dtmf.wav_bytes(dtmf.dial([4, 2]))))
    assert rate == 16000 and dtmf.listen(samples) == (4, 2)
    with pytest.raises(DataError, match="digits 0-9"):
        dtmf.dial([10])


def test_films_are_stored_without_loss():
    frames = film.render(load_digits(), [3, 50, 700], [0, 6, 19])
    data = film.encode(frames)
    info = video_info(data)
    assert (info.frames, info.rate, info.height, info.width) == (6, 2.0, 16, 16)
    np.testing.assert_array_equal(np.stack(read_frames(data, range(6))), frames)
    assert len(film.render(load_digits(), [3], [0])) == film.LEAST_FRAMES


def test_readers_are_right_about_handwriting_they_never_saw():
    world = load_digits()
    ids = world.split("test")
    read = makers.read_cells(world.pixels[ids])
    assert np.mean(np.array(read) == world.labels[ids]) > 0.97
    for kind in makers.MAKERS:
        maker, right, spoilt = makers.MAKERS[kind], 0, 0
        for seed in range(30):
            rng = np.random.default_rng(seed)
            digits = tuple(rng.integers(10, size=1 + seed % 3).tolist())
            medium = maker.make(digits, "test", rng, 3)
            right += maker.read(medium) == digits
            spoilt += maker.read(maker.spoil(medium, rng)) == digits
        assert right >= 28 and spoilt <= 20, kind


@pytest.mark.parametrize("kind", ["text", "audio", "video", "image"])
def test_every_scene_shows_its_digits_and_comes_back_from_json(kind):
    for seed in range(10):
        labels, scene = sample_scene("test", np.random.default_rng(seed), 3, kind)
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene
        if kind == "text":
            assert scene.ask("?") == f"digits {' '.join(map(str, labels))} . ?"
        elif kind == "audio":
            assert dtmf.listen(scene.render()) == labels
        elif kind == "video":
            assert tuple(load_digits().labels[list(scene.sources)]) == labels
            assert set(scene.sources) <= set(load_digits().split("test").tolist())


@pytest.mark.parametrize("kind", ["text", "audio", "video", "image"])
def test_at_least_so_many_digits_are_shown(kind):
    for least, most in ((1, 3), (2, 2), (2, 3)):
        sets = (evaluation_prompts, sft_examples)
        shown = {
            len(example.task.digits)
            for some in sets
            for example in some(60, 0, "train", max_digits=most, min_digits=least, media=kind)
        }
        assert shown == set(range(least, most + 1))
    with pytest.raises(DataError, match="min_digits must be from 1 to max_digits .3.; got 4"):
        evaluation_prompts(1, 0, media=kind, min_digits=4)[0]


@pytest.mark.parametrize("kind", ["text", "audio"])
def test_sequences_are_held_out_where_no_image_is(kind):
    seen = {
        split: {e.task.digits for e in evaluation_prompts(300, 0, split, media=kind)}
        for split in ("train", "validation", "test")
    }
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["test"] & seen["validation"]
    every = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    share = np.mean([sequence_split(s) == "test" for s in every])
    assert 0.15 < share < 0.25
    with pytest.raises(DataError, match="max_digits of 2"):
        evaluation_prompts(1, 0, "test", max_digits=1, media=kind)[0]


@pytest.mark.parametrize("kind", list(TEMPLATE))
def test_rows_read_back_by_the_template_of_the_real_subset(kind, tmp_path):
    path = write_parquet(preference_rows(12, 3, media=kind), tmp_path / "p.parquet")
    columns = preference_columns(kind)
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train")
    assert loaded.column_names == columns
    rows = sources.open_source(path)
    for reading in ("preference", "feedback", "prompt", "unpaired", "supervised"):
        read = Dataset(rows, TEMPLATE[kind], reading)
        assert not read.report.dropped
        media = read[0].media
        assert len(media) == (0 if kind == "text" else 1)
    example = TEMPLATES[TEMPLATE[kind]].preference(rows[0])
    texts = [response.text for response in example.responses]
    assert texts[0] != texts[1] and all(parse(text).items for text in texts)


def test_demonstrations_carry_their_medium():
    for kind in TEMPLATE:
        for example in sft_examples(20, 0, media=kind, max_digits=3):
            made = example.to_data_example()
            shown = [part.type for turn in made.messages for part in turn.media]
            assert shown == ([] if kind == "text" else [kind])
            assert made.messages[0].text.endswith(".")
            assert "<" not in made.messages[0].text
    with pytest.raises(DataError, match="image, text, audio, video; got 'smell'"):
        sft_examples(1, 0, media="smell")
    prompt = evaluation_prompts(1, 0, "test", media="text")[0]
    assert prompt.target == perfect_response(prompt.task).text


@pytest.mark.parametrize("subtask", list(ANSWERED))
def test_answers_that_are_media(subtask, tmp_path):
    path = write_parquet(generation.preference_rows(12, 0, subtask), tmp_path / "p.parquet")
    read = Dataset(sources.open_source(path), ANSWERED[subtask], "preference", check_media=False)
    assert read.report.kept == 12 and not read.report.dropped
    kind, shown = generation.SUBTASKS[subtask]
    parts = [part.type for r in read[0].responses for part in r.media]
    assert parts == [kind, kind] and len(read[0].media) == 2 + (shown == "image")
    write_parquet(generation.sft_rows(4, 0, subtask), tmp_path / "s.parquet")
    template = "ti2ti" if subtask == "TI2TI" else ANSWERED[subtask]
    Dataset(sources.open_source(tmp_path / "s.parquet"), template, "supervised", strict=True)


@pytest.mark.parametrize("subtask", list(ANSWERED))
def test_grades_follow_the_formulas(subtask):
    """K = 3 digits, then with one wrong, one missing, one superfluous, nothing legible."""
    rng = np.random.default_rng(5)
    order = generation.Order(subtask, (3, 7, 1), "next", Written((3, 7, 1)), "train", 5)
    assert order.target == (4, 8, 2)
    maker = makers.MAKERS[generation.SUBTASKS[subtask][0]]

    def grades(*digits):
        medium = maker.make(digits, "train", rng, 5)
        assert maker.read(medium) == digits
        return tuple(generation.grade(order, medium, digits).values())

    assert grades(4, 8, 2) == (3, 3, 3, 3, 3)
    assert grades(4, 9, 2) == (3, 2, 3, 2, 3)
    assert grades(4, 8) == (2, 3, 3, 2, 3)
    assert grades(4, 8, 2, 5) == (2, 3, 3, 3, 3)
    assert grades(1, 1, 1) == (0, 0, 3, 0, 3)
    wrong = maker.make((4, 8, 2), "train", rng, 5)
    assert generation.grade(order, wrong, (4, 8, 3))["quality"] == 0


def test_flaws_lower_the_grade_and_do_not_go_unseen():
    for subtask in generation.SUBTASKS:
        means = {}
        for flaw in (None, *generation.FLAWS):
            totals = []
            for seed in range(20):
                rng = np.random.default_rng(seed)
                order = generation.sample_order(subtask, "test", rng)
                made = generation.answer(order, rng, flaw)
                totals.append(generation.overall(generation.grade(order, made.medium, made.meant)))
            means[flaw] = np.mean(totals)
        assert means.pop(None) > 2.9 and max(means.values()) < 2.7, (subtask, means)
    with pytest.raises(DataError, match="flaws are wrong"):
        generation.answer(order, rng, "ugly")
    with pytest.raises(DataError, match="T2I, T2A, T2V, TI2TI; got 'T2T'"):
        generation.sample_order("T2T", "test", rng)
