"""The oracle: grades any answer text 0-3 on the paper's dimensions, and says why.

Formulas, for K asked facts of which R are right, W wrong and M missing, E statements nobody asked
for (F of them false), B = 1 if the form is not the asked one, the order is not the asked one or
there are stray tokens, N = 1 if there are stray tokens or named and unnamed values are mixed::

    prompt_following      p = clip(3 - M - B)
    objective_rules       o = clip(3 - W - F)        0 if R = 0
    clarity               c = clip(3 - B - E - N)
    information_richness  i = floor(3 R / K)
    safety                s = 3                      (nothing unsafe can be said here)

with clip to [0, 3]; an answer that states none of the asked facts (M = K) has p = o = c = i = 0.
``overall`` is the mean of p, o, c, i. No statement beyond the asked ones, and no repetition, can
raise any dimension, so length alone earns nothing.

Dimensions: Align-Anything (preference annotation, text output), each 0-3 with a rationale.
"""

import itertools
from typing import NamedTuple

import numpy as np

from aa_jax.data.digits.feedback import (
    MISSING,
    REST,
    RIGHT,
    WRONG,
    Action,
    Diagnosis,
    Feedback,
    advise,
    parse_feedback,
)
from aa_jax.data.digits.responses import Item, Response, parse, render, wrong_value
from aa_jax.data.digits.tasks import FACTS, FORMS, Task

# Column prefix of the dataset -> dimension.
DIMENSIONS = {
    "p": "prompt_following",
    "o": "objective_rules",
    "c": "clarity",
    "i": "information_richness",
    "s": "safety",
}
INFORMATIVE = ("prompt_following", "objective_rules", "clarity", "information_richness")


class Reading(NamedTuple):
    """An answer as the oracle understands it for one task.

    Attributes:
        values: fact -> stated value, first mentions only, asked or not, in the order of the text.
        rest: the other statements: repetitions and unnamed values that match no fact.
        statuses: per asked fact right, wrong or missing.
        extras: one name per statement nobody asked for (``rest`` included).
        false_extras: how many of the extras are false.
        form: form of the text, see :class:`Response`.
        form_good: form and order as asked, no stray tokens.
        malformed: stray tokens, or named and unnamed values mixed.
    """

    values: dict[str, tuple[int, ...]]
    rest: tuple[Item, ...]
    statuses: tuple[tuple[str, str], ...]
    extras: tuple[str, ...]
    false_extras: int
    form: str
    form_good: bool
    malformed: bool

    @property
    def diagnosis(self) -> Diagnosis:
        return Diagnosis(self.statuses, self.form_good, tuple(dict.fromkeys(self.extras)))


class Grade(NamedTuple):
    """Scores 0-3 per dimension, with one sentence each under the same name in ``rationales``."""

    prompt_following: int
    objective_rules: int
    clarity: int
    information_richness: int
    safety: int
    rationales: dict[str, str]

    @property
    def overall(self) -> float:
        """Mean of the four informative dimensions, 0 to 3."""
        return sum(getattr(self, name) for name in INFORMATIVE) / len(INFORMATIVE)


def scores(right, wrong, missing, form_bad, extras, false_extras=0, malformed=0) -> np.ndarray:
    """The formulas of the module docstring, on counts of any common shape.

    Returns:
        Integer scores [..., 4] in the order of :data:`INFORMATIVE`.
    """
    right, wrong, missing = np.asarray(right), np.asarray(wrong), np.asarray(missing)
    asked = right + wrong + missing
    table = np.stack(
        [
            3 - missing - form_bad,
            np.where(right > 0, 3 - wrong - false_extras, 0),
            3 - form_bad - extras - malformed,
            3 * right // np.maximum(asked, 1),
        ],
        axis=-1,
    )
    return np.clip(table, 0, 3) * (missing < asked)[..., None]


