"""Random-access examples of the world: demonstrations for SFT, and prompts to evaluate on.

Example *i* of a set is a function of (seed, i) only, so any subset, order or restart sees the same
examples; images are drawn when asked for.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from aa_jax.data import example as data_example
from aa_jax.data.digits import oracle, prompts
from aa_jax.data.digits.feedback import random_feedback
from aa_jax.data.digits.images import SPLITS, check_max_digits, load_digits
from aa_jax.data.digits.responses import perfect_response, sample_response
from aa_jax.data.digits.scenes import KINDS as MEDIA_KINDS
from aa_jax.data.digits.scenes import Dialled, Film, Scene, Written, sample_scene
from aa_jax.data.digits.tasks import Task, sample_task
from aa_jax.errors import ConfigError, DataError

KINDS = ("answer", "revise", "feedback")
MIX = {"answer": 0.65, "revise": 0.30, "feedback": 0.05}


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        kind: "answer", "revise" or "feedback"; "prompt" for evaluation prompts.
        conversation: (role, text) turns up to the target, with a media marker.
        target: text to be written; for evaluation prompts the perfect answer.
        task: the instruction with the true digits; grades by the oracle need nothing else.
        scene: what shows the digits.
    """

    kind: str
    conversation: prompts.Conversation
    target: str
    task: Task
    scene: Scene | Written | Dialled | Film

    @property
    def image(self) -> Image.Image:
        return self.scene.render()

    @property
    def question(self) -> str:
        """The question as it is put to the model, without the medium."""
        return self.scene.ask(self.task.question)

    @property
    def meta(self) -> dict:
        """Task, scene and kind as JSON types."""
        return {"kind": self.kind, "task": self.task.to_dict(), "scene": self.scene.to_dict()}

    def to_data_example(self, responses: Sequence[str] | None = None) -> data_example.Example:
        """The same as what every other dataset row becomes (decoded image, messages).

        Args:
            responses: () for a prompt, (chosen, rejected) for a preference; default the target
                for demonstrations and () for evaluation prompts.
        """
        if responses is None:
            responses = () if self.kind == "prompt" else (self.target,)
        turns, shown = [], 0
        for role, text in self.conversation:
            media, text = prompts.split_media(text)
            parts = [data_example.Part(kind, index=shown + k) for k, kind in enumerate(media)]
            shown += len(media)
            turns.append(data_example.message(role, text, parts))
        return data_example.Example(
            messages=tuple(turns),
            responses=tuple(responses),
            media=self.scene.media() * shown,
            where=f"digits:{self.kind}",
            meta=self.meta,
        )


class Examples(Sequence):
    """A sequence of examples made on access; ``len``, indexing and iteration."""

    stream: int  # keeps the random streams of different kinds of sets apart, whatever their seeds

    def __init__(
        self, n: int, seed: int, split: str, max_digits: int, kind: str = "image",
        min_digits: int = 1,
    ):  # fmt: skip
        check_max_digits(max_digits)
        load_digits().split(split)
        if kind not in MEDIA_KINDS:
            raise DataError(f"the digits are shown as {', '.join(MEDIA_KINDS)}; got {kind!r}.")
        self.kind = kind
        self.n, self.seed, self.split, self.max_digits = n, seed, split, max_digits
        self.min_digits = min_digits
        self.split_index = list(SPLITS).index(split)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        if not -self.n <= index < self.n:
            raise IndexError(f"example {index} of {self.n}")
        return self.make(index % self.n)

    def __iter__(self) -> Iterator[Example]:
        return (self.make(index) for index in range(self.n))

    def rng(self, index: int) -> np.random.Generator:
        """The random stream of one example: its own per kind of set, split, seed and index."""
        return np.random.default_rng((self.stream, self.split_index, self.seed, index))

    def scene(self, rng: np.random.Generator):
        """Digits of the split, as many as asked for, and what shows them."""
        return sample_scene(self.split, rng, self.max_digits, self.kind, self.min_digits)

    @abc.abstractmethod
    def make(self, index: int) -> Example:
        """Example ``index``, a function of the seed and the index."""


