"""Annotators agree as often as the paper's Table 1 says, on answers they were not fitted to."""

import itertools

import numpy as np
import pytest

from aa_jax.data import digits
from aa_jax.data.digits import annotators, oracle
from aa_jax.data.digits.tasks import Task
from aa_jax.errors import ConfigError, DataError

# Paper, Table 1: agreement of people without -> with language feedback, in percent.
TABLE_1 = {
    "T2T": (73.2, 74.1),
    "TI2T": (62.5, 70.5),
    "T2I": (63.2, 69.2),
    "TI2TI": (62.7, 68.3),
    "TV2T": (62.1, 67.2),
    "T2V": (60.8, 65.8),
    "TA2T": (61.8, 68.6),
    "T2A": (58.7, 64.3),
}
SHORT = Task((3, 7, 1), ("digits", "sum", "largest"), "short")


@pytest.fixture(scope="module")
def fresh():
    return digits.demonstration_pairs(3000, 12345)


def test_table_holds_the_papers_numbers():
    percent = {k: tuple(round(100 * x, 1) for x in v) for k, v in digits.AGREEMENT.items()}
    assert percent == TABLE_1


def test_agreement_is_the_share_of_agreeing_annotator_pairs():
    labels = np.random.default_rng(0).integers(1, 3, (20, 5))
    counted = [
        np.mean([row[a] == row[b] for a, b in itertools.combinations(range(5), 2)])
        for row in labels
    ]
    assert digits.agreement(labels) == pytest.approx(np.mean(counted))
    with pytest.raises(DataError, match="two or more"):
        digits.agreement(labels[:, :1])


@pytest.mark.parametrize(
    ("model", "subtask"),
    [("bounded", "TI2T"), ("bounded", "T2T"), ("bounded", "T2A"), ("flips", "TI2T")],
)
def test_fresh_agreement_is_table_1(model, subtask, fresh):
    annotator = digits.calibrated(model, subtask)
    rng = np.random.default_rng(99)
    binary = digits.agreement(annotator.binary_labels(fresh, rng, 10))
    written = digits.agreement(annotator.feedback_labels(fresh, rng, 10))
    assert abs(100 * binary - TABLE_1[subtask][0]) < 1.5
    assert abs(100 * written - TABLE_1[subtask][1]) < 1.5


def test_one_label_at_a_time_agrees_as_often(fresh):
    """The scalar calls are the same process as the batched ones."""
    annotator, rng = digits.calibrated(), np.random.default_rng(5)
    some = fresh[:500]
    for label in (annotator.binary_label, annotator.feedback_label):
        labels = np.array([[label(pair, rng) for _ in range(2)] for pair in some])
        batched = (
            annotator.binary_labels
            if label == annotator.binary_label
            else (annotator.feedback_labels)
        )
        share = np.mean(labels == 1)
        assert abs(share - np.mean(batched(some, rng, 2) == 1)) < 0.07
        assert abs(digits.agreement(labels) - digits.agreement(batched(some, rng, 2))) < 0.09


def test_flips_have_the_closed_form(fresh):
    """Untied pairs: agreement f^2 + (1-f)^2 and accuracy 1-f."""
    untied = [pair for pair in fresh[:2000] if oracle.prefer(*pair)]
    annotator = annotators.Annotator("flips", flip=0.2)
    labels = annotator.binary_labels(untied, np.random.default_rng(1), 10)
    assert digits.agreement(labels) == pytest.approx(0.2**2 + 0.8**2, abs=0.012)
    assert digits.accuracy(labels, untied) == pytest.approx(0.8, abs=0.012)


def test_bounded_annotators_favour_long_and_smooth():
    """The asked short answer against the same facts as a sentence: oracle for short, people not."""
    pair = digits.Pair(
        SHORT, "3 7 1 ; 1 1 ; 7", "the digits are 3 7 1 . the sum is 1 1 . the largest is 7 ."
    )
    assert oracle.prefer(*pair) == 1
    rng = np.random.default_rng(0)

    def right(annotator):
        return np.mean(annotator.binary_labels([pair], rng, 4000) == 1)

    # Looking at 2 of 4 dimensions, no bias, no noise: wrong only where both dimensions looked at
    # (rules and information, 1 of 6 choices) are equal; that tie is response 2 here.
    calm = annotators.Annotator(noise=0.0, length_bias=0.0, smooth_bias=0.0)
    assert right(calm) == pytest.approx(5 / 6, abs=0.025)
    assert right(digits.calibrated(length_bias=0.0, smooth_bias=0.0)) > 0.65
    assert right(digits.calibrated()) < 0.55
    assert right(digits.calibrated(length_bias=0.6, smooth_bias=0.6)) < 0.4


def test_feedback_sees_more_than_comparisons(fresh):
    fresh = fresh[:1500]
    annotator, rng = digits.calibrated(), np.random.default_rng(3)
    binary = digits.accuracy(annotator.binary_labels(fresh, rng), fresh)
    written = digits.accuracy(annotator.feedback_labels(fresh, rng), fresh)
    assert 0.6 < binary < written - 0.05


def test_feedback_without_errors_is_the_oracles():
    careful, rng = annotators.Annotator(status_error=0.0), np.random.default_rng(0)
    for pair in digits.demonstration_pairs(100, 3):
        for text in (pair.response_1, pair.response_2, "", "1 1 ; 7 7 ; 3 ; 9 9 9 ; 1"):
            assert careful.feedback(pair.task, text, rng) == oracle.true_feedback(pair.task, text)


def test_status_errors():
    """All items mistaken: right <-> wrong, and a good form gets the form it does not have."""
    hasty = annotators.Annotator("flips", status_error=1.0)
    rng = np.random.default_rng(0)
    said = hasty.feedback(SHORT, "3 7 1 ; 1 2 ; 7 ; 3", rng)
    assert said.diagnosis.statuses == (
        ("digits", "wrong"),
        ("sum", "right"),
        ("largest", "wrong"),
    )
    assert said.diagnosis.extras == ()
    assert said.refinement == "fix the digits , fix the largest , use a sentence"
    assert hasty.feedback(SHORT, "the sum is 1 1 .", rng).diagnosis.form_good
    missing = hasty.feedback(SHORT, "3 7 1", rng).diagnosis.statuses
    assert missing == (("digits", "wrong"), ("sum", "right"), ("largest", "right"))


def test_labels_are_fixed_by_the_generator(fresh):
    annotator = digits.calibrated()
    first, again, other = (
        annotator.binary_labels(fresh[:50], np.random.default_rng(s), 3) for s in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_calibration_on_given_pairs(fresh):
    """A population without true ties needs noisier annotators for the same agreement."""
    untied = [pair for pair in fresh if oracle.prefer(*pair)]
    own = digits.calibrated(pairs=untied)
    assert own.status_error > digits.calibrated().status_error
    labels = own.feedback_labels(untied, np.random.default_rng(8), 10)
    assert digits.agreement(labels) == pytest.approx(0.705, abs=0.015)


def test_errors():
    with pytest.raises(ConfigError, match="T2T, TI2T"):
        digits.calibrated(subtask="X2Y")
    with pytest.raises(ConfigError, match="bounded, flips"):
        annotators.Annotator("perfect")
    with pytest.raises(ConfigError, match="1 to 4"):
        annotators.Annotator(looks=5)
    tied = [digits.Pair(SHORT, "3 7 1 ; 1 1", "3 7 1 ; 1 1 ; 8")] * 50
    with pytest.raises(ConfigError, match="No annotator strength"):
        digits.calibrated("flips", "T2T", pairs=tied)