def read(task: Task, text: str) -> Reading:
    """Understands an answer text for a task: which statement is about what, and is it true.

    Unnamed values (short form) are matched to the asked facts in order, skipping facts where that
    makes more values right; those beyond the number of asked facts take the name of an unasked
    fact they are true of.
    """
    response = parse(text)
    values, rest = _bind(task, response)
    truths = {True: RIGHT, False: WRONG}
    statuses = tuple(
        (fact, MISSING if fact not in values else truths[values[fact] == task.value(fact)])
        for fact in task.facts
    )
    unasked = [fact for fact in values if fact not in task.facts]
    false_named = sum(values[fact] != task.value(fact) for fact in unasked)
    false_rest = sum(item.fact is None or item.value != task.value(item.fact) for item in rest)
    mentioned = [fact for fact in values if fact in task.facts]
    in_order = mentioned == [fact for fact in task.facts if fact in values]
    malformed = response.noise > 0 or response.form in ("mixed", "none")
    return Reading(
        values=values,
        rest=rest,
        statuses=statuses,
        extras=tuple(unasked) + (REST,) * len(rest),
        false_extras=false_named + false_rest,
        form=response.form,
        form_good=response.form == task.form and in_order and not malformed,
        malformed=malformed,
    )


def _bind(task: Task, response: Response) -> tuple[dict[str, tuple[int, ...]], tuple[Item, ...]]:
    """First mention of every fact, and the statements left over."""
    named = {item.fact for item in response.items if item.fact}
    unnamed = [item.value for item in response.items if item.fact is None]
    names = _align(unnamed, [(fact, task.value(fact)) for fact in task.facts if fact not in named])
    guesses = [fact for fact in FACTS if fact not in task.facts and fact not in named]
    values: dict[str, tuple[int, ...]] = {}
    rest = []
    unnamed_seen = 0
    for item in response.items:
        fact = item.fact
        if fact is None:
            fact = names[unnamed_seen]
            unnamed_seen += 1
            if fact is None:
                fits = [g for g in guesses if g not in values and task.value(g) == item.value]
                fact = fits[0] if fits else None
        if fact is None or fact in values:
            rest.append(Item(fact, item.value))
        else:
            values[fact] = item.value
    return values, tuple(rest)


def _align(
    stated: list[tuple[int, ...]], asked: list[tuple[str, tuple[int, ...]]]
) -> list[str | None]:
    """The asked fact each unnamed value is about, None for those beyond the number of asked facts.

    Facts may be skipped (left out by the answer), values may not: listing several guesses for one
    fact must not pay. Of all such readings the one with most right values holds; among equals the
    one with most values of the right number of digits, then the earliest facts.
    """
    read = stated[: len(asked)]
    best, names = -1, ()
    for choice in itertools.combinations(asked, len(read)):
        truths = [truth for _, truth in choice]
        # A right value outweighs any number (at most three) of merely plausible ones.
        gain = 10 * sum(value == truth for value, truth in zip(read, truths, strict=True))
        gain += sum(len(value) == len(truth) for value, truth in zip(read, truths, strict=True))
        if gain > best:
            best, names = gain, tuple(fact for fact, _ in choice)
    return [*names] + [None] * (len(stated) - len(read))


def counts(reading: Reading) -> dict[str, int]:
    """The arguments of :func:`scores` for a reading."""
    statuses = [status for _, status in reading.statuses]
    return {
        "right": statuses.count(RIGHT),
        "wrong": statuses.count(WRONG),
        "missing": statuses.count(MISSING),
        "form_bad": int(not reading.form_good),
        "extras": len(reading.extras),
        "false_extras": reading.false_extras,
        "malformed": int(reading.malformed),
    }


def grade(task: Task, text: str) -> Grade:
    """Grades any text as an answer to ``task``, with one-sentence rationales."""
    reading = read(task, text)
    p, o, c, i = (int(score) for score in scores(**counts(reading)))
    return Grade(p, o, c, i, 3, rationales(reading))


def overall(task: Task, text: str) -> float:
    """Mean of the four informative dimensions of an answer, 0 to 3."""
    return float(scores(**counts(read(task, text))).mean())


def prefer(task: Task, response_1: str, response_2: str) -> int:
    """1 or 2 for the truly better answer by ``overall``, 0 for a tie."""
    first, second = overall(task, response_1), overall(task, response_2)
    return 0 if first == second else 1 if first > second else 2


def true_feedback(task: Task, text: str) -> Feedback:
    """The true critique and refinement of an answer."""
    return advise(read(task, text).diagnosis, task.form)