class SftExamples(Examples):
    """Demonstrations: see :func:`sft_examples`."""

    stream = 11

    def __init__(
        self,
        n: int,
        seed: int,
        split: str = "train",
        mix: Mapping[str, float] = MIX,
        *,
        max_digits: int = 3,
        true_refinements: float = 0.5,
        follow: float = 0.85,
        break_right: float = 0.7,
        flaws: Mapping[str, float] | None = None,
        media: str = "image",
        min_digits: int = 1,
    ):
        super().__init__(n, seed, split, max_digits, media, min_digits)
        unknown = sorted(set(mix) - set(KINDS))
        if unknown or not np.isclose(sum(mix.values()), 1):
            raise ConfigError(
                f"mix gives shares that add up to 1 for {', '.join(KINDS)}; got {dict(mix)}."
            )
        self.bounds = np.cumsum([mix.get(kind, 0.0) for kind in KINDS])[:-1]
        self.true_refinements = true_refinements
        self.follow, self.break_right = follow, break_right
        self.flaws = dict(flaws or {})

    def make(self, index: int) -> Example:
        """Example ``index``, a function of the seed and the index."""
        rng = self.rng(index)
        kind = KINDS[int(np.searchsorted(self.bounds, rng.random(), side="right"))]
        digits, scene = self.scene(rng)
        task = sample_task(digits, rng)
        question = scene.ask(task.question)
        response = sample_response(task, rng, **self.flaws).text
        if kind == "answer":
            return Example(kind, prompts.answer(question, self.kind), response, task, scene)
        if kind == "feedback":
            conversation = prompts.critique(question, response, self.kind)
            return Example(kind, conversation, random_feedback(task, rng).text, task, scene)
        true = rng.random() < self.true_refinements
        advice = oracle.true_feedback(task, response) if true else random_feedback(task, rng)
        revised = oracle.apply_refinement(
            task, response, advice.actions, rng, follow=self.follow, break_right=self.break_right
        )
        conversation = prompts.refine(question, response, advice.refinement, self.kind)
        return Example(kind, conversation, revised, task, scene)


class EvaluationPrompts(Examples):
    """Prompts without demonstrations: see :func:`evaluation_prompts`."""

    stream = 12

    def make(self, index: int) -> Example:
        """Prompt ``index``, a function of the seed and the index."""
        rng = self.rng(index)
        digits, scene = self.scene(rng)
        task = sample_task(digits, rng)
        asked = prompts.answer(scene.ask(task.question), self.kind)
        return Example("prompt", asked, perfect_response(task).text, task, scene)


def sft_examples(
    n: int, seed: int, split: str = "train", mix: Mapping[str, float] = MIX, **options
) -> SftExamples:
    """Demonstrations with the flaws of the annotators who wrote them.

    ``answer``: x -> a flawed answer. ``revise``: x, a flawed answer, a refinement -> the answer
    revised *literally*, with true refinements in half of the examples and random ones in the other
    half, so that what the advice says matters. ``feedback``: (x, y) -> critique and refinement
    with *random* statuses: the format without the judgement.

    Args:
        n: number of examples.
        seed: of everything random.
        split: of the digit images; only "train" is augmented by shifts.
        mix: share of each kind, adding up to 1.
        **options: ``max_digits`` (3), ``true_refinements`` (0.5), ``follow`` (0.85),
            ``break_right`` (0.7), ``flaws`` (rates of
            :func:`~aa_jax.data.digits.responses.sample_response`), ``media`` (what shows the
            digits: "image", "text", "audio" or "video"), ``min_digits`` (1).

    Raises:
        ConfigError: unknown kind, or shares that do not add up to 1.
        DataError: unknown split or impossible ``max_digits``.
    """
    return SftExamples(n, seed, split, mix, **options)


def evaluation_prompts(
    n: int, seed: int, split: str = "test", *, max_digits: int = 3, media: str = "image",
    min_digits: int = 1,
) -> EvaluationPrompts:  # fmt: skip
    """Prompts of kind "prompt" whose ``target`` is the perfect answer.

    Use split "train" to collect answers for preference data, "validation" to choose settings,
    "test" once. Other splits are other prompts, also
    under the same seed.
    """
    return EvaluationPrompts(n, seed, split, max_digits, media, min_digits)
