"""Form, length, exact match; the overlong values are the paper's equation worked by hand."""

import pytest

from aa_jax.errors import ConfigError
from aa_jax.rewards.base import RewardError
from aa_jax.rewards.text import (
    ExactMatch,
    Format,
    Overlong,
    answer_of,
    soft_overlong,
    well_formed,
)

GOOD = "<think>two and two</think><answer>4</answer>"


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (GOOD, True),
        ("\n<think>\na\nb\n</think>\n\n<answer>\n4\n</answer>\n", True),
        ("<think>1 < 2, <b>so</b></think><answer>4</answer>", True),
        ("", False),
        ("4", False),
        ("<answer>4</answer>", False),
        ("<think>a</think>", False),
        ("<answer>4</answer><think>a</think>", False),
        ("so: " + GOOD, False),
        (GOOD + " done", False),
        ("<think>a</think> then <answer>4</answer>", False),
        (GOOD + "<answer>5</answer>", False),
        ("<think>a</think>" + GOOD, False),
        ("<think>a<think>b</think></think><answer>4</answer>", False),
        ("<think>a</think><answer><answer>4</answer></answer>", False),
        ("<think></think><answer>4</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a</think><answer>4", False),
        ("<THINK>a</THINK><ANSWER>4</ANSWER>", False),
    ],
)
def test_form(text, good, ask):
    assert well_formed(text) is good
    (result,) = Format(value=0.5)([ask(text)])
    assert result.value == 0.5 * good and result.valid


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "4"),
        ("<answer>4</answer>", "4"),
        ("text around <answer> 4 </answer> is ignored", "4"),
        ("<think>maybe <answer>3</answer>?</think><answer>4</answer>", "4"),
        ("<answer>3</answer><answer>4</answer>", None),  # two guesses are no answer
        ("<answer> </answer>", None),
        ("<answer>4", None),
        ("4", None),
    ],
)
def test_the_answer_inside_its_tags(text, answer):
    assert answer_of(text) == answer


def test_exact_match(ask):
    def value(reward, response, reference):
        (result,) = reward([ask(response, reference)])
        assert result.valid
        return result.value

    plain = ExactMatch()
    assert value(plain, " a  b\n", "a b") == 1.0
    assert value(plain, "A b", "a b") == 0.0
    assert value(plain, "", "a") == 0.0
    assert value(plain, "7", 7) == 1.0
    assert value(plain, "b", ["a", "b"]) == 1.0
    assert value(ExactMatch(ignore_case=True), "A b", "a B") == 1.0
    assert value(ExactMatch(ignore_spaces=True), "1 2", "12") == 1.0
    assert value(ExactMatch(where="answer"), GOOD, "4") == 1.0
    assert value(ExactMatch(where="answer"), "4", "4") == 0.0


@pytest.mark.parametrize("reference", [None, "", "  ", [], [None]])
def test_without_a_reference_nothing_is_paid_even_for_the_same_nothing(ask, reference):
    (result,) = ExactMatch()([ask("", reference)])
    assert not result.valid and result.reason == "no reference"


@pytest.mark.parametrize(
    ("length", "value"), [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (101, -1.0), (85, -0.25)]
)
def test_soft_overlong_punishment(length, value, ask):
    """DAPO, equation 13, with L_max = 100 and L_cache = 20."""
    assert soft_overlong(length, 100, 20) == value
    (result,) = Overlong(max_length=100, cache=20)([ask("text", response_tokens=length)])
    assert result.value == value and result.parts == {"tokens": length}


def test_overlong_without_a_cache_is_a_step():
    assert [soft_overlong(n, 100, 0) for n in (99, 100, 101)] == [0.0, 0.0, -1.0]


def test_overlong_refuses_what_it_cannot_know(ask):
    with pytest.raises(RewardError, match="response_tokens"):
        Overlong(max_length=10, cache=2)([ask("text")])
    with pytest.raises(ConfigError, match="max_length=10, cache=11"):
        Overlong(max_length=10, cache=11)
    with pytest.raises(ConfigError, match="where='tail'"):
        ExactMatch(where="tail")
