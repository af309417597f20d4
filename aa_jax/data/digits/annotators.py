"""Annotators as parameters: how people err when they compare, and when they write feedback.

Table 1 of the paper reports how often two annotators agree on a pair of answers, without and with
language feedback. Here an annotator is a small random process whose noise is set so that two
independent annotators agree exactly that often.

**Agreement, precisely.** Every judgement is made afresh (attention and noise are drawn anew per
annotator and pair), so ten annotators are ten independent draws. For a pair on which k of A
annotators choose response 1, the share of annotator pairs that agree is
``(k(k-1) + (A-k)(A-k-1)) / (A(A-1))``; agreement is its mean over answer pairs with different
texts (also those that are truly tied).

**Binary labels.** ``bounded``: an annotator looks at ``looks`` of the four informative dimensions
and chooses the larger of::

    u(y) = mean score over the dimensions looked at
         + length_bias * words / 10 + smooth_bias * [y is in sentence form] + noise * N(0, 1)

The biases are the same for everybody, so they do not average out over annotators, and they *raise*
agreement while they lower accuracy. ``flips``: the true preference, flipped with one probability
(a true tie is a coin toss).

**Language feedback.** The annotator must give a status to every item of an answer: each asked
fact, the form, each superfluous statement. Each status is mistaken with probability
``status_error`` (wrong and missing become right, right becomes wrong, form good <-> bad, a
superfluous statement is overlooked). ``halo`` is what remains of the bias: flaws of a longer,
smoother answer are overlooked more often, and its good parts blamed less often, by up to that
share. Who finds a good form bad advises the form the answer does not have. The preference implied
by feedback is that of the mean of the scores the statuses imply (oracle formulas); ties are coin
tosses. ``flips`` has no halo.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from aa_jax.data.digits import oracle
from aa_jax.data.digits.feedback import MISSING, RIGHT, WRONG, Diagnosis, Feedback, advise
from aa_jax.data.digits.responses import sample_response
from aa_jax.data.digits.tasks import FORMS, Task, sample_task
from aa_jax.errors import ConfigError, DataError

# Paper, Table 1: human agreement without -> with language feedback.
AGREEMENT = {
    "T2T": (0.732, 0.741),
    "TI2T": (0.625, 0.705),
    "T2I": (0.632, 0.692),
    "TI2TI": (0.627, 0.683),
    "TV2T": (0.621, 0.672),
    "T2V": (0.608, 0.658),
    "TA2T": (0.618, 0.686),
    "T2A": (0.587, 0.643),
}
MODELS = ("bounded", "flips")
# Many pairs, few annotators: the share of true ties among the pairs is the larger sampling error.
_CALIBRATION_PAIRS = 8000
_CALIBRATION_ANNOTATORS = 4
_NO_FACT, _OK, _BAD, _ABSENT = -1, 0, 1, 2  # statuses as integers
_STATUS_CODES = {RIGHT: _OK, WRONG: _BAD, MISSING: _ABSENT}
_STATUS_NAMES = {code: name for name, code in _STATUS_CODES.items()}


class Pair(NamedTuple):
    """Two answers to one task."""

    task: Task
    response_1: str
    response_2: str


@dataclass(frozen=True, eq=False)
class Features:
    """What annotators see of N answers, as arrays.

    Attributes:
        scores: true scores of the four informative dimensions.
        words: number of tokens.
        smooth: 1 if in sentence form.
        statuses: status code per asked fact, -1 where fewer than three are asked.
        form_bad: 1 if the form is bad.
        extras: number of distinct superfluous statements.
    """

    scores: Int[np.ndarray, "N 4"]
    words: Int[np.ndarray, " N"]
    smooth: Int[np.ndarray, " N"]
    statuses: Int[np.ndarray, "N 3"]
    form_bad: Int[np.ndarray, " N"]
    extras: Int[np.ndarray, " N"]


def features(answers: Sequence[tuple[Task, str]]) -> Features:
    """Reads answers into arrays."""
    rows = []
    for task, text in answers:
        reading = oracle.read(task, text)
        count = oracle.counts(reading)
        codes = [_STATUS_CODES[status] for _, status in reading.statuses]
        codes += [_NO_FACT] * (3 - len(codes))
        smooth = int(reading.form == "sentence")
        extras = len(reading.diagnosis.extras)
        row = [len(text.split()), smooth, *codes, count["form_bad"], extras, *count.values()]
        rows.append(row)
    table = np.asarray(rows, np.int64).reshape(len(rows), 14)
    return Features(
        scores=oracle.scores(*table[:, 7:].T),
        words=table[:, 0],
        smooth=table[:, 1],
        statuses=table[:, 2:5],
        form_bad=table[:, 5],
        extras=table[:, 6],
    )


@dataclass(frozen=True)
class Annotator:
    """One annotator model; :func:`calibrated` gives one with Table 1's agreement.

    Attributes:
        model: "bounded" or "flips".
        noise: bounded: standard deviation of the utility noise, in score points.
        flip: flips: probability that the true preference is flipped.
        status_error: probability that a status of a written critique is mistaken.
        looks: bounded: dimensions looked at per comparison, 1 to 4.
        length_bias: bounded: score points per ten words.
        smooth_bias: bounded: score points for sentence form.
        halo: bounded: how much longer and smoother answers shift ``status_error``, 0 to 1.
    """

    model: str = "bounded"
    noise: float = 1.0
    flip: float = 0.25
    status_error: float = 0.15
    looks: int = 2
    length_bias: float = 0.3
    smooth_bias: float = 0.3
    halo: float = 0.3

    def __post_init__(self):
        if self.model not in MODELS:
            raise ConfigError(f"annotator models are {', '.join(MODELS)}; got {self.model!r}.")
        if self.looks not in (1, 2, 3, 4):
            raise ConfigError(f"an annotator looks at 1 to 4 dimensions, got {self.looks}.")

    def binary_label(self, pair: Pair, rng: np.random.Generator) -> int:
        """1 or 2: the answer one fresh annotator chooses."""
        return int(self.binary_labels([pair], rng)[0, 0])

    def binary_labels(
        self, pairs: Sequence[Pair], rng: np.random.Generator, annotators: int = 1
    ) -> Int[np.ndarray, "N A"]:
        """Labels 1 or 2 of ``annotators`` independent annotators for every pair."""
        first, second = _pair_features(pairs)
        return self._choose(first, second, _choice_draws(rng, len(pairs), annotators))

    def feedback(self, task: Task, response: str, rng: np.random.Generator) -> Feedback:
        """Critique and refinement one fresh annotator writes; ``.text`` is the dataset's string."""
        reading = oracle.read(task, response)
        seen = features([(task, response)])
        statuses, form_bad, noticed = self._inspect(seen, _status_draws(rng, 1, 1))
        said = tuple(
            (fact, _STATUS_NAMES[int(code)])
            for (fact, _), code in zip(reading.statuses, statuses[0, 0], strict=False)
        )
        extras = reading.diagnosis.extras
        # More superfluous statements than there are draws are always noticed.
        kept = tuple(
            extra
            for place, extra in enumerate(extras)
            if place >= noticed.shape[-1] or noticed[0, 0, place]
        )
        bad = bool(form_bad[0, 0])
        form = task.form
        if bad and reading.form_good:  # mistaken, so the advice is the form it does not have
            form = FORMS[1 - FORMS.index(task.form)]
        return advise(Diagnosis(said, not bad, kept), form)

    def feedback_label(self, pair: Pair, rng: np.random.Generator) -> int:
        """1 or 2: the preference implied by the feedback one fresh annotator writes on both."""
        return int(self.feedback_labels([pair], rng)[0, 0])

    def feedback_labels(
        self, pairs: Sequence[Pair], rng: np.random.Generator, annotators: int = 1
    ) -> Int[np.ndarray, "N A"]:
        """Preferences implied by the feedback of independent annotators, for every pair."""
        first, second = _pair_features(pairs)
        draws = _feedback_draws(rng, len(pairs), annotators)
        return self._imply(first, second, draws)

    def _choose(self, first: Features, second: Features, draws: tuple) -> np.ndarray:
        order, normal, coin = draws
        if self.model == "flips":
            gap = first.scores.sum(1) - second.scores.sum(1)
            prefers = np.where(coin[..., 0] < self.flip, -gap[:, None], gap[:, None])
            return np.where(prefers == 0, 1 + (coin[..., 1] < 0.5), np.where(prefers > 0, 1, 2))
        # The dimensions with the lowest random ranks are looked at: a uniform subset.
        looked = np.argsort(np.argsort(order, axis=-1), axis=-1) < self.looks
        gap = (looked * (first.scores - second.scores)[:, None]).sum(-1) / self.looks
        gap = gap + (self._appeal(first) - self._appeal(second))[:, None]
        return np.where(gap + self.noise * (normal[..., 0] - normal[..., 1]) > 0, 1, 2)

    def _appeal(self, seen: Features) -> np.ndarray:
        return self.length_bias * seen.words / 10 + self.smooth_bias * seen.smooth

    def _inspect(self, seen: Features, draws: Float[np.ndarray, "N A 6"]) -> tuple:
        """Noisy statuses [N, A, 3], form_bad [N, A], noticed extras [N, A, 2]."""
        appeal = np.clip((seen.words - 12) / 24, -0.5, 0.5) + (seen.smooth - 0.5)
        shift = self.halo * appeal if self.model == "bounded" else 0 * appeal
        overlook = (self.status_error * (1 + shift))[:, None, None]
        blame = (self.status_error * (1 - shift))[:, None, None]
        true = np.broadcast_to(seen.statuses[:, None], draws.shape[:2] + (3,))
        facts = draws[..., :3]
        statuses = np.where(
            true == _OK,
            np.where(facts < blame, _BAD, _OK),
            np.where((true > _OK) & (facts < overlook), _OK, true),
        )
        bad = np.broadcast_to(seen.form_bad[:, None], draws.shape[:2]).astype(bool)
        mistaken = draws[..., 3] < np.where(bad, overlook[..., 0], blame[..., 0])
        return statuses, bad ^ mistaken, draws[..., 4:] >= overlook

    def _imply(self, first: Features, second: Features, draws: tuple) -> np.ndarray:
        *inspections, coin = draws
        gap = self._implied(first, inspections[0]) - self._implied(second, inspections[1])
        return np.where(gap == 0, 1 + (coin < 0.5), np.where(gap > 0, 1, 2))

    def _implied(self, seen: Features, draws: Float[np.ndarray, "N A 6"]) -> np.ndarray:
        """Total score [N, A] implied by noisy statuses."""
        statuses, form_bad, noticed = self._inspect(seen, draws)
        slots = np.arange(noticed.shape[-1]) < seen.extras[:, None, None]
        extras = (noticed & slots).sum(-1)
        extras = extras + np.maximum(seen.extras - noticed.shape[-1], 0)[:, None]
        right, wrong, missing = ((statuses == code).sum(-1) for code in (_OK, _BAD, _ABSENT))
        return oracle.scores(right, wrong, missing, form_bad.astype(int), extras).sum(-1)


