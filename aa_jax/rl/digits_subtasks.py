"""The digits world's subtasks as reinforcement learning sees them: asked, answered, graded.

One class per kind of answer, text (`Texts`) or a drawing (`Drawings`); what shows the digits is an
argument. Both have the same methods, so one experiment (`aa_jax.rl.digits_run`) serves every
subtask and family.
"""

import dataclasses
import io
import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aa_jax.data import digits
from aa_jax.data.collate import plan_shapes
from aa_jax.data.digits import generation, makers
from aa_jax.data.digits.images import SPLITS, png_bytes
from aa_jax.data.encoded import EncodedExamples
from aa_jax.data.example import Example, Message, Part, message
from aa_jax.data.tokens import encode_example
from aa_jax.errors import ConfigError
from aa_jax.llf import digits_world as world
from aa_jax.llf.digits_run import NO_FLAWS, default_lengths
from aa_jax.llf.lab import Lab, Lengths
from aa_jax.llf.prompts import Lazy
from aa_jax.llf.respond import read_lines
from aa_jax.rewards.base import Request
from aa_jax.rewards.oracle import Oracle
from aa_jax.rl.actor import Actor
from aa_jax.small_models import SHOWN

Order = generation.Order
DRAWN = ("T2I", "TI2TI")


class Texts:
    """Questions about digits shown in some way, answered in text.

    Args:
      subtask: key of `aa_jax.small_models.SHOWN`.
      lab: shared settings of the run; `fit` sets its lengths.
      max_digits: most digits shown.
      min_digits: fewest digits shown.
    """

    def __init__(self, subtask: str, lab: Lab, max_digits: int, min_digits: int = 1):
        self.subtask, self.lab, self.max_digits = subtask, lab, max_digits
        self._shown = {
            "max_digits": max_digits, "media": SHOWN[subtask], "min_digits": min_digits
        }  # fmt: skip

    def fit(self, base: str) -> None:
        """Plans the static lengths of prompts for the tokens of a checkpoint folder."""
        lengths = default_lengths(self.max_digits)
        if self.subtask != "TI2T":
            processor = self.lab.load(base)[2]
            some = [encode_example(one, processor) for one in self.asked(self.records("train", 64))]
            lengths["answer_prompt"] = max(len(one.prompt) for one in some) + 4
        self.lab.lengths = Lengths(**lengths)

    def records(self, split: str, count: int, offset: int = 0) -> Sequence[digits.Example]:
        """``count`` prompts of a split; offsets keep the uses of one split apart."""
        every = digits.evaluation_prompts(offset + count, self.lab.seed, split, **self._shown)
        return Lazy(count, lambda i: every[offset + i])

    def asked(self, records: Sequence) -> Sequence[Example]:
        """Prompts whose meta holds the truth as "reference"."""

        def one(index: int) -> Example:
            record = records[index]
            return record.to_data_example(()).replace(meta={"reference": record.task})

        return Lazy(len(records), one)

    def demonstrations(self, count: int, seed: int, *, clean: bool = False, **options: Any):
        """Examples to imitate: without a flaw, or with `sample_response`'s (``flaws``)."""
        options = {"mix": {"answer": 1.0}, **options}
        if clean:
            options["flaws"] = NO_FLAWS
        shown = digits.sft_examples(count, seed, **self._shown, **options)
        return Lazy(count, lambda i: shown[i].to_data_example())

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of `aa_jax.rl.train.train`'s ``sampling``."""
        lab = self.lab
        return {"max_new_tokens": lab.lengths.answer, "batch_rows": lab.batch_rows,
                "temperature": lab.temperature}  # fmt: skip

    def answer(
        self, path: Path, records: Sequence, *, params: Any, base: str, greedy: bool = False
    ) -> list[dict]:
        """One answer per prompt, into a JSONL file that is continued if it is there."""
        return self.lab.answer(
            path, self.asked(records), kind="answer", params=params, base=base, greedy=greedy
        )

    def requests(self, records: Sequence, answers: Sequence[Mapping]) -> list[Request]:
        """Answers as rewards see them."""
        return [
            Request(prompt, line["text"], record.task, {"finished": line["finished"]})
            for prompt, record, line in zip(self.asked(records), records, answers, strict=True)
        ]

    def scores(self, records: Sequence, answers: Sequence[Mapping]) -> dict[str, list[float]]:
        """The oracle's grades of every answer, their mean, and the length in words."""
        return world.scores(records, answers)

    def pairs(
        self, records: Sequence, first: Sequence[Mapping], second: Sequence[Mapping]
    ) -> list[Example]:
        """Per prompt (better, worse) by the oracle; ties, empty and cut answers are left out."""
        made = []
        for record, a, b in zip(records, first, second, strict=True):
            usable = a["finished"] and b["finished"] and a["text"].strip() and b["text"].strip()
            better = digits.prefer(record.task, a["text"], b["text"]) if usable else 0
            if better:
                texts = (a["text"], b["text"]) if better == 1 else (b["text"], a["text"])
                made.append(record.to_data_example(texts))
        return made


