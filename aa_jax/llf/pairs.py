"""From (prompt, y, feedback, y*) to preference pairs: y* preferred over y.

Align-Anything (Ji et al. 2024), section 4.2: the improved response is taken as preferred. A pair
that says nothing (y* equal to y) or that cannot be trained on (an empty side, a side cut by the
length limit) is dropped, and every drop is counted.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aa_jax import hosts
from aa_jax.data.example import Example, Media
from aa_jax.errors import DataError


def normalise(text: str) -> str:
    """Text with runs of whitespace made one blank: what counts as the same answer."""
    return " ".join(text.split())


def form_pairs(
    responses: Sequence[Mapping[str, Any]], refinements: Sequence[Mapping[str, Any]]
) -> tuple[list[dict], dict[str, int]]:
    """Pairs the responses with their refinements.

    Args:
      responses: per prompt, `text` (y) and `finished`.
      refinements: per prompt, `text` (y*) and `finished`.

    Returns:
      The pairs that were kept (`index` of the prompt, `response`, `refinement`), and counts:
      `kept`, `identical`, `empty`, `cut`.
    """
    pairs, counts = [], Counter(kept=0, identical=0, empty=0, cut=0)
    for index, (first, second) in enumerate(zip(responses, refinements, strict=True)):
        response, refinement = normalise(first["text"]), normalise(second["text"])
        if not response or not refinement:
            counts["empty"] += 1
        elif not (first["finished"] and second["finished"]):
            counts["cut"] += 1
        elif response == refinement:
            counts["identical"] += 1
        else:
            counts["kept"] += 1
            pairs.append({"index": index, "response": response, "refinement": refinement})
    return pairs, dict(counts)


def write_pairs(path: Path, pairs: Sequence[dict], prompts: Sequence[Example]) -> None:
    """Writes the pairs as parquet with the columns the templates `AA_TI2T_LLF` and `AA_T2T_LLF`
    read.

    Columns: `prompt`, `image` (bytes; absent for text-only prompts), `response`, `refinement`,
    `index` (of the prompt).

    Called by all processes; one writes.

    Args:
      path: the file; replaced as a whole.
      pairs: from `form_pairs`.
      prompts: the prompts the pairs' `index` points into, of one turn with at most one image.

    Raises:
      DataError: a prompt has more turns, a system message, or media these columns cannot hold.
    """
    if hosts.index() == 0:
        _write(path, pairs, prompts)
    hosts.barrier("pairs written")


def _write(path: Path, pairs: Sequence[dict], prompts: Sequence[Example]) -> None:
    import datasets
    import pyarrow.parquet

    table: dict[str, list] = {"prompt": [], "image": [], "response": [], "refinement": []}
    for pair in pairs:
        prompt = _plain(prompts[pair["index"]])
        table["prompt"].append(prompt.messages[-1].text)
        table["image"].append(_encoded(prompt.media[0]) if prompt.media else None)
        table["response"].append(pair["response"])
        table["refinement"].append(pair["refinement"])
    table["index"] = [pair["index"] for pair in pairs]
    text = datasets.Value("string")
    features = {"prompt": text, "image": datasets.Image(), "response": text, "refinement": text}
    features["index"] = datasets.Value("int64")
    if all(image is None for image in table["image"]):
        del table["image"], features["image"]
    dataset = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    arrow = dataset.data.table.replace_schema_metadata(dataset.features.arrow_schema.metadata)
    partial = path.with_name(path.name + ".partial")
    pyarrow.parquet.write_table(arrow, partial)
    partial.replace(path)


def _plain(prompt: Example) -> Example:
    images = all(part.type == "image" for part in prompt.messages[-1].media)
    if len(prompt.messages) == 1 and len(prompt.media) <= 1 and images:
        return prompt
    roles = ", ".join(message.role for message in prompt.messages)
    kinds = ", ".join(part.type for m in prompt.messages for part in m.media) or "none"
    raise DataError(
        f"{prompt.where or 'A prompt'}: turns {roles}; media: {kinds}. Pairs are kept for prompts "
        "of one user turn with at most one image. Choose a template without system message whose "
        "prompt is a single turn."
    )


def _encoded(image: Any) -> dict[str, Any]:
    """The bytes of a file as they are; a drawn image as PNG."""
    if isinstance(image, Media):
        return {"bytes": image.data, "path": None}
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
