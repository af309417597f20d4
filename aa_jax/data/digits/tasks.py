"""Layered instructions about a sequence of digits: what is asked, and what the truth is.

A task knows nothing about how the digits reach the model: as text, as an image strip, as tones or
as frames. Question, facts and grading are therefore shared by all eight subtasks; only the
rendering of the input differs.
"""

import functools
import re
from typing import NamedTuple

import numpy as np

from aa_jax.errors import DataError

FACTS = ("digits", "sum", "largest", "smallest", "count")
FORMS = ("sentence", "short")
# {s} is the list of facts and {be} the copula that fits it. Three wordings, so that a question is
# not one fixed token pattern, and no more: every word costs a row of the vocabulary.
WORDINGS = ("give {s} {form} .", "tell me {s} {form} .", "what {be} {s} ? answer {form} .")
FORM_PHRASES = {"sentence": "in a sentence", "short": "in short form"}
# Probability of asking for one, two or three facts.
LAYERS = (0.05, 0.45, 0.5)


class Task(NamedTuple):
    """One instruction about one digit sequence.

    Attributes:
        digits: the true digits, left to right.
        facts: the asked facts in the asked order, 1 to 3 of :data:`FACTS`.
        form: the asked form, "sentence" or "short".
        wording: index into :data:`WORDINGS`.
    """

    digits: tuple[int, ...]
    facts: tuple[str, ...]
    form: str
    wording: int = 0

    @property
    def question(self) -> str:
        """The instruction as text, without any media marker."""
        return question_text(self.facts, self.form, self.wording)

    def value(self, fact: str) -> tuple[int, ...]:
        """The true value of a fact, written digit by digit (a sum of 11 is ``(1, 1)``)."""
        return fact_value(self.digits, fact)

    def to_dict(self) -> dict:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return {
            "digits": list(self.digits),
            "facts": list(self.facts),
            "form": self.form,
            "wording": self.wording,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Task":
        """A task from :meth:`to_dict`'s output.

        Raises:
            DataError: a key is missing, or a fact, form or wording does not exist.
        """
        try:
            task = cls(
                digits=tuple(int(d) for d in values["digits"]),
                facts=tuple(values["facts"]),
                form=values["form"],
                wording=int(values.get("wording", 0)),
            )
        except KeyError as error:
            raise DataError(
                f"a digits task needs the keys digits, facts and form; {error} is missing from "
                f"{sorted(values)}. Pass the dict that Task.to_dict() wrote."
            ) from error
        check_task(task)
        return task


def check_task(task: Task) -> None:
    """Refuses a task this world cannot ask.

    Raises:
        DataError: no digits or a digit outside 0-9, unknown or repeated facts, an unknown form.
    """
    if not task.digits or any(d not in range(10) for d in task.digits):
        raise DataError(f"a task needs one or more digits 0-9, got {task.digits}.")
    unknown = [fact for fact in task.facts if fact not in FACTS]
    if unknown or not task.facts or len(set(task.facts)) < len(task.facts):
        raise DataError(
            f"a task asks for distinct facts out of {', '.join(FACTS)}; got {task.facts}."
        )
    if task.form not in FORMS:
        raise DataError(f"the asked form is one of {', '.join(FORMS)}; got {task.form!r}.")
    if task.wording not in range(len(WORDINGS)):
        raise DataError(f"wording is an index below {len(WORDINGS)}; got {task.wording}.")


@functools.lru_cache(maxsize=16384)
def fact_value(digits: tuple[int, ...], fact: str) -> tuple[int, ...]:
    """The value of ``fact`` for ``digits``, written digit by digit."""
    if fact == "digits":
        return tuple(digits)
    if fact == "sum":
        number = sum(digits)
    elif fact == "largest":
        number = max(digits)
    elif fact == "smallest":
        number = min(digits)
    elif fact == "count":
        number = len(digits)
    else:
        raise DataError(f"facts are {', '.join(FACTS)}; got {fact!r}.")
    return number_digits(number)


def number_digits(number: int) -> tuple[int, ...]:
    """A non-negative number as its decimal digits: 11 -> (1, 1)."""
    return tuple(int(d) for d in str(number))


def question_text(facts: tuple[str, ...], form: str, wording: int = 0) -> str:
    """The question that asks for ``facts`` in ``form``; every token is separated by a space."""
    named = [f"the {fact}" for fact in facts]
    listed = named[0] if len(named) == 1 else f"{' , '.join(named[:-1])} and {named[-1]}"
    be = "are" if len(facts) > 1 or facts[0] == "digits" else "is"
    return WORDINGS[wording].format(s=listed, be=be, form=FORM_PHRASES[form])


def parse_question(text: str) -> tuple[tuple[str, ...], str]:
    """Asked facts and form of a question written by :func:`question_text`.

    Raises:
        DataError: the text names no fact or no form.
    """
    facts = tuple(re.findall(rf"\bthe ({'|'.join(FACTS)})\b", text))
    forms = [form for form, phrase in FORM_PHRASES.items() if phrase in text]
    if not facts or len(forms) != 1:
        raise DataError(
            f"this is not a question of the digits world: {text!r}. It must name at least one of "
            f"{', '.join(FACTS)} and one of {', '.join(FORM_PHRASES.values())}."
        )
    return facts, forms[0]


def sample_task(digits: tuple[int, ...], rng: np.random.Generator) -> Task:
    """A random instruction about ``digits``: how many facts, which, in which order and form."""
    layers = 1 + int(np.searchsorted(np.cumsum(LAYERS)[:-1], rng.random(), side="right"))
    facts = tuple(FACTS[i] for i in rng.permutation(len(FACTS))[:layers])
    form = FORMS[int(rng.random() * len(FORMS))]
    return Task(digits, facts, form, int(rng.random() * len(WORDINGS)))