class Drawings:
    """Orders to draw digits (and to say them, where they are shown), answered by a Chameleon.

    Args:
      subtask: "T2I" or "TI2TI".
      lab: shared settings of the run.
      max_digits: most digits drawn, the edge of the canvas.
      tokenizer: folder of the image tokenizer with its decoder.
      min_digits: fewest digits ordered.
    """

    def __init__(
        self, subtask: str, lab: Lab, max_digits: int, tokenizer: str, min_digits: int = 1
    ):
        self.subtask, self.lab, self.max_digits = subtask, lab, max_digits
        self.min_digits = min_digits
        self.tokenizer = tokenizer
        self._actors: dict[Any, Actor] = {}  # by what they are compiled for

    def fit(self, base: str) -> None:
        """Nothing: lengths follow from the prompts."""

    def _order(self, stream: int, seed: int, split: str, index: int) -> tuple[Order, Any]:
        rng = np.random.default_rng((stream, list(SPLITS).index(split), seed, index))
        span = self.max_digits, self.min_digits
        return generation.sample_order(self.subtask, split, rng, *span), rng

    def _example(self, order: Order, answers: Sequence[generation.Answer] = ()) -> Example:
        shown = order.scene.media()
        parts = [Part("image", index=k) for k in range(len(shown))]
        responses = []
        for k, one in enumerate(answers):
            said = (Part("text", text=one.text),) if one.text else ()
            drawn = Part("image", index=len(shown) + k)
            responses.append(Message("assistant", (*said, drawn)))
        return Example(
            (message("user", order.question, parts),), tuple(responses),
            (*shown, *(one.medium for one in answers)), f"digits:{self.subtask}",
            {"reference": order},
        )  # fmt: skip

    def records(self, split: str, count: int, offset: int = 0) -> Sequence[Order]:
        """``count`` orders of a split; offsets keep the uses of one split apart."""
        seed = self.lab.seed
        return Lazy(count, lambda i: self._order(53, seed, split, offset + i)[0])

    def asked(self, records: Sequence[Order]) -> Sequence[Example]:
        """Prompts whose meta holds the truth as "reference"."""
        return Lazy(len(records), lambda i: self._example(records[i]))

    def demonstrations(
        self, count: int, seed: int, *, clean: bool = False, flawed: float = 0.4
    ) -> Sequence[Example]:
        """Examples to imitate; a share of ``flawed`` has a flaw out of `generation.FLAWS`."""

        def one(index: int) -> Example:
            order, rng = self._order(54, seed, "train", index)
            flaw = None
            if not clean and rng.random() < flawed:
                flaw = generation.FLAWS[int(rng.integers(len(generation.FLAWS)))]
            return self._example(order, [generation.answer(order, rng, flaw)])

        return Lazy(count, one)

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of `aa_jax.rl.train.train`'s ``sampling``."""
        lab, image = self.lab, (2 * self.max_digits) ** 2 + 2
        said = 5 + self.max_digits if self.subtask == "TI2TI" else 0
        return {
            "max_new_tokens": image + said + 1, "batch_rows": lab.batch_rows,
            "temperature": lab.temperature, "images": "one", "image_tokenizer": self.tokenizer,
        }  # fmt: skip

    def answer(
        self, path: Path, records: Sequence[Order], *, params: Any, base: str, greedy: bool = False
    ) -> list[dict]:
        """One answer per prompt, into a JSONL file that is read if it is there.

        Each line has its `text`, its `pictures` as PNG in base64, and whether it is `finished`.
        """
        if path.exists():
            return read_lines(path)
        model, _, processor = self.lab.load(base)
        data, lines = EncodedExamples(self.asked(records), processor), []
        shapes = plan_shapes(data.sizes, "prompt")
        key = (base, repr(shapes))
        if key not in self._actors:
            self._actors[key] = Actor(
                model, processor, self.lab.mesh, prompt=shapes, **self.sampling()
            )
        actor = self._actors[key]
        seed = self.lab.stream(str(path.relative_to(self.lab.workdir)))
        seeds = np.random.SeedSequence(seed).generate_state(len(data), np.uint32)
        rows = [data[i] for i in range(len(data))]
        samples = [one for (one,) in actor.respond(params, rows, seeds[:, None], greedy=greedy)]
        for sample, (text, pictures) in zip(samples, actor.read(samples), strict=True):
            drawn = [b64encode(png_bytes(Image.fromarray(p))).decode() for p in pictures]
            lines.append({"text": text, "pictures": drawn, "finished": sample.finished})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        partial.rename(path)
        return lines

    def requests(self, records: Sequence[Order], answers: Sequence[Mapping]) -> list[Request]:
        """Answers as rewards see them."""
        return [
            Request(prompt, line["text"], record, {"finished": line["finished"]}, _pictures(line))
            for prompt, record, line in zip(self.asked(records), records, answers, strict=True)
        ]

    def scores(
        self, records: Sequence[Order], answers: Sequence[Mapping]
    ) -> dict[str, list[float]]:
        """The oracle's grades of every answer, their mean, and how many digits are drawn."""
        requests = self.requests(records, answers)
        found = Oracle()(requests)
        table = {name: [one.parts[name] for one in found] for name in found[0].parts}
        table["mean"] = [float(one.value) for one in found]
        table["drawn"] = [
            float(sum(len(makers.read_picture(p)) for p in one.pictures)) for one in requests
        ]
        return table

    def pairs(
        self, records: Sequence[Order], first: Sequence[Mapping], second: Sequence[Mapping]
    ) -> list[Example]:
        """Per prompt (better, worse) by the oracle; ties are left out."""
        asked = [self.requests(records, answers) for answers in (first, second)]
        values = [[one.value for one in Oracle()(requests)] for requests in asked]
        made = []
        for a, b, x, y in zip(*asked, *values, strict=True):
            if x != y:
                chosen, rejected = (one.answered for one in ((a, b) if x > y else (b, a)))
                made.append(_compared(chosen, rejected))
        return made