def feedback_accuracy(task: Task, response: str, text: str) -> dict[str, bool]:
    """Which parts of a feedback text are true of an answer.

    Returns:
        One entry per asked fact (its status is right), "form", "extras", and "refinement" (the
        actions are exactly the right ones, in any order).
    """
    truth, given = true_feedback(task, response), parse_feedback(text)
    said = dict(given.diagnosis.statuses)
    result = {fact: said.get(fact) == status for fact, status in truth.diagnosis.statuses}
    result["form"] = given.diagnosis.form_good == truth.diagnosis.form_good
    result["extras"] = set(given.diagnosis.extras) == set(truth.diagnosis.extras)
    result["refinement"] = set(given.actions) == set(truth.actions)
    return result


def rationales(reading: Reading) -> dict[str, str]:
    """One sentence per dimension, in the words of the world's vocabulary."""
    statuses = reading.statuses
    missing = [f"the {fact} {_be(fact)} missing" for fact, status in statuses if status == MISSING]
    wrong = [f"the {fact} {_be(fact)} wrong" for fact, status in statuses if status == WRONG]
    right = sum(status == RIGHT for _, status in statuses)
    form = [] if reading.form_good else ["the form is not as asked"]
    extras = [f"the {extra} {_be(extra)} extra" for extra in dict.fromkeys(reading.extras)]
    if reading.false_extras:
        wrong.append("the extra is wrong")
    if reading.malformed:
        extras.append("the text is broken")
    if len(missing) == len(statuses):
        nothing = "none of the asked facts is given ."
        told = dict.fromkeys(INFORMATIVE, nothing)
    else:
        told = {
            "prompt_following": _join(missing + form) or "all asked facts are given as asked .",
            "objective_rules": _join(wrong) or "all given facts are right .",
            "clarity": _join(form + extras) or "the answer is clear .",
            "information_richness": f"{right} of {len(statuses)} asked facts are right .",
        }
    return told | {"safety": "the answer is safe ."}


def _be(name: str) -> str:
    return "are" if name == "digits" else "is"


def _join(clauses: list[str]) -> str:
    return " and ".join(clauses) + " ." if clauses else ""


def apply_refinement(
    task: Task,
    response: str,
    refinement: tuple[Action, ...],
    rng: np.random.Generator,
    *,
    literal: bool = True,
    follow: float = 0.85,
    break_right: float = 0.7,
) -> str:
    """Revises an answer as told.

    ``literal``: every action is followed with probability ``follow``, sensible or not: a right
    value that is told to be fixed is changed (with probability ``break_right``), an asked fact is
    removed, an unasked one added, and the named form is used even where it is not the asked one.
    So what the advice *says* decides how good the revision is. Not literal: only what helps is
    done, always.

    Args:
        task: the instruction (the reviser knows the truth).
        response: any answer text; stray tokens are dropped.
        refinement: the actions, see :func:`~aa_jax.data.digits.feedback.parse_refinement`.
        rng: source of randomness.
        literal: follow literally.
        follow: probability that an action is followed, per action (literal only).
        break_right: probability that a right value told to be fixed changes (literal only).

    Returns:
        The revised text: asked facts in the asked order, others behind them. The last statement
        is never removed.
    """
    reading = read(task, response)
    values, rest = dict(reading.values), list(reading.rest)
    form = reading.form if reading.form in FORMS else task.form
    for verb, target in refinement:
        if literal and rng.random() >= follow:
            continue
        if verb == "use":
            form = target if literal else task.form
        elif verb == "remove":
            if target == REST:
                rest = []
            elif target in values and len(values) > 1 and (literal or target not in task.facts):
                del values[target]
        elif target == REST:  # "fix the rest", "add the rest": nothing it could refer to
            continue
        elif verb == "fix" and target in values:
            if values[target] != task.value(target):
                values[target] = task.value(target)
            elif literal and rng.random() < break_right:
                values[target] = wrong_value(task, target, rng)
        elif verb == "add" and target not in values and (literal or target in task.facts):
            values[target] = task.value(target)
    order = [fact for fact in task.facts if fact in values]
    order += [fact for fact in values if fact not in task.facts]
    items = [Item(fact, values[fact]) for fact in order]
    if form == "short":
        items += rest
    else:  # a sentence can only repeat what has a name
        items += [item for item in rest if item.fact is not None]
    return render(Response(form, tuple(items)))
