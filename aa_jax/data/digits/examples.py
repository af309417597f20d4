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
from aa_jax.data.digits.images import SHIFTS, SPLITS, check_max_digits, load_digits, render_strip
from aa_jax.data.digits.responses import perfect_response, sample_response
from aa_jax.data.digits.tasks import Task, sample_task
from aa_jax.errors import ConfigError

KINDS = ("answer", "revise", "feedback")
MIX = {"answer": 0.65, "revise": 0.30, "feedback": 0.05}


@dataclass(frozen=True)
class Scene:
    """What is shown: which digit images, moved how, on which canvas. JSON-friendly by to_dict."""

    sources: tuple[int, ...]
    shifts: tuple[int, ...]
    max_digits: int

    def render(self) -> Image.Image:
        """The image strip, see :func:`~aa_jax.data.digits.images.render_strip`."""
        return render_strip(load_digits(), self.sources, self.max_digits, self.shifts)

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {
            "sources": list(self.sources),
            "shifts": list(self.shifts),
            "max_digits": self.max_digits,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Scene":
        """A scene from :meth:`to_dict`'s output."""
        return cls(tuple(values["sources"]), tuple(values["shifts"]), values["max_digits"])


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        kind: "answer", "revise" or "feedback"; "prompt" for evaluation prompts.
        conversation: (role, text) turns up to the target, with a media marker.
        target: text to be written; for evaluation prompts the perfect answer.
        task: the instruction with the true digits; grades by the oracle need nothing else.
        scene: what the image shows.
    """

    kind: str
    conversation: prompts.Conversation
    target: str
    task: Task
    scene: Scene

    @property
    def image(self) -> Image.Image:
        return self.scene.render()

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
        turns, images = [], 0
        for role, text in self.conversation:
            media, text = prompts.split_media(text)
            parts = [data_example.Part("image", index=images + k) for k in range(media)]
            images += media
            turns.append(data_example.message(role, text, parts))
        return data_example.Example(
            messages=tuple(turns),
            responses=tuple(responses),
            media=(self.image,) * images,
            where=f"digits:{self.kind}",
            meta=self.meta,
        )


def sample_scene(
    split: str, rng: np.random.Generator, max_digits: int = 3
) -> tuple[tuple[int, ...], Scene]:
    """Random digits of a split: their labels and the scene; one-pixel shifts in train only."""
    digits = load_digits()
    ids = digits.split(split)
    count = 1 + int(rng.random() * max_digits)
    sources = tuple(int(ids[int(rng.random() * len(ids))]) for _ in range(count))
    shifts = (0,) * count
    if split == "train":
        shifts = tuple(int(rng.random() * len(SHIFTS)) for _ in range(count))
    labels = tuple(int(digits.labels[source]) for source in sources)
    return labels, Scene(sources, shifts, max_digits)


class Examples(Sequence):
    """A sequence of examples made on access; ``len``, indexing and iteration."""

    stream: int  # keeps the random streams of different kinds of sets apart, whatever their seeds

    def __init__(self, n: int, seed: int, split: str, max_digits: int):
        check_max_digits(max_digits)
        load_digits().split(split)
        self.n, self.seed, self.split, self.max_digits = n, seed, split, max_digits
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
    ):
        super().__init__(n, seed, split, max_digits)
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
        digits, scene = sample_scene(self.split, rng, self.max_digits)
        task = sample_task(digits, rng)
        response = sample_response(task, rng, **self.flaws).text
        if kind == "answer":
            return Example(kind, prompts.answer(task.question), response, task, scene)
        if kind == "feedback":
            conversation = prompts.critique(task.question, response)
            return Example(kind, conversation, random_feedback(task, rng).text, task, scene)
        true = rng.random() < self.true_refinements
        advice = oracle.true_feedback(task, response) if true else random_feedback(task, rng)
        revised = oracle.apply_refinement(
            task, response, advice.actions, rng, follow=self.follow, break_right=self.break_right
        )
        conversation = prompts.refine(task.question, response, advice.refinement)
        return Example(kind, conversation, revised, task, scene)


class EvaluationPrompts(Examples):
    """Prompts without demonstrations: see :func:`evaluation_prompts`."""

    stream = 12

    def make(self, index: int) -> Example:
        """Prompt ``index``, a function of the seed and the index."""
        rng = self.rng(index)
        digits, scene = sample_scene(self.split, rng, self.max_digits)
        task = sample_task(digits, rng)
        perfect = perfect_response(task).text
        return Example("prompt", prompts.answer(task.question), perfect, task, scene)


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
            :func:`~aa_jax.data.digits.responses.sample_response`).

    Raises:
        ConfigError: unknown kind, or shares that do not add up to 1.
        DataError: unknown split or impossible ``max_digits``.
    """
    return SftExamples(n, seed, split, mix, **options)


def evaluation_prompts(
    n: int, seed: int, split: str = "test", *, max_digits: int = 3
) -> EvaluationPrompts:
    """Prompts of kind "prompt" whose ``target`` is the perfect answer.

    Use split "train" to collect answers for preference data, "validation" to choose settings,
    "test" once. Other splits are other prompts, also
    under the same seed.
    """
    return EvaluationPrompts(n, seed, split, max_digits)
