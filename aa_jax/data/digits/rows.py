"""Dataset rows with the column names of PKU-Alignment/align-anything, and parquet files of them.

Preference rows follow the configs ``text-image-to-text``, ``text-to-text``, ``text-audio-to-text``
and ``text-video-to-text``, demonstrations ``Align-Anything-TI2T-Instruction-100K``; templates
written for those read these. Rows whose answers are media: :mod:`generation`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from aa_jax.data.digits import oracle
from aa_jax.data.digits.annotators import Annotator, Pair
from aa_jax.data.digits.examples import Example, evaluation_prompts
from aa_jax.data.digits.feedback import Feedback
from aa_jax.data.digits.oracle import DIMENSIONS, INFORMATIVE
from aa_jax.data.digits.prompts import split_media
from aa_jax.data.digits.responses import parse, sample_response
from aa_jax.errors import DataError

_IMAGES = ("image", "image_1", "image_2", "input_image", "output_image", "better_img", "worse_img")
_AUDIO = ("audio", "audio_path")
_VIDEOS = ("video", "video_path", "video_1", "video_2")
DEMONSTRATOR = "digits-demonstrator"
_SPOKEN = {
    "prompt_following": "following",
    "objective_rules": "rules",
    "clarity": "clarity",
    "information_richness": "information",
}


# What shows the digits -> name of the prompt's column, names of the media columns.
MEDIA_COLUMNS = {
    "image": ("question", ("image",)),
    "text": ("question", ()),
    "audio": ("prompt", ("audio_path",)),
    "video": ("prompt", ("video_path",)),
}


def preference_columns(media: str = "image") -> list[str]:
    """Column names of a preference row of that subtask, in order."""
    question, shown = MEDIA_COLUMNS[media]
    columns = [question, *shown, "response_1", "response_2", "res_1_from", "res_2_from"]
    tail = ["text_critique_1", "text_critique_2", "overall_response", "overall_textfeedback"]
    for letter, dimension in DIMENSIONS.items():
        columns += [f"{letter}_response", f"{dimension}_rate_1", f"{dimension}_rate_2"]
        columns += [f"{letter}_rationale_1", f"{letter}_rationale_2"]
    return columns + tail


def preference_row(
    example: Example,
    response_1: str,
    response_2: str,
    rng: np.random.Generator,
    *,
    annotator: Annotator | None = None,
    label_from: str = "binary",
    sources: tuple[str, str] = (DEMONSTRATOR, DEMONSTRATOR),
    meta: bool = False,
) -> dict:
    """One annotated pair.

    ``text_critique_k`` is the annotator's feedback on response k, rates and rationales are what
    that feedback implies, so a row never contradicts itself. ``overall_response`` is a comparison
    of its own (``label_from="binary"``, people who compare without writing) or implied by the
    rates (``"feedback"``). Where a dimension's rates are equal its winner is the overall one.

    Args:
        example: task and scene.
        response_1: first answer text.
        response_2: second answer text.
        rng: source of the annotator's errors.
        annotator: None is the oracle: no errors, a true tie is a coin toss.
        label_from: "binary" or "feedback"; without effect for the oracle.
        sources: who wrote the answers.
        meta: adds a column ``meta`` (JSON of task and scene), so the truth can be looked up.

    Raises:
        DataError: unknown ``label_from``.
    """
    if label_from not in ("binary", "feedback"):
        raise DataError(f"label_from is binary or feedback, got {label_from!r}.")
    task, texts = example.task, (response_1, response_2)
    if annotator is None:
        notes = [oracle.true_feedback(task, text) for text in texts]
        readings = [oracle.read(task, text) for text in texts]
    else:
        notes = [annotator.feedback(task, text, rng) for text in texts]
        readings = [_implied_reading(text, note) for text, note in zip(texts, notes, strict=True)]
    rates = [oracle.scores(**oracle.counts(reading)) for reading in readings]
    told = [oracle.rationales(reading) for reading in readings]
    totals = [int(rate.sum()) for rate in rates]
    if annotator is not None and label_from == "binary":
        overall = annotator.binary_label(Pair(task, response_1, response_2), rng)
    elif totals[0] == totals[1]:
        overall = 1 + int(rng.random() < 0.5)
    else:
        overall = 1 if totals[0] > totals[1] else 2
    media = example.scene.kind
    row = {
        MEDIA_COLUMNS[media][0]: example.question,
        **example.scene.columns(),
        "response_1": response_1,
        "response_2": response_2,
        "res_1_from": sources[0],
        "res_2_from": sources[1],
    }
    scored = [dict(zip(INFORMATIVE, map(int, rate), strict=True)) | {"safety": 3} for rate in rates]
    better = []
    for letter, dimension in DIMENSIONS.items():
        first, second = scored[0][dimension], scored[1][dimension]
        row[f"{letter}_response"] = overall if first == second else 1 if first > second else 2
        for number in (0, 1):
            row[f"{dimension}_rate_{number + 1}"] = scored[number][dimension]
            row[f"{letter}_rationale_{number + 1}"] = told[number][dimension]
        if scored[overall - 1][dimension] > scored[2 - overall][dimension]:
            better.append(_SPOKEN[dimension])
    row["text_critique_1"], row["text_critique_2"] = notes[0].text, notes[1].text
    row["overall_response"] = overall
    why = f"better in {' and '.join(better)}" if better else "better as given"
    row["overall_textfeedback"] = f"##Reason: response {overall} is {why} ."
    if meta:
        row["meta"] = json.dumps(example.meta)
    return {name: row[name] for name in preference_columns(media) + ["meta"] * meta}


def _implied_reading(text: str, note: Feedback) -> oracle.Reading:
    """What the annotator believes the answer to be, given the feedback written on it."""
    diagnosis = note.diagnosis
    return oracle.Reading(
        values={},
        rest=(),
        statuses=diagnosis.statuses,
        extras=diagnosis.extras,
        false_extras=0,
        form=parse(text).form,
        form_good=diagnosis.form_good,
        malformed=False,
    )


def preference_rows(
    n: int,
    seed: int,
    split: str = "train",
    *,
    annotator: Annotator | None = None,
    label_from: str = "binary",
    max_digits: int = 3,
    meta: bool = False,
    flaws: dict[str, float] | None = None,
    media: str = "image",
) -> Iterator[dict]:
    """``n`` annotated pairs of demonstrations with different texts.

    Row *i* depends on (seed, i) only. For answers of a model use :func:`preference_row`.
    """
    examples = evaluation_prompts(n, seed, split, max_digits=max_digits, media=media)
    for index, example in enumerate(examples):
        rng = np.random.default_rng((21, seed, index))
        first = sample_response(example.task, rng, **(flaws or {})).text
        second = first
        while second == first:
            second = sample_response(example.task, rng, **(flaws or {})).text
        yield preference_row(
            example, first, second, rng, annotator=annotator, label_from=label_from, meta=meta
        )


def sft_rows(examples: Iterable[Example], *, messages: bool = False) -> Iterator[dict]:
    """Demonstrations as rows ``prompt, response`` and their medium (``image``, ...).

    Args:
        examples: from :func:`~aa_jax.data.digits.examples.sft_examples`.
        messages: adds ``kind`` and ``messages`` (the conversation before the response, a list of
            role and content with ``<image>`` or the like in place), and allows examples of several
            turns, whose ``prompt`` is then the last turn alone.

    Raises:
        DataError: an example of several turns does not fit one ``prompt`` column.
    """
    for number, example in enumerate(examples):
        turns = example.conversation
        if len(turns) > 1 and not messages:
            raise DataError(
                f"example {number} (kind {example.kind}) has {len(turns)} turns, but the columns "
                "prompt, response, image hold one. Pass messages=True, or a mix without revise."
            )
        row = {
            "prompt": split_media(turns[-1][1])[1],
            "response": example.target,
            **example.scene.columns(),
        }
        if messages:
            row["kind"] = example.kind
            row["messages"] = [{"role": role, "content": text} for role, text in turns]
        yield row


def features_of(columns: Sequence[str]):
    """``datasets.Features`` of rows with these columns; images and audio are real columns of
    their kind, videos the same structure of bytes and path."""
    import datasets

    text, number = datasets.Value("string"), datasets.Value("int64")
    turns = datasets.List({"role": text, "content": text})
    file = {"bytes": datasets.Value("binary"), "path": text}
    special = dict.fromkeys(_IMAGES, datasets.Image()) | dict.fromkeys(_AUDIO, datasets.Audio())
    special |= dict.fromkeys(_VIDEOS, file) | {"messages": turns}
    numbers = {f"{letter}_response" for letter in DIMENSIONS} | {"overall_response"}
    numbers |= {f"overall_{kind}" for kind in ("image", "audio", "video")}

    def feature(name: str):
        if name in numbers or name.endswith(("_rate_1", "_rate_2")):
            return number
        # T2A calls its clips response_1 and response_2, as T2T calls its texts.
        if name in ("response_1", "response_2") and "overall_audio" in columns:
            return datasets.Audio()
        return special.get(name, text)

    return datasets.Features({name: feature(name) for name in columns})


def write_parquet(rows: Iterable[dict], path: str | Path) -> Path:
    """Writes rows as one parquet file, readable by
    ``datasets.load_dataset("parquet", data_files=path)``.

    Raises:
        DataError: there are no rows.
    """
    import datasets
    import pyarrow.parquet

    table = list(rows)
    if not table:
        raise DataError(f"nothing to write to {path}: there are no rows.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(table[0])
    data = {name: [row[name] for row in table] for name in columns}
    features = features_of(columns)
    # As files are stored; encoding an audio column itself would ask for torchcodec.
    file = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    stored = datasets.Features(
        {k: file if isinstance(v, datasets.Audio) else v for k, v in features.items()}
    )
    dataset = datasets.Dataset.from_dict(data, features=stored)
    # The schema's metadata carry the features; Dataset.to_parquet would draw a progress bar.
    arrow = dataset.data.table.replace_schema_metadata(features.arrow_schema.metadata)
    pyarrow.parquet.write_table(arrow, path)
    return path