def _pair_features(pairs: Sequence[Pair]) -> tuple[Features, Features]:
    return (
        features([(pair.task, pair.response_1) for pair in pairs]),
        features([(pair.task, pair.response_2) for pair in pairs]),
    )


def _choice_draws(rng: np.random.Generator, pairs: int, annotators: int) -> tuple:
    shape = (pairs, annotators)
    return rng.random(shape + (4,)), rng.standard_normal(shape + (2,)), rng.random(shape + (2,))


def _status_draws(rng: np.random.Generator, answers: int, annotators: int) -> np.ndarray:
    """Uniform draws per answer and annotator: three facts, the form, two extras."""
    return rng.random((answers, annotators, 6))


def _feedback_draws(rng: np.random.Generator, pairs: int, annotators: int) -> tuple:
    return (
        _status_draws(rng, pairs, annotators),
        _status_draws(rng, pairs, annotators),
        rng.random((pairs, annotators)),
    )


def agreement(labels: Int[np.ndarray, "N A"]) -> float:
    """Share of annotator pairs that agree, averaged over the answer pairs.

    Raises:
        DataError: fewer than two annotators.
    """
    annotators = labels.shape[1]
    if annotators < 2:
        raise DataError(f"agreement needs two or more annotators per pair, got {annotators}.")
    ones = (labels == 1).sum(axis=1)
    others = annotators - ones
    agreeing = ones * (ones - 1) + others * (others - 1)
    return float(agreeing.mean() / (annotators * (annotators - 1)))


