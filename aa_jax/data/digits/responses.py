"""Answers as structure and as text, and a demonstrator who makes mistakes.

Sentence form: ``the digits are 3 7 1 . the sum is 1 1 .``; short form: ``3 7 1 ; 1 1``. Numbers
are written digit by digit, so a model needs ten number tokens.
"""

import re
from typing import NamedTuple

import numpy as np

from aa_jax.data.digits.tasks import FACTS, FORMS, Task, number_digits

_COPULAS = ("is", "are", ":", "=")
_BREAKS = (".", ";")
_JOINERS = (",", "and")
_DIGITS = frozenset("0123456789")  # str.isdigit would also accept superscripts
_TOKEN = re.compile(r"[0-9]|[a-z_']+|[^\sa-z0-9]+")


class Item(NamedTuple):
    """One statement: a value (its decimal digits) and the fact it is about.

    ``fact`` is None where the text does not say, as in the short form.
    """

    fact: str | None
    value: tuple[int, ...]


class Response(NamedTuple):
    """An answer as structure.

    Attributes:
        form: "sentence" (every value named), "short" (none named), "mixed", or "none" (nothing
            stated).
        items: the statements in the order of the text.
        noise: number of tokens that belong to neither form.
    """

    form: str
    items: tuple[Item, ...]
    noise: int = 0

    @property
    def text(self) -> str:
        return render(self)


def render(response: Response) -> str:
    """The text of a structured answer; noise is not reproduced.

    An unnamed item inside a sentence is written as its bare value: nothing is invented for it.
    """
    values = [" ".join(map(str, item.value)) for item in response.items]
    if response.form == "short":
        return " ; ".join(values)
    parts = []
    for item, value in zip(response.items, values, strict=True):
        be = "are" if item.fact == "digits" else "is"
        parts.append(f"the {item.fact} {be} {value} ." if item.fact else f"{value} .")
    return " ".join(parts)


def parse(text: str) -> Response:
    """Reads any text as an answer; never fails.

    Tolerates case, spacing, digits glued together ("11"), a missing "the", ":" or "=" for the
    copula, commas inside a list. Everything else is counted as noise.
    """
    tokens = _TOKEN.findall(text.lower())
    items: list[Item] = []
    noise = 0
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token in _DIGITS:
            value, position = _number(tokens, position - 1, lists=False)
            items.append(Item(None, value))
        elif token in FACTS:
            start = position
            if position < len(tokens) and tokens[position] in _COPULAS:
                position += 1
            value, position = _number(tokens, position, lists=token == "digits")
            if value:
                items.append(Item(token, value))
            else:  # a fact named without a value states nothing
                noise += 1 + position - start
        elif token == "the":
            noise += position >= len(tokens) or tokens[position] not in FACTS
        elif token not in _BREAKS and token not in _JOINERS:
            noise += 1
    named = sum(item.fact is not None for item in items)
    form = "none" if not items else {0: "short", len(items): "sentence"}.get(named, "mixed")
    return Response(form, tuple(items), noise)


def _number(tokens: list[str], position: int, lists: bool) -> tuple[tuple[int, ...], int]:
    """The run of digits at ``position`` and where it ends; ``lists`` allows "3, 7 and 1"."""
    value = []
    while position < len(tokens):
        if tokens[position] in _DIGITS:
            value.append(int(tokens[position]))
            position += 1
        elif (
            lists
            and value
            and tokens[position] in _JOINERS
            and position + 1 < len(tokens)
            and tokens[position + 1] in _DIGITS
        ):
            position += 1
        else:
            break
    return tuple(value), position


def perfect_response(task: Task) -> Response:
    """The answer with every asked fact, right, in the asked order and form."""
    return Response(task.form, tuple(Item(fact, task.value(fact)) for fact in task.facts))


def wrong_value(task: Task, fact: str, rng: np.random.Generator) -> tuple[int, ...]:
    """A plausible value of ``fact`` that is not the true one.

    One digit of the list misread; a sum off by one to three; another digit for the largest or
    smallest; a count off by one.
    """
    digits = task.digits
    if fact == "digits":
        spot = int(rng.random() * len(digits))
        other = (digits[spot] + 1 + int(rng.random() * 9)) % 10
        return digits[:spot] + (other,) + digits[spot + 1 :]
    truth = int("".join(map(str, task.value(fact))))
    if fact == "sum":
        step = 1 + int(rng.random() * 3)
        return number_digits(truth - step if rng.random() < 0.5 and truth >= step else truth + step)
    if fact == "count":
        return number_digits(truth - 1 if rng.random() < 0.5 and truth > 1 else truth + 1)
    others = [d for d in digits if d != truth]
    if others:
        return (others[int(rng.random() * len(others))],)
    return ((truth + 1 + int(rng.random() * 9)) % 10,)


def sample_response(
    task: Task,
    rng: np.random.Generator,
    *,
    omit: float = 0.05,
    wrong: float = 0.08,
    sum_wrong: float = 0.3,
    redundant: float = 0.12,
    wrong_form: float = 0.05,
    omit_third: float = 0.6,
    ignore_short: float = 0.6,
) -> Response:
    """One demonstration with the flaws of a hurried annotator.

    Independent noise is easy to average out; the two *habits* (``omit_third``, ``ignore_short``)
    are systematic, so a model trained on the demonstrations inherits them and has something to
    learn from feedback.

    Args:
        task: the instruction.
        rng: source of randomness.
        omit: probability that an asked fact is left out.
        wrong: probability that a stated value (other than the sum) is wrong.
        sum_wrong: probability that a stated sum is wrong.
        redundant: probability that a fact nobody asked for is appended.
        wrong_form: probability that the form is not the asked one.
        omit_third: habit, probability that the third asked fact is left out.
        ignore_short: habit, probability that "short" is answered by a sentence.

    Returns:
        An answer with at least one item.
    """
    kept = []
    for place, fact in enumerate(task.facts):
        if rng.random() >= (omit_third if place == 2 else omit):
            kept.append(fact)
    if not kept:
        kept.append(task.facts[0])
    if rng.random() < redundant:
        unasked = [fact for fact in FACTS if fact not in task.facts]
        kept.append(unasked[int(rng.random() * len(unasked))])
    items = []
    for fact in kept:
        missed = rng.random() < (sum_wrong if fact == "sum" else wrong)
        items.append(Item(fact, wrong_value(task, fact, rng) if missed else task.value(fact)))
    form = task.form
    if rng.random() < (ignore_short if form == "short" else wrong_form):
        form = FORMS[1 - FORMS.index(form)]
    return Response(form, tuple(items))
