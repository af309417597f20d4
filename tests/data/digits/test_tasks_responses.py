"""Questions, answers as text, and the demonstrator's flaws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa_jax.data import digits
from aa_jax.data.digits.responses import Item, Response, parse, render, sample_response
from aa_jax.data.digits.tasks import FACTS, FORMS, WORDINGS, Task, parse_question, sample_task
from aa_jax.errors import DataError

VALUES = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)
TASKS = st.builds(
    Task,
    VALUES,
    st.permutations(FACTS).flatmap(lambda f: st.integers(1, 3).map(lambda k: tuple(f[:k]))),
    st.sampled_from(FORMS),
    st.integers(0, len(WORDINGS) - 1),
)


def test_question_texts():
    task = Task((3, 7, 1), ("digits", "sum", "largest"), "short", 0)
    assert task.question == "give the digits , the sum and the largest in short form ."
    assert task._replace(wording=1).question.startswith("tell me the digits , the sum and")
    single = Task((3,), ("sum",), "sentence", 2)
    assert single.question == "what is the sum ? answer in a sentence ."


def test_values_of_three_seven_one():
    task = Task((3, 7, 1), ("sum",), "short")
    values = {fact: task.value(fact) for fact in FACTS}
    assert values == {
        "digits": (3, 7, 1),
        "sum": (1, 1),
        "largest": (7,),
        "smallest": (1,),
        "count": (3,),
    }


@settings(deadline=None, max_examples=60)
@given(TASKS)
def test_question_and_dict_round_trips(task):
    assert parse_question(task.question) == (task.facts, task.form)
    assert Task.from_dict(task.to_dict()) == task


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digits": []}, "one or more digits"),
        ({"digits": [10]}, "0-9"),
        ({"facts": ["median"]}, "median"),
        ({"facts": ["sum", "sum"]}, "distinct"),
        ({"form": "poem"}, "poem"),
        ({"wording": 9}, "wording"),
    ],
)
def test_impossible_tasks_are_refused(change, words):
    good = {"digits": [1], "facts": ["sum"], "form": "short", "wording": 0}
    with pytest.raises(DataError, match=words):
        Task.from_dict(good | change)
    with pytest.raises(DataError, match="form"):
        Task.from_dict({"digits": [1], "facts": ["sum"]})
    with pytest.raises(DataError, match="not a question"):
        parse_question("what is the weather ?")


ITEMS = st.lists(st.builds(Item, st.sampled_from(FACTS), VALUES), min_size=1, max_size=5)


@settings(deadline=None, max_examples=80)
@given(ITEMS)
def test_sentence_round_trip(items):
    response = Response("sentence", tuple(items))
    assert parse(render(response)) == response


@settings(deadline=None, max_examples=80)
@given(ITEMS)
def test_short_round_trip_loses_only_the_names(items):
    response = Response("short", tuple(items))
    unnamed = tuple(Item(None, item.value) for item in items)
    assert parse(render(response)) == Response("short", unnamed)


@settings(deadline=None, max_examples=80)
@given(st.text(max_size=60))
def test_parser_reads_anything(text):
    response = parse(text)
    assert response.form in ("sentence", "short", "mixed", "none")
    assert (response.form == "none") == (not response.items)


def test_parser_is_tolerant():
    wanted = parse("the digits are 3 7 1 . the sum is 1 1 .").items
    for text in (
        "The digits are 371. The sum is 11.",
        "digits: 3, 7 and 1; sum = 11",
        "  the digits are 3 7 1 the sum is 1 1",
    ):
        assert parse(text).items == wanted
        assert parse(text).noise == 0
    assert parse("3 7 1 ; 1 1").items == parse("371; 11").items
    assert parse("hello the sum is").items == ()
    assert parse("hello the sum is").noise == 3
    assert parse("the sum is 1 1 . 7").form == "mixed"


def test_demonstrator_without_flaws_is_perfect():
    rng = np.random.default_rng(0)
    none = dict.fromkeys(
        ("omit", "wrong", "sum_wrong", "redundant", "wrong_form", "omit_third", "ignore_short"), 0.0
    )
    for _ in range(50):
        task = sample_task((4, 0, 9), rng)
        assert sample_response(task, rng, **none) == digits.perfect_response(task)


def test_demonstrator_rates():
    """Over 4,000 answers each flaw is as frequent as its keyword says (4 standard errors)."""
    rng = np.random.default_rng(1)
    task = Task((3, 7, 1), ("digits", "sum", "largest"), "short")
    answers = [sample_response(task, rng) for _ in range(4000)]

    def close(share, rate):
        return abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / 4000)

    named = [{item.fact: item.value for item in answer.items} for answer in answers]
    assert close(np.mean([a.form == "sentence" for a in answers]), 0.6)
    assert close(np.mean(["largest" not in n for n in named]), 0.6)
    assert close(np.mean(["digits" not in n for n in named]), 0.05)
    assert close(np.mean([bool({"count", "smallest"} & set(n)) for n in named]), 0.12)
    sums = [n["sum"] != (1, 1) for n in named if "sum" in n]
    assert close(np.mean(sums), 0.3)
    sentence = [sample_response(task._replace(form="sentence"), rng).form for _ in range(4000)]
    assert close(np.mean([form == "short" for form in sentence]), 0.05)


def test_wrong_values_are_wrong_and_plausible():
    rng = np.random.default_rng(2)
    for digit_values in ((0,), (5, 5), (9, 0, 3)):
        task = Task(digit_values, ("sum",), "short")
        for fact in FACTS:
            for _ in range(30):
                value = digits.responses.wrong_value(task, fact, rng)
                assert value != task.value(fact)
                assert all(0 <= d <= 9 for d in value)
                if fact == "digits":
                    assert len(value) == len(digit_values)