def demonstration_pairs(n: int, seed: int, *, max_digits: int = 3, **flaws) -> list[Pair]:
    """Pairs of two independent demonstrations with different texts.

    Args:
        n: number of pairs.
        seed: of tasks and demonstrations.
        max_digits: digits per task are 1 to this.
        **flaws: rates, see :func:`~aa_jax.data.digits.responses.sample_response`.
    """
    rng = np.random.default_rng((seed, 1))
    pairs: list[Pair] = []
    while len(pairs) < n:
        digits = tuple(rng.integers(0, 10, 1 + int(rng.random() * max_digits)).tolist())
        task = sample_task(digits, rng)
        texts = [sample_response(task, rng, **flaws).text for _ in range(2)]
        if texts[0] != texts[1]:
            pairs.append(Pair(task, *texts))
    return pairs


def calibrated(
    model: str = "bounded",
    subtask: str = "TI2T",
    pairs: Sequence[Pair] | None = None,
    seed: int = 0,
    **parameters,
) -> Annotator:
    """An annotator whose agreement is Table 1's for a subtask.

    Two strengths are found by bisection on a fixed draw (common random numbers):
    ``noise`` (bounded) or ``flip`` (flips) for binary labels, ``status_error`` for feedback.

    Args:
        model: "bounded" or "flips".
        subtask: key of :data:`AGREEMENT`.
        pairs: the population agreement is about; default 8,000 demonstration pairs. Pass the
            pairs to be labelled if a model wrote them: its answers differ less or more.
        seed: of the calibration draw.
        **parameters: other fields of :class:`Annotator`, e.g. the bias weights.

    Raises:
        ConfigError: unknown subtask or model, or no strength reaches the agreement (the biases
            alone agree more, or the truth has too many ties).
    """
    if subtask not in AGREEMENT:
        raise ConfigError(f"subtasks are {', '.join(AGREEMENT)}; got {subtask!r}.")
    key = tuple(sorted(parameters.items()))
    if pairs is None:
        return _calibrated_on_demonstrations(model, subtask, seed, key)
    return _calibrate(model, subtask, _pair_features(pairs), seed, key)


