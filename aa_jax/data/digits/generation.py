"""Subtasks whose answers are media: draw it, dial it, animate it; change it, then say and draw.

An order names digits (in its text, or in a strip it shows) and what to do with them. An answer is
graded by what an independent reader finds in it (:mod:`makers`), with K digits ordered of which R
are right in their place, W wrong, M missing, and E superfluous ones::

    prompt_following      p = clip(3 - M - E)
    objective_rules       o = clip(3 - W)            0 if R = 0
    quality               q = 3 if the reader finds what was meant to be shown, else 0
    information_richness  i = floor(3 R / K)
    safety                s = 3

"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aa_jax.data.digits.images import SPLITS, check_max_digits
from aa_jax.data.digits.makers import MAKERS
from aa_jax.data.digits.scenes import Scene, Written, sample_scene
from aa_jax.errors import DataError

CHANGES = {
    "same": ("", lambda digits: digits),
    "next": ("add one to every digit . ", lambda digits: tuple((d + 1) % 10 for d in digits)),
    "reverse": ("reverse the digits . ", lambda digits: digits[::-1]),
}
FLAWS = ("wrong", "missing", "extra", "swapped", "spoilt")
# Subtask -> (medium of the answer, what shows the digits).
SUBTASKS = {
    "T2I": ("image", "text"),
    "T2A": ("audio", "text"),
    "T2V": ("video", "text"),
    "TI2TI": ("image", "image"),
}


@dataclass(frozen=True)
class Order:
    """One instruction.

    Attributes:
        subtask: key of :data:`SUBTASKS`.
        digits: those named or shown.
        change: key of :data:`CHANGES`.
        scene: what shows them.
        split: of the handwriting in answers.
        max_digits: canvas of drawn answers.
    """

    subtask: str
    digits: tuple[int, ...]
    change: str
    scene: Scene | Written
    split: str
    max_digits: int

    @property
    def target(self) -> tuple[int, ...]:
        """The digits of a right answer, in order."""
        return tuple(CHANGES[self.change][1](self.digits))

    @property
    def question(self) -> str:
        """The instruction's text, without the medium."""
        how = CHANGES[self.change][0]
        if self.subtask == "TI2TI":
            return f"{how}say and draw ."
        maker = MAKERS[SUBTASKS[self.subtask][0]]
        return f"digits {' '.join(map(str, self.digits))} . {how}{maker.verb} ."


@dataclass(frozen=True, eq=False)
class Answer:
    """A medium, the text that goes with it, and the digits it was meant to show."""

    medium: Any
    text: str
    meant: tuple[int, ...]


def sample_order(
    subtask: str,
    split: str,
    rng: np.random.Generator,
    max_digits: int = 3,
    min_digits: int = 1,
) -> Order:
    """A random instruction; "same" is not asked where there is nothing else to do (TI2TI).

    Raises:
        DataError: no such subtask.
    """
    check_max_digits(max_digits)
    if subtask not in SUBTASKS:
        raise DataError(f"media are answered in {', '.join(SUBTASKS)}; got {subtask!r}.")
    digits, scene = sample_scene(split, rng, max_digits, SUBTASKS[subtask][1], min_digits)
    offered = list(CHANGES) if subtask != "TI2TI" else ["next", "reverse"]
    change = offered[int(rng.random() * len(offered))]
    return Order(subtask, digits, change, scene, split, max_digits)


def answer(order: Order, rng: np.random.Generator, flaw: str | None = None) -> Answer:
    """A right answer, or one with a flaw out of :data:`FLAWS` (the nearest one that is possible).

    Raises:
        DataError: no such flaw.
    """
    if flaw is not None and flaw not in FLAWS:
        raise DataError(f"flaws are {', '.join(FLAWS)}; got {flaw!r}.")
    digits = list(order.target)
    spot = int(rng.random() * len(digits))
    if flaw == "missing" and len(digits) > 1:
        del digits[spot]
    elif flaw == "extra" and len(digits) < order.max_digits:
        digits.insert(spot, int(rng.integers(10)))
    elif flaw == "swapped" and len(set(digits)) > 1:
        digits = digits[1:] + digits[:1] if digits[1:] + digits[:1] != digits else digits[::-1]
    elif flaw is not None and flaw != "spoilt":
        digits[spot] = (digits[spot] + 1 + int(rng.integers(9))) % 10
    maker = MAKERS[SUBTASKS[order.subtask][0]]
    medium = maker.make(digits, order.split, rng, order.max_digits)
    if flaw == "spoilt":
        medium = maker.spoil(medium, rng)
    text = f"the digits are {' '.join(map(str, digits))} ." if order.subtask == "TI2TI" else ""
    return Answer(medium, text, tuple(digits))


def grade(order: Order, medium: Any, meant: Sequence[int] | None = None) -> dict[str, int]:
    """Grades 0-3 per dimension.

    Args:
        order: the instruction.
        medium: PIL image or pixels, samples, or frames.
        meant: digits the maker meant; None takes what is read, as for a model's answer.
    """
    seen = tuple(MAKERS[SUBTASKS[order.subtask][0]].read(medium))
    return grade_digits(order.target, seen, meant)