def _pictures(line: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    files = (io.BytesIO(b64decode(drawn)) for drawn in line["pictures"])
    return tuple(np.asarray(Image.open(file).convert("RGB")) for file in files)


def _compared(chosen: Example, rejected: Example) -> Example:
    """One example of two answers to the same prompt, each with its own pictures."""
    shift = len(chosen.media) - sum(len(m.media) for m in rejected.messages)
    moved = [
        part if part.index is None else dataclasses.replace(part, index=part.index + shift)
        for part in rejected.responses[0].content
    ]
    other = dataclasses.replace(rejected.responses[0], content=tuple(moved))
    own = rejected.media[len(rejected.media) - len(other.media) :]
    return chosen.replace(
        responses=(*chosen.responses, other), media=(*chosen.media, *own), meta={}
    )


def subtask_of(
    name: str, lab: Lab, max_digits: int, tokenizer: str, min_digits: int = 1
) -> Texts | Drawings:
    """The subtask of a name.

    Args:
      name: a key of `aa_jax.small_models.SHOWN`, "T2I" or "TI2TI".
      lab: shared settings of the run.
      max_digits: most digits shown or drawn.
      tokenizer: folder of the image tokenizer, where images are drawn.
      min_digits: fewest digits shown or ordered.

    Raises:
      ConfigError: there is none of that name.
    """
    if name in SHOWN:
        return Texts(name, lab, max_digits, min_digits)
    if name in DRAWN:
        return Drawings(name, lab, max_digits, tokenizer, min_digits)
    raise ConfigError(f"subtask is {name!r}; it must be one of {', '.join((*SHOWN, *DRAWN))}.")