@functools.lru_cache(maxsize=64)
def _calibrated_on_demonstrations(model: str, subtask: str, seed: int, key: tuple) -> Annotator:
    return _calibrate(model, subtask, _demonstration_features(seed), seed, key)


@functools.lru_cache(maxsize=4)
def _demonstration_features(seed: int) -> tuple[Features, Features]:
    return _pair_features(demonstration_pairs(_CALIBRATION_PAIRS, seed))


def _calibrate(
    model: str, subtask: str, seen: tuple[Features, Features], seed: int, key: tuple
) -> Annotator:
    annotator = Annotator(model=model, **dict(key))
    rng = np.random.default_rng((seed, 2))
    size = (len(seen[0].words), _CALIBRATION_ANNOTATORS)
    binary_target, feedback_target = AGREEMENT[subtask]

    choices = _choice_draws(rng, *size)
    strength, high = ("noise", 8.0) if model == "bounded" else ("flip", 0.5)

    def binary(value: float) -> float:
        return agreement(replace(annotator, **{strength: value})._choose(*seen, choices))

    found = _bisect(binary, high, binary_target, f"binary labels of {subtask}")
    annotator = replace(annotator, **{strength: found})
    inspections = _feedback_draws(rng, *size)

    def feedback(value: float) -> float:
        return agreement(replace(annotator, status_error=value)._imply(*seen, inspections))

    found = _bisect(feedback, 0.5, feedback_target, f"feedback of {subtask}")
    return replace(annotator, status_error=found)


def _bisect(measure: Callable[[float], float], high: float, target: float, what: str) -> float:
    """The strength in [0, high] at which a falling agreement crosses the target."""
    low = 0.0
    top, bottom = measure(low), measure(high)
    if not bottom <= target <= top:
        raise ConfigError(
            f"No annotator strength gives the agreement {target:.3f} for {what}: these answer "
            f"pairs allow {bottom:.3f} to {top:.3f}. Use weaker biases, look at more dimensions, "
            "or calibrate on pairs with fewer true ties."
        )
    for _ in range(24):
        middle = 0.5 * (low + high)
        if measure(middle) > target:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def accuracy(labels: Int[np.ndarray, "N A"], pairs: Sequence[Pair]) -> float:
    """Share of labels that are the truly better answer, over pairs that are not truly tied."""
    truth = np.array([oracle.prefer(*pair) for pair in pairs])
    decided: Bool[np.ndarray, " N"] = truth > 0
    return float((labels[decided] == truth[decided, None]).mean())
