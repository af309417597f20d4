"""Grades worked out by hand from the formulas in the oracle's docstring, and feedback."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aa_jax.data.digits import oracle
from aa_jax.data.digits.feedback import (
    Action,
    Diagnosis,
    advise,
    parse_feedback,
    parse_refinement,
    random_feedback,
)
from aa_jax.data.digits.responses import sample_response
from aa_jax.data.digits.tasks import FACTS, FORMS, Task, sample_task

THREE = Task((3, 7, 1), ("digits", "sum", "largest"), "sentence")
SHORT = THREE._replace(form="short")
TWO = Task((3, 7, 1), ("sum", "count"), "sentence")
ONE = Task((3, 7, 1), ("sum",), "short")
DIGITS, SUM, LARGEST = "the digits are 3 7 1 .", "the sum is 1 1 .", "the largest is 7 ."

# task, text, (prompt_following, objective_rules, clarity, information_richness)
CASES = {
    "perfect sentence": (THREE, f"{DIGITS} {SUM} {LARGEST}", (3, 3, 3, 3)),
    "perfect short": (SHORT, "3 7 1 ; 1 1 ; 7", (3, 3, 3, 3)),
    "short instead of sentence": (THREE, "3 7 1 ; 1 1 ; 7", (2, 3, 2, 3)),
    "sentence instead of short": (SHORT, f"{DIGITS} {SUM} {LARGEST}", (2, 3, 2, 3)),
    "wrong sum": (THREE, f"{DIGITS} the sum is 1 2 . {LARGEST}", (3, 2, 3, 2)),
    "everything wrong": (
        THREE,
        "the digits are 3 7 2 . the sum is 1 2 . the largest is 8 .",
        (3, 0, 3, 0),
    ),
    "third left out": (THREE, f"{DIGITS} {SUM}", (2, 3, 3, 2)),
    "two left out": (THREE, SUM, (1, 3, 3, 1)),
    "true extra": (THREE, f"{DIGITS} {SUM} {LARGEST} the count is 3 .", (3, 3, 2, 3)),
    "false extra": (THREE, f"{DIGITS} {SUM} {LARGEST} the count is 4 .", (3, 2, 2, 3)),
    "repeated": (THREE, f"{DIGITS} {SUM} {LARGEST} {SUM}", (3, 3, 2, 3)),
    "first mention counts": (THREE, f"{DIGITS} the sum is 9 . {LARGEST} {SUM}", (3, 2, 2, 2)),
    "other order": (THREE, f"{SUM} {DIGITS} {LARGEST}", (2, 3, 2, 3)),
    "stray words": (THREE, f"well {DIGITS} {SUM} {LARGEST}", (2, 3, 1, 3)),
    "names and bare values mixed": (THREE, f"{DIGITS} {SUM} 7", (2, 3, 1, 3)),
    "one of two wrong": (TWO, "the sum is 1 1 . the count is 4 .", (3, 2, 3, 1)),
    "one of two left out": (TWO, "the count is 3 .", (2, 3, 3, 1)),
    "the only fact wrong": (ONE, "1 2", (3, 0, 3, 0)),
    "short with the sum left out": (SHORT, "3 7 1 ; 7", (2, 3, 3, 2)),
    "short with a wrong sum": (SHORT, "3 7 1 ; 1 2 ; 7", (3, 2, 3, 2)),
    "short with an extra": (SHORT, "3 7 1 ; 1 1 ; 7 ; 3", (3, 3, 2, 3)),
    "short, a list of guesses": (ONE, "1 0 ; 1 1 ; 1 2", (3, 0, 1, 0)),
    "empty": (THREE, "", (0, 0, 0, 0)),
    "garbage": (THREE, "hello ; world the the", (0, 0, 0, 0)),
    "only what was not asked": (THREE, "the count is 3 . the smallest is 1 .", (0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_hand_worked_grades(name):
    task, text, expected = CASES[name]
    grade = oracle.grade(task, text)
    found = tuple(getattr(grade, dimension) for dimension in oracle.INFORMATIVE)
    assert found == expected
    assert grade.safety == 3
    assert grade.overall == sum(expected) / 4 == oracle.overall(task, text)
    assert set(grade.rationales) == set(oracle.DIMENSIONS.values())
    assert all(r.endswith(" .") and r.count(" .") == 1 for r in grade.rationales.values())


def test_rationales_name_the_flaws():
    said = oracle.grade(SHORT, f"{DIGITS} the sum is 1 2 . the count is 3 .").rationales
    assert said["prompt_following"] == "the largest is missing and the form is not as asked ."
    assert said["objective_rules"] == "the sum is wrong ."
    assert said["clarity"] == "the form is not as asked and the count is extra ."
    assert said["information_richness"] == "1 of 3 asked facts are right ."


def test_preference():
    assert oracle.prefer(THREE, f"{DIGITS} {SUM}", f"{DIGITS} {SUM} {LARGEST}") == 2
    assert oracle.prefer(THREE, f"{DIGITS} {SUM} {LARGEST}", "") == 1
    # A left-out third fact and a wrong one cost the same: 10 of 12 points each.
    assert oracle.prefer(THREE, f"{DIGITS} {SUM}", f"{DIGITS} {SUM} the largest is 3 .") == 0


def test_feedback_text_by_hand():
    feedback = oracle.true_feedback(SHORT, f"{DIGITS} the sum is 1 2 . the count is 3 .")
    assert feedback.text == (
        "##Critique: digits right , sum wrong , largest missing , form bad , count extra "
        "##Refinement: fix the sum , add the largest , remove the count , use short form"
    )
    assert oracle.true_feedback(SHORT, "3 7 1 ; 1 1 ; 7").text == (
        "##Critique: digits right , sum right , largest right , form good "
        "##Refinement: change nothing"
    )
    assert oracle.true_feedback(ONE, "1 1 ; 9 9").refinement == "remove the rest"


def test_feedback_accuracy_by_item():
    answer = "3 7 1 ; 1 2 ; 7"
    true = oracle.true_feedback(SHORT, answer).text
    assert all(oracle.feedback_accuracy(SHORT, answer, true).values())
    said = "##Critique: digits right , sum right , form good ##Refinement: change nothing"
    assert oracle.feedback_accuracy(SHORT, answer, said) == {
        "digits": True,
        "sum": False,
        "largest": False,
        "form": True,
        "extras": True,
        "refinement": False,
    }


def test_parse_feedback_is_tolerant():
    parsed = parse_feedback(
        " ##critique:  SUM wrong, blah ##REFINEMENT: please fix sum ; use short"
    )
    assert parsed.diagnosis == Diagnosis((("sum", "wrong"),), True, ())
    assert parsed.actions == (Action("fix", "sum"), Action("use", "short"))
    assert parse_feedback("").actions == ()
    assert parse_refinement("fix the sum , fix the sum") == (Action("fix", "sum"),)


TEXT = st.text(alphabet="abc the sum is are digits 0123456789 .;,", max_size=40)
SEEDS = st.integers(0, 2**31)


def _example(seed):
    rng = np.random.default_rng(seed)
    size = 1 + int(rng.random() * 5)
    task = sample_task(tuple(int(d) for d in rng.integers(0, 10, size)), rng)
    return task, sample_response(task, rng).text, rng


@settings(deadline=None, max_examples=100)
@given(SEEDS)
def test_feedback_round_trips_through_text(seed):
    task, text, rng = _example(seed)
    for feedback in (oracle.true_feedback(task, text), random_feedback(task, rng)):
        assert parse_feedback(feedback.text) == feedback


@settings(deadline=None, max_examples=100)
@given(TEXT, SEEDS)
def test_any_text_gets_a_grade(text, seed):
    task = _example(seed)[0]
    grade = oracle.grade(task, text)
    assert all(getattr(grade, d) in (0, 1, 2, 3) for d in oracle.DIMENSIONS.values())
    assert oracle.grade(task, text) == grade


@settings(deadline=None, max_examples=150)
@given(SEEDS, st.lists(st.sampled_from(FACTS), min_size=1, max_size=4), st.booleans())
def test_more_than_was_asked_never_pays(seed, facts, true):
    """Statements beyond the asked ones, true or false, raise no dimension of any answer."""
    task, text, rng = _example(seed)
    reading = oracle.read(task, text)
    stated = [fact for fact, status in reading.statuses if status != "missing"]
    before = oracle.scores(**oracle.counts(reading))
    if reading.form == "sentence":
        for fact in facts:
            if fact in stated or fact not in task.facts:
                value = task.value(fact) if true else (9, 9, 9)
                text += f" the {fact} is {' '.join(map(str, value))} ."
    elif len(stated) == len(task.facts):
        for fact in facts:
            text += " ; " + " ".join(map(str, task.value(fact) if true else (9, 9, 9)))
    assert (oracle.scores(**oracle.counts(oracle.read(task, text))) <= before).all()


@settings(deadline=None, max_examples=100)
@given(SEEDS)
def test_true_advice_followed_fully_is_perfect(seed):
    task, text, rng = _example(seed)
    actions = oracle.true_feedback(task, text).actions
    for literal in (True, False):
        revised = oracle.apply_refinement(
            task, text, actions, rng, literal=literal, follow=1.0, break_right=1.0
        )
        assert oracle.overall(task, revised) == 3.0


@settings(deadline=None, max_examples=100)
@given(SEEDS)
def test_sensible_revision_never_hurts(seed):
    task, text, rng = _example(seed)
    actions = random_feedback(task, rng).actions
    revised = oracle.apply_refinement(task, text, actions, rng, literal=False)
    assert oracle.overall(task, revised) >= oracle.overall(task, text)


def _revise(task, text, *actions, **kwargs):
    kwargs = {"follow": 1.0, "break_right": 1.0} | kwargs
    return oracle.apply_refinement(task, text, actions, np.random.default_rng(0), **kwargs)


def test_literal_revision_does_what_it_is_told():
    perfect = "3 7 1 ; 1 1 ; 7"
    assert _revise(SHORT, perfect) == perfect
    assert _revise(SHORT, perfect, Action("use", "sentence")) == f"{DIGITS} {SUM} {LARGEST}"
    assert _revise(SHORT, perfect, Action("use", "sentence"), literal=False) == perfect
    broken = _revise(SHORT, perfect, Action("fix", "sum"))
    assert oracle.read(SHORT, broken).statuses[1] == ("sum", "wrong")
    assert _revise(SHORT, perfect, Action("fix", "sum"), literal=False) == perfect
    assert _revise(SHORT, perfect, Action("remove", "sum")) == "3 7 1 ; 7"
    assert _revise(SHORT, perfect, Action("remove", "sum"), literal=False) == perfect
    assert _revise(SHORT, perfect, Action("add", "count")) == "3 7 1 ; 1 1 ; 7 ; 3"
    assert _revise(SHORT, "3 7 1 ; 1 1 ; 7 ; 9 9", Action("remove", "rest")) == perfect
    assert _revise(SHORT, "3 7 1", Action("add", "largest")) == "3 7 1 ; 7"
    assert _revise(SHORT, "3 7 1", Action("remove", "digits")) == "3 7 1"
    assert _revise(SHORT, "3 7 1", Action("fix", "sum"), Action("add", "rest")) == "3 7 1"
    assert _revise(SHORT, "", Action("add", "sum")) == "1 1"


def test_literal_revision_rates():
    """A right value told to be fixed changes with probability .85 x .7 = .595."""
    rng = np.random.default_rng(3)
    perfect, action = "3 7 1 ; 1 1 ; 7", (Action("fix", "sum"),)
    changed = [oracle.apply_refinement(SHORT, perfect, action, rng) != perfect for _ in range(1500)]
    assert abs(np.mean(changed) - 0.595) < 0.05


def test_random_feedback_names_either_form_whatever_was_asked():
    rng = np.random.default_rng(4)
    for task in (THREE, SHORT):
        advice = [random_feedback(task, rng).actions for _ in range(1500)]
        named = [action.target for actions in advice for action in actions if action.verb == "use"]
        assert abs(len(named) / 1500 - 0.3) < 0.05
        assert abs(named.count(FORMS[0]) / len(named) - 0.5) < 0.1


def test_advise_names_the_given_form():
    diagnosis = Diagnosis((("sum", "right"),), False)
    assert advise(diagnosis, "sentence").refinement == "use a sentence"
