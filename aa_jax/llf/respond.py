"""Sampling one response per prompt into a JSONL file that survives being killed.

Every prompt has its own seed, so a run that was interrupted continues with the prompt after the
last complete line and ends with the same file as one that was not.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from aa_jax import hosts
from aa_jax.data.collate import Shapes, collate, grow, plan_shapes
from aa_jax.data.example import InvalidRow
from aa_jax.data.tokens import Limits, encode_example
from aa_jax.sampling import generate
from aa_jax.sharding import batch_devices, pad_rows, put_batch
from aa_jax.training.progress import Progress

logger = logging.getLogger(__name__)


def respond(
    path: str | os.PathLike,
    prompts: Sequence,
    *,
    params: dict,
    sampler: Callable,
    processor,
    prompt_length: int,
    batch_rows: int,
    seed: int,
    title: str,
    mesh: jax.sharding.Mesh | None = None,
) -> list[dict]:
    """Samples a response to each prompt.

    In a job of several processes each samples its rows of every batch, all get all lines, and one
    writes them.

    Args:
      path: JSONL file, one line per prompt: `index`, `text`, `tokens` (their number, with the end
        token), `logp` (their summed log-probability), `finished` (False: cut by the limit).
      prompts: prompt-only Examples, by random access.
      params: the model's parameters.
      sampler: from `aa_jax.sampling.make_sampler`.
      processor: the model's `Processor`.
      prompt_length: static prompt length in tokens; a longer prompt gets the empty response of
        `NOTHING`, counted in a warning: it is never cut.
      batch_rows: requests per batch.
      seed: of the whole file; request i uses a stream of its own.
      title: for the progress bar.
      mesh: the batch's rows go over its data and fsdp axes.

    Returns:
      The lines of the file, in the order of `prompts`.
    """
    path = Path(path)
    writes = hosts.index() == 0
    lines = hosts.first(read_lines(path)[: len(prompts)] if writes else None)
    seeds = np.random.SeedSequence(seed).generate_state(max(len(prompts), 1), np.uint32)
    limits = Limits(max_prompt_length=prompt_length)
    path.parent.mkdir(parents=True, exist_ok=True)
    dropped, shapes = 0, None
    file_ = open(path, "a") if writes else contextlib.nullcontext()
    with file_ as file, Progress(title, len(prompts), len(lines)) as progress:
        while len(lines) < len(prompts):
            start = len(lines)
            stop = min(start + batch_rows, len(prompts))
            encoded, rows = [], []
            for index in range(start, stop):
                try:
                    encoded.append(encode_example(prompts[index], processor, limits))
                    rows.append(index)
                except InvalidRow as error:
                    logger.debug("prompt %d gets no response: %s", index, error)
                    dropped += 1
            texts = []
            if rows:
                shapes = grow(shapes, plan_shapes(encoded, "prompt"))
                shapes = dataclasses.replace(shapes, length=prompt_length)
                texts = _sample(encoded, [int(seeds[i]) for i in rows], params, sampler, processor,
                                shapes, batch_rows, mesh)  # fmt: skip
            found = dict(zip(rows, texts, strict=True))
            new = [{"index": i, **found.get(i, NOTHING)} for i in range(start, stop)]
            lines += new
            if writes:
                file.writelines(json.dumps(line) + "\n" for line in new)
                file.flush()
                os.fsync(file.fileno())
            progress.update(len(lines))
    if dropped:
        logger.warning(
            "%s: %d of %d prompts are longer than %d tokens and got no response.",
            title, dropped, len(prompts), prompt_length,
        )  # fmt: skip
    return lines


# The line of a prompt that could not be answered.
NOTHING = {"text": "", "tokens": 0, "logp": 0.0, "finished": False}


def _sample(
    encoded: Sequence,
    seeds: Sequence[int],
    params: dict,
    sampler: Callable,
    processor,
    shapes: Shapes,
    batch_rows: int,
    mesh: jax.sharding.Mesh | None,
) -> list[dict]:
    """One batch: the responses to encoded prompts, in their order."""
    batch = collate(encoded, shapes, "prompt", batch_rows=batch_rows, pad_id=processor.pad_id)
    padded = np.zeros(batch_rows, np.uint32)
    padded[: len(seeds)] = seeds
    if mesh is not None:
        batch = put_batch(pad_rows(batch, batch_devices(mesh)), mesh)
        padded = np.pad(padded, (0, len(batch["tokens"]) - batch_rows))
    samples = generate(sampler, params, batch, padded)
    lines = []
    for row in range(len(encoded)):
        count = int(samples.mask[row].sum())
        line = {
            "text": processor.decode(samples.tokens[row, :count]),
            "tokens": count,
            "logp": float(samples.logps[row].sum()),
            "finished": bool(samples.finished[row]),
        }
        lines.append(line)
    return lines


def read_lines(path: Path) -> list[dict]:
    """Reads the complete lines of a JSONL file and cuts a torn last line off the file."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    complete = raw.rfind(b"\n") + 1
    if complete < len(raw):
        logger.warning("%s ended in the middle of a line; that response is sampled again.", path)
        with open(path, "r+b") as file:
            file.truncate(complete)
    return [json.loads(line) for line in raw[:complete].splitlines()]
