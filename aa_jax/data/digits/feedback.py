"""Language feedback as structure and as text.

A piece of feedback is a *critique* (a status for every item of an answer) and a *refinement* (what
to do about it), in the dataset's format::

    ##Critique: digits right , sum wrong , largest missing , form bad , count extra
    ##Refinement: fix the sum , add the largest , remove the count , use short form

(one line). Source of the format: PKU-Alignment/align-anything, columns ``text_critique_1/2``.
"""

import re
from typing import NamedTuple

import numpy as np

from aa_jax.data.digits.tasks import FACTS, FORMS, Task

RIGHT, WRONG, MISSING = STATUSES = ("right", "wrong", "missing")
REST = "rest"  # repeated or unnamed statements: what cannot be called by the name of a fact
_FORM_ACTIONS = {"sentence": "use a sentence", "short": "use short form"}
_NOTHING = "change nothing"
_TARGETS = "|".join(FACTS + (REST,))
_STATUS = re.compile(rf"\b({'|'.join(FACTS)})\s+({'|'.join(STATUSES)})\b")
_EXTRA = re.compile(rf"\b({_TARGETS})\s+extra\b")
_FORM = re.compile(r"\bform\s+(good|bad)\b")
_ACTION = re.compile(
    rf"\b(?:(fix|add|remove)\s+(?:the\s+)?({_TARGETS})|use\s+(a sentence|short))\b"
)


class Diagnosis(NamedTuple):
    """What an annotator found in an answer.

    Attributes:
        statuses: (asked fact, "right" | "wrong" | "missing"), in the asked order.
        form_good: the form is the asked one, in the asked order, with no stray tokens.
        extras: what nobody asked for: facts, or "rest" for repeated or unnamed values.
    """

    statuses: tuple[tuple[str, str], ...]
    form_good: bool
    extras: tuple[str, ...] = ()


class Action(NamedTuple):
    """One instruction of a refinement: fix, add or remove a fact, or use a form."""

    verb: str
    target: str


class Feedback(NamedTuple):
    """Critique and refinement; parsed from a model's text, the two may contradict each other."""

    diagnosis: Diagnosis
    actions: tuple[Action, ...]

    @property
    def critique(self) -> str:
        return critique_text(self.diagnosis)

    @property
    def refinement(self) -> str:
        return refinement_text(self.actions)

    @property
    def text(self) -> str:
        """``##Critique: … ##Refinement: …`` on one line."""
        return f"##Critique: {self.critique} ##Refinement: {self.refinement}"


def advise(diagnosis: Diagnosis, form: str) -> Feedback:
    """The feedback that follows from a diagnosis; ``form`` is named if the form is bad."""
    verbs = {WRONG: "fix", MISSING: "add"}
    actions = [
        Action(verbs[status], fact) for fact, status in diagnosis.statuses if status in verbs
    ]
    actions += [Action("remove", extra) for extra in diagnosis.extras]
    if not diagnosis.form_good:
        actions.append(Action("use", form))
    return Feedback(diagnosis, tuple(actions))


def critique_text(diagnosis: Diagnosis) -> str:
    """The critique without its marker: ``digits right , sum wrong , form good``."""
    entries = [f"{fact} {status}" for fact, status in diagnosis.statuses]
    entries.append("form good" if diagnosis.form_good else "form bad")
    entries += [f"{extra} extra" for extra in diagnosis.extras]
    return " , ".join(entries)


def refinement_text(actions: tuple[Action, ...]) -> str:
    """The refinement without its marker: ``fix the sum , use short form``."""
    entries = [
        _FORM_ACTIONS[target] if verb == "use" else f"{verb} the {target}"
        for verb, target in actions
    ]
    return " , ".join(entries) if entries else _NOTHING


def parse_feedback(text: str) -> Feedback:
    """Reads feedback from any text; never fails, what it does not know it skips.

    A text without markers is read as critique and refinement at once. A fact named twice keeps
    its first status. The form counts as good unless the critique says "form bad".
    """
    lowered = " ".join(text.lower().split())
    head, marker, tail = lowered.partition("##refinement:")
    critique, refinement = (head, tail) if marker else (lowered, lowered)
    statuses: dict[str, str] = {}
    for fact, status in _STATUS.findall(critique):
        statuses.setdefault(fact, status)
    extras = tuple(dict.fromkeys(_EXTRA.findall(critique)))
    forms = _FORM.findall(critique)
    form_good = not forms or forms[0] == "good"
    diagnosis = Diagnosis(tuple(statuses.items()), form_good, extras)
    return Feedback(diagnosis, parse_refinement(refinement))


def parse_refinement(text: str) -> tuple[Action, ...]:
    """The actions named in a refinement, in order, without repetitions."""
    actions = []
    for verb, target, form in _ACTION.findall(" ".join(text.lower().split())):
        if form:
            actions.append(Action("use", "short" if form == "short" else "sentence"))
        else:
            actions.append(Action(verb, target))
    return tuple(dict.fromkeys(actions))


def random_feedback(
    task: Task,
    rng: np.random.Generator,
    *,
    bad: float = 0.5,
    bad_form: float = 0.3,
    extra: float = 0.2,
) -> Feedback:
    """Feedback with the right shape and random content, blind to any answer.

    It teaches the format of feedback (and to follow advice literally) without teaching to judge.
    The named form is random too, so "the form is bad" is not a synonym of "use the asked form";
    any fact that is not called wrong or missing may be called extra, also an asked one.

    Args:
        task: whose facts are named.
        rng: source of randomness.
        bad: probability that a fact is called wrong or missing (equally likely).
        bad_form: probability that the form is called bad.
        extra: probability that one fact is called extra.
    """
    statuses = []
    for fact in task.facts:
        draw = rng.random()
        status = RIGHT if draw >= bad else (WRONG if draw < bad / 2 else MISSING)
        statuses.append((fact, status))
    extras: tuple[str, ...] = ()
    if rng.random() < extra:
        blamed = {fact for fact, status in statuses if status != RIGHT}
        free = [fact for fact in FACTS if fact not in blamed]
        extras = (free[int(rng.random() * len(free))],)
    form_good = rng.random() >= bad_form
    form = FORMS[int(rng.random() * len(FORMS))]
    return advise(Diagnosis(tuple(statuses), form_good, extras), form)