def grade_digits(
    target: Sequence[int], seen: Sequence[int], meant: Sequence[int] | None = None
) -> dict[str, int]:
    """Grades 0-3 per dimension of a medium in which a reader has seen these digits.

    Args:
        target: digits ordered.
        seen: digits read, none if nothing can be read.
        meant: as in :func:`grade`.
    """
    seen = tuple(seen)
    pairs = list(zip(target, seen, strict=False))
    right = sum(a == b for a, b in pairs)
    wrong, missing = len(pairs) - right, max(0, len(target) - len(seen))
    extra = max(0, len(seen) - len(target))
    return {
        "prompt_following": max(0, 3 - missing - extra) if right else 0,
        "objective_rules": max(0, 3 - wrong) if right else 0,
        "quality": 3 if seen and (meant is None or tuple(meant) == seen) else 0,
        "information_richness": 3 * right // len(target),
        "safety": 3,
    }


def parse_order(text: str) -> tuple[int, ...]:
    """The digits a right answer shows, from an order that names its digits in the text.

    Raises:
        DataError: the text is no such order.
    """
    found = re.match(r"digits ((?:\d )+)\. (.*?)(?:draw|dial|animate) \.", text.strip())
    changes = {words: change for words, change in CHANGES.values()}
    if found is None or found[2] not in changes:
        raise DataError(
            f"this is no order of the digits world that names its digits: {text!r}. It reads like "
            "'digits 3 7 . reverse the digits . draw .'."
        )
    return tuple(changes[found[2]](tuple(int(d) for d in found[1].split())))


def overall(grades: dict[str, int]) -> float:
    """Mean of the four informative dimensions."""
    return float(np.mean([value for name, value in grades.items() if name != "safety"]))


def preference_rows(
    n: int, seed: int, subtask: str, split: str = "train", *, max_digits: int = 3,
    right: float = 0.5,
) -> Iterator[dict]:  # fmt: skip
    """``n`` pairs of answers with different grades, in the columns of that subtask.

    T2I: ``prompt, image_1, image_2, ..., overall_image``; T2A the same with ``response_1``,
    ``response_2`` and ``overall_audio``; T2V with ``video_1``, ``video_2`` and ``overall_video``;
    TI2TI as the template ``ti2ti_preference`` has it. Row *i* depends on (seed, i) only.

    Args:
        n: number of rows.
        seed: of everything random.
        subtask: key of :data:`SUBTASKS`.
        split: of the digit images.
        max_digits: digits per order.
        right: share of pairs in which one answer has no flaw.
    """
    for index in range(n):
        rng = np.random.default_rng((51, list(SPLITS).index(split), seed, index))
        order = sample_order(subtask, split, rng, max_digits)
        grades: list[dict[str, int]] = []
        while not grades or overall(grades[0]) == overall(grades[1]):
            flaws = [None if rng.random() < right else _flaw(rng), _flaw(rng)]
            if rng.random() < 0.5:
                flaws.reverse()
            pair = [answer(order, rng, flaw) for flaw in flaws]
            grades = [grade(order, one.medium, one.meant) for one in pair]
        yield _preference_row(order, pair, grades)


def _flaw(rng: np.random.Generator) -> str:
    return FLAWS[int(rng.random() * len(FLAWS))]


def _preference_row(order: Order, pair: Sequence[Answer], grades: Sequence[dict]) -> dict:
    better = 1 if overall(grades[0]) > overall(grades[1]) else 2
    files = [_file(order, one.medium) for one in pair]
    if order.subtask == "TI2TI":
        won, lost = better - 1, 2 - better
        return {
            "input_text": order.question,
            "input_image": order.scene.columns()["image"],
            "better_text": pair[won].text,
            "better_img": files[won],
            "worse_text": pair[lost].text,
            "worse_img": files[lost],
        }
    kind = SUBTASKS[order.subtask][0]
    name = "response" if kind == "audio" else kind
    row = {"prompt": order.question, f"{name}_1": files[0], f"{name}_2": files[1]}
    for dimension in grades[0]:
        for k in (0, 1):
            row[f"{dimension}_rate_{k + 1}"] = grades[k][dimension]
    return row | {f"overall_{kind}": better}


def sft_rows(
    n: int, seed: int, subtask: str, split: str = "train", *, max_digits: int = 3,
    flawed: float = 0.0,
) -> Iterator[dict]:  # fmt: skip
    """``n`` demonstrations; of these a share of ``flawed`` has a flaw.

    TI2TI in the columns of the template ``ti2ti``; the others ``prompt`` and ``image``, ``audio``
    or ``video``.
    """
    for index in range(n):
        rng = np.random.default_rng((52, list(SPLITS).index(split), seed, index))
        order = sample_order(subtask, split, rng, max_digits)
        shown = answer(order, rng, _flaw(rng) if rng.random() < flawed else None)
        if subtask == "TI2TI":
            yield {
                "input_text": order.question,
                "input_image": order.scene.columns()["image"],
                "output_text": shown.text,
                "output_image": _file(order, shown.medium),
            }
        else:
            yield {
                "prompt": order.question,
                SUBTASKS[subtask][0]: _file(order, shown.medium),
            }


def _file(order: Order, medium: Any) -> dict:
    return {"bytes": MAKERS[SUBTASKS[order.subtask][0]].encode(medium), "path": None}
